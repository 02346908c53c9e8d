"""Every example says how to run it, is in the README, and has a test."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path for path in (ROOT / "examples").iterdir() if path.suffix in {".py", ".ipynb"})
TESTS = "".join(
    path.read_text() for folder in ("examples", "integrations") for path in (ROOT / "tests" / folder).glob("test_*.py")
)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_explained_listed_and_tested(path):
    assert f"(examples/{path.name})" in (ROOT / "README.md").read_text()
    assert path.name in TESTS
    if path.suffix == ".py":
        explained = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert f"python examples/{path.name}" in explained
        assert "One sees" in explained


def test_there_are_examples():
    assert len(EXAMPLES) >= 4
