"""Checksums add up, ignore order and padding, and see a single bit; shards and replicas are told apart from errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_gym.models.checksums import Report, checksum, checksums, differing

MODULUS = 1 << 53
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int8]


def values(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (20 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 30), columns=st.integers(1, 30), cut=st.integers(0, 30))
@settings(max_examples=20, deadline=None)
def test_parts_add_up_in_any_order_and_zeros_add_nothing(dtype, seed: int, rows: int, columns: int, cut: int) -> None:
    whole = values(seed, rows, columns, dtype=dtype)
    total = checksum(whole)
    assert 0 <= total < MODULUS
    assert (checksum(whole[:cut]) + checksum(whole[cut:])) % MODULUS == total
    assert (checksum(whole[:, :cut]) + checksum(whole[:, cut:])) % MODULUS == total
    assert checksum(whole.t()) == total
    assert checksum(torch.cat([whole, torch.zeros(5, columns, dtype=dtype)])) == total


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_bit_of_one_element_is_seen(dtype: torch.dtype) -> None:
    whole = values(0, 7, 11, dtype=dtype)
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[whole.element_size()]
    bits = whole.view(integers)
    seen = {checksum(whole)}
    for bit in range(8 * whole.element_size() - 1):
        bits[3, 4] ^= 1 << bit
        seen.add(checksum(whole))
        bits[3, 4] ^= 1 << bit
    assert len(seen) == 8 * whole.element_size()


def test_changes_that_cancel_in_a_plain_sum_are_seen() -> None:
    whole = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert checksum(whole) != checksum(torch.tensor([2.0, 1.0, 3.5, 3.5]))
    up, down = torch.nextafter(whole[0], torch.tensor(9.0)), torch.nextafter(whole[1], torch.tensor(-9.0))
    assert checksum(torch.stack([up, down])) != checksum(whole[:2])


def test_the_sign_of_zero_does_not_count() -> None:
    assert checksum(torch.tensor([-0.0, 1.0])) == checksum(torch.tensor([0.0, 1.0])) == checksum(torch.tensor([1.0]))


def test_a_tensor_longer_than_one_chunk_adds_up() -> None:
    whole = values(1, (1 << 20) + 12345, dtype=torch.bfloat16)
    assert checksum(whole) == (checksum(whole[:777]) + checksum(whole[777:])) % MODULUS


def test_learner_tensors_are_summed_in_the_dtype_of_the_engine() -> None:
    weight = values(2, 4, 4)
    assert checksums([("w", weight)], torch.bfloat16) == {"w": checksum(weight.bfloat16())}


def report(
    held: dict[str, list[int]], received: dict[str, int] | None = None, *together: list[str], **meant: int
) -> Report:
    return Report(received=received or {}, held=held, meant=meant, together=list(together))


def test_shards_sum_replicas_repeat_and_anything_else_differs() -> None:
    whole = values(3, 8, 4)
    total, first, rest = checksum(whole), checksum(whole[:3]), checksum(whole[3:])
    expected = {"w": total}
    assert differing(expected, [report({"w": [total]})]) == []
    assert differing(expected, [report({"w": [first]}), report({"w": [rest]})]) == []
    assert differing(expected, [report({"w": [total]}), report({"w": [total]})]) == []
    # Two key-value heads over four workers: every head is on two of them.
    assert differing(expected, [report({"w": [part]}) for part in (first, first, rest, rest)]) == []
    assert differing(expected, [report({"w": [first]}), report({"w": [rest + 1]})]) == ["w"]
    assert differing(expected, [report({"w": [total]}), report({"w": [total + 1]})]) == ["w"]


def test_every_place_that_holds_a_tensor_counts() -> None:
    assert differing({"embedding": 5}, [report({"embedding": [5, 5]})]) == []
    assert differing({"embedding": 5}, [report({"embedding": [5, 6]})]) == ["embedding"]


def test_what_is_not_readable_must_have_been_received_and_what_is_neither_differs() -> None:
    assert differing({"w": 5}, [report({"w": []}, {"w": 5})]) == []
    assert differing({"w": 5}, [report({"w": []}, {"w": 4})]) == ["w"]
    assert differing({"w": 5}, [report({"w": []}, {"other": 1})]) == ["w"]
    assert differing({"w": 5}, [report({"w": []}, {"w": 5}), report({"w": []})]) == ["w"]
    assert differing({"w": 5}, [report({"w": [5]}, {"w": 4})]) == []  # an older update's; what is held decides


def test_what_was_never_updated_and_cannot_be_read_does_not_differ() -> None:
    assert differing({"w": 5}, [report({"w": []})]) == []
    assert differing({"w": 5, "v": 6}, [report({"w": [], "v": [7]})]) == ["v"]


def test_tensors_that_are_held_as_one_must_add_up() -> None:
    """An expert's two matrices in one: their order there does not matter, what they hold does."""
    gate, up = values(4, 3, 4), values(5, 3, 4)
    expected = checksums([("gate", gate), ("up", up)], torch.float32)
    fused, names = checksum(torch.cat([up, gate])), ["gate", "up"]
    sums = {"gate": [fused], "up": [fused]}
    assert differing(expected, [report(sums, dict(expected), names)]) == []
    assert differing(expected, [report(sums, {}, names)]) == []
    assert differing(expected, [report(sums, {"gate": expected["gate"], "up": 1}, names)]) == []  # an older update's
    assert differing(expected, [report({n: [fused + 1] for n in names}, dict(expected), names)]) == names
    halves = [checksum(torch.cat([gate[:2], up[:2]])), checksum(torch.cat([gate[2:], up[2:]]))]
    assert differing(expected, [report({n: [half] for n in names}, {}, names) for half in halves]) == []


def test_a_tensor_held_in_another_form_must_be_received_and_held_right() -> None:
    assert differing({"b": 5}, [report({"b": [10]}, {"b": 5}, b=10)]) == []
    assert differing({"b": 5}, [report({"b": [11]}, {"b": 5}, b=10)]) == ["b"]
    assert differing({"b": 6}, [report({"b": [10]}, {"b": 5}, b=10)]) == ["b"]
