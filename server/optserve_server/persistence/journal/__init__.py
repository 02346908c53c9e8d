"""An append-only journal of records in segment files: group-committed, checksummed, and sceptical of disks.

It knows bytes, not optimizers. A record is on disk when `append` returns; if `append` raises, it never was,
or the disk does not even let it be cut; see `Journal.cut_refused`.

    segment = header, records, zeros      (preallocated, so that a sync need not write file sizes)
    record  = header with checksums, meta, payload, padding

A log sequence number (lsn) counts records from 1. Each record also says up to which lsn everything was on disk when it
was written, and after a sync an empty record, a mark, says so too. That distinguishes a torn tail, which was never
acknowledged and is cut, from damage to acknowledged records, which is an error. A segment ends where the next one's
first lsn begins: after a failed sync the old segment is left behind and its doubtful tail never counts. The tail is cut
at once, as there may never be a next segment; while the disk refuses that, no record is taken.

Payloads come from clients and are never searched for records: behind a record that is not whole the reader goes on
where its header says that it ends, and where that is not readable either it looks for the segment's key, a random
number that each record begins with and nobody is told.
"""

from optserve_server.persistence.journal.format import (
    ClosedError,
    CorruptionError,
    JournalError,
    Record,
    segment_paths,
)
from optserve_server.persistence.journal.newest import cut_at, set_newest
from optserve_server.persistence.journal.reader import Reader
from optserve_server.persistence.journal.writer import Journal

__all__ = [
    "ClosedError",
    "CorruptionError",
    "Journal",
    "JournalError",
    "Reader",
    "Record",
    "cut_at",
    "segment_paths",
    "set_newest",
]
