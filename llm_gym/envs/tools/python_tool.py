"""`PythonTool-v0`: questions whose answer needs computing, and a Python interpreter to do it with."""

from __future__ import annotations

from typing import Any

from llm_gym.core import Ids, Messages
from llm_gym.env import Reply
from llm_gym.envs.tools.questions import questions
from llm_gym.envs.tools.sandbox import Limits, PythonSession, SandboxError, tier
from llm_gym.envs.tools.sandbox.session import BACKENDS
from llm_gym.envs.tools.schema import Tool
from llm_gym.envs.tools.tool_env import ToolEnv
from llm_gym.errors import ConfigError, ToolFailure, unknown

SCHEMA = {
    "type": "function",
    "function": {
        "name": "python",
        "description": "Runs Python code and returns what it prints.",
        "parameters": {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]},
    },
}
"""The tool as the model is shown it."""


class PythonTool(ToolEnv):
    """One question and a Python interpreter; the reply that calls no tool must hold the right answer.

    The interpreter is the episode's own: variables live from call to call and die with the episode. It runs in a
    sandbox without network, files or memory of the trainer's (docs/sandbox.md).

    Args:
        backend: `worker`, an IPython shell (fast), or `jupyter`, a Jupyter kernel.
        sandbox: `auto`, `required` (refuses to run without isolation), or a tier by name.
        memory: bytes of address space of each process of the sandbox.
        disk: bytes in the interpreter's scratch folder.
        call_timeout: seconds a call may take; then it is interrupted, and if need be killed.
        dataset: a hub id or a local file with questions and answers; None: arithmetic too large to do by heart.
        split: of the data set; or `train`, `test` or `all` of the arithmetic problems.
        question: name of the question column.
        answer: name of the answer column: an answer, or a solution that ends in one.
        operations: which of `+`, `-`, `*` to draw from, as one string.
        digits_min: fewest digits of an operand.
        digits_max: most digits of an operand.
        kwargs: the arguments of `ToolEnv` and the common ones of `TextEnv`.

    Reward components: `correct`, 1 or 0, and `format` and `tool_calls` of `ToolEnv`. A sandbox that breaks ends the
    episode with `tool_failure`.

    Raises:
        SettingError: an unknown backend or tier, or one that this machine does not allow.
        ConfigError: arithmetic that cannot be drawn.
        DataError: no such data, or a missing column.
    """

    reward_names = ("correct",)
    eval_args = {"split": "test"}  # noqa: RUF012

    def __init__(
        self,
        *,
        backend: str = "worker",
        sandbox: str = "auto",
        memory: int = Limits.memory,
        disk: int = Limits.disk,
        call_timeout: float = 10.0,
        dataset: str | None = None,
        split: str = "train",
        question: str = "question",
        answer: str = "answer",
        operations: str = "+-*",
        digits_min: int = 3,
        digits_max: int = 4,
        **kwargs: Any,
    ) -> None:
        if backend not in BACKENDS:
            raise ConfigError(unknown("backend", backend, BACKENDS))
        tier(sandbox)
        self._questions = questions(dataset, split, (question, answer), operations, (digits_min, digits_max))
        self.num_tasks = self._questions.size
        self._session_args = (backend, sandbox, Limits(memory=memory, disk=disk))
        self._session: PythonSession | None = None
        super().__init__([Tool(SCHEMA, self._python, timed=True)], call_timeout=call_timeout, **kwargs)

    def open(self) -> Messages:
        """The question."""
        self._release()
        asked, self._gold = self._questions.draw(self)
        return [{"role": "user", "content": asked}]

    def final(self, text: str) -> Reply:
        """Grades the answer; the episode is over."""
        return Reply(reward={"correct": self._questions.score(self._gold, text)}, done=True)

    def step(self, action: Ids) -> tuple[Ids, float, bool, bool, dict[str, Any]]:
        """As `TextEnv.step`; with the episode its interpreter ends."""
        result = super().step(action)
        if result[2] or result[3]:
            self._release()
        return result

    def close(self) -> None:
        """Ends the interpreter."""
        self._release()
        super().close()

    def _python(self, code: str) -> str:
        """What a cell prints; an interpreter is taken when the episode first needs one.

        Raises:
            ToolFailure: there is none to be had.
        """
        try:
            if self._session is None:
                self._session = PythonSession(*self._session_args)
            result = self._session.run(code, self.call_timeout)
        except SandboxError as error:
            raise ToolFailure(f"python: {error}") from error
        return result.output.rstrip("\n") or "(no output)"

    def _release(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()
