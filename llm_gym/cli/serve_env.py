"""`llmgym serve-env`: an environment for trainers and clients elsewhere."""

from __future__ import annotations

import sys

import click

from llm_gym.access import loopback, url_of
from llm_gym.cli.group import settings
from llm_gym.cli.options import env_args_option, host_option, parse_args, port_option, token_option
from llm_gym.cli.serve import named, signals


@click.command("serve-env", short_help="Serve an environment over OpenEnv's protocol.")
@click.argument("env", metavar="ID")
@env_args_option
@port_option(8100)
@host_option
@token_option
@click.option("--max-sessions", type=click.IntRange(1), default=1024, show_default=True, help="Most at once.")
@click.option(
    "--idle",
    type=click.FloatRange(0, min_open=True),
    default=3600.0,
    show_default=True,
    metavar="SECONDS",
    help="How long a session is kept after its last message.",
)
def command(
    env: str,
    env_args: tuple[str, ...],
    port: int,
    host: str,
    token: str | None,
    max_sessions: int,
    idle: float,
) -> None:
    """Serves the environment ID at the level of text, until Ctrl-C; `llmgym envs` lists ids.

    A trainer plays it as `--env OpenEnv-v0 --env-arg url=...`, and OpenEnv's own clients as any other server. Unless
    --host says otherwise it listens on 127.0.0.1 only. Nothing is encrypted: in a network that is not yours forward the
    port (`ssh -L 8100:127.0.0.1:8100 machine`).
    """
    from llm_gym.serving.environments import EnvDoor

    with settings(), signals():
        given = parse_args(env_args)
        with EnvDoor(
            env,
            env_args=given,
            host=host,
            port=port,
            token=token,
            max_sessions=max_sessions,
            idle=idle,
        ) as server:
            url = server.url if loopback(host) else url_of(named(host), server.port)
            click.echo(f"serving {server.name} on {url}; Ctrl-C ends it")
            click.echo(f"  llmgym train --env OpenEnv-v0 --env-arg url={url}")
            sys.stdout.flush()
            server.wait()
