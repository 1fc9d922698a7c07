"""`ToolEnv`: a `TextEnv` whose model can call functions.

    def calculator(expression: str) -> str:
        '''Evaluates an arithmetic expression.'''
        return str(evaluate(expression))

    class Sums(ToolEnv):
        def __init__(self, **kwargs):
            super().__init__([calculator], **kwargs)

        def open(self):                  # the first messages, as in any TextEnv
            ...

        def final(self, text):           # a reply that calls no tool
            return Reply(reward={"correct": ...}, done=True)

The tools' schemas are shown by the model's own chat template, or in words if it has none for them. A reply that
calls tools is answered with their results, encoded by exact extension; one that does not goes to `final`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from inspect import isawaitable
from typing import Any, ClassVar

from llm_gym.chat import Chat
from llm_gym.concurrency import Overdue, Runner, at_once, finish, is_async, wait, within
from llm_gym.core import Message, StopReason
from llm_gym.env import Reply, TextEnv
from llm_gym.envs.tools.parsers import formats
from llm_gym.envs.tools.parsers.calls import ToolCall, open_thinking, without_calls
from llm_gym.envs.tools.schema import Tool, check_arguments, example_arguments
from llm_gym.errors import FAULTS, ConfigError, ToolError, ToolFailure, described, suggestion
from llm_gym.tokenizer import well_formed


class ToolEnv(TextEnv):
    """Base of environments with tools; subclasses write `open` and `final`.

    >>> def double(number: int) -> int:
    ...     "Twice a number."
    ...     return 2 * number
    >>> class Doubles(ToolEnv):
    ...     def open(self):
    ...         self.number = int(self.np_random.integers(100))
    ...         return [{"role": "user", "content": f"What is twice {self.number}?"}]
    ...
    ...     def final(self, text):
    ...         return Reply(reward=float(str(2 * self.number) in text), done=True)
    >>> env = Doubles([double])
    >>> _ = env.reset(seed=1)
    >>> *_, info = env.step(env.chat.encode_reply(env.call_text("double", number=env.number)))
    >>> info["messages"][-1]["content"] == str(2 * env.number)
    True
    >>> env.close()

    Calls are read from the reply's text outside its thinking, and run in the order in which they stand. Whatever is
    wrong with a call (no JSON, an unknown tool, a missing argument, an exception in the tool, no result in time) is
    answered with a sentence that says so, as that call's result. A reply that was cut runs no calls.

    Args:
        tools: functions with type hints, plain or `async def`, or `Tool`s.
        tool_format: how the model writes calls, by name (see `formats.FORMATS`); None: as its template writes them, or
            if that has no tools, as JSON in <tool_call> (a tool that runs code: as a fenced block of Python).
        max_calls: calls in an episode; those beyond it are refused.
        call_timeout: seconds a call may take. The thread of a function that takes longer is abandoned: it runs on
            by itself, its result is dropped, and the episode goes on in another thread.
        max_output: characters of one result shown to the model; of a longer one, the beginning and the end.
        max_turns: completions in an episode; None: what `max_calls` leaves room for.
        kwargs: the common arguments of `TextEnv`.

    `open`, every call and `final` run in one thread of the environment's own, so a tool may use what is bound to the
    thread that made it (a connection of sqlite); make it in `open`, not in `__init__`. Where every tool keeps its own
    deadline (`Tool.timed`) or is `async def`, they run in the caller's. What is `async def` runs in its event loop.

    Reward components, besides those of `final`: `tool_calls`, the calls that ran (weight 0 unless given another:
    a cost, or a curve to plot), and `format`, -1 for each reply with a call that was refused (weight 0.1).

    Raises:
        ConfigError: no tools, two of the same name, an unknown format or one in which a tool cannot be called, or a
            limit out of range.
        TemplateError: the chat template cannot be extended exactly.
    """

    metadata: dict[str, Any] = {**TextEnv.metadata, "blocking": True}  # noqa: RUF012
    default_weights: ClassVar[Mapping[str, float]] = {"tool_calls": 0.0, "format": 0.1}
    """Weights of reward components where the user gives none."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Adds the components that every environment with tools has to `reward_names`."""
        super().__init_subclass__(**kwargs)
        if cls.reward_names is not None:
            cls.reward_names = tuple(dict.fromkeys([*cls.reward_names, *sorted(ToolEnv.default_weights)]))

    def __init__(
        self,
        tools: Sequence[Tool | Callable[..., Any]],
        /,
        *,
        tool_format: str | None = None,
        max_calls: int = 8,
        call_timeout: float = 30.0,
        max_output: int = 4096,
        max_turns: int | None = None,
        reward_weights: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        for name, limit, least in (("max_calls", max_calls, 0), ("max_output", max_output, 1)):
            if not isinstance(limit, int) or limit < least:
                raise ConfigError(f"{name}: got {limit!r}, want a whole number of at least {least}.")
        if not call_timeout > 0:
            raise ConfigError(f"call_timeout: got {call_timeout!r}, want seconds, more than 0.")
        self.tools = _by_name(tools)
        self.max_calls, self.call_timeout, self.max_output = max_calls, call_timeout, max_output
        self._format_name = tool_format
        self._schemas = {name: tool.parameters for name, tool in self.tools.items()}
        self._runner = Runner()
        self._threaded = not all(tool.timed or is_async(tool.run) for tool in self.tools.values())
        self._calls = self._made = 0
        super().__init__(
            max_turns=max_calls + 2 if max_turns is None else max_turns,
            reward_weights={**self.default_weights, **(reward_weights or {})},
            **kwargs,
        )
        if self.asynchronous:  # what is no `async def` is waited for in the thread that tools run in
            self._threaded = not all(is_async(tool.run) for tool in self.tools.values())
            self.metadata = {**self.metadata, "blocking": False}

    def final(self, text: str) -> Reply | Awaitable[Reply]:
        """What follows a reply that calls no tool; `text` as in `TextEnv.reply`."""
        raise NotImplementedError(f"{type(self).__name__} must define final().")

    def reply(self, text: str) -> Reply:
        """Runs the calls of a reply, or hands it to `final`."""
        calls = self._calls_of(text)
        if not calls:
            return _with_parts(finish(self._hooked(self.final, text=text)), self._parts(0, 0))
        return at_once(self._answers(calls, self._run))

    async def reply_async(self, text: str) -> Reply:
        """The same: what is `async def` is awaited, the rest is waited for in the thread that tools run in."""
        calls = self._calls_of(text)
        if not calls:
            return _with_parts(await self._hooked_async(self.final, text=text), self._parts(0, 0))
        return await self._answers(calls, self._run_async)

    @property
    def asynchronous(self) -> bool:
        """Whether a driver should await the episodes: a hook or a tool is `async def`."""
        return super().asynchronous or any(map(is_async, (self.final, *(tool.run for tool in self.tools.values()))))

    @property
    def plain(self) -> Sequence[str]:
        """Tools that are no `async def`."""
        return [name for name, tool in self.tools.items() if not is_async(tool.run)]

    def _begin(self, seed: int | None, options: dict[str, Any] | None) -> None:
        self._calls = self._made = 0
        super()._begin(seed, options)

    def close(self) -> None:
        """Ends the thread that tools run in."""
        self._runner.close()
        super().close()

    def render(self) -> str | None:
        """The chat so far as text, calls included."""
        if self.render_mode is None:
            return None
        lines = []
        for message in self._messages:
            calls = (call["function"] for call in message.get("tool_calls", ()))
            said = [message.get("content") or "", *(f"{c['name']}({json.dumps(c['arguments'])})" for c in calls)]
            lines.append(f"[{message['role']}] " + " ".join(filter(None, said)))
        return "\n".join(lines)

    def call_text(self, name: str, **arguments: Any) -> str:
        """What a model says to call a tool, in the environment's format; for scripts and tests."""
        return self.format.notation.write([ToolCall(name, arguments)])

    @property
    def example_replies(self) -> list[str]:
        """A call of each tool with arguments of the right types, which `llm_gym.testing` plays too."""
        return [self.call_text(name, **example_arguments(schema)) for name, schema in self._schemas.items()]

    # Reading calls

    def _load_chat(self, tokenizer: Any) -> Chat:
        chat, self.format = formats.tool_chat(tokenizer, [t.schema for t in self.tools.values()], self._format_name)
        return chat

    def _read(self, text: str) -> list[ToolCall]:
        assert self._context is not None
        closing = open_thinking(self.chat.text(self._context[-16:]))
        return formats.read(self.format, text, closing, self._schemas)

    def _calls_of(self, text: str) -> list[ToolCall]:
        """The calls of a reply, checked and booked; none if it was cut."""
        calls = [] if self._cut else self._read(text)
        calls = [self._checked_call(call) for call in calls]
        if calls:
            self._messages[-1] = self._said(text, calls)
        return calls

    def _checked_call(self, call: ToolCall) -> ToolCall:
        """The call with an id, its arguments converted where that is safe, or the reason why it is refused."""
        self._made += 1
        name, arguments, error = call.name, call.arguments, call.error
        if not error and name not in self.tools:
            hint = suggestion(name, self.tools) or f"the tools are: {', '.join(self.tools)}."
            error = f"There is no tool {name!r}; {hint}"
        elif not error:
            arguments, wrong = check_arguments(arguments, self._schemas[name])
            error = f"{name}: {'; '.join(wrong)}." if wrong else ""
        return ToolCall(name, arguments, call.start, call.stop, error, call.id or f"call{self._made:05d}")

    # Running them

    async def _answers(self, calls: Sequence[ToolCall], run: Callable[..., Any]) -> Reply:
        """The results of calls, one after another; `run` gives a tool's, or an awaitable of it."""
        before, results, failure = self._calls, [], None
        for call in calls:
            try:
                output = await self._answer(call, run)
            except ToolFailure as error:
                output = failure = f"Error: {error}"
            results.append(self._result(call, output))
            if failure:
                break
        parts = self._parts(self._calls - before, sum(bool(call.error) for call in calls))
        stop = StopReason.TOOL_FAILURE if failure else None
        return Reply(results, parts, stop_reason=stop)

    async def _answer(self, call: ToolCall, run: Callable[..., Any]) -> str:
        """The text of one call's result.

        Raises:
            ToolFailure: the tool broke in a way that is not the policy's doing.
        """
        if call.error:
            return f"Error: {call.error}"
        if self._calls >= self.max_calls:
            return f"Error: no calls are left (the limit is {self.max_calls}); give the final answer."
        self._calls += 1
        try:
            output = run(self.tools[call.name], call.arguments)
            return shorten(as_text(await output if isawaitable(output) else output), self.max_output)
        except ToolFailure:
            raise
        except Overdue:
            return f"Error: {call.name} gave no result within {self.call_timeout:g} seconds."
        except ToolError as error:
            return shorten(f"Error: {as_text(str(error))}", self.max_output)
        except FAULTS as error:
            return shorten(f"Error: {as_text(described(error))}", self.max_output)

    def _run(self, tool: Tool, arguments: dict[str, Any]) -> Any:
        """A tool's result; waits for it."""
        if is_async(tool.run):
            return finish(within(self._deadline(tool), tool.run(**arguments)))
        if tool.timed:
            return finish(self._hooked(tool.run, **arguments))
        return finish(self._runner.call(tool.run, self.call_timeout, **arguments))

    async def _run_async(self, tool: Tool, arguments: dict[str, Any]) -> Any:
        """A tool's result, awaited, or waited for in the thread."""
        if is_async(tool.run):
            return await within(self._deadline(tool), tool.run(**arguments))
        return await wait(await self._runner.run(tool.run, self._deadline(tool), **arguments))

    def _deadline(self, tool: Tool) -> float | None:
        return None if tool.timed else self.call_timeout

    def _hooked(self, hook: Callable[..., Any], **arguments: Any) -> Any:
        """In the thread that tools run in: what `open` makes, they may use, though it be bound to its thread."""
        threaded = self._threaded and not is_async(hook)
        return self._runner.call(hook, None, **arguments) if threaded else hook(**arguments)

    async def _hooked_async(self, hook: Callable[..., Any], **arguments: Any) -> Any:
        threaded = self._threaded and not is_async(hook)
        return await wait(await self._runner.run(hook, None, **arguments) if threaded else hook(**arguments))

    # What is said

    def _said(self, text: str, calls: Sequence[ToolCall]) -> Message:
        """The reply as a message: its text without the calls' markup, and the calls."""
        made = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in calls
            if call.name in self.tools
        ]
        message = {"role": "assistant", "content": without_calls(text, calls)}
        return {**message, "tool_calls": made} if made else message

    def _result(self, call: ToolCall, output: str) -> Message:
        name = call.name if call.name in self.tools else next(iter(self.tools))
        return {"role": "tool", "name": name, "tool_call_id": call.id, "content": output}

    def _parts(self, calls: int, refused: int) -> dict[str, float]:
        """The reward components of one step, those of `final` as zeros."""
        named = dict.fromkeys(self.reward_names or (), 0.0)
        return {**named, "tool_calls": float(calls), "format": -1.0 if refused else 0.0}

    def _info(self) -> dict[str, Any]:
        return {**super()._info(), "tools": copy.deepcopy([tool.schema for tool in self.tools.values()])}


def as_text(value: Any) -> str:
    """A tool's result as well-formed text: a string as it is, bytes as UTF-8, other data as JSON."""
    if isinstance(value, str):
        return well_formed(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    try:
        return well_formed(json.dumps(value, ensure_ascii=False))
    except (TypeError, ValueError, RecursionError):
        return well_formed(str(value))


def shorten(text: str, most: int) -> str:
    """The first and last `most / 2` characters of a longer text, and how many were left out."""
    if len(text) <= most:
        return text
    head, tail = most - most // 2, most // 2
    return f"{text[:head]}\n... ({len(text) - most} characters left out) ...\n{text[len(text) - tail :]}"


def _with_parts(reply: Reply, parts: Mapping[str, float]) -> Reply:
    """`reply` with further reward components; its own go first."""
    own = reply.reward if isinstance(reply.reward, Mapping) else {"reward": reply.reward}
    return replace(reply, reward={**parts, **own})


def _by_name(tools: Sequence[Tool | Callable[..., Any]]) -> dict[str, Tool]:
    """The tools by name.

    Raises:
        ConfigError: there are none, or two of the same name.
    """
    made = [Tool.of(tool) for tool in tools]
    names = [tool.name for tool in made]
    if not made or len(set(names)) < len(names):
        raise ConfigError(f"tools: got {names or 'none'}, want at least one, each with a name of its own.")
    return dict(zip(names, made, strict=True))
