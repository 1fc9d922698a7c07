"""How far the learner, the engine, adapters and vLLM are from a plain forward of each row in float64."""

from __future__ import annotations

import contextlib
import copy
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from architectures import VOCABULARY, Variant
from torch import Tensor

from llm_gym.core import Completion, Ids, Sampling
from llm_gym.errors import ConfigError, SettingError
from llm_gym.harness.batching.packing import pack
from llm_gym.harness.learner.learner import Learner
from llm_gym.harness.model.loading import LoraConfig, export, plain_tensors, prepare
from llm_gym.harness.types import TrainSequence
from llm_gym.models.plain import as_saved
from llm_gym.policies.builtin.policy import TransformersPolicy

TOLERANCE = 1e-3
"""Nats; a larger error is a wrong number, not rounding."""
FIRST = 3
"""Smallest id that is drawn: no padding or end among the tokens."""


@dataclass(frozen=True)
class Measured:
    """One cell of the table."""

    error: float | None = None
    """Largest difference of a log-probability, nats; None if nothing was measured."""
    restricted: str = ""
    """In what way the model is not handled as it could be."""
    refused: str = ""
    """The sentence it is refused with."""
    failed: str = ""
    """The last line of an exception that is no sentence."""

    @property
    def wrong(self) -> bool:
        """Whether it gives a wrong number, or dies."""
        return bool(self.failed) or (self.error is not None and not self.error <= TOLERANCE)


def guarded(measure: Callable[[], Measured]) -> Measured:
    """What `measure` finds; a refusal or an exception is a finding."""
    try:
        return measure()
    except (ConfigError, SettingError) as error:
        return Measured(refused=_line(error))
    except Exception as error:
        return Measured(failed=f"{type(error).__name__}: {_line(error)}")


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else ""


# --- the reference ------------------------------------------------------------------------------------------


class Plain:
    """The model as transformers runs it: one row at a time, nothing cached, in float64 where it can."""

    def __init__(self, model: Any, *, dtype: torch.dtype = torch.float64, attention: str | None = "eager") -> None:
        self.model = copy.deepcopy(model).to(dtype).eval()
        if attention is not None:
            with contextlib.suppress(ValueError, NotImplementedError, KeyError):
                self.model.set_attn_implementation(attention)
        text = str(self.model.config.to_dict())
        self.forgets = "dynamic" not in text and "longrope" not in text

    def logprobs(self, tokens: Ids) -> Tensor:
        """Log-probability of every token but the first, [n - 1]."""
        ids = torch.from_numpy(np.asarray(tokens, np.int64))
        # A rotary embedding that adapts to the length keeps what the row before made of it.
        self.used = self.model if self.forgets else copy.deepcopy(self.model)
        logits = self.used(input_ids=ids[None, :-1], use_cache=False).logits[0]
        return logits.double().log_softmax(-1).gather(1, ids[1:, None])[:, 0]

    def gradient(self, kept: Iterable[tuple[Ids, Any]]) -> dict[str, Tensor | None]:
        """Of `_weights` times the log-probabilities of the tokens at each row's places, by parameter."""
        total: dict[str, Tensor | None] = dict.fromkeys(dict(self.model.named_parameters()))
        for tokens, trained in kept:
            found = self.logprobs(tokens)
            wanted = {n: p for n, p in self.used.named_parameters() if p.requires_grad}
            targets = torch.from_numpy(np.asarray(tokens, np.int64))[1:]
            loss = (found * _weights(targets))[trained - 1].sum()
            parts = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
            for name, part in zip(wanted, parts, strict=True):
                if part is not None:
                    total[name] = part.double() if total[name] is None else total[name] + part
        return total


def plain(model: Any) -> Plain:
    """The reference in float64, or in float32 where the class computes in nothing else."""
    found = Plain(model)
    try:
        with torch.no_grad():
            found.logprobs(np.arange(FIRST, FIRST + 8))
    except RuntimeError:
        return Plain(model, dtype=torch.float32)
    return found


# --- rows ---------------------------------------------------------------------------------------------------


def rows(variant: Variant, *, seed: int = 0) -> list[tuple[Ids, int]]:
    """Tokens, and how many of them are the prompt: uneven, prompts shared, on both sides of every switch."""
    rng = np.random.default_rng(seed)

    def draw(count: int, after: Ids | Sequence[int] = ()) -> Ids:
        """Distinct tokens while there are any: a model that picks the k best keys may pick either of two equal ones."""
        fresh = rng.permutation(np.setdiff1d(np.arange(FIRST, VOCABULARY), after))
        return np.r_[after, np.resize(fresh, count)].astype(np.int32)

    unit = variant.longest // 8
    long, short = draw(5 * unit), draw(unit)
    shared = [(long, 3 * unit), (long, 2), (long, unit), (short, 7 * unit - 3), (short, 5), (short, 3 * unit)]
    alone = [2, 5, variant.longest, 3 * unit + 1, *(s + extra for s in variant.switches for extra in (-1, 0, 1, 2))]
    return [(draw(n, after), len(after)) for after, n in shared] + [(draw(n), 1) for n in alone]


def samples(kept: Iterable[tuple[Ids, int]], reference: Plain) -> list[TrainSequence]:
    """Rows that carry their own right answer as the sampler's log-probabilities."""
    made = []
    for number, (tokens, prompt) in enumerate(kept):
        trained = np.arange(prompt, len(tokens))
        with torch.no_grad():
            right = reference.logprobs(tokens).numpy()[trained - 1].astype(np.float32)
        made.append(TrainSequence(tokens, trained, {"old_logprobs": right, "advantages": np.ones(len(right))}, number))
    return made


# --- the learner --------------------------------------------------------------------------------------------


def learner(variant: Variant) -> Measured:
    """The learner's log-probabilities of packed rows, at three budgets."""
    model = variant.model()
    reference = plain(model)
    return _learned(Learner(prepare(model)), samples(rows(variant), reference))


def _learned(learner: Learner, given: Sequence[TrainSequence]) -> Measured:
    """The largest error over budgets: all rows at once, some, each alone; as in training, and without a gradient."""
    error = 0.0
    for budget, grad in ((1 << 20, True), (80, False), (1, False)):
        for micro in pack(given, max_tokens=budget, share=learner.backbone.shares).micro:
            found, _ = learner.logprobs(micro, grad=grad)
            error = max(error, _gap(found.detach().double(), micro.streams["old_logprobs"].double()))
    return Measured(error, _way(learner))


def _way(learner: Learner) -> str:
    """How rows are laid out, if not packed."""
    body = learner.backbone
    if body.together == 0:
        return "one by one"
    long = "" if body.together == math.inf else f"one by one > {body.together:.0f}"
    return ", ".join(part for part in ("" if body.packed else "padded", long) if part)


def gradient(variant: Variant) -> Measured:
    """The gradient of a weighted sum of log-probabilities: the norm of its error, relative to its own."""
    model = variant.model()
    reference = plain(model)
    given = samples(rows(variant), reference)
    right = reference.gradient((s.tokens, s.trained) for s in given)
    learner = Learner(prepare(model))
    for micro in pack(given, max_tokens=200, share=learner.backbone.shares).micro:
        found, _ = learner.logprobs(micro, grad=True)
        (found * _weights(micro.streams["target"])).sum().backward()  # type: ignore[no-untyped-call]
    pairs = [(p.grad, right[name]) for name, p in model.named_parameters()]
    zeros = [(torch.zeros(()) if a is None else a.double(), torch.zeros(()) if b is None else b) for a, b in pairs]
    off = sum(float((a - b).square().sum()) for a, b in zeros)
    return Measured((off / sum(float(b.square().sum()) for _, b in zeros)) ** 0.5, _way(learner))


def _weights(targets: Tensor) -> Tensor:
    """Of each log-probability in the sum: some number that does not depend on the layout."""
    return torch.sin(1.0 + targets)


def _gap(a: Tensor, b: Tensor) -> float:
    """The largest difference; infinite if anything is not a number."""
    gap = (a - b).abs().max()
    return float(gap) if bool(gap.isfinite()) else float("inf")


# --- the engine ---------------------------------------------------------------------------------------------


def engine(variant: Variant) -> Measured:
    """The built-in engine's log-probabilities of what it samples after uneven contexts, over two turns."""
    model = variant.model()
    reference = plain(model)
    served = prepare(model)
    try:
        Learner(served)  # the engine runs the learner's own model
    except Exception:
        served = prepare(variant.model())
    policy = TransformersPolicy(served, max_rows=4)
    error = _sampled(policy.generate, variant, reference, policy.max_context)
    served_to = policy.max_context
    how = "" if policy.cached else "uncached"
    if served_to >= variant.longest:
        return Measured(error, how)
    try:
        policy = TransformersPolicy(served, max_rows=4, max_context=variant.longest)
    except SettingError:
        return Measured(error, f"{how} <= {served_to} tokens".strip())
    return Measured(
        max(error, _sampled(policy.generate, variant, reference, policy.max_context)), f"uncached > {served_to}"
    )


def _sampled(generate: Callable[..., list[Completion]], variant: Variant, reference: Plain, most: int) -> float:
    """The largest error over two turns of uneven contexts, at most `most` tokens each."""
    rng = np.random.default_rng(1)
    longest = min(variant.longest, most)
    unit = longest // 8
    lengths = [longest - 2 * unit, 2, 3 * unit + 1, unit, *(max(1, s - 3) for s in variant.switches if s < longest)]
    contexts = [rng.integers(FIRST, VOCABULARY, n).astype(np.int32) for n in lengths]
    sampling = Sampling(max_tokens=max(1, 2 * unit - 3), stop_token_ids=())
    error = 0.0
    for turn in range(2):
        if turn:
            contexts = [c for c in contexts if len(c) + 2 < most]
        done = generate(contexts, sampling, seeds=list(range(len(contexts))))
        grown = []
        for context, completion in zip(contexts, done, strict=True):
            whole = np.concatenate([context, completion.tokens])
            with torch.no_grad():
                right = reference.logprobs(whole)[len(context) - 1 :]
            error = max(error, _gap(torch.from_numpy(completion.logprobs).double(), right))
            grown.append(np.concatenate([whole, rng.integers(FIRST, VOCABULARY, 2).astype(np.int32)]))
        contexts = grown
    return error


# --- adapters -----------------------------------------------------------------------------------------------


def lora(variant: Variant) -> Measured:
    """The learner's log-probabilities under a random adapter, beside those of the model that is exported."""
    model = prepare(variant.model(), lora=LoraConfig(rank=4, alpha=8.0))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    base = plain(variant.model())
    learner = Learner(model)
    with tempfile.TemporaryDirectory() as folder:
        export(model, folder)
        exported = type(model.get_base_model()).from_pretrained(folder, dtype=torch.float32)
    tokens = rows(variant)[0][0]
    reference = plain(exported)
    with torch.no_grad():
        moved = _gap(reference.logprobs(tokens), base.logprobs(tokens))
    if moved < 10 * TOLERANCE:
        return Measured(failed=f"the exported adapter moves nothing ({moved:.1g} nats)")
    return _learned(learner, samples(rows(variant), reference))


# --- vLLM ---------------------------------------------------------------------------------------------------


def vllm(variant: Variant) -> Measured:
    """A real vLLM engine's log-probabilities in float32: from the folder, and after other weights were sent to it."""
    from llm_gym.policies.vllm.models import like_transformers
    from llm_gym.policies.vllm.policy import VLLMPolicy

    model = variant.model()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        most = like_transformers(folder, {}).get("max_model_len") or 256
        policy = VLLMPolicy(
            folder, dtype="float32", max_context=most, skip_tokenizer_init=True, kv_cache_memory_bytes=64 << 20
        )
    try:
        error = _sampled(policy.generate, variant, plain(model), policy.max_context)
        if not error <= TOLERANCE:
            return Measured(error)
        other = variant.model(seed=1)
        try:
            policy.load(as_saved(other, plain_tensors(other)), version=1)
        except Exception as refusal:
            return Measured(error, f"restart for new weights ({_line(refusal)})")
        again = _sampled(policy.generate, variant, plain(other), policy.max_context)
        return Measured(error, "" if again <= TOLERANCE else f"{again:.1g} off after new weights are sent")
    finally:
        policy.close()


COLUMNS: dict[str, Callable[[Variant], Measured]] = {
    "learner": learner,
    "gradient": gradient,
    "engine": engine,
    "lora": lora,
    "vllm": vllm,
}
