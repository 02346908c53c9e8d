"""The command `optserve config`, which shows the settings of a server. ServerConfig is its only source."""

from __future__ import annotations

import ast
import inspect
import json as json_module
import textwrap
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from optserve.cli.as_json import Json, print_json
from optserve.cli.console import say, show_error, show_table
from optserve_server.domain import config, config_sources

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

UNITS = {"_s": "seconds", "_bytes": "bytes"}
"""The unit of a setting, by the end of its name."""


@app.command()
def show(
    file: Annotated[
        Optional[Path],
        typer.Option(
            "--config", help="TOML file of a server: show its values, and check them as a start does.", dir_okay=False
        ),
    ] = None,
    json: Json = False,
) -> None:
    """List every setting of a server: the keys of the TOML file that `optserve serve --config` takes.

    The environment variable OPTSERVE_<NAME>, in capitals, sets it too. `optserve serve --print-config` shows all values
    with where they come from.
    """
    try:
        given = config_sources.read(file) if file else {}
        in_effect = config.ServerConfig(**given) if file else None
    except config.ConfigError as error:
        show_error(str(error), "optserve config")
        raise typer.Exit(2) from error
    rows = [_row(setting, meaning, given, in_effect) for setting, meaning in settings()]
    if json:
        print_json(rows)
        return
    columns = ["setting", "type", "default", "unit", *(["value", "set"] if file else []), "meaning"]
    cells = [
        [
            row["name"],
            row["type"],
            as_text(row["default"]),
            row["unit"],
            *([as_text(row["value"]), "by the file" if row["set"] else ""] if file else []),
            row["meaning"],
        ]
        for row in rows
    ]
    show_table(columns, cells, right=("default", "value"), folded="meaning")
    if file:
        say(f"{len(given)} of {len(rows)} settings are set by {file}.")


def settings() -> list[tuple[Field[Any], str]]:
    """Every setting with its meaning, which is the docstring below it, in one line."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(config.ServerConfig))).body
    meanings: dict[str, str] = {}
    name = ""
    for node in body.body if isinstance(body, ast.ClassDef) else []:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        elif name and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            meanings[name] = " ".join(str(node.value.value).split())
            name = ""
    return [(setting, meanings.get(setting.name, "")) for setting in fields(config.ServerConfig)]


def _row(
    setting: Field[Any], meaning: str, given: dict[str, Any], in_effect: config.ServerConfig | None
) -> dict[str, Any]:
    return {
        "name": setting.name,
        "type": setting.type,
        "default": setting.default,
        "unit": next((unit for end, unit in UNITS.items() if setting.name.endswith(end)), ""),
        "meaning": meaning,
        "set": setting.name in given,
        "value": getattr(in_effect, setting.name) if in_effect else None,
    }


def as_text(value: Any) -> str:
    """A value as it stands in a TOML file."""
    # A text of JSON is one of TOML.
    return json_module.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)


if __name__ == "__main__":
    app(prog_name="optserve config")
