"""Adam: Kingma and Ba, arXiv:1412.6980, Algorithm 1."""

from __future__ import annotations

from optserve_server.numerics.rules import contract
from optserve_server.numerics.rules.moments import Moments


class Adam(Moments, contract.Adam):
    """m ← β1 m + (1−β1) g;  v ← β2 v + (1−β2) g²;  Δx = −η m̂ / (√v̂ + ε), with m̂ = m / (1−β1^t), v̂ = v / (1−β2^t)."""
