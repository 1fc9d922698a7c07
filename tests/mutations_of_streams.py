"""Bugs of rollouts that are ahead of the learner, and of weights that change under requests, and the tests that see them."""

from __future__ import annotations

from planted import Mutant

UPDATES = "policies/test_updates_in_flight.py::test_each_span_of_a_completion_matches_its_own_version"
STREAM = "harness/test_stream.py::"

MUTANTS = (
    Mutant(
        "a task begins one update too early",
        "rollouts/scheduler.py::Scheduler.begin",
        "self.per_step * (self.max_staleness - (step - version))",
        "self.per_step * (self.max_staleness + 1 - (step - version))",
        ("test_scheduler.py::test_no_task_is_trained_on_later_than_the_bound_allows",),
    ),
    Mutant(
        "weights that are sent every few steps count as new",
        "rollouts/scheduler.py::Scheduler.begin",
        "(self.max_staleness - (step - version))",
        "self.max_staleness",
        ("test_scheduler.py::test_no_task_is_trained_on_later_than_the_bound_allows",),
    ),
    Mutant(
        "what a step has taken already counts as missing",
        "harness/data/stream.py::Stream.collect",
        "missing=min(self.count - len(trained), left), left=left)",
        "missing=self.count, left=left)",
        (STREAM + "test_no_token_is_older_than_the_bound_and_nothing_is_dropped",),
    ),
    Mutant(
        "tasks under way are lost with a killed run",
        "harness/data/stream.py::Stream._load",
        "self._again.append((number, task))",
        "pass",
        (STREAM + "test_a_run_that_goes_on_ends_every_number_once",),
    ),
    Mutant(
        "an environment whose groups fail the filters loses its weight",
        "harness/data/stream.py::Stream._end",
        "self.owed += [group.task.env for group in shared.values() if group.filtered is not None]",
        "pass",
        (STREAM + "test_each_environment_keeps_its_weight_among_what_is_trained_on",),
    ),
    Mutant(
        "a token is as old as the first of its completion",
        "core.py::Span.versions",
        "self.version, self.updates)",
        "self.version, ())",
        (STREAM + "test_age_is_that_of_each_token",),
    ),
    Mutant(
        "a group that waited is another rank's after a restart",
        "harness/data/stream.py::Stream._restored",
        "rank=owner)",
        "rank=0)",
        (STREAM + "test_ranks_train_on_what_one_process_would",),
    ),
    Mutant(
        "new weights go on with old keys and values",
        "policies/builtin/engine.py::Engine.renew",
        "self.refill()",
        "pass",
        (UPDATES,),
    ),
    Mutant(
        "rows kept for a next turn outlive their weights",
        "policies/builtin/engine.py::Engine.renew",
        "self.slots.forget()",
        "pass",
        (UPDATES,),
    ),
    Mutant(
        "an update is dated a token late",
        "policies/builtin/engine.py::Engine.renew",
        "[(drawn, version)]",
        "[(drawn + 1, version)]",
        (UPDATES,),
    ),
    Mutant(
        "the learner's module samples while it learns",
        "harness/weight_sync/transports.py::Mode.fits",
        "ahead = self.in_flight or not config.stream.max_staleness",
        "ahead = True",
        ("harness/test_stream_training.py::test_modes_that_cannot_work_are_refused",),
    ),
)
