"""Messages to tokens and back: the one place that knows chat templates.

The invariant is append-only contexts: `context[t + 1] = context[t] + sampled + extend(sampled, messages)`.
Rendering the whole chat again would break it: many templates drop thinking, move the system text or
strip earlier replies, and sampled ids do not survive decoding and encoding. So only what is new is
encoded, by the *sentinel cut*:

1. Render `[user, assistant(SENTINEL), *new messages]` with the generation prompt.
2. Drop everything up to the sentinel; what is left begins with what the template puts behind a reply.
3. Encode from the token that ends the reply (its *terminator*), then drop that token if it was sampled.

Step 3 keeps what follows a stop token: the newline of ChatML, which a policy never samples.
A template for which this is not exact is refused at construction.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_gym.core import Ids, Message, Messages
from llm_gym.errors import TemplateError
from llm_gym.templates import DATE, renderer
from llm_gym.tokenizer import NEAR, Coder, declared_stops, load_tokenizer, well_formed

__all__ = ["DATE", "Chat", "load_chat", "load_tokenizer"]

Tool = dict[str, Any]
"""A tool schema in the function-calling form: `{"type": "function", "function": {...}}`."""
Wording = Callable[[Messages, "Sequence[Tool] | None"], Messages]
"""Says tools, their calls and their results in ordinary messages, for a template that has no words for them: (messages,
tools to be shown) -> messages. Hashable, and picklable."""
SENTINEL = "SENTINELqzREPLY"
"""Stands for a reply in a dummy render; user and tool text that contains it is split like a control token."""
TRUSTED = frozenset({"system", "developer", "assistant"})
"""Roles whose text may contain control tokens: the environment's author wrote it."""
QUESTION: Message = {"role": "user", "content": "q"}
"""Stands for what a reply answers."""
CACHED_OPENINGS = 8192
"""Opened contexts kept, since the episodes of a group open the same one (and epochs repeat)."""
CACHED_CHARACTERS = 8192
"""Longer openings are not kept, which bounds the cache to some 100 MB at worst."""


def load_chat(
    tokenizer: Any = None,
    tools: Sequence[Tool] | None = None,
    wording: Wording | None = None,
    *,
    chat_template: str | Path | None = None,
) -> Chat:
    """The `Chat` for a tokenizer, a template (what `load_tokenizer` takes) and tools, shared by a process's users."""
    return _shared_chat(load_tokenizer(tokenizer, chat_template), json.dumps(tools or None), wording)


@lru_cache(maxsize=64)
def _shared_chat(tokenizer: Any, tools: str, wording: Wording | None) -> Chat:
    return Chat(tokenizer, json.loads(tools), wording)


@dataclass(frozen=True, slots=True)
class _Plan:
    """How one kind of new messages follows a reply; found once with placeholders, then used for every text."""

    arguments: str | None
    """Form of the dummy reply's tool calls: `dict`, `json`, or None for a reply without calls."""
    tools: Sequence[Tool] | None
    """Tool schemas passed to the template: None where it renders the messages without them."""
    terminator: str
    """The control token that ends the reply."""
    opens: bool
    """Whether that token also opens the next message (GLM's `<|user|>`), so that it must be there."""


class Chat:
    """One tokenizer's chat template, as three exact operations on token ids.

    Control tokens spelled out in user or tool text (`<|im_end|>` in a web page) are encoded as ordinary
    text: the text is split after the token's first character and both parts are encoded on their own,
    so it decodes to itself. Text without such tokens is encoded in one piece, as transformers does.
    Lone surrogates become U+FFFD.

    Thread-safe, and picklable where the tokenizer is.
    """

    def __init__(self, tokenizer: Any, tools: Sequence[Tool] | None = None, wording: Wording | None = None) -> None:
        """Finds out how the template ends a reply.

        Args:
            tokenizer: a Hugging Face tokenizer with a chat template.
            tools: schemas shown to the model; an empty sequence is the same as None.
            wording: says tools in ordinary messages, so that the template sees none; None: the template shows them.

        Raises:
            TemplateError: there is no template, or it cannot be extended exactly.
        """
        self.tokenizer = tokenizer
        self.tools = list(tools) if tools else None
        self.wording = wording
        self._template = renderer(tokenizer, None if wording else self.tools)
        self._stops = declared_stops(tokenizer)
        self._coder = Coder(tokenizer, [SENTINEL, *self._stops.values()])
        self.reads_parts = False
        """Whether the template reads contents as lists of parts only, as some vision models' do."""
        user = self._user_plan()
        primary = self._learn_stop(user)
        if self.tools:
            self._learn_stop(self._find_plan(("tool",), None))
        self._plan = lru_cache(maxsize=256)(self._find_plan)
        self._open = lru_cache(maxsize=CACHED_OPENINGS)(self._encode_opening)
        self.vocab_size = self._coder.vocab_size
        """One more than the largest id."""
        self.stop_ids = (primary, *(i for i in self._stops if i != primary))
        """Ids that end a completion; the first is the one that the template itself puts behind a reply."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Chat, (self.tokenizer, self.tools, self.wording)

    def as_shown(self, messages: Messages, tools: Sequence[Tool] | None) -> tuple[Messages, Sequence[Tool] | None]:
        """Messages and tools as the template is given them: all of it ordinary messages where there is a wording."""
        return (messages, tools) if self.wording is None else (self.wording(messages, tools), None)

    def open(self, messages: Messages) -> Ids:
        """A whole new context, ending in the generation prompt, int32 [n].

        Raises:
            TemplateError: the template refuses these messages (a system role, an order of roles).
        """
        key = json.dumps(messages)
        return self._open(key).copy() if len(key) <= CACHED_CHARACTERS else self._encode_opening(key)

    def extend(self, sampled: Sequence[int] | npt.NDArray[Any], messages: Messages) -> Ids:
        """What follows `sampled` in the context, int32 [n].

        That is the reply's terminator if it was cut before it, the new messages, and the generation
        prompt. Pass all results of one reply's tool calls together: templates merge them into one turn.

        Args:
            sampled: the reply's ids as sampled, stop token included, shape [m].
            messages: user or tool messages that answer it.

        Raises:
            TemplateError: the template drops, moves or refuses such messages after a reply.
        """
        last = int(sampled[-1]) if len(sampled) else -1
        stop = last if last in self._stops else None
        plan = self._plan(tuple(m["role"] for m in messages), stop)
        text = self._after_reply(self._safe(messages), plan.arguments, plan.tools)
        at = text.find(plan.terminator)
        if at < 0:
            raise TemplateError(f"chat template: it leaves out {plan.terminator!r} behind a reply to these messages.")
        ids = self._coder.encode(text[at:])
        ended = stop is not None and (stop == ids[0] or not plan.opens)
        return np.array(ids[1:] if ended else ids, np.int32)

    def text(self, sampled: Sequence[int] | npt.NDArray[Any]) -> str:
        """The reply's text, control tokens included, without its one final stop token.

        Ids beyond the vocabulary (a padded model head can sample them) are left out.
        """
        ids = np.asarray(sampled).tolist()
        return self._coder.decode(ids[:-1] if ids and ids[-1] in self._stops else ids)

    def encode_reply(self, text: str, context: Sequence[int] | npt.NDArray[Any] | None = None) -> Ids:
        """What a policy that says `text` would have sampled: its ids and the stop token, int32 [n].

        Args:
            text: all that it says, control tokens included.
            context: what the reply stands behind, [m]; None: the generation prompt that answers a first question.
        """
        return np.array([*self.encode_behind(text, context), self.stop_ids[0]], np.int32)

    def encode_behind(self, text: str, context: Sequence[int] | npt.NDArray[Any] | None = None) -> Ids:
        """The ids of `text` as it stands behind a context, control tokens read as such, int32 [n]; see `encode_reply`.

        Where the tokenisation of both together has a border at the context's end, these are the ids behind it. Else
        they are the ids that the text has elsewhere: a context is never tokenised again.
        """
        before = self.open([QUESTION]) if context is None else context
        return np.array(self._coder.encode_behind(np.asarray(before).tolist()[-NEAR:], well_formed(text)), np.int32)

    def calling(
        self, calls: Sequence[tuple[str, dict[str, Any]]], tools: Sequence[Tool] | None, arguments: str = "dict"
    ) -> tuple[str, str]:
        """How the template writes a reply that calls tools.

        Args:
            calls: (tool name, arguments) of each call.
            tools: the schemas that the template is given.
            arguments: the form in which it is given arguments: `dict`, or `json` for templates that want text.

        Returns:
            The prompt as far as the reply continues it, and the reply with all that the template puts behind it.

        Raises:
            TemplateError: the template refuses such a reply.
        """
        made = [
            {
                "id": f"call{i:05d}",
                "type": "function",
                "function": {"name": name, "arguments": value if arguments == "dict" else json.dumps(value)},
            }
            for i, (name, value) in enumerate(calls)
        ]
        return self._writing({"role": "assistant", "content": "", "tool_calls": made}, tools)

    def write(self, message: Message, opening: Sequence[Message] = (QUESTION,)) -> str:
        """A reply as the template writes it behind its own generation prompt, up to its stop token.

        Args:
            message: the assistant's message: `content`, `reasoning_content`, `tool_calls`.
            opening: the messages that it answers.

        Raises:
            TemplateError: the template refuses such a reply, or does not go on from its own generation prompt.
        """
        prompt = self._render(list(opening), self.tools)
        whole = self._render([*opening, {"content": "", **message}], self.tools, prompt=False)
        if not whole.startswith(prompt):
            raise TemplateError("chat template: such a reply does not go on from the generation prompt.")
        return self._ended(whole[len(prompt) :], calls=bool(message.get("tool_calls")))

    @property
    def ending(self) -> str:
        """What the template puts behind the text of a reply, up to the stop token."""
        return self._ended(self._last_tail())

    def _ended(self, reply: str, calls: bool = False) -> str:
        """`reply` up to the first of the stop tokens at its end; one is added if there is none."""
        stops = "|".join(map(re.escape, self._stops.values()))
        found = re.fullmatch(rf"(.*?(?:{stops}))(?:\s|{stops})*", reply, re.DOTALL)
        if found is not None:
            return found[1]
        return reply + (self._plan(("tool",), None).terminator if calls else self._stops[self.stop_ids[0]])

    def _writing(self, message: Message, tools: Sequence[Tool] | None) -> tuple[str, str]:
        """How the template writes an assistant message: (the prompt as far as it goes on from it, all that follows)."""
        whole = self._render([QUESTION, message], tools, prompt=False)
        prompt = _shared_start(self._render([QUESTION], tools), whole)
        return prompt, whole[len(prompt) :]

    def _encode_opening(self, messages: str) -> Ids:
        return np.array(self._coder.encode(self._render(self._safe(json.loads(messages)), self.tools)), np.int32)

    def _safe(self, messages: Messages) -> Messages:
        """The messages well-formed, and with control tokens in user and tool text broken up."""
        tidy = self._coder.tidy
        return [{**tidy(m, trusted=m["role"] in TRUSTED), "role": m["role"]} for m in messages]

    def _render(self, messages: Messages, tools: Sequence[Tool] | None, prompt: bool = True) -> str:
        messages, tools = self.as_shown(messages, tools)
        if self.reads_parts:
            messages = [_in_parts(m) for m in messages]
        try:
            return self._template(messages, tools, prompt)
        except Exception as error:  # a template raises whatever its expressions raise
            roles = [m["role"] for m in messages]
            raise TemplateError(f"chat template: it refuses messages of roles {roles}: {error}") from error

    # The sentinel cut

    def _after_reply(
        self, new: Messages, arguments: str | None, tools: Sequence[Tool] | None, prompt: bool = True
    ) -> str:
        """What the template renders behind a dummy reply that `new` answers."""
        reply: Message = {"role": "assistant", "content": SENTINEL}
        if arguments is not None:
            reply = {"role": "assistant", "content": "", "tool_calls": self._dummy_calls(new, arguments)}
        text = self._render([{"role": "user", "content": "q"}, reply, *new], tools, prompt)
        _, found, after = text.rpartition(SENTINEL)
        if not found:
            raise TemplateError("chat template: it does not render the text of a reply.")
        return after

    def _dummy_calls(self, new: Messages, arguments: str) -> list[dict[str, Any]]:
        """As many tool calls as `new` has tool results (at least one), with their ids and names."""
        name = self.tools[0]["function"]["name"] if self.tools else "f"
        value: Any = {"x": SENTINEL} if arguments == "dict" else json.dumps({"x": SENTINEL})
        results = [m for m in new if m["role"] == "tool"] or [_placeholder("tool", 0)]
        return [
            {
                "id": m.get("tool_call_id", f"call{i:05d}"),
                "type": "function",
                "function": {"name": m.get("name", name), "arguments": value},
            }
            for i, m in enumerate(results)
        ]

    def _find_plan(self, roles: tuple[str, ...], stop: int | None) -> _Plan:
        """The first dummy reply that is exact for messages of these roles after this stop token."""
        new = [_placeholder(role, i) for i, role in enumerate(roles)]
        why: TemplateError | None = None
        for arguments in ("dict", "json", None) if "tool" in roles else (None,):
            for tools in (None, self.tools) if self.tools else (None,):
                try:
                    head = _head(self._after_reply(new, arguments, tools), new)
                    terminator = self._terminator(head, stop, guess=arguments is None)
                except TemplateError as error:
                    why = error
                else:
                    rest = head.partition(terminator)[2].lstrip()
                    opens = not rest.startswith(self._coder.first_control(rest) or " ")
                    return _Plan(arguments, tools, terminator, opens)
        raise TemplateError(f"chat template: no exact extension by messages of roles {list(roles)}: {why}") from why

    def _terminator(self, head: str, stop: int | None, *, guess: bool) -> str:
        """The text of the token that ends a reply: the sampled one if it stands in `head`, else the first
        stop token there, else (`guess`) the first control token (gpt-oss: `<|return|>` becomes `<|end|>`)."""
        sampled = self._stops[stop] if stop is not None else ""
        if sampled and sampled in head:
            return sampled
        found = _first(self._stops.values(), head) or (self._coder.first_control(head) if guess else "")
        if not found:
            raise TemplateError("no stop token stands between a reply and the next message.")
        return found

    # Construction

    def _user_plan(self) -> _Plan:
        """The plan for a user's answer; turns to contents in parts for templates that read nothing else."""
        try:
            return self._find_plan(("user",), None)
        except TemplateError as error:
            self.reads_parts = True
            try:
                return self._find_plan(("user",), None)
            except TemplateError:
                raise error from None

    def _learn_stop(self, plan: _Plan) -> int:
        """Adds the template's own terminator to the stop ids; returns the id that ends a last reply.

        One that only stands inside a chat is none that a policy samples at the end: gpt-oss ends a
        reply with `<|return|>` and writes `<|end|>` in its place afterwards.
        """
        tail = self._last_tail(plan.arguments, plan.tools)
        if plan.terminator in tail or not _first(self._stops.values(), tail):
            self._stops.setdefault(self._coder.encode(plan.terminator)[0], plan.terminator)
        last = _first(self._stops.values(), tail) or plan.terminator
        return next(i for i, text in self._stops.items() if text == last)

    def _last_tail(self, arguments: str | None = None, tools: Sequence[Tool] | None = None) -> str:
        """What the template renders behind a last reply; nothing if it wants the last message to be a user's."""
        try:
            return self._after_reply([], arguments, tools, prompt=False)
        except TemplateError:
            return ""


def _placeholder(role: str, index: int) -> Message:
    """A message whose content is easy to find in a render."""
    message = {"role": role, "content": f"CONTENTqz{index}NEW"}
    return {**message, "name": "f", "tool_call_id": f"call{index:05d}"} if role == "tool" else message


def _head(after: str, new: Messages) -> str:
    """The part of `after` before the first of the `new` placeholders; all of them must be there, in order."""
    places = [after.find(m["content"]) for m in new]
    if -1 in places or places != sorted(places):
        raise TemplateError("a message behind a reply is dropped or moved.")
    return after[: places[0]] if places else after


def _first(texts: Iterable[str], where: str) -> str:
    """That of `texts` which stands first in `where` (the longest, if several start there), or nothing."""
    found = [(where.index(text), -len(text), text) for text in texts if text in where]
    return min(found)[2] if found else ""


def _in_parts(message: Message) -> Message:
    """The message with its text as a list of parts, the form that templates of some vision models want."""
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _shared_start(one: str, two: str) -> str:
    """What both texts begin with, up to the tag in which they differ."""
    same = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    opened = one.rfind("<", 0, same)
    return one[: opened if opened > one.rfind(">", 0, same) else same]
