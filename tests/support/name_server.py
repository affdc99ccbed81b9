"""A name server that answers from a table, and cuts what does not fit into a datagram."""

from __future__ import annotations

import contextlib
import errno
import socketserver
import struct
import threading
from typing import TYPE_CHECKING

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

if TYPE_CHECKING:
    from collections.abc import Iterator

_LARGEST = 512


class NameServer:
    """Addresses by name, over UDP and TCP on one port."""

    def __init__(self) -> None:
        self.addresses: dict[str, list[str]] = {}
        self.over_tcp = 0
        self.is_broken = False
        self._udp, self._tcp = self._bound()
        self.port = self._udp.server_address[1]

    def _bound(self) -> tuple[socketserver.UDPServer, socketserver.TCPServer]:
        socketserver.TCPServer.allow_reuse_address = True
        while True:
            udp = socketserver.ThreadingUDPServer(("127.0.0.1", 0), _datagrams(self))
            try:
                return udp, socketserver.ThreadingTCPServer(udp.server_address, _streams(self))
            except OSError as error:
                udp.server_close()
                if error.errno != errno.EADDRINUSE:
                    raise

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        servers = (self._udp, self._tcp)
        threads = [threading.Thread(target=one.serve_forever, args=(0.05,)) for one in servers]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            for one in servers:
                one.shutdown()
                one.server_close()
            for thread in threads:
                thread.join()

    def answer(self, asked: bytes, limit: int) -> bytes:
        query = dns.message.from_wire(asked)
        response = dns.message.make_response(query)
        question = query.question[0]
        found = self.addresses.get(question.name.to_text(omit_final_dot=True))
        wanted = ":" if question.rdtype == dns.rdatatype.AAAA else "."
        if self.is_broken:
            response.set_rcode(dns.rcode.SERVFAIL)
        elif found is None:
            response.set_rcode(dns.rcode.NXDOMAIN)
        else:
            texts = [one for one in found if wanted in one]
            if texts:
                kind = dns.rdatatype.to_text(question.rdtype)
                response.answer.append(
                    dns.rrset.from_text_list(question.name, 5, "IN", kind, texts)
                )
        wire = response.to_wire()
        if len(wire) > limit:
            response.answer.clear()
            response.flags |= dns.flags.TC
            wire = response.to_wire()
        return wire


def _datagrams(server: NameServer) -> type[socketserver.BaseRequestHandler]:
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            data, socket = self.request
            socket.sendto(server.answer(data, _LARGEST), self.client_address)

    return Handler


def _streams(server: NameServer) -> type[socketserver.BaseRequestHandler]:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            server.over_tcp += 1
            [size] = struct.unpack("!H", self.rfile.read(2))
            wire = server.answer(self.rfile.read(size), 65535)
            self.wfile.write(struct.pack("!H", len(wire)) + wire)

    return Handler
