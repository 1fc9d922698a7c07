"""A real vLLM server on an exported folder: it serves what was trained, and judges as the model itself does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_checks import contexts

from llm_gym.chat import load_tokenizer
from llm_gym.core import Episode, Sampling, StopReason, Turn
from llm_gym.errors import ConfigError
from llm_gym.harness import TrainConfig, Trainer, load
from llm_gym.harness.batching.packing import pack, sequences
from llm_gym.harness.loops.teacher import LocalTeacher, ServedTeacher
from llm_gym.harness.runs.export import export_run
from llm_gym.harness.types import MicroBatch
from llm_gym.policies.builtin.policy import TransformersPolicy
from llm_gym.policies.vllm_server.process import ServerProcess
from llm_gym.trajectories import trajectories

pytestmark = pytest.mark.heavy
pytest.importorskip("vllm", reason="vLLM is not installed")
SMALL = ["eval.episodes=4", "sampling.max_tokens=24", "prompts_per_step=4", "group_size=4", "loss.entropy_weight=1"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of two steps that move the weights, its adapter folded in."""
    folder = tmp_path_factory.mktemp("run")
    sets = [*SMALL, "steps=2", "lora.rank=4", "optimizer.lr=0.01"]
    Trainer(load(TrainConfig, sets=sets), out=folder / "run").train()
    export_run(folder / "run", folder / "out")
    return str(folder / "out")


@pytest.fixture(scope="module")
def server(exported: str) -> Iterator[str]:
    settings = {"dtype": "float32", "max_model_len": 512}
    process = ServerProcess(exported, settings=settings)
    process.wait()
    yield process.url
    process.stop()


def batch(model: str, share: bool) -> MicroBatch:
    """What the model said to some prompts, several times to each."""
    policy = TransformersPolicy(model)
    prompts = [c for c in contexts(3) for _ in range(3)]
    said = policy.generate(prompts, Sampling(max_tokens=12), seeds=list(range(len(prompts))))
    policy.close()
    turns = [(Turn(p, c, 0.0),) for p, c in zip(prompts, said, strict=True)]
    episodes = [Episode("e", 0, trajectories(turn), StopReason.ANSWERED) for turn in turns]
    rows = [row for i, episode in enumerate(episodes) for row in sequences(episode, i)]
    (micro,) = pack(rows, max_tokens=10_000, share=share).micro
    return micro


@pytest.mark.parametrize("share", [False, True])
def test_a_server_judges_as_the_model_itself(server: str, exported: str, share: bool) -> None:
    micro = batch(exported, share)
    local = LocalTeacher(exported, device=torch.device("cpu"), dtype=torch.float32)
    served = ServedTeacher(server, load_tokenizer(exported), k=8)
    torch.testing.assert_close(served.logprobs(micro), local.logprobs(micro), rtol=0, atol=1e-3)
    torch.testing.assert_close(local.logprobs(micro), micro.streams["old_logprobs"], rtol=0, atol=1e-3)
    ours, theirs = served.top(micro, 8), local.top(micro, 8)
    torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=1e-3)
    assert np.mean((ours[0] == theirs[0]).numpy()) > 0.95, "equal but for ties"
    served.close()


def test_more_than_the_server_gives_is_refused_at_the_start(server: str, exported: str) -> None:
    with pytest.raises(ConfigError, match="cannot score tokens"):
        ServedTeacher(server, load_tokenizer(exported), k=200)


@pytest.mark.parametrize("kl", ["sampled", pytest.param("top_k", marks=pytest.mark.soak)])
def test_a_student_comes_nearer_to_a_served_teacher(server: str, tmp_path: Path, kl: str) -> None:
    sets = [*SMALL[:-1], f"distill.teacher={server}", f"distill.kl={kl}", "steps=6", "optimizer.lr=5e-4"]
    rows = Trainer(load(TrainConfig, sets=sets), out=tmp_path / "run").train()
    assert rows[-1]["distill/kl"] < 0.8 * rows[1]["distill/kl"]
