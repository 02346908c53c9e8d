"""`optserve.keras`: `model.fit` on the torch and jax backends, beside Keras' own optimizers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("keras_program.py")
# The import of Keras takes longer than most scenarios. `mixed` changes the policy of its process, so it comes last.
SCENARIOS = [["methods"], ["settings", "callbacks"], ["frozen", "refusals", "saved", "mixed"]]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("scenarios", SCENARIOS, ids="-".join)
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_fit_is_that_of_keras(server, name, backend, scenarios):
    environment = {**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, PROGRAM, server.target, name, *scenarios],
        capture_output=True, text=True, timeout=290, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_the_documentation_is_right(tmp_path, backend):
    text = (Path(__file__).parents[2] / "docs" / "keras.md").read_text()
    (shown,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    program = tmp_path / "shown.py"
    program.write_text(shown)
    done = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, timeout=110, check=False,
        env={**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loss, steps = done.stdout.split()
    assert (float(loss) < 0.5, steps) == (True, "160")


def test_another_backend_is_refused(server, name):
    program = (
        "import sys, optserve, optserve.keras\n"
        "optserve.keras.RemoteOptimizer(sys.argv[1], optserve.Adam(), name=sys.argv[2])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, server.target, name],
        capture_output=True, text=True, timeout=110, check=False, env={**os.environ, "KERAS_BACKEND": "numpy"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "works on the backends torch and jax, not on 'numpy'" in done.stderr
