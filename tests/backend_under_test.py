"""The backend of the servers that the tests start: that of OPTSERVE_TEST_BACKEND, Numba without it."""

import os

BACKEND = os.environ.get("OPTSERVE_TEST_BACKEND", "numba")

BACKENDS = ("numpy", BACKEND)
"""For tests of what backends may do differently."""

IN_PROCESS = (*BACKENDS, "simulated")
"""For tests that need no server process: also `simulated_device`."""
