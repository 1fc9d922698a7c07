"""Bugs that only some models show: those with windows, clamps, soft caps, or rotary embeddings that are stretched.

Planted with those of `mutations`, in the same way.
"""

from __future__ import annotations

from planted import Mutant

_ALONE = "harness/test_backbone.py::test_short_rows_beside_long_ones_are_as_alone_and_so_are_their_gradients"

MODELS = (
    Mutant(
        "the self-test runs on rows shorter than every window",
        "policies/builtin/self_test.py::_row_lengths",
        "return sorted(n for n in {4, 7, *edges, 2 * last, 2 * last + 5} if n >= 4)",
        "return [4, 7]",
        (f"{_ALONE}[LongRoPE]", f"{_ALONE}[a window in the mask alone]"),
    ),
    Mutant(
        "a rotary embedding remembers the longest row that it has seen",
        "policies/builtin/self_test.py::forget_lengths",
        "    if not is_dynamic(model.config.get_text_config()):",
        "    if True:",
        (f"{_ALONE}[dynamic NTK]",),
    ),
    Mutant(
        "the gradient passes a soft cap by",
        "harness/model/heads.py::_Head.gradient",
        "                p.mul_(slopes)",
        "                pass",
        ("harness/test_logprobs.py::test_a_soft_cap_has_exact_gradients",),
    ),
    Mutant(
        "a clamp inside an MLP is dropped",
        "harness/model/cpu_mlp.py::_is_plain",
        "return sorted(names) == OPERATIONS and torch.equal(",
        "return torch.equal(",
        ("harness/test_mlps.py::test_a_clamped_mlp_is_left_alone_however_far_its_limit_is",),
    ),
    Mutant(
        "the engine's windows are one token too long",
        "policies/builtin/kv_cache.py::windowed",
        "columns <= last - window",
        "columns < last - window",
        ("policies/test_transformers.py::TestLimits::test_contexts_beyond_every_window_are_served_beside_short_ones",),
    ),
)
