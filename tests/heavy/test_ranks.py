"""One gradient, and one optimizer step, whatever the number of processes and however the work lies on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
import torch

from llm_gym.harness.distributed.world import World

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the processes write."""
    made: Path = tmp_path_factory.mktemp("ranks")
    return made


SETUPS = [(size, strategy, share) for size in (2, 3) for strategy in ("ddp", "fsdp") for share in ("dealt", "by hand")]
IN_CI = [(2, "ddp", "by hand"), (2, "fsdp", "dealt")]
"""Each strategy and each way to share once, in two processes; `make soak` has all, in two and in three."""


@pytest.fixture(scope="module")
def found(request, folder) -> dict[int, dict[Any, Any]]:
    """World size -> (strategy, how the work is shared, case) -> what came out."""
    asked = [tuple(p[name] for name in ("size", "strategy", "share")) for p in _parameters(request) if "share" in p]
    words = {1: ["ddp,dealt", "ddp,by hand"]}
    for size, strategy, share in dict.fromkeys([*IN_CI, *asked]):
        words.setdefault(size, []).append(f"{strategy},{share}")
    files = {size: folder / f"{size}.pt" for size in sorted(words)}
    ranks.run(ranks.__file__, [(size, [str(file), *words[size]]) for size, file in files.items()])
    return {size: torch.load(file, weights_only=False) for size, file in files.items()}


def _parameters(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Those of the selected tests of this file."""
    items = [item for item in request.session.items if item.path == request.path]
    return [item.callspec.params for item in items if hasattr(item, "callspec")]


@pytest.mark.parametrize("name", ranks.CASES)
@pytest.mark.parametrize(
    ("size", "strategy", "share"),
    [pytest.param(*each, marks=[] if each in IN_CI else [pytest.mark.soak]) for each in SETUPS],
)
def test_it_is_that_of_one_process(size: int, strategy: str, share: str, name: str, found) -> None:
    one, many = found[1]["ddp", share, name], found[size][strategy, share, name]
    most = 1e-6 if ranks.CASES[name].dtype == "float32" else 1e-9
    assert max(float(g.abs().max()) for g in one["gradients"].values()) > 1e-4
    for what in ("gradients", "weights"):
        assert many[what].keys() == one[what].keys()
        for tensor, want in one[what].items():
            torch.testing.assert_close(
                many[what][tensor], want, rtol=most, atol=most, msg=lambda m, t=tensor: f"{t}: {m}"
            )
    for metrics, want in zip(many["metrics"], one["metrics"], strict=True):
        assert metrics == pytest.approx(want, rel=10 * most, abs=10 * most)


@pytest.mark.parametrize("name", ranks.WHOLE)
def test_an_optimizer_of_whole_matrices_steps_split_ones_to_the_last_bit(name: str, folder: Path, found) -> None:
    """From the start, and resumed on 2 (and 3) processes from the checkpoint of fewer, on one from those of more."""
    want = found[1]["four steps", name]
    more = [size for size in found if size > 1]
    got = [found[size]["four steps", name] for size in more]
    got += [found[size]["two steps", name, start] for size in more for start in range(1, size)]
    got += [ranks.four_steps(name, World(), folder, folder / f"{name}-{size}") for size in more]
    for weights in got:
        assert weights.keys() == want.keys()
        for tensor, value in want.items():
            assert torch.equal(weights[tensor], value), tensor


def test_the_work_lay_as_was_meant(found) -> None:
    """Uneven, with a rank that has nothing to do; and every rank busy where it is dealt."""
    by_hand = {2: [7, 1], 3: [5, 3, 0]}
    for size, strategy, share in IN_CI:
        passes = found[size][strategy, share, "grpo"]["passes"]
        assert passes == by_hand[size] if share == "by hand" else min(passes) >= 1
