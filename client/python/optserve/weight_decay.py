"""Weight decay for delta mode, where the server does not have the weights: adds it to the gradients."""

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
    """The gradients of the loss plus λ ‖x‖² / 2, which are g + λ x, as with `weight_decay` of torch.optim.

    An optimizer that clips on the server clips this sum. Torch's usual order is the other one: `clip_grad_norm_` bounds
    g, and the optimizer adds λ x to what is left. For that, clip g here, and set no clipping on the server.

    Args:
        grads: The gradients g by name, of NumPy or torch. They are not changed. A gradient that is None stays None.
        params: The present parameters x by name, of NumPy or torch; at least those that have a gradient.
        weight_decay: λ, finite and not negative, for all parameters, or by name; 0 for parameters that are not named.

    Returns:
        New NumPy arrays in the dtypes of the gradients; the gradient itself if λ is 0.

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
    # Makes only one new array.
    decayed = np.multiply(param, param.dtype.type(rate))
    decayed += gradient
    return decayed
