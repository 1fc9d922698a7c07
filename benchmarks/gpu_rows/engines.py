"""vLLM in this process: exactness, updates under way, every way to new weights, sleep, and its speed."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import numpy as np
import sync as sync_benchmark
import torch

from gpu_rows.models import folder_of, make, seconds
from gpu_rows.rows import Found, Setting
from llm_gym.core import Completion, Sampling
from llm_gym.harness.config import TrainConfig
from llm_gym.harness.learner import memory_probe
from llm_gym.harness.learner.learner import Learner
from llm_gym.harness.learner.optimizers import OptimizerConfig
from llm_gym.harness.loops.trainer import Trainer
from llm_gym.harness.model.loading import load_model
from llm_gym.harness.settings import load
from llm_gym.harness.weight_sync import parity
from llm_gym.models.checksums import checksums
from llm_gym.policies.vllm.policy import VLLMPolicy, check
from llm_gym.rollouts.driver import Driver

sys.path.append(str(Path(__file__).parents[2] / "tests" / "heavy"))
check({})  # imports half of vLLM, with its environment as the policy wants it
import vllm.v1.engine.llm_engine  # noqa: E402, F401  # the other half; it starts no thread

CONTEXT = 512


GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 8, 64, 128, 256, 512]}
"""Nothing compiled, which would take most of a row's time; whole decoding steps as CUDA graphs."""


def arguments(setting: Setting, *, graphs: bool = False) -> dict[str, Any]:
    """Of an engine that leaves room for others; without graphs it starts in seconds."""
    if setting.small:
        return {"kv_cache_memory_bytes": 128 << 20}
    how = {"compilation_config": GRAPHS, "max_num_seqs": 512} if graphs else {"enforce_eager": True}
    return {"gpu_memory_utilization": 0.2, **how}


def exact(setting: Setting, found: Found) -> None:
    """Engine against learner in both types, a second turn from the prefix cache included."""
    folder = folder_of(make("0.6B", setting), setting, torch.bfloat16)
    held = load_model(folder, device=setting.device)  # numbers that both types hold
    for dtype in ("bfloat16", "float32"):
        policy = VLLMPolicy(folder, max_context=CONTEXT, dtype=dtype, **arguments(setting))
        mine = Learner(held, OptimizerConfig(lr=1e-6, dtype=dtype))
        gaps = parity.measure(mine, policy, dtype=dtype, tokens=256 if setting.small else 1024)
        mean, worst = gaps.limits
        found.add(f"{dtype}: mean gap", gaps.mean, most=mean)
        found.add(f"{dtype}: largest gap", gaps.worst, most=worst)
        wrong = policy.differing(checksums(held.state_dict().items(), policy.dtype))
        found.add(f"{dtype}: tensors whose checksum differs", len(wrong), most=0)
        policy.close()


def updates(setting: Setting, found: Found) -> None:
    """New weights while requests are under way: every token is dated, and is of the weights that it is dated to."""
    from engine_checks import contexts, perturbed, sampling, until_tokens, worst_by_version

    models = {version: perturbed(version) for version in range(3)}
    policy = VLLMPolicy(max_context=CONTEXT, dtype="float32", max_num_seqs=64, **arguments(setting))
    policy.load(models[0].state_dict().items(), version=0)
    count = 16 if setting.small else 96
    prompts = contexts(count)
    hows = [sampling(1.0, "off", max_tokens=24 + i % 40) for i in range(count)]
    taken: list[float] = []

    def bring(version: int) -> None:
        tensors = models[version].to(setting.device).state_dict().items()
        taken.append(seconds(setting.device, lambda: policy.load(tensors, version=version)))

    async def main() -> list[Completion]:
        jobs = [policy.complete(c, how, seed=i) for i, (c, how) in enumerate(zip(prompts, hows, strict=True))]
        running = [asyncio.ensure_future(job) for job in jobs]
        for version in (1, 2):
            await until_tokens(policy, 10)
            await asyncio.to_thread(bring, version)
        return await asyncio.gather(*running)

    done = asyncio.run(main())
    policy.close()
    plain = {version: model.cpu() for version, model in models.items()}
    found.add("completions that an update cut", sum(bool(c.updates) for c in done), least=count / 4)
    found.add("an update, ms", 1000 * min(taken))
    found.add("largest gap to the dated weights", worst_by_version(plain, prompts, done, hows), most=1e-4)
    found.add("the same, dated a token late", worst_by_version(plain, prompts, done, hows, shift=1), least=0.1)


def every_sync(setting: Setting, found: Found) -> None:
    """Each mode of docs/sync.md, proven after every update (benchmarks/sync.py); `adapter` is the LoRA hot swap."""
    model = None
    dtype = "float32" if setting.small else "bfloat16"
    if not setting.small:
        model = str(folder_of(make("0.6B", setting), setting, torch.bfloat16))
    for engine, mode, rank in sync_benchmark.IN_PROCESS[1:]:
        how = arguments(setting)
        times = sync_benchmark.measure(model, engine, mode, rank, 1, device=setting.device, dtype=dtype, **how)
        for name, taken in times.items():
            found.add(f"{mode}: {name} s", taken)


def sleep(setting: Setting, found: Found) -> None:
    """The engine gives its memory back, takes it again, is given weights, and is exact; and a run that does so."""
    model = make("0.6B", setting)
    folder, where = folder_of(model, setting, torch.bfloat16), torch.device(setting.device)
    policy = VLLMPolicy(folder, max_context=CONTEXT, dtype="bfloat16", enable_sleep_mode=True, **arguments(setting))
    before = memory_probe.free(where)
    found.add("falls asleep: s", seconds(setting.device, lambda: policy.sleep(2)))
    found.add("given back: GB", (memory_probe.free(where) - before) / 1e9, least=5)

    def wake() -> None:
        policy.wake(["weights"])
        policy.load(model.state_dict().items(), version=1)
        policy.wake(["kv_cache"])

    found.add("wakes with new weights: s", seconds(setting.device, wake))
    gaps = parity.measure(Learner(model, OptimizerConfig(dtype="bfloat16")), policy, dtype="bfloat16", tokens=256)
    found.add("mean gap afterwards", gaps.mean, most=gaps.limits[0])
    policy.close()
    sets = ["policy.engine=vllm", "policy.sleep=true", "steps=2", "eval.episodes=0", "optimizer.dtype=bfloat16"]
    config = load(TrainConfig, sets=[*sets, *(f"policy.vllm.{k}={v}" for k, v in arguments(setting).items())])
    rows = Trainer(config, out=setting.folder / "run", observer=object()).train()
    found.add("steps of a run that sleeps", rows[-1]["step"], least=2)


def rollout(setting: Setting, found: Found) -> None:
    """Episodes through driver and environment against the bare engine on the same prompts."""
    from engine import Talk

    folder = folder_of(make("0.6B", setting), setting, torch.bfloat16)
    limits = {"max_tokens": 16 if setting.small else 256, "max_turns": 1, "tokenizer": str(folder)}
    count = 16 if setting.small else 512
    kind = "float32" if setting.small else "bfloat16"
    policy = VLLMPolicy(folder, max_context=1024, dtype=kind, **arguments(setting, graphs=True))
    sampling = Sampling(max_tokens=limits["max_tokens"], stop_token_ids=())
    driver = Driver(Talk, policy, sampling=sampling, env_args=limits)
    prompts = [Talk(**limits).reset(seed=seed)[0] for seed in range(count)]
    speeds: dict[str, list[float]] = {"bare engine": [], "engine behind the policy": [], "episodes": []}
    for _ in range(2):  # the first time, kernels are compiled; the second time, all prompts are cached
        tokens: list[int] = []
        works = {
            "bare engine": lambda t=tokens: t.append(policy.thread.call(lambda e: bare(e, prompts, sampling)).result()),
            "engine behind the policy": lambda t=tokens: t.append(_length(policy.generate(prompts, sampling))),
            "episodes": lambda t=tokens: t.append(sum(e.tokens_generated for e in driver.run(range(count)))),
        }
        for name, work in works.items():
            taken = seconds(setting.device, work)
            speeds[name].append(tokens[-1] / taken)
    for name, each in speeds.items():
        found.add(f"{name}: tok/s", each[-1])
    found.add("episodes over bare engine", speeds["episodes"][-1] / speeds["bare engine"][-1])
    policy.close()


def _length(completions: list[Completion]) -> int:
    return sum(len(c.tokens) for c in completions)


def bare(engine: Any, prompts: list[Any], sampling: Sampling) -> int:
    """Tokens that the engine samples when nothing of ours stands between: no log-probabilities, no futures."""
    from vllm.inputs.engine import tokens_input
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    how = SamplingParams(
        max_tokens=sampling.max_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    for number, prompt in enumerate(prompts):
        engine.add_request(f"bare-{number}", tokens_input(np.asarray(prompt).tolist()), how)
    tokens = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens += len(output.outputs[0].token_ids) if output.finished else 0
    return tokens
