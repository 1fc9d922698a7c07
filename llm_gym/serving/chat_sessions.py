"""What an agent has said and heard: every sampled token of its chats, in trajectories that are continued exactly.

A chat that comes in is matched with the longest one that was answered before, by what its messages say. Where it goes
on from that, the tokens that were sampled stay as they are and only what is new is encoded (`Chat.extend`). Any other
chat (edited, summarised, of another sub-agent) is opened anew, and becomes a branch of the same episode.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import Any

import numpy as np

from llm_gym.chat import Chat, load_chat
from llm_gym.core import Completion, Ids, Message, Sampling, StopReason, Trajectory, common_prefix
from llm_gym.envs.tools.parsers import formats
from llm_gym.envs.tools.parsers.calls import ToolCall, open_thinking
from llm_gym.envs.tools.parsers.formats import Format
from llm_gym.errors import FAULTS, SettingError, TemplateError, described
from llm_gym.serving.chat_replies import Answer, cut, said
from llm_gym.serving.chat_requests import ChatRequest, Refused, link
from llm_gym.trajectories import TrajectoryBuilder

Complete = Callable[[Ids, Sampling, int], Awaitable[Completion]]
"""(context, how to draw, seed) -> a completion."""
ANSWERS = frozenset({"system", "user", "tool"})
"""Roles of messages that may follow a reply which is continued."""
TAIL = 16
"""Tokens at a context's end that show whether it ends inside thinking."""


@dataclass(frozen=True, slots=True)
class ChatLimits:
    """How an agent's completions are drawn, and how many."""

    sampling: Sampling
    """A request's own limit may be lower; what else it asks of the sampling is ignored."""
    max_context: int
    """Most tokens of context and completion together."""
    max_turns: int = 256
    """Completions in a session."""


@dataclass(slots=True, eq=False)
class _Reply:
    """A completion that was given out."""

    prompt: Ids
    completion: Completion
    chat: bytes
    """Digest of the chat up to and with it."""
    messages: Sequence[Message]
    """The chat, this reply included."""


class ChatSession:
    """One agent's chats; used inside one event loop.

    Args:
        tokenizer: of the policy.
        complete: asks the policy.
        limits: how it samples.
        seed: with the chat it fixes every completion's random stream, whatever else the agent asks meanwhile.
        stop_ids: ids that end a completion, beside the chat template's.
    """

    def __init__(
        self, tokenizer: Any, complete: Complete, limits: ChatLimits, *, seed: int = 0, stop_ids: Sequence[int] = ()
    ) -> None:
        self.limits, self.failure = limits, list[BaseException]()
        """What the policy raised."""
        self.ended: StopReason | None = None
        """The limit that a request ran into."""
        self.closed = False
        self._tokenizer, self._complete, self._seed, self._stop_ids = tokenizer, complete, seed, stop_ids
        self._replies: list[_Reply] = []
        self._asked: Counter[bytes] = Counter()
        self._under_way = 0

    async def answer(self, request: ChatRequest) -> tuple[Answer, _Reply]:
        """The policy's reply, recorded; `forget` it if it does not reach the client.

        Raises:
            Refused: the session is over, a limit is reached, or the chat template cannot say this.
        """
        self._check_open()
        replies = self._replies
        chat, form = self._chat_of(request)
        self._check_size(chat, request)
        links = request.links
        prompt = self._prompt(chat, request, links)
        forced = _forced(chat, form, request, prompt)
        context = np.concatenate([prompt, chat.encode_behind(forced, prompt)]) if forced else prompt
        sampling = self._sampling(chat, request, len(context))
        self._asked[links[-1]] += 1
        seed = self._request_seed(links[-1], self._asked[links[-1]])
        self._under_way += 1
        try:
            drawn = await self._complete(context, sampling, seed)
        except FAULTS as error:
            self.failure.append(error)
            raise Refused(f"The policy failed: {described(error)}", status=500) from error
        finally:
            self._under_way -= 1
        if self.closed:
            raise _over()
        completion, text = cut(chat, drawn, request.stop)
        message = said(form if request.calls else None, request, chat.text(prompt[-TAIL:]), forced + text)
        finish = "tool_calls" if message.get("tool_calls") else completion.finish_reason
        reply = _Reply(context, completion, link(links[-1], message), [*request.messages, message])
        replies.append(reply)
        return Answer(message, finish, len(context), len(completion.tokens)), reply

    def forget(self, reply: _Reply) -> None:
        """A reply that did not reach the agent: it is trained as little as it was heard."""
        if reply in self._replies and not self.closed:
            self._replies.remove(reply)

    def close(self) -> None:
        """Every later request is refused, and what is under way in the door's thread changes nothing any more."""
        self.closed, self._replies = True, list(self._replies)

    @property
    def busy(self) -> bool:
        """Whether a completion is being sampled."""
        return self._under_way > 0

    @property
    def turns(self) -> int:
        """Replies so far."""
        return len(self._replies)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The chat of the last reply."""
        return tuple(self._replies[-1].messages) if self._replies else ()

    @property
    def last(self) -> Completion | None:
        """The last reply."""
        return self._replies[-1].completion if self._replies else None

    def builder(self, reward: float = 0.0) -> TrajectoryBuilder:
        """The session as trajectories in the making; the last reply earns the reward."""
        made = TrajectoryBuilder()
        for i, reply in enumerate(self._replies, 1):
            earned = reward if i == len(self._replies) else 0.0
            made.add(reply.prompt, reply.completion, earned, temperature=self.limits.sampling.temperature)
        return made

    def trajectories(self, reward: float = 0.0) -> tuple[Trajectory, ...]:
        """The session as trajectories: every token once."""
        return self.builder(reward).build()

    # Inside

    def _check_open(self) -> None:
        if self.closed:
            raise _over()
        if self.turns + self._under_way >= self.limits.max_turns:
            self.ended = StopReason.TURN_LIMIT
            raise Refused(f"All {self.limits.max_turns} completions of this session are used.", code="turn_limit")

    def _check_size(self, chat: Chat, request: ChatRequest) -> None:
        """Refuses what no tokenisation could make short enough, for to tokenise it would hold up all other sessions."""
        characters = sum(len(message.get("content") or "") for message in request.messages)
        if characters > self.limits.max_context and characters > self.limits.max_context * _longest(chat.tokenizer):
            self._too_long(f"{characters} characters")

    def _too_long(self, length: str) -> None:
        self.ended = StopReason.TOKEN_LIMIT
        raise Refused(
            f"The chat has {length}, the limit is {self.limits.max_context} tokens with the reply.",
            param="messages",
            code="context_length_exceeded",
        )

    def _chat_of(self, request: ChatRequest) -> tuple[Chat, Format | None]:
        try:
            if request.tools:
                return formats.tool_chat(self._tokenizer, [dict(tool) for tool in request.tools])
            return load_chat(self._tokenizer), None
        except SettingError as error:
            raise Refused(str(error), param="tools") from error

    def _prompt(self, chat: Chat, request: ChatRequest, links: Sequence[bytes]) -> Ids:
        """The context of a chat: a recorded one that goes on, or one that is opened anew."""
        known = {reply.chat: reply for reply in reversed(self._replies)}
        for n in range(len(request.messages) - 1, 0, -1):
            new = request.messages[n:]
            if links[n] in known and all(message["role"] in ANSWERS for message in new):
                reply = known[links[n]]
                try:
                    more = chat.extend(reply.completion.tokens, list(new))
                except TemplateError:
                    break
                return np.concatenate([reply.prompt, reply.completion.tokens, more])
        try:
            return chat.open(request.messages)
        except TemplateError as error:
            raise Refused(str(error), param="messages") from error

    def _sampling(self, chat: Chat, request: ChatRequest, length: int) -> Sampling:
        how = self.limits.sampling
        room = self.limits.max_context - length
        if room < 1:
            self._too_long(f"{length} tokens")
        most = min(room, how.max_tokens, request.max_tokens or room)
        stops = how.stop_token_ids
        if stops is None:  # a reply that calls tools may end otherwise than others
            stops = tuple(sorted({*chat.stop_ids, *self._stop_ids}))
        return Sampling(how.temperature, most, how.top_k, how.top_p, how.min_p, stops)

    def _request_seed(self, chat: bytes, time: int) -> int:
        """The random stream of a completion: of the chat that it answers, the n-th time."""
        key = self._seed.to_bytes(8, "little") + chat + time.to_bytes(8, "little")
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


@lru_cache(maxsize=64)
def _longest(tokenizer: Any) -> int:
    """Characters of the longest token."""
    return max(map(len, tokenizer.get_vocab()), default=1)


def _over() -> Refused:
    return Refused("This session is over.", status=401, code="invalid_api_key")


def _forced(chat: Chat, form: Format | None, request: ChatRequest, prompt: Ids) -> str:
    """How a reply begins that must call a tool: it stands in the context, and is not trained.

    It is the tokens that calls of two names (or, where the tool is named or the only one, with and without an argument)
    share: what the model would have written of itself, which does not end inside one of its tokens. Where they share
    no token, it is the text.

    Raises:
        Refused: the format's calls have no beginning in common.
    """
    if request.forced is None or form is None:
        return ""
    name = request.forced or (request.tools[0]["function"]["name"] if len(request.tools) == 1 else "")
    if not form.native:  # code, and no names
        calls = ToolCall(name, {"a": "a"}), ToolCall(name, {"a": "b"})
    else:
        calls = (ToolCall(name), ToolCall(name, {"a": "a"})) if name else (ToolCall("one"), ToolCall("two"))
    texts = [form.notation.write([call]) for call in calls]
    shared = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False))]
    one, other = (chat.encode_behind(text, prompt) for text in texts)
    start = chat.text(one[: common_prefix(one, other)]) or "".join(shared)
    if not start:
        raise Refused("tool_choice: this model's calls have no beginning that could be forced.", param="tool_choice")
    closing = open_thinking(chat.text(prompt[-TAIL:]))
    return f"\n{closing}\n\n{start}" if closing else start
