"""What runs inside a vLLM server's workers: besides new weights, a label that says which ones these are."""

from __future__ import annotations

from pathlib import Path

from llm_gym.policies.vllm.worker import WorkerExtension, refresh_tied_head


class ServerWorkerExtension(WorkerExtension):
    """The engine's extension, and the label; it is lost when the server restarts, which is how that is noticed."""

    _llm_gym_label: str = ""

    def llm_gym_label(self) -> str:
        """Which weights these are; empty for those that the server was started with."""
        return self._llm_gym_label

    def llm_gym_set_label(self, label: str) -> None:
        """Says which weights these are, after everything about them is done."""
        self._llm_gym_label = label

    def llm_gym_dtype(self) -> str:
        """What the engine computes in."""
        return str(self.model_config.dtype)

    def llm_gym_seen(self, paths: list[str]) -> list[str]:
        """Those of the trainer's paths that are there for this worker too; they hold names that nobody else makes."""
        return [path for path in paths if Path(path).exists()]

    def llm_gym_load_start(self) -> None:
        """Loads the weights that the server was started with."""
        self.model_runner.reload_weights()
        refresh_tied_head(self.model_runner.get_model())
        self._llm_gym_received: dict[str, int] = {}
