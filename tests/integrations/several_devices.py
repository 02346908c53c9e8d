"""Steps in programs for two devices: a program of its own, because JAX counts its devices once."""

import sys

import jax

jax.config.update("jax_num_cpu_devices", 2)

import jax.numpy as jnp  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

import optserve  # noqa: E402
import optserve.jax  # noqa: E402


def main(target: str, name: str) -> None:
    """Print the error of each program, then the step of the optimizer."""
    with optserve.connect(target) as client:
        transformation = optserve.jax.remote(client, optserve.Sgd(), name=name)
        state = transformation.init(jnp.ones(8))
        mesh = jax.make_mesh((2,), ("i",))
        sharded = jax.device_put(jnp.ones(8), NamedSharding(mesh, PartitionSpec("i")))

        def update(gradient: jax.Array) -> object:
            return transformation.update(gradient, state)[0]

        programs = {
            "pmap": lambda: jax.pmap(update)(jnp.ones((2, 8))),
            "shard_map": lambda: jax.jit(
                jax.shard_map(update, mesh=mesh, in_specs=PartitionSpec("i"), out_specs=PartitionSpec("i"))
            )(sharded),
            "sharded": lambda: jax.jit(update)(sharded),
        }
        for what, program in programs.items():
            try:
                print(what, program())
            except optserve.InvalidArgumentError as error:
                print(what, error)
        print(client.optimizer(name).current_step)
        # Outside of jit the parts come together on the host.
        transformation.update(sharded, state)
        print(client.optimizer(name).current_step)


if __name__ == "__main__":
    main(*sys.argv[1:])
