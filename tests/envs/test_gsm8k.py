"""GSM8K-v0: the data in every form, the prompt, the grading."""

from __future__ import annotations

import csv
import json
import socket

import gymnasium
import pytest

from llm_gym import hub
from llm_gym.envs.grading import verify
from llm_gym.envs.gsm8k import GSM8K
from llm_gym.envs.rows import load_rows, slice_of
from llm_gym.errors import DataError, SettingError

ROWS = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(20)]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def answer(env, text):
    return env.step(env.chat.encode_reply(text))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_local_file_of_every_kind(tmp_path, suffix):
    env = GSM8K(dataset=write(tmp_path / f"qa{suffix}", ROWS), instruction="")
    for row in range(len(ROWS)):
        _, info = env.reset(options={"task": row})
        assert info["messages"] == [{"role": "user", "content": ROWS[row]["question"]}]
        assert answer(env, f"So #### {row + 1}")[1] == 1.0
    with pytest.raises(SettingError, match="want a row from 0 to 19"):
        env.reset(options={"task": 20})


def test_every_reference_answer_of_the_test_set_earns_one(shared):
    """All 1,319, spoken by a scripted policy through the environment, tokens and all."""
    env = GSM8K(dataset=str(shared("data/gsm8k/test.jsonl")), max_tokens=4096)
    rows = load_rows(str(shared("data/gsm8k/test.jsonl")), "train")
    total = 0.0
    for row, data in enumerate(rows):
        env.reset(options={"task": row})
        total += answer(env, data["answer"])[1]
    assert (len(rows), total) == (1319, 1319.0)


def test_the_sample_is_right_and_varied():
    rows = load_rows("sample", "train", sample="gsm8k.jsonl")
    assert len(rows) == 12
    for row in rows:
        gold = row["answer"].rpartition("####")[2].strip()
        assert verify(gold, row["answer"]).score == 1
        for step in row["answer"].split("<<")[1:]:
            left, right = step.split(">>")[0].split("=")
            assert eval(left) == float(right)
    assert len({row["answer"] for row in rows}) == 12


def test_the_prompt_asks_for_the_form_that_is_graded():
    env = GSM8K(dataset="sample")
    _, info = env.reset(seed=1)
    assert info["messages"][0]["content"].endswith("\nThink step by step, and end with the final number after ####.")


def test_hundreds_of_environments_share_one_list():
    assert GSM8K(dataset="sample").problems is GSM8K(dataset="sample").problems


@pytest.mark.parametrize(
    "split", ["train[:25%]", "train[25%:]", "x[3:7]", "train[-2:]", "test", "train[:33%]", "a[13%:57%]"]
)
def test_slices_are_those_of_the_datasets_library(split):
    datasets = pytest.importorskip("datasets")
    name = split.split("[")[0]
    for size in (1, 20, 7473):
        instruction = datasets.ReadInstruction.from_spec(split).to_absolute({name: size})[0]
        start, stop, _ = slice_of(split, size).indices(size)
        want = (instruction.from_ or 0, size if instruction.to is None else instruction.to)
        assert range(start, stop) == range(*want) or (start, stop) == want


def test_slices_of_a_file(tmp_path):
    path = write(tmp_path / "qa.jsonl", ROWS)
    assert list(load_rows(path, "train[:25%]")) == ROWS[:5]
    assert list(load_rows(path, "test[18:]")) == ROWS[18:]
    with pytest.raises(DataError, match="split: got 'train\\[5\\]', want a name or a name with a slice"):
        load_rows(path, "train[5]")
    with pytest.raises(DataError, match="has no rows in split 'train\\[:0\\]'"):
        load_rows(path, "train[:0]")


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        (
            {"question": "qestion"},
            "question: unknown value 'qestion'; did you mean 'question'\\? \\(columns: question, answer",
        ),
        ({"answer": "solution"}, "answer: unknown value 'solution'; .*\\(columns: question, answer"),
        ({"where": "hsah"}, "where: unknown value 'hsah'; did you mean 'hash'"),
        ({"dataset": "no/such/file.jsonl"}, "dataset: no file 'no/such/file.jsonl'"),
    ],
)
def test_bad_arguments_name_the_nearest(kwargs, words):
    with pytest.raises(SettingError, match=words):
        GSM8K(**{"dataset": "sample", **kwargs})


def test_a_mistyped_file_name_gets_the_nearest_file(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"no file .*; did you mean '.*train.jsonl'"):
        GSM8K(dataset=str(tmp_path / "trian.jsonl"))


@pytest.mark.parametrize(
    ("text", "words"), [("{", "cannot read"), ('{"a": 1}', "is not a list of objects"), ("[]", "has no rows")]
)
def test_files_that_are_no_data(tmp_path, text, words):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(DataError, match=words):
        GSM8K(dataset=str(tmp_path / "bad.json"))


def test_a_reference_that_is_no_number_is_found_at_the_start(tmp_path):
    path = write(tmp_path / "qa.jsonl", [*ROWS, {"question": "Why?", "answer": "because\n#### because"}])
    with pytest.raises(DataError, match=r"answer: row 20 of .* ends in 'because', want a number after '####'"):
        GSM8K(dataset=path)


def test_offline_one_sentence_says_how_to_pass_a_file(monkeypatch, capfd, tmp_path):
    """The real loader, in a process that can resolve no name and has no cache."""

    def unresolved(*args, **kwargs):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    for module in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", False)
    load_rows.cache_clear()
    with pytest.raises(DataError, match=r"cannot load 'openai/gsm8k' from the hub .* pass a local .jsonl") as caught:
        gymnasium.make("llm_gym/GSM8K-v0")
    assert "\n" not in str(caught.value)
    assert "dataset=path/to/train.jsonl" in str(caught.value)
    assert "etry" not in "".join(capfd.readouterr())
    import datasets
    from huggingface_hub import constants

    assert not constants.HF_HUB_OFFLINE
    assert not datasets.config.HF_HUB_OFFLINE


def test_the_hub_data_set_is_asked_for_as_its_card_says(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def hub(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    load_rows.cache_clear()
    env = GSM8K(split="train[:95%]")
    load_rows.cache_clear()
    assert asked == [(("openai/gsm8k", "main"), {"split": "train[:95%]"})]
    assert env.reset(seed=1)[1]["messages"][0]["content"].startswith("What is")
