"""The backends under test: all that work here. CuPy is left out only where there is no device."""

import pytest

from optserve_server.numerics import backends


def _cuda_device_count() -> int:
    try:
        import cupy  # pyright: ignore[reportMissingImports]

        return cupy.cuda.runtime.getDeviceCount()
    # No CuPy, no driver, no device: each fails in its own way.
    except Exception:  # noqa: BLE001
        return 0


@pytest.fixture(
    scope="session",
    params=[
        "numpy",
        "numba",
        pytest.param("cupy", marks=pytest.mark.skipif(_cuda_device_count() == 0, reason="there is no CUDA device")),
    ],
)
def backend(request: pytest.FixtureRequest) -> backends.Backend:
    return backends.load(request.param)
