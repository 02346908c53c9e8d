"""How many cores a server uses: those it may run on, and no more than its control groups give it time for."""

import os
from pathlib import Path

import pytest

from optserve._common.machine import own_bytes, usable_cores

PERIOD = "100000"


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))


def cores(folder: Path, own: str, files: dict[str, str]) -> int:
    """With control groups of these files, in a process whose /proc/self/cgroup says `own`."""
    for name, content in files.items():
        path = folder / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (folder / "self").write_text(own)
    return usable_cores(folder / "cgroup", folder / "self")


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("50000", 1), ("1000", 1), ("100000", 1), ("150000", 2), ("400000", 4), ("9900000", 8), ("max", 8), ("-1", 8)],
)
def test_a_quota_of_either_version_is_kept_to(tmp_path, quota, expected):
    two = {"cpu.max": f"{quota} {PERIOD}\n"}
    one = {"cpu/cpu.cfs_quota_us": f"{quota}\n", "cpu/cpu.cfs_period_us": f"{PERIOD}\n"}
    # As a container sees it: its own group is the root, whatever its name outside.
    assert cores(tmp_path / "two", "0::/\n", two) == expected
    assert cores(tmp_path / "one", "4:cpu,cpuacct:/docker/1f2e\n1:name=systemd:/\n", one) == expected


def test_the_group_that_a_process_is_in_counts_with_all_around_it(tmp_path):
    own = "0::/machine.slice/pod/container\n"
    groups = {
        "machine.slice/cpu.max": f"600000 {PERIOD}",
        "machine.slice/pod/cpu.max": f"300000 {PERIOD}",
        "machine.slice/pod/container/cpu.max": f"max {PERIOD}",
        "machine.slice/other/cpu.max": f"100000 {PERIOD}",
    }
    assert cores(tmp_path / "two", own, groups) == 3
    one = {"cpu/a/cpu.cfs_quota_us": "200000", "cpu/a/cpu.cfs_period_us": PERIOD, "cpu/b/cpu.cfs_quota_us": "1"}
    assert cores(tmp_path / "one", "3:cpu:/a/inner\n2:memory:/b\n", one) == 2


@pytest.mark.parametrize("own", ["", "nonsense", "0::/../../x\n", "4:cpu:\n"])
@pytest.mark.parametrize("quota", ["", "nonsense", "1 2 3", "1 0", "-5 100000", "\xff"])
def test_groups_that_say_nothing_of_use_do_not_count(tmp_path, own, quota):
    assert cores(tmp_path, own, {"cpu.max": quota, "x/cpu.max": quota}) == 8


def test_where_there_are_no_groups_the_cores_count(tmp_path):
    assert usable_cores(tmp_path / "none", tmp_path / "neither") == 8


@pytest.mark.parametrize("content", ["", "1", "1 2 x", "\xff"])
def test_memory_that_the_system_does_not_tell_is_none(tmp_path, content):
    """A server did not start where /proc is not to be read."""
    assert own_bytes() > 1 << 20
    assert own_bytes(tmp_path / "none") == 0
    (tmp_path / "statm").write_text(content)
    assert own_bytes(tmp_path / "statm") == 0


def test_a_backend_takes_them_where_nobody_says_how_many(monkeypatch):
    from optserve_server.numerics.backends import load

    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1, 2})
    assert load("numpy", 5).device == "CPU, 5 threads"
    assert load("numpy", 1).device == "CPU, 1 thread"
    assert load("numpy").device == f"CPU, {usable_cores()} threads"
