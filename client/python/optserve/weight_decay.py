"""Weight decay where the server does not see the weights: added to the gradient, before it is sent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from optserve._values.arrays import check_mapping, host_array
from optserve.errors import InvalidArgumentError


def with_weight_decay(
    grads: Mapping[str, Any], params: Mapping[str, Any], weight_decay: float | Mapping[str, float]
) -> dict[str, np.ndarray]:
    """The gradients of the loss with λ ‖x‖² / 2 added: g + λ x, as `weight_decay` of torch.optim has it.

    An optimizer that clips on the server clips this sum. Torch's usual order is the other one: `clip_grad_norm_` bounds
    g, and the optimizer adds λ x to what is left. For that, clip g here, and set no clipping on the server.

    Args:
        grads: By name, of NumPy or torch; not changed. One that is None stays None.
        params: The present parameters x, at least those that have a gradient; likewise, also torch's own Parameters.
        weight_decay: λ, finite and not negative, for all parameters, or by name; it is 0 for those not named.

    Returns:
        New arrays of NumPy in the dtypes of the gradients; the gradient itself where λ is 0.

    Raises:
        InvalidArgumentError: A λ out of range or of an unknown parameter, or a gradient without a parameter of its
            shape and dtype.

    Example:
        >>> grads, params = {"w": np.ones(2), "b": np.ones(1)}, {"w": np.full(2, 10.0), "b": np.ones(1)}
        >>> with_weight_decay(grads, params, {"w": 0.01})
        {'w': array([1.1, 1.1]), 'b': array([1.])}
    """
    check_mapping(grads, "grads", "{'w': gradient}")
    check_mapping(params, "params", "dict(model.named_parameters())")
    by_name = dict(weight_decay) if isinstance(weight_decay, Mapping) else dict.fromkeys(grads, weight_decay)
    for name, value in by_name.items():
        if name not in params:
            raise InvalidArgumentError(f"There is no parameter {name!r}.", metadata={"parameter": name})
        if not (math.isfinite(value) and value >= 0):
            raise InvalidArgumentError(
                f"weight_decay of {name!r} must be finite and not negative; it is {value}.",
                metadata={"parameter": name},
            )
    return {name: _decayed(name, gradient, params, by_name.get(name, 0.0)) for name, gradient in grads.items()}


def _decayed(name: str, gradient: Any, params: Mapping[str, Any], rate: float) -> Any:
    if not rate or gradient is None:
        return gradient
    gradient, param = host_array(gradient, f"The gradient of {name!r}"), host_array(params[name], f"Parameter {name!r}")
    if (param.shape, param.dtype) != (gradient.shape, gradient.dtype):
        raise InvalidArgumentError(
            f"The gradient of {name!r} is {gradient.dtype}{list(gradient.shape)}, "
            f"the parameter {param.dtype}{list(param.shape)}.",
            metadata={"parameter": name},
        )
    # One new array, and no other.
    decayed = np.multiply(param, param.dtype.type(rate))
    decayed += gradient
    return decayed
