"""What commands print: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec

from fetcher.logs import printable
from fetcher.quantities import bytes_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fetcher import agent_protocol as protocol


def result(value: object) -> None:
    """Print ``value`` as JSON."""
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def error(code: str, message: str, *, as_json: bool) -> None:
    """Print why the command failed, as one line or as one JSON object."""
    if as_json:
        print(json.dumps({"error": {"code": code, "message": message}}), file=sys.stderr)
    else:
        print(f"model-csi: {printable(message)}", file=sys.stderr)


def facts(rows: Iterable[tuple[str, str]]) -> None:
    """Print names and values, one pair a line."""
    shown = [(printable(name), printable(value)) for name, value in rows]
    width = max(len(name) for name, _ in shown)
    for name, value in shown:
        print(f"{name:{width}}  {value}")


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows below their heads, in columns. What a cell contains cannot steer a terminal."""
    cells = [list(heads), *([printable(cell) or "-" for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
    for row in cells:
        line = "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
        print(line.rstrip())


def short(digest: str) -> str:
    """A digest as people read it."""
    return digest.partition(":")[2][:12]


def moment(seconds: float) -> str:
    """A time as people read it, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def pulled(pull: protocol.PullResult) -> None:
    """Print where a model is now, and what it took."""
    fetched = "nothing: it was in the store"
    if pull.fetched:
        fetched = (
            f"{bytes_text(pull.fetched)} in {pull.seconds:.1f} s, "
            f"{bytes_text(pull.fetched / max(pull.seconds, 0.001))}/s"
        )
    facts(
        [
            ("reference", pull.reference),
            ("digest", pull.digest),
            ("path", pull.path),
            ("size", f"{bytes_text(pull.size)} in {pull.files} files"),
            ("fetched", fetched),
        ]
    )


def mounted(mount: protocol.MountResult) -> None:
    """Print what is where now."""
    rows = [("reference", mount.reference), ("digest", mount.digest), ("at", mount.target)]
    if mount.shown == "lazy":
        rows.append(("shown", "lazily: fetched while it is read"))
    facts(rows)


def models(listed: protocol.ListResult) -> None:
    """Print what is in the store."""
    table(
        ("DIGEST", "SIZE", "FILES", "LAST USED", "VOLUMES", "REFERENCES"),
        [
            (
                short(model.digest) + (f".{model.selection[:8]}" if model.selection else ""),
                bytes_text(model.size),
                str(model.files),
                moment(model.last_used),
                " ".join(model.volumes),
                " ".join(model.references),
            )
            for model in listed.models
        ],
    )


def model(found: protocol.InspectResult) -> None:
    """Print what a registry has."""
    facts(
        [
            ("reference", found.reference),
            ("manifest", found.digest),
            ("artifact type", found.artifact_type),
            ("size", f"{bytes_text(found.size)} in {len(found.layers)} layers"),
            *((f"annotation {key}", value) for key, value in sorted(found.annotations.items())),
        ]
    )
    print()
    table(
        ("DIGEST", "KIND", "PACKING", "SIZE", "PATH"),
        [
            (
                short(layer.digest),
                layer.kind,
                layer.packing,
                bytes_text(layer.size),
                layer.path or "",
            )
            for layer in found.layers
        ],
    )
    if found.config is not None:
        print()
        # every character that is not ASCII is escaped, so that nothing of it steers a terminal
        print(f"config {json.dumps(found.config, indent=2)}")


def _disk(disk: protocol.DiskRow) -> list[tuple[str, str]]:
    limit = "" if disk.limit is None else f" of at most {bytes_text(disk.limit)}"
    reserved = f", {bytes_text(disk.reserved)} more reserved" if disk.reserved else ""
    rows = [
        ("store", f"{bytes_text(disk.used)}{limit}{reserved}, {disk.models} models"),
        ("disk", f"{bytes_text(disk.free)} free of {bytes_text(disk.total)}"),
    ]
    if disk.orphan_bytes:
        rows.append(("orphans", f"{bytes_text(disk.orphan_bytes)} without a record"))
    return rows


def _uploads(found: protocol.UploadsRow) -> str:
    parts = found.from_store + found.passed_on + found.filled
    return (
        f"{bytes_text(found.bytes)} sent in {parts} parts, {found.filled} of them fetched for "
        f"others; {found.busy} sent elsewhere, {found.refused + found.strangers} turned away"
    )


def _asked(found: protocol.AskedRow) -> str:
    text = (
        f"{bytes_text(found.bytes)} from {found.members} peers in {found.requests} requests; "
        f"{found.busy} sent elsewhere, {found.failures} failed"
    )
    if found.wrong:
        text += f"; wrong bytes {found.wrong} times, {found.banned} peers banned for them"
    return text


def collected(found: protocol.GcResult) -> None:
    """Print what was evicted, or would have been."""
    if found.evicted:
        _evicted(found.evicted)
        print()
    word = "would free" if found.dry_run else "freed"
    rows = [(word, bytes_text(found.freed))]
    if found.orphan_bytes:
        rows.append(("orphans", f"{bytes_text(found.orphan_bytes)} without a record"))
    limit = "" if found.limit is None else f" of at most {bytes_text(found.limit)}"
    facts([*rows, ("used", f"{bytes_text(found.used)}{limit}")])


def removed(found: protocol.RemoveResult) -> None:
    """Print what was removed."""
    _evicted(found.removed)
    print()
    facts([("freed", bytes_text(found.freed))])


def verified(found: protocol.VerifyResult) -> None:
    """Print what was damaged, and what became of it."""
    if found.damaged:
        table(
            ("KIND", "DIGEST", "PROBLEM", "OUTCOME", "REFERENCES"),
            [
                (
                    row.kind,
                    short(row.digest) + (f".{row.selection[:8]}" if row.selection else ""),
                    row.problem,
                    row.outcome,
                    " ".join(row.references),
                )
                for row in found.damaged
            ],
        )
        print()
    facts([("read again", bytes_text(found.bytes)), ("damaged", str(len(found.damaged)))])


def _evicted(rows: Sequence[protocol.EvictedRow]) -> None:
    table(
        ("KIND", "DIGEST", "SIZE", "LAST USED", "REFERENCES"),
        [
            (
                row.kind,
                short(row.digest) + (f".{row.selection[:8]}" if row.selection else ""),
                bytes_text(row.bytes),
                moment(row.last_used),
                " ".join(row.references),
            )
            for row in rows
        ],
    )


def status(found: protocol.StatusResult) -> None:
    """Print how a node is doing."""
    agent = found.agent
    running = "not running"
    if agent is not None and agent.role == "serve":
        running = (
            f"process {agent.pid}, serving as {agent.driver_name} ({agent.mode}), "
            f"version {agent.version}, since {moment(agent.started)}"
        )
    elif agent is not None:
        running = f"process {agent.pid}, a command, since {moment(agent.started)}"
    rows = [("root", found.root), ("agent", running)]
    if found.disk is not None:
        rows.extend(_disk(found.disk))
    if found.uploads is not None:
        rows.append(("peers", _uploads(found.uploads)))
    if found.asked is not None:
        rows.append(("asked", _asked(found.asked)))
    facts(rows)
    if found.pulls:
        print()
        table(
            ("PULL", "DONE", "OF", "RATE", "WAITING", "REFERENCE"),
            [
                (
                    short(pull.digest),
                    bytes_text(pull.done),
                    bytes_text(pull.total),
                    f"{bytes_text(pull.rate)}/s",
                    str(pull.waiters),
                    pull.reference,
                )
                for pull in found.pulls
            ],
        )
    if found.volumes:
        print()
        table(
            ("VOLUME", "STATE", "SHOWN", "MODEL", "TARGET", "POD", "REFERENCE"),
            [
                (
                    volume.id,
                    volume.state,
                    _shown(volume),
                    short(volume.digest),
                    volume.target,
                    volume.pod or "",
                    volume.reference,
                )
                for volume in found.volumes
            ],
        )
        _remarks(found.volumes)
    if found.unknown_mounts:
        print()
        table(
            ("MOUNT OF NO VOLUME", "MODEL"),
            [(mount.target, short(mount.digest)) for mount in found.unknown_mounts],
        )


def _shown(volume: protocol.VolumeRow) -> str:
    if volume.shown != "lazy" or not volume.total:
        return volume.shown
    return f"lazy, {100 * min(volume.done, volume.total) // volume.total} %"


def _remarks(volumes: Sequence[protocol.VolumeRow]) -> None:
    """Print why volumes are shown as they are, and what is wrong with them."""
    rows = [
        (volume.id, remark)
        for volume in volumes
        for remark in (volume.reason, volume.problem)
        if remark
    ]
    if rows:
        print()
        table(("VOLUME", "REMARK"), rows)
