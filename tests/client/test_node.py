"""A client that is not Python: the Node.js example, from the .proto alone."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "client" / "node"

pytestmark = [
    pytest.mark.node,
    pytest.mark.skipif(not (shutil.which("node") and shutil.which("npm")), reason="Node.js is not installed"),
]


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> Path:
    """The example in a fresh checkout of its own, installed as its first comment says."""
    root = tmp_path_factory.mktemp("node")
    shutil.copytree(FOLDER, root / "client/node", ignore=shutil.ignore_patterns("node_modules"))
    shutil.copytree(FOLDER.parents[1] / "proto", root / "proto")
    install = ["npm", "install", "--no-audit", "--no-fund", "--package-lock=false"]
    subprocess.run(install, cwd=root / "client/node", check=True, capture_output=True)
    return root / "client/node" / "example.mjs"


@pytest.mark.parametrize("proxy", ["", "http://127.0.0.1:9"])
def test_the_example_fits_its_line(example, server, client, proxy):
    """Also where the environment names a proxy, which is not asked for what is on this machine."""
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    before = {item.name for item in client.list_optimizers()}
    done = subprocess.run(
        ["node", example, server.target], capture_output=True, text=True, timeout=60, check=False, cwd=example.parent,
        env={**environment, "grpc_proxy": proxy, "http_proxy": proxy},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "step 300: y = 2.0000 x + -1.0000"
    assert not {item.name for item in client.list_optimizers() if "node-" in item.name} - before
