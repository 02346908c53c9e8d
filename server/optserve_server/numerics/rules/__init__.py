"""The methods that the server knows, one file each. Adding one is a file and a line here."""

from optserve_server.numerics.rules.adadelta import Adadelta
from optserve_server.numerics.rules.adagrad import Adagrad
from optserve_server.numerics.rules.base import Rule
from optserve_server.numerics.rules.diagonal_hessian import DiagonalHessian
from optserve_server.numerics.rules.momentum import Momentum
from optserve_server.numerics.rules.sgd import Sgd
from optserve_server.numerics.rules.vsgd import Vsgd
from optserve_server.numerics.rules.windowed_rms import WindowedRms

RULES: dict[str, type[Rule]] = {
    rule.name: rule for rule in (Adadelta, Sgd, Momentum, Adagrad, WindowedRms, DiagonalHessian, Vsgd)
}
"""Every method by its field name in `optserve.v1.Algorithm`."""

__all__ = ["RULES", "Adadelta", "Adagrad", "DiagonalHessian", "Momentum", "Rule", "Sgd", "Vsgd", "WindowedRms"]
