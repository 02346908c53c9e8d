"""Calls of the host from programs of JAX, and clear errors for transformations that a step cannot go through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.core
import jax.numpy as jnp
from jax.experimental import io_callback
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from optserve.errors import InvalidArgumentError

_guard = Primitive("optserve_step")
"""The identity, which vmap and grad cannot go through, and programs for several devices neither."""
_guard.multiple_results = True


def on_host(call: Callable[..., Any], shapes: Any, *operands: Any, in_program: Callable[..., Any] | None = None) -> Any:
    """The result of a function of the host, as arrays of JAX.

    Inside jit the call becomes part of the program, in order with all others. Outside it is made at once, so that its
    errors are its own.

    Args:
        call: Takes the operands as arrays, and returns arrays of the given shapes.
        shapes: A pytree of jax.ShapeDtypeStruct.
        operands: Pytrees of arrays.
        in_program: What is called inside jit; `call` by default.

    Raises:
        InvalidArgumentError: vmap or grad transforms the operands, or the program is one for several devices.
    """
    leaves, structure = jax.tree_util.tree_flatten(operands)
    if leaves:
        operands = jax.tree_util.tree_unflatten(structure, _guard.bind(*leaves))
    # In a trace every operation is traced, also that of a constant.
    if isinstance(jnp.zeros(()), jax.core.Tracer):
        return io_callback(in_program or call, shapes, *operands, ordered=True)
    return jax.tree_util.tree_map(jnp.asarray, call(*operands))


def _same(*values: Any) -> list[Any]:
    return list(values)


def _refuse_vmap(*_values: Any, **_settings: Any) -> NoReturn:
    raise InvalidArgumentError(
        "jax.vmap cannot map a step on a server: the optimizer there has one state. Call update outside of vmap, for "
        "example with the mean of the mapped gradients."
    )


def _refuse_grad(*_values: Any, **_settings: Any) -> NoReturn:
    raise InvalidArgumentError(
        "A step on a server has no derivative: call update outside of jax.grad. Hyper-gradients need a method that "
        "runs in JAX, such as those of optax."
    )


def _lower(context: Any, *values: Any) -> Sequence[Any]:
    """Nothing to compute, but here the number of devices is known."""
    module = context.module_context
    if (getattr(module.axis_context, "num_devices", 1) or 1) > 1 or getattr(
        module.axis_context, "mesh", None
    ) is not None:
        raise InvalidArgumentError(
            "A step on a server cannot be part of a program for several devices (pmap, shard_map, sharded arrays): "
            "each of them would make it. Compute the mean of the gradients there, and call update on one device."
        )
    return values


_guard.def_impl(_same)
_guard.def_abstract_eval(_same)
batching.primitive_batchers[_guard] = _refuse_vmap
ad.primitive_jvps[_guard] = _refuse_grad
mlir.register_lowering(_guard, _lower)
