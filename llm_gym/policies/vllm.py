"""The vLLM engine, in process: one thread owns it, a future per request, weights swapped live.

Everything that knows vLLM is in this file. `AsyncLLM` always spawns an engine process, through which
tensors cannot pass; `LLMEngine` without multiprocessing runs in this process and can be driven from one
thread, which also batches continuously: requests join and leave between any two decoding steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import os
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_gym.core import Completion, FinishReason, Ids, Sampling
from llm_gym.embedded import PATH
from llm_gym.errors import ConfigError, PolicyError, unknown

if TYPE_CHECKING:
    import torch

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine must live in this process to be handed tensors
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the CPU default takes half of the machine's memory
    "VLLM_LOGGING_LEVEL": "WARNING",
}

_FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length"}

Call = tuple[Callable[[Any], Any] | None, "Future[Any]"]


class VLLMPolicy:
    """A `Policy` on a real vLLM engine (CPU or CUDA) in this process.

    Args:
        model: folder or hub id; None: the embedded model.
        max_context: most tokens of context and completion together; None: the model's own limit.
        dtype: compute type of the engine.
        version: version of the weights in `model`.
        engine_args: passed through to vLLM's `EngineArgs` (`gpu_memory_utilization`, `quantization`,
            `tensor_parallel_size` ...).

    Raises:
        ConfigError: an engine argument that this vLLM does not have; raised before anything is loaded.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        max_context: int | None = None,
        dtype: str = "auto",
        version: int = 0,
        **engine_args: Any,
    ) -> None:
        os.environ.update({key: os.environ.get(key, value) for key, value in _ENVIRONMENT.items()})
        from vllm.engine.arg_utils import EngineArgs

        known = {field.name for field in dataclasses.fields(EngineArgs)}
        for name in engine_args:
            if name not in known:
                raise ConfigError(unknown("policy.vllm engine argument", name, known))
        settings = _defaults() | {"model": str(model or PATH), "dtype": dtype, "max_model_len": max_context}
        self.version = version
        self._calls: queue.Queue[Call] = queue.Queue()
        self._ended = False
        self._waiting: dict[str, Future[Any]] = {}
        self._names = (f"request-{n}" for n in itertools.count())
        ready: Future[Any] = Future()
        args = EngineArgs(**(settings | engine_args))
        self._thread = threading.Thread(target=self._serve, args=(args, ready), name="vllm-engine", daemon=True)
        self._thread.start()
        self._engine = ready.result()
        self.max_context: int = self._engine.model_config.max_model_len

    async def complete(self, context: Ids, sampling: Sampling, *, seed: int | None = None) -> Completion:
        """One completion; cancelling the awaiting task aborts the request in the engine."""
        room = self.max_context - len(context)
        if room < 1:
            raise PolicyError(f"The context has {len(context)} tokens; the engine's limit is {self.max_context}.")
        name, done = next(self._names), Future[Any]()
        self._waiting[name] = done
        self._call(lambda engine: self._add(engine, name, context, sampling, min(room, sampling.max_tokens), seed))
        try:
            return await asyncio.wrap_future(done)
        except asyncio.CancelledError:
            self._waiting.pop(name, None)
            self._call(lambda engine: engine.abort_request([name]))
            raise

    def generate(
        self, contexts: Sequence[Ids], sampling: Sampling, *, seeds: Sequence[int] | None = None
    ) -> list[Completion]:
        """Completions of many contexts, in order."""
        of = seeds if seeds is not None else [None] * len(contexts)

        async def every() -> list[Completion]:
            pairs = zip(contexts, of, strict=True)
            return await asyncio.gather(*(self.complete(context, sampling, seed=seed) for context, seed in pairs))

        return asyncio.run(every())

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """Swaps weights between two decoding steps; running requests go on with the new ones.

        Their caches are recomputed: keys of the old weights would be silently wrong by nats.
        """
        held = [(name, tensor.detach()) for name, tensor in tensors]

        def swap(engine: Any) -> None:
            engine.collective_rpc(_reload, args=(held,))
            if not engine.reset_prefix_cache(reset_running_requests=True):
                raise PolicyError("vLLM could not reset its prefix cache after a weight update.")
            self.version = version

        self._call(swap).result()

    def close(self) -> None:
        """Ends the engine thread; requests still running fail with `PolicyError`."""
        if self._thread.is_alive():
            future: Future[Any] = Future()
            self._calls.put((None, future))
            self._thread.join()

    def _call(self, function: Callable[[Any], Any]) -> Future[Any]:
        """Runs `function(engine)` on the engine's thread, between two steps."""
        future: Future[Any] = Future()
        self._calls.put((function, future))
        if self._ended:  # looked at after the call was put: either the thread takes it, or it is refused here
            self._refuse()
        return future

    def _refuse(self) -> None:
        """Fails every call and request that nobody will serve any more."""
        error = PolicyError("The vLLM engine has ended.")
        with contextlib.suppress(queue.Empty):
            while True:
                _, future = self._calls.get_nowait()
                if not future.done():
                    future.set_exception(error)
        self._fail(error)

    def _serve(self, args: Any, ready: Future[Any]) -> None:
        """The engine's thread: takes calls, decodes a step, hands out what is finished."""
        from vllm.v1.engine.llm_engine import LLMEngine

        try:
            engine = LLMEngine.from_engine_args(args)
        except BaseException as error:
            ready.set_exception(error)
            return
        ready.set_result(engine)
        try:
            while self._take_calls(engine):
                for output in engine.step():
                    self._finish(output)
        except BaseException as error:
            self._fail(PolicyError(f"vLLM failed: {type(error).__name__}: {error}"))
        finally:
            self._ended = True
            self._refuse()
            engine.engine_core.shutdown()

    def _take_calls(self, engine: Any) -> bool:
        """Runs the calls that wait; blocks while there is nothing to decode. False: the end."""
        while True:
            try:
                function, future = self._calls.get(block=not engine.has_unfinished_requests())
            except queue.Empty:
                return True
            if function is None:
                return False
            try:
                future.set_result(function(engine))
            except Exception as error:
                future.set_exception(error)

    def _add(self, engine: Any, name: str, context: Ids, sampling: Sampling, max_tokens: int, seed: int | None) -> None:
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        params = SamplingParams(
            temperature=sampling.temperature,
            top_k=sampling.top_k or -1,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            max_tokens=max_tokens,
            stop_token_ids=None if sampling.stop_token_ids is None else list(sampling.stop_token_ids),
            ignore_eos=sampling.stop_token_ids is not None,
            seed=None if seed is None else seed % 2**63,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        try:
            engine.add_request(name, tokens_input(context.tolist()), params)
        except Exception as error:
            self._resolve(name, PolicyError(f"vLLM refused a request: {error}"))

    def _finish(self, output: Any) -> None:
        if not output.finished:
            return
        sample = output.outputs[0]
        tokens = np.asarray(sample.token_ids, np.int32)
        logprobs = [entry[token].logprob for token, entry in zip(sample.token_ids, sample.logprobs or [], strict=True)]
        reason = _FINISH.get(sample.finish_reason, "abort")
        self._resolve(
            output.request_id, Completion(tokens, np.asarray(logprobs, np.float32), reason, version=self.version)
        )

    def _resolve(self, name: str, result: Completion | PolicyError) -> None:
        future = self._waiting.pop(name, None)
        if future is None or not future.set_running_or_notify_cancel():
            return
        if isinstance(result, PolicyError):
            future.set_exception(result)
        else:
            future.set_result(result)

    def _fail(self, error: PolicyError) -> None:
        for name in list(self._waiting):
            self._resolve(name, error)


def _defaults() -> dict[str, Any]:
    """Engine arguments that exact log-probabilities need, and that small models are fast with."""
    import torch

    settings: dict[str, Any] = {
        "logprobs_mode": "processed_logprobs",  # of the distribution sampled from, temperature included
        "generation_config": "vllm",  # the model folder must not change the sampling
        "enable_prefix_caching": True,
        "disable_log_stats": True,
    }
    if not torch.cuda.is_available():
        # CPU: compiled graphs start in 46 s and are no faster; a block of 128 gives short turns no prefix hits; a
        # prefill split over steps breaks per-request seeds.
        settings |= {"enforce_eager": True, "block_size": 32, "enable_chunked_prefill": False}
        settings |= {"max_num_batched_tokens": 8192, "max_num_seqs": 128}
    return settings


def _reload(worker: Any, tensors: list[tuple[str, torch.Tensor]]) -> None:
    """Runs in vLLM's worker: loads Hugging Face tensors into the running model."""
    worker.reload_weights(weights_iterator=iter(tensors))
    from vllm.platforms import current_platform

    head = getattr(worker.model_runner.get_model(), "lm_head", None)
    if current_platform.is_cpu() and hasattr(head, "cpu_linear"):
        # vLLM on CPU keeps the packed matrix of a tied head from before the reload.
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        dispatch_cpu_unquantized_gemm(head, remove_weight=False)
