"""What the tests of the adapter for torch share."""

import pytest
import torch


@pytest.fixture
def doubles():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
