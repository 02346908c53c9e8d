"""Snapshots: the state of all optimizers in a folder, taken piece by piece while steps go on.

    snapshot-LSN-N/manifest.json      what is in the files, and checksums
    snapshot-LSN-N/0000.safetensors   one optimizer: each array of each parameter, and the last updates

A piece is a stretch of one arena. It is copied under the optimizer's lock, which takes a fraction of a millisecond, and
remembers the number (lsn) of the last change that it contains. Rules are per dimension, so recovery can bring each
piece forward by itself, replaying the journal from that piece's own number on: the pieces need not be of one moment.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.engine.optimizer import Optimizer
from optserve_server.engine.transaction import Retained
from optserve_server.numerics.layout import Layout, dtype_of
from optserve_server.numerics.settings import Settings, UnknownSettingError
from optserve_server.numerics.staging import Staging
from optserve_server.numerics.state import State
from optserve_server.persistence.disk import SYSTEM_DISK, Disk
from optserve_server.persistence.files import write_all
from optserve_server.persistence.journal import JournalError
from optserve_server.persistence.state_file import Plan

FORMAT_VERSION = 1
PIECE_BYTES = 1 << 18
"""Bytes of one arena per piece: small enough that a step hardly waits for its copy."""

_SNAPSHOT = re.compile(r"snapshot-\d{20}-\d{4,}")
_SYNC_EVERY_BYTES = 8 << 20


@dataclass(frozen=True)
class Piece:
    """A stretch of one arena in a snapshot.

    Attributes:
        dtype: Of the arena, by name.
        start: First element.
        stop: Element after the last.
        lsn: Number of the last change that it contains.
        intact: Whether the staging buffer held the last reply at that moment.
        checksums: CRC-32 of each array's bytes, and of the updates' last.
    """

    dtype: str
    start: int
    stop: int
    lsn: int
    intact: bool
    checksums: list[int]


def write(
    folder: Path, lsn: int, optimizers: list[Optimizer], *, still: bool = False, disk: Disk = SYSTEM_DISK
) -> Path:
    """Write a snapshot of all optimizers, whole or not at all.

    Args:
        folder: Where snapshots are.
        lsn: Everything up to it is contained; some pieces contain more.
        optimizers: To be written.
        still: Hold each optimizer still while it is written, so that its pieces are all of one step. Otherwise its
            steps go on meanwhile, and only a journal makes one state of it.
        disk: Where the folder is.

    Returns:
        Its folder, which is durable.

    Raises:
        OptserveError: STATE_LOST: a device has failed, and there is nothing to be written of an optimizer.
    """
    for item in optimizers:
        _is_there(item)
    temporary = folder / "snapshot.tmp"
    disk.remove_tree(temporary, ignore_errors=True)
    disk.make_folder(temporary)
    try:
        lsn = _write_files(temporary, lsn, optimizers, still=still, disk=disk)
        # A number of its own: the one before stays until this one has its name, also where nothing has changed.
        same = [int(path.name.rpartition("-")[2]) for path in paths(folder) if path.name.startswith(_name(lsn))]
        final = folder / f"{_name(lsn)}-{1 + max(same, default=0):04d}"
        disk.rename(temporary, final)
    except BaseException:
        # What is of no use must not take the room that the journal needs.
        disk.remove_tree(temporary, ignore_errors=True)
        raise
    disk.sync_path(folder)
    return final


def _name(lsn: int) -> str:
    return f"snapshot-{lsn:020d}"


def _write_files(folder: Path, lsn: int, optimizers: list[Optimizer], *, still: bool, disk: Disk) -> int:
    """Write all files of a snapshot, durably; returns its number."""
    paths = [folder / f"{position:04d}.safetensors" for position in range(len(optimizers))]
    plans = [Plan(item.layout, (*item.settings.arrays, "update")) for item in optimizers]
    for path, plan in zip(paths, plans, strict=True):
        # First of all, so that a full disk says so before anything is written.
        with disk.create(path) as target:
            disk.allocate(target.fileno(), plan.size_bytes)
    described = [
        _write_optimizer(path, item, plan=plan, still=still, disk=disk)
        for path, item, plan in zip(paths, optimizers, plans, strict=True)
    ]
    present = [item for item in described if item]
    if still:
        # Without a journal, numbers go on behind the highest that is known.
        lsn = max([lsn, *(item["lsn"] for item in present)])
    body = json.dumps({"format": FORMAT_VERSION, "lsn": lsn, "optimizers": present})
    with disk.create(folder / "manifest.json") as file:
        manifest = json.dumps({"checksum": zlib.crc32(body.encode()), "body": body})
        write_all(file.fileno(), [manifest.encode()], 0, disk)
        disk.sync(file.fileno())
    disk.sync_path(folder)
    return lsn


def _write_optimizer(path: Path, item: Optimizer, *, plan: Plan, still: bool, disk: Disk) -> dict[str, Any] | None:
    """Write one optimizer's file; None if it was deleted meanwhile."""
    with path.open("r+b") as target:
        with item.steps.held_still() if still else nullcontext():
            described = _describe(item, path.name)
            pieces = _write_pieces(target.fileno(), item, plan, sync=not still, disk=disk) if described else None
        if described is None or pieces is None:
            disk.unlink(path)
            return None
        disk.sync(target.fileno())
    return described | {"pieces": [asdict(piece) for piece in pieces]}


def _is_there(item: Optimizer) -> bool:
    """Whether there is something to be written: False if the optimizer has been deleted.

    Raises:
        OptserveError: STATE_LOST. A snapshot without it would take the place of the journal that can bring it back.
    """
    try:
        item.steps.check_usable()
    except OptserveError as error:
        if error.reason is Reason.OPTIMIZER_NOT_FOUND:
            return False
        raise
    return True


def _describe(item: Optimizer, file: str) -> dict[str, Any] | None:
    """All of an optimizer but its arrays; None if it has been deleted."""
    with item.steps.held_still():
        if not _is_there(item):
            return None
        retained = item.steps.main.retained
        return {
            "id": item.id,
            "file": file,
            **item.settings.to_json(),
            "parameters": item.layout.to_json(),
            "etag": item.etag,
            "lineage": item.steps.lineage,
            "created_lsn": item.created_lsn,
            "creation_request_id": item.creation_request_id,
            "replacement_request_ids": [made.request_id for made in item.replacements],
            "targets": [made.target for made in item.replacements],
            "create_time": item.create_time.isoformat(),
            "update_time": item.update_time.isoformat(),
            "step": item.steps.step,
            "lsn": item.steps.lsn,
            "placed_by": item.steps.placed_by,
            "retained": _retained(retained, item.layout) if retained else None,
            "workers": item.steps.workers.registry.to_json(),
            **_parameter_steps(item.state),
        }


def _parameter_steps(state: State) -> dict[str, Any]:
    """The step counters of parameters, where the method uses them."""
    written = state.written_parameter_steps
    return {} if written is None else {"parameter_steps": written}


def _retained(retained: Retained, layout: Layout) -> dict[str, Any]:
    return {
        "request_id": retained.request_id,
        "step": retained.step,
        "tensors": retained.selection.tensors(layout),
        "intact": retained.intact,
    }


def _write_pieces(descriptor: int, item: Optimizer, plan: Plan, *, sync: bool, disk: Disk) -> list[Piece] | None:
    """Write the arrays, a stretch at a time; sync now and then if `sync`. None if it is deleted meanwhile."""
    arrays = item.settings.arrays
    write_all(descriptor, [plan.head], 0, disk)
    pieces: list[Piece] = []
    unsynced = 0
    for dtype, start, stop in _stretches(item.layout):
        with item.steps.held_still() as state:
            if not _is_there(item):
                return None
            parts = [state.read(dtype, array, start, stop).tobytes() for array in range(len(arrays))]
            parts.append(item.steps.main.staging.updates[dtype][start:stop].tobytes())
            number = item.steps.lsn
            intact = item.steps.main.retained is not None and item.steps.main.retained.intact
        for array, part in enumerate(parts):
            write_all(descriptor, [part], plan.offset(dtype, array, start), disk)
        pieces.append(Piece(dtype.name, start, stop, number, intact, [zlib.crc32(part) for part in parts]))
        unsynced += sum(len(part) for part in parts)
        if sync and unsynced > _SYNC_EVERY_BYTES:
            # In small portions, so that the journal's own syncs do not queue behind one large one.
            disk.sync_data(descriptor)
            unsynced = 0
    return pieces


def _stretches(layout: Layout) -> Iterator[tuple[np.dtype, int, int]]:
    for dtype, size in layout.sizes.items():
        stride = PIECE_BYTES // dtype.itemsize
        for start in range(0, size, stride):
            yield dtype, start, min(start + stride, size)


@dataclass(frozen=True)
class Saved:
    """One optimizer in a snapshot: all but its arrays, and its pieces to be loaded."""

    path: Path
    header: dict[str, Any]
    pieces: list[Piece]

    @property
    def layout(self) -> Layout:
        """Its parameters."""
        return Layout.from_json(self.header["parameters"])

    @property
    def settings(self) -> Settings:
        """Its method and what it is set to.

        Raises:
            JournalError: It is set to something that this server does not know.
        """
        try:
            return Settings.from_json(self.header)
        except UnknownSettingError as error:
            raise JournalError(
                f"{self.path.parent} cannot be read: {error}, in the settings of {self.header['id']!r}. Use the server "
                "that wrote it, or a newer one."
            ) from error

    def time(self, name: str) -> datetime:
        """`create_time` or `update_time`."""
        return datetime.fromisoformat(self.header[name])

    def load(self, state: State, staging: Staging) -> None:
        """Bring the pieces into a fresh state and its staging buffer.

        Raises:
            JournalError: The file is damaged.
        """
        for piece, parts in self._read():
            arrays = [np.frombuffer(part, dtype_of(piece.dtype)) for part in parts]
            for array, values in enumerate(arrays[:-1]):
                state.write(values.dtype, array, piece.start, values)
            staging.updates[arrays[-1].dtype][piece.start : piece.stop] = arrays[-1]

    def verify(self) -> None:
        """Read all pieces, or raise JournalError."""
        for _ in self._read():
            pass

    def _read(self) -> Iterator[tuple[Piece, list[bytes]]]:
        names = (*self.settings.arrays, "update")
        plan = Plan(self.layout, names)
        with self.path.open("rb") as source:
            for piece in self.pieces:
                dtype = dtype_of(piece.dtype)
                size = (piece.stop - piece.start) * dtype.itemsize
                parts = [
                    os.pread(source.fileno(), size, plan.offset(dtype, array, piece.start))
                    for array in range(len(names))
                ]
                if [zlib.crc32(part) for part in parts] != piece.checksums or any(len(part) != size for part in parts):
                    raise JournalError(
                        f"{self.path} is damaged around element {piece.start} of {piece.dtype}. Put the folder back "
                        "from a copy, or begin with an empty one."
                    )
                yield piece, parts


def paths(folder: Path) -> list[Path]:
    """Whole snapshots, oldest first."""
    return sorted(path for path in folder.glob("snapshot-*") if _SNAPSHOT.fullmatch(path.name))


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
