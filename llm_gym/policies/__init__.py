"""Policies: engines that turn contexts into completions."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from llm_gym.core import Completion, Ids, Sampling
from llm_gym.errors import SettingError, unknown

if TYPE_CHECKING:
    import torch

ENGINES = {
    "transformers": "llm_gym.policies.builtin.policy:TransformersPolicy",
    "vllm": "llm_gym.policies.vllm.policy:VLLMPolicy",
    "server": "llm_gym.policies.vllm_server.policy:ServerPolicy",
    "openai": "llm_gym.policies.openai:OpenAIPolicy",
}
"""Engine name -> its class, imported when it is asked for."""


@runtime_checkable
class Completer(Protocol):
    """All that the episode driver needs.

    It uses a few more attributes where they exist: `max_rows` (as many episodes are under way), `stop_ids`
    (they end a completion beside the chat's own), and `forget()` (called around a rollout, so that what was
    cached before changes nothing). One that only speaks text has `reply` in place of `complete` (`policies.openai`).
    """

    async def complete(self, context: Ids, sampling: Sampling, *, seed: int | None = None) -> Completion:
        """One completion of `context` (int32 [p]); requests in flight together are batched continuously."""
        ...


@runtime_checkable
class Policy(Completer, Protocol):
    """What the trainer needs of an engine."""

    version: int
    """Version of the weights now serving; every completion carries the one that sampled it."""

    def generate(
        self, contexts: Sequence[Ids], sampling: Sampling, *, seeds: Sequence[int] | None = None
    ) -> list[Completion]:
        """Completions of many contexts, in order; the blocking form of `complete`."""
        ...

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """Swap in new weights (Hugging Face names) and drop every cache made with the old ones."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...


def make_policy(model: str | Path | torch.nn.Module | None = None, *, engine: str = "auto", **options: Any) -> Policy:
    """An engine that serves `model`.

    Args:
        model: a folder (of an adapter too: it is folded in), a hub id, a transformers module (served in place), or
            None: the embedded model.
        engine: a name of `ENGINES`; "auto" is vLLM for a named model where vLLM and a CUDA device are at
            hand, else the built-in engine.
        **options: the engine's own keyword arguments.

    Raises:
        SettingError: an unknown engine, an option it does not have, or a model it cannot serve.
    """
    name = _automatic(model) if engine == "auto" else engine
    if name not in ENGINES:
        raise SettingError(unknown("engine", engine, ["auto", *ENGINES]))
    module, _, attribute = ENGINES[name].partition(":")
    make = getattr(importlib.import_module(module), attribute)
    known = inspect.signature(make).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        for option in options:
            if option not in known:
                raise SettingError(unknown(f"option of the {name} engine", option, known))
    if name != "vllm" or not isinstance(model, str | Path):
        policy: Policy = make(model, **options)
        return policy
    from llm_gym.models.plain import plain_folder

    with plain_folder(model) as folder:
        policy = make(folder, **options)
    return policy


def _automatic(model: str | Path | torch.nn.Module | None) -> str:
    """The engine that suits `model` and this machine."""
    if not isinstance(model, str | Path) or importlib.util.find_spec("vllm") is None:
        return "transformers"
    import torch

    return "vllm" if torch.cuda.is_available() else "transformers"
