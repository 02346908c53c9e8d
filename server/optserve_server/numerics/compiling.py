"""Compiles what steps will call, before they need it: a compilation takes half a second."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from optserve_server.numerics.backends import Backend
from optserve_server.numerics.backends.base import DecayPlace
from optserve_server.numerics.settings import Settings
from optserve_server.numerics.step_settings import StepSettings
from optserve_server.numerics.weight_decay import DecayKind


def compile_ahead(settings: Settings, dtypes: Iterable[np.dtype], backend: Backend) -> None:
    """Compile the kernels of steps with an optimizer's own settings.

    Args:
        settings: The settings; they were checked.
        dtypes: Those of the parameters that are not empty.
        backend: Computes the steps.
    """
    places = set[DecayPlace]()
    if settings.hosted:
        decaying = _place(settings)
        places = {decaying if decay else DecayPlace.NOWHERE for decay in settings.decays()}
        if decaying in places and _rate_may_be_0(settings):
            places.add(DecayPlace.NOWHERE)
    for dtype in dtypes:
        backend.compile_ahead(type(settings.rule), dtype, places)


def compile_for_step(settings: Settings, own: StepSettings, dtypes: Iterable[np.dtype], backend: Backend) -> None:
    """Compile the kernels of a step with settings of its own, which may bring the first weight decay, or end it.

    Args:
        settings: The settings of the optimizer.
        own: Those of the step; they need not be checked.
        dtypes: Those of the parameters that are not empty.
        backend: Computes the step.
    """
    if settings.hosted and (any(settings.decays()) or any(change.weight_decay for change in own.changes)):
        for dtype in dtypes:
            backend.compile_ahead(type(settings.rule), dtype, (DecayPlace.NOWHERE, _place(settings)))


def _place(settings: Settings) -> DecayPlace:
    """Where steps take a weight decay off that is not 0."""
    return DecayPlace.GRADIENT if settings.decay_kind is DecayKind.L2 else DecayPlace.PARAMETERS


def _rate_may_be_0(settings: Settings) -> bool:
    """Whether a step may have no weight decay because its learning rate is 0."""
    if settings.decay_kind is not DecayKind.TIMES_LEARNING_RATE:
        return False
    rules: list[Any] = settings.rules()
    return settings.schedule is not None or any(rule.learning_rate == 0 for rule in rules)
