"""`auto` takes the fastest backend that works, and says why."""

import importlib

import pytest

from optserve_server.numerics import backends


@pytest.fixture
def broken(monkeypatch):
    """Make some backends fail as a missing or broken library does."""

    def break_(*names: str) -> None:
        real = importlib.import_module

        def import_module(name: str):
            for broken_name in names:
                if name.endswith(f".{broken_name}"):
                    raise ImportError(f"no {broken_name} today")
            return real(name)

        monkeypatch.setattr(importlib, "import_module", import_module)

    return break_


def test_auto_takes_numba_where_cupy_does_not_work_and_says_so(broken, caplog):
    broken("cupy")
    caplog.set_level("INFO")
    choice = backends.choose("auto")
    assert choice.backend.name == "numba"
    assert choice.reason == "cupy does not work here (ImportError: no cupy today); numba is the fastest that works"
    assert choice.reason in caplog.text


def test_auto_takes_numpy_where_nothing_else_works(broken):
    broken("cupy", "numba")
    choice = backends.choose("auto")
    assert choice.backend.name == "numpy"
    assert "no numba today" in choice.reason


def test_a_backend_asked_for_by_name_is_that_or_an_error(broken):
    broken("numba")
    assert backends.choose("numpy").backend.name == "numpy"
    with pytest.raises(RuntimeError, match="'numba' does not work here: ImportError: no numba today"):
        backends.choose("numba")
    with pytest.raises(RuntimeError, match="no backend 'tpu'"):
        backends.choose("tpu")
