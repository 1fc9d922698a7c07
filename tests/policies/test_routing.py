"""Routing: affinity within bounds of load, whatever the loads and caches are."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llm_gym.policies.vllm_server.routing import BLOCK, Prefixes, busy, choose, pieces

servers = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 64)), min_size=1, max_size=8)


@given(servers)
def test_no_clearly_busier_server_is_chosen(state: list[tuple[int, int]]) -> None:
    loads, cached = zip(*state, strict=True)
    assert loads[choose(loads, cached)] <= busy(min(loads))


@given(servers)
def test_nothing_better_was_passed_over(state: list[tuple[int, int]]) -> None:
    loads, cached = zip(*state, strict=True)
    chosen = choose(loads, cached)
    for load, tokens in state:
        if load <= busy(min(loads)):
            assert (tokens, -load) <= (cached[chosen], -loads[chosen])


@given(st.lists(st.integers(0, 200), min_size=1, max_size=8))
def test_without_caches_the_least_loaded_is_chosen(loads: list[int]) -> None:
    assert loads[choose(loads, [0] * len(loads))] == min(loads)


@given(servers, st.randoms())
def test_the_order_of_the_servers_changes_only_ties(state: list[tuple[int, int]], random: object) -> None:
    mixed = list(state)
    random.shuffle(mixed)  # type: ignore[attr-defined]
    picked = [s[choose(*zip(*s, strict=True))] for s in (state, mixed)]
    assert picked[0] == picked[1]


@given(st.lists(st.integers(0, 15), min_size=1, max_size=200), st.integers(2, 5))
def test_loads_stay_together_however_the_contexts_repeat(contexts: list[int], count: int) -> None:
    """Requests that never end, from 16 repeating contexts: affinity alone must not fill one server."""
    known = [Prefixes() for _ in range(count)]
    loads = [0] * count
    for number in contexts:
        keys = pieces(np.full(2 * BLOCK, number, np.int32))
        chosen = choose(loads, [p.cached(keys) for p in known])
        known[chosen].add(keys)
        loads[chosen] += 1
        assert max(loads) <= busy(min(loads)) + 1


@given(st.lists(st.integers(0, 2**31 - 1), max_size=5 * BLOCK), st.lists(st.integers(0, 9), max_size=70))
def test_a_known_beginning_is_found_to_the_block(start: list[int], more: list[int]) -> None:
    known = Prefixes()
    known.add(pieces(np.array(start, np.int32)))
    context = np.array(start + more, np.int32)
    assert known.cached(pieces(context)) == len(start) // BLOCK * BLOCK
    known.clear()
    assert known.cached(pieces(context)) == 0


def test_another_first_token_shares_nothing() -> None:
    known, context = Prefixes(), np.arange(4 * BLOCK, dtype=np.int32)
    known.add(pieces(context))
    context[0] = 7
    assert known.cached(pieces(context)) == 0


def test_the_oldest_are_forgotten() -> None:
    known = Prefixes(capacity=3)
    old, new = (np.full(3 * BLOCK, token, np.int32) for token in (1, 2))
    known.add(pieces(old))
    known.add(pieces(new))
    assert (known.cached(pieces(old)), known.cached(pieces(new))) == (0, 3 * BLOCK)
