"""The base class of the value objects of all methods. The classes in `optserve.algorithms` are generated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import ClassVar

from optserve.v1 import algorithms_pb2


@dataclass(frozen=True)
class Algorithm:
    """One method with its hyper-parameters. Use a subclass."""

    name: ClassVar[str]
    takes_curvature: ClassVar[bool] = False

    def to_message(self) -> algorithms_pb2.Algorithm:
        """The message of the contract.

        Raises:
            TypeError: A value does not have the type of its field.
        """
        message = algorithms_pb2.Algorithm()
        settings = getattr(message, self.name)
        settings.SetInParent()
        for field, value in asdict(self).items():
            # protobuf takes a 2 for True.
            if isinstance(getattr(type(self), field), bool) and not isinstance(value, bool):
                raise TypeError(f"{field} of {type(self).__name__} is True or False, not {value!r}.")
            setattr(settings, field, value)
        return message


def read(message: algorithms_pb2.Algorithm, known: Mapping[str, type[Algorithm]]) -> Algorithm:
    """The value object for a message; `known` has the classes by their names in the contract.

    Raises:
        ValueError: The method is not one of `known`.
    """
    name = message.WhichOneof("method")
    if name not in known:
        raise ValueError(f"This client does not know the method {name!r}; a newer client may.")
    kind = known[name]
    settings = getattr(message, name)
    return kind(**{field.name: getattr(settings, field.name) for field in fields(kind)})
