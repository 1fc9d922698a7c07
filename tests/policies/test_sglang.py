"""The SGLang engine against a stand-in that holds every request to the documentation, and samples from the embedded model."""

from __future__ import annotations

import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sglang_double import Double, Refused, check

from llm_gym.core import Completion, Sampling
from llm_gym.embedded import PATH
from llm_gym.errors import ConfigError, PolicyError, SettingError, SyncError
from llm_gym.harness import TrainConfig, Trainer
from llm_gym.policies import make_policy
from llm_gym.policies.builtin.policy import TransformersPolicy
from llm_gym.policies.http import RemoteError
from llm_gym.policies.sglang import SGLangPolicy, read, request

CONTEXT = np.arange(20, 60, dtype=np.int32)


@pytest.fixture
def double() -> Iterator[Double]:
    made = Double()
    yield made
    made.stop()


@pytest.fixture
def policy(double: Double) -> Iterator[SGLangPolicy]:
    engine = SGLangPolicy(servers=[double.url], version=3, retry_seconds=2.0)
    yield engine
    engine.close()


def moved(to: Path, seed: int = 0) -> Path:
    """A folder of the embedded model with noise on every weight."""
    shutil.copytree(PATH, to)
    noise = torch.Generator().manual_seed(seed)
    (file,) = to.glob("*.safetensors")
    held = load_file(file)
    save_file({n: t + 0.05 * torch.randn(t.shape, generator=noise) for n, t in held.items()}, file)
    return to


def scored(model: Path, context: Any, completion: Completion) -> Any:
    """Log-probabilities of a completion's tokens by plain transformers."""
    inside = TransformersPolicy(model).model
    tokens = torch.tensor([[*context.tolist(), *completion.tokens.tolist()]])
    with torch.no_grad():
        every = inside(tokens).logits[0].log_softmax(-1)
    at = torch.arange(len(context) - 1, tokens.shape[1] - 1)
    return every[at, tokens[0, len(context) :]].numpy()


def test_tokens_and_log_probabilities_are_the_models(policy: SGLangPolicy, double: Double) -> None:
    [done] = policy.generate([CONTEXT], Sampling(max_tokens=6, stop_token_ids=()), seeds=[7])
    assert (len(done.tokens), done.finish_reason, done.version, done.updates) == (6, "length", 3, ())
    np.testing.assert_allclose(done.logprobs, scored(Path(PATH), CONTEXT, done), atol=1e-4)
    [again] = policy.generate([CONTEXT], Sampling(max_tokens=6, stop_token_ids=()), seeds=[7])
    assert again.tokens.tolist() == done.tokens.tolist()
    assert policy.dtype == torch.float32
    assert policy.max_context == double.policy.max_context


def test_everything_that_a_generation_config_could_change_is_said() -> None:
    body = request(CONTEXT, Sampling(0.7, max_tokens=9, stop_token_ids=(1, 2)), 9, 2**40 + 5)
    assert body == {
        "input_ids": CONTEXT.tolist(),
        "return_logprob": True,
        "logprob_start_len": -1,
        "sampling_params": {
            "max_new_tokens": 9,
            "temperature": 0.7,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "ignore_eos": False,
            "stop_token_ids": [1, 2],
            "sampling_seed": 5,
        },
    }
    check("/generate", json.loads(json.dumps(body)))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"input_ids": [1], "logprob": True}),
        ("/generate", {"input_ids": [1.0]}),
        ("/generate", {"input_ids": [1], "sampling_params": {"max_tokens": 3}}),
        ("/generate", {"input_ids": [1], "sampling_params": {"top_k": 1.5}}),
        ("/generate", {"input_ids": [1], "return_logprob": 1}),
        ("/generate", {"input_ids": [1], "text": "one"}),
        ("/pause_generation", {"mode": "keep"}),
        ("/update_weights_from_disk", {"weight_version": "1"}),
        ("/update_weights_from_disk", {"model_path": "here", "weight_version": 1}),
    ],
)
def test_the_stand_in_refuses_what_is_not_documented(path: str, body: Any) -> None:
    with pytest.raises(Refused):
        check(path, body)


def test_new_weights_come_in_the_documented_order(policy: SGLangPolicy, double: Double, tmp_path: Path) -> None:
    double.order.clear()
    folder = moved(tmp_path / "new")
    policy.load_folder(folder, version=4)
    shutil.rmtree(folder)
    update = ["/pause_generation", "/flush_cache", "/update_weights_from_disk", "/continue_generation"]
    assert double.order == ["/get_model_info", *update, "/get_model_info"]
    assert policy.version == 4
    [done] = policy.generate([CONTEXT], Sampling(max_tokens=5, stop_token_ids=()))
    assert done.version == 4
    np.testing.assert_allclose(done.logprobs, scored(moved(tmp_path / "same"), CONTEXT, done), atol=1e-4)


def test_requests_in_flight_go_on_with_the_new_weights(policy: SGLangPolicy, double: Double, tmp_path: Path) -> None:
    """Each span of a completion is of its own version, over keys and values of that version alone."""
    folder, double.slow = moved(tmp_path / "new"), 20
    contexts = [CONTEXT, CONTEXT + 1, CONTEXT + 2]
    sampling = Sampling(max_tokens=200, stop_token_ids=())
    found: list[Completion] = []
    thread = threading.Thread(target=lambda: found.extend(policy.generate(contexts, sampling, seeds=range(3))))
    thread.start()
    while double.running < 3:
        time.sleep(0)
    policy.load_folder(folder, version=4)
    double.slow = 0
    thread.join()
    since = double.order[double.order.index("/generate") :]
    assert "/generate" not in since[since.index("/pause_generation") : since.index("/continue_generation")]
    for context, done in zip(contexts, found, strict=True):
        assert (len(done.tokens), done.finish_reason, done.version) == (200, "length", 3)
        [(start, version)] = done.updates
        assert version == 4
        old, new = scored(Path(PATH), context, done), scored(folder, context, done)
        np.testing.assert_allclose(done.logprobs[:start], old[:start], atol=1e-3)
        np.testing.assert_allclose(done.logprobs[start:], new[start:], atol=1e-3)
        assert np.abs(old - new).max() > 0.01


def test_a_request_that_was_still_waiting_begins_with_the_new_weights(
    policy: SGLangPolicy, double: Double, tmp_path: Path
) -> None:
    folder, double.full, policy.retry_seconds = moved(tmp_path / "new"), True, 0.0
    found: list[Completion] = []
    thread = threading.Thread(target=lambda: found.extend(policy.generate([CONTEXT], Sampling(max_tokens=3))))
    thread.start()
    while not double.running:
        time.sleep(0)
    policy.load_folder(folder, version=4)
    thread.join()
    assert [(done.version, done.updates) for done in found] == [(4, ())]


def test_an_end_that_was_not_asked_for_is_none(policy: SGLangPolicy, double: Double) -> None:
    """SGLang also ends at the model's own stop tokens."""
    others = [i for i in range(5, 400) if i not in double.policy.stop_ids]
    sampling = Sampling(1.0, max_tokens=300, stop_token_ids=(others[-1],))
    for done in policy.generate([CONTEXT] * 4, sampling, seeds=range(4)):
        assert (done.finish_reason == "stop") == (int(done.tokens[-1]) in sampling.stop_token_ids)  # type: ignore[operator]
        assert done.finish_reason == "stop" or len(done.tokens) == 300
        assert (done.version, done.updates) == (3, ())
    ended = [b for b in double.bodies if "input_ids" in b and len(b["input_ids"]) > len(CONTEXT)]
    assert ended, "no completion met the model's own stop token: the test says nothing"


def test_greedy_tokens_are_certain(policy: SGLangPolicy) -> None:
    [done] = policy.generate([CONTEXT], Sampling(temperature=0.0, max_tokens=4, stop_token_ids=()))
    assert done.logprobs.tolist() == [0.0] * 4


@pytest.mark.parametrize("sampling", [Sampling(top_k=4), Sampling(top_p=0.9), Sampling(min_p=0.1)])
def test_what_has_no_log_probabilities_is_refused(policy: SGLangPolicy, sampling: Sampling) -> None:
    with pytest.raises(SettingError, match="leave out top_k, top_p and min_p"):
        policy.generate([CONTEXT], sampling)


def test_what_passes_is_tried_again_and_a_refusal_is_not(policy: SGLangPolicy, double: Double) -> None:
    double.fail = [503, 500]
    [done] = policy.generate([CONTEXT], Sampling(max_tokens=2, stop_token_ids=()))
    assert len(done.tokens) == 2
    double.fail = [400]
    with pytest.raises(PolicyError, match="it says why"):
        policy.generate([CONTEXT], Sampling(max_tokens=2))


def test_a_server_that_comes_back_is_given_the_weights_again(
    policy: SGLangPolicy, double: Double, tmp_path: Path
) -> None:
    folder = moved(tmp_path / "new")
    policy.load_folder(folder, version=4)
    folder.rename(tmp_path / "elsewhere")
    double.kill()
    double.start()
    [done] = policy.generate([CONTEXT], Sampling(max_tokens=3, stop_token_ids=()))
    assert done.version == 4
    np.testing.assert_allclose(done.logprobs, scored(tmp_path / "elsewhere", CONTEXT, done), atol=1e-4)


def test_a_server_that_stays_away_is_one_sentence(policy: SGLangPolicy, double: Double, tmp_path: Path) -> None:
    policy.retry_seconds = 0.1
    double.kill()
    with pytest.raises(PolicyError, match="No new weights for a server"):
        policy.load_folder(moved(tmp_path / "new"), version=4)
    double.start()


def test_weights_that_are_refused_are_one_sentence(policy: SGLangPolicy, double: Double, tmp_path: Path) -> None:
    double.rejects = True
    with pytest.raises(PolicyError, match="Failed to get weights iterator"):
        policy.load_folder(moved(tmp_path / "new"), version=4)


def test_two_servers_share_the_requests(double: Double, tmp_path: Path) -> None:
    other = Double()
    policy = SGLangPolicy(servers=f"{double.url},{other.url}")
    try:
        policy.load_folder(moved(tmp_path / "new"), version=1)
        done = policy.generate([CONTEXT] * 6, Sampling(max_tokens=3, stop_token_ids=()))
        assert {c.version for c in done} == {1}
        assert double.calls["/generate"] == other.calls["/generate"] == 3
    finally:
        policy.close()
        other.stop()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"dtype": "auto"}, "they compute in auto; start it with .*--dtype"),
        ({"served": "another/model"}, "serves 'another/model', not"),
        ({"label": f"1234abcd.1.{socket.gethostname()}:3"}, "is in use by the run of process 1 on"),
    ],
)
def test_a_server_that_will_not_do_is_one_sentence(double: Double, wrong: dict[str, Any], said: str) -> None:
    for name, value in wrong.items():
        setattr(double, name, value)
    with pytest.raises(ConfigError, match=said):
        make_policy(engine="sglang", servers=[double.url])


def test_a_server_that_is_not_there_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"is not up .*; start it with"):
        SGLangPolicy(servers=["http://127.0.0.1:1"], start_seconds=0.1)


def meta(**fields: Any) -> dict[str, Any]:
    whole = {
        "finish_reason": {"type": "length", "length": 1},
        "output_token_logprobs": [[-0.5, 8, None]],
        "weight_version": "a",
    }
    return {"meta_info": whole | fields}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({}, "cannot be read"),
        (meta(finish_reason=None), "cannot be read"),
        (meta(output_token_logprobs=[["?", 8]]), "cannot be read"),
        (meta(output_token_logprobs=[]), "gave no tokens"),
        (meta(finish_reason={"type": "abort", "message": "full"}, output_token_logprobs=[]), "gave no tokens"),
        (meta(finish_reason={"type": "stop", "matched": 9}), "not the last ones"),
        (meta(weight_version="default"), "other weights"),
    ],
)
def test_an_answer_that_is_not_whole_is_none(answer: Any, said: str) -> None:
    with pytest.raises(RemoteError, match=said):
        read(answer, {"a": 3}, None, updated=False)


def test_what_was_aborted_before_its_first_token_begins_again() -> None:
    waiting = meta(finish_reason={"type": "abort", "message": "Abort in waiting queue"}, output_token_logprobs=[])
    assert read(waiting, {"a": 3}, None, updated=True).finish_reason == "abort"


RUN: dict[str, Any] = {"prompts_per_step": 4, "group_size": 4, "steps": 2, "eval": {"episodes": 4}}


def run_config(double: Double, **more: Any) -> TrainConfig:
    return TrainConfig(**RUN | {"policy": {"engine": "sglang", "servers": (double.url,)}} | more)


def test_a_run_trains_with_it_and_every_update_is_proven(double: Double, tmp_path: Path) -> None:
    rows = Trainer(run_config(double), out=tmp_path / "run", observer=object()).train()
    steps = [row for row in rows if "sync/mode" in row and row["step"] > 0]
    assert [row["sync/mode"] for row in steps] == ["disk", "disk"]
    assert max(row["sync/canary_gap_max"] for row in steps) < 1e-3
    assert max(row["sampler/logprob_gap_max"] for row in steps) < 1e-3
    assert double.calls["/update_weights_from_disk"] >= 4  # at the start twice, and after each step


def test_rollouts_ahead_of_the_learner_train_with_it(double: Double, tmp_path: Path) -> None:
    config = run_config(double, steps=4, stream={"max_staleness": 1})
    rows = Trainer(config, out=tmp_path / "run", observer=object()).train()
    assert max(row.get("stream/staleness_max", 0) for row in rows) <= 1
    assert rows[-1]["stream/ended"] == 16


def test_weights_that_did_not_arrive_stop_the_run(double: Double, tmp_path: Path) -> None:
    double.forgets = True
    with pytest.raises(SyncError, match="sync 'disk' after step 1: engine and learner disagree"):
        Trainer(run_config(double), out=tmp_path / "run", observer=object()).train()


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ({"engine": "sglang"}, "policy.servers: got [] with engine 'sglang', which needs addresses."),
        ({"engine": "vllm", "servers": ("http://a",)}, "but only 'server' and 'sglang' have addresses"),
        ({"engine": "sglang", "servers": ("http://a",), "sync": "file"}, "valid: auto, disk"),
        ({"engine": "sglang", "servers": ("http://a",), "server": {"folders": 1}}, "did you mean 'folder'"),
        ({"engine": "sglang", "servers": ("http://a",), "vllm": {"seed": 1}}, "engine 'sglang' takes none of it"),
    ],
)
def test_a_wrong_setting_is_one_sentence(policy: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        Trainer(TrainConfig(policy=policy), out=tmp_path / "run")  # type: ignore[arg-type]
