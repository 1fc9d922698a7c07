"""Rollouts over HTTP: nothing twice, nothing lost, nothing unsound; and the same tokens wherever they are played."""

from __future__ import annotations

import asyncio
import copy
import json
import math
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_gym import embedded, load_chat
from llm_gym.core import Group, Sampling, Task
from llm_gym.episode_files import encode
from llm_gym.errors import ConfigError, SettingError
from llm_gym.harness import TrainConfig, load
from llm_gym.harness.loops.trainer import Trainer
from llm_gym.harness.loops.work import OwnEngine, work
from llm_gym.harness.runs.run_folder import RunFolder
from llm_gym.harness.settings import dump
from llm_gym.policies.http import Remote
from llm_gym.policies.scripted import ScriptedPolicy
from llm_gym.rollouts.driver import Driver
from llm_gym.serving.environments import EnvDoor
from llm_gym.serving.leases import Board, NotAccepted
from llm_gym.serving.rollouts import RolloutDoor

HOW = {"group_size": 2, "seed": 0, "sampling": Sampling(max_tokens=24)}

# Leases alone


@given(
    st.lists(
        st.tuples(st.sampled_from(["lease", "post", "lie", "again", "wait", "cancel"]), st.integers(0, 5)), max_size=60
    )
)
def test_every_task_ends_once_whatever_players_do(events: list[tuple[str, int]]) -> None:
    board, now = Board(seconds=10), 0.0
    futures: list[Future[Group]] = [board.offer(Task(0, seed), HOW) for seed in range(4)]
    ended: list[int] = []
    for future, seed in zip(futures, range(4), strict=True):
        future.add_done_callback(lambda _, seed=seed: ended.append(seed))
    held: list[Any] = []
    for what, which in events:
        if what == "lease":
            try:
                lease = board.lease(f"player {which}", version=0, now=now)
            except NotAccepted:
                continue
            if lease is not None:
                assert not futures[lease.offer.task.seed].done(), "no task is given out that has ended"
                held.append(lease)
        elif what == "wait":
            now += 4.0
        elif what == "cancel":
            futures[which % 4].cancel()
        elif held:
            lease = held[which % len(held)]
            wrong = "a lie" if what == "lie" else None
            with suppress(NotAccepted):
                board.post(lease.id, [], check=lambda lease, episodes, wrong=wrong: wrong, now=now)
    while (lease := board.lease("the last one", version=0, now=now + 100)) is not None:
        assert board.post(lease.id, [], check=lambda lease, episodes: None, now=now + 100)
        assert not board.post(lease.id, [], check=lambda lease, episodes: "again", now=now + 100)
    assert sorted(ended) == [0, 1, 2, 3]


# The door


def ask(url: str, body: Any = None, method: str = "POST", token: str = "") -> tuple[int, Any]:
    head = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, head, method=method), timeout=60) as answer:
            return answer.status, json.loads(answer.read() or "null")
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


ENV = "llm_gym/GuessNumber-v0"


@pytest.fixture(scope="module")
def played() -> dict[str, Any]:
    """A sound group of task (0, seed 5), as it is posted."""
    policy = ScriptedPolicy(["50", "25"], load_chat(), version=3)
    with Driver(ENV, policy, env_args={"max_turns": 2}) as driver:
        episodes = driver.run([5], group_size=2)
    return {"episodes": [encode(episode) for episode in episodes]}


@pytest.fixture
def door() -> Iterator[tuple[str, Board, RolloutDoor]]:
    async def complete(context: Any, sampling: Sampling, seed: int | None) -> Any:
        return await ScriptedPolicy(["50"], load_chat()).complete(context, sampling)

    board = Board(seconds=1000)
    options: dict[str, Any] = {"names": [ENV], "vocabulary": load_chat().vocab_size, "complete": complete}
    made = RolloutDoor("127.0.0.1", 0, token="", run={}, board=board, newest=lambda: made.state[0], **options)
    made.state = (4, None)
    yield f"http://127.0.0.1:{made.port}/v1", board, made
    made.close()


def first(episode: dict[str, Any]) -> dict[str, Any]:
    trajectory: dict[str, Any] = episode["trajectories"][0]
    return trajectory


def arrays(trajectory: dict[str, Any], name: str, change: Callable[[Any], Any]) -> None:
    """Changes an array of a record."""
    import base64

    import numpy as np

    holder, kind = (trajectory, "<i4") if name == "tokens" else (trajectory["streams"], "<f4")
    array = np.frombuffer(base64.b64decode(holder[name]), kind).copy()
    holder[name] = base64.b64encode(change(array).astype(kind).tobytes()).decode()


def put(value: float) -> Callable[[Any], Any]:
    def change(array: Any) -> Any:
        array[0] = value
        return array

    return change


LIES: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], str]] = {
    "an episode is missing": (lambda e: e.pop(), "has 1 episodes, want 2"),
    "another seed": (lambda e: e[0].update(seed=6), "want ('llm_gym/GuessNumber-v0', 5"),
    "another environment": (lambda e: e[1].update(env_id="llm_gym/Arithmetic-v0"), "want ('llm_gym/GuessNumber-v0'"),
    "another member": (lambda e: e[1].update(member=0), "want ('llm_gym/GuessNumber-v0', 5, None, 1)"),
    "a reward of NaN": (lambda e: e[0]["rewards"].update(reward=math.nan), "no finite number"),
    "a turn's reward of infinity": (lambda e: first(e[0])["spans"][0].update(reward=math.inf), "no finite number"),
    "a token that is none": (lambda e: arrays(first(e[0]), "tokens", put(1 << 30)), "token ids"),
    "a negative token": (lambda e: arrays(first(e[0]), "tokens", put(-1)), "token ids"),
    "a log-probability of NaN": (lambda e: arrays(first(e[0]), "logprobs", put(math.nan)), "log-probability"),
    "one above 0": (lambda e: arrays(first(e[0]), "logprobs", put(0.5)), "log-probability"),
    "too few of them": (lambda e: arrays(first(e[0]), "logprobs", lambda a: a[1:]), "values of 'logprobs'"),
    "older weights": (lambda e: first(e[0])["spans"][0].update(version=2), "versions 2 to 2, want 3 to 4"),
    "weights that are not there yet": (lambda e: first(e[0])["spans"][0].update(version=9), "versions 9 to 9"),
    "spans that overlap": (lambda e: first(e[0])["spans"][1].update(start=0), "want them in order"),
    "a span beyond the end": (lambda e: first(e[0])["spans"][1].update(stop=10**6), "want them in order"),
    "a turn twice": (lambda e: first(e[0])["spans"][1].update(turn=0), "want each number once"),
    "another temperature": (lambda e: first(e[0])["spans"][0].update(temperature=0.5), "temperature 0.5, want 1.0"),
    "messages that are none": (lambda e: e[0].update(messages=[5]), "among its messages"),
    "a time that is none": (lambda e: e[0].update(seconds="x"), "want a finite number"),
    "a parent that is not there": (lambda e: first(e[0]).update(parent=[1, 3]), "no beginning of an earlier"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_group_that_is_not_sound_is_refused_and_played_again(
    lie: str, door: tuple[str, Board, RolloutDoor], played: dict[str, Any]
) -> None:
    url, board, made = door
    future = board.offer(Task(0, 5), HOW)
    made.state = (3, None)
    _, lease = ask(f"{url}/task?player=liar")
    made.state = (4, None)  # an update came meanwhile
    body = copy.deepcopy(played)
    LIES[lie][0](body["episodes"])
    status, said = ask(f"{url}/group/{lease['lease']}", body)
    assert (status, LIES[lie][1] in said["error"]) == (422, True), said
    assert not future.done()
    assert ask(f"{url}/group/{lease['lease']}", played)[0] == 409, "its lease is over"
    made.state = (3, None)
    _, lease = ask(f"{url}/task?player=honest")
    assert ask(f"{url}/group/{lease['lease']}", played) == (200, {"accepted": True, "new": True})
    assert ask(f"{url}/group/{lease['lease']}", played) == (200, {"accepted": True, "new": False})
    assert [encode(e) for e in future.result(0).episodes] == played["episodes"]
    assert board.refused["liar"] == 1


def test_who_lies_thrice_gets_no_more_tasks(door: tuple[str, Board, RolloutDoor], played: dict[str, Any]) -> None:
    url, board, _ = door
    board.offer(Task(0, 5), HOW)
    for _ in range(3):
        _, lease = ask(f"{url}/task?player=liar")
        assert ask(f"{url}/group/{lease['lease']}", {"episodes": []})[0] == 422
    status, said = ask(f"{url}/task?player=liar")
    assert (status, "3 groups of player 'liar' were refused" in said["error"]) == (403, True)
    assert ask(f"{url}/task?player=another")[0] == 200


def test_what_is_no_group_is_refused(door: tuple[str, Board, RolloutDoor]) -> None:
    url, board, _ = door
    board.offer(Task(0, 5), HOW)
    _, lease = ask(f"{url}/task?player=one")
    for body in ([], {}, {"episodes": 3}, {"episodes": [{}]}, {"episodes": [{"format": 9}]}):
        status, said = ask(f"{url}/group/{lease['lease']}", body)
        assert (status, said["error"].startswith("The body is no group")) == (400, True)
    assert ask(f"{url}/group/nonsense", {"episodes": []})[0] == 409


def test_the_engine_of_the_run_answers(door: tuple[str, Board, RolloutDoor]) -> None:
    url, _, _ = door
    body = {"context": [1, 2, 3], "sampling": asdict(Sampling(max_tokens=8)), "seed": 1}
    status, said = ask(f"{url}/complete", body)
    assert (status, said["tokens"]) == (200, load_chat().encode_reply("50").tolist())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xfe",
        b"[1]",
        b'{"context": [1]}',
        b'{"context": ["a"], "sampling": {"stop_token_ids": null}}',
        b'{"context": [1], "sampling": {"stop_token_ids": null, "heat": 1}}',
    ],
)
def test_what_asks_for_no_completion_is_refused(door: tuple[str, Board, RolloutDoor], body: bytes) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{door[0]}/complete", body, timeout=60)
    assert refused.value.code == 400
    assert json.loads(refused.value.read())["error"].startswith("The body asks for no completion: ")


def test_weights_of_a_trainer_that_died_are_replaced_by_older_ones(door: tuple[str, Board, RolloutDoor]) -> None:
    """A run that goes on from its checkpoint counts versions from there: those of before are its future."""
    url, board, made = door
    made.state = (4, embedded.PATH / "model.safetensors")

    async def main() -> list[int]:
        remote = Remote(url.removesuffix("/v1"))
        engine, found = OwnEngine(remote, None, "transformers", {}), []
        for version, wanted, life in ((4, 4, "one"), (5, 4, "one"), (2, 2, "two")):
            made.state = (version, made.state[1])
            await engine.reach(wanted, life)
            found.append(engine.policy.version)
        engine.close()
        await remote.close()
        return found

    assert asyncio.run(main()) == [4, 4, 2]
    options: dict[str, Any] = {"names": [ENV], "vocabulary": 10, "complete": asyncio.sleep}
    again = RolloutDoor("127.0.0.1", 0, token="", run={}, board=board, newest=lambda: 0, **options)
    lives = []
    for where in (url, url, f"http://127.0.0.1:{again.port}/v1"):
        board.offer(Task(0, 5), HOW)
        lives.append(ask(f"{where}/task?player=one")[1]["life"])
    again.close()
    assert lives[0] == lives[1] != lives[2]


def test_a_page_in_a_browser_gets_no_task(door: tuple[str, Board, RolloutDoor]) -> None:
    url, board, _ = door
    board.offer(Task(0, 5), HOW)
    request = urllib.request.Request(f"{url}/task?player=page", b"", {"Origin": "http://x"}, method="POST")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request)
    assert board.status(0.0)["waiting"] == 1


# A run and its players

SETS = ["steps=3", "prompts_per_step=3", "group_size=2", "eval.episodes=0", "sampling.max_tokens=12", "threads=1"]


def episodes_of(run: Path) -> list[dict[str, Any]]:
    """What was played, without times."""
    folder = RunFolder(run)
    found = [encode(e) for step in (1, 2, 3) for e in folder.read_episodes(f"step_{step:06d}")]
    return [{**record, "seconds": 0.0} for record in found]


def trained(out: Path, *sets: str, players: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
    trainer = Trainer(load(TrainConfig, sets=[*SETS, *sets]), out=out)
    threads = []
    if players is not None:
        url = f"http://127.0.0.1:{trainer.playing.drivers.port}"
        threads = [threading.Thread(target=players, args=(url,))]
    for thread in threads:
        thread.start()
    try:
        trainer.train()
    finally:
        for thread in threads:
            thread.join(120)
    return episodes_of(out)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The run that plays itself."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield trained(tmp_path_factory.mktemp("alone") / "run")
    torch.set_num_threads(threads)


def tokens(episodes: list[dict[str, Any]]) -> list[Any]:
    return [(e["seed"], e["member"], [t["tokens"] for t in e["trajectories"]], e["reward"]) for e in episodes]


@pytest.mark.parametrize("engine", [None, "transformers"], ids=["the run's engine", "its own engine"])
def test_a_player_elsewhere_plays_the_same_episodes(engine: str | None, alone: Any, tmp_path: Path) -> None:
    counted: list[int] = []
    own = ["stream.serve_weights=true"] if engine else []
    found = trained(
        tmp_path / "run", "stream.serve=:0", *own, players=lambda url: counted.append(work(url, engine=engine))
    )
    assert tokens(found) == tokens(alone)
    assert counted == [9]
    assert not (tmp_path / "run" / "served").exists()


def test_a_player_that_vanishes_costs_its_lease(alone: Any, tmp_path: Path) -> None:
    def players(url: str) -> None:
        assert ask(f"{url}/v1/task?player=vanishes")[0] == 200
        work(url)

    sets = ["stream.serve=:0", "stream.lease_seconds=0.5", "stream.max_staleness=1"]
    found = trained(tmp_path / "run", *sets, players=players)
    assert sorted((e["seed"], e["member"]) for e in found) == sorted((e["seed"], e["member"]) for e in alone)


def test_two_players_share_the_work(alone: Any, tmp_path: Path) -> None:
    counted: list[int] = []

    def players(url: str) -> None:
        both = [threading.Thread(target=lambda: counted.append(work(url, groups=1))) for _ in range(2)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()

    found = trained(tmp_path / "run", "stream.serve=:0", players=players)
    assert tokens(found) == tokens(alone)
    assert sum(counted) == 9


# What cannot work


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["stream.serve=8900"], "want host:port or :port"),
        (["stream.serve=:89000"], "want host:port or :port"),
        (["stream.serve_weights=true"], "without stream.serve"),
    ],
)
def test_a_bad_address_is_a_sentence(sets: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(TrainConfig, sets=sets)


def test_beyond_this_machine_a_token_is_a_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLM_GYM_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="set LLM_GYM_TOKEN"):
        Trainer(load(TrainConfig, sets=["stream.serve=0.0.0.0:0"]), out=tmp_path / "run")


def test_a_player_without_the_token_is_told(door: tuple[str, Board, RolloutDoor], monkeypatch: Any) -> None:
    _, board, _ = door
    options: dict[str, Any] = {"names": [ENV], "vocabulary": 10, "complete": asyncio.sleep}
    guarded = RolloutDoor("127.0.0.1", 0, token="secret", run={}, board=board, newest=lambda: 0, **options)
    try:
        monkeypatch.setenv("LLM_GYM_TOKEN", "guess")
        with pytest.raises(SettingError, match="The token is missing or wrong"):
            work(f"http://127.0.0.1:{guarded.port}")
        for token, status in (("secret", 200), ("secrets", 401), ("\xff", 401)):
            assert ask(f"http://127.0.0.1:{guarded.port}/v1/status", method="GET", token=token)[0] == status
    finally:
        guarded.close()


def test_a_player_may_have_any_name() -> None:
    board, name = Board(seconds=1000), "box #1 & co, 50%"
    board.refused[name] = 3
    options: dict[str, Any] = {"names": [ENV], "vocabulary": 10, "complete": asyncio.sleep}
    run = {"config": dump(TrainConfig(env=ENV))}
    made = RolloutDoor("127.0.0.1", 0, token="", run=run, board=board, newest=lambda: 0, **options)
    try:
        with pytest.raises(SettingError, match=f"of player '{name}' were refused"):
            work(f"http://127.0.0.1:{made.port}", name=name, groups=1)
    finally:
        made.close()


def test_where_no_run_is_a_player_is_told() -> None:
    with pytest.raises(SettingError, match=r"http://127\.0\.0\.1:9: "):
        work("http://127.0.0.1:9")
    with pytest.raises(SettingError, match="want the address of a run"):
        work("trainer:8900")
    with EnvDoor(ENV, port=0) as other, pytest.raises(SettingError, match="no run hands out tasks at 'http"):
        work(other.url)
