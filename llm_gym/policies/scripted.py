"""A policy without a model: it says what it is told to say. The double for tests and examples."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from llm_gym.concurrency import run_here
from llm_gym.core import Completion, Ids, Sampling
from llm_gym.errors import PolicyError

Script = Callable[[Ids], "str | Sequence[int] | Ids"]
"""What to say in a context (int32 [p]): a text, or token ids as they would be sampled."""


class ScriptedPolicy:
    """Replies from a function of the context, or from a list of replies said in turn, over and over.

    Args:
        script: the function, or the list.
        chat: encodes replies given as text (a `Chat`); not needed for token ids.
        version: the version its completions carry.

    A reply is cut at `max_tokens`, as an engine would cut it. Its log-probabilities are 0: the policy is certain.
    """

    def __init__(self, script: Script | Iterable[str | Sequence[int] | Ids], chat: Any = None, *, version: int = 0):
        if callable(script):
            self._say: Script = script
        else:
            replies = itertools.cycle(list(script))
            self._say = lambda context: next(replies)
        self.chat, self.version = chat, version

    async def complete(self, context: Ids, sampling: Sampling, *, seed: int | None = None) -> Completion:
        """The scripted reply to `context`.

        Raises:
            PolicyError: the reply is empty, or a text although no chat was given.
        """
        await asyncio.sleep(0)  # others get their turn, as with any engine
        reply = self._say(context)
        if isinstance(reply, str) and self.chat is None:
            raise PolicyError("ScriptedPolicy: a reply is text; pass chat= to encode it.")
        tokens = np.asarray(self.chat.encode_reply(reply, context) if isinstance(reply, str) else reply, np.int32)
        if not len(tokens):
            raise PolicyError("ScriptedPolicy: a reply is empty; it needs at least one token.")
        cut = len(tokens) > sampling.max_tokens
        tokens = tokens[: sampling.max_tokens]
        return Completion(tokens, np.zeros(len(tokens), np.float32), "length" if cut else "stop", self.version)

    def generate(
        self, contexts: Sequence[Ids], sampling: Sampling, *, seeds: Sequence[int] | None = None
    ) -> list[Completion]:
        """The scripted replies to `contexts`, in order."""

        async def every() -> list[Completion]:
            return [await self.complete(context, sampling) for context in contexts]

        return run_here(every())

    def load(self, tensors: Iterable[tuple[str, Any]], *, version: int) -> None:
        """Takes the version; there are no weights."""
        self.version = version

    def close(self) -> None:
        """Nothing to free."""
