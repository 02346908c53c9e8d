"""The clock of the client's waits, which may be closed, or get new deadlines, from its own thread."""

import threading
import time

from optserve._rpc.deadline import Watchdog


def test_one_that_is_closed_by_an_action_calls_all_others_at_once():
    """A client that is collected, or closed, in the watchdog's thread: its waits went on to their deadlines."""
    watchdog, ended = Watchdog(), threading.Event()
    watchdog.arm("later", time.monotonic() + 3000, ended.set)
    watchdog.arm("closes", time.monotonic(), watchdog.close)
    assert ended.wait(20)


def test_a_deadline_that_an_action_arms_is_kept():
    watchdog, ended = Watchdog(), threading.Event()

    def again() -> None:
        watchdog.arm("soon", time.monotonic() + 0.01, ended.set)

    watchdog.arm("later", time.monotonic() + 3000, again)
    watchdog.arm("arms", time.monotonic(), again)
    assert ended.wait(20)
    watchdog.close()


def test_one_that_is_closed_calls_what_is_armed_at_once():
    watchdog, ended = Watchdog(), threading.Event()
    watchdog.arm("later", time.monotonic() + 3000, ended.set)
    watchdog.close()
    assert ended.wait(20)
    called: list[bool] = []
    watchdog.arm("after", time.monotonic() + 3000, lambda: called.append(True))
    assert called
