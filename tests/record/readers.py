"""What the trackers' files hold, read without the trackers: the formats are simple and documented."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def events(folder: Path) -> list[Any]:
    """The events of TensorBoard's files in ``folder``, in the order in which TensorBoard takes them.

    A record is its length, a checksum of that, the bytes, and their checksum (TFRecord).
    """
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("*tfevents*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            head = data[at : at + 8]
            length, checksum = struct.unpack("<QI", data[at : at + 12])
            body = data[at + 12 : at + 12 + length]
            (of_body,) = struct.unpack("<I", data[at + 12 + length : at + 16 + length])
            assert (checksum, of_body) == (_masked(head), _masked(body))
            found.append(Event.FromString(body))
            at += 16 + length
    return found


def values(folder: Path, kind: str) -> dict[str, list[tuple[int, Any]]]:
    """By tag, the steps and values of one kind: simple_value, histo, image or tensor."""
    found: dict[str, list[tuple[int, Any]]] = {}
    for event in events(folder):
        for value in event.summary.value:
            if value.WhichOneof("value") == kind:
                found.setdefault(value.tag, []).append((event.step, getattr(value, kind)))
    return found


def settings(folder: Path) -> dict[str, Any]:
    """What the HPARAMS plugin is told: by tag, the last message."""
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    found = {}
    for event in events(folder):
        for value in event.summary.value:
            if value.metadata.plugin_data.plugin_name == "hparams":
                found[value.tag] = HParamsPluginData.FromString(value.metadata.plugin_data.content)
    return found


def _masked(data: bytes) -> int:
    from tensorboardX.crc32c import crc32c

    checksum = crc32c(data)
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


def transactions(path: Path) -> Iterator[Any]:
    """The records of a run file of Weights & Biases: LevelDB's log format behind 7 bytes of its own."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for a header in this block
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        if at + 7 + length > len(data):  # still being written
            return
        parts.append(data[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(b"".join(parts))
            parts = []
