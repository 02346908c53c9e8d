"""AdamW: Loshchilov and Hutter, arXiv:1711.05101, Algorithm 2."""

from __future__ import annotations

from optserve_server.numerics.rules import contract
from optserve_server.numerics.rules.moments import Moments


class AdamW(Moments, contract.AdamW):
    """The update of Adam. The decay λ x is not in it: it is that of hosted parameters, see `Backend.advance`."""
