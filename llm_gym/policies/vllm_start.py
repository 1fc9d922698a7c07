"""How a vLLM engine is started: what may be set, what is set for every engine, and what is said when it fails."""

from __future__ import annotations

import dataclasses
import logging
import os
import textwrap
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from llm_gym.errors import ConfigError, SettingError, unknown

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine must live in this process to be handed tensors
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the CPU default takes half of the machine's memory
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
_EXTENSION = "llm_gym.policies.vllm_worker.WorkerExtension"


def check(engine_args: Mapping[str, Any]) -> None:
    """Refuses engine arguments that cannot work, before anything is loaded.

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
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm.v1.engine.llm_engine import LLMEngine

    try:
        return LLMEngine.from_engine_args(arguments(**settings))
    except BaseException as error:
        cleanup_dist_env_and_memory()
        if not isinstance(error, Exception):
            raise
        raise SettingError(f"policy.vllm: the engine cannot serve {settings['model']!r}: {sentence(error)}") from error


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
        settings |= {"max_num_batched_tokens": 8192, "max_num_seqs": 128}
    return settings
