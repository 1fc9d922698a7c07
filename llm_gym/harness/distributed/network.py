"""Which network interface leads to the other processes of a run."""

from __future__ import annotations

import os
import socket
import struct
import sys
from contextlib import suppress


def name_interface(host: str) -> None:
    """Tells gloo by which interface this machine reaches rank 0, unless GLOO_SOCKET_IFNAME says it.

    By itself gloo listens at what the machine's own name means, which is often 127.0.0.1: then processes on
    different machines never meet.
    """
    name = interface_to(host)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def interface_to(host: str) -> str | None:
    """The interface from which packets to `host` leave; None where that cannot be known, or is this machine alone."""
    if sys.platform != "linux":
        return None
    import fcntl

    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # nothing is sent: the kernel only chooses a route
        mine = probe.getsockname()[0]
        if mine.startswith("127."):
            return None
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # one without an address
                asked = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
                if socket.inet_ntoa(asked[20:24]) == mine:
                    return name
    return None
