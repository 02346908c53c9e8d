"""The paper's experiments run through the service; a quick one with the real MNIST."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from optserve.cli.paper import command
from optserve_demo.paper import report
from optserve_demo.paper.plan import BEST, EXPERIMENTS, STEPS_PER_EPOCH, Run
from optserve_demo.paper.training import Result, settings_of
from trainer.test_data import write_idx


def paper(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from optserve.cli import main; main()", "paper", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.mnist
@pytest.mark.timeout(400)
def test_a_quick_figure_2_is_run_drawn_and_not_run_again(tmp_path):
    done = paper("figure2", "--quick", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    result = Result.read(tmp_path / "quick/figure2/adadelta-seed0.json")
    assert len(result.test_errors) == 2
    assert result.test_errors[-1] < 4.5
    assert result.looks == list(range(40, 2 * STEPS_PER_EPOCH + 1, 40))
    for name in ("w1", "w2", "w3"):
        assert len(result.rates[name]) == len(result.updates[name]) == len(result.looks)
        assert all(len(rates) == 10 and min(rates) > 0 for rates in result.rates[name])
        assert all(len(updates) == 10 for updates in result.updates[name])
    for kind in ("png", "svg", "json", "csv", "md"):
        assert (tmp_path / f"quick/figure2.{kind}").stat().st_size > 50
    again = paper("figure2", "--quick", "--out", tmp_path)
    assert "1 of 1 runs of figure2 were made before" in again.stdout


def test_the_tables_have_a_run_for_each_of_the_papers_cells():
    for name, cells in (("table1", 15), ("table2", 12)):
        experiment = EXPERIMENTS[name]
        runs = experiment.runs(7, False)
        assert [run.label for run in runs] == list(experiment.paper)
        assert len(runs) == cells
        assert {(run.epochs, run.activation, run.seed) for run in runs} == {(6, "relu", 7)}
    assert EXPERIMENTS["table1"].paper["adagrad-1e-2"] == 1.79
    assert EXPERIMENTS["table2"].paper["eps1e-6-rho0.99"] == 2.05


class Begun(Exception):
    """The runs would begin now, so many at a time."""


@pytest.mark.parametrize(("jobs", "expected"), [(0, 2), (3, 3)])
def test_there_are_as_many_runs_at_a_time_as_cores_that_may_be_used(tmp_path, monkeypatch, jobs, expected):
    """A quota, such as that of a container, counts: there would be a process for each of the machine's cores."""
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte", np.zeros((2, 5, 5)))
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte", np.zeros(2))

    def begin(plans, folder, target, at_a_time, *others) -> None:
        raise Begun(at_a_time)

    monkeypatch.setattr("optserve_demo.paper.jobs.carry_out", begin)
    monkeypatch.setattr("optserve._common.machine.usable_cores", lambda: 2)
    with pytest.raises(Begun) as caught:
        command("table1", seeds=1, jobs=jobs, out=tmp_path / "out", target="127.0.0.1:1", data_dir=tmp_path)
    assert caught.value.args == (expected,)


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_every_run_has_a_key_of_its_own(experiment):
    for quick in (False, True):
        keys = [run.key for seed in range(3) for run in experiment.runs(seed, quick)]
        assert len(set(keys)) == len(keys)


def result(label: str, seed: int, error: float, *, diverged: bool = False) -> Result:
    settings = settings_of(Run(label, BEST["sgd"], "relu", 6, seed))
    return Result(label, seed, settings, test_errors=[50.0, error], diverged=diverged)


def test_a_report_sets_medians_beside_the_paper(tmp_path):
    experiment = EXPERIMENTS["table1"]
    results = [result("sgd-1e0", seed, error) for seed, error in enumerate((2.0, 2.5, 2.3))]
    results += [result("momentum-1e0", 0, 90.2, diverged=True)]
    table = report.rows(experiment, results)
    assert [(row.label, row.paper, row.ours, row.least, row.most) for row in table] == [
        ("sgd-1e0", 2.26, 2.3, 2.0, 2.5),
        ("momentum-1e0", 89.68, 90.2, 90.2, 90.2),
    ]
    report.write(experiment, table, tmp_path, quick=False)
    text = (tmp_path / "table1.md").read_text()
    assert "| sgd-1e0 | 2.26 % | 2.30 % | +0.04 | 2.00 to 2.50 % | 3 | 6 |" in text
    assert "| 1, 1 diverged | 6 |" in text
    assert json.loads((tmp_path / "table1.json").read_text())["rows"][0]["ours"] == 2.3
    with (tmp_path / "table1.csv").open() as source:
        assert [row["label"] for row in csv.DictReader(source)] == ["sgd-1e0", "momentum-1e0"]


def test_a_quick_report_claims_no_comparison():
    text = report.markdown(
        EXPERIMENTS["table1"], report.rows(EXPERIMENTS["table1"], [result("sgd-1e0", 0, 3.0)]), quick=True
    )
    assert "not comparable" in text
    assert "2.26" not in text


def test_what_cannot_be_run_is_said():
    for arguments, message in ((("table9",), "table9"), (("table1", "--data-dir", "/nonexistent"), "is not a folder")):
        done = paper(*arguments)
        assert done.returncode != 0
        assert message in done.stdout + done.stderr
