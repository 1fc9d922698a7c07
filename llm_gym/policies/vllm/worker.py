"""What runs inside vLLM's workers: new weights in, checksums of what they hold out.

vLLM mixes `WorkerExtension` into its worker class when started with
`worker_extension_cls="llm_gym.policies.vllm.worker.WorkerExtension"`, in this process or in a server; its methods
are called by name through `collective_rpc`. Names of tensors are Hugging Face's (PEFT's for adapters) everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm_gym.models.checksums import Report, checksum, recorded
from llm_gym.policies.vllm.held import ADAPTER, Held, adapter_module, renames

Tensors = Iterable[tuple[str, torch.Tensor]]


class WorkerExtension:
    """Mixed into vLLM's worker: the prefix keeps the names apart from the worker's own."""

    model_runner: Any
    model_config: Any
    vllm_config: Any

    def llm_gym_load(self, tensors: Tensors) -> None:
        """Replaces the model's weights; an adapter, if any, is emptied: the policy is then just these tensors."""
        received: dict[str, int] = {}
        pack_experts_again(self.model_runner.get_model())
        self.model_runner.reload_weights(weights_iterator=recorded(tensors, self.model_config.dtype, received))
        refresh_tied_head(self.model_runner.get_model())
        self._llm_gym_received = received
        if hasattr(self, "_llm_gym_adapter"):  # vLLM drops adapters with the weights that they were made for
            self.llm_gym_load_adapter([], {})

    def llm_gym_load_file(self, path: str) -> None:
        """The same from a safetensors file (one in /dev/shm crosses processes without a copy) or a model folder."""
        self.llm_gym_load(_read(Path(path)))

    def llm_gym_load_adapter(self, tensors: Tensors, config: Mapping[str, Any]) -> None:
        """Replaces the adapter by PEFT tensors and their `adapter_config`; no tensors: one that changes nothing."""
        self._llm_gym_adapter = _load_adapter(self, dict(tensors), dict(config))

    def llm_gym_load_adapter_file(self, path: str, config: Mapping[str, Any]) -> None:
        """The same from a safetensors file."""
        self.llm_gym_load_adapter(_read(Path(path)), config)

    def llm_gym_checksums(self, names: Sequence[str]) -> Report:
        """Checksums of the named tensors as this worker received and holds them."""
        received, meant = getattr(self, "_llm_gym_adapter", ({}, {}))
        received = getattr(self, "_llm_gym_received", {}) | received
        held, dtype = Held(self), self.model_config.dtype
        places: dict[str, list[str]] = {}
        for name in names:
            places.setdefault(held.place(name), []).append(name)
        sums = {group[0]: [checksum(part.to(dtype)) for part in held.parts(group[0])] for group in places.values()}
        return Report(
            received={n: received[n] for n in names if n in received},
            held={name: sums[group[0]] for group in places.values() for name in group},
            meant=meant,
            together=[group for group in places.values() if len(group) > 1],
        )


def _read(path: Path) -> Tensors:
    from safetensors import safe_open

    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with safe_open(str(file), "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                yield name, opened.get_tensor(name)


def refresh_tied_head(model: nn.Module) -> None:
    """vLLM on a CPU keeps the packed matrix of a tied head from before a reload: packs it again."""
    from vllm.platforms import current_platform

    head = getattr(model, "lm_head", None)
    if current_platform.is_cpu() and hasattr(head, "cpu_linear"):
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        dispatch_cpu_unquantized_gemm(head, remove_weight=False)


def pack_experts_again(model: nn.Module) -> None:
    """Sees to it that a reload packs experts as the first load did.

    vLLM on a CPU packs the matrices of all experts for its kernels, but only when it makes these; weights that came
    later were computed with as they came, in the wrong order (off by 3 to 6 nats).
    """
    for layer in model.modules():
        method: Any = getattr(layer, "quant_method", None)
        experts: Any = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
        if hasattr(experts, "isa") and "process_weights_after_loading" not in vars(method):
            method.process_weights_after_loading = partial(_process_all, method, experts)


def _process_all(method: Any, experts: Any, layer: nn.Module) -> None:
    """What vLLM does to a layer's weights after they were loaded for the first time."""
    type(method).process_weights_after_loading(method, layer)
    experts.process_weights_after_loading(layer)


def _load_adapter(
    worker: Any, tensors: dict[str, torch.Tensor], config: dict[str, Any]
) -> tuple[dict[str, int], dict[str, int]]:
    """Puts an adapter in place; checksums of its tensors as received, and of those B that are held scaled."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    loras = worker.model_runner.lora_manager
    manager, dtype = loras._adapter_manager, loras.lora_config.lora_dtype
    received = {name: checksum(tensor.detach().to(dtype)) for name, tensor in tensors.items()}
    meant: dict[str, int] = {}
    if tensors:
        helper = PEFTHelper.from_dict(config)
        helper.validate_legal(loras.lora_config)
        # Clones: vLLM scales B in place, and without a copy that would be the learner's.
        copies = {name: tensor.detach().to("cpu", dtype, copy=True) for name, tensor in tensors.items()}
        mapper = renames(manager.model)
        lora = LoRAModel.from_lora_tensors(
            ADAPTER, copies, helper, device="cpu", dtype=dtype, model_vocab_size=loras.vocab_size, weights_mapper=mapper
        )
        for name, copy in copies.items():
            module, first = adapter_module(name, mapper)
            if not first:
                meant[name] = checksum(copy * lora.loras[module].scaling)
    else:
        lora = manager.create_dummy_lora(ADAPTER, 1, loras.embedding_modules)  # all zeros
    manager.remove_adapter(ADAPTER)
    manager.add_adapter(lora)
    manager.activate_adapter(ADAPTER)
    return received, meant
