"""Uploading through ``oras``: blobs streamed from disk, then the manifest.

oras knows the upload conversation of the distribution specification ("Push"). Its request method is
replaced: the original sleeps up to a minute and a half before it gives up, even on a refused
password, authenticates on its own terms, reads ``~/.netrc``, and raises bare ``ValueError``. It
also loads a whole blob into memory, so the upload of one blob is ours as well.
"""

from __future__ import annotations

import logging
import random
import tempfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import urlsplit

import httpx
import oras.container
import oras.provider
import requests
import requests.adapters
import trio

from fetcher.addresses import check_host, is_loopback
from fetcher.auth import Asked
from fetcher.errors import AccessDenied, InvalidRequest, ModelError, Unavailable
from fetcher.exchange import Answer, RegistrySettings, endpoint
from fetcher.modelpack import CONFIG_TYPE
from fetcher.network_errors import explain_causes
from fetcher.oci import Digest
from fetcher.refusals import Refused, refusal
from fetcher.routes import joined
from fetcher.trust import trusting

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator, Mapping

    from fetcher.credentials import Credentials
    from fetcher.oci import Reference
    from fetcher.packaging import ModelFile

log: Final = logging.getLogger(__name__)

_MAX_ERROR_BODY: Final = 16 * 1024
_TOLD_EVERY: Final = 4 * 1024 * 1024
_AGAIN: Final = frozenset({408, 429, 500, 502, 503, 504})


class Authorize(Protocol):
    """Gives an ``Authorization`` for pushing, other than a ``stale`` one."""

    async def __call__(self, *, stale: str | None = None) -> str | None: ...


@dataclass(frozen=True)
class Upload:
    """An artifact that is ready to go."""

    reference: Reference
    credentials: Credentials | None = field(repr=False)
    files: tuple[ModelFile, ...]
    digests: tuple[Digest, ...]
    config: bytes = field(repr=False)
    manifest: dict[str, object] = field(repr=False)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class Document:
    """A manifest or an index, byte for byte, and what it needs to be there before it."""

    reference: Reference
    credentials: Credentials | None = field(repr=False)
    target: str
    """The tag, or the digest."""
    media_type: str
    body: bytes = field(repr=False)
    blobs: tuple[bytes, ...] = field(default=(), repr=False)


async def upload_document(what: Document, authorize: Authorize, settings: RegistrySettings) -> None:
    """Send what the registry does not have of the blobs, then the document."""
    authorization = await authorize()
    await trio.to_thread.run_sync(_upload_document, what, authorization, authorize, settings)


def _upload_document(
    what: Document,
    authorization: str | None,
    authorize: Authorize,
    settings: RegistrySettings,
) -> None:
    """In a worker thread."""
    client = _Client(what, settings, authorization, authorize)
    try:
        for blob in what.blobs:
            client.send_bytes(blob)
        client.send_document(what)
    finally:
        client.session.close()


async def upload(
    what: Upload,
    authorize: Authorize,
    settings: RegistrySettings,
    progress: Callable[[int, int], None],
) -> Digest:
    """Send what the registry does not have, then the manifest; returns the manifest's digest.

    Cancelling takes effect at the next few megabytes; the blobs that arrived stay there.
    """
    authorization = await authorize()
    return await trio.to_thread.run_sync(
        _upload, what, authorization, authorize, settings, progress
    )


def _upload(
    what: Upload,
    authorization: str | None,
    authorize: Authorize,
    settings: RegistrySettings,
    progress: Callable[[int, int], None],
) -> Digest:
    """In a worker thread."""
    client = _Client(what, settings, authorization, authorize)
    try:
        told = _Told(what.size, progress)
        for file, digest in zip(what.files, what.digests, strict=True):
            client.send_blob(str(file.source), digest, file.size, told)
        client.send_bytes(what.config)
        return client.send_manifest(what.manifest)
    finally:
        client.session.close()


class _Told:
    """Bytes done, told to the trio thread now and then. A blob that starts again counts again."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self._total = total
        self._progress = progress
        self._finished = 0
        self._pending = 0

    def sent(self, count: int) -> None:
        """More bytes of the current blob."""
        self._pending += count
        if self._pending % _TOLD_EVERY < count:
            self._tell(self._finished + self._pending)

    def restart(self) -> None:
        """The current blob begins anew."""
        self._pending = 0

    def finish(self, size: int) -> None:
        """The current blob is there, sent or not."""
        self._finished, self._pending = self._finished + size, 0
        self._tell(self._finished)

    def _tell(self, done: int) -> None:
        # raises trio.Cancelled in this thread when the caller was cancelled
        if self._progress is None:
            trio.from_thread.check_cancelled()
        else:
            trio.from_thread.run_sync(self._progress, min(done, self._total), self._total)


class _Body:
    """A file on its way: requests streams whatever can be iterated, measured and read."""

    def __init__(self, path: str, size: int, told: _Told) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 -- closed by whoever made the body
        self._size = size
        self._told = told

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[bytes]:
        while block := self.read(64 * 1024):
            yield block

    def read(self, size: int = -1) -> bytes:
        block = self._file.read(size)
        self._told.sent(len(block))
        return block

    def rewind(self) -> None:
        self._file.seek(0)
        self._told.restart()

    def close(self) -> None:
        self._file.close()


class _Client(oras.provider.Registry):  # type: ignore[misc]  # oras has no types
    """oras' client with our requests. Lives in one worker thread."""

    def __init__(
        self,
        what: Upload | Document,
        settings: RegistrySettings,
        authorization: str | None,
        authorize: Authorize,
    ) -> None:
        reference = what.reference
        found = endpoint(reference.registry, settings)
        super().__init__(found.host, insecure=found.plain, tls_verify=found.verify)
        # both log URLs, whose queries are upload sessions; oras also what a registry says
        logging.getLogger("urllib3").setLevel(logging.WARNING)
        logging.getLogger("oras.logger").setLevel(logging.CRITICAL)
        if found.verify:
            self.session.mount("https://", _TrustingAdapter(trusting(settings.ca_file)))
        self.session.auth = _no_netrc
        # a proxy of the environment is never for this machine
        self.session.trust_env = not is_loopback(urlsplit(f"//{found.host}").hostname or "")
        self._endpoint = found
        self._credentials = what.credentials
        self._asked = Asked(
            reference.registry, found.host, found.plain, reference.repository, "pull,push"
        )
        self._settings = settings
        self._authorization = authorization
        self._authorize = authorize
        self._what = ""
        self._told = _Told(0, None)
        self._container = oras.container.Container("placeholder", registry=found.host)
        namespace, _, name = reference.repository.rpartition("/")
        # set by hand: oras takes a first component with a dot in it for a host
        self._container.namespace, self._container.repository = namespace or None, name
        self._container.tag, self._container.digest = reference.tag, None

    def send_blob(self, path: str, digest: Digest, size: int, told: _Told) -> None:
        """Send a file unless the registry has it."""
        self._what, self._told = self._goal(f"the blob {digest}"), told
        descriptor = {"digest": str(digest), "size": size, "mediaType": CONFIG_TYPE}
        self._insist(lambda: self.upload_blob(path, self._container, descriptor))
        told.finish(size)

    def send_bytes(self, content: bytes) -> None:
        """Send a small blob unless the registry has it."""
        with tempfile.NamedTemporaryFile(prefix="model-csi-blob-") as file:
            file.write(content)
            file.flush()
            self.send_blob(file.name, Digest.of(content), len(content), _Told(0, None))

    def send_document(self, what: Document) -> None:
        """Send a manifest or an index as it is."""
        self._what = self._goal(f"the manifest {what.target}")
        url = f"{self.prefix}://{self._container.manifest_url(what.target)}"
        kind = {"Content-Type": what.media_type}
        self._insist(lambda: self.do_request(url, "PUT", data=what.body, headers=kind))

    def send_manifest(self, manifest: dict[str, object]) -> Digest:
        """Send the manifest; the digest of what was sent."""
        self._what = self._goal(f"the manifest {self._container.tag}")
        response = self._insist(lambda: self.upload_manifest(manifest, self._container))
        body = response.request.body
        if not isinstance(body, bytes):
            raise AssertionError("a JSON document is sent as bytes")
        return Digest.of(body)

    def _goal(self, what: str) -> str:
        return f"{self._asked.repository}, where {what} was to go"

    def put_upload(
        self, blob: str, container: oras.container.Container, layer: Mapping[str, Any]
    ) -> requests.Response:
        """One blob in one PUT, as oras does it, but streamed."""
        kind = {"Content-Type": "application/octet-stream"}
        begin = f"{self.prefix}://{container.upload_blob_url()}"
        start = self.do_request(begin, "POST", headers={**kind, "Content-Length": "0"})
        location = start.headers.get("location", "")
        if not location:
            raise Unavailable(
                f"{self._asked.registry} does not say where to upload to",
                registry=self._asked.registry,
            )
        # the query is the registry's own: kept as it is, where oras takes it apart
        session = joined(begin, location)
        url = session._replace(
            query=f"{session.query}{'&' if session.query else ''}digest={layer['digest']}"
        ).geturl()
        if not layer["size"]:
            return self.do_request(url, "PUT", data=b"", headers=kind)
        body = _Body(blob, layer["size"], self._told)
        try:
            response = self.do_request(url, "PUT", data=body, headers=kind)
        finally:
            body.close()
        return response

    def do_request(
        self,
        url: str,
        method: str = "GET",
        data: Any = None,
        headers: Mapping[str, str] | None = None,
        json: Any = None,
        stream: bool = False,
    ) -> requests.Response:
        """One request; a second one where the registry wants a newer token.

        Returns successes, and a 404 to a HEAD; everything else is raised: as :class:`_Passing`
        where trying again may help.
        """
        response = self._request(url, method, data, headers, json)
        if response.status_code == 401:
            response.close()
            self._authorization = trio.from_thread.run(self._renew)
            if isinstance(data, _Body):
                data.rewind()
            response = self._request(url, method, data, headers, json)
        if response.status_code < 300 or (response.status_code == 404 and method == "HEAD"):
            response.close()
            return response
        error = self._refusal(response)
        if response.status_code in _AGAIN:
            raise _Passing(error)
        raise error

    async def _renew(self) -> str | None:
        return await self._authorize(stale=self._authorization)

    def _request(
        self, url: str, method: str, data: Any, headers: Mapping[str, str] | None, json: Any
    ) -> requests.Response:
        target = urlsplit(url)
        self._check_target(target.scheme, target.hostname)
        sent = {**(headers or {}), "User-Agent": self._settings.user_agent}
        if self._authorization and target.netloc == self._endpoint.host:
            sent["Authorization"] = self._authorization
        try:
            response: requests.Response = self.session.request(
                method,
                url,
                data=data,
                headers=sent,
                json=json,
                stream=True,
                allow_redirects=False,
                verify=self._endpoint.verify,
                # a registry with a large blob is silent while it puts the parts together
                timeout=(self._settings.connect_timeout, self._settings.answer_timeout),
            )
        except requests.exceptions.RequestException as error:
            silent = isinstance(error, requests.exceptions.Timeout)
            problem, passes = explain_causes(error, target.netloc, silent=silent)
            if passes:
                raise _Passing(problem) from error
            raise problem from error
        return response

    def _check_target(self, scheme: str, host: str | None) -> None:
        """Where a registry wants an upload to go is as hostile as a redirect."""
        if not host or scheme not in ("http", "https"):
            raise AccessDenied(f"{self._asked.registry} wants the upload to go to no web address")
        if scheme == "http" and not self._endpoint.plain:
            raise AccessDenied(
                f"{self._asked.registry} wants the upload to go to http://{host}, unencrypted"
            )
        check_host(host, asked_by=urlsplit(f"//{self._endpoint.host}").hostname)

    def _refusal(self, response: requests.Response) -> ModelError:
        with response:
            body = response.raw.read(_MAX_ERROR_BODY)
        if response.status_code == 413:
            return InvalidRequest(
                f"{self._asked.registry}, or a proxy before it, takes nothing as large as what was "
                f"to go to {self._asked.repository}",
                registry=self._asked.registry,
            )
        answer = Answer(response.status_code, httpx.Headers(dict(response.headers)), body)
        return refusal(
            Refused(self._asked, self._what, answer, self._credentials, self._authorization)
        )

    def _insist(self, operation: Callable[[], requests.Response]) -> requests.Response:
        """The whole operation again: an upload session does not survive a broken connection."""
        attempt = 0
        while True:
            attempt += 1
            self._told.restart()
            try:
                return operation()
            except _Passing as passing:
                if attempt >= self._settings.attempts:
                    raise passing.error from passing.__cause__
                pause = random.SystemRandom().uniform(0.5, 1.0) * min(10.0, 0.5 * 2.0**attempt)
                log.info("%s; trying again in %.1f s", passing.error.message, pause)
                trio.from_thread.run(trio.sleep, pause)
            except OSError as error:
                raise InvalidRequest(f"cannot read a file: {error.strerror}") from error


class _Passing(Exception):
    """Carries an error that another attempt may cure."""

    def __init__(self, error: ModelError) -> None:
        super().__init__(error.message)
        self.error = error


class _TrustingAdapter(requests.adapters.HTTPAdapter):
    """Trusts what the rest of this program trusts, instead of the authorities requests brings."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        super().__init__()

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, ssl_context=self._context, **options)

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        return super().proxy_manager_for(proxy, ssl_context=self._context, **options)

    def cert_verify(self, conn: Any, url: str, verify: Any, cert: Any) -> None:
        """Nothing: the context verifies."""


def _no_netrc(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """An authentication that adds nothing: without one, requests looks into ``~/.netrc``."""
    return request
