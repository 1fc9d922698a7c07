"""Policies: engines that turn contexts into completions."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from llm_gym.concurrency import Loop
from llm_gym.core import Completion, Ids, Message, Sampling
from llm_gym.errors import SettingError, unknown

if TYPE_CHECKING:
    import torch

    from llm_gym.chat import Chat

ENGINES = {
    "transformers": "llm_gym.policies.builtin.policy:TransformersPolicy",
    "vllm": "llm_gym.policies.vllm.policy:VLLMPolicy",
    "server": "llm_gym.policies.vllm_server.policy:ServerPolicy",
    "sglang": "llm_gym.policies.sglang:SGLangPolicy",
    "ray": "llm_gym.policies.ray.policy:RayPolicy",
    "openai": "llm_gym.policies.openai:OpenAIPolicy",
}
"""Engine name -> its class, imported when it is asked for."""


@runtime_checkable
class Completer(Protocol):
    """All that the episode driver needs; what more it may have is in `Abilities`."""

    async def complete(self, context: Ids, sampling: Sampling, *, seed: int | None = None) -> Completion:
        """One completion of `context` (int32 [p]); requests in flight together are batched continuously."""
        ...


@runtime_checkable
class TextPolicy(Protocol):
    """A policy that reads chat messages and writes text, in place of token ids; its tokens cannot be trained on."""

    async def reply(self, messages: Sequence[Message], chat: Chat, sampling: Sampling, *, seed: int) -> Completion:
        """One reply to the messages, as tokens of the environment's chat."""
        ...


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a policy may have beside `complete`; these are its attributes of the same names where it has them."""

    max_rows: int = 128
    """As many episodes are under way at once."""
    stop_ids: tuple[int, ...] = ()
    """They end a completion, beside the chat's own."""
    forget: Callable[[], None] = lambda: None
    """Called around a rollout, so that what was cached before changes nothing."""
    serve_in: Callable[[Loop], None] = lambda loop: None
    """Called where rollouts go on in a loop of their own: requests then live there, and weights come from outside."""
    paused: Callable[[], AbstractContextManager[object]] = nullcontext
    """While it lasts, an engine that computes in this process makes no step."""

    @classmethod
    def of(cls, policy: object) -> Abilities:
        """Those of a policy."""
        return cls(**{field.name: getattr(policy, field.name) for field in fields(cls) if hasattr(policy, field.name)})


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


class WeightReceiver(Policy, Protocol):
    """An engine that a training run can sample with: new weights reach it, also while requests are in flight.

    Of the methods below it has those that its transports use (`harness.weight_sync.transports`).
    """

    dtype: torch.dtype
    """Type of its weights."""
    max_context: int
    """Most tokens of context and completion together."""
    update_seconds: Mapping[str, float]
    """What the last new weights took, where that is measured: `pause` (requests were held), `transfer` (before it)."""

    def load_adapter(
        self, tensors: Iterable[tuple[str, torch.Tensor]], config: Mapping[str, Any], *, version: int
    ) -> None:
        """Replace the LoRA adapter (PEFT's names, and what PEFT writes to adapter_config.json)."""
        ...

    def load_folder(self, folder: Path, *, version: int) -> None:
        """Replace all weights by those of a checkpoint."""
        ...

    def refresh(self, *, version: int) -> None:
        """The module that it shares with the learner has new weights: drop what was cached."""
        ...

    def restart(self, folder: Path, *, version: int) -> None:
        """A new engine on a checkpoint, in place of this one."""
        ...

    def differing(self, expected: Mapping[str, int]) -> list[str]:
        """Names of the tensors whose checksums are not those that were sent; empty where nothing is held apart."""
        ...

    def sleep(self) -> None:
        """Give memory back until `wake`."""
        ...

    def wake(self) -> None:
        """Take it again."""
        ...


def make_policy(model: str | Path | torch.nn.Module | None = None, *, engine: str = "auto", **options: Any) -> Policy:
    """An engine that serves `model`.

    >>> from llm_gym import load_chat
    >>> policy, chat = make_policy(), load_chat()
    >>> context = chat.open([{"role": "user", "content": "12+30"}])
    >>> [completion] = policy.generate([context], Sampling(max_tokens=3), seeds=[0])
    >>> len(completion.tokens) == len(completion.logprobs) <= 3
    True
    >>> policy.close()

    Args:
        model: a folder (of an adapter too: it is folded in), a hub id, a transformers module (served in place), or
            None: the embedded model.
        engine: a name of `ENGINES`; "auto" is "server" where `servers` are given, vLLM for a named model where vLLM
            and a CUDA device are at hand, else the built-in engine.
        **options: the engine's own keyword arguments.

    Raises:
        SettingError: an unknown engine, an option it does not have, or a model it cannot serve.
    """
    name = engine if engine != "auto" else "server" if options.get("servers") else _automatic(model)
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
