"""What is exported is what was trained, with its stop ids and its history, and loads in plain transformers and peft."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from llm_gym import embedded
from llm_gym.chat import load_chat, load_tokenizer
from llm_gym.errors import CheckpointError, ConfigError
from llm_gym.harness import TrainConfig, Trainer, load
from llm_gym.harness.loops.sft import SFTConfig, sft
from llm_gym.harness.model.loading import merged
from llm_gym.harness.runs.export import export_run
from llm_gym.harness.runs.lineage import lineage, locate

SMALL = [
    "eval.episodes=4",
    "sampling.max_tokens=8",
    "prompts_per_step=2",
    "group_size=4",
    "steps=2",
    "loss.entropy_weight=1",
]


def train(out: Path, *sets: str) -> Trainer:
    run = Trainer(load(TrainConfig, sets=[*SMALL, "checkpoint.every=1", "optimizer.lr=0.01", *sets]), out=out)
    run.train()
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer, Trainer]:
    """A folder with a run of whole weights, and one of an adapter."""
    folder = tmp_path_factory.mktemp("runs")
    return folder, train(folder / "whole"), train(folder / "lora", "lora.rank=4")


def same(model: torch.nn.Module, other: torch.nn.Module, tolerance: float = 0.0) -> None:
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        a, b = (m(input_ids=ids).logits.float() for m in (model, other))
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_whole_weights_come_back_bit_for_bit(runs, tmp_path: Path) -> None:
    folder, whole, _ = runs
    assert export_run(folder / "whole", tmp_path / "out").step == 2
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(plain).__name__ == "Qwen3ForCausalLM"
    trained = whole.model.state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in plain.state_dict().items())
    start = transformers.AutoModelForCausalLM.from_pretrained(embedded.PATH, dtype=torch.float32).state_dict()
    assert any(not torch.equal(tensor, start[name]) for name, tensor in plain.state_dict().items())
    assert not list(tmp_path.glob(".partial*"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_rounded_once(runs, tmp_path: Path, dtype: str) -> None:
    folder, whole, _ = runs
    export_run(folder / "whole", tmp_path / "out", dtype=dtype)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    trained = whole.model.state_dict()
    assert all(torch.equal(tensor, trained[name].to(getattr(torch, dtype))) for name, tensor in plain.items())


def test_a_step_can_be_chosen(runs, tmp_path: Path) -> None:
    folder, _, _ = runs
    export_run(folder / "whole", tmp_path / "one", step=1)
    export_run(folder / "whole" / "checkpoints" / "step_000001", tmp_path / "two")
    one, two = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / n).state_dict() for n in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(CheckpointError, match=r"step: got 7, but .* has checkpoints of 1, 2"):
        export_run(folder / "whole", tmp_path / "three", step=7)


def test_an_adapter_is_folded_in_or_written_alone(runs, tmp_path: Path) -> None:
    import peft

    folder, _, lora = runs
    export_run(folder / "lora", tmp_path / "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    same(plain, merged(lora.model), 1e-5)
    export_run(folder / "lora", tmp_path / "adapter", adapter=True)
    base = transformers.AutoModelForCausalLM.from_pretrained(embedded.PATH, dtype=torch.float32)
    same(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"), lora.model, 1e-5)
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None, "the embedded model has no name elsewhere"
    with pytest.raises(ConfigError, match="trained whole weights"):
        export_run(folder / "whole", tmp_path / "none", adapter=True)


def test_tokenizer_template_and_every_stop_id_go_along(runs, tmp_path: Path) -> None:
    folder, _, _ = runs
    checkpoint = locate(folder / "whole").folder
    generation = json.loads((checkpoint / "generation_config.json").read_text())
    (checkpoint / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [0, 2]}))
    load_tokenizer.__globals__["_load"].cache_clear()
    export_run(folder / "whole", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert sorted(written["eos_token_id"]) == [0, 2]
    assert written["eos_token_id"][0] == 2, "the one that the template puts behind a reply"
    ours, theirs = load_chat(None), load_chat(load_tokenizer(str(tmp_path / "out")))
    messages = [{"role": "user", "content": "7*8?"}]
    assert ours.open(messages).tolist() == theirs.open(messages).tolist()
    assert set(theirs.stop_ids) == {0, 2}
    (checkpoint / "generation_config.json").write_text(json.dumps(generation))
    load_tokenizer.__globals__["_load"].cache_clear()


def test_the_card_tells_the_story_and_no_path_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    chats = [{"prompt": f"{i}+{i}?", "completion": str(2 * i)} for i in range(8)]
    Path("chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    sft(SFTConfig(dataset="chats.jsonl", steps=2, examples_per_step=4, out="runs/sft"), progress=False)
    train(Path("runs/rl"), "model=runs/sft/model", "lora.rank=2")
    assert [run.kind for run in lineage(locate("runs/rl"))] == ["sft", "train"]
    export_run("runs/rl", "out/mine")
    text = Path("out/mine/README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llm-gym", "supervised-fine-tuning", "reinforcement-learning"],
    }
    assert "from the embedded model of llm_gym" in body
    assert "1. Supervised fine-tuning, 2 steps" in body
    assert "| dataset | chats.jsonl |" in body
    assert "2. Reinforcement learning, 2 steps" in body
    assert "| lora.rank | 2 |" in body
    assert re.search(r"\| eval/greedy_reward \| [\d.]+ .*\| [\d.]+ .*\| 2 \|", body)
    for private in (str(tmp_path), str(Path(embedded.PATH).parent), str(Path.home())):
        for file in Path("out/mine").rglob("*"):
            assert private.encode() not in file.read_bytes(), (private, file)


def test_mistakes_leave_nothing_behind(runs, tmp_path: Path) -> None:
    folder, _, _ = runs
    with pytest.raises(ConfigError, match="did you mean 'bfloat16'"):
        export_run(folder / "whole", tmp_path / "out", dtype="bfloat61")
    for path, why in ((tmp_path / "nothing", "does not exist"), (tmp_path, "is no run folder")):
        with pytest.raises(CheckpointError, match=why):
            export_run(path, tmp_path / "out")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_text("env: x\n")
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        export_run(empty, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds something already"):
        export_run(folder / "whole", tmp_path / "full")
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    (tmp_path / "broken").mkdir()
    for file in (folder / "whole").glob("*.yaml"):
        (tmp_path / "broken" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "broken" / "checkpoints" / "step_000001").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="cannot be read"):
        export_run(tmp_path / "broken", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".partial*"))


def test_a_run_goes_on_from_an_adapters_run(runs, tmp_path: Path) -> None:
    """It trains the former adapter folded in, and its own export is the fold of both."""
    folder, _, first = runs
    second = train(tmp_path / "on", f"model={folder / 'lora'}", "lora.rank=2")
    start = Trainer(load(TrainConfig, sets=[*SMALL, f"model={folder / 'lora'}"]), out=tmp_path / "start")
    same(start.model, merged(first.model), 1e-4)
    start.close()
    assert [source.config["lora"]["rank"] for source in lineage(locate(tmp_path / "on"))] == [4, 2]
    export_run(tmp_path / "on", tmp_path / "out")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    same(plain, merged(second.model), 1e-4)
    with pytest.raises(ConfigError, match="lies on another run's adapter"):
        export_run(tmp_path / "on", tmp_path / "adapter", adapter=True)
