"""Where a server's settings come from: options, then the environment, then a file, then defaults."""

import os
import re
import subprocess
import sys

import pytest

import optserve
from optserve_server.domain import config_sources
from optserve_server.domain.config import ConfigError


def serve(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "optserve_server", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
        check=False,
    )


def printed(output: str) -> dict[str, tuple[str, str]]:
    """(value, source) of each setting."""
    rows = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in output.splitlines()]
    return {row[0]: (row[1], row[2]) for row in rows if len(row) == 3}


def test_the_first_source_that_has_a_setting_counts(tmp_path):
    file = tmp_path / "server.toml"
    file.write_text("port = 1\nmax_streams = 2\nunary_threads = 3\n")
    loaded = config_sources.load(file, {"port": 7, "host": None}, {"OPTSERVE_PORT": "5", "OPTSERVE_MAX_STREAMS": "6"})
    assert (loaded.config.port, loaded.sources["port"]) == (7, "--port")
    assert (loaded.config.max_streams, loaded.sources["max_streams"]) == (6, "OPTSERVE_MAX_STREAMS")
    assert (loaded.config.unary_threads, loaded.sources["unary_threads"]) == (3, str(file))
    assert (loaded.config.host, loaded.sources["host"]) == ("127.0.0.1", "default")
    assert (loaded.config.durability, loaded.sources["durability"]) == ("memory", "derived")


def test_every_setting_is_printed_with_its_value_and_source(tmp_path):
    file = tmp_path / "server.toml"
    file.write_text("idle_step_s = 30\n")
    done = serve(
        "--print-config", "--threads", "1", "--data-dir", str(tmp_path / "data"),
        OPTSERVE_CONFIG=str(file), OPTSERVE_KEEPALIVE_S="90", OPTSERVE_HOST="",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shown = printed(done.stdout)
    assert shown.keys() >= config_sources.load(None, {}, {}).sources.keys()
    assert shown["threads"] == ("1", "--threads")
    assert shown["idle_step_s"] == ("30.0", str(file))
    assert shown["keepalive_s"] == ("90", "OPTSERVE_KEEPALIVE_S")
    assert shown["host"] == ('"127.0.0.1"', "default")
    assert shown["durability"] == ('"journal"', "derived")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("OPTSERVE_PORT", "fifty", "OPTSERVE_PORT must be of type int, not 'fifty'"),
        ("OPTSERVE_PORT", "tcp://10.0.0.1:50051", "enableServiceLinks: false"),
        ("OPTSERVE_DRAIN_S", "soon", "OPTSERVE_DRAIN_S must be of type float"),
        ("OPTSERVE_PORT", "70000", "port must be 0 to 65535"),
        ("OPTSERVE_CONFIG", "missing.toml", "Cannot read the configuration missing.toml"),
    ],
)
def test_an_impossible_variable_is_one_sentence_before_the_start(variable, value, message):
    done = serve("--backend", "numpy", **{variable: value})
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("key", "meant"), [("prot", "did you mean 'port'?"), ("max_stream", "did you mean 'max_streams'?"), ("xyz", "")]
)
def test_an_unknown_key_is_refused_with_the_nearest_one(tmp_path, key, meant):
    file = tmp_path / "server.toml"
    file.write_text(f"{key} = 1\n")
    with pytest.raises(ConfigError, match=f"'{key}', which is not a setting") as refused:
        config_sources.load(file, {}, {})
    assert meant in str(refused.value)
    assert ("did you mean" in str(refused.value)) == bool(meant)


def test_variables_for_a_server_do_not_reach_a_local_one(monkeypatch, tmp_path):
    monkeypatch.setenv("OPTSERVE_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("OPTSERVE_TARGET_FILE", str(tmp_path / "target"))
    with optserve.local_server(backend="numpy") as server, optserve.connect(server.target) as client:
        assert client.server_info().durability == "memory"
    assert not list(tmp_path.iterdir())
