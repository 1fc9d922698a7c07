"""Bugs in what is chosen where nobody chose, and in what a run says of itself.

Planted with those of `mutations`, in the same way.
"""

from __future__ import annotations

from planted import Mutant

DEFAULTS = (
    Mutant(
        "k1 is differentiated with its score, noise of mean zero",
        "harness/algorithms/kl.py::kl_loss",
        "return slope + (ratio * estimate - slope).detach()",
        "return ratio * estimate",
        (
            "harness/test_kl.py::test_no_kl_term_carries_noise_of_mean_zero",
            "harness/test_kl.py::test_cut_ratios_pull_nobody_away_from_the_reference",
            "harness/test_learner.py::test_a_large_weight_holds_the_policy_at_the_reference",
        ),
    ),
    Mutant(
        "a folder trains at the rate of a large model",
        "harness/rates.py::hidden_size",
        "str(embedded.PATH) if model is None else _under_adapter(model)",
        'str(embedded.PATH) if model is None else "no model is looked at"',
        ("harness/test_rates.py::test_a_folder_trains_at_the_rate_of_its_size",),
    ),
    Mutant(
        "adapters train at the rate of all weights",
        "harness/rates.py::ADAPTERS",
        "ADAPTERS = 10.0",
        "ADAPTERS = 1.0",
        ("harness/test_rates.py::test_large_models_keep_the_field_s_careful_values",),
    ),
    Mutant(
        "Muon's rate is read as AdamW's",
        "harness/rates.py::muon_rate",
        "return _rounded(0.4 * math.sqrt(width) * lr)",
        "return _rounded(0.4 * width * lr)",
        ("harness/test_rates.py::test_muon_moves_its_matrices_as_far_as_adamw_would",),
    ),
    Mutant(
        "a run of other adapters passes its rate on",
        "harness/rates.py::_passed_on.same",
        ' and adapters.get("kind") == (lora and lora.kind)',
        "",
        ("harness/test_rates.py::test_a_run_passes_its_rate_on_to_its_like",),
    ),
    Mutant(
        "a run whose reward collapsed is called flat",
        "harness/runs/verdict.py::_untaught",
        "if rise < -SURE * noise:",
        "if rise < -SURE:",
        ("harness/test_verdict.py::test_each_way_of_learning_nothing_has_its_sentence",),
    ),
)
