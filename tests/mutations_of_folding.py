"""Bugs that the way of adapters into plain weights could have: in what is sent, exported, evaluated and trained on.

Planted with those of `mutations`, in the same way.
"""

from __future__ import annotations

from planted import Mutant

TEST = "harness/test_folding.py::test_trained_is_sent_is_exported_is_evaluated[{}]"
FOLDING = (
    Mutant(
        "an adapter on a tied head goes into the embedding too",
        "models/folding.py::untied",
        "return bool(tied) and None not in ends and any(beneath(end)[0] is not end for end in ends)",
        "return False",
        (TEST.format("the head of a tied model"),),
    ),
    Mutant(
        "an adapted embedding is sent bare",
        "models/folding.py::_adapted",
        "            if adapter in layer.scaling:\n",
        "            if adapter in layer.lora_A:\n",
        (TEST.format("the embedding of a tied model"),),
    ),
    Mutant(
        "adapters are folded in half precision",
        "models/folding.py::_with.tensor",
        "tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))",
        "tensor = tensor.to(tensor.dtype)",
        ("harness/test_folding.py::test_a_small_adapter_is_kept_whole[bfloat16]",),
    ),
    Mutant(
        "the adapter of a QLoRA run is folded over the base before its 4 bits",
        "models/plain.py::fold.made",
        "load_base(base or name or PATH, held, device=device)",
        'load_base(base or name or PATH, "float32", device=device)',
        (TEST.format("4 bits"),),
    ),
    Mutant(
        "DoRA's lengths are a tenth off where inputs are rows",
        "models/folding.py::_with",
        "norm = torch.linalg.norm(tensor.detach(), dim=0 if across else 1)",
        "norm = torch.linalg.norm(tensor.detach(), dim=0 if across else 1) * (1.1 if across else 1)",
        (TEST.format("GPT-2, DoRA, its embedding too"),),
    ),
    Mutant(
        "a merged model changes with the learner",
        "models/plain.py::merged.state",
        "copy=not consume",
        "copy=False",
        ("harness/test_folding.py::test_a_merged_model_is_the_learners_no_more",),
    ),
    Mutant(
        "experts are sent by the names that they have in memory",
        "models/plain.py::as_saved",
        "yield from revert_weight_conversion(base, dict(layer)).items()",
        "yield from layer",
        ("harness/test_folding.py::test_experts_are_written_as_transformers_writes_them",),
    ),
)
