"""Chooses the backend. The libraries behind the backends are imported only when one is tried."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass

from optserve_server.numerics.backends.base import Backend, Kernel

logger = logging.getLogger(__name__)

BACKENDS: dict[str, str] = {"cupy": "CupyBackend", "numba": "NumbaBackend", "numpy": "NumpyBackend"}
"""Class names by module, in the order in which `auto` tries them: fastest first."""


@dataclass(frozen=True)
class Choice:
    """A backend and the reason for it, in words."""

    backend: Backend
    reason: str


def load(name: str, threads: int = 0) -> Backend:
    """Make the backend of that name, or raise whatever its library raises where it cannot work."""
    module = importlib.import_module(f"optserve_server.numerics.backends.{name}")
    return getattr(module, BACKENDS[name])(threads)


def check_name(name: str) -> None:
    """Raise RuntimeError if there is no such backend, and it is not `auto`."""
    if name != "auto" and name not in BACKENDS:
        raise RuntimeError(f"There is no backend {name!r}; choose one of auto, {', '.join(BACKENDS)}.")


def choose(name: str, threads: int = 0) -> Choice:
    """Make the backend `name`; `auto` takes the first that works of CuPy, Numba and NumPy.

    Args:
        name: `auto` or a key of BACKENDS.
        threads: Threads of a CPU kernel; 0 for one per core.

    Raises:
        RuntimeError: No such backend, or it does not work here.
    """
    check_name(name)
    if name != "auto":
        try:
            backend = load(name, threads)
        except Exception as error:
            raise RuntimeError(f"Backend {name!r} does not work here: {_words(error)}.") from error
        return _chosen(backend, "asked for by name")
    failures: list[str] = []
    for candidate in BACKENDS:
        try:
            backend = load(candidate, threads)
        # A broken driver or library raises anything at all; what it was is kept and shown.
        except Exception as error:  # noqa: BLE001
            failures.append(f"{candidate} does not work here ({_words(error)})")
            continue
        return _chosen(backend, "; ".join([*failures, f"{candidate} is the fastest that works"]))
    raise RuntimeError(f"No backend works here: {'; '.join(failures)}.")


def _chosen(backend: Backend, reason: str) -> Choice:
    logger.info("backend %s on %s: %s", backend.name, backend.device, reason)
    return Choice(backend, reason)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


__all__ = ["BACKENDS", "Backend", "Choice", "Kernel", "check_name", "choose", "load"]
