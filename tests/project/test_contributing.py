"""CONTRIBUTING.md says which files to touch: they are there, and no list of what there is already is left out."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from optserve.v1 import service_pb2
from optserve_server.domain.config import ServerConfig
from optserve_server.domain.errors import Reason

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
SECTIONS = dict(re.findall(r"^### To add (.*?)\n(.*?)(?=^##)", TEXT, re.MULTILINE | re.DOTALL))

NAMES = {
    "an RPC": list(service_pb2.DESCRIPTOR.services_by_name["OptimizerService"].methods_by_name),
    "an error": [reason.name for reason in Reason],
    "a setting of the server": [item.name for item in fields(ServerConfig)],
}
WRITTEN = [
    *(ROOT / "proto/optserve").rglob("*.proto"),
    *(
        path
        for folder in ("client/python", "server", "tests")
        for path in (ROOT / folder).rglob("*.py")
        if "v1" not in path.parts
    ),
]
MOST = 0.85
"""The part of all names by which a file is a list of them."""


def paths(text: str) -> set[str]:
    """What is written as code and looks like a file or a folder of this project."""
    return {code for code in re.findall(r"`([^`\s]+)`", text) if "/" in code and not code.startswith("/")}


def lists_of(names: list[str]) -> set[str]:
    """The files, written by hand, in which most of the names stand, as they are or in snake case."""
    forms = [{name, f"ERROR_REASON_{name}", re.sub("(?<!^)(?=[A-Z])", "_", name).lower()} for name in names]
    found = set()
    for path in WRITTEN:
        words = set(re.findall(r"\w+", path.read_text()))
        if sum(bool(form & words) for form in forms) >= MOST * len(names):
            found.add(str(path.relative_to(ROOT)))
    return found


def test_there_is_a_list_for_each_kind_of_addition():
    assert list(SECTIONS) == [
        "a method",
        "an RPC",
        "an error",
        "a setting of the server",
        "a kind of change, which has to survive a crash",
    ]


@pytest.mark.parametrize("path", sorted(paths(TEXT)))
def test_a_file_that_is_named_is_there(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("what", NAMES)
def test_no_list_of_all_is_left_out(what):
    lists = lists_of(NAMES[what])
    assert lists
    assert lists <= paths(SECTIONS[what])


def test_the_make_targets_that_are_named_are_there():
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"`make ([a-z-]+)", TEXT))
    assert named
    assert all(f"\n{target}:" in makefile for target in named)
