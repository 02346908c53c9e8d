"""The limits of this server: the size of a model, the number of optimizers, and the memory of all together."""

from __future__ import annotations

from collections.abc import Sequence

from optserve_server.domain.config import ServerConfig
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.engine import footprint
from optserve_server.engine.optimizer import Optimizer
from optserve_server.numerics.layout import Layout
from optserve_server.numerics.settings import Settings
from optserve_server.numerics.state import operands_of


class Capacity:
    """Compares what calls ask for with the limits of the configuration.

    Args:
        config: The limits.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._config = config

    def check_workers(self, layout: Layout, settings: Settings) -> None:
        """Raise INVALID_FIELD if a step needs more workers than can connect, or more bytes than the limits allow."""
        if settings.consistency is not None:
            settings.consistency.check_capacity(len(operands_of(settings.rule)) * layout.size_bytes, self._config)

    def check_count(self, parameters: int) -> None:
        """Raise MODEL_TOO_LARGE for a model of too many parameters, before the server processes them."""
        self._check_limit("parameters", parameters, self._config.max_parameters)

    def check_size(self, layout: Layout) -> None:
        """Raise MODEL_TOO_LARGE for a model of too many parameters or bytes."""
        self.check_count(len(layout.parameters))
        self._check_limit("bytes of parameters", layout.size_bytes, self._config.max_parameter_bytes)

    @staticmethod
    def _check_limit(what: str, actual: int, limit: int) -> None:
        if actual > limit:
            raise OptserveError(
                Reason.MODEL_TOO_LARGE,
                f"The model has {actual} {what}; this server accepts at most {limit}.",
                field="optimizer.parameters",
                limit=limit,
                actual=actual,
            )

    def check_number(self, optimizers: int) -> None:
        """Raise SERVER_FULL if the server has as many optimizers as it may have."""
        if optimizers >= self._config.max_optimizers:
            raise OptserveError(
                Reason.SERVER_FULL,
                f"This server keeps at most {self._config.max_optimizers} optimizers; delete one.",
                limit=self._config.max_optimizers,
            )

    def temporary_bytes(self, layout: Layout, settings: Settings) -> int:
        """Bytes that an optimizer takes for a while, beside those that it always takes."""
        journalled = self._config.durability == "journal"
        return footprint.temporary_bytes(layout, settings, self._config.max_pull_bytes, journalled=journalled)

    def check_room(
        self,
        optimizer_id: str,
        required_bytes: int,
        optimizers: Sequence[Optimizer],
        reserved_bytes: int,
        temporary_bytes: int = 0,
    ) -> None:
        """Raise SERVER_FULL unless there is memory for more state.

        Args:
            optimizer_id: The optimizer that needs the memory, for the error.
            required_bytes: Bytes that it needs.
            optimizers: All optimizers of the server.
            reserved_bytes: Bytes of optimizers that are being created.
            temporary_bytes: Bytes that it takes for a while, see `temporary_bytes`.
        """
        used = reserved_bytes + sum(optimizer.memory_bytes for optimizer in optimizers)
        used += sum(footprint.description_bytes(item.layout, item.settings) for item in optimizers)
        most = max((self.temporary_bytes(item.layout, item.settings) for item in optimizers), default=0)
        most = max(most, temporary_bytes)
        for what, setting, needed, limit in (
            ("", "max_state_bytes", required_bytes, self._config.max_state_bytes),
            (
                f", {most} of them while a step is recovered or parameters are pulled",
                "memory_bytes, less what the process itself and messages take",
                required_bytes + most,
                self._config.room_bytes,
            ),
        ):
            if used + needed > limit:
                raise OptserveError(
                    Reason.SERVER_FULL,
                    f"{optimizer_id!r} needs {needed} bytes{what}; {max(0, limit - used)} of this server's {limit} are "
                    f"free ({setting}).",
                    limit=limit,
                )
