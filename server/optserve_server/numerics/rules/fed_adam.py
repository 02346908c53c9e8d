"""FedAdam: Reddi et al., "Adaptive Federated Optimization", arXiv:2003.00295, Algorithm 2."""

from __future__ import annotations

from optserve_server.numerics.rules import contract
from optserve_server.numerics.rules.moments import CorrectableMoments


class FedAdam(CorrectableMoments, contract.FedAdam):
    """m ← β1 m + (1−β1) g;  v ← β2 v + (1−β2) g²;  Δx = −η m / (√v + ε), or with m̂ and v̂ as in Adam."""
