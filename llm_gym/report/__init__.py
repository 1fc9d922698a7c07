"""Reports of a run: one static HTML page, and a curve for the terminal.

Both read only what the run folder holds, so a report can be made again at any time, for a run that
is still going as well as for one that was killed.
"""

from llm_gym.report.html import write
from llm_gym.report.terminal import terminal_curve

__all__ = ["terminal_curve", "write"]
