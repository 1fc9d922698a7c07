"""Where servers are, which model they serve, and the token that they ask for."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence

from llm_gym.errors import ConfigError

TOKEN = "LLM_GYM_TOKEN"
"""The variable of the environment that holds the servers' token, where none is given."""


def addresses(servers: Sequence[str] | str, where: str = "servers") -> list[str]:
    """The servers' URLs.

    Args:
        servers: in a sequence, or separated by commas.
        where: the setting, for the error.

    Raises:
        ConfigError: none, one twice, or something that is no URL.
    """
    found = [url.strip().rstrip("/") for url in (servers.split(",") if isinstance(servers, str) else servers)]
    for url in found:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"{where}: got {url!r}, want a URL such as 'http://127.0.0.1:8000'.")
    if not found or len(set(found)) < len(found):
        raise ConfigError(f"{where}: got {found}, want at least one URL, and each once; `llmgym serve` starts one.")
    return found


def same_model(served: str, wanted: str) -> bool:
    """Whether two names mean one model: the same folder however written, or the same hub id."""
    return served == wanted or os.path.realpath(served) == os.path.realpath(wanted)


def loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`, a name or an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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


def bearing(token: str) -> dict[str, str]:
    """The headers of a request to servers with this token."""
    return {"Authorization": f"Bearer {token}"} if token else {}
