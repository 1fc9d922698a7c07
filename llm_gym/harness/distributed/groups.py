"""Groups among ranks: the tokens of an episode stay with the rank that played it; the others know its outline.

What rewards, baselines, filters and denominators need of a group (lengths, rewards, versions, its end) is in the
outline, and every rank has those of the whole step. Tokens leave their rank once, on the way to the run folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby

from llm_gym.core import Episode, Group
from llm_gym.harness.distributed.world import World


def share_groups(world: World, played: Mapping[int, Group], what: str) -> dict[int, Group]:
    """The groups of all ranks, in the order of their numbers: those played here whole, the others as outlines.

    Args:
        world: the ranks.
        played: number -> group played here, whole.
        what: for errors: what is being done.
    """
    if world.size == 1:
        return dict(sorted(played.items()))
    mine = {n: _with(group, (replace(e, rank=world.rank) for e in group.episodes)) for n, group in played.items()}
    outlines = {n: _with(group, (e.outline() for e in group.episodes)) for n, group in mine.items()}
    told = {n: group for part in world.gather(outlines, what) for n, group in part.items()}
    return dict(sorted((told | mine).items()))


def own_groups(world: World, groups: Iterable[Group]) -> list[Group]:
    """Groups that every rank has whole, read from a file, as `share_groups` gave them to the ranks that played them.

    With fewer ranks than then, some take the place of several.
    """

    def here(episode: Episode) -> Episode:
        return episode if episode.rank % world.size == world.rank else episode.outline()

    return [_with(group, map(here, group.episodes)) for group in groups]


def whole_on_rank0(world: World, episodes: Iterable[Episode], what: str) -> Iterator[Episode]:
    """Episodes that are known everywhere, each whole and in order, on rank 0; none on the others.

    Every rank must go through it. Rank 0 holds the consecutive episodes of one rank at a time.
    """
    for rank, consecutive in groupby(episodes, key=lambda episode: episode.rank % world.size):
        some = list(consecutive)
        if rank != 0:
            some = world.send_to_rank0(some, rank, what)
        if world.rank == 0:
            yield from some


def _with(group: Group, episodes: Iterable[Episode]) -> Group:
    return replace(group, episodes=tuple(episodes))
