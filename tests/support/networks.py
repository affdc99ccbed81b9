"""Nodes as network namespaces: links limited in both directions, zones, and nodes that go silent.

One namespace is the switch. It has a bridge for each zone and, between two zones, a link whose
bytes are counted; it is also the router to the namespace of the registry, which is in no zone.
Nothing of it touches the machine's own network, and names are unique to the process. Needs root.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

_T = TypeVar("_T")

_CONGESTION_CONTROLS: Final = ("cubic", "reno")
_NAMESPACES: Final = Path("/run/netns")
_CLONE_NEWNET: Final = 0x40000000
_NETWORKS: Final = itertools.count()

_QUEUE: Final = "15ms"
"""How long a packet waits at most for a link: a longer queue would measure itself."""
_BURST: Final = "128kb"
_ROUTER: Final = "10.77.254.1"
_REGISTRY: Final = "10.77.254.2"
MBIT: Final = 100.0
"""What a node's link carries each way; the registry's carries twice as much."""


@dataclass(frozen=True)
class Traffic:
    """Bytes over a link since it was made, as the kernel counts them."""

    sent: int
    """By the host, or from the first zone to the second."""
    received: int


class Host:
    """One namespace with one link, whose two ends are limited alike."""

    def __init__(self, network: Network, name: str, zone: str, address: str, port: str) -> None:
        self.name = name
        self.zone = zone
        self.address = address
        self.namespace = network.namespace(name)
        self._network = network
        self._port = port
        """The name of the switch's end of the link."""

    @property
    def within(self) -> tuple[str, ...]:
        """What a command is started with to be on this host: nothing but its network is another."""
        return "nsenter", f"--net={_NAMESPACES / self.namespace}"

    def inside(self, call: Callable[[], _T]) -> _T:
        """What ``call`` gives on this host. Sockets that it makes stay here for ever."""
        return _inside(self.namespace, call)

    def connect(self, host: str, port: int, seconds: float = 5.0) -> socket.socket:
        """A connection from here. Raises ``OSError``."""
        import socket

        return self.inside(lambda: socket.create_connection((host, port), seconds))

    def limit(self, mbit: float) -> None:
        """From now on both directions of the link carry so many Mbit/s."""
        for namespace, device in ((self.namespace, "eth0"), (self._network.switch, self._port)):
            _limit(namespace, device, mbit)

    def blackhole(self) -> None:
        """From now on every packet from here and to here is lost, without a word to anybody."""
        self._set_port("disabled")

    def restore(self) -> None:
        """End :meth:`blackhole`."""
        self._set_port("forwarding")

    def _set_port(self, state: str) -> None:
        # a bridge's port, in the words of the spanning tree protocol: its link stays up
        _run(
            *("bridge", "-n", self._network.switch, "link", "set"),
            *("dev", self._port, "state", state),
        )

    def traffic(self) -> Traffic:
        """What its link has carried."""
        seen = self._network.counters()[self._port]
        return Traffic(sent=seen.received, received=seen.sent)


class Network:
    """A registry and nodes; made by :func:`network`."""

    def __init__(self, zones: tuple[str, ...], mbit: float) -> None:
        self.zones = zones
        self.mbit = mbit
        self._prefix = f"mcsi-{os.getpid()}-{next(_NETWORKS)}"
        self._hosts: dict[str, Host] = {}
        self._namespaces: list[str] = []
        self.switch = self.namespace("switch")

    def namespace(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def start(self) -> Host:
        """Make the switch and the registry's host, which is given back."""
        self._add_namespace(self.switch)
        self._make_switch()
        registry = self._add_host("registry", "", _REGISTRY, "registry")
        lines = [f"addr add {_ROUTER}/30 dev registry", "link set registry up"]
        _ip(self.switch, *lines)
        _ip(
            registry.namespace,
            f"addr add {_REGISTRY}/30 dev eth0",
            "link set eth0 up",
            f"route add default via {_ROUTER}",
        )
        registry.limit(2 * self.mbit)
        return registry

    def add(self, name: str, zone: str | None = None, mbit: float | None = None) -> Host:
        """A node of ``zone``, the first one unless given."""
        number = self.zones.index(zone or self.zones[0])
        place = len(self._hosts) + 10
        address = f"10.77.{number + 1}.{place}"
        host = self._add_host(name, self.zones[number], address, f"port{place}")
        port = f"port{place}"
        _ip(self.switch, f"link set {port} master zone{number}", f"link set {port} up")
        _ip(
            host.namespace,
            # all zones are one network, the registry is behind the router
            f"addr add {address}/17 dev eth0",
            "link set eth0 up",
            f"route add default via 10.77.{number + 1}.1",
        )
        host.limit(mbit or self.mbit)
        return host

    def between(self) -> Traffic:
        """What the link between the two zones has carried: from the first, and to it."""
        seen = self.counters()["between0"]
        return Traffic(sent=seen.sent, received=seen.received)

    def counters(self) -> dict[str, Traffic]:
        """What each of the switch's devices has sent and received."""
        told = _run("ip", "-n", self.switch, "-s", "-j", "link")
        return {
            device["ifname"]: Traffic(
                device["stats64"]["tx"]["bytes"], device["stats64"]["rx"]["bytes"]
            )
            for device in json.loads(told)
        }

    def remove(self) -> None:
        """Remove everything; the processes in it have to be gone for it to go."""
        for namespace in self._namespaces:
            _run("ip", "netns", "del", namespace)
        self._namespaces.clear()

    def _make_switch(self) -> None:
        for number in range(len(self.zones)):
            _ip(
                self.switch,
                f"link add zone{number} type bridge",
                f"addr add 10.77.{number + 1}.1/24 dev zone{number}",
                f"link set zone{number} up",
            )
        if len(self.zones) == 2:
            _ip(
                self.switch,
                "link add between0 type veth peer name between1",
                "link set between0 master zone0",
                "link set between1 master zone1",
                "link set between0 up",
                "link set between1 up",
            )
        # the bridge of one zone must not answer for that of the other
        _set(self.switch, "net/ipv4/conf/all/arp_ignore", "1")
        _set(self.switch, "net/ipv4/ip_forward", "1")

    def _add_host(self, name: str, zone: str, address: str, port: str) -> Host:
        host = self._hosts[name] = Host(self, name, zone, address, port)
        self._add_namespace(host.namespace)
        _run(
            *("ip", "link", "add", "eth0", "netns", host.namespace),
            *("type", "veth", "peer", "name", port, "netns", self.switch),
        )
        return host

    def _add_namespace(self, namespace: str) -> None:
        _run("ip", "netns", "add", namespace)
        self._namespaces.append(namespace)
        # its chatter would be counted
        _set(namespace, "net/ipv6/conf/all/disable_ipv6", "1")
        _set(namespace, "net/ipv6/conf/default/disable_ipv6", "1")
        _choose_congestion_control(namespace)
        _ip(namespace, "link set lo up")


@contextlib.contextmanager
def network(*zones: str, mbit: float = MBIT) -> Iterator[tuple[Network, Host]]:
    """A network with the registry's host, which is gone after the block.

    One zone or two; ``mbit`` is what the link of a node carries each way.
    """
    made = Network(zones or ("a",), mbit)
    try:
        yield made, made.start()
    finally:
        made.remove()


def _inside(namespace: str, call: Callable[[], _T]) -> _T:
    """Run ``call`` in a thread that is in ``namespace``."""
    results: list[_T] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            _enter(namespace)
            results.append(call())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


def _enter(namespace: str) -> None:
    """Put this thread into ``namespace``."""
    library = ctypes.CDLL(None, use_errno=True)
    with (_NAMESPACES / namespace).open("rb") as file:
        if library.setns(file.fileno(), _CLONE_NEWNET):
            number = ctypes.get_errno()
            raise OSError(number, f"{namespace}: {os.strerror(number)}")


def _set(namespace: str, setting: str, value: str) -> None:
    path = Path("/proc/sys") / setting
    _inside(namespace, lambda: path.write_text(value))


def _choose_congestion_control(namespace: str) -> None:
    """As nodes have it unless told otherwise, whatever this machine was told: what several
    connections leave of a link to each other depends on it.
    """
    for name in _CONGESTION_CONTROLS:
        # a namespace may choose among those that the machine allows everybody; reno always is
        with contextlib.suppress(PermissionError, FileNotFoundError):
            _set(namespace, "net/ipv4/tcp_congestion_control", name)
            return
    raise RuntimeError(f"none of {', '.join(_CONGESTION_CONTROLS)} can be used in a namespace")


def _limit(namespace: str, device: str, mbit: float) -> None:
    _run(
        *("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", "tbf"),
        *("rate", f"{round(mbit * 1000)}kbit", "burst", _BURST, "latency", _QUEUE),
    )


def _ip(namespace: str, *lines: str) -> None:
    _run("ip", "-n", namespace, "-batch", "-", input="\n".join(lines))


def _run(*command: str, input: str | None = None) -> str:
    done = subprocess.run(command, input=input, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}\n{input or ''}")
    return done.stdout
