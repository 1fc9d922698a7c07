"""Bugs of settings: what cannot work is accepted, or deletes what was made, or goes on without a word.

Planted with those of `mutations`, in the same way.
"""

from __future__ import annotations

from planted import Mutant

_WRONG = "harness/test_runs_gone_wrong.py::"

SETTINGS = (
    Mutant(
        "no bound is ever looked at",
        "harness/bounds.py::check_bounds",
        "                ok = (bounds or ANY).holds(number)",
        "                ok = True",
        (f"{_WRONG}test_settings_made_in_python_are_bounded_too[field0]",),
    ),
    Mutant(
        "a custom loss of another shape is broadcast",
        "harness/algorithms/losses.py::loss_function",
        "    return fn if name in LOSSES else _shaped(fn)",
        "    return fn",
        (f"{_WRONG}test_a_custom_loss_of_another_shape_never_trains",),
    ),
    Mutant(
        "a preset's mapping stays under a file's",
        "harness/settings.py::_with_preset.both",
        "    both = [key for key in _section_defaults(cls) if",
        "    both = [key for key in over if",
        (f"{_WRONG}test_what_a_file_says_replaces_what_a_preset_says",),
    ),
    Mutant(
        "the first update's metrics stand for the step, though it had no token",
        "harness/runs/metrics.py::combine",
        "if not any(map(math.isnan, s.values()))",
        "if True",
        (f"{_WRONG}test_metrics_of_an_update_without_tokens_do_not_take_the_others_away",),
    ),
)
