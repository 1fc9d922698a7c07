"""The episode driver: many episodes against one policy, none waiting for another's turn.

Each worker coroutine plays one episode after another: reset, then complete and step until the end. The
policy batches whatever happens to be waiting. A rollout that goes wrong is data: whatever an environment
or the policy raises ends that episode alone, and the episode keeps its place in its group.
"""

from __future__ import annotations

import asyncio
import hashlib
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llm_gym.concurrency import run_here
from llm_gym.core import Completion, Episode, Ids, Message, Sampling, StopReason
from llm_gym.errors import FAULTS, RewardError, SettingError, boundary, described
from llm_gym.policies import Abilities, Completer, TextPolicy
from llm_gym.rewards import finite
from llm_gym.rollouts.env_pool import Env, EnvPool, EnvSlot
from llm_gym.trajectories import TrajectoryBuilder

OnEpisode = Callable[[Episode], None]


def rollout(
    env: str | Callable[..., Env],
    policy: Completer | TextPolicy,
    *,
    seeds: Iterable[int],
    group_size: int = 1,
    sampling: Sampling | None = None,
    env_args: Mapping[str, Any] | None = None,
    seed: int = 0,
    max_concurrent: int | None = None,
    time_limit: float | None = None,
    on_episode: OnEpisode | None = None,
) -> list[Episode]:
    """Plays `group_size` episodes of each seed, and returns them all in seed-major order.

    >>> from llm_gym.policies.scripted import ScriptedPolicy
    >>> from llm_gym import load_chat
    >>> policy = ScriptedPolicy(["50", "25", "75"], load_chat())
    >>> episodes = rollout("llm_gym/GuessNumber-v0", policy, seeds=[1, 2], group_size=2, env_args={"max_turns": 3})
    >>> [(episode.seed, episode.member, len(episode.turns)) for episode in episodes]
    [(1, 0, 3), (1, 1, 3), (2, 0, 3), (2, 1, 3)]

    Args:
        env: an id, short or full, or a callable that makes an environment.
        policy: what completes the contexts.
        seeds: reset seeds; the episodes of one seed are a group.
        group_size: episodes per seed.
        sampling: how to draw; `max_tokens` is capped by the environment's limits. None: `Sampling()`.
        env_args: keyword arguments of the environment.
        seed: the run's seed; with (reset seed, member, turn) it fixes every completion's random stream.
        max_concurrent: most episodes under way at once; None: the policy's `max_rows`, or 128.
        time_limit: seconds an episode may take; then it ends with `time_limit`.
        on_episode: called with every episode as it ends.

    Returns:
        Always `len(seeds) * group_size` episodes; one that failed says so in `stop_reason` and `error`.

    Raises:
        SettingError: something every episode would run into: an unknown id, wrong arguments.
    """
    with Driver(
        env, policy, sampling=sampling, env_args=env_args, max_concurrent=max_concurrent, time_limit=time_limit
    ) as driver:
        return driver.run(seeds, group_size=group_size, seed=seed, on_episode=on_episode)


async def rollout_async(
    env: str | Callable[..., Env],
    policy: Completer | TextPolicy,
    *,
    seeds: Iterable[int],
    group_size: int = 1,
    seed: int = 0,
    on_episode: OnEpisode | None = None,
    **options: Any,
) -> list[Episode]:
    """`rollout` for callers inside an event loop, which stays free; `options` are those of `Driver`."""
    with Driver(env, policy, **options) as driver:
        return await driver.run_async(seeds, group_size=group_size, seed=seed, on_episode=on_episode)


class Driver:
    """Environments kept between rollouts, reused by `reset`; the arguments are those of `rollout`.

    >>> from llm_gym.policies.scripted import ScriptedPolicy
    >>> from llm_gym import load_chat
    >>> with Driver("llm_gym/GuessNumber-v0", ScriptedPolicy(["50"], load_chat()), env_args={"max_turns": 2}) as driver:
    ...     [len(driver.run(seeds)) for seeds in ([1, 2], [3])]
    [2, 1]

    `name` is what episodes call the environment; None: its id.
    """

    def __init__(
        self,
        env: str | Callable[..., Env],
        policy: Completer | TextPolicy,
        *,
        sampling: Sampling | None = None,
        env_args: Mapping[str, Any] | None = None,
        max_concurrent: int | None = None,
        time_limit: float | None = None,
        name: str | None = None,
    ) -> None:
        if max_concurrent is not None and max_concurrent < 1:
            raise SettingError(f"max_concurrent: got {max_concurrent}, want at least 1.")
        if time_limit is not None and not time_limit > 0:
            raise SettingError(f"time_limit: got {time_limit}, want seconds, more than 0.")
        self.policy, self.sampling, self.able = policy, sampling or Sampling(), Abilities.of(policy)
        self.max_concurrent = max_concurrent or self.able.max_rows
        self.time_limit = time_limit
        self._pool = EnvPool(env, env_args or {}, name)
        self._places = asyncio.Semaphore(self.max_concurrent)

    def run(
        self,
        seeds: Iterable[int],
        *,
        group_size: int = 1,
        seed: int = 0,
        sampling: Sampling | None = None,
        rows: Sequence[int | None] | None = None,
        on_episode: OnEpisode | None = None,
    ) -> list[Episode]:
        """Plays `group_size` episodes of each seed; see `rollout`.

        `sampling` replaces the driver's own; `rows` names the row of the environment's data for each seed.
        """
        return run_here(
            self.run_async(seeds, group_size=group_size, seed=seed, sampling=sampling, rows=rows, on_episode=on_episode)
        )

    async def run_async(
        self,
        seeds: Iterable[int],
        *,
        group_size: int = 1,
        seed: int = 0,
        sampling: Sampling | None = None,
        rows: Sequence[int | None] | None = None,
        on_episode: OnEpisode | None = None,
    ) -> list[Episode]:
        """`run` inside an event loop; cancelling it closes every environment."""
        every = list(seeds)
        tasks = zip(every, [None] * len(every) if rows is None else rows, strict=True)
        how = sampling or self.sampling
        jobs = [Job(int(s), member, seed, how, row) for s, row in tasks for member in range(group_size)]
        episodes: list[Episode | None] = [None] * len(jobs)
        queue = iter(enumerate(jobs))
        self.able.forget()
        try:
            async with asyncio.TaskGroup() as players:
                for _ in range(min(self.max_concurrent, len(jobs))):
                    players.create_task(self._work(queue, episodes, on_episode))
        except BaseExceptionGroup as failures:
            self.close()
            raise failures.exceptions[0] from None
        except BaseException:
            self.close()
            raise
        self.able.forget()
        return [episode for episode in episodes if episode is not None]

    async def play_group(
        self, seed: int, row: int | None = None, *, group_size: int, run_seed: int = 0, sampling: Sampling | None = None
    ) -> list[Episode]:
        """`group_size` episodes of one seed, beside others that were begun, in the order in which they were.

        Args:
            seed: the reset seed.
            row: the row of the environment's data; None: the seed decides.
            group_size: episodes.
            run_seed: with seed, member and turn it fixes every completion's random stream.
            sampling: in place of the driver's own.
        """
        how = sampling or self.sampling
        jobs = [Job(seed, member, run_seed, how, row) for member in range(group_size)]
        return list(await asyncio.gather(*(self._play_in_turn(job) for job in jobs)))

    async def _play_in_turn(self, job: Job) -> Episode:
        async with self._places:
            return await self._play(job)

    def close(self) -> None:
        """Closes every environment; the driver makes new ones if it is used again."""
        self._pool.close()

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def _work(
        self, queue: Iterator[tuple[int, Job]], episodes: list[Episode | None], on_episode: OnEpisode | None
    ) -> None:
        for index, job in queue:
            episode = episodes[index] = await self._play(job)
            if on_episode is not None:
                on_episode(episode)

    async def _play(self, job: Job) -> Episode:
        """One episode, however it ends."""
        began = time.perf_counter()
        state = EpisodeState()
        clock = asyncio.timeout(self.time_limit)
        try:
            async with clock:
                state.slot = await self._pool.take()
                await self.play(job, state)
        except FAULTS as error:
            if isinstance(error, TimeoutError) and clock.expired():
                state.stop_reason = StopReason.TIME_LIMIT
            else:
                state.stop_reason = boundary(error, policy=state.asking)
                state.error = described(error)
        if state.slot is not None:
            broken = state.stop_reason in (StopReason.ENV_ERROR, StopReason.TOOL_FAILURE)
            self._pool.leave(state.slot, broken=broken)
        return Episode(
            self._pool.env_id,
            job.seed,
            state.builder.build(),
            state.stop_reason,
            state.rewards,
            tuple(state.messages),
            job.member,
            state.error,
            time.perf_counter() - began,
            job.row,
        )

    async def play(self, job: Job, state: EpisodeState) -> None:
        """Reset, then complete and step until the environment says stop."""
        slot = state.slot
        assert slot is not None
        options = {} if job.row is None else {"options": {"task": job.row}}
        context, info = await slot.call(slot.reset, seed=job.seed, **options)
        done = False
        while not done:
            state.messages, state.error = info.get("messages", ()), info.get("error")
            prompt = np.array(context, np.int32)
            sampling = self._sampling(job.sampling, slot.env, prompt)
            state.asking = True
            request_seed = job.request_seed(state.builder.turns)
            if isinstance(self.policy, TextPolicy):
                completion = await self._reply(self.policy, slot.env, state.messages, sampling, request_seed)
            else:
                completion = await self.policy.complete(prompt, sampling, seed=request_seed)
            state.asking = False
            context, reward, terminated, truncated, info = await slot.call(slot.step, completion.tokens)
            earned = self._reward("reward", reward, job)
            state.builder.add(prompt, completion, earned, temperature=sampling.temperature)
            cut = completion.finish_reason == "length"
            done = terminated or truncated or cut
        state.messages, state.error = info.get("messages", ()), info.get("error")
        parts = info.get("rewards", {"reward": state.builder.reward})
        state.rewards = {name: self._reward(name, value, job) for name, value in parts.items()}
        state.stop_reason = _stop_reason(info, terminated, cut)

    def _reward(self, name: str, value: Any, job: Job) -> float:
        """What `step` gave as a reward, or as the component `name` of it.

        Raises:
            RewardError: it is no finite number, or its name no text.
        """
        if not isinstance(name, str):
            raise RewardError(f"{self._pool.env_id}: got the name {name!r:.80} of a reward, want a text.")
        number = finite(value)
        if number is None:
            raise RewardError(
                f"{self._pool.env_id}: {name!r} is {value!r:.80} at seed {job.seed}, want a finite number."
            )
        return number

    async def _reply(
        self, policy: TextPolicy, env: Env, messages: Iterable[Message], sampling: Sampling, seed: int
    ) -> Completion:
        chat = getattr(env.unwrapped, "chat", None)
        if chat is None:
            raise SettingError(f"policy: it reads chat messages only, and {self._pool.env_id} has none.")
        return await policy.reply(list(messages), chat, sampling, seed=seed)

    def _sampling(self, sampling: Sampling, env: Env, prompt: Ids) -> Sampling:
        """`sampling` within the environment's limits, ending at its chat's stop tokens and the model's own."""
        inner = env.unwrapped
        room = getattr(inner, "max_context", len(prompt) + sampling.max_tokens) - len(prompt)
        limit = min(sampling.max_tokens, getattr(inner, "max_tokens", sampling.max_tokens), max(room, 1))
        stops = sampling.stop_token_ids
        if stops is None and (chat := getattr(inner, "chat", None)) is not None:
            stops = tuple(sorted({*chat.stop_ids, *self.able.stop_ids}))
        return Sampling(sampling.temperature, limit, sampling.top_k, sampling.top_p, sampling.min_p, stops)


@dataclass(frozen=True, slots=True)
class Job:
    """One episode to play."""

    seed: int
    member: int
    run_seed: int
    sampling: Sampling
    row: int | None = None

    def request_seed(self, turn: int) -> int:
        """The random stream of a completion: a 64-bit hash, the same on every machine and in every process."""
        key = b"".join(struct.pack("<q", x & (1 << 63) - 1) for x in (self.run_seed, self.seed, self.member, turn))
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


@dataclass(slots=True)
class EpisodeState:
    """An episode while it is being played."""

    slot: EnvSlot | None = None
    builder: TrajectoryBuilder = field(default_factory=TrajectoryBuilder)
    messages: Iterable[Message] = ()
    rewards: Mapping[str, float] = field(default_factory=dict)
    stop_reason: StopReason = StopReason.CANCELLED
    error: str | None = None
    asking: bool = False
    """Whether the policy, not the environment, is at work."""


def _stop_reason(info: Mapping[str, Any], terminated: bool, cut: bool) -> StopReason:
    """Why the episode ended: a cut completion is never an answer, whatever the environment made of it."""
    if "stop_reason" in info:
        reason = StopReason(info["stop_reason"])
        return StopReason.TOKEN_LIMIT if cut and reason is StopReason.ANSWERED else reason
    if cut:
        return StopReason.TOKEN_LIMIT
    return StopReason.ANSWERED if terminated else StopReason.TURN_LIMIT
