"""Episodes by text: a `TextEnv` played without a tokenizer, in the messages of OpenEnv."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np

from llm_gym.chat import Chat
from llm_gym.core import Ids, Messages, StopReason
from llm_gym.env import TextEnv
from llm_gym.envs.tools.env import ToolEnv
from llm_gym.envs.tools.parsers import formats
from llm_gym.errors import ConfigError, SettingError, unknown
from llm_gym.rollouts.env_pool import EnvSlot
from llm_gym.spaces import Tokens

Data = dict[str, Any]
STOP, NOTHING, EMPTY = 0x110000, 0x110001, 0x110002
"""Ids beyond Unicode: the end of a reply, all that a context holds, and a reply that was cut before its first token."""
PROTOCOL = 1
"""Of what our own client and server tell each other beyond OpenEnv's messages."""
STEP = {
    "text": (str, "the reply's text"),
    "cut": (bool, "whether it was cut before its end; the environment then runs no tools, and the episode ends"),
    "thinking": (str, "the tag by which the prompt has begun the model's thinking"),
    "metadata": (dict, "not read"),
}
"""An action: field -> its type, and what it is."""
SEEN: dict[str, tuple[str, str]] = {
    "messages": ("array", "what is new in the chat, for the model to read"),
    "tools": ("array", "schemas of the tools, for the chat template; after a reset"),
    "tool_format": ("string", "how calls are written in a reply (docs/tools.md); after a reset"),
    "said": ("object", "the reply as it stands in the chat, where that is not simply its text"),
    "rewrite": ("array", "the whole chat from here on, where history is rewritten"),
    "parts": ("object", "named reward components of this step"),
    "rewards": ("object", "the same, summed over the episode so far"),
    "truncated": ("boolean", "whether the episode ended by a limit or a fault, not by itself"),
    "stop_reason": ("string", "why it ended; null while it goes on"),
    "error": ("string", "what was wrong with a reply that nothing could be made of"),
    "metadata": ("object", "stop_reason, truncated and rewards once more"),
}
"""An observation: field -> its JSON type, and what it is."""


class Problem(Exception):
    """A message that is answered with an error, of one of OpenEnv's codes."""

    def __init__(self, code: str, text: str, **more: Any) -> None:
        super().__init__(text)
        self.data: Data = {"message": text, "code": code, **more}


class Letters(Chat):
    """The chat of an environment that is played by text: a reply's ids are its characters, a context holds nothing."""

    def __init__(self) -> None:
        self.tools, self.wording, self.reads_parts = None, None, False
        self.vocab_size, self.stop_ids = EMPTY + 1, (STOP,)
        self.thinking = ""
        """What the client's prompt ends in."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Letters, ()

    def open(self, messages: Messages) -> Ids:
        """A context."""
        return np.array([NOTHING], np.int32)

    def extend(self, sampled: Any, messages: Messages) -> Ids:
        """The same."""
        return np.array([NOTHING], np.int32)

    def text(self, sampled: Any) -> str:
        """The characters of a reply; of a context, what it ends in."""
        ids = np.asarray(sampled, np.int32)
        if len(ids) and ids[-1] == NOTHING:
            return self.thinking
        return ids[ids < STOP].astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")

    def encode_reply(self, text: str, context: Any = None) -> Ids:
        """A reply's characters and its end."""
        ids = self.encode_behind(f"{text} ")
        ids[-1] = STOP
        return ids

    def encode_behind(self, text: str, context: Any = None) -> Ids:
        """A reply's characters, as of one that was cut."""
        ids = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<i4")
        return ids.astype(np.int32) if text else np.array([EMPTY], np.int32)


def by_text(env: gymnasium.Env[Any, Any]) -> Data:
    """Lets an environment be played by text, without limits of tokens; what a client of ours must know of it.

    Raises:
        ConfigError: it is no `TextEnv`.
    """
    inner = env.unwrapped
    if not isinstance(inner, TextEnv):
        name = env.spec.id if env.spec is not None else type(inner).__name__
        raise ConfigError(f"env: {name} has no hooks of text to be served; want a TextEnv, as `llmgym envs` lists.")
    told = {
        "protocol": PROTOCOL,
        "tools": [tool.schema for tool in inner.tools.values()] if isinstance(inner, ToolEnv) else [],
        "reward_names": inner.reward_names,
        "reward_weights": inner.reward_weights,
        "num_tasks": inner.num_tasks,
        "fixed_start": bool(env.metadata.get("fixed_start")),
        "limits": {"max_tokens": inner.max_tokens, "max_context": inner.max_context},
    }
    inner.chat, inner.max_tokens, inner.max_context = Letters(), 1, sys.maxsize
    inner.action_space = inner.observation_space = Tokens(EMPTY + 1, sys.maxsize)  # for wrappers that look
    return told


class Player:
    """One environment, played by messages of OpenEnv: `reset`, `step` and `state`, each with its data."""

    def __init__(self, slot: EnvSlot) -> None:
        self._slot = slot
        self._inner: Any = slot.env.unwrapped
        self._own_format: formats.Format | None = getattr(self._inner, "format", None)
        self._known = self._steps = 0
        self._episode: str | None = None
        self._rewards: dict[str, float] = {}
        self.over = "no episode has begun"
        """Why no step can be taken; empty: one can."""

    async def reset(self, data: Data) -> Data:
        """Begins an episode: `seed`, `task` (a row), `episode_id`, and `tool_format`; what else is given is not read.

        Raises:
            Problem: one of another type.
        """
        kinds = {"seed": int, "task": int, "episode_id": str, "tool_format": str}
        given = {name: _typed("reset", name, data[name], kinds[name]) for name in kinds if data.get(name) is not None}
        self._read_calls_as(given.get("tool_format"))
        self.over, self._steps, self._rewards = "the last reset failed", 0, {}
        self._episode = given.get("episode_id")
        options = {"options": {"task": given["task"]}} if "task" in given else {}
        _, info = await self._slot.call(self._slot.reset, seed=given.get("seed"), **options)
        self.over, self._known = "", len(info["messages"])
        shown: Data = {"messages": info["messages"]}
        if "tools" in info:
            shown |= {"tools": info["tools"], "tool_format": self._inner.format.name}
        return self._observed(shown, None, None)

    async def step(self, data: Data) -> Data:
        """Takes an action, `{"text": ...}`.

        Raises:
            Problem: it is none, or no episode is under way.
        """
        for name, value in data.items():
            if name not in STEP:
                raise Problem("VALIDATION_ERROR", unknown("step", name, STEP))
            _typed("step", name, value, STEP[name][0])
        if "text" not in data:
            raise Problem("VALIDATION_ERROR", 'step: got no text, want an action such as {"text": "Four."}.')
        if self.over:
            raise Problem("EXECUTION_ERROR", f"step: {self.over}; send a reset first.")
        text, chat = data["text"], self._inner.chat
        chat.thinking = data.get("thinking", "")
        action = chat.encode_behind(text) if data.get("cut") else chat.encode_reply(text)
        _, reward, terminated, truncated, info = await self._slot.call(self._slot.step, action)
        self._steps += 1
        for name, value in self._inner.parts.items():
            self._rewards[name] = self._rewards.get(name, 0.0) + value
        stop = None
        if terminated or truncated:
            default = StopReason.ANSWERED if terminated else StopReason.TURN_LIMIT  # of a wrapper's own limit
            stop = StopReason(info.get("stop_reason", default))
            self.over = f"the episode is over ({stop})"
        return self._observed(self._new(info, text), float(reward), stop)

    def state(self) -> Data:
        """Where the episode stands."""
        return {"episode_id": self._episode, "step_count": self._steps}

    def _read_calls_as(self, name: str | None) -> None:
        """Reads tool calls in the client's format; None: the environment's own."""
        if self._own_format is not None:
            try:
                self._inner.format = self._own_format if name is None else formats.named(name)
            except SettingError as error:
                raise Problem("VALIDATION_ERROR", str(error)) from error

    def _new(self, info: Mapping[str, Any], text: str) -> Data:
        """What a step has added to the chat, and its reward components."""
        known, messages = self._known, info["messages"]
        self._known = len(messages)
        shown: Data = {"parts": self._inner.parts}
        if info.get("rewritten"):
            return {**shown, "messages": [], "rewrite": messages}
        if messages[known] != {"role": "assistant", "content": text}:
            shown["said"] = messages[known]
        if "error" in info:
            shown["error"] = info["error"]
        return {**shown, "messages": messages[known + 1 :]}

    def _observed(self, shown: Data, reward: float | None, stop: StopReason | None) -> Data:
        """The data of an answer. Clients of OpenEnv keep observations, and some of them drop metadata."""
        truncated = stop is not None and not stop.terminated
        end: Data = {"rewards": self._rewards, "truncated": truncated, "stop_reason": stop}
        return {"observation": {**shown, **end}, "reward": reward, "done": stop is not None, "metadata": end}


def schemas() -> dict[str, Data]:
    """The JSON schemas of an action, an observation and the state."""
    types = {str: "string", bool: "boolean", dict: "object"}
    action = {name: {"type": types[kind], "description": note} for name, (kind, note) in STEP.items()}
    seen: Data = {
        name: {"anyOf": [{"type": kind}, {"type": "null"}], "description": note} for name, (kind, note) in SEEN.items()
    }
    state = {"episode_id": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "step_count": {"type": "integer"}}
    return {
        "action": {"type": "object", "properties": action, "required": ["text"], "additionalProperties": False},
        "observation": {"type": "object", "properties": seen},
        "state": {"type": "object", "properties": state},
    }


def _typed(kind: str, name: str, value: Any, want: type) -> Any:
    if not isinstance(value, want) or (want is int and not (type(value) is int and value >= 0)):
        words = {str: "text", int: "a whole number of at least 0", bool: "true or false", dict: "an object"}
        raise Problem("VALIDATION_ERROR", f"{kind}: {name} is {value!r:.80}, want {words[want]}.")
    return value
