"""What runs inside vLLM's workers: new weights in, checksums of what they hold out.

vLLM mixes `WorkerExtension` into its worker class when started with
`worker_extension_cls="llm_gym.policies.vllm_worker.WorkerExtension"`, in this process or in a server; its methods
are called by name through `collective_rpc`. Names of tensors are Hugging Face's (PEFT's for adapters) everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm_gym.policies.checksums import Report, checksum, recorded

ADAPTER = 1
"""The one LoRA id in use; every version of the adapter takes its place."""
Tensors = Iterable[tuple[str, torch.Tensor]]
_PROBE_ROWS = 256


class WorkerExtension:
    """Mixed into vLLM's worker: the prefix keeps the names apart from the worker's own."""

    model_runner: Any
    model_config: Any
    vllm_config: Any

    def llm_gym_load(self, tensors: Tensors) -> None:
        """Replaces the model's weights; an adapter, if any, is emptied: the policy is then just these tensors."""
        received: dict[str, int] = {}
        self.model_runner.reload_weights(weights_iterator=recorded(tensors, self.model_config.dtype, received))
        _refresh_tied_head(self.model_runner.get_model())
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
        held = {name: [checksum(part.to(self.model_config.dtype)) for part in _held(self, name)] for name in names}
        return Report(received={n: received[n] for n in names if n in received}, held=held, meant=meant)


def _read(path: Path) -> Tensors:
    from safetensors import safe_open

    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with safe_open(str(file), "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                yield name, opened.get_tensor(name)


def _refresh_tied_head(model: nn.Module) -> None:
    """vLLM on a CPU keeps the packed matrix of a tied head from before a reload: packs it again."""
    from vllm.platforms import current_platform

    head = getattr(model, "lm_head", None)
    if current_platform.is_cpu() and hasattr(head, "cpu_linear"):
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        dispatch_cpu_unquantized_gemm(head, remove_weight=False)


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
        mapper = _renames(manager.model)
        lora = LoRAModel.from_lora_tensors(
            ADAPTER, copies, helper, device="cpu", dtype=dtype, model_vocab_size=loras.vocab_size, weights_mapper=mapper
        )
        for name, copy in copies.items():
            module, first = _adapter_module(name, mapper)
            if not first:
                meant[name] = checksum(copy * lora.loras[module].scaling)
    else:
        lora = manager.create_dummy_lora(ADAPTER, 1, loras.embedding_modules)  # all zeros
    manager.remove_adapter(ADAPTER)
    manager.add_adapter(lora)
    manager.activate_adapter(ADAPTER)
    return received, meant


def _held(worker: Any, name: str) -> list[torch.Tensor]:
    """This worker's shard of a tensor in every place that holds it; none where it cannot be read."""
    if ".lora_" in name:
        return _held_adapter(worker, name)
    model = worker.model_runner.get_model()
    # Duplicates too: in older vLLM a tied head is the embedding itself.
    named = model.named_modules(remove_duplicate=False)
    modules = {path.replace(".base_layer", ""): module for path, module in named}
    module_name, _, attribute = _vllm_name(model, name).rpartition(".")
    embedding = getattr(modules.get(module_name), "weight", None)
    head = modules.get("lm_head")
    if head is not None and _tied(head, modules):
        if module_name == "lm_head":
            return [_matrix(head)]
        if embedding is not None and embedding is head.weight:
            return [embedding, _matrix(head)]
    return _part(modules, module_name, attribute, model)


def _part(modules: dict[str, nn.Module], module_name: str, attribute: str, model: nn.Module) -> list[torch.Tensor]:
    """A tensor of its own, or its rows of the matrix that it was packed into."""
    index = 0
    module = modules.get(module_name)
    packed = module is None
    if packed:
        module, index = _packed(modules, module_name, getattr(model, "packed_modules_mapping", {}))
    if module is None:
        return []
    whole = _matrix(module) if attribute == "weight" else getattr(module, attribute, None)
    if whole is None or not whole.dtype.is_floating_point or whole.element_size() == 1:
        return []  # quantised: what was received is all that can be compared
    if not packed:
        return [whole]
    sizes = getattr(module, "output_partition_sizes", None)
    if not sizes or sum(sizes) != len(whole):
        return []
    start = sum(sizes[:index])
    return [whole[start : start + sizes[index]]]


def _packed(
    modules: dict[str, nn.Module], name: str, packing: Mapping[str, Sequence[str]]
) -> tuple[nn.Module | None, int]:
    """The module that a module of the learner was packed into, and its place there."""
    path, _, last = name.rpartition(".")
    for together, parts in packing.items():
        if last in parts and f"{path}.{together}" in modules:
            return modules[f"{path}.{together}"], list(parts).index(last)
    return None, 0


def _matrix(module: nn.Module) -> torch.Tensor:
    """A module's weight as it computes with it.

    On a CPU vLLM packs linear weights and drops the plain ones. Products with the unit vectors give the packed ones
    back, exactly: every sum has one term that is not zero.
    """
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    product = getattr(module, "cpu_linear", None)
    columns = getattr(module, "input_size_per_partition", getattr(module, "embedding_dim", 0))
    if product is None or not columns:
        return weight
    unit = torch.eye(columns, dtype=weight.dtype)
    starts = range(0, columns, _PROBE_ROWS)
    return torch.cat([product(unit[start : start + _PROBE_ROWS], weight, None).T for start in starts], dim=1)


def _tied(head: nn.Module, modules: dict[str, nn.Module]) -> bool:
    return any(head.weight is getattr(other, "weight", None) for path, other in modules.items() if path != "lm_head")


def _held_adapter(worker: Any, name: str) -> list[torch.Tensor]:
    """One matrix of the adapter, from the stack that the engine computes with (zeros pad its rank)."""
    manager = worker.model_runner.lora_manager._adapter_manager
    module_name, first = _adapter_module(name, _renames(manager.model))
    index, module = 0, manager.modules.get(module_name)
    if module is None:
        module, index = _packed(manager.modules, module_name, manager.packed_modules_mapping)
    stacks = getattr(module, "lora_a_stacked" if first else "lora_b_stacked", None)
    if stacks is None or ADAPTER not in manager.lora_index_to_id:
        return []
    stacks = stacks if isinstance(stacks, tuple | list) else [stacks]
    return [stacks[index][manager.lora_index_to_id.index(ADAPTER)]]


def _adapter_module(name: str, mapper: Any) -> tuple[str, bool]:
    """vLLM's name of the module that an adapter's tensor belongs to, and whether it is its A."""
    from vllm.lora.utils import parse_fine_tuned_lora_name

    module, first = parse_fine_tuned_lora_name(name, mapper)
    return str(module), bool(first)


def _renames(model: nn.Module) -> Any:
    """What maps the learner's names to vLLM's, packing aside; None: they are the same."""
    mapper: Any = getattr(model, "hf_to_vllm_mapper", None)
    for name in ("get_rename_mapper", "get_unstacked_mapper"):  # from vLLM 0.27 or so on, and before
        if hasattr(mapper, name):
            return getattr(mapper, name)()
    return mapper


def _vllm_name(model: nn.Module, name: str) -> str:
    mapper = _renames(model)
    return next(iter(mapper.apply_list([name])), name) if mapper is not None else name
