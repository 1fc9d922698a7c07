"""The line protocol between trainer and sandbox."""

from __future__ import annotations

import os
import socket

from llm_gym.envs.tools.sandbox.guest.wire import LONGEST, Channel


def test_messages_keep_their_order_and_garbage_is_skipped() -> None:
    near, far = Channel.pair()
    other = Channel(far)
    assert other.send({"a": 1})
    far.sendall(b"no json\n[1]\n" + b"[" * 30_000 + b"\n\xff\xfe\n")
    other.send({"b": 2})
    other.close()
    assert [near.receive()[0] for _ in range(3)] == [{"a": 1}, {"b": 2}, None]
    near.close()


def test_descriptors_are_taken_only_where_asked_for() -> None:
    near, far = Channel.pair()
    other = Channel(far)
    read, write = os.pipe()
    count = len(os.listdir("/proc/self/fd"))
    other.send({}, [write])
    assert near.receive() == ({}, [])
    assert len(os.listdir("/proc/self/fd")) == count
    other.send({}, [write])
    message, fds = near.receive(fds=1)
    assert message == {}
    os.write(fds[0], b"x")
    assert os.read(read, 1) == b"x"
    for fd in (*fds, read, write):
        os.close(fd)
    near.close()
    other.close()


def test_an_endless_line_reads_as_the_end() -> None:
    near, far = Channel.pair()
    far.setblocking(False)
    near.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * LONGEST)
    far.sendall(b"x" * LONGEST)
    far.sendall(b"x" * 100)
    assert near.receive() == (None, [])
    near.close()
    far.close()


def test_a_descriptor_may_come_with_the_message_before_it() -> None:
    near, far = Channel.pair()
    other = Channel(far)
    read, write = os.pipe()
    other.send({"ready": True})
    other.send({"pid": 1}, [write])
    found = [near.receive(fds=1) for _ in range(2)]
    assert [message for message, _ in found] == [{"ready": True}, {"pid": 1}]
    taken = [fd for _, fds in found for fd in fds]
    assert len(taken) == 1
    for fd in (*taken, read, write):
        os.close(fd)
    near.close()
    other.close()


def test_a_line_can_be_passed_on_unread() -> None:
    (near, far), (last, to) = Channel.pair(), Channel.pair()
    first, middle = Channel(far), Channel(to)
    read, write = os.pipe()
    first.send({"a": "ä"}, [write])
    line, fds = near.receive_line(fds=1)
    assert line is not None
    assert middle.send_line(line, fds)
    message, taken = last.receive(fds=1)
    assert message == {"a": "ä"}
    os.write(taken[0], b"x")
    assert os.read(read, 1) == b"x"
    first.close()
    assert near.receive_line() == (None, [])
    for fd in (*fds, *taken, read, write):
        os.close(fd)
    for channel in (near, last, middle):
        channel.close()
