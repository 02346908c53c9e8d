"""The command `optserve journal`, for data folders that no server is using."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from json import loads
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.progress import Progress

from optserve.cli.as_json import Json, print_json
from optserve.cli.console import errors, say, show_error, show_table, words
from optserve_server.engine import record_encoding as records
from optserve_server.persistence import folder_lock, snapshot
from optserve_server.persistence.journal import CorruptionError, JournalError, Reader, truncate_journal

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Look at, verify and repair the journal of a data folder that no server is using.",
)
Folder = Annotated[Path, typer.Argument(help="The data folder.", exists=True, file_okay=False)]

_KINDS = {
    records.CREATED: "creations",
    records.UPDATED: "updates",
    records.DELETED: "deletions",
    records.STEPPED: "steps",
    records.REPLACED: "replaced states",
    records.PLACED: "uploads",
    records.ADDED: "additions",
}


class _Contents(NamedTuple):
    """What was read of a data folder.

    Attributes:
        reader: The reader of the journal, after the last record.
        snapshot_lsn: LSN of the snapshot; 0 if there is none.
        counts: Number of records by (name of the optimizer, kind).
    """

    reader: Reader
    snapshot_lsn: int
    counts: Counter[tuple[str, str]]


def _read(folder: Path) -> _Contents:
    """Read and check everything that a start of a server reads."""
    lsn = 0
    for path in snapshot.paths(folder)[-1:]:
        lsn, saved = snapshot.read(path)
        for optimizer in saved:
            optimizer.verify()
    reader = Reader(folder, lsn)
    counts: Counter[tuple[str, str]] = Counter()
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("reading", total=reader.total_bytes)
        for record in reader:
            counts[records.optimizer_of(loads(record.meta)), _KINDS.get(record.kind, "others")] += 1
            progress.update(task, completed=reader.bytes_read)
    return _Contents(reader, lsn, counts)


@app.command()
def verify(folder: Folder, json: Json = False) -> None:
    """Check every checksum of the snapshot and the journal. The exit code is 1 if something is damaged."""
    with _one_line_errors(), folder_lock.reading(folder):
        reader, lsn, counts = _read(folder)
    torn_tail = reader.torn_tail
    if json:
        torn = {"file": torn_tail.path.name, "byte": torn_tail.offset} if torn_tail else None
        print_json({**_totals(reader, lsn), "records": sum(counts.values()), "torn": torn})
        return
    text = f"good: snapshot at {lsn}, then {sum(counts.values())} records, {reader.bytes_read / 1e6:.1f} MB"
    if torn_tail:
        text += f"; the torn record at byte {torn_tail.offset} of {torn_tail.path.name} was never acknowledged"
    say(text)


@app.command()
def stats(folder: Folder, json: Json = False) -> None:
    """Count the records of the journal after the last snapshot, by optimizer and kind."""
    with _one_line_errors(), folder_lock.reading(folder):
        reader, lsn, counts = _read(folder)
    names = sorted({name for name, _ in counts})
    if json:
        optimizers = [
            {"name": name, **{kind.replace(" ", "_"): counts[name, kind] for kind in _KINDS.values()}} for name in names
        ]
        print_json({**_totals(reader, lsn), "optimizers": optimizers})
        return
    rows = [[name, *(f"{counts[name, kind]:,}" for kind in _KINDS.values())] for name in names]
    show_table(("optimizer", *_KINDS.values()), rows, right=list(_KINDS.values()))
    say(f"snapshot at {lsn}; next record {reader.next_lsn}; {reader.bytes_read / 1e6:.1f} MB of records")


def _totals(reader: Reader, lsn: int) -> dict[str, int]:
    return {"snapshot_lsn": lsn, "next_lsn": reader.next_lsn, "bytes_read": reader.bytes_read}


@app.command()
def repair(folder: Folder, yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False) -> None:
    """Truncate a damaged journal where the damage begins. All later steps are lost; copy the folder first."""
    with _one_line_errors(), _locked(folder):
        try:
            _read(folder)
        except CorruptionError as damage:
            say(f"{damage}")
            if not yes:
                typer.confirm("Truncate the journal there, and lose every step after it?", abort=True)
            folder_lock.set_unclean(folder, unclean=True)
            removed = truncate_journal(folder, damage.path, damage.offset)
            say(f"truncated {damage.path.name} at byte {damage.offset}, removed {removed} later segments")
        else:
            say("there is nothing to repair")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder that is about to be changed, for the length of a with-block."""
    with folder_lock.reading(folder):
        pass
    lock = folder_lock.FolderLock(folder)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Print an error as one line, and end with exit code 1."""
    try:
        yield
    except (JournalError, OSError) as error:
        show_error(words(error), "optserve journal")
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app(prog_name="optserve journal")
