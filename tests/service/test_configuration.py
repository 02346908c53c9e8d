"""Where a server's settings come from: options, then the environment, then a file, then defaults."""

import os
import re
import subprocess
import sys
import tomllib
from dataclasses import fields

import pytest

import optserve
from optserve_server.domain import config_sources
from optserve_server.domain.config import ConfigError, ServerConfig


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
        ("OPTSERVE_PORT", "70000", "port must be 0 to 65535; it is 70000. It comes from OPTSERVE_PORT."),
        ("OPTSERVE_CONFIG", "missing.toml", "Cannot read the configuration missing.toml: No such file or directory."),
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


def test_every_setting_can_be_set_by_the_environment():
    default = config_sources.load(None, {}, {}).config
    texts = {config_sources.variable_of(item.name): str(getattr(default, item.name)) for item in fields(ServerConfig)}
    assert config_sources.load(None, {}, texts).config == default


IMPOSSIBLE = {
    "drain_s = true": "drain_s must be of type float, not True",
    "drain_s = inf": "drain_s must be at most 1209600; it is inf",
    "drain_s = nan": "drain_s must be at most 1209600; it is nan",
    f"drain_s = 1{400 * '0'}": "drain_s must be at most 1209600",
    "snapshot_interval_s = inf": "snapshot_interval_s must be at most 1209600",
    "keepalive_s = 1000000000000": "keepalive_s must be at most 1209600",
    "connection_idle_s = 1000000000000": "connection_idle_s must be at most 1209600",
    "max_connection_streams = 3000000000": "max_connection_streams must be at most 2147483647",
    f"max_state_bytes = 1{30 * '0'}": "max_state_bytes must be at most 9223372036854775807",
    "port = true": "port must be of type int, not True",
    "port = '1'": "port must be of type int, not '1'",
    "max_streams = {a = 1}": "max_streams must be of type int",
    "host = ''": "host must not be empty",
    "host = ' '": "host must not be empty",
}


@pytest.mark.parametrize("line", IMPOSSIBLE, ids=lambda line: line[:30])
def test_an_impossible_value_is_refused_with_where_it_comes_from(tmp_path, line):
    file = tmp_path / "server.toml"
    file.write_text(f"{line}\n")
    with pytest.raises(ConfigError) as refused:
        config_sources.load(file, {}, {})
    assert IMPOSSIBLE[line] in str(refused.value)
    assert str(refused.value).endswith(f"It comes from {file}.")


@pytest.mark.parametrize("content", [b"port", b"port = \xff", b"port = 1\nport = 2", b"port = " + 5000 * b"["])
def test_a_file_that_is_not_toml_is_a_sentence(tmp_path, content):
    file = tmp_path / "server.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="Cannot read the configuration"):
        config_sources.load(file, {}, {})


@pytest.mark.parametrize("option", ["--data-dir", "--host", "--uds", "--backend", "--durability", "--tls-certificate"])
def test_an_option_that_is_empty_is_refused(option):
    """A shell makes it of a variable that is not set; then the working folder would be the data folder."""
    done = serve("--print-config", f"{option}=")
    assert done.returncode == 2
    assert option in done.stderr


def test_settings_that_cannot_be_used_are_not_printed():
    done = serve("--print-config", "--backend", "tpu")
    assert (done.returncode, done.stdout) == (2, "")
    assert "There is no backend 'tpu'" in done.stderr


def test_texts_are_printed_as_they_stand_in_a_file(tmp_path):
    file = tmp_path / "server.toml"
    file.write_text("uds = 'a\"b\\c'\n")
    done = serve("--print-config", "--config", str(file))
    assert tomllib.loads(f"uds = {printed(done.stdout)['uds'][0]}") == {"uds": 'a"b\\c'}
