"""A driver whose episodes agents play: the environment gives the task and scores what came of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np

from llm_gym.concurrency import cancelled
from llm_gym.core import Completion, Ids, Sampling, StopReason
from llm_gym.errors import FAULTS, BadReply, SettingError, described
from llm_gym.policies import TextPolicy
from llm_gym.rollouts.driver import Driver, EpisodeState, Job
from llm_gym.rollouts.env_pool import EnvSlot
from llm_gym.serving.agents import Agent, AgentError, Found
from llm_gym.serving.chat import ChatDoor
from llm_gym.serving.chat_sessions import ChatLimits, ChatSession

TIME_LIMIT = 600.0
"""Seconds that an agent may take where the run sets no limit: one that hangs must end."""
MAX_TURNS = 256
"""Completions of an agent where the environment sets no limit."""


class AgentDriver(Driver):
    """Plays episodes by letting an agent ask a chat endpoint; the other arguments are those of `Driver`.

    The environment is reset, and its row is the agent's task. What the agent returns is the reward; a text, or (None)
    its last reply, is scored by the environment as the first reply it hears. An agent that raises fails the episode,
    unless it had run into a limit of tokens or turns, or raises `BadReply`: then it earns 0.

    Args:
        agent: makes the agent, when the first episode begins.
    """

    def __init__(self, *args: Any, agent: Callable[[], Agent], time_limit: float | None = None, **options: Any) -> None:
        super().__init__(*args, time_limit=time_limit or TIME_LIMIT, **options)
        if isinstance(self.policy, TextPolicy):
            raise SettingError("agent: it needs a policy that samples token ids; an OpenAI endpoint gives text only.")
        self._make_agent = agent
        self._at_work: tuple[Agent, ChatDoor] | None = None

    def close(self) -> None:
        """Ends the agent, the endpoint and every environment."""
        at_work, self._at_work = self._at_work, None
        for each in at_work or ():
            each.close()
        super().close()

    async def play(self, job: Job, state: EpisodeState) -> None:
        """Reset, then the agent, until it returns."""
        slot = state.slot
        assert slot is not None
        options = {} if job.row is None else {"options": {"task": job.row}}
        _, info = await slot.call(slot.reset, seed=job.seed, **options)
        agent, door = self._begun()
        under_way = set[Future[Completion]]()
        session = self._session(job, slot, under_way)
        endpoint = door.open(session)
        try:
            found = await agent.solve(_task(slot, info), endpoint)
            _raise_setting(session)
        except asyncio.CancelledError as error:
            if cancelled():
                raise
            raise AgentError("agent: it was cancelled, and not by its driver.") from error
        except FAULTS as error:
            self._gone_wrong(error, session, slot, state)
            return
        finally:
            door.leave(endpoint)
            for future in list(under_way):  # of another thread, which may be adding one
                future.cancel()
            state.builder, state.messages = session.builder(), session.messages
        if session.last is None:
            raise AgentError("agent: it ended without asking for a completion.")
        reward = await self._scored(found, session.last, slot, job, state)
        state.builder = session.builder(reward)

    def _begun(self) -> tuple[Agent, ChatDoor]:
        if self._at_work is None:
            self._at_work = self._make_agent(), ChatDoor()
        return self._at_work

    def _session(self, job: Job, slot: EnvSlot, under_way: set[Future[Completion]]) -> ChatSession:
        """An agent's session; its completions are sampled in this loop, whichever thread asks for them."""
        loop, env = asyncio.get_running_loop(), slot.env.unwrapped
        chat = getattr(env, "chat", None)
        if chat is None:
            raise SettingError(f"agent: {self._pool.env_id} has no chat template that its endpoint could use.")

        ask: Callable[..., Coroutine[Any, Any, Completion]] = self.policy.complete  # type: ignore[union-attr]

        async def complete(context: Ids, sampling: Sampling, seed: int) -> Completion:
            future = asyncio.run_coroutine_threadsafe(ask(context, sampling, seed=seed), loop)
            under_way.add(future)
            return await asyncio.wrap_future(future)

        within = self._sampling(job.sampling, slot.env, np.zeros(0, np.int32))
        limits = ChatLimits(
            replace(within, stop_token_ids=job.sampling.stop_token_ids),  # else those of each request's own chat
            getattr(env, "max_context", 1 << 30),
            getattr(env, "max_turns", None) or MAX_TURNS,
        )
        return ChatSession(chat.tokenizer, complete, limits, seed=job.request_seed(0), stop_ids=self.able.stop_ids)

    def _gone_wrong(self, error: BaseException, session: ChatSession, slot: EnvSlot, state: EpisodeState) -> None:
        """An agent that raised; re-raises what fails the episode."""
        if session.failure:
            state.asking = True
            raise session.failure[0]
        if not isinstance(error, BadReply) and session.ended is None:
            raise error
        state.stop_reason = session.ended or StopReason.BAD_REPLY
        state.error = described(error)
        names = getattr(slot.env.unwrapped, "reward_names", None) or ("reward",)
        state.rewards = dict.fromkeys(names, 0.0)

    async def _scored(self, found: Found, last: Completion, slot: EnvSlot, job: Job, state: EpisodeState) -> float:
        """The episode's return; its components and its end go into `state`."""
        env = slot.env.unwrapped
        state.stop_reason = StopReason.ANSWERED
        if found is None or isinstance(found, str):
            tokens = last.tokens if found is None else env.chat.encode_reply(found)  # type: ignore[attr-defined]
            _, reward, terminated, _, info = await slot.call(slot.step, tokens)
            state.error = info.get("error")
            earned = self._reward("reward", reward, job)
            parts = info.get("rewards", {"reward": earned})
            state.stop_reason = info.get("stop_reason", StopReason.ANSWERED if terminated else StopReason.TURN_LIMIT)
        else:
            parts = found if isinstance(found, Mapping) else {"reward": found}
            weights = getattr(env, "reward_weights", {})
            weighed = [weights.get(name, 1.0) * self._reward(name, value, job) for name, value in parts.items()]
            earned = self._reward("reward", sum(weighed), job)
        state.rewards = {name: self._reward(name, value, job) for name, value in parts.items()}
        return earned


def _raise_setting(session: ChatSession) -> None:
    """A setting that cannot work ends the run, whatever the agent made of the policy's refusal."""
    for error in session.failure:
        if isinstance(error, SettingError):
            raise error


def _task(slot: EnvSlot, info: Mapping[str, Any]) -> dict[str, Any]:
    """What an agent is given: the row, if there is one, and the environment's opening chat."""
    row = getattr(slot.env.unwrapped, "row", {})
    return {"messages": info.get("messages", []), **row}
