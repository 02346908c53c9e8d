"""What may be None, and is not where a test has got to."""

from typing import TypeVar

_T = TypeVar("_T")


def present(value: _T | None) -> _T:
    """The value, or fail."""
    assert value is not None
    return value
