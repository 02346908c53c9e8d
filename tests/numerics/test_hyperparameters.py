"""Hyper-parameters out of range are refused, also those that only their rounding puts there."""

import math

import numpy as np
import pytest

from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.numerics.rules import Adadelta, Adagrad, Momentum, Sgd, SgdMomentum, WindowedRms

F4, F8 = np.dtype("f4"), np.dtype("f8")


@pytest.mark.parametrize(
    ("rule", "field"),
    [
        (Adadelta(rho=1.0), "adadelta.rho"),
        (Adadelta(rho=-0.1), "adadelta.rho"),
        (Adadelta(rho=math.nan), "adadelta.rho"),
        (Adadelta(eps=0.0), "adadelta.eps"),
        (Adadelta(eps=math.inf), "adadelta.eps"),
        (Adadelta(learning_rate=-1.0), "adadelta.learning_rate"),
        (Sgd(learning_rate=math.inf), "sgd.learning_rate"),
        (Momentum(rho=1.0), "momentum.rho"),
        (Adagrad(eps=-1e-10), "adagrad.eps"),
        (WindowedRms(rho=2.0), "windowed_rms.rho"),
        (WindowedRms(eps=0.0), "windowed_rms.eps"),
        (WindowedRms(outer_eps=-1e-9), "windowed_rms.outer_eps"),
        (SgdMomentum(nesterov=True, momentum=0.0), "sgd_momentum.nesterov"),
        (SgdMomentum(nesterov=True, dampening=0.1), "sgd_momentum.nesterov"),
        (SgdMomentum(dampening=1.1), "sgd_momentum.dampening"),
        (SgdMomentum(nesterov=1), "sgd_momentum.nesterov"),  # pyright: ignore[reportArgumentType]
    ],
    ids=str,
)
def test_out_of_range(rule, field):
    with pytest.raises(OptserveError) as caught:
        rule.check(F8)
    assert caught.value.reason is Reason.HYPERPARAMETER_OUT_OF_RANGE
    assert caught.value.field == f"optimizer.algorithm.{field}"


@pytest.mark.parametrize(
    ("rule", "word"),
    [
        (Adadelta(rho=1 - 1e-9), "1.0 in float32"),
        (Adadelta(eps=1e-60), "0.0 in float32"),
        (WindowedRms(eps=1e-60), "both 0 in float32"),
        (SgdMomentum(momentum=1e-60, nesterov=True), "needs a positive momentum"),
    ],
    ids=str,
)
def test_out_of_range_once_rounded_to_the_dtype(rule, word):
    rule.check(F8)
    with pytest.raises(OptserveError, match=word):
        rule.check(F4)


@pytest.mark.parametrize("dtype", [F4, F8], ids=str)
def test_the_largest_gradient_that_is_let_in_keeps_the_state_finite(dtype):
    limit = dtype.type(Adadelta().gradient_limit(dtype))
    with np.errstate(over="ignore"):
        assert np.isfinite(limit * limit)
        above = np.nextafter(np.nextafter(limit, dtype.type(np.inf)), dtype.type(np.inf))
        assert not np.isfinite(above * above)
    assert Sgd().gradient_limit(dtype) == np.finfo(dtype).max
