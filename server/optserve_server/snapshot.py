"""Snapshots: the state of all optimizers in a folder, taken piece by piece while steps go on.

    snapshot-LSN/manifest.json        what is in the files, and checksums
    snapshot-LSN/0000.safetensors     one optimizer: each slot of each parameter, and the last updates

A piece is a stretch of one arena. It is copied under the optimizer's lock, which takes a fraction of a millisecond, and
remembers the number (lsn) of the last change that it contains. Rules are per dimension, so recovery can bring each
piece forward by itself, replaying the journal from that piece's own number on: the pieces need not be of one moment.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from optserve_server.journal import JournalError, sync_folder
from optserve_server.layout import STATE_DTYPES, Layout, Parameter
from optserve_server.optimizers import Optimizer
from optserve_server.rules import RULES, Rule
from optserve_server.state import State

FORMAT_VERSION = 1
PIECE_BYTES = 1 << 18
"""Bytes of one arena per piece: small enough that a step hardly waits for its copy."""

_SYNC_EVERY_BYTES = 8 << 20
_SAFETENSORS_DTYPES = {"float32": "F32", "float64": "F64"}


@dataclass(frozen=True)
class Piece:
    """A stretch of one arena in a snapshot.

    Attributes:
        dtype: Of the arena, by name.
        start: First element.
        stop: Element after the last.
        lsn: Number of the last change that it contains.
        intact: Whether the staging buffer held the last reply at that moment.
        checksums: CRC-32 of each slot's bytes, and of the updates' last.
    """

    dtype: str
    start: int
    stop: int
    lsn: int
    intact: bool
    checksums: list[int]


def rule_message(rule: Rule) -> dict[str, Any]:
    """A rule as JSON."""
    return {"name": rule.name, **asdict(rule)}


def rule_from(message: dict[str, Any]) -> Rule:
    """The reverse of `rule_message`."""
    values = dict(message)
    return RULES[values.pop("name")](**values)


def layout_message(layout: Layout) -> list[list[Any]]:
    """A layout as JSON."""
    return [[item.name, list(item.shape), item.dtype.name] for item in layout.parameters]


def layout_from(message: list[list[Any]]) -> Layout:
    """The reverse of `layout_message`."""
    return Layout(tuple(Parameter(name, tuple(shape), _dtype(dtype)) for name, shape, dtype in message))


def _dtype(name: str) -> np.dtype:
    return next(dtype for dtype in STATE_DTYPES if dtype.name == name)


class _File:
    """One optimizer's file: where each stretch of each array is."""

    def __init__(self, layout: Layout, slots: tuple[str, ...]) -> None:
        header: dict[str, Any] = {}
        self._arrays: dict[tuple[str, int], int] = {}
        offset = 0
        for position, array in enumerate((*slots, "update")):
            for dtype in STATE_DTYPES:
                self._arrays[dtype.name, position] = offset
                for parameter in layout.parameters:
                    if parameter.dtype == dtype:
                        end = offset + parameter.size * dtype.itemsize
                        header[f"{parameter.name}.{array}"] = {
                            "dtype": _SAFETENSORS_DTYPES[dtype.name],
                            "shape": list(parameter.shape),
                            "data_offsets": [offset, end],
                        }
                        offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.header = struct.pack("<Q", len(text)) + text

    def offset(self, dtype: str, array: int, start: int) -> int:
        """Byte of an element of an arena's array."""
        return len(self.header) + self._arrays[dtype, array] + start * np.dtype(dtype).itemsize


def write(folder: Path, lsn: int, optimizers: list[Optimizer]) -> Path:
    """Write a snapshot of all optimizers, whole or not at all.

    Args:
        folder: Where snapshots are.
        lsn: Everything up to it is contained; some pieces contain more.
        optimizers: Whose steps may go on meanwhile.

    Returns:
        Its folder, which is durable.
    """
    temporary = folder / f"snapshot-{lsn:020d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    described = [
        _write_optimizer(temporary / f"{position:04d}.safetensors", item) for position, item in enumerate(optimizers)
    ]
    body = json.dumps({"format": FORMAT_VERSION, "lsn": lsn, "optimizers": [item for item in described if item]})
    manifest = temporary / "manifest.json"
    with manifest.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"checksum": zlib.crc32(body.encode()), "body": body}))
        file.flush()
        os.fsync(file.fileno())
    sync_folder(temporary)
    final = temporary.with_suffix("")
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    sync_folder(folder)
    return final


def _write_optimizer(path: Path, item: Optimizer) -> dict[str, Any] | None:
    """Write one optimizer's file; None if it was deleted meanwhile."""
    file = _File(item.layout, item.rule.slots)
    with item.settings_lock, item.steps.held_still():
        if item.steps.retired:
            return None
        retained = item.steps.retained
        described = {
            "id": item.id,
            "file": path.name,
            "rule": rule_message(item.rule),
            "parameters": layout_message(item.layout),
            "etag": item.etag,
            "creation_request_id": item.creation_request_id,
            "create_time": item.create_time.isoformat(),
            "update_time": item.update_time.isoformat(),
            "step": item.steps.step,
            "lsn": item.steps.lsn,
            "retained": asdict(retained) if retained else None,
        }
    pieces: list[Piece] = []
    unsynced = 0
    with path.open("wb") as target:
        descriptor = target.fileno()
        os.pwrite(descriptor, file.header, 0)
        for dtype, start, stop in _stretches(item.layout):
            with item.steps.held_still() as state:
                parts = state.capture(dtype, start, stop)
                number = item.steps.lsn
                intact = item.steps.retained is not None and item.steps.retained.intact
            for array, part in enumerate(parts):
                os.pwrite(descriptor, part, file.offset(dtype.name, array, start))
            pieces.append(Piece(dtype.name, start, stop, number, intact, [zlib.crc32(part) for part in parts]))
            unsynced += sum(len(part) for part in parts)
            if unsynced > _SYNC_EVERY_BYTES:
                # In small portions, so that the journal's own syncs do not queue behind one large one.
                os.fdatasync(descriptor)
                unsynced = 0
        os.fsync(descriptor)
    return described | {"pieces": [asdict(piece) for piece in pieces]}


def _stretches(layout: Layout) -> Iterator[tuple[np.dtype, int, int]]:
    for dtype, size in layout.sizes.items():
        stride = PIECE_BYTES // dtype.itemsize
        for start in range(0, size, stride):
            yield dtype, start, min(start + stride, size)


@dataclass(frozen=True)
class Saved:
    """One optimizer in a snapshot: its settings, and its pieces to be loaded."""

    path: Path
    settings: dict[str, Any]
    pieces: list[Piece]

    @property
    def layout(self) -> Layout:
        """Its parameters."""
        return layout_from(self.settings["parameters"])

    @property
    def rule(self) -> Rule:
        """Its method."""
        return rule_from(self.settings["rule"])

    def time(self, name: str) -> datetime:
        """`create_time` or `update_time`."""
        return datetime.fromisoformat(self.settings[name])

    def load(self, state: State) -> None:
        """Bring the pieces into a fresh state.

        Raises:
            JournalError: The file is damaged.
        """
        for piece, parts in self._read():
            state.restore(_dtype(piece.dtype), piece.start, piece.stop, parts)

    def verify(self) -> None:
        """Read all pieces, or raise JournalError."""
        for _ in self._read():
            pass

    def _read(self) -> Iterator[tuple[Piece, list[bytes]]]:
        layout, slots = self.layout, self.rule.slots
        file = _File(layout, slots)
        with self.path.open("rb") as source:
            for piece in self.pieces:
                size = (piece.stop - piece.start) * np.dtype(piece.dtype).itemsize
                parts = [
                    os.pread(source.fileno(), size, file.offset(piece.dtype, array, piece.start))
                    for array in range(len(slots) + 1)
                ]
                if [zlib.crc32(part) for part in parts] != piece.checksums or any(len(part) != size for part in parts):
                    raise JournalError(
                        f"{self.path} is damaged around element {piece.start} of {piece.dtype}. Put the folder back "
                        "from a copy, or begin with an empty one."
                    )
                yield piece, parts


def paths(folder: Path) -> list[Path]:
    """Whole snapshots, oldest first."""
    return sorted(path for path in folder.glob("snapshot-*") if path.suffix != ".tmp")


def read(path: Path) -> tuple[int, list[Saved]]:
    """(lsn, optimizers) of a snapshot.

    Raises:
        JournalError: It is damaged, or of a newer format.
    """
    try:
        outer = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        body = outer["body"]
        damaged = zlib.crc32(body.encode()) != outer["checksum"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise JournalError(f"{path / 'manifest.json'} cannot be read: {error}") from error
    if damaged:
        raise JournalError(f"{path / 'manifest.json'} is damaged.")
    manifest = json.loads(body)
    if manifest["format"] > FORMAT_VERSION:
        raise JournalError(
            f"{path} has format {manifest['format']}; this server knows up to {FORMAT_VERSION}. Use a newer one."
        )
    saved = []
    for settings in manifest["optimizers"]:
        pieces = [Piece(**piece) for piece in settings.pop("pieces")]
        saved.append(Saved(path / settings["file"], settings, pieces))
    return manifest["lsn"], saved
