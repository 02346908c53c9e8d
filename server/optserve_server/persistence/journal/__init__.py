"""An append-only journal: records in segment files, with checksums, and one sync for all threads that write together.

The journal knows bytes, not optimizers. When `append` returns, the record is on disk. When `append` raises OSError, the
record is not in the journal, with one exception: the disk may refuse to remove a record that it refused to sync. See
`Journal.remove_refused`.

    segment = header, records, zeros      (preallocated, so that a sync need not write the size of the file)
    record  = header with checksums, meta, payload, padding

Each record has a log sequence number (LSN), which counts from 1. Its header also has the durable LSN: when the record
was written, all records up to that LSN were on disk. After a sync the journal writes a mark, which is a record without
content, with the new durable LSN. So the reader can distinguish two cases:

- A torn tail: the last record is not whole, and no durable LSN covers it. It was never acknowledged. The reader ignores
  it.
- Damage: a record is not whole, but a later durable LSN covers it. It was acknowledged. The reader raises an error.

A segment ends where the first LSN of the next segment begins. After a failed sync the journal truncates the segment to
what is durable, and continues in a new segment. While the disk refuses to truncate, the journal accepts no record.

Payloads come from clients, so the reader never searches them for records. After a record that is not whole it continues
at the end that the record's header gives. If that header is not readable, it searches for the segment's key: a random
number at the start of each record, which no client is ever given.
"""

from optserve_server.persistence.journal.format import (
    ClosedError,
    CorruptionError,
    JournalError,
    Record,
    segment_paths,
)
from optserve_server.persistence.journal.newest import note_newest_segment, truncate_journal
from optserve_server.persistence.journal.reader import Reader, TornTail
from optserve_server.persistence.journal.writer import Journal

__all__ = [
    "ClosedError",
    "CorruptionError",
    "Journal",
    "JournalError",
    "Reader",
    "Record",
    "TornTail",
    "note_newest_segment",
    "segment_paths",
    "truncate_journal",
]
