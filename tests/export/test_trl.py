"""Our environments in TRL's real trainer: what its loss is fed is what was played."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import get_json_schema

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
trl = pytest.importorskip("trl")

from trl.chat_template_utils import qwen3_template  # noqa: E402

from llm_gym import Episode, Reply, StopReason, load_chat, register, rollout  # noqa: E402
from llm_gym.embedded import PATH  # noqa: E402
from llm_gym.envs import make  # noqa: E402
from llm_gym.envs.guess_number import GuessNumber  # noqa: E402
from llm_gym.envs.tools import ToolEnv, ToolFailure  # noqa: E402
from llm_gym.errors import ConfigError, SettingError  # noqa: E402
from llm_gym.export import trl_dataset, trl_environment, trl_final, trl_reward, trl_rollout_func  # noqa: E402
from llm_gym.export.trl_rows import columns  # noqa: E402
from llm_gym.harness.batching.packing import sequences  # noqa: E402
from llm_gym.policies.scripted import ScriptedPolicy  # noqa: E402

GROUP, SEEDS = 4, 4
CALL = '<tool_call>\n{"name": "python", "arguments": {"code": "print(7)"}}\n</tool_call>'


def embedded_tokenizer() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(PATH)
    tokenizer.response_template = qwen3_template  # how TRL reads calls, where it does not know the template
    return tokenizer


class Watched(trl.GRPOTrainer):
    """TRL's trainer, and what its loss was fed."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        fed = {name: value.cpu().numpy().copy() for name, value in inputs.items() if torch.is_tensor(value)}
        self.fed = [*getattr(self, "fed", []), {**fed, "logits": whole_logits(model, inputs)}]
        return super().compute_loss(model, inputs, *args, **kwargs)


def whole_logits(model: Any, inputs: Any) -> list[torch.Tensor]:
    """The log-probabilities that the module of the moment gives each row's tokens, from the second on."""
    found = []
    with torch.no_grad():
        for ids, mask in zip(*(joined(inputs, name) for name in ("ids", "mask")), strict=True):
            tokens = ids[mask.bool()]
            logits = model(tokens[None]).logits[0, :-1]
            found.append(torch.log_softmax(logits, -1).gather(1, tokens[1:, None])[:, 0])
    return found


def joined(inputs: Any, kind: str) -> torch.Tensor:
    return torch.cat([torch.as_tensor(inputs[f"{part}_{kind}"]) for part in ("prompt", "completion")], 1)


@pytest.fixture(scope="module")
def caller() -> dict[str, torch.Tensor]:
    """The embedded model's weights after it has learned to call `python`, and to answer with what that printed."""
    env, bridge, tokenizer = make("PythonTool-v0"), trl_environment("PythonTool-v0")(), embedded_tokenizer()
    model, rows = AutoModelForCausalLM.from_pretrained(PATH, dtype=torch.float32), []
    call, last = (env.unwrapped.chat.encode_reply(text).tolist() for text in (CALL, "7"))
    for seed in range(SEEDS):
        ours, info = env.reset(seed=seed)
        context, *_ = env.step(np.array(call))
        result = context.tolist()[len(ours) + len(call) :]
        theirs = tokenizer.apply_chat_template(
            info["messages"], tools=[bridge.python], add_generation_prompt=True, return_dict=False
        )
        for prompt in (ours.tolist(), theirs):  # the tool is shown in slightly different words
            tokens, places = [*prompt, *call, *result, *last], np.arange(len(call) + len(result) + len(last))
            kept = (places < len(call)) | (places >= len(call) + len(result))
            rows.append((torch.tensor([tokens]), torch.tensor(places[kept] + len(prompt))))
    env.close()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(72):
        tokens, places = rows[step % len(rows)]
        logits = model(tokens).logits[0, places - 1]
        torch.nn.functional.cross_entropy(logits, tokens[0, places]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def trained(folder: Path, weights: dict[str, torch.Tensor] | None = None, **arguments: Any) -> Watched:
    """Two steps of eight rows."""
    config = trl.GRPOConfig(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=8,
        num_generations=GROUP,
        max_completion_length=160,
        learning_rate=1e-4,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    model = AutoModelForCausalLM.from_pretrained(PATH, dtype=torch.float32)
    model.load_state_dict(weights or model.state_dict())
    trainer = Watched(model=model, args=config, processing_class=embedded_tokenizer(), **arguments)
    trainer.train()
    return trainer


def fed_rows(trainer: Watched) -> Iterator[tuple[Any, Any, Any, Any, Any]]:
    """Of every row that the loss was fed: tokens, places of trained ones, their log-probabilities by the sampler and by
    the module at that moment, and the advantage."""
    for fed in trainer.fed:
        for i, whole in enumerate(fed["logits"]):
            prompt = fed["prompt_ids"][i][fed["prompt_mask"][i] == 1]
            shown = fed["completion_mask"][i] == 1
            places = np.flatnonzero(fed["tool_mask"][i][shown])
            own = fed["sampling_per_token_logps"][i][shown][places]
            tokens = np.concatenate([prompt, fed["completion_ids"][i][shown]])
            places = places + len(prompt)
            yield tokens, places, own, whole.numpy()[places - 1], float(fed["advantages"][i])


def fingerprint(tokens: Any, places: Any, logprobs: Any) -> tuple[bytes, ...]:
    kinds = (np.int64, np.int64, np.float32)
    return tuple(np.asarray(x, kind).tobytes() for x, kind in zip((tokens, places, logprobs), kinds, strict=True))


def played(
    folder: Path, env: str | Callable[..., Any], weights: dict[str, torch.Tensor] | None = None, **options: Any
) -> tuple[Watched, list[Episode]]:
    episodes: list[Episode] = []
    rollouts = trl_rollout_func(env, on_episode=episodes.append, **options)
    data = trl_dataset(range(SEEDS))
    return trained(folder, weights, reward_funcs=trl_reward, train_dataset=data, rollout_func=rollouts), episodes


@pytest.mark.parametrize(
    ("env", "args"),
    [pytest.param("GuessNumber-v0", {"max_turns": 3}, marks=pytest.mark.soak), ("PythonTool-v0", {"max_calls": 2})],
)
def test_the_loss_is_fed_what_was_played(
    env: str, args: dict[str, Any], caller: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    weights = caller if env == "PythonTool-v0" else None
    trainer, episodes = played(tmp_path, env, weights, env_args=args, max_tokens=64 if weights else 16)
    assert len(episodes) == 16
    assert [episode.error for episode in episodes if episode.stop_reason.failed] == []
    assert np.mean([len(episode.turns) for episode in episodes]) > 1.5
    if weights:
        assert np.mean([episode.rewards.get("tool_calls", 0) for episode in episodes]) > 0.3
    rows = list(fed_rows(trainer))
    want = [(row.tokens, row.trained, row.streams["old_logprobs"]) for e in episodes for row in sequences(e)]
    assert sorted(fingerprint(*row[:3]) for row in rows) == sorted(fingerprint(*row) for row in want)
    for tokens, _places, own, now, _ in rows:
        np.testing.assert_allclose(own, now, atol=2e-4, err_msg=str(tokens))
    for group in of_groups(episodes):  # each member draws its own stream
        assert sorted(episode.member for episode in group) == list(range(GROUP))
        assert weights or len({episode.trajectories[0].tokens.tobytes() for episode in group}) > 1
    assert [span.version for e in episodes for _, span in e.spans].count(1) > 0  # the second step's weights


def of_groups(episodes: list[Episode]) -> list[list[Episode]]:
    groups: dict[int, list[Episode]] = {}
    for episode in episodes:
        groups.setdefault(episode.seed, []).append(episode)
    return list(groups.values())


class Breaking(GuessNumber):
    """Fails where a reply's length is odd; every fifth of its episodes fails before the first turn."""

    begun = itertools.count(1)

    def open(self) -> Any:
        if next(self.begun) % 5 == 0:
            raise RuntimeError("no start")
        return super().open()

    def reply(self, text: str) -> Reply:
        if len(text) % 2:
            raise RuntimeError("odd")
        return Reply(reward=float(len(text)), done=True)


def test_a_failed_episode_keeps_its_place_and_is_not_trained(tmp_path: Path) -> None:
    trainer, episodes = played(tmp_path, Breaking, max_tokens=16)
    failed = [episode for episode in episodes if episode.stop_reason is StopReason.ENV_ERROR]
    assert 0 < len(failed) < len(episodes) == 16
    assert any(not episode.spans for episode in failed)
    rows = list(fed_rows(trainer))
    assert sum(len(places) == 0 for _, places, *_ in rows) == len(failed)
    for _, places, _, _, advantage in rows:
        assert np.isfinite(advantage)
        assert len(places) or advantage == 0
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())
    rewards = [log["reward"] for log in trainer.state.log_history if log.get("reward") is not None]
    want = [e.reward for e in episodes if not e.stop_reason.failed]
    assert min(want) - 1e-4 <= np.mean(rewards) <= max(want) + 1e-4


class Forgetful(GuessNumber):
    """Rewrites its history after the first guess."""

    def reply(self, text: str) -> Reply:
        self.guesses = getattr(self, "guesses", 0) + 1
        again = [{"role": "user", "content": "Guess my number from 1 to 100. Not that one. Reply with one number."}]
        return Reply(reward=1.0, done=self.guesses % 2 == 0, rewrite=again)


def test_of_a_rewritten_episode_the_last_sequence_is_trained() -> None:
    policy = ScriptedPolicy(["50", "25"], load_chat())
    episodes = rollout(Forgetful, policy, seeds=range(3))
    with pytest.warns(UserWarning, match="TRL trains one sequence of each") as told:
        rows = columns(episodes, 0)
    assert len(told) == 1
    for episode, *row in zip(
        episodes, *(rows[name] for name in ("prompt_ids", "completion_ids", "env_mask")), strict=True
    ):
        prompt, completion, mask = row
        assert len(episode.trajectories) == 2
        assert [*prompt, *completion] == episode.sequence(1).tolist()
        assert np.array(completion)[np.array(mask) == 1].tolist() == episode.turns[1].completion.tokens.tolist()


def test_other_prompts_are_refused() -> None:
    with pytest.raises(SettingError, match=r"want those of trl_dataset"):
        trl_rollout_func("GuessNumber-v0")(["What is 2+2?"], None)


# TRL plays: environment_factory


@pytest.mark.soak
def test_trl_plays_an_environment_with_tools(caller: dict[str, torch.Tensor], tmp_path: Path) -> None:
    kind = trl_environment("PythonTool-v0")
    data = Dataset.from_dict({"prompt": [[{"role": "user", "content": ""}]] * SEEDS, "seed": list(range(SEEDS))})
    trainer = trained(tmp_path, caller, reward_funcs=trl_final, train_dataset=data, environment_factory=kind)
    logs = [log for log in trainer.state.log_history if "reward" in log]
    assert len(logs) == 2
    for log in logs:
        assert log["reward"] == pytest.approx(log["rewards/trl_final/mean"] + log["rewards/PythonTool/mean"])
        assert np.isfinite(log["grad_norm"])
        assert log["tools/call_frequency"] > 0
        assert log["tools/failure_frequency"] == 0
    tokenizer = trainer.processing_class
    texts = [tokenizer.decode(ids) for fed in trainer.fed for ids in fed["completion_ids"]]
    assert sum("print(7)" in text and "<tool_response>\n7" in text for text in texts) > 4


def test_the_return_is_that_of_the_environment_itself() -> None:
    """By hand, call by call, against the environment stepped with the same replies."""
    env, bridge = make("PythonTool-v0"), trl_environment("PythonTool-v0")()
    _, info = env.reset(seed=3)
    assert bridge.reset(seed=3, prompt=[]) == info["messages"][-1]["content"]
    inner, total = env.unwrapped, 0.0
    for arguments in ({"code": "print(6*7)"}, {"cod": "1"}):
        _, reward, *_, info = env.step(inner.chat.encode_reply(inner.call_text("python", **arguments)))
        assert bridge.python(**arguments) == info["messages"][-1]["content"]
        total += reward
    _, reward, *_ = env.step(inner.chat.encode_reply("Answer: 42"))
    with pytest.raises(ConfigError, match="reward_funcs: want trl_final"):
        bridge.get_reward()
    assert trl_final([[{"role": "assistant", "content": "Answer: 42"}]], [bridge]) == [pytest.approx(reward)]
    assert bridge.get_reward() == pytest.approx(total)
    assert bridge.python(code="1") == "Error: the episode is over."
    with pytest.raises(ConfigError, match="column `seed`"):
        bridge.reset(prompt=[])
    env.close()


class Failing(ToolEnv):
    """Its tool is lost."""

    def __init__(self, **kwargs: Any) -> None:
        def look(place: str, deep: bool = False) -> str:
            """Looks.

            Args:
                place: where.
            """
            raise ToolFailure("gone")

        super().__init__([look], **kwargs)

    def open(self) -> Any:
        return [{"role": "system", "content": "Look."}, {"role": "user", "content": "Where?"}]

    def final(self, text: str) -> Reply:
        return Reply(reward=1.0, done=True)


class Nested(Failing):
    """Its tool takes a list."""

    def __init__(self, **kwargs: Any) -> None:
        def look(places: list[str]) -> str:
            """Looks."""
            return ""

        ToolEnv.__init__(self, [look], **kwargs)


@pytest.fixture
def registered() -> Iterator[None]:
    for kind in (Failing, Nested):
        register(f"test_trl/{kind.__name__}-v0", entry_point=kind)
    yield
    for kind in (Failing, Nested):
        del gymnasium.registry[f"test_trl/{kind.__name__}-v0"]


def test_an_episode_whose_tool_is_lost_has_no_reward(registered: None) -> None:
    bridge = trl_environment("test_trl/Failing-v0")()
    assert bridge.reset(seed=1) == "Look.\n\nWhere?"
    assert bridge.look(place="here") == "Error: gone"
    assert trl_final([[{"role": "assistant", "content": "There."}]], [bridge]) == [None]
    assert bridge.get_reward() is None
    bridge.reset(seed=1)
    assert trl_final([[{"role": "assistant", "content": "There."}]], [bridge]) == [1.0]
    bridge.reset(seed=1)
    assert trl_final([[{"role": "assistant", "content": "", "tool_calls": [{}]}]], [bridge]) == [0.0]


def test_trl_is_told_of_tools_as_we_are(registered: None) -> None:
    schema = get_json_schema(trl_environment("test_trl/Failing-v0")().look)["function"]
    assert schema["description"] == "Looks."
    assert schema["parameters"]["required"] == ["place"]
    kinds = {name: (rule["type"], rule["description"]) for name, rule in schema["parameters"]["properties"].items()}
    assert kinds == {"place": ("string", "where."), "deep": ("boolean", "deep")}


def test_what_trl_cannot_call_is_refused_in_a_sentence(registered: None) -> None:
    with pytest.raises(
        ConfigError, match=r"argument 'places' of look\(\) is .*array.* string, integer, number, boolean"
    ):
        trl_environment("test_trl/Nested-v0")
    with pytest.raises(ConfigError, match="GuessNumber-v0 has no tools for TRL"):
        trl_environment("GuessNumber-v0")
