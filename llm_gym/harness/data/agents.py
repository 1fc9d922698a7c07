"""Who plays the episodes of an environment: the driver's own loop, or an agent of a user's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llm_gym.errors import ConfigError
from llm_gym.harness.settings import checked
from llm_gym.policies import Completer
from llm_gym.rollouts.driver import Driver

if TYPE_CHECKING:
    from llm_gym.serving.agents import Agent


@checked("agent")
@dataclass(frozen=True)
class AgentConfig:
    """An agent that plays every episode against a chat endpoint (docs/agents.md); one of the two, or none."""

    function: str | None = None
    """`package.module:function`, called as `function(task, endpoint)`, plain or `async def`."""
    command: str | None = None
    """A program that reads the task as JSON from standard input; its output is scored by the environment."""

    def __post_init__(self) -> None:
        if self.function is not None and self.command is not None:
            raise ConfigError(f"agent.command: got {self.command!r} beside agent.function={self.function!r}; pass one.")

    def __bool__(self) -> bool:
        return self.function is not None or self.command is not None

    def make(self) -> Agent:
        """The agent.

        Raises:
            ConfigError: no such function, or no such program.
        """
        from llm_gym.serving.agents import CommandAgent, FunctionAgent

        return CommandAgent(self.command) if self.command is not None else FunctionAgent(str(self.function))

    def check(self) -> None:
        """Looks whether it can be made, before a model is loaded."""
        if self:
            self.make().close()

    def driver(self, env: str | Callable[..., Any], policy: Completer, **options: Any) -> Driver:
        """What plays episodes of `env`; `options` are those of `Driver`."""
        if not self:
            return Driver(env, policy, **options)
        from llm_gym.serving.agent_driver import AgentDriver

        return AgentDriver(env, policy, agent=self.make, **options)


NO_AGENT = AgentConfig()
"""The driver's own loop plays."""
