"""Identifiers use the words of docs/glossary.md: one word for one thing."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = [
    path
    for folder in ("client/python", "server/optserve_server")
    for path in (ROOT / folder).rglob("*.py")
    if "v1" not in path.parts
]

RETIRED = {
    "lane": "step slot",
    "roster": "registry",
    "turnstile": "upload limiter",
    "lent": "shared",
    "told": "reported",
    "again": "retry, replay or copy",
    "turn": "call lock, limit, queue or number",
    "turns": "call lock, limit or queue",
    "tell": "report or say",
    "tells": "report or say",
    "lend": "share",
    "lends": "share",
    "moved": "progress; replaced, of a folder",
    "passing": "retryable",
    "given up": "abandoned",
    "standing": "answer, or permanent",
    "still": "locked",
    "anew": "a verb: rewrite, renew, create",
}
"""Words of which no identifier is made, with what to write instead. Of several words, all must be in the identifier."""


def identifiers(tree: ast.AST) -> set[str]:
    """The names that a module gives: of functions, classes, arguments, variables and attributes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return found


def words(identifier: str) -> set[str]:
    """`_shareAgain_after` has share, again and after."""
    spaced = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in identifier)
    upper = identifier.lower() if identifier.isupper() else spaced
    return set(upper.replace("_", " ").split())


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_identifier_has_a_word_that_the_glossary_has_retired(path):
    for identifier in sorted(identifiers(ast.parse(path.read_text()))):
        for retired, instead in RETIRED.items():
            if set(retired.split()) <= words(identifier):
                pytest.fail(f"{identifier}: write {instead} instead of {retired}; see docs/glossary.md")


def test_the_words_of_an_identifier_are_found():
    assert words("_LANES_OF") == {"lanes", "of"}
    assert words("StepLane") == {"step", "lane"}
    assert words("_told_by") == {"told", "by"}
