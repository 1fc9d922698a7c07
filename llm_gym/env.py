"""`TextEnv`: a Gymnasium environment over token ids, written as two hooks of plain text.

Outside, `reset` and `step` speak token ids: an observation is the whole context, ready for the
policy's next token; an action is the completion that was sampled. Text is decoded for the hooks
and only new messages are encoded, so nothing the policy sampled is ever tokenised again.
"""

from __future__ import annotations

import operator
from collections.abc import Awaitable, Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded

from llm_gym.chat import Chat, load_chat, load_tokenizer
from llm_gym.concurrency import finish, is_async, wait
from llm_gym.core import Ids, Message, Messages, StopReason
from llm_gym.errors import BadReply, ConfigError, LLMGymError, RewardError, SettingError, check_counts, unknown
from llm_gym.rewards import checked_weights, finite
from llm_gym.spaces import Tokens


@dataclass(frozen=True, slots=True)
class Reply:
    """What an environment answers to one completion."""

    messages: Sequence[Message] = ()
    """New messages for the model (a tool's result, the next question); on the last step a closing word."""
    reward: float | Mapping[str, float] = 0.0
    """A finite number (the component `reward`), or named components, of this step alone."""
    done: bool = False
    """Whether the task is over."""
    stop_reason: StopReason | None = None
    """Why it is over, if not simply `answered`; giving one ends the episode."""
    rewrite: Messages | None = None
    """The whole chat from here on, if history is rewritten (thinking dropped, a summary); else None."""
    error: str = ""
    """What was wrong with the completion, for `info["error"]`; with the stop reason `bad_reply`."""


class TextEnv(gymnasium.Env[Ids, Ids]):
    """Base of text environments; subclasses write `open` and `reply`, each of which may be `async def`.

    >>> class Echo(TextEnv):
    ...     def open(self):  # draws only from self.np_random, so the seed fixes the task
    ...         self.word = str(self.np_random.choice(["one", "two"]))
    ...         return [{"role": "user", "content": f"Say {self.word}."}]
    ...
    ...     def reply(self, text):
    ...         return Reply(reward=float(self.word in text), done=True)
    >>> env = Echo()
    >>> context, info = env.reset(seed=7)
    >>> info["messages"]
    [{'role': 'user', 'content': 'Say two.'}]
    >>> _, reward, terminated, _, info = env.step(env.chat.encode_reply("two"))
    >>> reward, terminated, str(info["stop_reason"])
    (1.0, True, 'answered')

    Args:
        tokenizer: a path, a hub id or a tokenizer object; None: the embedded model's.
        chat_template: for a tokenizer without one, or in place of its own: `plain`, `chatml`, or a .jinja file.
        max_turns: most completions in an episode; None: as many as the context holds.
        max_tokens: most tokens in one completion.
        max_context: tokens of context; an episode ends when the next context would reach it.
        system_prompt: the system message of every episode, in place of one that `open` gives.
        reward_weights: component name -> weight in the reward; unnamed components weigh 1.
        render_mode: None or "ansi" (`render` returns the chat as text).

    Spaces: an action is int32 [1..max_tokens]; an observation is int32, at most `max_context`
    tokens while the episode lasts, and the last one also holds the last action.

    Raises:
        ConfigError: a limit below 1, an unknown render mode, or a weight for a component that
            `reward_names` does not list.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 1, "blocking": False}  # noqa: RUF012
    reward_names: ClassVar[tuple[str, ...] | None] = None
    """Names of every component the environment can give; None: not known in advance."""
    eval_args: ClassVar[Mapping[str, Any]] = {}
    """Keyword arguments that give the environment's unseen problems."""
    num_tasks: int | None = None
    """Rows of a data-backed environment, which `options={"task": i}` picks from; None: tasks are drawn."""
    task: int | None = None
    """The row asked for by `reset(options={"task": i})`, for `open` to honour; None: draw one."""
    row: Mapping[str, Any] = MappingProxyType({})
    """The row of data that the episode is about, which agents are given; `open` sets it where there are rows."""

    def __init__(
        self,
        *,
        tokenizer: Any = None,
        chat_template: str | Path | None = None,
        max_turns: int | None = None,
        max_tokens: int = 256,
        max_context: int = 4096,
        system_prompt: str | None = None,
        reward_weights: Mapping[str, float] | None = None,
        render_mode: str | None = None,
    ) -> None:
        check_counts({"max_turns": max_turns, "max_tokens": max_tokens, "max_context": max_context})
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ConfigError(unknown("render_mode", render_mode, self.metadata["render_modes"]))
        self.chat = self._load_chat(load_tokenizer(tokenizer, chat_template))
        self.max_turns, self.max_tokens, self.max_context = max_turns, max_tokens, max_context
        self.system_prompt, self.render_mode = system_prompt, render_mode
        self.reward_weights = checked_weights(reward_weights, self.reward_names)
        self.action_space = Tokens(self.chat.vocab_size, max_tokens, min_length=1)
        self.observation_space = Tokens(self.chat.vocab_size, max_context + max_tokens)
        self.parts: dict[str, float] = {}  # reward components of the last step, unweighted
        self._context: Ids | None = None
        self._messages: Messages = []
        self._rewards: dict[str, float] = {}
        self._turn = 0
        self._cut = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A `reply` of its own is what is awaited too, unless there is a `reply_async` beside it."""
        super().__init_subclass__(**kwargs)
        if "reply" in vars(cls) and "reply_async" not in vars(cls):
            cls.reply_async = TextEnv.reply_async  # type: ignore[method-assign]

    def open(self) -> Messages | Awaitable[Messages]:
        """The first messages of a new episode; every random draw comes from `self.np_random`."""
        raise NotImplementedError(f"{type(self).__name__} must define open().")

    def reply(self, text: str) -> Reply | Awaitable[Reply]:
        """What follows the completion `text`, of which only the final stop token was removed."""
        raise NotImplementedError(f"{type(self).__name__} must define reply().")

    async def reply_async(self, text: str) -> Reply:
        """`reply` as `step_async` awaits it; for kinds of environments that call further functions of a user's."""
        return await wait(self.reply(text))

    @property
    def asynchronous(self) -> bool:
        """Whether a driver should await `reset_async` and `step_async`: some hook is `async def`."""
        return is_async(self.open) or is_async(self.reply)

    @property
    def plain(self) -> Sequence[str]:
        """Names of functions that run in a thread of the environment's own when it is awaited."""
        return ()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Ids, dict[str, Any]]:
        """Starts an episode.

        Args:
            seed: fixes the task and everything random after it.
            options: `{"task": i}` picks row i.

        Returns:
            The first context, int32 [t], and `{"messages": ...}`.

        Raises:
            SettingError: an unknown option, or `open` gave no chat messages.
            LLMGymError: the first context leaves no room in `max_context`.
        """
        self._begin(seed, options)
        return self._opened(finish(self._hooked(self.open)))

    async def reset_async(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """`reset` for callers that await: while an `async def` hook waits, their event loop goes on."""
        self._begin(seed, options)
        return self._opened(await self._hooked_async(self.open))

    def _begin(self, seed: int | None, options: dict[str, Any] | None) -> None:
        """Forgets the last episode, and sets the random stream of the next."""
        super().reset(seed=None if seed is None else operator.index(seed))
        self.task = _task_option(options)
        self._context = None

    def _opened(self, messages: Messages) -> tuple[Ids, dict[str, Any]]:
        """The first context and info, of what `open` gave."""
        self._messages = self._checked(messages)
        if self.system_prompt is not None:
            rest = (
                self._messages[1:] if self._messages[:1] and self._messages[0]["role"] == "system" else self._messages
            )
            self._messages = [{"role": "system", "content": self.system_prompt}, *rest]
        context = self.chat.open(self._messages)
        if len(context) >= self.max_context:
            raise LLMGymError(
                f"max_context: the first context has {len(context)} tokens, the limit is {self.max_context}."
            )
        self._rewards, self._turn, self._context = {}, 0, context
        return context.copy(), self._info()

    def step(self, action: Ids) -> tuple[Ids, float, bool, bool, dict[str, Any]]:
        """Takes the sampled completion, int32 [n], its stop token included.

        Returns:
            The next context, this step's weighted reward, terminated, truncated, and the info:
            `messages`; `rewritten` where history was; on the last step `stop_reason` and `rewards`, and `error` of
            a reply that nothing could be made of.

        Raises:
            ResetNeeded: the episode is over, or none was started.
            SettingError: `reply` gave no `Reply`, or messages of another form.
            RewardError: it gave a reward that is no finite number.
        """
        action, text = self._heard(action)
        try:
            reply = finish(self.reply(text))
        except BadReply as error:
            reply = bad_reply(error, dict.fromkeys(self.reward_names or (), 0.0))
        return self._replied(action, reply)

    async def step_async(self, action: Ids) -> tuple[Ids, float, bool, bool, dict[str, Any]]:
        """`step` for callers that await: while an `async def` hook waits, their event loop goes on."""
        action, text = self._heard(action)
        try:
            reply = await self.reply_async(text)
        except BadReply as error:
            reply = bad_reply(error, dict.fromkeys(self.reward_names or (), 0.0))
        return self._replied(action, reply)

    def _heard(self, action: Ids) -> tuple[Ids, str]:
        """A completion as int32 ids, booked, and its text."""
        if self._context is None:
            raise ResetNeeded(f"{type(self).__name__}.step() was called before reset() or after the episode ended.")
        action = _ids(action)
        text = self.chat.text(action)
        self._messages.append({"role": "assistant", "content": text})
        self._turn += 1
        self._cut = int(action[-1]) not in self.chat.stop_ids and len(action) >= self._room()
        return action, text

    def _replied(self, action: Ids, reply: Reply) -> tuple[Ids, float, bool, bool, dict[str, Any]]:
        """What `step` returns, of what `reply` gave."""
        assert self._context is not None
        if not isinstance(reply, Reply):
            raise SettingError(f"{self._name()}: reply() returned {reply!r:.80}, want a Reply.")
        reward = self._add_rewards(reply.reward)
        self._messages.extend(self._checked(reply.messages))
        stop = self._stop_reason(reply)
        if stop is None:
            context, stop = self._extend(reply, action)
        if stop is None:
            self._context = context
            info = self._info()
            if reply.rewrite is not None:
                info["rewritten"] = True
            return context.copy(), reward, False, False, info
        final = np.concatenate([self._context, action])
        self._context = None
        info = {**self._info(), "stop_reason": stop, "rewards": dict(self._rewards)}
        if reply.error:
            info["error"] = reply.error
        return final, reward, stop.terminated, not stop.terminated, info

    def render(self) -> str | None:
        """The chat so far as text, for `render_mode="ansi"`."""
        if self.render_mode is None:
            return None
        return "\n".join(f"[{message['role']}] {message.get('content') or ''}" for message in self._messages)

    def draw_task(self, size: int) -> int:
        """The row this episode is about: the one asked for by `options`, else one drawn from `size` rows.

        Raises:
            SettingError: the row asked for does not exist.
        """
        if self.task is None:
            return int(self.np_random.integers(size))
        if not 0 <= self.task < size:
            raise SettingError(f"options['task']: got {self.task}, want a row from 0 to {size - 1}.")
        return self.task

    def _hooked(self, hook: Callable[..., Any], **arguments: Any) -> Any:
        """Calls one of the author's hooks, where a kind of environment wants it called."""
        return hook(**arguments)

    async def _hooked_async(self, hook: Callable[..., Any], **arguments: Any) -> Any:
        """The same, awaited."""
        return await wait(hook(**arguments))

    def _load_chat(self, tokenizer: Any) -> Chat:
        """The chat of this environment."""
        return load_chat(tokenizer)

    def _info(self) -> dict[str, Any]:
        """What every info holds."""
        return {"messages": self._copy_messages()}

    def _stop_reason(self, reply: Reply) -> StopReason | None:
        """Why the episode ends here, or None if it goes on."""
        if reply.stop_reason is not None and not (self._cut and reply.stop_reason == StopReason.BAD_REPLY):
            return StopReason(reply.stop_reason)
        if self._cut:
            return StopReason.TOKEN_LIMIT
        if reply.done:
            return StopReason.ANSWERED
        if self.max_turns is not None and self._turn >= self.max_turns:
            return StopReason.TURN_LIMIT
        return None

    def _room(self) -> int:
        """Most tokens that this completion could have had."""
        assert self._context is not None
        return min(self.max_tokens, self.max_context - len(self._context))

    def _extend(self, reply: Reply, action: Ids) -> tuple[Ids, StopReason | None]:
        """The next context, and `token_limit` if it does not fit."""
        assert self._context is not None
        if reply.rewrite is None:
            context = np.concatenate([self._context, action, self.chat.extend(action, list(reply.messages))])
        else:
            self._messages = self._checked(reply.rewrite)
            context = self.chat.open(self._messages)
        return context, StopReason.TOKEN_LIMIT if len(context) >= self.max_context else None

    def _add_rewards(self, reward: float | Mapping[str, float]) -> float:
        """Books the named components of one step and returns their weighted sum."""
        parts = reward if isinstance(reward, Mapping) else {"reward": reward}
        total, self.parts = 0.0, {}
        for name, value in parts.items():
            number = self.parts[name] = self._number(name, value)
            self._rewards[name] = self._rewards.get(name, 0.0) + number
            total += self.reward_weights.get(name, 1.0) * number
        return total

    def _number(self, name: object, value: object, giver: str = "") -> float:
        """A reward component as a float; `giver` is where it came from, for the text of the error.

        Raises:
            RewardError: it is no finite number.
        """
        number = finite(value) if isinstance(name, str) else None
        if number is not None:
            return number
        place = f"{name!r}{giver} is {value!r:.80} at {self._place()}"
        raise RewardError(f"{self._name()}: reward component {place}, want a finite number.")

    def _place(self) -> str:
        """Which episode this is, for the text of an error."""
        known = {"seed": self._np_random_seed, "task": self.task}
        return ", ".join(f"{name} {value}" for name, value in known.items() if value is not None)

    def _copy_messages(self) -> Messages:
        """The chat as data of the caller's own."""
        return [_copy(message) for message in self._messages]

    def _checked(self, messages: Sequence[Message]) -> Messages:
        """A hook's messages, copied.

        Raises:
            SettingError: they are no chat messages.
        """
        for message in messages:
            if not isinstance(message, Mapping) or "role" not in message:
                example = '{"role": "user", "content": "..."}'
                raise SettingError(f"{self._name()}: got {message!r:.80} among messages, want a form like {example}.")
        return [_copy(message) for message in messages]

    def _name(self) -> str:
        return self.spec.id if self.spec is not None else type(self).__name__


def bad_reply(error: BadReply, rewards: Mapping[str, float]) -> Reply:
    """What answers a completion that a scorer can make nothing of."""
    return Reply(reward=rewards, done=True, stop_reason=StopReason.BAD_REPLY, error=f"BadReply: {error}")


def _copy(message: Message) -> Message:
    """A message that shares nothing with the original; most hold only strings."""
    if all(type(value) is str for value in message.values()):
        return dict(message)
    return deepcopy(dict(message))


def _ids(action: Any) -> Ids:
    """An action as int32 [n].

    Raises:
        InvalidAction: it is empty or no 1-D array of integers.
    """
    array = np.asarray(action)
    if array.ndim != 1 or array.dtype.kind not in "iu" or len(array) == 0:
        raise gymnasium.error.InvalidAction(
            f"action: got an array of shape {array.shape} and dtype {array.dtype}, want token ids, int32 [n >= 1]."
        )
    return array.astype(np.int32, copy=False)


def _task_option(options: Mapping[str, Any] | None) -> int | None:
    """Row number in the reset options, if any."""
    if not options:
        return None
    for name in options:
        if name != "task":
            raise SettingError(unknown("options", name, ["task"]))
    return operator.index(options["task"])
