"""How a vLLM engine is started: what may be set, what is set for every engine, and what is said when it fails."""

from __future__ import annotations

import dataclasses
import logging
import os
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from llm_gym.errors import ConfigError, SettingError, unknown
from llm_gym.policies.vllm.models import like_transformers

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine must live in this process to be handed tensors
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
_RESERVED = {
    "model": "the policy's own model is served",
    "dtype": "the policy's own dtype is used",
    "max_context": "vLLM's name for it is 'max_model_len'",
    "version": "versions are counted by the policy",
    "enable_lora": "'lora_rank' of the policy decides",
    "max_lora_rank": "'lora_rank' of the policy decides",
    "logprobs_mode": "the log-probabilities must be those of the distribution sampled from",
    "worker_extension_cls": "the policy's own is needed to load weights",
}
"""Engine arguments that are not the user's to set, and why."""
_EXTENSION = "llm_gym.policies.vllm.worker.WorkerExtension"
_CPU_CACHE = 1 << 30
"""Bytes of the key-value cache on a CPU, where vLLM would take half of the machine's memory for each engine."""


def check(engine_args: Mapping[str, Any], *, ranks: int = 1) -> None:
    """Refuses engine arguments that cannot work, before anything is loaded.

    Args:
        engine_args: the user's.
        ranks: processes that train together, each with an engine of its own.

    Raises:
        ConfigError: an argument that this vLLM does not have, or that is not the user's to set.
        SettingError: vLLM is not installed, or sleep mode is asked for without CUDA.
    """
    for name, reason in _RESERVED.items():
        if name in engine_args:
            raise ConfigError(f"policy.vllm.{name}: it cannot be set to {engine_args[name]!r} here; {reason}.")
    known = {field.name for field in dataclasses.fields(_engine_args_class())}
    for name in engine_args:
        if name not in known:
            raise ConfigError(unknown("policy.vllm engine argument", name, known - set(_RESERVED)))
        spans = name.endswith("parallel_size") and engine_args[name] not in (None, 1)
        if ranks > 1 and (spans or name == "distributed_executor_backend"):
            raise ConfigError(
                f"policy.vllm.{name}: got {engine_args[name]!r}, but each of {ranks} processes has its own engine on "
                "one device; for engines that span several use servers."
            )
    if engine_args.get("enable_sleep_mode"):
        import torch

        if not torch.cuda.is_available():
            raise SettingError("policy.vllm.enable_sleep_mode: got True, but sleep mode needs CUDA; leave it out.")


def lora_settings(rank: int) -> dict[str, Any]:
    """Engine arguments for one adapter of at most that rank; vLLM has kernels for certain ranks only."""
    ranks = (1, 8, 16, 32, 64, 128, 256, 320, 512)
    if not 1 <= rank <= ranks[-1]:
        raise SettingError(f"lora_rank: got {rank}, want 1 to {ranks[-1]}.")
    return {"enable_lora": True, "max_lora_rank": next(r for r in ranks if r >= rank), "max_loras": 1}


def _engine_args_class() -> Any:
    os.environ.update({key: os.environ.get(key, value) for key, value in _ENVIRONMENT.items()})
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # it warns before it reads its settings
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
    try:
        from vllm.engine.arg_utils import EngineArgs
    except ImportError as error:
        raise SettingError(f"policy.engine: 'vllm' needs vLLM: pip install 'llm-gym[vllm]' ({error}).") from None
    return EngineArgs


def make_engine(settings: Mapping[str, Any]) -> Any:
    """Builds the engine, or says in one sentence why it cannot be."""
    arguments = _engine_args_class()
    settings = like_transformers(settings["model"], settings)
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm.v1.engine.llm_engine import LLMEngine

    try:
        with own_classes():
            return LLMEngine.from_engine_args(arguments(**settings, **_among_others()))
    except BaseException as error:
        cleanup_dist_env_and_memory()
        if not isinstance(error, Exception):
            raise
        raise SettingError(f"policy.vllm: the engine cannot serve {settings['model']!r}: {sentence(error)}") from error


def _among_others() -> dict[str, Any]:
    """Engine arguments for one of several processes that have joined in torch.distributed; all must start together.

    vLLM takes its groups out of theirs then: with `external_launcher` each process is a replica of one worker, on the
    device of its `LOCAL_RANK` (the executor of one process would take device 0 everywhere). An engine that ends also
    ends torch.distributed, whoever began it: here it must not.
    """
    from torch import distributed
    from vllm.distributed import parallel_state

    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return {}
    os.environ.setdefault("LOCAL_RANK", "0")
    parallel_state.destroy_distributed_environment = _leave_others
    return {"distributed_executor_backend": "external_launcher"}


def _leave_others() -> None:
    """Ends vLLM's own group of all processes; it makes a new one for the next engine."""
    from vllm.distributed import parallel_state

    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
    parallel_state._WORLD = parallel_state._NODE_COUNT = None


def sentence(error: Exception) -> str:
    """The part of a vLLM error that says what is wrong."""
    errors: Callable[[], list[dict[str, Any]]] | None = getattr(error, "errors", None)
    if errors is not None:  # pydantic's: one for each bad argument
        text = "; ".join(": ".join([*map(str, each["loc"][:1]), str(each["msg"])]) for each in errors())
    else:
        text = str(error).strip() or type(error).__name__
    return textwrap.shorten(text.removeprefix("Value error, ").split("\n\n")[0], 300, placeholder=" ...")


def defaults() -> dict[str, Any]:
    """Engine arguments that exact log-probabilities need, and that small models are fast with."""
    import torch

    settings: dict[str, Any] = {
        "logprobs_mode": "processed_logprobs",  # of the distribution sampled from, temperature included
        "generation_config": "vllm",  # the model folder must not change the sampling
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "worker_extension_cls": _EXTENSION,
    }
    if not torch.cuda.is_available():
        # CPU: compiled graphs start in 46 s and are no faster; a block of 128 gives short turns no prefix hits; a
        # prefill split over steps breaks per-request seeds.
        settings |= {"enforce_eager": True, "block_size": 32, "enable_chunked_prefill": False}
        settings |= {"max_num_batched_tokens": 8192, "max_num_seqs": 128, "kv_cache_memory_bytes": _CPU_CACHE}
    return settings


@contextmanager
def own_classes() -> Iterator[None]:
    """While it lasts, vLLM makes models from subclasses of transformers' classes.

    For a model that it has no class of its own for, it decorates the class of transformers in place; every instance,
    the learner's too, would then look for attributes that only vLLM's have (`do_not_compile`).
    """
    from transformers import AutoModel
    from vllm.model_executor.models import transformers as backend

    base = getattr(getattr(backend, "base", None), "Base", None)
    decorate = getattr(base, "_decorate_cls_for_torch_compile", None)
    if base is None or decorate is None:
        yield
        return
    known = AutoModel._model_mapping._extra_content
    before = dict(known)

    def decorate_own(model: Any, cls: Any, *args: Any, **options: Any) -> None:
        known[cls.config_class] = own = type(cls.__name__, (cls,), {"__module__": cls.__module__})
        decorate(model, own, *args, **options)

    base._decorate_cls_for_torch_compile = decorate_own
    try:
        yield
    finally:
        base._decorate_cls_for_torch_compile = decorate
        known.clear()
        known.update(before)
