"""A method is added in three places, its message, its formula and its oracle, and then everything has it.

The method is sign descent with momentum, whose rate falls with the steps of each parameter. It is added to a copy of
the project, in which `scripts/generate.sh` is run.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONTRACT = "proto/optserve/v1/algorithms.proto"
RULES = "server/optserve_server/numerics/rules/"
ORACLES = "tests/oracle.py"

MESSAGE = """
// Sign descent with momentum: Δx = −(η / √t) sign(m), t the step of the parameter.
//
//   m ← β m + (1 − β) g
//
// Slot `momentum` = m.
message SignDescent {
  // Learning rate η.
  optional double learning_rate = 1 [(hyperparameter) = {
    default_value: 0.001
    gte: 0
  }];
  // Decay β of the momentum.
  optional double beta = 2 [(hyperparameter) = {
    default_value: 0.9
    gte: 0
    lt: 1
  }];
}
"""

FORMULA = '''"""Sign descent with momentum."""

from optserve_server.numerics.rules import contract

_TINY = 1e-30


class SignDescent(contract.SignDescent):
    """m ← β m + (1−β) g;  Δx = −(η / √t) sign(m)."""

    slots = ("momentum",)
    signed_slots = ("momentum",)
    squares_gradient = False
    counts_steps = True

    def scalars(self, step):
        """η / √t, β, 1−β and a number that keeps out 0 / 0."""
        return self.learning_rate / step**0.5, self.beta, 1.0 - self.beta, _TINY

    @classmethod
    def bounds(cls, given, scalars):
        """See Rule. The rate is largest in the first step."""
        momentum = max(-given.slots[0][0], given.slots[0][1], given.gradient)
        return scalars[0], ((-momentum, momentum),)

    @staticmethod
    def update(sqrt, g, momentum, rate, beta, one_minus_beta, tiny):
        """The sign is m / |m|."""
        momentum = beta * momentum + one_minus_beta * g
        return -(rate * (momentum / (abs(momentum) + tiny))), momentum
'''

ORACLE = """

from optserve_server.numerics.rules import SignDescent


def sign_descent(gradients, learning_rate, beta):
    x = np.zeros_like(gradients[0])
    m = np.zeros_like(x)
    for t, g in enumerate(gradients, 1):
        m = beta * m + (1 - beta) * g
        x = x - learning_rate / np.sqrt(t) * np.sign(m)
    return x


ROWS["sign-descent"] = Row(SignDescent(beta=0.8), sign_descent, None, "torch has none.")
"""

TRAINING = """
import dataclasses
import sys

import numpy as np

import optserve
from oracle import sign_descent

backend, folder = sys.argv[1:]
rng = np.random.default_rng(7)
gradients = [rng.standard_normal(1003) for _ in range(20)]
method = optserve.SignDescent(learning_rate=0.05, beta=0.8)
x, rare = np.zeros(1003), np.zeros(1003)


def train(opt, turns):
    for t in turns:
        # One parameter takes part in every third step only.
        given = {"w": gradients[t]} | ({"rare": gradients[t]} if t % 3 == 0 else {})
        updates = opt.step(given, partial=True)
        x.__iadd__(updates["w"])
        rare.__iadd__(updates.get("rare", 0.0))


def made_of(client, name):
    return client.get_or_create_optimizer(name, method, {"w": x, "rare": rare})


with optserve.local_server(data_dir=folder, backend=backend) as server, optserve.connect(server.target) as client:
    opt = made_of(client, "toy")
    assert opt.algorithm == method
    train(opt, range(8))
# The second server has the method from the journal of the first.
with optserve.local_server(data_dir=folder, backend=backend) as server, optserve.connect(server.target) as client:
    opt = made_of(client, "toy")
    train(opt, range(8, 12))
    state = opt.export_state()
    assert state.parameter_steps == {"w": 12, "rare": 4}, state.parameter_steps
    opt.save_checkpoint("twelve")
    state.save(f"{folder}-state.safetensors")
    loaded = optserve.OptimizerState.load(f"{folder}-state.safetensors")
    assert loaded == state
    # The server's own file says it too.
    kept = optserve.OptimizerState.load(f"{folder}/checkpoints/toy/twelve.safetensors")
    assert kept.parameter_steps == state.parameter_steps
    opt.step({"w": gradients[0], "rare": gradients[0]})
    opt.restore_checkpoint("twelve")
    assert opt.export_state().parameter_steps == state.parameter_steps
    other = made_of(client, "other")
    other.import_state(loaded)
    assert other.export_state() == state
    train(other, range(12, 20))
    other.import_state(dataclasses.replace(state, parameter_steps=None))
    assert other.export_state().parameter_steps == {"w": 12, "rare": 12}
for total, given in ((x, gradients), (rare, gradients[::3])):
    np.testing.assert_allclose(total, sign_descent(given, 0.05, 0.8), rtol=1e-12, atol=1e-12)
print(method)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of this project with one method more."""
    root = tmp_path_factory.mktemp("project")
    for folder in ("client/python", "proto", "scripts", "server", "tests"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "golden"))
    shutil.copy(ROOT / "pyproject.toml", root)
    contract = root / CONTRACT
    text = contract.read_text()
    number = max(map(int, re.findall(r" = (\d+);", text[: text.index("\n  }\n}\n")]))) + 1
    field = f"\n    // Sign descent with momentum.\n    SignDescent sign_descent = {number};\n  }}\n}}\n"
    contract.write_text(text.replace("\n  }\n}\n", field, 1) + MESSAGE)
    (root / RULES / "sign_descent.py").write_text(FORMULA)
    with (root / ORACLES).open("a") as oracle:
        oracle.write(ORACLE)
    subprocess.run([root / "scripts/generate.sh"], env=environment(root), check=True, capture_output=True)
    return root


def environment(root: Path) -> dict[str, str]:
    """That of a process that takes everything from a copy of the project."""
    folders = [root / "client/python", root / "server", root / "tests"]
    return {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": os.pathsep.join(map(str, folders))}


def test_the_three_places_are_those_that_the_list_for_contributors_names():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    steps = re.findall(r"^\d\. .*?(?=^\d\. |^$)", text.split("### To add a method")[1], re.MULTILINE | re.DOTALL)
    for place, step in zip((CONTRACT, RULES, ORACLES), steps, strict=False):
        assert f"`{place}`" in step


def test_every_shared_test_takes_it(project):
    """Backends against the oracle and against each other, bounds, ranges and defaults, the client's names."""
    tests = ["numerics", "project/test_contract.py", "project/test_ranges.py", "client/test_api.py"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "sign_descent or sign-descent or SignDescent",
    ]
    done = subprocess.run(
        [*command, *(f"tests/{name}" for name in tests)],
        cwd=project, env=environment(project), capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > 20


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_it_trains_through_a_server_as_the_oracle_does(project, tmp_path, backend):
    done = subprocess.run(
        [sys.executable, "-c", TRAINING, backend, tmp_path / "data"],
        cwd=project, env=environment(project), capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "SignDescent(learning_rate=0.05, beta=0.8)\n"


def test_the_command_line_and_the_documentation_have_it(project):
    command = [
        sys.executable,
        "-c",
        "from optserve.cli import main; main()",
        "mnist",
        "--algorithm",
        "sign_descent",
        "--rho",
        "0.5",
    ]
    done = subprocess.run(
        command, cwd=project, env=environment(project), capture_output=True, text=True, timeout=110, check=False
    )
    assert "sign_descent has no rho; it has learning_rate, beta." in " ".join((done.stdout + done.stderr).split())
    page = (project / "docs/methods.md").read_text()
    assert "| `beta` | 0.9 | [0, 1) | Decay β of the momentum. |" in page
