"""A registry of models that are all zeros: any size, nothing stored, every range answered."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import re
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

from fetcher.modelpack import Kind, Packing, layer_type
from fetcher.oci import Digest
from tests.bench.measure import MIB
from tests.support.models import IMAGE_MANIFEST, ModelBuilder

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_ZEROS: Final = bytes(MIB)
_RANGE: Final = re.compile(r"bytes=(\d+)-(\d+)")


@dataclass(frozen=True)
class ZeroModel:
    """A model of layers of zeros; layers of one size are one blob."""

    name: str
    sizes: tuple[int, ...]

    @property
    def size(self) -> int:
        return sum(self.sizes)


class ZeroRegistry:
    """What the server answers: manifests by repository, sizes by digest."""

    def __init__(self, models: Sequence[ZeroModel], *, hashed: bool = True) -> None:
        """Hashes as many zeros as the largest layer has.

        Not ``hashed``, the digests are any: for models that nobody fetches to their end.
        """
        sizes = [size for model in models for size in model.sizes]
        digests = _digests_of_zeros(sizes) if hashed else _any_digests(sizes)
        self.sizes = {digest: size for size, digest in digests.items()}
        self.manifests: dict[str, bytes] = {}
        self.configs: dict[str, bytes] = {}
        for model in models:
            builder = ModelBuilder()
            self.configs.update((str(digest), data) for digest, data in builder.blobs.items())
            for number, size in enumerate(model.sizes):
                builder.layers.append(
                    {
                        "mediaType": layer_type(Kind.WEIGHT, Packing.RAW, "cncf"),
                        "digest": digests[size],
                        "size": size,
                        "annotations": {"org.cncf.model.filepath": f"{number}.safetensors"},
                    }
                )
            self.manifests[model.name] = builder.body


def _digests_of_zeros(sizes: Iterable[int]) -> dict[int, str]:
    """The digest of so many zeros, for each size; every zero is hashed once."""
    hasher, hashed, found = hashlib.sha256(), 0, {}
    for size in sorted(set(sizes)):
        while hashed < size:
            piece = min(len(_ZEROS), size - hashed)
            hasher.update(memoryview(_ZEROS)[:piece])
            hashed += piece
        found[size] = f"sha256:{hasher.hexdigest()}"
    return found


def _any_digests(sizes: Iterable[int]) -> dict[int, str]:
    return {size: str(Digest.of(f"{size} zeros".encode())) for size in sizes}


@contextlib.contextmanager
def serve_zeros(models: Sequence[ZeroModel], *, hashed: bool = True) -> Iterator[str]:
    """Serve the models, each under its name; gives the registry's address."""
    with _Server(ZeroRegistry(models, hashed=hashed)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


class _Server(http.server.ThreadingHTTPServer):
    def __init__(self, registry: ZeroRegistry) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.registry = registry


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        registry = cast("_Server", self.server).registry
        path = self.path.partition("?")[0].removeprefix("/v2/")
        repository, _, tag = path.partition("/manifests/")
        blob = path.rpartition("/blobs/")[2]
        if tag and repository in registry.manifests:
            body = registry.manifests[repository]
            headers = {
                "Content-Type": IMAGE_MANIFEST,
                "Docker-Content-Digest": str(Digest.of(body)),
            }
            self._send(200, headers, body if with_body else b"", len(body))
        elif blob in registry.configs:
            body = registry.configs[blob]
            self._send(200, {}, body if with_body else b"", len(body))
        elif blob in registry.sizes:
            self._send_zeros(registry.sizes[blob], with_body=with_body)
        else:
            self._send(200 if self.path == "/v2/" else 404, {}, b"", 0)

    def _send(self, status: int, headers: dict[str, str], body: bytes, length: int) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _send_zeros(self, size: int, *, with_body: bool) -> None:
        start, stop, status, headers = 0, size, 200, {"Accept-Ranges": "bytes"}
        asked = _RANGE.fullmatch(self.headers.get("Range", ""))
        if asked:
            start, stop, status = int(asked[1]), min(int(asked[2]) + 1, size), 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self._send(status, headers, b"", stop - start)
        left = stop - start if with_body else 0
        while left:
            left -= self.connection.send(memoryview(_ZEROS)[: min(left, len(_ZEROS))])

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""
