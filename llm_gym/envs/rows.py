"""Rows of a data set: from the hub through `datasets`, or from a local file in the same schema.

Rows are loaded once per process and shared by every environment that names them; a file that
changes later is not read again.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from llm_gym.errors import DataError, ended, nearest, suggestion, unknown
from llm_gym.hub import offline_if_unreachable

Row = Mapping[str, Any]
SAMPLES = Path(__file__).parent / "data"
"""Small data sets that ship with the package, for `dataset="sample"`."""


@lru_cache(maxsize=32)
def load_rows(dataset: str, split: str, *, name: str | None = None, sample: str | None = None) -> Sequence[Row]:
    """Rows of `dataset`; the same list for the same arguments, so never change one.

    Args:
        dataset: a hub id, the path of a .jsonl, .json, .parquet or .csv file, or `sample`.
        split: the split, with the slices of `datasets` (`train[:95%]`, `test[100:200]`). A file is
            one split whatever it is called, so only the slice counts there.
        name: the configuration of a hub data set (`main`).
        sample: file name in `envs/data` that `dataset="sample"` stands for.

    Raises:
        DataError: nothing there, or it cannot be read; the sentence says what to pass instead.
    """
    path = SAMPLES / sample if dataset == "sample" and sample is not None else Path(dataset).expanduser()
    if path.suffix in _READERS:
        if not path.is_file():
            raise DataError(_no_file(path))
        rows = _load_file(path, split)
    elif path.is_file():
        raise DataError(f"dataset: {str(path)!r} is a file of another kind than {', '.join(_READERS)}; convert it.")
    else:
        rows = _load_hub(dataset, name, split)
    if not len(rows):
        raise DataError(f"dataset: {dataset!r} has no rows in split {split!r}.")
    return rows


def check_columns(rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    """Checks that the first row has every column.

    Args:
        rows: the data.
        columns: argument name -> column name.

    Raises:
        DataError: one is missing; the nearest column is named.
    """
    for argument, column in columns.items():
        if column not in rows[0]:
            near = nearest(column, rows[0]) or next(iter(rows[0]))
            said = unknown(argument, column, rows[0]).rstrip(".")
            raise DataError(f"{said} (columns: {', '.join(rows[0])}); name it, as in {argument}={near}.")


def slice_of(split: str, size: int) -> slice:
    """The rows that a split string asks for, with the rounding of `datasets` (to the nearest row).

    >>> slice_of("train[:95%]", 200), slice_of("test", 5), slice_of("train[-3:]", 10)
    (slice(0, 190, 1), slice(0, 5, 1), slice(7, 10, 1))

    Raises:
        DataError: a string that is no split.
    """
    match = re.fullmatch(r"\s*[\w.-]+\s*(?:\[(-?\d*%?):(-?\d*%?)\])?\s*", split)
    if match is None:
        raise DataError(f"split: got {split!r}, want a name or a name with a slice, such as 'train[:95%]'.")
    start, stop = (_edge(text, size) for text in match.groups())
    return slice(*slice(start, stop).indices(size))


def _edge(text: str | None, size: int) -> int | None:
    """One end of a slice, in rows."""
    if not text or text in ("-", "%"):
        return None
    return round(int(text[:-1]) * size / 100) if text.endswith("%") else int(text)


def _load_file(path: Path, split: str) -> Sequence[Row]:
    """Rows of a local file."""
    try:
        rows = _READERS[path.suffix](path)
    except (ValueError, OSError, csv.Error) as error:
        raise DataError(f"dataset: cannot read {str(path)!r}: {ended(error)}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"dataset: {str(path)!r} is not a list of objects.")
    return rows[slice_of(split, len(rows))]


def _load_hub(dataset: str, name: str | None, split: str) -> Sequence[Row]:
    """Rows of a hub data set."""
    import datasets  # takes a second, and local files do without it

    try:
        with offline_if_unreachable(dataset):
            rows = datasets.load_dataset(dataset, name, split=split)
    except Exception as error:
        if isinstance(error, ValueError) and "split" in str(error).lower():
            raise DataError(f"split: {dataset!r} refused {split!r}: {_first_line(error)}") from error
        raise DataError(
            f"dataset: cannot load {dataset!r} from the hub ({type(error).__name__}); offline, pass a local "
            ".jsonl, .json, .parquet or .csv file in the same schema, e.g. dataset=path/to/train.jsonl"
            ", or dataset=sample where the environment ships one."
        ) from error
    return list(rows)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]


def _no_file(path: Path) -> str:
    """One sentence: no such file, and the nearest one beside it."""
    beside = [p.name for p in path.parent.iterdir() if p.suffix in _READERS] if path.parent.is_dir() else []
    hint = suggestion(path.name, beside, str(path.parent))
    return f"dataset: no file {str(path)!r}{f'; {hint}' if hint else '.'}"


def _jsonl(path: Path) -> Any:
    with path.open(encoding="utf-8") as lines:
        return [_parsed(line, number) for number, line in enumerate(lines, 1) if line.strip()]


def _parsed(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} is not JSON ({error})") from error


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _csv(path: Path) -> Any:
    with path.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def _parquet(path: Path) -> Iterable[Row]:
    import pyarrow.parquet  # type: ignore[import-untyped]  # a dependency of `datasets`

    rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    return rows


_READERS: dict[str, Callable[[Path], Any]] = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
