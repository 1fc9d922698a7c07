"""All planted bugs, of every table that stands beside this file."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from planted import Mutant

TABLES = sorted(file.stem for file in Path(__file__).parent.glob("mutations*.py") if file.stem != Path(__file__).stem)
EVERY: tuple[Mutant, ...] = tuple(
    mutant
    for table in TABLES
    for name, values in vars(import_module(table)).items()
    if name.isupper() and isinstance(values, tuple)
    for mutant in values
    if isinstance(mutant, Mutant)
)
