"""Bugs of the Python sandbox and of tools that keep state. Planted with those of `mutations`, in the same way."""

from __future__ import annotations

from planted import Mutant

_CELLS = "envs/test_sandbox_shell.py::test_every_cell_says_what_it_should[full-worker]"

SANDBOX = (
    Mutant(
        "a command of the shell is given a terminal",
        "envs/tools/sandbox/guest/shell.py::Plain.system",
        "    def system(self, cmd: str)",
        "    def system_without(self, cmd: str)",
        (_CELLS,),
    ),
    Mutant(
        "what a cell does to its shell stays",
        "envs/tools/sandbox/guest/worker.py::run",
        "    mend(shell)\n",
        "",
        (_CELLS,),
    ),
    Mutant(
        "only the innermost layer of an environment is searched for packages",
        "envs/tools/sandbox/isolation.py::packages.found",
        "found = dict.fromkeys([*map(os.path.realpath, filter(None, sys.path)), *own])",
        "found = dict.fromkeys(own)",
        ("envs/test_sandbox.py::test_packages_are_found_in_every_layer_of_the_environment_and_projects_are_not",),
    ),
    Mutant(
        "a session of the Landlock tier reads what /proc says of others",
        "envs/tools/sandbox/guest/confine.py::own_proc",
        'return [("/proc", READ_DIR), *',
        'return [("/proc", READ_FILE | READ_DIR), *',
        ("envs/test_sandbox_secrets.py::test_command_lines_of_other_processes_are_not_seen[landlock]",),
    ),
    Mutant(
        "an episode is opened in one thread and its tools are called in another",
        "envs/tools/env.py::ToolEnv._hooked",
        "return self._runner.call(hook, None, **arguments) if threaded else hook(**arguments)",
        "return hook(**arguments)",
        ("envs/test_tool_env.py::test_what_open_makes_is_used_by_tools_and_final_in_its_own_thread[False]",),
    ),
)
