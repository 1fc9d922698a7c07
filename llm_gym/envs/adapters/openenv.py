"""`OpenEnv-v0`: the environment that a server of OpenEnv's protocol has, ours (`llmgym serve-env`) or any other.

https://github.com/huggingface/OpenEnv, version 0.10. Their package is not needed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from llm_gym.chat import Chat
from llm_gym.core import Ids, Messages
from llm_gym.env import Reply, TextEnv
from llm_gym.envs.adapters.connection import Connection, Data, Lost, Refused, Server
from llm_gym.envs.adapters.dialects import Dialect, Ours, Theirs
from llm_gym.envs.tools.parsers import formats
from llm_gym.envs.tools.parsers.calls import ToolCall, open_thinking
from llm_gym.envs.tools.schema import example_arguments
from llm_gym.errors import ConfigError, LLMGymError, RewardError, SettingError, ToolFailure

KINDS = {kind.__name__: kind for kind in (SettingError, ToolFailure, RewardError)}
"""Errors of an environment elsewhere that end an episode here as they would there."""


class OpenEnv(TextEnv):
    """The environment of a server, played over the network; an awaited one, so that thousands need no thread.

    Args:
        url: where the server is, such as `http://127.0.0.1:8100`.
        token: what the server asks for; None: the LLM_GYM_TOKEN of the environment, if it asks.
        action: the field of an action that takes the reply's text; None: the one text field that there must be, or may
            be. If several must be filled, the reply is to be a JSON object of them, and the model is told so.
        prompt: what the model is shown of an observation, with fields in braces: `"{board}\\nYour move:"`; None: its
            messages if it has some, else its text, or all of its fields by name.
        reset: further arguments of every reset.
        timeout: seconds in which the server must answer.
        tool_format: as for a `ToolEnv`, where the environment has tools.
        reward_weights: over those that the environment has there.
        kwargs: the common arguments of `TextEnv`. Limits of tokens are the environment's own unless given.

    A server of ours is played as the environment would be here: the same messages, tools, rewards and ends, for the
    same seeds and rows; `action`, `prompt` and `reset` are for others. Those have the component `reward`, and `format`,
    -1 for each reply that is no action (weight 0.1); an episode that ends `truncated` there does so here.

    A connection that is lost ends the episode with `env_error`, and the next reset makes a new one.

    Raises:
        ConfigError: no server there, a token it does not take, it is full, or a field that it does not have.
    """

    def __init__(
        self,
        *,
        url: str,
        token: str | None = None,
        action: str | None = None,
        prompt: str | None = None,
        reset: Mapping[str, Any] | None = None,
        timeout: float = 300.0,
        tool_format: str | None = None,
        reward_weights: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not timeout > 0:
            raise ConfigError(f"timeout: got {timeout!r}, want seconds, more than 0.")
        self.server: Server | None = Server.enter(url, token, timeout)
        try:
            own, schema = self.server.own, self.server.schema
            others = {"action": action, "prompt": prompt, "reset": reset}
            self.dialect: Dialect = Ours(own, others) if own else Theirs(schema, action, prompt, reset)
            self._connection: Connection | None = None
            self._earned: float | None = None
            self._session, self._weighs, self._tool_format = "", reward_weights is not None, tool_format
            self.format: formats.Format | None = None
            self.reward_names = self.dialect.reward_names  # type: ignore[misc]
            self.num_tasks = self.dialect.num_tasks
            self.metadata = {**self.metadata, "fixed_start": self.dialect.fixed_start}
            weights = {**self.dialect.reward_weights, **(reward_weights or {})}
            super().__init__(reward_weights=weights, **{**self.dialect.limits, **kwargs})
        except BaseException:
            self.close()
            raise

    async def open(self) -> Messages:
        """A new episode there; on a new connection if the last one was lost."""
        data = self.dialect.reset(self._seed(), self.task, self.format)
        for first in (True, False):
            connection = await self._connected()
            try:
                return self.dialect.opened(await self._ask(connection, "reset", data))
            except Lost:
                if not (first and connection.lost):
                    raise
        raise AssertionError

    async def reply(self, text: str) -> Reply:
        """A step there."""
        assert self._connection is not None
        assert self._context is not None
        thinking = open_thinking(self.chat.text(self._context[-16:])) if self.format else ""
        action = self.dialect.action(text, self._cut, thinking)
        if isinstance(action, Reply):
            return action
        try:
            data = await self._ask(self._connection, "step", action)
        except Refused as error:
            return self.dialect.refused(error)
        if self.dialect.shared:
            self._earned = data["reward"]
            self._messages[-1] = data["observation"].get("said") or self._messages[-1]
        return self.dialect.replied(data)

    def close(self) -> None:
        """Ends the session, and with the last environment of a server the connection."""
        self._leave_session()
        server, self.server = self.server, None
        if server is not None:
            server.leave()
        super().close()

    @property
    def example_replies(self) -> list[str]:
        """A call of each tool, as of a `ToolEnv`, which `llm_gym.testing` plays too."""
        schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in self.dialect.tools}
        calls = [ToolCall(name, example_arguments(schema)) for name, schema in schemas.items()]
        return [self.format.notation.write([call]) for call in calls] if self.format else []

    def _begin(self, seed: int | None, options: dict[str, Any] | None) -> None:
        self._given = seed
        super()._begin(seed, options)

    def _seed(self) -> int:
        """The seed of the episode there: the one given, or the next of the random stream."""
        return int(self.np_random.integers(2**31)) if self._given is None else int(self._given)

    async def _connected(self) -> Connection:
        """The connection of this environment's session; another connection has another session."""
        assert self.server is not None
        shared = self.dialect.shared
        if self._connection is None or self._connection.lost:
            self._connection, self._session = await self.server.connected(shared=shared), ""
        if shared and not self._session:
            self._session = f"s{next(self.server.names)}"
        return self._connection

    async def _ask(self, connection: Connection, kind: str, data: Data) -> Data:
        """The answer's data; an error of the environment there is raised as what it is."""
        try:
            return await connection.ask(kind, data, self._session)
        except Refused as error:
            if error.data.get("code") == "VALIDATION_ERROR" and not self.dialect.shared:
                raise
            raise KINDS.get(str(error.data.get("kind")), LLMGymError)(str(error)) from error
        except BaseException:
            self._leave_session()  # the answer may yet come, when another is waited for
            raise

    def _leave_session(self) -> None:
        """Ends the session there: nobody will play on."""
        connection, self._connection = getattr(self, "_connection", None), None
        if connection is not None:
            connection.tell("close", {}, self._session)

    def _load_chat(self, tokenizer: Any) -> Chat:
        if not self.dialect.tools:
            return super()._load_chat(tokenizer)
        chat, self.format = formats.tool_chat(tokenizer, self.dialect.tools, self._tool_format)
        return chat

    def _info(self) -> dict[str, Any]:
        return {**super()._info(), **({"tools": copy.deepcopy(list(self.dialect.tools))} if self.format else {})}

    def _replied(self, action: Ids, reply: Reply) -> tuple[Ids, float, bool, bool, dict[str, Any]]:
        result = super()._replied(action, reply)
        if (result[2] or result[3]) and reply.stop_reason is None and self.dialect.shared:
            self._leave_session()  # a limit of ours: over there it would go on
        return result

    def _add_rewards(self, reward: float | Mapping[str, float]) -> float:
        total = super()._add_rewards(reward)  # a wrapper there may have had its say
        earned, self._earned = self._earned, None
        return total if self._weighs or earned is None else self._number("reward", earned)
