"""Bugs that the proof of an engine's weights could have: it sees too little, or stops what is well.

Planted with those of `mutations`, in the same way.
"""

from __future__ import annotations

from planted import Mutant

ENGINES = (
    Mutant(
        "an engine is compared with the arithmetic that the learner trains in",
        "harness/learner/learner.py::Learner._hidden.half",
        "half = held is None and self.dtype != torch.float32",
        "half = self.dtype != torch.float32",
        (
            "harness/test_sync.py::test_a_learner_in_bfloat16_does_not_blur_an_engine_in_float32",
            "harness/test_sync.py::test_a_run_in_bfloat16_is_not_stopped_by_its_own_rounding",
        ),
    ),
    Mutant(
        "an engine in bfloat16 is compared with weights that it cannot hold",
        "harness/model/rounding.py::held_as.before",
        "parameter.data = data.to(dtype).to(data.dtype)",
        "parameter.data = data.clone()",
        ("harness/test_rounding.py::test_weights_are_held_as_a_rounded_copy_holds_them_and_put_back[Qwen3]",),
    ),
    Mutant(
        "the proof leaves the learner's weights rounded",
        "harness/model/rounding.py::held_as.after",
        "        for parameter, data in kept.pop(module, []):\n            parameter.data = data\n",
        "        kept.pop(module, [])\n",
        ("harness/test_rounding.py::test_weights_are_held_as_a_rounded_copy_holds_them_and_put_back[Qwen3]",),
    ),
    Mutant(
        "an engine that does not move with the learner is believed as long as the gap is small",
        "harness/weight_sync/verify.py::WeightSyncCheck._follow",
        "if not followed >= 0.5:",
        "if not followed >= -9:",
        (
            "harness/test_sync.py::test_small_updates_that_do_not_arrive_are_seen_as_soon_as_rounding_does_not_hide_them[]",
        ),
    ),
    Mutant(
        "of tensors that are held as one, one alone must add up",
        "models/checksums.py::differing",
        "groups.get(name, [name])",
        "[name]",
        ("policies/test_checksums.py::test_tensors_that_are_held_as_one_must_add_up",),
    ),
    Mutant(
        "what cannot be read differs",
        "models/checksums.py::_agrees.believed",
        'believed = not held and not any(report["received"] for report in reports)',
        "believed = False",
        ("policies/test_checksums.py::test_what_was_never_updated_and_cannot_be_read_does_not_differ",),
    ),
)
