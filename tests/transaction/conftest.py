import pytest

from optserve_server.engine.steps import Steps
from optserve_server.numerics.layout import Parameter
from transaction.harness import F4, make_steps


@pytest.fixture
def steps() -> Steps:
    """Three parameters: a matrix, a scalar and an empty one."""
    return make_steps(Parameter("w", (2, 3), F4), Parameter("b", (), F4), Parameter("none", (0, 4), F4))
