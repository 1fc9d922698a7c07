"""Where servers are, and which model they serve."""

from __future__ import annotations

import os
from collections.abc import Sequence

from llm_gym.errors import ConfigError


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
