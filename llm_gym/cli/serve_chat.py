"""`llmgym serve-chat`: a model behind an OpenAI-compatible endpoint, for people's own tools."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_gym.cli.group import settings
from llm_gym.cli.options import (
    chat_template_option,
    engine_options_option,
    host_option,
    parse_args,
    port_option,
    to_write,
    token_option,
)
from llm_gym.cli.serve import named, signals
from llm_gym.errors import SettingError

if TYPE_CHECKING:
    from llm_gym.serving.chat_sessions import ChatSession


@click.command("serve-chat", short_help="Serve a model to any OpenAI client, and record what is said.")
@click.option("--model", metavar="MODEL", help="Run folder, checkpoint, folder or hub id; default: the embedded model.")
@chat_template_option
@click.option("--policy", "engine", default="auto", show_default=True, metavar="ENGINE", help="Engine that samples.")
@engine_options_option
@port_option(8000)
@host_option
@token_option
@click.option("--record", type=click.Path(path_type=Path), metavar="FILE", help="Append every session as an episode.")
@click.option("--temperature", type=float, default=1.0, show_default=True, help="Of every completion; 0: greedy.")
@click.option("--max-tokens", type=click.IntRange(1), default=1024, show_default=True, help="Most in a completion.")
@click.option("--max-context", type=click.IntRange(2), default=4096, show_default=True, help="Most in a chat.")
@click.option(
    "--idle", type=click.FloatRange(0, min_open=True), default=900, show_default=True, help="Seconds to keep."
)
def command(
    model: str | None,
    chat_template: str | None,
    engine: str,
    options: tuple[str, ...],
    port: int,
    host: str,
    token: str | None,
    record: Path | None,
    temperature: float,
    max_tokens: int,
    max_context: int,
    idle: float,
) -> None:
    """Serves a model until Ctrl-C: OPENAI_BASE_URL=http://127.0.0.1:8000/v1, any API key (or the --token).

    Chats go on from the tokens that were sampled (docs/agents.md). Each API key is a session, which ends when nothing
    was asked for --idle seconds; with --record it is then a line of FILE, an episode with every token and its
    log-probability.
    """
    from llm_gym.access import checked_token
    from llm_gym.core import Sampling
    from llm_gym.harness.model.loading import config_of
    from llm_gym.harness.runs.lineage import model_path
    from llm_gym.serving.chat_sessions import ChatLimits
    from llm_gym.tokenizer import load_tokenizer

    with settings():
        secret = checked_token(host, token, "use the model")
        path = model_path(model)
        if path is not None:
            config_of(path)
        limits = ChatLimits(Sampling(temperature, max_tokens), max_context, max_turns=1 << 30)
        engine_options = parse_args(options, "--option")
        tokenizer = load_tokenizer(path, chat_template)
        if record is not None:
            to_write(record, "--record")
    with signals():
        serve(path, engine, engine_options, tokenizer, limits, (host, port), secret, record, idle)


def serve(
    model: str | None,
    engine: str,
    options: Mapping[str, Any],
    tokenizer: Any,
    limits: Any,
    address: tuple[str, int],
    token: str,
    record: Path | None,
    idle: float,
) -> None:
    """Serves until it is interrupted."""
    from llm_gym.access import lacks, url_of
    from llm_gym.models.loading import set_threads
    from llm_gym.policies import Abilities, TextPolicy, make_policy
    from llm_gym.policies.builtin.policy import TransformersPolicy
    from llm_gym.serving.chat import ChatDoor
    from llm_gym.serving.chat_sessions import ChatSession
    from llm_gym.serving.visitors import Visitors

    with settings():
        policy = make_policy(model, engine=engine, **options)
    if isinstance(policy, TextPolicy):
        raise SettingError(f"--policy: got {engine!r}, which is such an endpoint already.")
    if isinstance(policy, TransformersPolicy):
        set_threads(policy.model)
    stop_ids = Abilities.of(policy).stop_ids

    def visitor(key: str) -> ChatSession | None:
        if lacks(f"Bearer {key}", token):
            return None
        ask = policy.complete
        return ChatSession(tokenizer, lambda c, how, seed: ask(c, how, seed=seed), limits, stop_ids=stop_ids)

    def ended(session: ChatSession) -> None:
        if record is not None and session.turns:
            with record.open("a", encoding="utf-8") as file:
                file.write(json.dumps(recorded(session)) + "\n")

    try:
        door = ChatDoor(*address, visitors=Visitors(visitor, idle=idle, ended=ended))
    except OSError as error:
        policy.close()
        raise SettingError(f"--port: cannot listen on {address[0]}, port {address[1]}: {error.strerror}.") from error
    try:
        Abilities.of(policy).serve_in(door.loop)
        click.echo(f"serving {model or 'the embedded model'}; Ctrl-C ends it")
        key = "the token" if token else "any"
        click.echo(f"  OPENAI_BASE_URL={url_of(named(address[0]), door.port)}/v1, OPENAI_API_KEY: {key}")
        sys.stdout.flush()
        threading.Event().wait()
    finally:
        door.close()
        policy.close()


def recorded(session: ChatSession) -> dict[str, Any]:
    """A session as the record of an episode."""
    from llm_gym.core import Episode, StopReason
    from llm_gym.episode_files import encode

    return encode(Episode("chat", 0, session.trajectories(), StopReason.ANSWERED, {}, session.messages))
