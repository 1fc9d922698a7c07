"""Who may ask a server: this machine alone, or whoever bears its token."""

from __future__ import annotations

import hmac
import ipaddress
import os
from collections.abc import Mapping

from llm_gym.errors import ConfigError

HOST = "127.0.0.1"
"""Where servers listen unless they are told otherwise."""
TOKEN = "LLM_GYM_TOKEN"
"""The variable of the environment that holds the servers' token, where none is given."""


def loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`, a name or an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def url_of(host: str, port: int) -> str:
    """The address of what listens there."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def token_of(given: str | None, where: str = "token") -> str:
    """The servers' token: `given`, or that of the environment; empty: none.

    Args:
        given: None: the environment's.
        where: the setting, for the error.

    Raises:
        ConfigError: one that a header cannot hold (it is not repeated).
    """
    found, where = (os.environ.get(TOKEN, ""), TOKEN) if given is None else (given, where)
    if not isinstance(found, str):
        raise ConfigError(f"{where}: got a {type(found).__name__}, want text; in YAML a number needs quotes.")
    if not (found.isascii() and found.isprintable()) or " " in found:
        raise ConfigError(f"{where}: got one with blanks or other signs, want a word of ASCII letters and digits.")
    return found


def checked_token(host: str, token: str | None, danger: str) -> str:
    """The token of a server on `host`; `danger` is what whoever reaches it can do.

    Raises:
        ConfigError: none, though others than this machine reach it.
    """
    found = token_of(token, "--token")
    if not found and not loopback(host):
        raise ConfigError(
            f"--host: got {host!r} without a token, but whoever reaches the server can {danger}; give "
            f"--token SECRET or set {TOKEN}, or listen on {HOST!r}."
        )
    return found


def bearing(token: str) -> dict[str, str]:
    """The headers of a request to servers with this token."""
    return {"Authorization": f"Bearer {token}"} if token else {}


def from_a_page(headers: Mapping[str, str], token: str) -> bool:
    """Whether a page in a browser asks a server that has no token: any page that somebody on this machine looks at."""
    return not token and "Origin" in headers


def lacks(authorization: str, token: str) -> str:
    """What is wrong with a request's Authorization header at a server with this token; empty: nothing."""
    kind, _, given = authorization.partition(" ")
    right = hmac.compare_digest(given.encode("latin-1", "replace"), token.encode("latin-1"))
    if not token or (right and kind.lower() == "bearer"):
        return ""
    return "the token is not the one that it was started with" if given else "it was started with a token"
