"""The Hugging Face hub where there may be no way to it."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies


@contextmanager
def offline_if_unreachable(hub_id: str) -> Iterator[None]:
    """Puts the hub's clients into offline mode while the hub's name does not resolve; nothing for a folder.

    What is cached still loads; anything else fails at once, where the clients would retry for a minute.
    """
    if Path(hub_id).expanduser().exists():
        yield
        return
    from huggingface_hub import constants

    proxied = bool(getproxies())  # then names are resolved elsewhere
    if proxied or constants.HF_HUB_OFFLINE or _resolves(urlsplit(constants.ENDPOINT).hostname):
        yield
        return
    switches = [constants, *([sys.modules["datasets"].config] if "datasets" in sys.modules else [])]
    for switch in switches:
        switch.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for switch in switches:
            switch.HF_HUB_OFFLINE = False


def _resolves(host: str | None) -> bool:
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True
