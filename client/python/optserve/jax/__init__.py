"""JAX: an optax `GradientTransformation` whose steps a server makes. It works inside `jax.jit`.

    tx = optserve.jax.remote("127.0.0.1:50051", optserve.Adam(learning_rate=1e-3), name="mlp")
    state = tx.init(params)

    @jax.jit
    def train_step(params, state, batch):
        grads = jax.grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

The slots stay on the server, and the optax state is the number of the step. So each optax state serves one step, and
old ones are of no use: `tx.optimizer.save_checkpoint` and `restore_checkpoint` go back. Outside of jit, `step` makes
one step of any `optserve.Optimizer` with a pytree.
"""

from optserve.jax.eager import specs, step
from optserve.jax.transformation import Rate, RemoteState, RemoteTransformation, remote

__all__ = ["Rate", "RemoteState", "RemoteTransformation", "remote", "specs", "step"]
