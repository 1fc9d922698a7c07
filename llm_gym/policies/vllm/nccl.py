"""The trainer's end of vLLM's own transfer of weights over NCCL. It needs CUDA, and has not been run by us."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from llm_gym.errors import SettingError


class NCCLSender:
    """A `vllm_server.broadcast.Sender` on the current CUDA device: rank 0 of vLLM's group, all others receive.

    Raises:
        SettingError: there is no CUDA device.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise SettingError("policy.sync: 'nccl' sends from a CUDA device, and there is none; use 'file'.")
        self._device = torch.cuda.current_device()
        self._group: Any = None

    def join(self, address: str, port: int, size: int) -> None:
        """Waits until all others have come."""
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        torch.cuda.set_device(self._device)  # of this thread
        self._group = trainer_init({"master_address": address, "master_port": port, "world_size": size})

    def send(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Waits until all others have received."""
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        packed_nccl_broadcast_producer(iter(tensors), self._group, src=0, post_iter_func=lambda pair: pair[1])
