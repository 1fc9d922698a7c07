from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from llm_gym.cli.config import commented, field_notes
from llm_gym.cli.group import llmgym
from llm_gym.harness import TrainConfig, load
from llm_gym.harness.loops.sft import SFTConfig


@pytest.mark.parametrize(("name", "cls"), [("train", TrainConfig), ("sft", SFTConfig)])
def test_the_printed_file_is_the_default(tmp_path: Path, name: str, cls: type) -> None:
    done = CliRunner().invoke(llmgym, ["config", name])
    file = tmp_path / "run.yaml"
    file.write_text(done.stdout, "utf-8")
    assert load(cls, file) == cls()


def test_every_setting_is_explained() -> None:
    lines = commented(TrainConfig()).split("\n")
    bare = [a for a, line in itertools.pairwise(lines) if line.strip() and not line.lstrip().startswith("#")]
    unexplained = [line for line in bare if not line.lstrip().startswith("#")]
    assert len(unexplained) <= 2, unexplained


def test_uncommented_adapters_are_their_defaults() -> None:
    text = commented(TrainConfig())
    start = text.index("lora: null\n")
    block = [line for line in text[start:].split("\n")[1:] if line.startswith("#   ")]
    lora = yaml.safe_load("\n".join(line.removeprefix("#   ") for line in block if ":" in line))
    assert lora["rank"] == 16


@dataclasses.dataclass(frozen=True)
class Inner:
    """The inner part."""

    x: float = 1e-6
    """A small
    number."""


@dataclasses.dataclass(frozen=True)
class Outer:
    text: str = "a: b # c"
    """Needs quoting."""
    inner: Inner = dataclasses.field(default_factory=Inner)
    pair: tuple[int, int] = (1, 2)


def test_comments_are_the_fields_docstrings() -> None:
    assert field_notes(Inner) == {"x": "A small number."}
    text = commented(Outer())
    assert "# Needs quoting.\ntext:" in text
    assert "# The inner part.\ninner:\n  # A small number.\n  x:" in text
    assert "pair: [1, 2]" in text
    assert load(Outer, sets=[]) == Outer()
