"""Compares results with the paper's numbers, as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from optserve_demo.paper.plan import Experiment
from optserve_demo.paper.training import Result

EARLY_EPOCHS = 6


@dataclass(frozen=True)
class Row:
    """One cell of a table, or one curve of a figure, at its end.

    Attributes:
        label: What it is.
        paper: Test error in per cent; None where the paper gives none.
        ours: The median over the seeds.
        least: Of the seeds.
        most: Of the seeds.
        seeds: How many.
        diverged: How many of them did.
        epochs: Passes over the training images.
        early: The median after the 6 epochs of the paper's tables, where there were more.
    """

    label: str
    paper: float | None
    ours: float
    least: float
    most: float
    seeds: int
    diverged: int
    epochs: int
    early: float | None = None

    @property
    def difference(self) -> float | None:
        """The result less the paper's number, in percentage points."""
        return None if self.paper is None else self.ours - self.paper


def rows(experiment: Experiment, results: Sequence[Result]) -> list[Row]:
    """One for each label, in the order of the results."""
    found = []
    for label in dict.fromkeys(result.label for result in results):
        same = [result for result in results if result.label == label]
        errors = [result.test_errors[-1] for result in same]
        found.append(
            Row(
                label,
                experiment.paper.get(label),
                median(errors),
                min(errors),
                max(errors),
                len(same),
                sum(result.diverged for result in same),
                same[0].settings["epochs"],
                _early(same),
            )
        )
    return found


def _early(results: Sequence[Result]) -> float | None:
    if min(len(result.test_errors) for result in results) <= EARLY_EPOCHS:
        return None
    return median(result.test_errors[EARLY_EPOCHS - 1] for result in results)


def markdown(experiment: Experiment, table: Sequence[Row], *, quick: bool) -> str:
    """A table for people."""
    lines = [f"## {experiment.title}", ""]
    if quick:
        lines += [
            "A quick run: fewer epochs and settings than the paper's; its numbers are not comparable.",
            "",
        ]
    # Columns without any value are left out.
    with_paper = not quick and any(row.paper is not None for row in table)
    with_early = any(row.early is not None for row in table)
    columns = [
        "",
        *(["paper"] if with_paper else []),
        *([f"after {EARLY_EPOCHS} epochs"] if with_early else []),
        "ours (median)",
        *(["ours − paper"] if with_paper else []),
        "least to most",
        "seeds",
        "epochs",
    ]
    lines += [_line(columns), "|" + "---|" * len(columns)]
    for row in table:
        paper = "" if row.paper is None else f"{row.paper:.2f} %"
        difference = "" if row.difference is None else f"{row.difference:+.2f}"
        cells = [
            row.label,
            *([paper] if with_paper else []),
            *(["" if row.early is None else f"{row.early:.2f} %"] if with_early else []),
            f"{row.ours:.2f} %",
            *([difference] if with_paper else []),
            f"{row.least:.2f} to {row.most:.2f} %",
            f"{row.seeds}" + (f", {row.diverged} diverged" if row.diverged else ""),
            f"{row.epochs}",
        ]
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def write(experiment: Experiment, table: Sequence[Row], folder: Path, *, quick: bool) -> list[Path]:
    """Write the table in all three forms; returns the files."""
    as_json, as_csv, as_markdown = (folder / f"{experiment.name}.{kind}" for kind in ("json", "csv", "md"))
    content = {"experiment": experiment.name, "title": experiment.title, "quick": quick, "rows": [*map(asdict, table)]}
    as_json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    with as_csv.open("w", newline="", encoding="utf-8") as target:
        writer = csv.DictWriter(target, list(asdict(table[0])))
        writer.writeheader()
        writer.writerows(map(asdict, table))
    as_markdown.write_text(markdown(experiment, table, quick=quick), encoding="utf-8")
    return [as_json, as_csv, as_markdown]
