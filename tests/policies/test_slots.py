"""The rows of the cache: whatever is placed, continued and released, each row holds its own tokens."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_gym.policies.builtin.cache_slots import Slots
from llm_gym.policies.builtin.kv_cache import Layout, SlotCache

LAYOUT = Layout(2, 1, 1, 1, torch.float64, torch.device("cpu"))


def feed(slots, row, tokens):
    """Caches `tokens` for a row: a token is its own key in layer 0, its own value in layer 1."""
    start = int(slots.rows["filled"][row])
    positions = np.arange(start, start + len(tokens))[None]
    slots.cache.aim(np.array([row]), positions)
    states = torch.from_numpy(tokens.astype(np.float64)).view(1, 1, -1, 1)
    for layer in range(2):
        slots.cache.update(states, -states, layer)
    slots.known[row, start : start + len(tokens)] = tokens
    slots.rows["filled"][row] += len(tokens)


def held(slots, row):
    filled = int(slots.rows["filled"][row])
    keys = slots.cache.keys[:, row, 0, :filled, 0]
    assert torch.equal(keys, -slots.cache.values[:, row, 0, :filled, 0])
    assert torch.equal(keys[0], keys[1])
    return keys[0].numpy()


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_every_row_holds_its_own_tokens_through_any_history(data):
    slots = Slots(SlotCache(LAYOUT))
    slots.resize(4, 64)
    flying: list[np.ndarray] = []  # what each active row should hold
    past = [np.arange(30, dtype=np.int32)]
    for _ in range(data.draw(st.integers(1, 25))):
        move = data.draw(st.sampled_from(["place", "copy", "release", "grow", "forget"]))
        if move == "place" and slots.active < len(slots.rows):
            base = data.draw(st.sampled_from(past))[: data.draw(st.integers(0, 40))]
            own = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=10))
            context = np.concatenate([base, own]).astype(np.int32)[: slots.cache.length]
            row = slots.place(context)
            assert row == len(flying)
            assert slots.rows["filled"][row] < len(context)
            feed(slots, row, context[slots.rows["filled"][row] :])
            flying.append(context)
            past.append(context)
        elif move == "copy" and flying and slots.active < len(slots.rows):
            leader = data.draw(st.integers(0, len(flying) - 1))
            assert slots.place_copy(leader) == len(flying)
            flying.append(flying[leader])
        elif move == "release" and flying:
            row = data.draw(st.integers(0, len(flying) - 1))
            slots.release(row)
            flying[row] = flying[-1]
            flying.pop()
        elif move == "grow":
            slots.resize(
                len(slots.rows) + data.draw(st.integers(0, 2)), slots.cache.length + data.draw(st.integers(0, 9))
            )
        elif move == "forget":
            slots.forget()
        for row, tokens in enumerate(flying):
            assert np.array_equal(held(slots, row), tokens)
        for row in range(len(slots.rows)):  # idle rows too: what is said to be known is what is cached
            filled = int(slots.rows["filled"][row])
            assert np.array_equal(held(slots, row), slots.known[row, :filled])


def test_the_next_turn_continues_its_row_in_place():
    slots = Slots(SlotCache(LAYOUT))
    slots.resize(3, 32)
    first = np.arange(10, dtype=np.int32)
    feed(slots, slots.place(first), first)
    slots.release(0)
    row = slots.place(np.arange(15, dtype=np.int32))
    assert slots.rows["filled"][row] == 10


def test_the_row_used_longest_ago_is_given_up():
    slots = Slots(SlotCache(LAYOUT))
    slots.resize(2, 32)
    for start in (0, 100):
        context = np.arange(start, start + 5, dtype=np.int32)
        feed(slots, slots.place(context), context)
        slots.release(0)
    slots.place(np.arange(200, 205, dtype=np.int32))
    assert slots.known[1, 0] == 100
