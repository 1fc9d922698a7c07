"""Which environments of other suites pass the conformance suite; writes docs/adapters/SUITE.md.

    python benchmarks/adapters.py                              # all suites: half an hour on two idle cores
    python benchmarks/adapters.py textarena --only Nim-v0      # one environment; nothing is written

Each environment is checked in a process of its own, under a time limit: the checks of `check_environment`, among them
that two which are played in turn are as each alone; then four episodes again in an interpreter whose strings hash
otherwise. Of reasoning-gym also: what each set's own answer scores, what a wrong one may, and how many problems of
`test` stand in `train` by chance.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import click

import llm_gym
from llm_gym.envs import make
from llm_gym.testing import check_environment
from llm_gym.testing.episodes import play

DOCS = Path(__file__).parents[1] / "docs" / "adapters"
LIMIT = 200
"""Seconds for one environment."""
TURNS = 12
"""Most actions in an episode of Gymnasium's."""
OVERLAP = (100, 2000, 15.0)
"""Problems of `test` that are looked for among so many of `train`, in so many seconds at most."""
Arguments = dict[str, Any]


class Suite(NamedTuple):
    """One suite: its environment, the argument that names an environment of it, and the package."""

    env: str
    argument: str
    module: str
    package: str


SUITES = {
    "reasoning_gym": Suite("ReasoningGym-v0", "name", "reasoning_gym", "reasoning-gym"),
    "textarena": Suite("TextArena-v0", "game", "textarena", "textarena"),
    "gymnasium": Suite("Gymnasium-v0", "name", "minigrid", "minigrid"),
}


def names(suite: str) -> list[str]:
    """What the suite has: data sets; the first id of each entry point; ids that Gymnasium does not call old."""
    module = importlib.import_module(SUITES[suite].module)
    if suite == "reasoning_gym":
        return sorted(module.factory.DATASETS.keys() - {"composite"})
    if suite == "textarena":
        registry = module.envs.registration.ENV_REGISTRY
        first: dict[str, str] = {}
        for name, spec in registry.items():
            first.setdefault(str(spec.entry_point), name.removesuffix("-raw"))
        return sorted(first.values())
    import gymnasium

    latest: dict[str, str] = {}
    for name in sorted(gymnasium.registry, key=lambda name: gymnasium.registry[name].version or 0):
        if "/" not in name and not name.startswith("Gym"):
            latest[name.rpartition("-v")[0]] = name
    return sorted(latest.values())


def attempts(suite: str, name: str) -> Iterator[Arguments]:
    """Arguments to try: the plain ones, then those that some need."""
    named: Arguments = {SUITES[suite].argument: name}
    if suite == "gymnasium":
        yield {**named, "max_turns": TURNS}
        return
    yield named
    if suite == "textarena":
        yield {**named, "opponent": "random"}
        yield {**named, "opponent": "random", "max_context": 32768}
    yield {**named, "max_context": 32768}


def checked(suite: str, name: str) -> dict[str, Any]:
    """Whether it passes, with which arguments, or else the reason."""
    reasons = []
    for arguments in attempts(suite, name):
        try:
            check_environment(SUITES[suite].env, **arguments)
        except AssertionError as error:
            reasons.append(" ".join(str(error).split()))
            continue
        more = facts(arguments) if suite == "reasoning_gym" else {}
        return {"arguments": arguments, "digest": digest(suite, arguments), **more}
    reason = next(reason for reason in reasons if "for several players" not in reason)
    return {"reason": reason.replace(f"llm_gym/{SUITES[suite].env}: ", "")}


def digest(suite: str, arguments: Arguments) -> str:
    """Four episodes as one number."""
    summed = hashlib.sha256()
    for seed in range(4):
        with closing(make(SUITES[suite].env, **arguments)) as env:
            for step in play(env, seed):
                summed.update(repr((step.obs.tolist(), float(step.reward), step.info["messages"])).encode())
    return summed.hexdigest()[:16]


def facts(arguments: Arguments) -> dict[str, Any]:
    """What is to be known of a data set of reasoning-gym."""
    oracle, wrong = [], 0.0
    with closing(make("ReasoningGym-v0", max_tokens=100_000, **{"max_context": 300_000, **arguments})) as env:
        own: Any = env.unwrapped
        for row in range(10):
            for said in (None, "7", "no", "[1, 2]"):
                env.reset(options={"task": row})
                answer = own.entry["answer"]
                reply = f"<answer>{answer if said is None else said}</answer>"
                reward = float(env.step(own.chat.encode_reply(reply))[1])
                if said is None:
                    oracle.append(reward)
                elif said != answer:
                    wrong = max(wrong, reward)
        tests, trains, seconds = OVERLAP
        test: Any = make("ReasoningGym-v0", split="test", **arguments).unwrapped
        with own.globals:
            asked = {str(test.data[row]["question"]) for row in range(tests)}
            end, known = time.monotonic() + seconds, 0
            for row in range(trains):
                asked.discard(str(own.data[row]["question"]))
                known += 1
                if time.monotonic() > end:
                    break
    return {"oracle": min(oracle), "wrong": wrong, "repeated": f"{tests - len(asked)}/{tests} in {known}"}


def in_process(pipe: Any, job: Any, *given: Any) -> None:
    """Sends what a job returns, or what it raised."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            pipe.send(job(*given))
        except BaseException as error:
            pipe.send({"reason": f"{type(error).__name__}: {error}"[:300]})


def each(suite: str, jobs: Mapping[str, tuple[Any, ...]], workers: int) -> dict[str, dict[str, Any]]:
    """The results of jobs by name, each from a forked process of its own within `LIMIT` seconds."""
    context = multiprocessing.get_context("fork")
    waiting, running, done = dict(jobs), {}, {}
    while waiting or running:
        while waiting and len(running) < workers:
            name = next(iter(waiting))
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=in_process, args=(there, *waiting.pop(name)))
            process.start()
            there.close()
            running[name] = process, here, time.monotonic()
        for name, (process, here, began) in list(running.items()):
            late = time.monotonic() - began > LIMIT
            if not (late or here.poll()):
                continue
            try:
                result = here.recv() if here.poll() else {"reason": f"not done in {LIMIT} seconds"}
            except EOFError:
                result = {"reason": f"its process ended with {process.exitcode}"}
            process.kill()
            process.join()
            done[name] = {**result, "seconds": round(time.monotonic() - began, 1)}
            print(f"{suite} {name}: {done[name].get('reason', 'passes')}", file=sys.stderr, flush=True)
            del running[name]
        time.sleep(0.02)
    return {name: done[name] for name in sorted(done)}


def told(reason: str) -> str:
    """A reason as a cell of a table, without the folders of this machine."""
    return re.sub(r"\S*/site-packages/", "", reason)[:220].replace("|", "/")


def page(suite: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """The results as a page."""
    passed = {name: result for name, result in results.items() if "reason" not in result}
    packages = [f"{name} {version(name)}" for name in dict.fromkeys((SUITES[suite].package, "gymnasium"))]
    python = ".".join(map(str, sys.version_info[:2]))
    argument = SUITES[suite].argument
    lines = [
        f"# {suite.replace('_', '-')}: {len(passed)} of {len(results)} pass",
        "",
        f"{datetime.date.today()}, `python benchmarks/adapters.py {suite}`, {', '.join(packages)}, Python {python},"
        f" offline, {LIMIT} seconds each.",
        "",
    ]
    extra = (
        {"oracle": "own answer", "wrong": "wrong ones", "repeated": "test in train"} if suite == "reasoning_gym" else {}
    )
    lines += [
        "| " + " | ".join([argument, "arguments, remarks", *extra.values()]) + " |",
        "|---" * (2 + len(extra)) + "|",
    ]
    for name, result in passed.items():
        more = [f"`{key}={value}`" for key, value in result["arguments"].items() if key != argument]
        more += [result["remark"]] if "remark" in result else []
        cells = [
            name,
            ", ".join(more),
            *(f"{value:g}" if isinstance(value, float) else value for value in map(result.get, extra)),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    failed = {name: told(result["reason"]) for name, result in results.items() if name not in passed}
    if failed:
        lines += ["", "Not:", "", f"| {argument} | reason |", "|---|---|"]
    lines += [f"| {name} | {reason} |" for name, reason in failed.items()]
    return "\n".join(lines) + "\n"


def run(suite: str, only: tuple[str, ...], workers: int) -> dict[str, dict[str, Any]]:
    """The checks of a suite, and the digests again under another hash seed."""
    importlib.import_module(SUITES[suite].module)
    results = each(suite, {n: (checked, suite, n) for n in only or names(suite)}, workers)
    passed = {name: result["arguments"] for name, result in results.items() if "reason" not in result}
    command = [sys.executable, __file__, suite, "--workers", str(workers), "--limit", str(LIMIT), "--digests"]
    env = {**os.environ, "PYTHONHASHSEED": "12345"}
    again = json.loads(
        subprocess.run(command, input=json.dumps(passed), env=env, check=True, text=True, stdout=-1).stdout
    )
    for name in passed:
        if again[name].get("digest") != results[name]["digest"]:
            results[name]["remark"] = again[name].get("reason", "depends on PYTHONHASHSEED")
    return results


@click.command(help=__doc__)
@click.argument("suites", nargs=-1, type=click.Choice(list(SUITES)))
@click.option("--only", multiple=True, help="One environment; nothing is written.")
@click.option("--workers", default=2, show_default=True)
@click.option("--limit", default=LIMIT, show_default=True, help="Seconds for one environment.")
@click.option("--digests", is_flag=True, hidden=True)
def main(suites: tuple[str, ...], only: tuple[str, ...], workers: int, limit: int, digests: bool) -> None:
    global LIMIT
    LIMIT = limit
    if digests:
        importlib.import_module(SUITES[suites[0]].module)
        jobs = {name: (digested, suites[0], given) for name, given in json.load(sys.stdin).items()}
        print(json.dumps(each(f"{suites[0]}, hashed otherwise,", jobs, workers)))
        return
    for suite in suites or SUITES:
        results = run(suite, only, workers)
        text = page(suite, results)
        if only:
            print(text)
            continue
        DOCS.mkdir(exist_ok=True)
        (DOCS / f"{suite}.md").write_text(text, encoding="utf-8")
        print(text.splitlines()[0])


def digested(suite: str, arguments: Arguments) -> dict[str, Any]:
    """The digest as a result."""
    return {"digest": digest(suite, arguments)}


if __name__ == "__main__":
    assert llm_gym
    main()
