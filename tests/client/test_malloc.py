"""Memory of messages is kept, not returned to the system and faulted in again."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import optserve

config = optserve.ClientConfig(keep_freed_memory=sys.argv[1] == "True")
with optserve.local_server() as server, optserve.connect(server.target, config):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        messages = [bytes(1 << 20) for _ in range(8)]
        for message in messages:
            bytes(memoryview(message))
        del messages, message
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize("keep", [True, False])
def test_messages_are_made_in_memory_that_is_there_already_if_the_client_may_keep_it(keep: bool) -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM, str(keep)], capture_output=True, text=True, check=True)
    page_faults = int(run.stdout)
    assert (page_faults < 10_000) == keep, page_faults
