"""What several tests of real engines share: models to compare with, exact references, requests under way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from llm_gym.core import Completion, Ids, Sampling
from llm_gym.harness.model.loading import load_model
from llm_gym.policies.builtin.sampling import Knobs, keep_likely

TOLERANCE = 1e-4
FILTERS: dict[str, dict[str, Any]] = {
    "off": {},
    "on": {"top_k": 20, "top_p": 0.9},
    "top-k": {"top_k": 20},
    "top-p": {"top_p": 0.9},
    "min-p": {"min_p": 0.05},
}
COMBINATIONS = [(temperature, filters) for temperature in (0.6, 1.0, 1.3) for filters in ("off", "on")]


def contexts(count: int, seed: int = 0) -> list[Ids]:
    rng = np.random.default_rng(seed)
    return [rng.integers(10, 500, rng.integers(4, 100)).astype(np.int32) for _ in range(count)]


def sampling(temperature: float, filters: str, max_tokens: int = 64) -> Sampling:
    return Sampling(temperature=temperature, max_tokens=max_tokens, stop_token_ids=(), **FILTERS[filters])


def perturbed(seed: int, scale: float = 0.02) -> Any:
    """The embedded model with noise on every weight."""
    model, generator = load_model(None), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def learner_logprobs(
    model: Any, context: Ids, completion: Completion, how: Sampling, steps: Sequence[float]
) -> list[np.ndarray]:
    """Log-probabilities of a completion under the model's own distribution, filtered and renormalised; float64 [n].

    Args:
        steps: each added to `top_p` gives one of the results.
    """
    ids = torch.from_numpy(np.concatenate([context, completion.tokens])).long()[None]
    logits = model(input_ids=ids).logits[0, len(context) - 1 : -1].double() / how.temperature
    every, n = (logits - logits.amax(-1, keepdim=True)).exp(), len(logits)
    chosen = torch.from_numpy(completion.tokens).long()[:, None]
    found = []
    for p in steps:
        weights = every
        if not how.full_support:
            top_p = min(how.top_p + p, 1.0) if how.top_p < 1 else 1.0
            knobs = Knobs(np.ones(n), np.full(n, how.top_k), np.full(n, top_p), np.full(n, how.min_p))
            weights = keep_likely(every, knobs, np.ones(n, np.bool_))
        found.append((weights.gather(-1, chosen)[:, 0].log() - weights.sum(-1).log()).numpy())
    return found


def gaps(model: Any, context: Ids, completion: Completion, how: Sampling) -> np.ndarray:
    """|engine - learner| of every token, float64 [n].

    Where the probabilities of a prefix reach `top_p` to within rounding, one side keeps one token more than the
    other; so the nearest of the references with `top_p` a little less and a little more counts too.
    """
    steps = (0.0, -1e-5, 1e-5) if how.top_p < 1 else (0.0,)
    each = learner_logprobs(model, context, completion, how, steps)
    return np.min([np.abs(one - completion.logprobs) for one in each], axis=0)


def worst(model: Any, prompts: list[Ids], completions: list[Completion], how: Sampling) -> float:
    """The largest gap over all sampled tokens."""
    return max(float(gaps(model, c, out, how).max()) for c, out in zip(prompts, completions, strict=True))


def worst_by_version(
    models: Mapping[int, Any], prompts: list[Ids], completions: list[Completion], hows: list[Sampling], shift: int = 0
) -> float:
    """The largest gap, every token against the weights of its own version (or those `shift` tokens before it)."""
    largest = 0.0
    for context, completion, how in zip(prompts, completions, hows, strict=True):
        versions = np.roll(completion.versions, shift)
        for version in np.unique(versions):
            mine = gaps(models[int(version)], context, completion, how)[versions == version]
            largest = max(largest, float(mine.max()))
    return largest


async def until_tokens(policy: Any, tokens: int) -> None:
    """Lets the engine go on until a request under way has that many tokens more than at its last update.

    It then stands still until the next call, so what that meets does not depend on how soon it comes.
    """
    thread = policy.thread

    def most() -> int:
        under_way = [r for r in thread.requests.values() if r.state is not None]
        done = ((r.state.detokenizer.num_output_tokens(), r.updates) for r in under_way)
        return max((n - (updates[-1][0] if updates else 0) for n, updates in done), default=0)

    def go_on(engine: Any) -> bool:
        while (reached := most()) < tokens and engine.has_unfinished_requests():
            thread.step(engine)
        return reached >= tokens

    def stand_still(engine: Any) -> None:
        while thread.calls.empty():
            time.sleep(0.001)

    while not thread.requests:  # handed in when the event loop has gone round
        await asyncio.sleep(0)
    reached = thread.call(go_on)
    thread.call(stand_still)
    assert await asyncio.wrap_future(reached), "all requests ended before"


def nudged(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Every tensor's name, and all tensors with one element of that one moved to the next float."""
    for name, tensor in tensors.items():
        changed = tensor.detach().clone()
        flat = changed.view(-1)
        middle = len(flat) // 2
        flat[middle] = torch.nextafter(flat[middle], torch.tensor(torch.inf))
        same = [other for other in tensors if tensors[other].data_ptr() == tensor.data_ptr()]
        yield name, {**tensors, **dict.fromkeys(same, changed)}
