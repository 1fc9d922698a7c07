"""Bugs of a run that is killed, resumed, or not alone. Planted with those of `mutations`, in the same way."""

from __future__ import annotations

from planted import Mutant

_GOES_ON = "harness/test_resuming.py::test_other_settings_count_from_the_next_step_on_and_earlier_steps_replay"

KILLING = (
    Mutant(
        "a place that cannot be written is a traceback",
        "harness/runs/run_folder.py::put",
        "except (OSError, SafetensorError) as error:",
        "except SafetensorError as error:",
        ("cli/test_cli_readonly.py::test_a_place_that_cannot_be_written_is_one_sentence[stages]",),
    ),
    Mutant(
        "a stage that is complete ignores other settings",
        "harness/loops/pipeline.py::_open",
        "if different or not complete(stage, folder):",
        "if not complete(stage, folder):",
        ("harness/test_stages.py::test_a_stage_that_is_complete_keeps_its_settings[2.group_size=8-words1]",),
    ),
    Mutant(
        "an address where nobody has ever answered is tried as long as one that was there",
        "policies/openai.py::OpenAIPolicy._ask",
        "last = until if self._answered else self._first_answer_until(error)",
        "last = until",
        ("policies/test_openai.py::test_an_address_where_nobody_is_is_a_setting_and_said_at_once",),
    ),
    Mutant(
        "a checkpoint's rates win over the settings of the run that goes on",
        "harness/learner/weights.py::restore",
        'if name not in ("params", "lr")}',
        "if False}",
        (_GOES_ON,),
    ),
    Mutant(
        "earlier steps are replayed with the settings of later ones",
        "harness/runs/run_folder.py::RunFolder.change_config",
        "        if step and before != config_yaml:",
        "        if False:",
        (_GOES_ON,),
    ),
    Mutant(
        "a run folder is locked by nobody",
        "harness/runs/run_folder.py::RunFolder.hold",
        '            lock.hold(self.path / "lock")',
        "            pass",
        ("harness/test_checkpoint.py::test_two_processes_do_not_write_one_run",),
    ),
    Mutant(
        "a run goes on in a folder that is gone, and makes it anew",
        "harness/runs/run_folder.py::RunFolder.save",
        "            partial.mkdir()",
        "            partial.mkdir(parents=True)",
        ("harness/test_checkpoint.py::test_a_run_folder_that_is_gone_is_one_sentence[deleted-a checkpoint]",),
    ),
    Mutant(
        "two runs load over each other's weights for ever",
        "policies/vllm_server/state.py::Server.bring",
        "                    self._look_whose(held)",
        "                    pass",
        ("policies/test_server.py::test_a_server_of_a_run_that_is_alive_is_refused",),
    ),
)
