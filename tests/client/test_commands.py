"""What the commands print: names as they are, whole tables, JSON, and a sentence instead of a traceback."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from importlib.metadata import version

import grpc
import numpy as np
import pytest

import optserve
from optserve.v1 import checkpoints_pb2, optimizer_pb2, service_pb2, service_pb2_grpc, statistics_pb2
from optserve_server.domain.config import ServerConfig

PROGRAM = "from optserve.cli import main; main()"
NOBODY = ("--target", "127.0.0.1:1")
LONG = "encoder.layers.11.attention.query_key_value.projection.weight_of_the_first_head"
NAMES = ["rel[likes].w", "rel[/m/02mjmr].w", "[bold]", LONG]


def command(*arguments: object, program: str = PROGRAM, stdin: str = "") -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", program, *map(str, arguments)]
    # No COLUMNS and no terminal: a pipe.
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False, env=environment, input=stdin)


SEVERAL = """
import json, sys
lines = json.loads(sys.argv[1])
for line in lines:
    sys.argv = ["optserve", *line]
    try:
        from optserve.cli import main; code = main()
    except SystemExit as end:
        code = end.code
    print(code or 0, end="\\0", flush=True)
    print(end="\\0", file=sys.stderr, flush=True)
"""


def commands(lines: Sequence[Sequence[object]]) -> list[subprocess.CompletedProcess[str]]:
    """The same as `command`, one after the other in one process, which starts once."""
    done = command(json.dumps([list(map(str, line)) for line in lines]), program=SEVERAL)
    outputs, errors = done.stdout.split("\0")[:-1], done.stderr.split("\0")[:-1]
    assert len(outputs) == len(errors) == len(lines), done.stderr
    return [
        subprocess.CompletedProcess([str(word) for word in line], int(output[-1]), output[:-1], error)
        for line, output, error in zip(lines, outputs, errors, strict=True)
    ]


def on_a_terminal(columns: int, *arguments: object) -> str:
    """What a command shows on a terminal of that width, without its colours."""
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    line = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    environment["TERM"] = "xterm"
    with subprocess.Popen(line, stdin=writer, stdout=writer, stderr=writer, env=environment) as process:
        os.close(writer)
        shown = b""
        while True:
            try:
                got = os.read(reader, 1 << 16)
            except OSError:  # the other side is closed
                break
            if not got:
                break
            shown += got
    os.close(reader)
    assert process.returncode == 0, shown
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())


def is_a_sentence(done: subprocess.CompletedProcess[str]) -> bool:
    return done.returncode == 1 and done.stderr.startswith("optserve: ") and done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def made(server, client) -> Iterator[str]:
    """An optimizer that has made a step, with names that markup would take for its own."""
    name = "commands-made"
    params = {key: np.full(3, 1e-3, np.float32) for key in NAMES}
    client.create_optimizer(name, optserve.Adadelta(), params).step(params)
    yield name
    client.delete_optimizer(name)


# --- Names and what servers say


def test_names_in_brackets_are_shown_as_they_are(server, made):
    for what in ("show", "statistics"):
        done = command("optimizers", what, made, "--target", server.target)
        assert done.returncode == 0, done.stderr
        for name in NAMES:
            assert name in done.stdout


def test_paths_in_brackets_are_shown_as_they_are(server, made, tmp_path):
    folder = tmp_path / "[" / "red]"
    folder.mkdir(parents=True)
    file = folder / "[bold]state[" / "red].safetensors"
    missing = command("optimizers", "export", made, file, "--target", server.target)
    assert is_a_sentence(missing), missing.stderr
    assert str(file) in missing.stderr
    file.parent.mkdir()
    assert f"in {file}." in command("optimizers", "export", made, file, "--target", server.target).stdout
    again = command("optimizers", "export", made, file, "--target", server.target)
    assert again.stderr == f"optserve: {file} exists; --overwrite replaces it.\n"


EVIL = "a\x1b]0;title\x07\x9b31m[/b]\u202eb\rc\nd"


class Evil(service_pb2_grpc.OptimizerServiceServicer):
    """A server that steers terminals by whatever it says."""

    def GetServerInfo(self, request, context):  # noqa: N802
        return service_pb2.GetServerInfoResponse(
            version=EVIL, backend=EVIL, backend_reason=EVIL, device=EVIL, durability=EVIL, methods=[EVIL]
        )

    def ListOptimizers(self, request, context):  # noqa: N802
        return service_pb2.ListOptimizersResponse(optimizers=[self._optimizer(f"optimizers/{EVIL}")])

    def GetOptimizer(self, request, context):  # noqa: N802
        if request.name != "optimizers/there":
            context.abort(grpc.StatusCode.NOT_FOUND, EVIL)
        return service_pb2.GetOptimizerResponse(optimizer=self._optimizer(request.name))

    def GetStatistics(self, request, context):  # noqa: N802
        tensor = statistics_pb2.TensorStatistics(tensor=0, rms_gradient=1.0)
        return statistics_pb2.GetStatisticsResponse(step=1, tensors=[tensor])

    def ListCheckpoints(self, request, context):  # noqa: N802
        item = checkpoints_pb2.Checkpoint(name=f"optimizers/there/checkpoints/{EVIL}", step=1)
        return checkpoints_pb2.ListCheckpointsResponse(checkpoints=[item])

    def _optimizer(self, name: str) -> optimizer_pb2.Optimizer:
        item = optimizer_pb2.Optimizer(name=name, step=1, slots=[EVIL])
        item.algorithm.adadelta.SetInParent()
        item.parameters.add(name=EVIL, shape=[3], data_type=optimizer_pb2.DATA_TYPE_FLOAT32)
        return item


@pytest.fixture(scope="module")
def evil() -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(4))
    service_pb2_grpc.add_OptimizerServiceServicer_to_server(Evil(), server)  # pyright: ignore[reportAbstractUsage]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_nothing_that_a_server_says_steers_the_terminal(evil):
    lines = [
        ("info",),
        ("optimizers", "list"),
        ("optimizers", "show", "there"),
        ("optimizers", "show", "missing"),
        ("optimizers", "statistics", "there"),
        ("optimizers", "delete", "missing"),
        ("checkpoints", "list", "there"),
        ("health",),
    ]
    for done in commands([(*line, "--target", evil) for line in lines]):
        said = done.stdout + done.stderr
        assert "Traceback" not in said
        assert not set(said) & set("\x1b\x07\x9b\r\u202e"), said
        assert ("health" in done.args) or "\\x1b]0;title" in said or "b]\\u202eb" in said
        # Lines after the first of an error are indented, so that they are not taken for something else.
        assert not re.search("^d", said, re.MULTILINE)
        assert done.returncode == (1 if "missing" in done.args or "health" in done.args else 0)


# --- Errors of the system


@pytest.mark.parametrize("path", ["none/state.safetensors", "file/state.safetensors", f"{'x' * 252}.safetensors"])
def test_an_export_finds_out_before_the_transfer_that_it_cannot_be_written(tmp_path, path):
    (tmp_path / "file").touch()
    done = command("optimizers", "export", "any", tmp_path / path, *NOBODY)
    assert is_a_sentence(done), done.stderr
    # It is about the file: the server, which is not there, was not asked.
    assert str(tmp_path) in done.stderr
    assert "Errno" not in done.stderr
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_a_file_that_grows_too_large_in_the_end_is_one_sentence(server, made, tmp_path):
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); {PROGRAM}"
    file = tmp_path / "state.safetensors"
    done = command("optimizers", "export", made, file, "--target", server.target, program=limited)
    assert is_a_sentence(done), done.stderr
    assert "File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_cannot_be_written_is_said_before_the_training(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (f"{'x' * 260}.json", "folder"):
        done = command("mnist", "--json", tmp_path / path, "--data-dir", tmp_path)
        assert done.returncode in (1, 2)
        assert "Traceback" not in done.stderr
        assert "x" * 200 in done.stderr.replace("\n", "") or "directory" in done.stderr


# --- Tables


def test_a_table_in_a_pipe_is_as_wide_as_its_cells(server, made):
    shown = command("optimizers", "statistics", made, "--target", server.target).stdout
    (row,) = [line for line in shown.splitlines() if LONG in line]
    assert "…" not in shown
    assert len([cell for cell in re.split(r"[│\s]+", row) if cell]) == 8


@pytest.mark.parametrize("columns", [200, 80, 30])
def test_no_digit_is_cut_on_any_terminal(server, client, made, columns):
    shown = on_a_terminal(columns, "optimizers", "statistics", made, "--target", server.target)
    statistics = client.optimizer(made).statistics()
    for name, item in statistics.parameters.items():
        numbers = [item.rms_gradient, item.rms_update, *item.rates.values()]
        for number in numbers:
            assert f"{number:.3g}" in shown
        # A name may be folded.
        assert name in re.sub(r"[│\s]+", "", shown) or name in shown
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= max(columns, len(LONG) + 20)


# --- Questions


def test_nothing_is_asked_about_what_does_not_exist(server, made):
    lines = [
        ("optimizers", "delete", "no-such"),
        ("checkpoints", "delete", made, "no-such"),
        ("checkpoints", "restore", made, "no-such"),
        ("checkpoints", "restore", "no-such", "any"),
    ]
    for done in commands([(*line, "--target", server.target) for line in lines]):
        assert is_a_sentence(done), done.stderr
        assert "no-such" in done.stderr
        assert "?" not in done.stdout


def test_what_exists_is_asked_about_with_its_step(server, client, made):
    client.optimizer(made).save_checkpoint("kept")
    for arguments in (("optimizers", "delete", made), ("checkpoints", "delete", made, "kept")):
        done = command(*arguments, "--target", server.target, stdin="n\n")
        assert done.returncode == 1
        assert "at step 1" in done.stdout
    assert client.optimizer(made).current_step == 1
    done = command("checkpoints", "delete", made, "kept", "--target", server.target, stdin="y\n")
    assert (done.returncode, client.list_checkpoints(made)) == (0, [])


# --- For programs


def test_every_command_that_shows_something_can_show_it_as_json(server, client, made):
    client.optimizer(made).save_checkpoint("json")
    lines = [("optimizers", "list"), ("optimizers", "show", made), ("optimizers", "statistics", made)]
    lines += [("checkpoints", "list", made), ("info",)]
    done = commands([(*line, "--target", server.target, "--json") for line in lines])
    assert [item.returncode for item in done] == [0] * 5, done
    listed, shown, found, checkpoints, info = (json.loads(item.stdout) for item in done)
    client.delete_checkpoint(made, "json")
    (listed,) = [item for item in listed if item["name"] == made]
    assert list(listed) == ["name", "method", "mode", "step", "memory_bytes", "create_time"]
    assert (listed["method"], listed["mode"], listed["step"]) == ("adadelta", "delta", 1)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", listed["create_time"])
    assert list(shown) == [field.name for field in optimizer_pb2.Optimizer.DESCRIPTOR.fields]
    assert shown["parameters"][0] == {"name": "rel[likes].w", "shape": [3], "data_type": "DATA_TYPE_FLOAT32"}
    assert shown["algorithm"]["adadelta"]["rho"] == 0.95
    assert (shown["schedule"], shown["step"], shown["memory_bytes"]) == (None, 1, listed["memory_bytes"])
    assert (found["name"], found["step"]) == (made, 1)
    assert [item["name"] for item in found["parameters"]] == NAMES
    assert list(found["parameters"][0]) == ["name", "rms_gradient", "rms_update", "rates"]
    assert [item["quantile"] for item in found["parameters"][0]["rates"]] == [0, 0.25, 0.5, 0.75, 1]
    assert [list(item) for item in checkpoints] == [["optimizer", "tag", "step", "size_bytes", "create_time"]]
    assert (info["target"], info["shares_memory"]) == (server.target, True)
    assert info["limits"]["max_streams"] == 256
    assert {"feature": "FEATURE_SHARED_MEMORY", "available": True} in info["features"]


def test_the_version_is_that_of_the_package():
    assert command("--version").stdout == f"optserve {version('optserve')}\n"


# --- The settings of a server


def test_every_setting_of_a_server_is_listed_with_its_type_default_unit_and_meaning():
    text, data = commands([("config",), ("config", "--json")])
    assert (text.returncode, data.returncode) == (0, 0), text.stderr
    rows = json.loads(data.stdout)
    assert [row["name"] for row in rows] == [item.name for item in fields(ServerConfig)]
    for row, item in zip(rows, fields(ServerConfig), strict=True):
        assert list(row) == ["name", "type", "default", "unit", "meaning", "set", "value"]
        assert (row["type"], row["default"]) == (item.type, item.default)
        assert row["meaning"].endswith("."), row
        assert row["unit"] == {"_s": "seconds", "bytes": "bytes"}.get(re.sub(".*(_s|bytes)$", r"\1", row["name"]), "")
        assert (row["set"], row["value"]) == (False, None)
        assert row["name"] in text.stdout
        assert row["meaning"] in text.stdout


def test_what_a_file_sets_is_marked_and_checked_as_a_start_would(tmp_path):
    good, unknown, bad = (tmp_path / f"{name}.toml" for name in ("good[x]", "unknown", "bad"))
    good.write_text('port = 6000\nthreads = 0\ndata_dir = "/x"\n')
    unknown.write_text("prot = 6000\n")
    bad.write_text("port = 70000\n")
    lines = [("config", "--config", path) for path in (good, unknown, bad, tmp_path / "none")]
    text, *refused, data = commands([*lines, ("config", "--json", "--config", good)])
    rows = {row["name"]: row for row in json.loads(data.stdout)}
    assert [name for name, row in rows.items() if row["set"]] == ["port", "data_dir", "threads"]
    # What follows from the file and from the machine is shown as well.
    assert [rows[name]["value"] for name in ("port", "durability")] == [6000, "journal"]
    assert rows["max_state_bytes"]["value"] > 0
    assert text.stdout.count("by the file") == 3
    assert f"3 of {len(rows)} settings are set by {good}." in text.stdout
    for done, message in zip(
        refused, ("'prot', which is not a setting", "port must be 0 to 65535", "none"), strict=True
    ):
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr
        assert "Traceback" not in done.stderr
