"""Keras 3: an optimizer whose steps a server makes, for `model.compile`, on the torch and jax backends.

    model.compile(loss="mse", optimizer=optserve.keras.RemoteOptimizer(client, optserve.Adam(), name="mlp"))
    model.fit(x, y)

Learning rates, schedules, callbacks, clipping, weight decay, accumulation, moving averages and loss scales are those of
Keras; the slots and the update are on the server. It needs no other change of the program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Self

import keras

from optserve import algorithms
from optserve._adapters.named import IfExists, Wanted, check_if_exists, create_or_adopt
from optserve._adapters.server_steps import client_of, steps_of
from optserve._values.arrays import check_kind
from optserve.algorithms import Algorithm
from optserve.client import Client
from optserve.errors import FailedPreconditionError, InvalidArgumentError
from optserve.optimizer import Optimizer, TransportName, WireDtype
from optserve.state import TensorSpec

__all__ = ["RemoteOptimizer"]

_WIDE = {"float32": "float32", "float64": "float64", "bfloat16": "float32", "float16": "float32"}
"""The dtype of the state for each dtype of a variable: half floats are widened, which is exact."""


@keras.saving.register_keras_serializable(package="optserve")
class RemoteOptimizer(keras.optimizers.Optimizer):
    """A Keras optimizer whose slots are on a server, which computes the updates.

    `build`, which `fit` calls, creates the optimizer on the server, with a parameter for each variable: `0/kernel`,
    `1/bias` and so on. Each step sends the learning rate that Keras has then. On the jax backend the step is an ordered
    callback in the jitted program, on one device.

    Args:
        target: A client, or the address of a server.
        algorithm: The method. Keras' Adam, Nadam and RMSprop have their epsilon elsewhere; see docs/keras.md.
        name: The optimizer's name on the server, and in Keras.
        learning_rate: A number or a schedule of Keras, as for other optimizers; the algorithm's by default.
        if_exists: What `build` does if the server has an optimizer of that name: it raises an AlreadyExistsError
            (`error`), goes on with its state under the settings given here (`resume`), or deletes it and begins anew
            (`replace`).
        transport: As for `Client.optimizer`.
        wire_dtype: As for `Client.optimizer`.
        settings: Other arguments of keras.optimizers.Optimizer, such as `weight_decay` and `global_clipnorm`.

    Raises:
        InvalidArgumentError: The backend is neither torch nor jax, or the method takes curvature; from `build`: a
            variable is neither float32, float64, bfloat16 nor float16.
    """

    def __init__(
        self,
        target: Client | str,
        algorithm: Algorithm,
        *,
        name: str,
        learning_rate: Any = None,
        if_exists: IfExists = "error",
        transport: TransportName = "auto",
        wire_dtype: WireDtype = "native",
        **settings: Any,
    ) -> None:
        check_kind(algorithm, Algorithm, "algorithm", "optserve.Adam()")
        check_if_exists(if_exists)
        if keras.backend.backend() not in ("torch", "jax"):
            raise InvalidArgumentError(
                f"optserve.keras works on the backends torch and jax, not on {keras.backend.backend()!r}: set "
                "KERAS_BACKEND."
            )
        if algorithm.takes_curvature:
            raise InvalidArgumentError(
                f"{type(algorithm).__name__} takes the diagonal of the Hessian, which Keras does not compute."
            )
        rate = getattr(algorithm, "learning_rate", None) if learning_rate is None else learning_rate
        super().__init__(learning_rate=rate, name=name, **settings)
        self._client = client_of(target)
        self._steps = steps_of(self._client, name)
        # Keras leaves out variables without a gradient, and warns.
        self._steps.partial = True
        self._algorithm = algorithm
        self._if_exists: IfExists = if_exists
        self._transport: TransportName = transport
        self._wire_dtype: WireDtype = wire_dtype
        self._names: list[str] = []

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer on the server, for checkpoints, statistics and settings.

        Raises:
            FailedPreconditionError: It is not built yet.
        """
        if self._steps.optimizer is None:
            raise FailedPreconditionError(f"{self.name!r} is not created yet: call build or fit first.")
        return self._steps.optimizer

    def build(self, variables: Sequence[Any]) -> None:
        """Create the optimizer on the server, or continue the one that exists; see `if_exists`.

        Args:
            variables: The trainable variables of the model.
        """
        if self.built:
            return
        super().build(variables)
        specs = {}
        for index, variable in enumerate(variables):
            dtype = keras.backend.standardize_dtype(variable.dtype)
            # Not by its path, which changes when a model is built or loaded once more.
            parameter = f"{index}/{variable.name}"
            if dtype not in _WIDE:
                raise InvalidArgumentError(
                    f"Variable {variable.path!r} is {dtype}; the service has float32, float64, bfloat16 and float16.",
                    metadata={"parameter": parameter},
                )
            specs[parameter] = TensorSpec(tuple(variable.shape), _WIDE[dtype])
        self._names = list(specs)
        count = self._steps.begin(partial(self._create, specs))
        self._count = self.add_variable(shape=(), dtype="int32", name="remote_step")
        self._count.assign(int(count))

    def _create(self, specs: dict[str, TensorSpec]) -> Optimizer:
        create_or_adopt(self._client, self.name, self._if_exists, Wanted(self._algorithm, specs))
        return self._find()

    def _find(self) -> Optimizer:
        return self._client.optimizer(self.name, transport=self._transport, wire_dtype=self._wire_dtype)

    def _backend_update_step(
        self, grads: Sequence[Any], trainable_variables: Sequence[Any], learning_rate: Any
    ) -> None:
        """Make a step, and add the updates to the variables. Keras calls this for each step."""
        names = [self._names[self._get_variable_index(variable)] for variable in trainable_variables]
        dtypes = [_WIDE[keras.backend.standardize_dtype(variable.dtype)] for variable in trainable_variables]
        wide = [
            keras.ops.cast(keras.ops.convert_to_tensor(gradient), dtype)
            for gradient, dtype in zip(grads, dtypes, strict=True)
        ]
        step = partial(self._steps.step, self._find, names)
        rates = {"learning_rate": keras.ops.convert_to_tensor(learning_rate)}
        count, deltas = (_jax_step if keras.backend.backend() == "jax" else _torch_step)(
            step, self._count.value, rates, wide, self._is_step()
        )
        self.assign(self._count, count)
        for variable, delta in zip(trainable_variables, deltas, strict=True):
            self.assign_add(variable, keras.ops.cast(delta, variable.dtype))

    def _is_step(self) -> Any:
        """Whether this call is to make a step; None if every call does.

        On the jax backend Keras computes a step for each accumulated gradient, and throws most of them away.
        """
        if self.gradient_accumulation_steps and keras.backend.backend() == "jax":
            return keras.ops.add(self._iterations, 1) % self.gradient_accumulation_steps == 0
        return None

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Make a step of one variable; the others and their state stay as they are."""
        self._backend_update_step([gradient], [variable], learning_rate)

    def get_config(self) -> dict[str, Any]:
        """The configuration; `from_config` continues the optimizer of this name at the same address."""
        method = {"name": type(self._algorithm).__name__, **asdict(self._algorithm)}
        return super().get_config() | {
            "target": self._client.target,
            "algorithm": method,
            "if_exists": "resume",
            "transport": self._transport,
            "wire_dtype": self._wire_dtype,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Self:
        """The optimizer for a configuration."""
        method = dict(config["algorithm"])
        algorithm = getattr(algorithms, method.pop("name"))(**method)
        return super().from_config(config | {"algorithm": algorithm}, custom_objects)


def _torch_step(step: Any, count: Any, rates: dict[str, Any], grads: list[Any], is_step: Any) -> tuple[Any, list[Any]]:
    """Make a step now."""
    del is_step
    arrays = [keras.ops.convert_to_numpy(gradient) for gradient in grads]
    new_count, deltas = step(count, rates, arrays)
    return int(new_count), [keras.ops.convert_to_tensor(delta) for delta in deltas]


def _jax_step(step: Any, count: Any, rates: dict[str, Any], grads: list[Any], is_step: Any) -> tuple[Any, list[Any]]:
    """Make a step now, or, inside jit, when the program runs."""
    import jax
    import jax.numpy as jnp

    from optserve._adapters.tracing import on_host

    shapes = (
        jax.ShapeDtypeStruct((), jnp.int32),
        [jax.ShapeDtypeStruct(gradient.shape, gradient.dtype) for gradient in grads],
    )
    call = partial(on_host, step, shapes, count, rates, grads)
    if is_step is None:
        return call()
    return jax.lax.cond(is_step, call, lambda: (count, [jnp.zeros_like(gradient) for gradient in grads]))
