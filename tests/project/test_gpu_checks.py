"""The checks that need a GPU are kept in order where there is none."""

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/gpu.sh"


def test_the_script_is_one_that_bash_understands():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    assert os.access(SCRIPT, os.X_OK)


def test_what_it_runs_is_there():
    named = re.findall(r"\btests/[\w/.]+", SCRIPT.read_text())
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert (ROOT / "benchmarks/gpu.py").exists()


def test_servers_of_tests_have_the_backend_that_it_asks_for():
    """A test that names a CPU's backend would not run on a GPU; these need that very backend."""
    its_own = {"test_health_probe.py", "test_api.py"}
    folders = [ROOT / "tests" / name for name in ("client", "durability", "service")]
    files = [file for folder in folders for file in folder.glob("*.py") if file.name not in its_own]
    assert [file.name for file in files if '"numba"' in file.read_text()] == []
