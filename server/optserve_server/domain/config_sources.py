"""Where the server's settings come from: options of the command, then the environment, then a TOML file, then defaults.

The first that has a setting counts.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from optserve_server.domain.config import ConfigError, ServerConfig

PREFIX = "OPTSERVE_"
"""The environment variable of a setting has this prefix, then its name in capitals."""

DEFAULT, DERIVED = "default", "derived"
"""Sources of a setting that nobody has set: its default, or a value that follows from others and the machine."""

_DEFAULTS = {item.name: item.default for item in fields(ServerConfig)}
_TYPES = {item.name: str(item.type) for item in fields(ServerConfig)}
_READERS = {"int": int, "float": float, "str": str}


@dataclass(frozen=True)
class Loaded:
    """Settings in effect.

    Attributes:
        config: The settings, checked.
        sources: Where each comes from: an option, an environment variable, a file, DEFAULT or DERIVED.
    """

    config: ServerConfig
    sources: dict[str, str]


def load(path: Path | None, options: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Loaded:
    """Collect the settings of a server from all sources, and check them.

    Args:
        path: A TOML file, if there is one.
        options: Values of the command's options by setting; None for an option that was not given.
        environment: The environment variables; those of this process by default.

    Raises:
        ConfigError: The file cannot be read or has an unknown key, an option is empty, or a value is impossible; then
            the message says where the value comes from.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if path is not None:
        values = read(path)
        sources = dict.fromkeys(values, str(path))
    for name, value in read_environment(os.environ if environment is None else environment).items():
        values[name], sources[name] = value, variable_of(name)
    for name, value in options.items():
        if value is None:
            continue
        option = f"--{name.replace('_', '-')}"
        # What a shell makes of a variable that is not set. It is no wish for no data folder, or for no TLS.
        if value == "":
            raise ConfigError(f"{option} is empty; leave the option out if it is not meant.", name)
        values[name], sources[name] = value, option
    try:
        config = ServerConfig(**values)
    except ConfigError as error:
        source = sources.get(error.setting)
        raise ConfigError(f"{error} It comes from {source}." if source else str(error), error.setting) from error
    for name, default in _DEFAULTS.items():
        if name not in sources:
            sources[name] = DEFAULT if getattr(config, name) == default else DERIVED
    return Loaded(config, {name: sources[name] for name in _DEFAULTS})


def read(path: Path) -> dict[str, Any]:
    """The settings in a TOML file, by name; the values are not checked yet.

    Raises:
        ConfigError: The file cannot be read, or has an unknown key.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read the configuration {path}: {error.strerror}.") from error
    # The last one for brackets within brackets, without end.
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"Cannot read the configuration {path}: {error}.") from error
    for name in values:
        if name not in _DEFAULTS:
            nearest = difflib.get_close_matches(name, _DEFAULTS, 1)
            meant = f"; did you mean {nearest[0]!r}?" if nearest else "."
            raise ConfigError(
                f"{path} sets {name!r}, which is not a setting{meant} `optserve config` lists all settings."
            )
    return values


def variable_of(name: str) -> str:
    """The environment variable of a setting."""
    return f"{PREFIX}{name.upper()}"


def read_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """The settings in the environment, by name. An empty variable counts as none.

    Raises:
        ConfigError: A variable is not a number where the setting is one.
    """
    values: dict[str, Any] = {}
    for name, kind in _TYPES.items():
        variable = variable_of(name)
        text = environment.get(variable, "")
        if not text:
            continue
        try:
            values[name] = _READERS[kind](text)
        except ValueError as error:
            hint = ""
            if "://" in text:
                hint = (
                    " Kubernetes sets such variables for a service called optserve; `enableServiceLinks: false` in the "
                    "pod's specification keeps them away."
                )
            raise ConfigError(f"{variable} must be of type {kind}, not {text!r}.{hint}") from error
    return values
