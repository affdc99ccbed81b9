"""A connection of the peer server, and a client that takes its time."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from fetcher.peers.http import HttpConnection, HttpPatience

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

REQUEST = b"GET /v2/ HTTP/1.1\r\nHost: peer\r\n\r\n"
LARGE = bytes(range(256)) * 32 * 1024


def conversing(test: Callable[[HttpConnection, trio.SocketStream], Awaitable[None]]) -> None:
    """Run a test with a connection that has been asked something, and the client's end of it."""

    async def main() -> None:
        ours, theirs = map(trio.socket.from_stdlib_socket, socket.socketpair())
        async with trio.SocketStream(ours) as server, trio.SocketStream(theirs) as client:
            connection = HttpConnection(server, HttpPatience(stall=0.5))
            await client.send_all(REQUEST)
            assert (await connection.receive()) is not None
            await test(connection, client)

    trio.run(main)


def test_a_small_answer_is_sent_at_once() -> None:
    """In one piece, and without a turn of the loop: many of them say no to somebody who waits."""

    async def test(connection: HttpConnection, client: trio.SocketStream) -> None:
        with trio.testing.assert_no_checkpoints():
            await connection.answer(404, (), b"{}")
        head, _, body = (await client.receive_some()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 404 ")
        assert b"content-length: 2" in head.lower()
        assert body == b"{}"
        await client.send_all(REQUEST)
        assert await connection.receive() is not None

    conversing(test)


def test_what_there_is_no_room_for_is_sent_as_it_is_taken() -> None:
    async def test(connection: HttpConnection, client: trio.SocketStream) -> None:
        async def answer() -> None:
            await connection.answer(200, (), LARGE, close=True)
            assert await connection.receive() is None

        got = b""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            await trio.testing.wait_all_tasks_blocked()
            while len(got.partition(b"\r\n\r\n")[2]) < len(LARGE):
                got += await client.receive_some()
        assert got.partition(b"\r\n\r\n")[2] == LARGE

    conversing(test)


def test_who_takes_nothing_is_left() -> None:
    async def test(connection: HttpConnection, _: trio.SocketStream) -> None:
        with pytest.raises(trio.TooSlowError):
            await connection.answer(200, (), LARGE)

    conversing(test)


def test_who_has_left_is_found_gone() -> None:
    async def test(connection: HttpConnection, client: trio.SocketStream) -> None:
        await client.aclose()
        with pytest.raises(ConnectionError):
            await connection.answer(200, (), LARGE)

    conversing(test)
