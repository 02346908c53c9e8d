"""House rules that no linter checks."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULE_LINES, FUNCTION_LINES = 350, 60
"""Ruff checks complexity and the number of parameters; lines it does not count."""

CODE = [
    path
    for folder in ("client/python/optserve", "client/python/optserve_demo", "server/optserve_server")
    for path in (ROOT / folder).rglob("*.py")
    if "v1" not in path.parts
]


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_keeps_the_rules_of_the_house(path):
    text = path.read_text()
    if path.name != "config.py":
        assert not re.search(r"os\.environ|getenv", text), "the environment is read in config.py only"
    assert not re.search(r"^\s*assert ", text, re.MULTILINE), "an assert is no validation"
    assert not re.search(r"except:|pickle|time\.sleep", text)
    assert len(text.splitlines()) <= MODULE_LINES
    for function in ast.walk(ast.parse(text)):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (function.end_lineno or 0) - function.lineno < FUNCTION_LINES, function.name


def test_every_make_target_is_explained():
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert phony
    for target in phony[1].split():
        assert re.search(rf"^{target}:.*## ", text, re.MULTILINE), target
