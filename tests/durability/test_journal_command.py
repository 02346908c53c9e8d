"""The command that verifies, counts and repairs a journal."""

import json
import subprocess
import sys
from pathlib import Path

from durability.folder import Server, step
from optserve_server.persistence import journal


def tool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from optserve.cli import main; main()", "journal", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_journal_is_verified_counted_and_repaired_by_command(tmp_path):
    server = Server(tmp_path)
    item = server.create()
    for index in range(3):
        step(item, index)
    busy = tool("verify", tmp_path)
    assert busy.returncode == 1
    assert "Another server uses" in busy.stderr
    server.die()
    assert "good: snapshot at 0, then 4 records" in tool("verify", tmp_path).stdout
    assert " 3 " in tool("stats", tmp_path).stdout
    verified, counted = (json.loads(tool(what, tmp_path, "--json").stdout) for what in ("verify", "stats"))
    assert list(verified) == ["snapshot_lsn", "next_lsn", "bytes_read", "records", "torn"]
    assert (verified["snapshot_lsn"], verified["next_lsn"], verified["records"], verified["torn"]) == (0, 5, 4, None)
    assert list(counted) == ["snapshot_lsn", "next_lsn", "bytes_read", "optimizers"]
    kinds = {
        "creations": 1,
        "updates": 0,
        "deletions": 0,
        "steps": 3,
        "replaced_states": 0,
        "uploads": 0,
        "additions": 0,
    }
    assert counted["optimizers"] == [{"name": "a", **kinds}]
    assert "nothing to repair" in tool("repair", tmp_path).stdout
    # Damage within the second step.
    *_, second, _ = journal.Reader(tmp_path, 0)
    with second.path.open("r+b") as file:
        file.seek(second.offset + 5000)
        file.write(b"damage")
    damaged = tool("verify", tmp_path)
    assert damaged.returncode == 1
    assert f"{second.path.name} is damaged at byte {second.offset}" in damaged.stderr
    assert f"optserve journal repair {tmp_path}" in damaged.stderr
    assert "truncated" in tool("repair", tmp_path, "--yes").stdout
    lineage = item.steps.lineage
    for _ in ("steps were lost", "and that is remembered"):
        again = Server(tmp_path)
        assert again.optimizers.get("a").steps.step == 1
        assert again.optimizers.get("a").steps.lineage != item.steps.lineage
        again.die()
    assert lineage == item.steps.lineage
