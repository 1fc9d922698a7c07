"""A real vLLM engine against the learner: the log-probabilities of every sampled token agree, whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from engine_checks import (
    COMBINATIONS,
    TOLERANCE,
    contexts,
    nudged,
    perturbed,
    sampling,
    until_tokens,
    worst,
    worst_by_version,
)

from llm_gym.core import Completion, Sampling, StopReason
from llm_gym.errors import ConfigError, PolicyError, SettingError
from llm_gym.harness.model.loading import load_model
from llm_gym.models.checksums import checksums
from llm_gym.rollouts.driver import rollout

pytestmark = pytest.mark.heavy
pytest.importorskip("vllm", reason="vLLM is not installed")
CONTEXT = 512


@pytest.fixture(scope="module")
def policy() -> Iterator[Any]:
    from llm_gym.policies.vllm.policy import VLLMPolicy

    engine = VLLMPolicy(max_context=CONTEXT, dtype="float32", max_num_seqs=64)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(None)


@pytest.fixture(scope="module")
def other() -> Any:
    return perturbed(1)


@pytest.fixture
def restored(policy: Any, model: Any) -> Iterator[None]:
    """The engine has the model's weights again afterwards, as version 0."""
    yield
    policy.load(model.state_dict().items(), version=0)


@pytest.mark.parametrize(("temperature", "filters"), [*COMBINATIONS, (0.8, "top-k"), (1.1, "top-p"), (1.0, "min-p")])
def test_4096_tokens_agree(policy: Any, model: Any, temperature: float, filters: str) -> None:
    prompts, how = contexts(64), sampling(temperature, filters)
    completions = policy.generate(prompts, how, seeds=range(64))
    assert sum(len(c.tokens) for c in completions) == 4096
    assert worst(model, prompts, completions, how) <= TOLERANCE


def test_after_a_full_update_4096_tokens_agree_with_the_new_weights_only(
    policy: Any, model: Any, other: Any, restored: None
) -> None:
    prompts = contexts(64)
    policy.load(other.state_dict().items(), version=7)
    for temperature, filters in COMBINATIONS:
        how = sampling(temperature, filters)
        completions = policy.generate(prompts, how, seeds=range(64))
        assert sum(len(c.tokens) for c in completions) == 4096
        assert {v for c in completions for v in c.versions} == {7}
        assert worst(other, prompts, completions, how) <= TOLERANCE
    assert worst(model, prompts, completions, how) > 0.1


def test_updates_in_flight_are_dated_to_the_token(policy: Any, model: Any, other: Any, restored: None) -> None:
    models = {0: model, 1: other, 2: perturbed(2)}
    prompts = contexts(96)  # more than the engine runs at once: some are still waiting at the first update
    hows = [sampling(*COMBINATIONS[i % len(COMBINATIONS)], max_tokens=24 + i % 40) for i in range(96)]

    async def main() -> list[Completion]:
        jobs = [policy.complete(c, how, seed=i) for i, (c, how) in enumerate(zip(prompts, hows, strict=True))]
        running = [asyncio.ensure_future(job) for job in jobs]
        for version in (1, 2):
            await until_tokens(policy, 10)
            await asyncio.to_thread(policy.load, models[version].state_dict().items(), version=version)
        return await asyncio.gather(*running)

    completions = asyncio.run(main())
    assert sum(len(c.tokens) for c in completions) == sum(how.max_tokens for how in hows)
    crossed = [c for c in completions if c.updates]
    assert len(crossed) >= 32
    assert any(not c.updates and c.version > 0 for c in completions)  # those that waited are wholly new
    assert all(0 < start < len(c.tokens) for c in crossed for start, _ in c.updates)
    assert worst_by_version(models, prompts, completions, hows) <= TOLERANCE
    assert worst_by_version(models, prompts, completions, hows, shift=1) > 0.1  # one token off would be seen


def test_the_proof_sees_one_bit_of_any_tensor_in_the_engine_only(policy: Any, model: Any, restored: None) -> None:
    tensors = dict(model.state_dict())
    expected = checksums(tensors.items(), policy.dtype)
    assert policy.differing(expected) == []
    for name, changed in nudged(tensors):
        policy.load(changed.items(), version=1)
        tied = {"model.embed_tokens.weight", "lm_head.weight"}
        assert set(policy.differing(expected)) == (tied if name in tied else {name})
    policy.load(tensors.items(), version=2)
    assert policy.differing(expected) == []


KINDS = (
    "embed_tokens",
    "model.norm",
    "q_norm",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_",
)


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_see_a_changed_tensor(policy: Any, model: Any, restored: None, kind: str) -> None:
    tensors = dict(model.state_dict())
    name = next(n for n in tensors if kind in n)
    noise = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(0))
    changed = tensors[name] + 0.1 * tensors[name].std() * noise + 0.01 * noise
    policy.load(
        {n: changed if t.data_ptr() == tensors[name].data_ptr() else t for n, t in tensors.items()}.items(), version=1
    )
    prompts, how = contexts(8), sampling(1.0, "off", max_tokens=32)
    assert worst(model, prompts, policy.generate(prompts, how, seeds=range(8)), how) > 10 * TOLERANCE


def test_the_proof_reads_what_the_engine_computes_with(policy: Any, model: Any, other: Any, restored: None) -> None:
    """Not what was received: a tied head that vLLM leaves stale, a weight overwritten behind everyone's back."""
    expected = checksums(other.named_parameters(), policy.dtype)

    def reload_as_vllm_does(worker: Any) -> None:
        worker.reload_weights(weights_iterator=iter(other.named_parameters()))  # one name for the tied weight

    policy.thread.call(lambda engine: engine.collective_rpc(reload_as_vllm_does)).result()
    policy.thread.call(lambda engine: engine.reset_prefix_cache()).result()
    prompts, how = contexts(8), sampling(1.0, "off", 16)
    stale = worst(other, prompts, policy.generate(prompts, how, seeds=range(8)), how) > TOLERANCE  # vLLM 0.32, CPU
    assert policy.differing(expected) == (["model.embed_tokens.weight"] if stale else [])
    policy.load(other.named_parameters(), version=1)
    assert policy.differing(expected) == []

    def overwrite(worker: Any) -> None:
        worker.model_runner.get_model().model.norm.weight.data[0] += 1

    policy.thread.call(lambda engine: engine.collective_rpc(overwrite)).result()
    assert policy.differing(expected) == ["model.norm.weight"]


def test_a_folder_is_loaded_in_flight(policy: Any, model: Any, other: Any, restored: None, tmp_path: Any) -> None:
    other.save_pretrained(tmp_path)
    prompt, how = contexts(1)[0], sampling(1.0, "off", max_tokens=100)

    async def main() -> Completion:
        running = asyncio.ensure_future(policy.complete(prompt, how, seed=0))
        await until_tokens(policy, 5)
        await asyncio.to_thread(policy.load_folder, tmp_path, version=4)
        return await running

    completion = asyncio.run(main())
    assert [version for _, version in completion.updates] == [4]
    assert worst_by_version({0: model, 4: other}, [prompt], [completion], [how]) <= TOLERANCE
    assert policy.differing(checksums(other.state_dict().items(), policy.dtype)) == []


def test_the_proof_sees_tensors_left_out_of_an_update(policy: Any, other: Any, restored: None) -> None:
    tensors = dict(other.state_dict())
    missing = {"model.norm.weight", "model.layers.0.self_attn.k_proj.weight"}
    policy.load(((name, tensor) for name, tensor in tensors.items() if name not in missing), version=9)
    assert set(policy.differing(checksums(tensors.items(), policy.dtype))) == missing


def test_cancelled_requests_leave_the_engine(policy: Any) -> None:
    async def main() -> None:
        how = sampling(1.0, "off", max_tokens=400)
        running = [asyncio.ensure_future(policy.complete(c, how)) for c in contexts(8)]
        await until_tokens(policy, 3)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        assert all(task.cancelled() for task in running)
        assert not await asyncio.wrap_future(policy.thread.call(lambda e: e.has_unfinished_requests()))
        assert not policy.thread.requests

    asyncio.run(main())


def test_a_next_turn_finds_its_prefix_cached(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cached: list[int] = []
    finish = policy.thread.finish

    def watch(output: Any, request: Any) -> Completion:
        cached.append(output.num_cached_tokens)
        return finish(output, request)

    monkeypatch.setattr(policy.thread, "finish", watch)
    prompt, how = np.arange(10, 110, dtype=np.int32), sampling(1.0, "off", max_tokens=60)
    first = policy.generate([prompt], how, seeds=[0])[0]
    policy.generate([np.concatenate([prompt, first.tokens, np.arange(40, 60, dtype=np.int32)])], how, seeds=[1])
    assert cached[0] == 0
    assert cached[1] >= 128  # of the 160 tokens of the first turn, in blocks of 32


def test_seeds_decide_and_stop_tokens_stay(policy: Any) -> None:
    prompts, how = contexts(8), Sampling(max_tokens=24, stop_token_ids=tuple(range(0, 500, 3)))
    one, two = (policy.generate(prompts, how, seeds=[5] * 8) for _ in range(2))
    assert [c.tokens.tolist() for c in one] == [c.tokens.tolist() for c in two]
    for completion in one:
        ends = [int(t) % 3 == 0 and t < 500 for t in completion.tokens]
        assert not any(ends[:-1])
        assert completion.finish_reason == ("stop" if ends[-1] else "length")


def test_episodes_run_on_it(policy: Any, model: Any) -> None:
    how = Sampling(max_tokens=40)
    episodes = rollout("Arithmetic-v0", policy, seeds=range(4), group_size=4, sampling=how)
    assert [e.seed for e in episodes] == [s for s in range(4) for _ in range(4)]
    assert all(e.stop_reason in (StopReason.ANSWERED, StopReason.TOKEN_LIMIT) for e in episodes)
    prompts, completions = zip(*((e.turns[0].prompt, e.turns[0].completion) for e in episodes), strict=True)
    assert worst(model, list(prompts), list(completions), how) <= TOLERANCE


def test_an_overlong_context_is_data_and_the_last_tokens_are_cut(policy: Any) -> None:
    with pytest.raises(PolicyError, match="512"):
        asyncio.run(policy.complete(np.full(CONTEXT, 20, np.int32), Sampling()))
    how = Sampling(max_tokens=100, stop_token_ids=())
    cut = policy.generate([np.full(CONTEXT - 7, 20, np.int32)], how)[0]
    assert len(cut.tokens) == 7
    assert cut.finish_reason == "length"


def test_a_context_out_of_the_vocabulary_fails_alone(policy: Any) -> None:
    async def main() -> list[Any]:
        jobs = [policy.complete(c, sampling(1.0, "off", 8)) for c in (contexts(1)[0], np.full(5, 10**6, np.int32))]
        return await asyncio.gather(*jobs, return_exceptions=True)

    good, bad = asyncio.run(main())
    assert len(good.tokens) == 8
    assert isinstance(bad, PolicyError)


def test_adapters_and_sleep_need_an_engine_made_for_them(policy: Any) -> None:
    with pytest.raises(SettingError, match="lora_rank"):
        policy.load_adapter([], {}, version=1)
    with pytest.raises(SettingError, match="enable_sleep_mode"):
        policy.sleep()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gpu_memory_utilisation": 0.5}, "gpu_memory_utilization"),
        ({"max_context": 100}, "max_model_len"),
        ({"logprobs_mode": "raw_logprobs"}, "logprobs_mode"),
        ({"enable_lora": True}, "lora_rank"),
        ({"worker_extension_cls": "x.Y"}, "worker_extension_cls"),
    ],
)
def test_bad_engine_arguments_are_refused_early_by_name(arguments: dict[str, Any], message: str) -> None:
    from llm_gym.policies.vllm.policy import check

    with pytest.raises(ConfigError, match=message):
        check(arguments)
    check({"tensor_parallel_size": 2, "quantization": "fp8", "speculative_config": {}, "gpu_memory_utilization": 0.5})


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA has sleep mode")
def test_sleep_mode_without_cuda_is_refused() -> None:
    from llm_gym.policies.vllm.policy import check

    with pytest.raises(SettingError, match="enable_sleep_mode"):
        check({"enable_sleep_mode": True})


def test_a_restart_serves_another_folder_and_ends_what_was_under_way(policy: Any, other: Any, tmp_path: Any) -> None:
    from llm_gym.embedded import PATH
    from llm_gym.tokenizer import load_tokenizer

    other.save_pretrained(tmp_path)
    load_tokenizer(PATH).save_pretrained(tmp_path)

    async def main() -> Any:
        running = asyncio.ensure_future(policy.complete(contexts(1)[0], sampling(1.0, "off", 400)))
        await until_tokens(policy, 3)
        await asyncio.to_thread(policy.restart, tmp_path, version=11)
        return (await asyncio.gather(running, return_exceptions=True))[0]

    assert isinstance(asyncio.run(main()), PolicyError)
    prompts, how = contexts(16), sampling(1.0, "off", 32)
    completions = policy.generate(prompts, how, seeds=range(16))
    assert {c.version for c in completions} == {11}
    assert worst(other, prompts, completions, how) <= TOLERANCE
    assert policy.differing(checksums(other.state_dict().items(), policy.dtype)) == []


def test_an_engine_that_has_ended_refuses_and_never_hangs(policy: Any, model: Any) -> None:
    policy.close()
    with pytest.raises(PolicyError, match="ended"):
        asyncio.run(asyncio.wait_for(policy.complete(contexts(1)[0], Sampling()), timeout=60))
    with pytest.raises(PolicyError, match="ended"):
        policy.load(model.state_dict().items(), version=1)
    with pytest.raises(PolicyError, match="ended"):
        policy.differing({"model.norm.weight": 0})
    policy.close()
