"""Python for episodes: `PythonSession` runs model-written code where it can do no harm.

    with PythonSession() as session:
        session.run("x = 20")
        session.run("x + 1").output        # "21\\n"

See docs/sandbox.md for what each tier isolates and what it does not.
"""

from llm_gym.envs.tools.sandbox.isolation import Tier
from llm_gym.envs.tools.sandbox.limits import Limits
from llm_gym.envs.tools.sandbox.pool import missing, shutdown, tier
from llm_gym.envs.tools.sandbox.sandbox import SandboxError
from llm_gym.envs.tools.sandbox.session import CellResult, PythonSession

__all__ = ["CellResult", "Limits", "PythonSession", "SandboxError", "Tier", "missing", "shutdown", "tier"]
