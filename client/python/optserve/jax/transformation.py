"""The optax transformation: what is traced. What runs on the host is in `server_steps`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optserve._adapters.named import IfExists, Wanted, check_if_exists, create_or_adopt
from optserve._adapters.server_steps import ServerSteps, client_of, steps_of
from optserve._adapters.tracing import on_host
from optserve._values.arrays import check_kind
from optserve.algorithms import Algorithm
from optserve.client import Client
from optserve.errors import FailedPreconditionError, InvalidArgumentError, OptserveError
from optserve.jax.pytrees import Leaves, check_same, leaves_of
from optserve.optimizer import Optimizer, TransportName, WireDtype
from optserve.settings import Clipping
from optserve.state import TensorSpec

Rate = float | jax.Array | Callable[[jax.Array], Any]
"""A hyper-parameter: a number, an array of no dimension, or an optax schedule, which is a function of the count."""

_COUNT = jax.ShapeDtypeStruct((), jnp.int32)


class RemoteState(NamedTuple):
    """The optax state of a remote optimizer.

    Attributes:
        count: int32 of no dimension: the steps that the server has applied.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride] - optax's own name


class RemoteTransformation(optax.GradientTransformationExtraArgs):
    """What `remote` returns: an optax transformation, a pair of `init` and `update`, that knows its optimizer."""

    _traced: _Traced

    @classmethod
    def _of(cls, traced: _Traced) -> RemoteTransformation:
        made = cls(traced.init, traced.update)
        made._traced = traced
        return made

    @property
    def _steps(self) -> ServerSteps:
        return self._traced.steps

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer on the server, for checkpoints, statistics and settings.

        Raises:
            FailedPreconditionError: `init` was not called yet.
        """
        if self._steps.optimizer is None:
            raise FailedPreconditionError(f"{self._steps.name!r} is not created yet: call init first.")
        return self._steps.optimizer

    @property
    def last_error(self) -> OptserveError | None:
        """The error of the last call; None if it succeeded. Inside jit JAX raises an error of its own in its place."""
        return self._steps.error

    def keeping_errors(self) -> RemoteTransformation:
        """The same transformation for programs that donate their arguments, which an error inside jit would lose.

        A step that fails inside jit then ends without an error: its updates are 0, and the state stays, so that the
        results of the program are the old parameters and state. `check` raises the error; call it after each program.
        A step before that raises the error itself.

        Example:
            >>> tx = optserve.jax.remote(client, optserve.Adam(), name="mlp").keeping_errors()   # doctest: +SKIP
            >>> params, state = train_step(params, state, batch)                                 # doctest: +SKIP
            >>> tx.check()                                                                       # doctest: +SKIP
        """
        return RemoteTransformation._of(replace(self._traced, keeps_errors=True))

    def check(self) -> None:
        """With `keeping_errors`: wait for the programs under way, and raise the error of a step, if one has failed.

        Nothing was changed by that step, or it is in doubt; run with the same gradients once more, it is made once.

        Raises:
            OptserveError: As for `Optimizer.step`.
        """
        jax.effects_barrier()
        self._steps.check()


def remote(  # noqa: PLR0913 - settings, by their names
    target: Client | str,
    algorithm: Algorithm,
    *,
    name: str,
    learning_rate: Rate | None = None,
    hyperparameters: Mapping[str, Rate] = MappingProxyType({}),
    weight_decay: Rate = 0.0,
    mask: Any = None,
    clipping: Clipping | None = None,
    if_exists: IfExists = "error",
    transport: TransportName = "auto",
    wire_dtype: WireDtype = "native",
) -> RemoteTransformation:
    """An optax transformation whose slots are on a server, which computes the updates Δx; works inside `jax.jit`.

    Args:
        target: A client, or the address of a server.
        algorithm: The method.
        name: The optimizer's name on the server. `init` creates it, with a parameter for each leaf.
        learning_rate: Learning rate of each step, in place of the algorithm's: a number, an optax schedule, or an
            array, such as one that `optax.inject_hyperparams(optserve.jax.remote)` injects.
        hyperparameters: Other hyper-parameters of each step, by name, in the same form.
        weight_decay: λ of a decoupled decay as in optax.adamw: the updates are Δx − η λ x, with η the learning rate of
            the step. `update` needs the parameters then.
        mask: The leaves that decay: a pytree of bools, or a function of the parameters that makes one; all by default.
        clipping: Clipping of the gradient by the server.
        if_exists: What `init` does if the server has an optimizer of that name: it raises an AlreadyExistsError
            (`error`), goes on with its state under the settings given here (`resume`), or deletes it and begins anew
            (`replace`).
        transport: As for `Client.optimizer`.
        wire_dtype: As for `Client.optimizer`.

    Raises:
        InvalidArgumentError: A setting is wrong; or, at the call of `init` or `update`, also inside jit: a leaf is
            no dense array of float32, float64, bfloat16 or float16, vmap or grad transforms the step, or the program
            is one for several devices.

    Example:
        >>> tx = optserve.jax.remote(                                            # doctest: +SKIP
        ...     client, optserve.AdamW(), name="mlp", weight_decay=1e-2,
        ...     learning_rate=optax.cosine_decay_schedule(1e-3, 10_000),
        ... )
    """
    check_kind(algorithm, Algorithm, "algorithm", "optserve.Adam()")
    if algorithm.takes_curvature:
        raise InvalidArgumentError(
            f"{type(algorithm).__name__} takes the diagonal of the Hessian, which optax does not pass on; use "
            "client.create_optimizer and Optimizer.step."
        )
    rates = dict(hyperparameters) | ({} if learning_rate is None else {"learning_rate": learning_rate})
    algorithm, rates = _with_constants(algorithm, rates)
    check_if_exists(if_exists)
    client = client_of(target)
    create = partial(create_or_adopt, client, name, if_exists)
    find = partial(client.optimizer, name, transport=transport, wire_dtype=wire_dtype)
    traced = _Traced(steps_of(client, name), create, find, algorithm, clipping, rates, weight_decay, mask)
    return RemoteTransformation._of(traced)


@dataclass(frozen=True)
class _Traced:
    """The two functions of the transformation. The fields are as for `remote`."""

    steps: ServerSteps
    create: Callable[[Wanted], object]
    find: Callable[[], Optimizer]
    algorithm: Algorithm
    clipping: Clipping | None
    rates: Mapping[str, Rate]
    weight_decay: Rate
    mask: Any
    keeps_errors: bool = False

    def init(self, params: Any) -> RemoteState:
        leaves = leaves_of(params, "parameter")
        return RemoteState(on_host(partial(self.steps.begin, partial(self._created, leaves.specs())), _COUNT))

    def _created(self, specs: Mapping[str, TensorSpec]) -> Optimizer:
        self.create(Wanted(self.algorithm, specs, clipping=self.clipping))
        return self.find()

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, RemoteState]:
        del extra
        leaves = leaves_of(updates, "gradient")
        values = {key: _value(rate, state.count) for key, rate in self.rates.items()}
        step = partial(self.steps.step, self.find, leaves.names)
        wide = leaves.widened()
        shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in wide]
        kept = partial(self.steps.step_or_keep_error, self.find, leaves.names) if self.keeps_errors else None
        count, deltas = on_host(step, (_COUNT, shapes), state.count, values, wide, in_program=kept)
        # Whether an array is 0 is not known inside jit.
        if not (isinstance(self.weight_decay, int | float) and self.weight_decay == 0):
            rate = values.get("learning_rate", getattr(self.algorithm, "learning_rate", 1.0))
            # A step whose error is kept has not counted, and decays nothing.
            made = count - state.count if self.keeps_errors else 1
            deltas = self._decayed(deltas, leaves, params, made * rate * _value(self.weight_decay, state.count))
        return leaves.rebuilt(deltas), RemoteState(count)

    def _decayed(self, deltas: Sequence[Any], leaves: Leaves, params: Any, factor: Any) -> list[Any]:
        """The updates with the decoupled decay of the parameters."""
        if params is None:
            raise InvalidArgumentError("weight_decay needs the parameters: call update(grads, state, params).")
        held = leaves_of(params, "parameter")
        check_same(held, leaves)
        mask = self.mask(params) if callable(self.mask) else self.mask
        flags = [True] * len(deltas) if mask is None else leaves.structure.flatten_up_to(mask)
        return [
            delta - (factor * value).astype(delta.dtype) if flag else delta
            for delta, value, flag in zip(deltas, held.widened(), flags, strict=True)
        ]


def _with_constants(algorithm: Algorithm, rates: Mapping[str, Rate]) -> tuple[Algorithm, dict[str, Rate]]:
    """The algorithm with the hyper-parameters that are numbers, and the others, which each step sends."""
    known = sorted(field.name for field in fields(algorithm))
    for key in rates:
        if key not in known:
            raise InvalidArgumentError(f"{type(algorithm).__name__} has no hyper-parameter {key!r}; it has {known}.")
    constant = {key: value for key, value in rates.items() if isinstance(value, bool | int | float)}
    return replace(algorithm, **constant), {key: value for key, value in rates.items() if key not in constant}


def _value(rate: Rate, count: jax.Array) -> jax.Array:
    """A hyper-parameter in the step after `count` steps, in the widest float that JAX has."""
    return jnp.asarray(rate(count) if callable(rate) else rate, jnp.result_type(float))
