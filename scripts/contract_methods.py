"""Reads the methods and their hyper-parameters from the descriptors of the contract, and writes nothing."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "optserve.v1"
CONTRACT = "optserve/v1/algorithms.proto"

FieldProto = descriptor_pb2.FieldDescriptorProto
TYPES = {
    FieldProto.TYPE_DOUBLE: float,
    FieldProto.TYPE_UINT32: int,
    FieldProto.TYPE_UINT64: int,
    FieldProto.TYPE_BOOL: bool,
}
FLAG_RANGE = "true or false"


class ContractError(ValueError):
    """The contract does not say what has to be said of each method."""


def number(value: float) -> str:
    """As people write it: 0.95, 1e-6, 10."""
    text = f"{value:g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    return text if float(text) == value else repr(value)


@dataclass(frozen=True)
class Hyperparameter:
    """One field of a method's message, with what its option says. One that is true or false is a flag."""

    name: str
    type: type
    meaning: str
    default: float
    range: str

    @property
    def is_flag(self) -> bool:
        """Whether it is true or false."""
        return self.type is bool

    @property
    def default_text(self) -> str:
        """The default as people write it."""
        return str(self.default).lower() if self.is_flag else number(self.default)

    @property
    def default_code(self) -> str:
        """The default as Python writes it, of the field's type."""
        if self.is_flag:
            return str(self.default)
        text = number(self.default)
        return text if self.type is int or set(text) & set(".e") else f"{text}.0"


@dataclass(frozen=True)
class Method:
    """One message of `Algorithm.method`."""

    field: str
    name: str
    comment: list[str]
    takes_curvature: bool
    hyperparameters: list[Hyperparameter]

    @property
    def summary(self) -> str:
        """The first paragraph."""
        return self.comment[0]


class Contract:
    """The descriptors of all files, with their comments, and a way to read our own options."""

    def __init__(self, files: descriptor_pb2.FileDescriptorSet) -> None:
        self._pool = descriptor_pool.DescriptorPool()
        for file in files.file:
            self._pool.Add(file)
        self._file = next(file for file in files.file if file.name == CONTRACT)
        self._comments = {
            tuple(location.path): location.leading_comments for location in self._file.source_code_info.location
        }

    def option(self, given: Any, name: str) -> Any:
        """An option of ours; None where it is not given."""
        kind = message_factory.GetMessageClass(self._pool.FindMessageTypeByName(given.DESCRIPTOR.full_name))
        read = kind.FromString(given.SerializeToString())
        extension: Any = self._pool.FindExtensionByName(f"{PACKAGE}.{name}")
        return read.Extensions[extension] if read.HasExtension(extension) else None

    def paragraphs(self, *path: int) -> list[str]:
        """The comment of what stands at a path of the file: prose as one line each, formulas as they are."""
        paragraphs: list[str] = []
        for block in self._comments.get(path, "").strip("\n").split("\n\n"):
            # One space follows the slashes.
            lines = [line.removeprefix(" ").rstrip() for line in block.split("\n")]
            formula = all(line.startswith("  ") for line in lines)
            paragraphs.append("\n".join(lines) if formula else " ".join(line.strip() for line in lines))
        return paragraphs

    def methods(self) -> list[Method]:
        """All of them, in the order of `Algorithm.method`.

        Raises:
            ContractError: Something that has to be said of one is not, or cannot be.
        """
        messages = {message.name: index for index, message in enumerate(self._file.message_type)}
        (algorithm,) = (message for message in self._file.message_type if message.name == "Algorithm")
        return [self._method(field.name, messages[field.type_name.rsplit(".", 1)[1]]) for field in algorithm.field]

    def _method(self, name: str, index: int) -> Method:
        message = self._file.message_type[index]
        option = self.option(message.options, "method")
        return Method(
            name,
            message.name,
            self.paragraphs(4, index),
            option is not None and option.takes_curvature,
            [self._hyperparameter(message.name, field, (4, index, 2, at)) for at, field in enumerate(message.field)],
        )

    def _hyperparameter(self, message: str, field: FieldProto, path: tuple[int, ...]) -> Hyperparameter:
        where = f"{message}.{field.name}"
        option = self.option(field.options, "hyperparameter")
        is_flag = field.type == FieldProto.TYPE_BOOL
        if is_flag and (option is None or [item.name for item, _ in option.ListFields()] != ["default_flag"]):
            raise ContractError(f"{where} needs a (hyperparameter) with default_flag, and nothing else.")
        if not is_flag and (option is None or not (option.HasField("default_value") and option.WhichOneof("lower"))):
            raise ContractError(f"{where} needs a (hyperparameter) with default_value and gte or gt.")
        if not field.proto3_optional:
            raise ContractError(f"{where} is not optional: one that is absent has to take its default.")
        if field.type not in TYPES:
            raise ContractError(f"{where} is neither a double nor an unsigned whole number nor a bool.")
        meaning = " ".join(self.paragraphs(*path))
        if is_flag:
            return Hyperparameter(field.name, bool, meaning, option.default_flag, FLAG_RANGE)
        interval = range_of(option)
        if not contains(option, option.default_value):
            raise ContractError(f"The default of {where}, {number(option.default_value)}, does not lie in {interval}.")
        return Hyperparameter(field.name, TYPES[field.type], meaning, option.default_value, interval)


def methods_of(descriptors: bytes) -> list[Method]:
    """All methods, from a serialised FileDescriptorSet with source information.

    Raises:
        ContractError: See `Contract.methods`.
    """
    return Contract(descriptor_pb2.FileDescriptorSet.FromString(descriptors)).methods()


def range_of(option: Any) -> str:
    """The range of a hyper-parameter in the usual notation: `[0, 1)`, `(0, inf)`."""
    lower, upper = option.WhichOneof("lower"), option.WhichOneof("upper")
    low, high = number(getattr(option, lower)), number(getattr(option, upper)) if upper else "inf"
    return f"{'[' if lower == 'gte' else '('}{low}, {high}{']' if upper == 'lte' else ')'}"


def contains(option: Any, value: float) -> bool:
    """Whether a value lies in the range of a hyper-parameter."""
    compare = {"gte": operator.ge, "gt": operator.gt, "lte": operator.le, "lt": operator.lt}
    ends = [end for end in (option.WhichOneof("lower"), option.WhichOneof("upper")) if end]
    return all(compare[end](value, getattr(option, end)) for end in ends)
