"""A small agent for workers of lazy models: fills the store's files, and fails as it is told to.

It speaks the protocol and writes blobs with the store's own code, but has no network, no schedule
and no database. Each question is answered by a thread, so that some may wait while others do not.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fetcher import agent_protocol
from fetcher import lazy_protocol as protocol
from fetcher.archives import UnpackLimits
from fetcher.errors import ModelError
from fetcher.lazy_plan import LazyPlan, encode_plan, mountpoint, plan_path
from fetcher.modelpack import Packing, Selection, read_model
from fetcher.oci import Digest, Manifest, parse_manifest
from fetcher.ranges import Range
from fetcher.store.blobs import PartialBlob
from fetcher.store.chunks import Verdict
from fetcher.store.layers import INDEX, unpack_layer
from fetcher.store.places import TarFiles, WholeFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from fetcher.modelpack import Layer

    Content = Callable[[str, Range], bytes]

CHUNK = 64 * 1024
_THREADS = 32


def write_plan(root: Path, body: bytes, selection: Selection | None = None) -> Path:
    """Write what a worker begins with; where it will mount."""
    selection = selection or Selection()
    plan = LazyPlan(
        Digest.of(body),
        body,
        "application/vnd.oci.image.manifest.v1+json",
        selection.exclude_weights,
        selection.exclude_patterns,
        "all",
    )
    path = plan_path(root, plan.model, selection.key)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_plan(plan))
    return mountpoint(root, plan.model, selection.key)


@dataclass
class Orders:
    """What the agent is told to do wrong."""

    answering: threading.Event = field(default_factory=threading.Event)
    """Not set: questions wait, as if the registry were silent."""
    trusted: bool = True
    refusal: ModelError | None = None
    """What questions are answered with."""

    def __post_init__(self) -> None:
        self.answering.set()


class SmallAgent:
    """The agent of one model below ``root``."""

    def __init__(self, root: Path, body: bytes, content: Content, chunk: int = CHUNK) -> None:
        """``content`` gives any bytes of a blob by its digest."""
        manifest = parse_manifest(body, None)
        assert isinstance(manifest, Manifest)
        self.root = root
        self.body = body
        self.content = content
        self.still = threading.Event()
        """Never set."""
        self.orders = Orders()
        self.asked: list[protocol.FromWorker] = []
        """All that workers said."""
        self.tickets: list[str] = []
        """What they showed when they attached."""
        self.fetched: dict[str, int] = {}
        """Bytes of each blob that were asked of ``content``."""
        self._chunk = chunk
        self._layers = {str(one.descriptor.digest): one for one in read_model(manifest).layers}
        self._blobs: dict[str, PartialBlob] = {}
        self._locks = {name: threading.RLock() for name in self._layers}
        self._complete: set[str] = set()
        self._listener: socket.socket | None = None
        self._connections: list[socket.socket] = []
        self._sending = threading.Lock()
        (root / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)

    # -- its life ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Listen, as a new process would."""
        path = agent_protocol.socket_path(self.root)
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._accept, args=[self._listener], daemon=True).start()

    def stop(self) -> None:
        """Be gone, as a killed process is: without a word, what is in the store stays."""
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        self._connections.clear()

    @contextlib.contextmanager
    def running(self) -> Iterator[SmallAgent]:
        """Run for the block."""
        self.start()
        try:
            yield self
        finally:
            self.stop()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                self._connections.append(connection)
                threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with (
            contextlib.suppress(OSError, ValueError),
            connection.makefile("rb") as lines,
            ThreadPoolExecutor(_THREADS) as pool,
        ):
            request = agent_protocol.decode_request(lines.readline())
            params = agent_protocol.decode_params(request, protocol.ATTACH)
            self.tickets.append(params.ticket)
            connection.sendall(
                agent_protocol.encode_result(protocol.AttachResult(ticket="first ticket"))
            )
            for line in lines:
                message = protocol.decode_from_worker(line)
                self.asked.append(message)
                if isinstance(message, protocol.Want | protocol.Index):
                    pool.submit(self._answer, connection, message)

    def _answer(self, connection: socket.socket, question: protocol.Want | protocol.Index) -> None:
        self.orders.answering.wait()
        try:
            if self.orders.refusal is not None:
                raise self.orders.refusal
            if isinstance(question, protocol.Want):
                self.fill(question.blob, Range(question.start, question.stop))
            else:
                self.open_archive(question.blob)
            answer: protocol.FromAgent = protocol.Here(question.id)
        except ModelError as error:
            answer = protocol.Failed.of(question.id, error)
        except Exception:
            traceback.print_exc()
            raise
        self._send(connection, answer)

    def say(self, message: protocol.FromAgent) -> None:
        """Tell every worker something without being asked."""
        self.say_line(protocol.encode(message))

    def say_line(self, line: bytes) -> None:
        """As :meth:`say`, whatever it is."""
        for connection in self._connections:
            with self._sending:
                connection.sendall(line)

    def _send(self, connection: socket.socket, message: protocol.FromAgent) -> None:
        with contextlib.suppress(OSError), self._sending:
            connection.sendall(protocol.encode(message))

    def be_rude(self, times: int) -> None:
        """Answer so many workers with what nobody understands, and be gone."""
        path = agent_protocol.socket_path(self.root)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            for _ in range(times):
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.recv(100)
                    connection.sendall(b"{nonsense}\n")
        path.unlink()

    # -- what it does to the store -----------------------------------------------------------------

    def wants(self) -> list[protocol.Want]:
        """What was asked for by readers who wait."""
        return [one for one in self.asked if isinstance(one, protocol.Want) and not one.ahead]

    def names(self) -> list[str]:
        """The digests of the blobs, in the order of the layers."""
        return list(self._layers)

    def layer(self, name: str) -> Layer:
        return self._layers[name]

    def blob(self, name: str) -> PartialBlob:
        """The blob, begun where it was not."""
        with self._locks[name]:
            if name not in self._blobs:
                layer = self._layers[name]
                path = self._path(name)
                is_tar = layer.packing is Packing.TAR
                place = TarFiles(path, lambda _: None) if is_tar else WholeFile(path)
                chunks = path.with_name(f"{path.name}.chunks")
                descriptor = layer.descriptor
                self._blobs[name] = PartialBlob(
                    place, chunks, descriptor.digest, descriptor.size, self._chunk
                )
                self._blobs[name].trust("")
            return self._blobs[name]

    def _path(self, name: str) -> Path:
        digest = self._layers[name].descriptor.digest
        return self.root / "blobs" / digest.algorithm / digest.hex

    def fill(self, name: str, wanted: Range) -> None:
        """Bring the chunks of some bytes."""
        for part in wanted.split(self._chunk):
            with self._locks[name]:
                if name in self._complete:
                    return
                blob = self.blob(name)
                for number in blob.chunks(part):
                    if not blob.is_trusted(number):
                        self._bring(blob, name, number)

    def _bring(self, blob: PartialBlob, name: str, number: int) -> None:
        chunk = blob.chunk(number)
        data = self.content(name, chunk)
        self.fetched[name] = self.fetched.get(name, 0) + len(data)
        assert blob.sink(chunk, trusted=self.orders.trusted)(data)

    def open_archive(self, name: str) -> None:
        """Let what is in an archive be known."""
        if self._layers[name].packing is not Packing.TAR:
            self.complete(name)
            return
        with self._locks[name]:
            if name in self._complete:
                return
            blob = self.blob(name)
            blob.read_headers(self.still)
            while (position := blob.awaited()) is not None:
                self._bring(blob, name, blob.first_missing(position // blob.chunk_size))
                blob.read_headers(self.still)
            blob.write_index(self.still)

    def complete(self, name: str) -> None:
        """Bring all of a blob, verify it and end it as the store does."""
        layer, path = self._layers[name], self._path(name)
        self.fill(name, Range(0, layer.descriptor.size))
        with self._locks[name]:
            if name in self._complete:
                return
            blob = self.blob(name)
            assert blob.verify(self.still)
            blob.finish(self.still)
            blob.conclude(Verdict.VERIFIED)
            if layer.packing is Packing.TAR:
                path.unlink()
            path.with_name(f"{path.name}.chunks").unlink()
            if layer.packing in (Packing.TAR_GZIP, Packing.TAR_ZSTD):
                folder = path.with_name(f"{path.name}.files")
                unpack_layer(
                    path,
                    folder,
                    layer.packing,
                    UnpackLimits(max_bytes=1 << 40),
                    self.still,
                    lambda _: None,
                    lambda _: None,
                )
                assert (folder / INDEX).exists()
            del self._blobs[name]
            self._complete.add(name)

    def spoil(self, name: str, reason: str, *, tell: bool = True) -> None:
        """Find that a blob's bytes are wrong, and drop them."""
        with self._locks[name]:
            blob, path = self._blobs.pop(name), self._path(name)
            blob.conclude(Verdict.SPOILED)
            path.unlink()
            path.with_name(f"{path.name}.chunks").unlink()
        if tell:
            self.say(protocol.Spoiled(name, reason))
