"""docs/changes.md: every table that it names is where it says, and every setting takes what it says."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from llm_gym.errors import SettingError
from llm_gym.harness import TrainConfig, Trainer, load

PAGE = Path(__file__).parents[1] / "docs" / "changes.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if line.startswith("| a")
]
FILE = r"`([a-z_/]+\.py)`"
FORMS = {"filters": "filters={{'{0}': 1}}", "log.to": "log.to=['{0}']"}
"""Settings that are no single text."""
SETTINGS = sorted({name for *_, own in ROWS for name in re.findall(r"^`([a-z._]+)`", own)})


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_every_table_is_where_it_says(row: list[str]) -> None:
    _, write, table, _ = row
    tables = re.findall(rf"`([A-Z]+)` (?:in {FILE}|there)", table)
    assert tables or "`docs/`" in table
    for name, file in tables:
        path = file or re.findall(FILE, write)[-1]
        module = ".".join(["llm_gym", *Path(path).with_suffix("").parts]).removesuffix(".__init__")
        assert len(getattr(importlib.import_module(module), name)) > 1


def test_the_settings_are_read_from_the_page() -> None:
    assert len(SETTINGS) > 9


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_takes_a_name_from_a_package_of_one_s_own(setting: str, tmp_path: Path) -> None:
    """It is imported, before a model loads."""
    given = FORMS.get(setting, setting + "={0}").format("no_such_package:f")
    with pytest.raises(SettingError, match=r"cannot import 'no_such_package'"):
        Trainer(load(TrainConfig, sets=[given]), out=tmp_path / "run")
