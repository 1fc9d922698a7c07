"""What vLLM's workers hold of the learner's tensors: read back wherever it is packed, fused, tied or sharded.

Names are Hugging Face's (PEFT's for adapters), as in memory or as `save_pretrained` writes them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

ADAPTER = 1
"""The one LoRA id in use; every version of the adapter takes its place."""
_PROBE_ROWS = 256
_EXPERT = re.compile(r"(?P<layer>.*\.experts)\.(?:(?P<number>\d+)\.)?(?P<kind>\w+?)(?:[._](?P<leaf>weight|bias))?")
"""A tensor of one expert, or of all of a layer's."""
_FUSED = {
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj", "w1", "w3"), "w13"),
    **dict.fromkeys(("down_proj", "w2"), "w2"),
}
"""Part of an expert -> the matrix of all experts that vLLM has put it into."""


class Held:
    """The tensors that a worker computes with."""

    def __init__(self, worker: Any) -> None:
        self.model: nn.Module = worker.model_runner.get_model()
        # Duplicates too: in older vLLM a tied head is the embedding itself.
        named = self.model.named_modules(remove_duplicate=False)
        self.modules = {path.replace(".base_layer", ""): module for path, module in named}
        self.renames = renames(self.model)
        self.experts = {path: m for path, m in self.modules.items() if hasattr(m, "w13_weight")}
        self._loras = getattr(worker.model_runner, "lora_manager", None)

    def place(self, name: str) -> str:
        """Where a tensor is; those with one place are held as one, and only their sum can be compared."""
        expert = _EXPERT.fullmatch(self._vllm_name(name))
        if expert is None or expert["kind"] not in _FUSED or self._layer(expert) is None:
            return name
        return f"{expert['layer']}.{expert['number']}.{_FUSED[expert['kind']]}_{expert['leaf'] or 'weight'}"

    def parts(self, name: str) -> list[torch.Tensor]:
        """This worker's shard of what stands in a tensor's place, wherever it stands; none where it is unreadable."""
        if ".lora_" in name:
            return self._adapter(name)
        name = self._vllm_name(name)
        expert = _EXPERT.fullmatch(name)
        if expert is not None and (layer := self._layer(expert)) is not None:
            return _experts(layer, expert)
        module_name, _, attribute = name.rpartition(".")
        embedding = getattr(self.modules.get(module_name), "weight", None)
        head = self.modules.get("lm_head")
        if head is not None and self._tied(head):
            if module_name == "lm_head":
                return _readable(_matrix(head))
            if embedding is not None and embedding is head.weight:
                return [*_readable(embedding), *_readable(_matrix(head))]
        return self._part(module_name, attribute)

    def _vllm_name(self, name: str) -> str:
        return next(iter(self.renames.apply_list([name])), name) if self.renames is not None else name

    def _layer(self, expert: re.Match[str]) -> nn.Module | None:
        """The module that holds all experts of a layer."""
        path = expert["layer"]
        return next((self.experts[p] for p in (path, f"{path}.routed_experts") if p in self.experts), None)

    def _part(self, module_name: str, attribute: str) -> list[torch.Tensor]:
        """A tensor of its own, or its rows of the matrix that it was packed into."""
        index = 0
        module = self.modules.get(module_name)
        packed = module is None
        if packed:
            packing = getattr(self.model, "packed_modules_mapping", {})
            module, index = _packed(self.modules, module_name, packing)
        if module is None:
            return []
        found = _readable(_matrix(module) if attribute == "weight" else getattr(module, attribute, None))
        if not packed or not found:
            return found
        (whole,) = found
        sizes = getattr(module, "output_partition_sizes", None)
        if not sizes or sum(sizes) != len(whole):
            return []
        start = sum(sizes[:index])
        return [whole[start : start + sizes[index]]]

    def _tied(self, head: nn.Module) -> bool:
        others = (module for path, module in self.modules.items() if path != "lm_head")
        return any(head.weight is getattr(other, "weight", None) for other in others)

    def _adapter(self, name: str) -> list[torch.Tensor]:
        """One matrix of the adapter, from the stack that the engine computes with (zeros pad its rank)."""
        assert self._loras is not None
        manager = self._loras._adapter_manager
        module_name, first = adapter_module(name, renames(manager.model))
        index, module = 0, manager.modules.get(module_name)
        if module is None:
            module, index = _packed(manager.modules, module_name, manager.packed_modules_mapping)
        stacks = getattr(module, "lora_a_stacked" if first else "lora_b_stacked", None)
        if stacks is None or ADAPTER not in manager.lora_index_to_id:
            return []
        stacks = stacks if isinstance(stacks, tuple | list) else [stacks]
        return [stacks[index][manager.lora_index_to_id.index(ADAPTER)]]


def _experts(layer: nn.Module, expert: re.Match[str]) -> list[torch.Tensor]:
    """One expert's part of a matrix of all of them, or the whole; in what order it was packed does not matter."""
    if expert["kind"] not in _FUSED:
        return []
    found = _readable(getattr(layer, f"{_FUSED[expert['kind']]}_{expert['leaf'] or 'weight'}", None))
    if not found or expert["number"] is None:
        return found
    number, places = int(expert["number"]), getattr(layer, "_expert_map", None)
    local = number if places is None else int(places[number])
    return [found[0][local]] if 0 <= local < len(found[0]) else []


def _readable(tensor: Any) -> list[torch.Tensor]:
    """The tensor, unless it is quantised, gone or emptied (packed in a way that nobody here knows)."""
    if not isinstance(tensor, torch.Tensor) or not tensor.numel():
        return []
    return [tensor] if tensor.dtype.is_floating_point and tensor.element_size() > 1 else []


def _packed(
    modules: Mapping[str, nn.Module], name: str, packing: Mapping[str, Sequence[str]]
) -> tuple[nn.Module | None, int]:
    """The module that a module of the learner was packed into, and its place there."""
    path, _, last = name.rpartition(".")
    for together, parts in packing.items():
        if last in parts and f"{path}.{together}" in modules:
            return modules[f"{path}.{together}"], list(parts).index(last)
    return None, 0


def _matrix(module: nn.Module) -> Any:
    """A module's weight as it computes with it.

    On a CPU vLLM packs linear weights and drops the plain ones. Products with the unit vectors give the packed ones
    back, exactly: every sum has one term that is not zero.
    """
    weight = getattr(module, "weight", None)
    product = getattr(module, "cpu_linear", None)
    # Of a layer that is split, of one that every worker has whole, of an embedding.
    sizes = (getattr(module, n, 0) for n in ("input_size_per_partition", "input_size", "embedding_dim"))
    columns = next(filter(None, sizes), 0)
    if product is None or weight is None or not columns:
        return weight
    unit = torch.eye(columns, dtype=weight.dtype)
    starts = range(0, columns, _PROBE_ROWS)
    return torch.cat([product(unit[start : start + _PROBE_ROWS], weight, None).T for start in starts], dim=1)


def adapter_module(name: str, mapper: Any) -> tuple[str, bool]:
    """vLLM's name of the module that an adapter's tensor belongs to, and whether it is its A."""
    from vllm.lora.utils import parse_fine_tuned_lora_name

    module, first = parse_fine_tuned_lora_name(name, mapper)
    return str(module), bool(first)


def renames(model: nn.Module) -> Any:
    """What maps the learner's names to vLLM's, packing aside; None: they are the same."""
    mapper: Any = getattr(model, "hf_to_vllm_mapper", None)
    for name in ("get_rename_mapper", "get_unstacked_mapper"):  # from vLLM 0.27 or so on, and before
        if hasattr(mapper, name):
            return getattr(mapper, name)()
    return mapper
