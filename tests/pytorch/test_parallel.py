"""Models in several processes: what of it a RemoteOptimizer takes, and workers that share one optimizer."""

import subprocess
import sys
import threading

import pytest
import torch

import optserve
import optserve.torch
from present import present
from pytorch.networks import backward, network, same

SHARDED = {
    "FSDP": "FullyShardedDataParallel(net, device_id=torch.device('cpu'))",
    "FSDP, own parameters": "FullyShardedDataParallel(net, device_id=torch.device('cpu'), use_orig_params=True)",
    "fully_shard": "fully_shard(net, mesh=init_device_mesh('cpu', (1,)))",
}


@pytest.mark.parametrize("kind", SHARDED)
def test_sharded_parameters_are_refused(server, client, name, tmp_path, kind):
    program = f"""
import sys, torch, optserve.torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
torch.distributed.init_process_group("gloo", "file://{tmp_path}/store", rank=0, world_size=1)
net = torch.nn.Linear(3, 2)
model = {SHARDED[kind]}
try:
    optserve.torch.RemoteOptimizer(model.named_parameters(), {server.target!r}, optserve.Adam(), name={name!r})
except optserve.InvalidArgumentError as error:
    print(error)
torch.distributed.destroy_process_group()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False)
    assert "is a shard of a larger tensor" in done.stdout, done.stderr
    assert "Use DistributedDataParallel" in done.stdout
    with pytest.raises(optserve.NotFoundError):
        client.optimizer(name)


def test_workers_without_ddp_make_the_steps_of_one_that_has_all_gradients(server, client, name):
    """As docs/pytorch.md says: the server holds the weights and takes the mean of the workers' gradients."""
    whole = network()
    params = {key: value.detach().numpy() for key, value in whole.named_parameters()}
    client.create_optimizer(name, optserve.Adam(0.01), params, hosted=True, consistency=optserve.Sync(workers=2))
    finished: list[int] = []

    def work(rank: int) -> None:
        model = network(seed=9)
        with optserve.connect(server.target) as own, own.worker(name, f"rank-{rank}") as worker:
            for step in range(5):
                with torch.no_grad():
                    for key, array in worker.pull().arrays.items():
                        model.get_parameter(key).copy_(torch.from_numpy(array))
                model.zero_grad()
                backward(model, 2 * step + rank)
                worker.step({key: present(value.grad).numpy() for key, value in model.named_parameters()})
        finished.append(rank)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    optimizer = torch.optim.Adam(whole.parameters(), lr=0.01)
    for step in range(5):
        optimizer.zero_grad()
        for rank in range(2):
            backward(whole, 2 * step + rank, 0.5)
        optimizer.step()
    for thread in threads:
        thread.join()
    trained = network(seed=9)
    assert sorted(finished) == [0, 1]
    with torch.no_grad():
        for key, array in client.optimizer(name).pull_parameters().arrays.items():
            trained.get_parameter(key).copy_(torch.from_numpy(array))
    same(trained, whole)
