"""Any OpenAI-compatible endpoint as a policy that only speaks text: for measuring models, not for training them."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_gym.concurrency import Loop, tries
from llm_gym.core import Completion, FinishReason, Ids, Message, Sampling
from llm_gym.errors import ConfigError, PolicyError, SettingError, check_counts, ended
from llm_gym.policies.http import Remote, RemoteError

if TYPE_CHECKING:
    from llm_gym.chat import Chat

URL = "https://api.openai.com/v1"
SAY = 15.0
"""Seconds between two lines about an endpoint that does not answer."""
log = logging.getLogger(__name__)

_TEXT_ONLY = "engine 'openai': it gives text only, without token ids and their log-probabilities; it cannot be trained."
_HOPELESS = frozenset({401, 403, 404})
"""No key, no permission, no such model: every episode would meet it."""


class OpenAIPolicy:
    """Asks `/chat/completions` with an episode's messages, and encodes the reply as if it had been sampled.

    Args:
        model: its name there.
        base_url: where, `/v1` included.
        api_key: None: the environment variable OPENAI_API_KEY, if there is one.
        start_seconds: how long to try while nothing has ever answered: an address that is wrong, or a server that is
            not up yet.
        retry_seconds: how long a request is repeated after failures that may pass (rate limits, 5xx, no answer).
        max_rows: requests at once.

    Raises:
        ConfigError: no model is named, or the URL is none.
    """

    version = 0

    def __init__(
        self,
        model: str | None = None,
        *,
        base_url: str = URL,
        api_key: str | None = None,
        start_seconds: float = 5.0,
        retry_seconds: float = 300.0,
        max_rows: int = 32,
    ) -> None:
        if not isinstance(model, str):
            raise ConfigError(f"model: got {model!r}; an endpoint needs the name of one of its models.")
        if not base_url.startswith(("http://", "https://")):
            raise ConfigError(f"base_url: got {base_url!r}, want a URL such as {URL!r}.")
        check_counts({"max_rows": max_rows})
        self.model, self.max_rows, self._retry = model, max_rows, retry_seconds
        self._start, self._answered = start_seconds, False
        self._unanswered: float | None = None  # since when, while nothing has ever answered
        self._said = -SAY
        key = api_key or os.environ.get("OPENAI_API_KEY")
        self._remote = Remote(base_url, headers={"Authorization": f"Bearer {key}"} if key else {}, proxies=True)
        self._limit = "max_completion_tokens" if base_url.rstrip("/") == URL else "max_tokens"  # OpenAI's new name
        self._loop = Loop("llm_gym-openai")

    async def reply(self, messages: Sequence[Message], chat: Chat, sampling: Sampling, *, seed: int) -> Completion:
        """The assistant's reply to `messages`, encoded by `chat`; called by the episode driver.

        Tool calls in the answer are written as `<tool_call>` blocks of JSON behind the text. The log-probabilities
        are no numbers (NaN): whatever would be trained on them is lost, and says so.

        Raises:
            SettingError: the endpoint refuses the key, does not know the model, or has never answered.
            PolicyError: it refuses this request, or fails for `retry_seconds`.
        """
        body = self._body(*chat.as_shown(list(messages), chat.tools), sampling, seed)
        text, finish = await self._loop.ask(self._ask(body))
        tokens = chat.encode_reply(text)
        if finish == "length" or len(tokens) > sampling.max_tokens:
            tokens, finish = tokens[: min(len(tokens) - 1, sampling.max_tokens)], "length"
        if not len(tokens):
            raise PolicyError("The endpoint was cut before it said anything.")
        return Completion(tokens, np.full(len(tokens), np.nan, np.float32), finish)

    async def complete(self, context: Ids, sampling: Sampling, *, seed: int | None = None) -> Completion:
        """Refused: the endpoint takes no token ids."""
        raise SettingError(_TEXT_ONLY)

    def generate(
        self, contexts: Sequence[Ids], sampling: Sampling, *, seeds: Sequence[int] | None = None
    ) -> list[Completion]:
        """Refused, as `complete`."""
        raise SettingError(_TEXT_ONLY)

    def load(self, tensors: Iterable[tuple[str, Any]], *, version: int) -> None:
        """Refused: the weights are not ours."""
        raise SettingError(_TEXT_ONLY)

    def close(self) -> None:
        """Closes the connections."""
        self._loop.stop(self._remote.close)

    def _body(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, sampling: Sampling, seed: int
    ) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model, "messages": [_plain(message) for message in messages]}
        body |= {"temperature": sampling.temperature, self._limit: sampling.max_tokens, "seed": seed % 2**63}
        plain = Sampling()  # what only some endpoints know is sent only where it is asked for
        for name in ("top_p", "top_k", "min_p"):
            if getattr(sampling, name) != getattr(plain, name):
                body[name] = getattr(sampling, name)
        return body | ({"tools": list(tools)} if tools else {})

    async def _ask(self, body: Mapping[str, Any]) -> tuple[str, FinishReason]:
        until = last = time.monotonic() + self._retry
        async for _ in tries(lambda: last):  # noqa: B023 -- what it is at the pause
            try:
                answer = await self._remote.call("POST", "/chat/completions", body)
                self._answered = True
                return _read(answer)
            except RemoteError as error:
                self._answered |= error.status is not None
                if error.status in _HOPELESS:
                    raise ConfigError(f"engine 'openai': {ended(error)}") from error
                if not error.passing or time.monotonic() > until:
                    raise PolicyError(f"A request failed: {error}") from error
                last = until if self._answered else self._first_answer_until(error)
                if time.monotonic() - self._said > SAY:
                    self._said = time.monotonic()
                    log.warning("no answer yet, trying for %.0f s more: %s", last - time.monotonic(), error)
        raise AssertionError

    def _first_answer_until(self, error: RemoteError) -> float:
        """When to give up what has never answered, on the monotonic clock.

        Raises:
            ConfigError: now.
        """
        if self._unanswered is None:
            self._unanswered = time.monotonic()
        until = self._unanswered + self._start
        if time.monotonic() >= until:
            raise ConfigError(
                f"base_url: no answer for {self._start:g} s ({error}); start the server, or let it take longer with "
                "start_seconds=60."
            ) from error
        return until


def _plain(message: Message) -> Message:
    """A message as the protocol has it: the arguments of tool calls are JSON in a string."""
    if not message.get("tool_calls"):
        return message
    calls = [{**call, "function": dict(call["function"])} for call in message["tool_calls"]]
    for call in calls:
        if not isinstance(call["function"].get("arguments"), str):
            call["function"]["arguments"] = json.dumps(call["function"].get("arguments", {}))
    return {**message, "tool_calls": calls}


def _read(answer: Any) -> tuple[str, FinishReason]:
    """Text and finish reason of an answer.

    Raises:
        RemoteError: it has neither text nor tool calls.
    """
    try:
        choice = answer["choices"][0]
        message = choice["message"]
        parts = [message.get("content") or ""]
        for call in message.get("tool_calls") or ():
            wanted = call["function"]
            block = {"name": wanted["name"], "arguments": json.loads(wanted["arguments"] or "{}")}
            parts.append(f"<tool_call>\n{json.dumps(block)}\n</tool_call>")
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise RemoteError(f"the endpoint's answer cannot be read: {type(error).__name__}: {error}") from error
    text = "\n".join(part for part in parts if part)
    return text, "length" if choice.get("finish_reason") == "length" else "stop"
