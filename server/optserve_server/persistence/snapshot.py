"""Snapshots: the state of all optimizers in a folder. Steps go on while a snapshot copies the state piece by piece.

    snapshot-LSN-N/manifest.json      what the other files contain, and checksums
    snapshot-LSN-N/0000.safetensors   one optimizer: each array of each parameter, and the updates of the last step

A piece is a stretch of one arena. The optimizer's lock is held for a fraction of a millisecond while a piece is copied.
Each piece has the LSN of the last change that it contains, so the pieces may be of different moments. Rules are per
dimension, so recovery can bring each piece up to date by itself: it makes the changes after the piece's LSN once more.
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
from optserve_server.persistence.state_file import FileLayout

FORMAT_VERSION = 1
PIECE_BYTES = 1 << 18
"""Bytes of one arena per piece: so few that a step hardly waits for the copy of a piece."""

_SNAPSHOT = re.compile(r"snapshot-\d{20}-\d{4,}")
_SYNC_EVERY_BYTES = 8 << 20


@dataclass(frozen=True)
class Piece:
    """A stretch of one arena in a snapshot.

    Attributes:
        dtype: Name of the arena's dtype.
        start: First element.
        stop: Element after the last.
        lsn: LSN of the last change that it contains.
        intact: Whether the staging buffer contained the last reply when the piece was copied.
        checksums: CRC-32 of the bytes of each array, and last of the updates.
    """

    dtype: str
    start: int
    stop: int
    lsn: int
    intact: bool
    checksums: list[int]


def write(
    folder: Path, lsn: int, optimizers: list[Optimizer], *, keep_locked: bool = False, disk: Disk = SYSTEM_DISK
) -> Path:
    """Write a snapshot of all optimizers, whole or not at all.

    Args:
        folder: The folder of the snapshots.
        lsn: The snapshot contains all changes up to this LSN; some of its pieces contain later ones.
        optimizers: The optimizers to write.
        keep_locked: Hold the lock of each optimizer while its file is written, so that all of its pieces are of one
            step. Otherwise its steps go on, and recovery needs the journal to bring the pieces to the same step.
        disk: The disk of the folder.

    Returns:
        The folder of the snapshot, which is durable.

    Raises:
        OSError: The disk refuses the snapshot.
        OptserveError: STATE_LOST: a device has failed, so the state of an optimizer cannot be read.
    """
    for optimizer in optimizers:
        # Raises if the state is lost.
        _is_deleted(optimizer)
    temporary = folder / "snapshot.tmp"
    disk.remove_tree(temporary, ignore_errors=True)
    disk.make_folder(temporary)
    try:
        lsn = _write_files(temporary, lsn, optimizers, keep_locked=keep_locked, disk=disk)
        # A new name even if nothing has changed: the previous snapshot stays until this one has its name.
        same = [int(path.name.rpartition("-")[2]) for path in paths(folder) if path.name.startswith(_name(lsn))]
        final = folder / f"{_name(lsn)}-{1 + max(same, default=0):04d}"
        disk.rename(temporary, final)
    except BaseException:
        # The journal needs the disk space that the unfinished snapshot takes.
        disk.remove_tree(temporary, ignore_errors=True)
        raise
    disk.sync_path(folder)
    return final


def _name(lsn: int) -> str:
    return f"snapshot-{lsn:020d}"


def _write_files(folder: Path, lsn: int, optimizers: list[Optimizer], *, keep_locked: bool, disk: Disk) -> int:
    """Write all files of a snapshot, durably; returns the LSN of the snapshot."""
    paths = [folder / f"{position:04d}.safetensors" for position in range(len(optimizers))]
    for path, optimizer in zip(paths, optimizers, strict=True):
        # All files are allocated first, so that a full disk refuses the snapshot before anything is written.
        with disk.create(path) as target:
            disk.allocate(target.fileno(), _file_layout(optimizer, optimizer.layout).size_bytes)
    descriptions = [
        _write_optimizer(path, optimizer, keep_locked=keep_locked, disk=disk)
        for path, optimizer in zip(paths, optimizers, strict=True)
    ]
    written = [description for description in descriptions if description]
    if keep_locked:
        # Without a journal, the next LSN comes after the highest one that the snapshot contains.
        lsn = max([lsn, *(description["lsn"] for description in written)])
    body = json.dumps({"format": FORMAT_VERSION, "lsn": lsn, "optimizers": written})
    with disk.create(folder / "manifest.json") as file:
        manifest = json.dumps({"checksum": zlib.crc32(body.encode()), "body": body})
        write_all(file.fileno(), [manifest.encode()], 0, disk)
        disk.sync(file.fileno())
    disk.sync_path(folder)
    return lsn


def _file_layout(optimizer: Optimizer, layout: Layout) -> FileLayout:
    """The layout of an optimizer's file, for these parameters."""
    return FileLayout(layout, (*optimizer.settings.arrays, "update"))


def _write_optimizer(path: Path, optimizer: Optimizer, *, keep_locked: bool, disk: Disk) -> dict[str, Any] | None:
    """Write one optimizer's file and return its description; None if the optimizer was deleted meanwhile."""
    with disk.reopen(path) as target:
        with optimizer.steps.locked_state() if keep_locked else nullcontext():
            with optimizer.steps.locked_state():
                # Parameters that are added later are not in this file: the journal has them.
                description, layout, pieces = _describe(optimizer, path.name), optimizer.layout, None
            if description is not None:
                pieces = _write_pieces(target.fileno(), optimizer, layout, sync=not keep_locked, disk=disk)
        if description is None or pieces is None:
            disk.unlink(path)
            return None
        disk.sync(target.fileno())
    return description | {"pieces": [asdict(piece) for piece in pieces]}


def _is_deleted(optimizer: Optimizer) -> bool:
    """Whether an optimizer has been deleted; raises STATE_LOST if its state is lost."""
    # A restart can recover it from the journal, unless a snapshot without the optimizer has replaced the journal.
    try:
        optimizer.steps.check_usable()
    except OptserveError as error:
        if error.reason is not Reason.OPTIMIZER_NOT_FOUND:
            raise
        return True
    return False


def _describe(optimizer: Optimizer, file: str) -> dict[str, Any] | None:
    """All of an optimizer except its arrays; None if it has been deleted."""
    with optimizer.steps.locked_state():
        if _is_deleted(optimizer):
            return None
        retained, parameter_steps = optimizer.steps.main.retained, optimizer.state.written_parameter_steps
        return {
            "id": optimizer.id,
            "file": file,
            **optimizer.settings.to_json(),
            "parameters": optimizer.layout.to_json(),
            "etag": optimizer.etag,
            "lineage": optimizer.steps.lineage,
            "created_lsn": optimizer.created_lsn,
            "creation_request_id": optimizer.creation_request_id,
            "replacement_request_ids": [replacement.request_id for replacement in optimizer.replacements],
            "targets": [replacement.target for replacement in optimizer.replacements],
            "create_time": optimizer.create_time.isoformat(),
            "update_time": optimizer.update_time.isoformat(),
            "step": optimizer.steps.step,
            "lsn": optimizer.steps.lsn,
            **({"layout_lsn": optimizer.steps.layout_lsn} if optimizer.steps.layout_lsn else {}),
            "placed_by": optimizer.steps.placed_by,
            "retained": _retained(retained, optimizer.layout) if retained else None,
            "workers": optimizer.steps.workers.registry.to_json(),
            **({} if parameter_steps is None else {"parameter_steps": parameter_steps}),
        }


def _retained(retained: Retained, layout: Layout) -> dict[str, Any]:
    return {
        "request_id": retained.request_id,
        "step": retained.step,
        "tensors": retained.selection.tensors(layout),
        "intact": retained.intact,
    }


def _write_pieces(
    descriptor: int, optimizer: Optimizer, layout: Layout, *, sync: bool, disk: Disk
) -> list[Piece] | None:
    """Write the arrays of these parameters, one stretch at a time.

    Returns the pieces; None if the optimizer was deleted meanwhile.
    """
    arrays, file_layout = optimizer.settings.arrays, _file_layout(optimizer, layout)
    write_all(descriptor, [file_layout.head], 0, disk)
    pieces: list[Piece] = []
    unsynced_bytes = 0
    for dtype, start, stop in _stretches(layout):
        with optimizer.steps.locked_state() as state:
            if _is_deleted(optimizer):
                return None
            parts = [state.read(dtype, array, start, stop).tobytes() for array in range(len(arrays))]
            parts.append(optimizer.steps.main.staging.updates[dtype][start:stop].tobytes())
            lsn = optimizer.steps.lsn
            intact = optimizer.steps.main.retained is not None and optimizer.steps.main.retained.intact
        for array, part in enumerate(parts):
            write_all(descriptor, [part], file_layout.offset(dtype, array, start), disk)
        pieces.append(Piece(dtype.name, start, stop, lsn, intact, [zlib.crc32(part) for part in parts]))
        unsynced_bytes += sum(len(part) for part in parts)
        if sync and unsynced_bytes > _SYNC_EVERY_BYTES:
            # In small portions, so that a sync of the journal does not wait for one large sync.
            disk.sync_data(descriptor)
            unsynced_bytes = 0
    return pieces


def _stretches(layout: Layout) -> Iterator[tuple[np.dtype, int, int]]:
    """(dtype, first element, element after the last) of each piece."""
    for dtype, size in layout.sizes.items():
        stride = PIECE_BYTES // dtype.itemsize
        for start in range(0, size, stride):
            yield dtype, start, min(start + stride, size)


@dataclass(frozen=True)
class SavedOptimizer:
    """One optimizer in a snapshot.

    Attributes:
        path: The file of its arrays.
        header: Its description in the manifest: everything except its arrays.
        pieces: Its pieces, which `load` reads.
    """

    path: Path
    header: dict[str, Any]
    pieces: list[Piece]

    @property
    def layout(self) -> Layout:
        """Its parameters."""
        return Layout.from_json(self.header["parameters"])

    @property
    def settings(self) -> Settings:
        """Its method and settings.

        Raises:
            JournalError: This server does not know one of the settings.
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
        """Load the pieces into a new state and its staging buffer.

        Raises:
            JournalError: The file is damaged.
        """
        for piece, parts in self._read_pieces():
            arrays = [np.frombuffer(part, dtype_of(piece.dtype)) for part in parts]
            for array, values in enumerate(arrays[:-1]):
                state.write(values.dtype, array, piece.start, values)
            staging.updates[arrays[-1].dtype][piece.start : piece.stop] = arrays[-1]

    def verify(self) -> None:
        """Read all pieces and compare their checksums; raise JournalError if the file is damaged."""
        for _ in self._read_pieces():
            pass

    def _read_pieces(self) -> Iterator[tuple[Piece, list[bytes]]]:
        """Each piece, with the bytes of each of its arrays, and last of the updates."""
        names = (*self.settings.arrays, "update")
        file_layout = FileLayout(self.layout, names)
        with self.path.open("rb") as source:
            for piece in self.pieces:
                dtype = dtype_of(piece.dtype)
                size = (piece.stop - piece.start) * dtype.itemsize
                parts = [
                    os.pread(source.fileno(), size, file_layout.offset(dtype, array, piece.start))
                    for array in range(len(names))
                ]
                if [zlib.crc32(part) for part in parts] != piece.checksums or any(len(part) != size for part in parts):
                    raise JournalError(
                        f"{self.path} is damaged around element {piece.start} of {piece.dtype}. Restore the "
                        "folder from a copy, or start with an empty one."
                    )
                yield piece, parts


def paths(folder: Path) -> list[Path]:
    """The complete snapshots in a folder, oldest first."""
    return sorted(path for path in folder.glob("snapshot-*") if _SNAPSHOT.fullmatch(path.name))


def read(path: Path) -> tuple[int, list[SavedOptimizer]]:
    """Read the manifest of a snapshot: its LSN and its optimizers.

    Raises:
        JournalError: The manifest is damaged, or a newer server wrote it.
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
    optimizers = []
    for header in manifest["optimizers"]:
        pieces = [Piece(**piece) for piece in header.pop("pieces")]
        optimizers.append(SavedOptimizer(path / header["file"], header, pieces))
    return manifest["lsn"], optimizers
