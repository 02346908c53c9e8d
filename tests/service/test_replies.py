"""Replies that their clients have not taken: who has room, who is told to come back, and with which reason."""

import pytest

from optserve_server.domain.errors import Code, OptserveError, Reason
from optserve_server.edge.gate import replies as module
from optserve_server.edge.gate.replies import CALL_BYTES, Replies


def test_whoever_finds_no_room_is_told_that_and_not_that_there_are_too_many_streams(monkeypatch):
    monkeypatch.setattr(module, "WAIT_S", 0.0)
    ended = []
    replies = Replies(2 * CALL_BYTES + 1000, 60.0)
    taken = replies.add(500, "first", lambda: ended.append("first"))
    replies.add(500, "second", lambda: ended.append("second"))
    with pytest.raises(OptserveError, match="this server keeps at most") as caught:
        replies.add(1, "third", lambda: ended.append("third"))
    assert (caught.value.reason, caught.value.code) == (Reason.REPLIES_FULL, Code.RESOURCE_EXHAUSTED)
    assert caught.value.metadata == {"limit_bytes": str(2 * CALL_BYTES + 1000)}
    assert caught.value.retry_after_s
    taken()
    replies.add(1, "third", lambda: ended.append("third"))
    assert not ended
