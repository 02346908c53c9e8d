"""What docs/pytorch.md shows works as it is written."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import optserve
from optserve.torch import RemoteOptimizer

PAGE = (Path(__file__).parents[2] / "docs/pytorch.md").read_text()
LOOP, MASTERS, PARALLEL, OVERLAP = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)

DDP = """
import sys, torch, optserve.torch
rank, store, target = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
net = torch.nn.Linear(3, 2)
BEGIN
for step in range(5):
    loss = (model(torch.full((4, 3), 1.0 + rank + step)) - 1).square().mean()
    STEP
print([param.tolist() for param in net.parameters()])
torch.distributed.destroy_process_group()
"""


def test_the_loop_with_overlap_and_master_weights_run(capsys):
    names: dict[str, object] = {}
    exec(LOOP, names)  # noqa: S102
    assert capsys.readouterr().out.startswith("100 ")
    exec(OVERLAP, names)  # noqa: S102
    exec(MASTERS, names)  # noqa: S102
    optimizer = names["optimizer"]
    assert isinstance(optimizer, RemoteOptimizer)


def test_rank_0_steps_for_all_ranks(server, client, tmp_path):
    begin, step = PARALLEL.split("...\n")
    script = DDP.replace("BEGIN\n", begin).replace("STEP\n", step.replace("\n", "\n    ") + "\n")
    command = [sys.executable, "-c", script]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), server.target], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=100)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert outputs[0] == outputs[1] != ""
    assert client.optimizer("ddp").current_step == 5
    client.delete_optimizer("ddp")


def test_settings_that_the_page_refuses_are_refused(client):
    refused = re.findall(r"^\| `(\w+)=True` \|", PAGE, re.MULTILINE)
    assert refused == ["amsgrad", "capturable", "differentiable"]
    for setting in refused:
        given: dict[str, Any] = {setting: True}
        with pytest.raises(optserve.InvalidArgumentError, match=setting):
            RemoteOptimizer(torch.nn.Linear(2, 2).parameters(), client, optserve.Adam(), **given)
