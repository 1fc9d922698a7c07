"""`PythonTool-v0`: questions whose answer needs computing, and a Python interpreter to do it with."""

from __future__ import annotations

from typing import Any

from llm_gym.envs.tools.questions import QuestionEnv
from llm_gym.envs.tools.sandbox import Limits, PythonSession, SandboxError, tier
from llm_gym.envs.tools.sandbox.session import BACKENDS
from llm_gym.envs.tools.schema import Tool
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


class PythonTool(QuestionEnv):
    """One question and a Python interpreter; the reply that calls no tool must hold the right answer.

    The interpreter is the episode's own: variables live from call to call and die with the episode. It runs in a
    sandbox without network, files or memory of the trainer's (docs/sandbox.md).

    Args:
        backend: `worker`, an IPython shell (fast), or `jupyter`, a Jupyter kernel.
        sandbox: `auto`, `required` (refuses to run without isolation), or a tier by name.
        memory: bytes of address space of each process of the sandbox.
        disk: bytes in the interpreter's scratch folder.
        call_timeout: seconds a call may take; then it is interrupted, and if need be killed.
        kwargs: the arguments of `QuestionEnv`: which questions, and how tools are called.

    A sandbox that breaks ends the episode with `tool_failure`.

    Raises:
        SettingError: an unknown backend or tier, or one that this machine does not allow.
    """

    def __init__(
        self,
        *,
        backend: str = "worker",
        sandbox: str = "auto",
        memory: int = Limits.memory,
        disk: int = Limits.disk,
        call_timeout: float = 10.0,
        **kwargs: Any,
    ) -> None:
        if backend not in BACKENDS:
            raise ConfigError(unknown("backend", backend, BACKENDS))
        tier(sandbox)
        self._session_args = (backend, sandbox, Limits(memory=memory, disk=disk))
        self._session: PythonSession | None = None
        super().__init__([Tool(SCHEMA, self._python, timed=True)], call_timeout=call_timeout, **kwargs)

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

    def release(self) -> None:
        """Ends the interpreter."""
        session, self._session = self._session, None
        if session is not None:
            session.close()
