"""What servers are asked and answer, and labels of weights: which ones workers keep, and whose they are."""

from __future__ import annotations

import itertools
import os
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_gym.core import Completion, FinishReason, Ids, Sampling
from llm_gym.policies.http import RemoteError

if TYPE_CHECKING:
    from llm_gym.policies.vllm_server.broadcast import Transfer

_FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


@dataclass(frozen=True)
class Weights:
    """What every server must serve."""

    run: str
    """Tells the labels of one policy from those of any other."""
    update: int
    """Never used twice in a run."""
    base: int
    """The update that brought the weights beneath the adapter; 0: the server was started with them."""
    version: int
    source: Path | None = None
    """A safetensors file, or a folder of them; None: what the server was started with."""
    adapter: Path | None = None
    """A PEFT folder."""
    transfer: Transfer | None = None
    """The broadcast that brings them; then they have no source."""

    @property
    def label(self) -> str:
        """The name of this state."""
        return f"{self.run}:{self.update}:{self.base}:{self.version}"

    def on(self, label: str) -> bool:
        """Whether a server in the state of this label need not load the weights beneath the adapter."""
        if not label:
            return self.base == 0
        return label.split(":")[::2][:2] == [self.run, str(self.base)] and self.adapter is not None


def new_run() -> str:
    """What tells the labels of this process's policy from those of any other, and says whose they are."""
    return f"{uuid.uuid4().hex[:8]}.{os.getpid()}.{socket.gethostname().replace(':', '-')}"


def owner(run: str) -> tuple[str, bool]:
    """Who has made a run's labels, in words, and whether that process is on this machine and alive, and another."""
    _, _, place = run.partition(".")
    pid, _, host = place.partition(".")
    if not pid.isdigit():
        return "another run", False
    alive = host == socket.gethostname().replace(":", "-") and int(pid) != os.getpid() and _alive(int(pid))
    return f"the run of process {pid} on {host}", alive


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def request(context: Ids, sampling: Sampling, max_tokens: int, seed: int | None) -> dict[str, Any]:
    """The body for `/inference/v1/generate`."""
    stops = sampling.stop_token_ids
    params = {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k or -1,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "max_tokens": max_tokens,
        "stop_token_ids": None if stops is None else list(stops),
        "ignore_eos": stops is not None,
        "seed": None if seed is None else seed % 2**63,
        "logprobs": 0,
        "detokenize": False,
    }
    return {"token_ids": context.tolist(), "sampling_params": params}


def read(answer: Any, only: Weights | None, run: str) -> Completion:
    """The completion in an answer of `/inference/v1/generate`.

    Args:
        answer: its JSON.
        only: the weights that sampled it, if there was no update meanwhile; used where the server gives no spans.
        run: the first part of the labels that count.

    Raises:
        RemoteError: it is incomplete, or was sampled by other weights than ours.
    """
    try:
        choice = answer["choices"][0]
        tokens = np.asarray(choice["token_ids"], np.int32)
        logprobs = np.asarray([entry["logprob"] for entry in choice["logprobs"]["content"]], np.float32)
        spans = choice.get("weight_versions")
        if spans is None and only is not None:
            spans = [{"start": 0, "version": only.label}]
        changes = [(int(span["start"]), _version(span["version"], run)) for span in spans or []]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise RemoteError(f"the server's answer cannot be read: {type(error).__name__}: {error}") from error
    reason = _FINISH.get(choice.get("finish_reason"))
    if reason is None or not len(tokens) or len(tokens) != len(logprobs):
        raise RemoteError(f"the server ended a request early (finish reason {choice.get('finish_reason')!r})")
    if not changes or changes[0][0] != 0 or any(version is None for _, version in changes):
        raise RemoteError("the server answered from other weights than it was given")
    seen = [(start, version) for start, version in changes if version is not None]
    kept = [seen[0], *(b for a, b in itertools.pairwise(seen) if a[1] != b[1])]
    return Completion(tokens, logprobs, reason, kept[0][1], tuple(kept[1:]))


def _version(label: Any, run: str) -> int | None:
    """The version in one of our labels; None for any other."""
    parts = str(label).split(":")
    return int(parts[-1]) if parts[0] == run and parts[-1].isdigit() else None
