"""A model whose weights are split over the ranks: FSDP2, set up so that its gradients are plain sums.

https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html. Three things differ from its defaults:

* Gradients are summed over ranks, not averaged: the denominators are already in the weights of the micro-batches.
* The head's weight is read directly (`Backbone.head`), not through a forward of the head. So body and head run together
  inside one method of the model, which FSDP treats as its forward: all weights are whole while it lasts.
* After a pass without gradients nobody would split the outermost weights again; `gathered` does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from llm_gym.models.folding import whole as whole

T = TypeVar("T")


def shard(causal: Any, device: torch.device, size: int) -> None:
    """Splits every weight of a causal language model over all ranks, in place; adapters inside it too.

    Args:
        causal: the model, whole, on any device; the same on every rank.
        device: where the parts go.
        size: how many ranks there are.
    """
    mesh = init_device_mesh(device.type, (size,))
    blocks = set(getattr(causal, "_no_split_modules", None) or ())
    for module in causal.modules():
        if blocks & {cls.__name__ for cls in type(module).__mro__}:
            fully_shard(module, mesh=mesh)
    causal.gathered = _call
    fully_shard(causal, mesh=mesh)
    register_fsdp_forward_method(causal, "gathered")
    for module in causal.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # no premultiplied sums, which gloo does not have


def is_sharded(causal: nn.Module) -> bool:
    """Whether `shard` has been here."""
    return isinstance(causal, FSDPModule)


def gathered(causal: Any, compute: Callable[..., T], *args: Any) -> T:
    """`compute(*args)` while the weights of `causal` are whole; every rank must call it equally often.

    What it returns must hold the tensors that backward begins with.
    """
    if not is_sharded(causal):
        return compute(*args)
    result: T = causal.gathered(compute, *args)
    if not torch.is_grad_enabled():
        causal.reshard()
    return result


def _call(compute: Callable[..., T], *args: Any) -> T:
    return compute(*args)


def split_as(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor, if `like` is split; else the tensor."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, [Shard(0)], src_data_rank=None)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a split model with whole tensors on the CPU; weights that are tied stay one tensor."""
    seen: dict[int, Tensor] = {}
    every = dict(model.named_parameters(remove_duplicate=False))
    state = {}
    for name, value in model.state_dict().items():
        key = id(every.get(name, value))
        if key not in seen:
            seen[key] = whole(value).cpu()
        state[name] = seen[key]
    return state


# Steps that look at more than one element


class _WholeSteps(torch.optim.Optimizer):
    """Where parameters are split, gathers one after the other, with its gradient and state, steps it, and splits it.

    Every rank takes the same step, so it is that of one process to the last bit. State of the parameter's shape is
    split as the parameter is; the rest (a row, a column, scales of blocks) is small, and whole on every rank.
    """

    def step(self, closure: Any = None) -> Any:
        """As the optimizer's own."""
        groups = self.param_groups
        if not any(isinstance(p, DTensor) for group in groups for p in group["params"]):
            return super().step(closure)
        try:
            for group in groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step_one(group, parameter)
        finally:
            self.param_groups = groups
        split_state(self)
        return None

    @torch.no_grad()
    def _step_one(self, group: dict[str, Any], parameter: Tensor) -> None:
        assert parameter.grad is not None
        stand_in = nn.Parameter(whole(parameter))
        stand_in.grad = whole(parameter.grad)
        self.state[stand_in] = {name: whole(value) for name, value in self.state.pop(parameter, {}).items()}
        self.param_groups = [{**group, "params": [stand_in]}]
        super().step(None)
        parameter.copy_(split_as(stand_in, parameter))
        self.state[parameter] = self.state.pop(stand_in)


def whole_steps(optimizer: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """The same class, of an optimizer that looks at whole tensors, whose steps are right on split ones too."""
    return type(optimizer.__name__, (_WholeSteps, optimizer), {})


# On disk


def save_parts(learner: Any, folder: Path) -> None:
    """Writes the learner's state but its weights, each process its part."""
    save(_state(learner), checkpoint_id=folder)


def load_parts(learner: Any, folder: Path) -> None:
    """Reads what `save_parts` wrote, however many processes wrote it, and however many read it."""
    state = _state(learner)
    load(state, checkpoint_id=folder)
    learner.step_count = state["step"]
    set_optimizer_state_dict(learner.model, learner.optimizers, state["optimizers"])


def read_parts(folder: Path) -> dict[str, Any]:
    """What `save_parts` wrote, whole, without a learner; one process may ask."""
    with TemporaryDirectory() as scratch:
        dcp_to_torch_save(folder, whole := Path(scratch) / "whole.pt")
        state: dict[str, Any] = torch.load(whole, weights_only=True)
    return state


def _state(learner: Any) -> dict[str, Any]:
    """The step count, and the optimizers' states by parameter names, the same for a whole and for a split model."""
    return {"step": learner.step_count, "optimizers": get_optimizer_state_dict(learner.model, learner.optimizers)}


def split_state(optimizer: torch.optim.Optimizer) -> None:
    """Splits the tensors of a whole optimizer state, just loaded, as their parameters are."""
    for parameter, state in optimizer.state.items():
        if isinstance(parameter, DTensor):
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[name] = split_as(value, parameter)
