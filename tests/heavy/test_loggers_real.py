"""Weights & Biases (offline) and trackio (local), the real packages: rows are read back from what they wrote."""

from __future__ import annotations

import json
import math
import sqlite3
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sandbox_tiers import within

from llm_gym.harness import TrainConfig, Trainer, load

pytestmark = pytest.mark.heavy
SMALL = ["eval.episodes=2", "prompts_per_step=1", "group_size=2", "sampling.max_tokens=4", "checkpoint.every=1"]
OPTIONS = ["log.options.wandb.mode=offline", "log.options.trackio.project=tests"]


def records(file: Path) -> Iterator[bytes]:
    """The whole records of a .wandb file: after a header, blocks of 32 KiB in the format of LevelDB's log."""
    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if at + 7 + length > len(data):
            return  # it is being written
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def offline(run: Path) -> list[tuple[str, dict[str, Any], dict[int, dict[str, Any]]]]:
    """Of each start that is written to its end: id, settings, rows by step."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for file in sorted(run.glob("wandb/offline-run-*/run-*.wandb")):
        config, rows, ended = {}, {}, False
        for data in records(file):
            record = Record.FromString(data)
            if record.HasField("history"):
                items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                rows[record.history.step.num] = items
            elif record.HasField("run") and record.run.run_id:
                config |= {i.key: json.loads(i.value_json) for i in record.run.config.update if i.key}
            ended = ended or record.HasField("exit")
        if ended:
            found.append((file.stem.removeprefix("run-"), config, rows))
    return found


def test_rows_reach_the_real_packages_also_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # it looks there when it is imported, as TRL's tests do before this one
    sets = [*SMALL, "log.to=[wandb, trackio]", *OPTIONS]
    first = Trainer(load(TrainConfig, sets=sets, steps=2), out=tmp_path / "run").train()
    rows = Trainer(load(TrainConfig, sets=sets, steps=3), out=tmp_path / "run", resume=True).train()
    expected = {row["step"]: {k: v for k, v in row.items() if k != "step" and v is not None} for row in rows}
    # `finish` returns before W&B's own process has written the file
    assert within(240, lambda: len(offline(tmp_path / "run")) == 2)
    (one, settings, before), (two, _, after) = offline(tmp_path / "run")
    assert one == two == (tmp_path / "run" / "wandb_id").read_text(), "the resumed run goes on with the same id"
    assert settings["loss"]["name"] == "ppo_clip"
    assert {s: plain(row) for s, row in (before | after).items()} == expected
    assert sorted(before) == [row["step"] for row in first]
    assert sorted(after) == [3]
    database = sqlite3.connect(tmp_path / "trackio" / "tests.db")
    query = "select run_name, step, metrics from metrics order by id"
    # and trackio's after 30 seconds, whether its thread has written them all or not
    assert within(240, lambda: len(database.execute(query).fetchall()) >= len(rows))
    logged = database.execute(query).fetchall()
    assert [name for name, *_ in logged] == ["run"] * 4
    assert {step: json.loads(text) for _, step, text in logged} == expected
    database.close()
    assert not any(math.isnan(v) for row in expected.values() for v in row.values() if isinstance(v, float))


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """Without what W&B adds of its own."""
    return {name: value for name, value in row.items() if not name.startswith("_")}
