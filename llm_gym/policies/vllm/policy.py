"""The vLLM engine, in process: one thread owns it, requests join and leave between steps, weights change live.

Everything that knows vLLM is in this file, in `start` (its settings), in `worker` (what runs in its workers) and in
`held` (what these hold). `AsyncLLM` always spawns an engine process, through which tensors cannot pass;
`LLMEngine` without multiprocessing runs in this process and can be driven from one thread, which also batches
continuously.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_gym.concurrency import run_here
from llm_gym.core import Completion, FinishReason, Ids, Sampling
from llm_gym.embedded import PATH
from llm_gym.errors import PolicyError, SettingError
from llm_gym.models.checksums import Report, differing
from llm_gym.policies.vllm.engine_thread import EngineThread, Request
from llm_gym.policies.vllm.start import check as check
from llm_gym.policies.vllm.start import defaults as _defaults
from llm_gym.policies.vllm.start import lora_settings, make_engine, sentence

if TYPE_CHECKING:
    import torch

_FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


class VLLMPolicy:
    """A `Policy` on a real vLLM engine (CPU or CUDA) in this process.

    Every way to new weights (`load`, `load_adapter`, `load_folder`) may be used while requests are in flight: they go
    on with the new weights, their caches are recomputed, and their completions say from which token on.

    Args:
        model: folder or hub id; None: the embedded model.
        max_context: most tokens of context and completion together; None: the model's own limit.
        dtype: compute type of the engine.
        version: version of the weights in `model`.
        lora_rank: highest rank of the adapters that `load_adapter` will bring; None: no adapters.
        engine_args: passed through to vLLM's `EngineArgs` (`gpu_memory_utilization`, `quantization`,
            `tensor_parallel_size`, `speculative_config` ...).

    Raises:
        ConfigError: an engine argument that this vLLM does not have; raised before anything is loaded.
        SettingError: the engine cannot start with these settings on this machine.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        max_context: int | None = None,
        dtype: str = "auto",
        version: int = 0,
        lora_rank: int | None = None,
        **engine_args: Any,
    ) -> None:
        check(engine_args)
        self.version = version
        self._names = (f"request-{n}" for n in itertools.count())
        self._settings = _defaults() | {"dtype": dtype, "max_model_len": max_context}
        if lora_rank is not None:
            self._settings |= lora_settings(lora_rank)
        self._settings |= engine_args
        self._adapter: Any = None
        self.update_seconds: dict[str, float] = {}
        self._asleep: set[str] = set()
        self._start(str(model or PATH))

    async def complete(self, context: Ids, sampling: Sampling, *, seed: int | None = None) -> Completion:
        """One completion; cancelling the awaiting task aborts the request in the engine.

        Raises:
            PolicyError: the context leaves no room, vLLM refused it, or the engine has ended.
        """
        room = self.max_context - len(context)
        if room < 1:
            raise PolicyError(f"The context has {len(context)} tokens; the engine's limit is {self.max_context}.")
        name, loop = next(self._names), asyncio.get_running_loop()
        params = _params(sampling, min(room, sampling.max_tokens), seed)
        request = Request(name, lambda engine: self._add(engine, name, context, params), loop.create_future(), loop)
        self.thread.submit(request)
        try:
            return await request.future
        except asyncio.CancelledError:
            self.thread.abort(request)
            raise

    def generate(
        self, contexts: Sequence[Ids], sampling: Sampling, *, seeds: Sequence[int] | None = None
    ) -> list[Completion]:
        """Completions of many contexts, in order."""
        of = seeds if seeds is not None else [None] * len(contexts)

        async def every() -> list[Completion]:
            pairs = zip(contexts, of, strict=True)
            return await asyncio.gather(*(self.complete(context, sampling, seed=seed) for context, seed in pairs))

        return run_here(every())

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """Replaces all weights (Hugging Face names, tied ones once or twice); an adapter is emptied."""
        with _reachable(tensors, self._workers) as (suffix, source):
            self._update("llm_gym_load" + suffix, source, version=version)

    def load_adapter(
        self, tensors: Iterable[tuple[str, torch.Tensor]], config: Mapping[str, Any], *, version: int
    ) -> None:
        """Replaces the LoRA adapter, in memory; the base weights stay. Requests in flight switch to it too.

        Args:
            tensors: PEFT's names (`base_model.model.<module>.lora_A.weight`).
            config: what PEFT writes to `adapter_config.json` (`r`, `lora_alpha`, `target_modules` ...).

        Raises:
            SettingError: the policy was made without `lora_rank`.
        """
        if self._adapter is None:
            raise SettingError("load_adapter: the policy was made with lora_rank=None; give the adapters' rank.")
        with _reachable(tensors, self._workers) as (suffix, source):
            self._update("llm_gym_load_adapter" + suffix, source, dict(config), version=version)

    def load_folder(self, folder: str | Path, *, version: int) -> None:
        """Replaces all weights by those of a model folder (safetensors) on disk."""
        self._update("llm_gym_load_file", str(folder), version=version)

    def restart(self, folder: str | Path | None = None, *, version: int) -> None:
        """A new engine in place of this one; requests in flight fail with `PolicyError`.

        Args:
            folder: the model to serve from now on; None: the one it was serving.
            version: version of its weights.
        """
        self.close()
        self.version = version
        self._start(str(folder) if folder is not None else self._model)

    def sleep(self, level: int = 1) -> None:
        """Gives the engine's GPU memory back: weights go to the CPU (level 1) or are dropped (level 2), caches too.

        Requests wait until `wake`. Needs the engine argument `enable_sleep_mode`.
        """
        if not self._settings.get("enable_sleep_mode"):
            raise SettingError("sleep: the engine was started without enable_sleep_mode=True (CUDA only).")

        def sleep(engine: Any) -> None:
            _drain(self.thread, engine)
            engine.reset_prefix_cache(reset_running_requests=True)
            engine.sleep(level, mode="keep")
            self.thread.asleep = True
            self._asleep |= {"weights", "kv_cache"}

        self.thread.call(sleep).result()

    def wake(self, tags: Sequence[str] = ("weights", "kv_cache")) -> None:
        """Takes memory again; after level 2, weights must be loaded before anything is sampled.

        Args:
            tags: `["weights"]`, then `load`, then `["kv_cache"]` needs the least memory at once.
        """

        def wake(engine: Any) -> None:
            engine.wake_up(list(tags))
            self._asleep -= set(tags)
            self.thread.asleep = bool(self._asleep)

        self.thread.call(wake).result()

    def reports(self, names: Sequence[str]) -> list[Report]:
        """What each worker received and holds of the named tensors: `checksums.Report`."""
        found: list[Report] = self.thread.call(lambda e: e.collective_rpc("llm_gym_checksums", args=(names,))).result()
        return found

    def differing(self, expected: Mapping[str, int]) -> list[str]:
        """The tensors that the engine does not hold as the learner does.

        Args:
            expected: `checksums.checksums` of the learner's tensors (and of the adapter's) in `self.dtype`.
        """
        return differing(expected, self.reports(list(expected)))

    def close(self) -> None:
        """Ends the engine thread; requests still running fail with `PolicyError`."""
        self.thread.close()

    def _start(self, model: str) -> None:
        self._model = model
        self.thread = EngineThread(lambda: make_engine(self._settings | {"model": model}), self._finish)
        self._asleep.clear()
        config = self.thread.engine.model_config
        self._workers: int = self.thread.engine.vllm_config.parallel_config.world_size
        self.max_context: int = config.max_model_len
        self.dtype: torch.dtype = config.dtype
        if self._settings.get("enable_lora"):
            self._update("llm_gym_load_adapter", [], {}, version=self.version)

    def _update(self, method: str, *args: Any, version: int) -> None:
        """Changes the weights between two steps; running requests go on with the new ones.

        Their caches are recomputed: keys of the old weights would be silently wrong by nats.
        """

        def change(engine: Any) -> None:
            if "weights" in self._asleep:
                raise PolicyError("The engine's weights are asleep: wake(['weights']) before they are written.")
            began = time.monotonic()
            _drain(self.thread, engine)
            try:
                engine.collective_rpc(method, args=args)
            except Exception as error:
                raise PolicyError(f"vLLM could not take the weights of version {version}: {sentence(error)}") from error
            if not engine.reset_prefix_cache(reset_running_requests=True):
                raise PolicyError("vLLM could not reset its prefix cache after a weight update.")
            self.version = version
            if self._settings.get("enable_lora"):
                self._adapter = _adapter(version)
            for request in self.thread.requests.values():
                request.update(version)
            self.update_seconds = {"pause": time.monotonic() - began}

        self.thread.call(change).result()

    def _add(self, engine: Any, name: str, context: Ids, params: Any) -> Any:
        from vllm.inputs.engine import tokens_input

        request = self.thread.requests[name]
        request.version = self.version
        inner = engine.add_request(name, tokens_input(context.tolist()), params, lora_request=self._adapter)
        return engine.output_processor.request_states[inner]

    def _finish(self, output: Any, request: Request) -> Completion:
        sample = output.outputs[0]
        tokens = np.asarray(sample.token_ids, np.int32)
        logprobs = np.asarray(sample.logprobs.logprobs, np.float32)
        reason = _FINISH.get(sample.finish_reason, "abort")
        return Completion(tokens, logprobs, reason, request.version, tuple(request.updates))


def _params(sampling: Sampling, max_tokens: int, seed: int | None) -> Any:
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k or -1,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        max_tokens=max_tokens,
        stop_token_ids=None if sampling.stop_token_ids is None else list(sampling.stop_token_ids),
        ignore_eos=sampling.stop_token_ids is not None,
        seed=None if seed is None else seed % 2**63,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        skip_clone=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _adapter(version: int) -> Any:
    """The adapter as a request names it: one id for the engine, and a name of its own for the prefix cache."""
    from vllm.lora.request import LoRARequest

    from llm_gym.policies.vllm.held import ADAPTER

    return LoRARequest(f"version-{version}", ADAPTER, "in memory")


def _drain(thread: EngineThread, engine: Any) -> None:
    """Finishes the steps that asynchronous scheduling has launched ahead: their tokens are the old weights'."""
    core = engine.engine_core.engine_core
    if getattr(core, "batch_queue", None):
        core.pause_scheduler("keep", clear_cache=False)
        while core.batch_queue:
            thread.step(engine)
        core.resume_scheduler()


@contextlib.contextmanager
def _reachable(tensors: Iterable[tuple[str, torch.Tensor]], workers: int) -> Iterator[tuple[str, Any]]:
    """Tensors as the engine's workers can take them, and the suffix of the method that does.

    In this process: the tensors themselves, one at a time, taken by the engine's thread. In processes of their own: a
    file in shared memory.
    """
    if workers == 1:
        yield "", ((name, tensor.detach()) for name, tensor in tensors)
        return
    from safetensors.torch import save_file

    unique: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in list(tensors):  # the two names of a tied tensor are one in a file; all live: addresses differ
        unique.setdefault(tensor.data_ptr(), (name, tensor.detach().cpu().contiguous()))
    with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="llm_gym-", suffix=".safetensors") as file:
        save_file(dict(unique.values()), file.name)
        yield "_file", file.name
