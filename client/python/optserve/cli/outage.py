"""Prints during a run that the server does not answer, and when it answers again. Clients themselves wait silently."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from optserve.cli.console import console, say
from optserve_command import probe

if TYPE_CHECKING:
    from optserve.config import ClientConfig

QUIET_S = 3.0
"""Seconds without a step after which the run asks the server for its health."""

_PROBE_TIMEOUT_S = 2.0


@contextmanager
def reporting_outages(target: str, config: ClientConfig) -> Iterator[Callable[[], None]]:
    """Watch a run for the length of a with-block; gives a function that the run has to call at every step.

    Args:
        target: The server.
        config: The settings of the client that makes the steps.
    """
    watch = _Watch(target, config)
    thread = threading.Thread(target=watch.run, name="outages", daemon=True)
    thread.start()
    try:
        yield watch.record_step
    finally:
        watch.ended.set()
        thread.join()


class _Watch:
    def __init__(self, target: str, config: ClientConfig) -> None:
        self.ended = threading.Event()
        self._target = target
        self._config = config
        self._last_step_at = time.monotonic()

    def record_step(self) -> None:
        self._last_step_at = time.monotonic()

    def run(self) -> None:
        stopped_at: float | None = None
        while not self.ended.wait(QUIET_S / 6):
            last_step_at = self._last_step_at
            if stopped_at is not None:
                if last_step_at > stopped_at:
                    say(f"{self._target} answers again after {last_step_at - stopped_at:.0f} s.", to=console)
                    stopped_at = None
            elif time.monotonic() - last_step_at > QUIET_S:
                reason = self._reason()
                # A step may have ended while the server was asked.
                if reason and self._last_step_at == last_step_at and not self.ended.is_set():
                    say(f"No step for {time.monotonic() - last_step_at:.0f} s: {reason}", style="yellow", to=console)
                    say(
                        f"Waiting for {self._target}, for up to {self._config.step_timeout_s:.0f} s.",
                        style="yellow",
                        to=console,
                    )
                    stopped_at = last_step_at

    def _reason(self) -> str:
        """Why the server makes no steps; empty if it is serving."""
        try:
            tls = self._config.tls
            secured = {name: str(value) for name, value in asdict(tls).items() if value} if tls else None
            status = probe.ask(self._target, _PROBE_TIMEOUT_S, secured)
        except probe.ProbeError as error:
            return str(error)
        return "" if status == "SERVING" else f"{self._target} is {status}."
