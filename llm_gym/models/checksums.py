"""Checksums of weights that survive packing and sharding, and what two sides that disagree differ in.

A checksum is the sum of a hash of every element's bits, modulo 2^53 (so that JSON keeps it exact). It does not
depend on the order of the elements, it adds up over the parts of a packed or sharded matrix, and zeros, such as
vLLM's padding of the vocabulary, add nothing. What it cannot see is a permutation; log-probabilities do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypedDict

import torch

_MODULUS = 1 << 53
_CHUNK = 1 << 20
"""Elements hashed at a time; each takes 8 bytes meanwhile."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MIX1, _MIX2 = 0x7F51AFD7ED558CCD, 0x44CEB9FE1A85EC53  # odd; those of MurmurHash3, cut to what int64 holds


class Report(TypedDict):
    """What one worker of an engine says about its weights; every name is the learner's."""

    received: dict[str, int]
    """Checksum of each tensor as it arrived with the last update; empty for weights never updated."""
    held: dict[str, list[int]]
    """Checksums of what the engine computes with, wherever it is readable: one for each place that holds the
    tensor (a tied embedding has two), of this worker's shard."""
    meant: dict[str, int]
    """What `held` must add up to, where that is not the tensor itself (LoRA B is held scaled)."""
    together: list[list[str]]
    """Tensors that are held as one (two matrices of an expert): `held` of each is what all of them add up to."""


def checksum(tensor: torch.Tensor) -> int:
    """The checksum of a tensor of any shape, in [0, 2^53): the sum of the hashes of its elements' bits.

    The hash is the finaliser of MurmurHash3 (https://github.com/aappleby/smhasher) with signed shifts; it maps
    0 to 0, and -0.0 counts as 0.0. Tensors of different dtypes have unrelated checksums.
    """
    flat = tensor.detach().reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(flat), _CHUNK):
        part = flat[start : start + _CHUNK]
        if part.dtype.is_floating_point and part.element_size() > 1:
            part = part + 0.0  # a zero's sign is lost where a weight is read back through a product
        bits = part.contiguous().view(_INTEGERS[part.element_size()]).to(torch.int64)
        bits = (bits ^ (bits >> 33)) * _MIX1
        bits = (bits ^ (bits >> 33)) * _MIX2
        total += (bits ^ (bits >> 33)).sum()  # wraps at 2^64, a multiple of the modulus
    return int(total) % _MODULUS


def checksums(tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> dict[str, int]:
    """The checksum of every named tensor in the dtype that the engine holds it in."""
    return {name: checksum(tensor.detach().to(dtype)) for name, tensor in tensors}


def recorded(
    tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype, into: dict[str, int]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors, one at a time; `into` gets the checksum in `dtype` of each that has passed."""
    for name, tensor in tensors:
        into[name] = checksum(tensor.detach().to(dtype))
        yield name, tensor


def differing(expected: Mapping[str, int], reports: Sequence[Report]) -> list[str]:
    """The tensors that an engine holds differently from the learner, in the learner's order.

    A tensor counts as equal if the workers' shards add up to it in every place that holds it. Where no place is
    readable (quantised weights), or the engine holds another form of it, every worker must have received it so with
    the last update. An engine that was never updated may hold what nobody can read, and is believed.

    Args:
        expected: the learner's checksums by name.
        reports: one of each worker.
    """
    groups = {name: group for report in reports for group in report["together"] for name in group}
    return [
        name
        for name, value in expected.items()
        if not _agrees(name, value, sum(expected.get(n, 0) for n in groups.get(name, [name])) % _MODULUS, reports)
    ]


def _agrees(name: str, expected: int, whole: int, reports: Sequence[Report]) -> bool:
    """`expected`: the tensor's checksum; `whole`: that of all that are held together with it."""
    meant = {report["meant"].get(name, whole) for report in reports}
    held = [report["held"][name] for report in reports if report["held"].get(name)]
    if held and not all(_adds_up(shards, want) for shards in zip(*held, strict=True) for want in meant):
        return False
    received = {report["received"].get(name) for report in reports}
    believed = not held and not any(report["received"] for report in reports)
    return received == {expected} or (bool(held) and meant == {whole}) or believed


def _adds_up(shards: Sequence[int], whole: int) -> bool:
    """Whether shards, or the distinct ones among them (every worker may hold the same), sum to the whole."""
    return whole in (sum(shards) % _MODULUS, sum(set(shards)) % _MODULUS)
