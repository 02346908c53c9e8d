"""The backends under test: all that work here. CuPy is left out only where there is no device."""

import pytest

from optserve_server.numerics import backends
from simulated_device import GPU, load


@pytest.fixture(scope="session", params=["numpy", "numba", "simulated", GPU])
def backend(request: pytest.FixtureRequest) -> backends.Backend:
    return load(request.param)
