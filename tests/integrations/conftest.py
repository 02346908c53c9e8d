"""Tests beside the libraries that optserve plugs into; `make test-integrations` alone runs and loads them."""

import os
import re
from pathlib import Path

import pytest

# Models are made from configurations, with random weights: nothing is loaded.
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Whether a run that chooses tests by other markers passes by, without importing these large libraries."""
    chosen = config.getoption("markexpr")
    return True if chosen and not re.search(r"(?<!not )\bintegrations\b", chosen) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test here has the marker."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.integrations)
