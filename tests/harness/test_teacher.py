"""Teachers: what they say of packed and shared rows is what they say of each row alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from small_models import qwen3, row, sample

from llm_gym import embedded
from llm_gym.chat import load_tokenizer
from llm_gym.errors import ConfigError, PolicyError
from llm_gym.harness.batching.packing import pack
from llm_gym.harness.config import DistillConfig
from llm_gym.harness.loops.teacher import (
    UNKNOWN,
    LocalTeacher,
    ServedTeacher,
    apart,
    check_tokenizers,
    sequences,
)
from llm_gym.harness.model.loading import Backbone
from llm_gym.harness.types import MicroBatch, TrainSequence


def rows() -> list[TrainSequence]:
    """Three rows that share a prompt, one on its own, and one with a gap between its trained tokens."""
    prompt = row(9, 5, prompt=9).tokens
    shared = [row(n, n, prompt=9) for n in (14, 12, 10)]
    shared = [dataclasses.replace(r, tokens=np.concatenate([prompt, r.tokens[9:]])) for r in shared]
    gap = row(16, 2)
    kept = (gap.trained < 10) | (gap.trained >= 13)
    gap = dataclasses.replace(gap, trained=gap.trained[kept], streams={"old_logprobs": np.zeros(kept.sum())})
    return [*shared, row(13, 7), gap]


def batch(share: bool) -> MicroBatch:
    (micro,) = pack([sample(r, 1.0, i) for i, r in enumerate(rows())], max_tokens=1000, share=share).micro
    assert bool(micro.parents) == share
    return micro


def teacher(seed: int = 3) -> LocalTeacher:
    made = LocalTeacher.__new__(LocalTeacher)
    made.backbone, made.temperature = Backbone(qwen3(seed)), 1.0
    return made


def plain(r: TrainSequence) -> torch.Tensor:
    """The teacher's log-probabilities [n, V] where each token of a row stands (the first has none)."""
    ids = torch.from_numpy(r.tokens).long()
    with torch.no_grad():
        return teacher().backbone.causal(input_ids=ids[None]).logits[0].log_softmax(-1)[:-1]


def in_order(micro: MicroBatch) -> list[TrainSequence]:
    """The rows in the order in which the batch has them, told by their trained tokens."""
    every = {tuple(r.tokens[r.trained].tolist()): r for r in rows()}
    return [every[tuple(micro.streams["target"][micro.streams["sequence"] == s].tolist())] for s in range(len(every))]


@pytest.mark.parametrize("share", [False, True])
def test_sequences_are_the_rows_again(share: bool) -> None:
    micro = batch(share)
    for (ids, places), r in zip(sequences(micro), in_order(micro), strict=True):
        last = r.trained[-1]
        np.testing.assert_array_equal(ids.numpy(), r.tokens[: last + 1])
        np.testing.assert_array_equal(places.numpy(), r.trained)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("reads_shared", [False, True])
def test_a_local_teacher_says_what_it_says_of_each_row_alone(share: bool, reads_shared: bool) -> None:
    micro, judge = batch(share), teacher()
    assert judge.backbone.packed
    if not reads_shared:
        judge.backbone.packed = False
        judge.backbone.causal.set_attn_implementation("sdpa")
    every = [plain(r)[r.trained - 1] for r in in_order(micro)]
    said = torch.cat(every)
    torch.testing.assert_close(
        judge.logprobs(micro), said.gather(1, micro.streams["target"][:, None])[:, 0], rtol=1e-4, atol=1e-4
    )
    ids, logs = judge.top(micro, 4)
    torch.testing.assert_close(logs, said.topk(4, 1).values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(said.gather(1, ids), logs, rtol=1e-4, atol=1e-4)


def test_apart_shares_nothing_and_keeps_the_targets() -> None:
    shared, alone = batch(True), apart(batch(True))
    assert not alone.parents
    assert sum(alone.lengths) == len(alone.tokens) > len(shared.tokens)
    assert torch.equal(alone.streams["target"], shared.streams["target"])
    for ours, theirs in zip(sequences(alone), sequences(shared), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_ids_that_a_teacher_lacks_are_very_unlikely() -> None:
    micro, judge = batch(False), teacher()
    odd = micro.having(target=micro.streams["target"].clone())
    odd.streams["target"][0] = 10_000
    said = judge.logprobs(odd)
    assert said[0] == UNKNOWN
    torch.testing.assert_close(said[1:], judge.logprobs(micro)[1:])


def test_another_tokenizer_is_named(tmp_path: Path) -> None:
    check_tokenizers(None, str(embedded.PATH))
    tokenizer = json.loads((embedded.PATH / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = list(vocabulary)[-2:]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    for file in embedded.PATH.glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        ConfigError, match=f"another tokenizer than the student: id {min(vocabulary[a], vocabulary[b])} is"
    ):
        check_tokenizers(None, str(tmp_path))


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="'full' needs the teacher's whole distribution"):
        DistillConfig(teacher="http://x", kl="full")
    with pytest.raises(ConfigError, match="top_k: got 0"):
        DistillConfig(top_k=0)
    assert DistillConfig(teacher="https://x:1,https://y:2").served
    assert not DistillConfig(teacher="runs/x").served


class Server:
    """A vLLM server's answers to what a teacher is asked, computed by a model here; it can be told to fail."""

    def __init__(self) -> None:
        self.failures, self.asked, self.tokenizer = 0, 0, load_tokenizer()
        self.model = teacher().backbone.causal
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer({"data": [{"id": "judge"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                assert body["model"] == "judge"
                if self.path == "/tokenize":
                    return self.answer({"tokens": outer.tokenizer.encode(body["prompt"], add_special_tokens=False)})
                outer.asked += 1
                if outer.failures > 0:
                    outer.failures -= 1
                    return self.answer({"error": "busy"}, 503)
                return self.answer({"choices": [{"prompt_logprobs": outer.score(**body)}]})

            def answer(self, value: dict, status: int = 200) -> None:
                text = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    @torch.no_grad()
    def score(self, prompt: list[int], prompt_logprobs: int, **_: object) -> list:
        """As vLLM: the k likeliest and the token that is there, as an object by id; nothing for the first."""
        ids = torch.tensor([[i % 61 for i in prompt]])
        logs = self.model(input_ids=ids).logits[0].log_softmax(-1)
        tables: list = [None]
        for at, token in enumerate(ids[0, 1:].tolist()):
            shown = [token, *logs[at].topk(prompt_logprobs).indices.tolist()]
            tables.append({str(i): {"logprob": float(logs[at, i]), "rank": 1} for i in shown})
        return tables


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.mark.parametrize("share", [False, True])
def test_a_served_teacher_says_what_a_local_one_says(server: Server, share: bool) -> None:
    micro, local = batch(share), teacher()
    judge = ServedTeacher(f"{server.url}, {server.url}/", load_tokenizer(), k=3)
    server.failures = 2
    torch.testing.assert_close(judge.logprobs(micro), local.logprobs(micro), rtol=1e-4, atol=1e-4)
    assert server.asked == 2 + 5 + 2, "two greetings, five rows, two repeated"
    for ours, theirs in zip(judge.top(micro, 3), local.top(micro, 3), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    judge.close()


def test_servers_that_cannot_judge_are_refused(server: Server) -> None:
    server.failures = 1
    with pytest.raises(ConfigError, match="cannot score tokens"):
        ServedTeacher(server.url, load_tokenizer())
    server.tokenizer = load_tokenizer(str(embedded.PATH))
    judge = ServedTeacher(server.url, load_tokenizer())
    server.failures = 10**9
    (micro,) = pack([sample(row(6, 1), 1.0, 0)], max_tokens=100).micro
    with pytest.raises(PolicyError, match="cannot score a row"):
        judge.logprobs(micro)
    judge.close()
    server.tokenizer = type("Other", (), {"encode": lambda self, text, **_: [1, 2]})()
    with pytest.raises(ConfigError, match="another tokenizer: 'Hello"):
        ServedTeacher(server.url, load_tokenizer())
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(ConfigError, match="cannot score tokens"):
        ServedTeacher(server.url, load_tokenizer())
