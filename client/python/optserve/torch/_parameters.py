"""The parameters of a RemoteOptimizer: their names at the server, their gradients, and how updates reach them."""

from __future__ import annotations

import numpy as np
import torch

from optserve.errors import InvalidArgumentError
from optserve.state import TensorSpec
from optserve.torch._step_memory import Region

_STATE_DTYPES = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.complex128: torch.float64,
    torch.complex64: torch.float32,
}
"""The dtype of the state for each dtype of a parameter. A complex number is two real ones, as in torch.optim."""


class Parameter:
    """One parameter.

    Args:
        name: Its name at the server.
        tensor: A leaf of torch.
        has_name: Whether the user gave the name; otherwise it is the position among all parameters.

    Attributes:
        dtype: The dtype of its state.
        spec: Its shape and dtype at the server.

    Raises:
        InvalidArgumentError: The dtype, the layout or the device cannot be used.
    """

    def __init__(self, name: str, tensor: torch.Tensor, *, has_name: bool) -> None:
        self.name, self.tensor, self.has_name = name, tensor, has_name
        if tensor.dtype not in _STATE_DTYPES:
            raise _refused(
                name, f"{name!r} is {tensor.dtype}; an optimizer's parameters are floats or complex numbers."
            )
        if tensor.layout is not torch.strided:
            raise _refused(name, f"{name!r} is sparse ({tensor.layout}); the service takes dense parameters.")
        if tensor.is_meta:
            raise _refused(name, f"{name!r} is on the meta device and has no values; materialize the model first.")
        if hasattr(tensor, "to_local") or getattr(tensor, "_fsdp_flattened", False):
            raise _refused(
                name,
                f"{name!r} is a shard of a larger tensor, as FullyShardedDataParallel and fully_shard make them; the "
                "service takes whole tensors. Use DistributedDataParallel, or an optimizer of torch.",
            )
        self.dtype = _STATE_DTYPES[tensor.dtype]
        self._as_made = tensor.dtype, tensor.shape
        self.spec = TensorSpec(tuple(real(tensor).shape), str(self.dtype).rpartition(".")[2])
        # Counts changes of x, see `has_changed`.
        self._version = tensor._version
        # Where the gradient goes that cannot be sent as it is.
        self._staging: torch.Tensor | None = None

    def check_unchanged(self) -> None:
        """Raise InvalidArgumentError if x has another dtype or shape than when this was made."""
        tensor = self.tensor
        dtype, shape = self._as_made
        if tensor.dtype is not dtype or tensor.shape != shape:
            raise _refused(
                self.name,
                f"{self.name!r} is {tensor.dtype} {list(tensor.shape)}, and was {dtype} {list(shape)} when the "
                "optimizer was made. Convert the model first, with .to(), .double() or .half(), and make the optimizer "
                "then. A state_dict() of this one can be loaded into it.",
            )

    def gradient(self, region: Region | None = None, *, maximize: bool, decay: float) -> np.ndarray:
        """The gradient to be sent: g + decay x, or −g + decay x.

        Args:
            region: Where it goes; without a region it may share memory with the parameter's `grad`.
            maximize: Whether the sign of g changes.
            decay: By how much of x it grows.

        Raises:
            InvalidArgumentError: The gradient is sparse, or cannot be read from its device.
        """
        grad = self.tensor.grad
        if grad is None:
            raise _refused(self.name, f"{self.name!r} has no gradient.")
        if grad.layout is not torch.strided:
            raise _refused(
                self.name,
                f"The gradient of {self.name!r} is sparse, which the service does not take yet: make its layer with "
                "sparse=False, or set grad = grad.to_dense() before the step.",
            )
        grad = real(grad.detach())
        if region is not None:
            array, staging = region
        elif grad.is_cpu and grad.dtype is self.dtype and grad.is_contiguous() and not maximize and not decay:
            return grad.numpy()
        else:
            if self._staging is None:
                self._staging = torch.empty(self.spec.shape, dtype=self.dtype)
            array, staging = self._staging.numpy(), self._staging
        try:
            # On the host before anything is added, so that a device's gradient is rounded as the host's is.
            staging.copy_(grad)
            if maximize:
                staging.neg_()
            if decay:
                staging.add_(real(self.tensor.detach()).to(staging), alpha=decay)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            raise _refused(
                self.name, f"The gradient of {self.name!r} on {grad.device} cannot be read: {error}"
            ) from error
        return array

    def apply(self, update: torch.Tensor, keep: float) -> None:
        """Change x in place: x ← keep x + update."""
        x = real(self.tensor.detach())
        if not x.is_cpu:
            update = update.to(x.device)
        if keep == 1:
            x.add_(update)
        elif x.dtype is update.dtype:
            # One pass over the memory instead of two.
            torch.add(update, x, alpha=keep, out=x)
        else:
            x.copy_(torch.add(update, x, alpha=keep))

    def value(self) -> np.ndarray:
        """A copy of x, in the dtype of the state."""
        return real(self.tensor.detach()).cpu().to(self.dtype, copy=True).contiguous().numpy()

    def put(self, x: torch.Tensor) -> None:
        """Change x to what the server has, rounded to the dtype of the parameter."""
        real(self.tensor.detach()).copy_(x)
        self._version = self.tensor._version

    @property
    def has_changed(self) -> bool:
        """Whether x was changed in place since it was made, or since the last `put`, other than by `.data`."""
        return self.tensor._version != self._version


def real(tensor: torch.Tensor) -> torch.Tensor:
    """A complex tensor as real and imaginary parts, others as they are; the memory is the same."""
    # A lazily conjugated gradient has no real view.
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _refused(name: str, message: str) -> InvalidArgumentError:
    return InvalidArgumentError(message, metadata={"parameter": name})
