"""A server of one's own, wherever the program that wants it is run."""

import os
import subprocess
import sys

import pytest

import optserve

PROGRAM = """
import optserve
with optserve.local_server(backend="numpy") as server, optserve.connect(server.target) as client:
    print("served by", client.server_info().backend)
"""


def run(tmp_path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The program, from a folder other than the one that it is in."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "train.py").write_text(PROGRAM)
    return subprocess.run(
        [sys.executable, folder / "train.py"],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("module", ["random", "grpc"])
def test_a_file_in_the_working_folder_is_not_taken_for_a_module_of_the_server(tmp_path, module):
    (tmp_path / f"{module}.py").write_text("raise SystemExit('a file of the user')")
    done = run(tmp_path)
    assert done.stdout == "served by numpy\n", done.stderr


def test_pythonpath_is_honoured(tmp_path):
    """The server's program has it too: a module that Python imports at every start says where it was."""
    extra = tmp_path / "extra"
    extra.mkdir()
    (extra / "sitecustomize.py").write_text("import os, pathlib; pathlib.Path('pids', str(os.getpid())).touch()")
    (tmp_path / "pids").mkdir()
    done = run(tmp_path, PYTHONPATH=str(extra))
    assert done.stdout == "served by numpy\n", done.stderr
    assert len(list((tmp_path / "pids").iterdir())) >= 2


def test_a_notebook_starts_and_stops_a_server_without_a_block():
    server = optserve.LocalServer.start(backend="numpy", options=["--log-level", "error"])
    assert repr(server) == f"LocalServer({server.target!r}, running)"
    with optserve.connect(server.target) as client:
        assert client.server_info().backend == "numpy"
    server.stop()
    assert server.process.poll() == 0
    assert repr(server) == f"LocalServer({server.target!r}, ended with 0)"
    server.stop()  # again, as where a cell is run twice
    with pytest.raises(optserve.UnavailableError, match="did not start"):
        optserve.LocalServer.start(backend="abacus")
