"""Docker's credential helper protocol: ``docker-credential-NAME get``, the server on its stdin.

A helper is the node's own program, and still it is held on a short rope: its time and its output
are bounded, it sees only the variables that helpers of the large clouds are configured by, and what
it prints is never logged.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import subprocess
from typing import TYPE_CHECKING, Final

import msgspec
import trio

if TYPE_CHECKING:
    from collections.abc import Mapping

log: Final = logging.getLogger(__name__)

HELPER_SECONDS: Final = 30.0
"""Helpers of clouds ask a metadata service and then a token service."""

_MAX_OUTPUT: Final = 256 * 1024
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NOT_FOUND: Final = b"credentials not found"

_PASSED_ON: Final = frozenset(
    """
    PATH HOME USER LANG TZ TMPDIR XDG_RUNTIME_DIR XDG_CONFIG_HOME DOCKER_CONFIG
    HTTP_PROXY HTTPS_PROXY NO_PROXY http_proxy https_proxy no_proxy SSL_CERT_FILE SSL_CERT_DIR
    AWS_REGION AWS_DEFAULT_REGION AWS_PROFILE AWS_CONFIG_FILE AWS_SHARED_CREDENTIALS_FILE
    AWS_ROLE_ARN AWS_ROLE_SESSION_NAME AWS_WEB_IDENTITY_TOKEN_FILE AWS_STS_REGIONAL_ENDPOINTS
    AWS_CONTAINER_CREDENTIALS_FULL_URI AWS_CONTAINER_CREDENTIALS_RELATIVE_URI
    AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE AWS_ECR_CACHE_DIR AWS_ECR_DISABLE_CACHE
    GOOGLE_APPLICATION_CREDENTIALS CLOUDSDK_CONFIG
    AZURE_CLIENT_ID AZURE_TENANT_ID AZURE_FEDERATED_TOKEN_FILE AZURE_AUTHORITY_HOST
    """.split()  # noqa: SIM905 -- four lines, not thirty-five
)
"""Names of files, regions, roles and proxies. Variables that are secrets themselves
(``AWS_SECRET_ACCESS_KEY``, our own ``MODEL_CSI_…``) are not among them."""


class _Answer(msgspec.Struct):
    username: str = msgspec.field(name="Username")
    secret: str = msgspec.field(name="Secret")


async def ask_helper(
    name: str, server: str, environment: Mapping[str, str] | None = None
) -> tuple[str, str] | None:
    """User name and secret for ``server``, or None: a helper that fails is a warning in the log.

    ``environment`` is what the helper's is cut from: this process's, unless given. Being cancelled
    kills the helper.
    """
    environment = os.environ if environment is None else environment
    if not _NAME.fullmatch(name):
        log.warning("ignoring a credential helper whose name is not the name of a program")
        return None
    program = shutil.which(f"docker-credential-{name}", path=environment.get("PATH"))
    if program is None:
        log.warning("the credential helper docker-credential-%s is not installed", name)
        return None
    passed_on = {key: environment[key] for key in _PASSED_ON if key in environment}
    try:
        with trio.fail_after(HELPER_SECONDS):
            code, output = await _run(program, server, passed_on)
    except trio.TooSlowError:
        log.warning("docker-credential-%s did not answer in %.0f seconds", name, HELPER_SECONDS)
        return None
    except OSError as error:
        log.warning("docker-credential-%s cannot be run: %s", name, error.strerror)
        return None
    return _read(name, code, output)


def _read(name: str, code: int, output: bytes) -> tuple[str, str] | None:
    if code:
        # by the protocol this text on stdout, and a failure, mean that there is no entry
        if _NOT_FOUND not in output[:200]:
            log.warning("docker-credential-%s failed with exit status %d", name, code)
        return None
    if len(output) > _MAX_OUTPUT:
        log.warning("docker-credential-%s printed more than %d bytes", name, _MAX_OUTPUT)
        return None
    try:
        answer = msgspec.json.decode(output, type=_Answer)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        log.warning("docker-credential-%s printed something that is not its protocol", name)
        return None
    return (answer.username, answer.secret) if answer.secret else None


async def _run(program: str, server: str, environment: Mapping[str, str]) -> tuple[int, bytes]:
    """Exit status and output, which is at most one byte longer than the limit."""
    process = await trio.lowlevel.open_process(
        [program, "get"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    try:
        return await _talk(process, server)
    finally:
        # the whole session: a helper written in shell has children that would hold the pipe
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with trio.CancelScope(shield=True), trio.move_on_after(5):
            await process.wait()


async def _talk(process: trio.Process, server: str) -> tuple[int, bytes]:
    if process.stdin is None or process.stdout is None:
        raise AssertionError("opened with pipes")
    async with process.stdin, process.stdout:
        with contextlib.suppress(trio.BrokenResourceError):
            await process.stdin.send_all(server.encode() + b"\n")
        await process.stdin.aclose()
        output = bytearray()
        async for part in process.stdout:
            output += part
            if len(output) > _MAX_OUTPUT:
                return 0, bytes(output[: _MAX_OUTPUT + 1])
    return await process.wait(), bytes(output)
