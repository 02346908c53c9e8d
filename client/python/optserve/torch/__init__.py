"""PyTorch: states go to and from torch.optim, so that a run can leave or enter the service during training.

    state = opt.export_state()
    torch_optimizer.load_state_dict(optserve.torch.to_state_dict(state))

    state = optserve.torch.from_state_dict(torch_optimizer.state_dict(), dict(model.named_parameters()))
    opt = client.create_optimizer_from_state("mlp", state)

| torch.optim | here | note |
|---|---|---|
| Adadelta | Adadelta | slots as they are |
| Adagrad | Adagrad | slots as they are |
| RMSprop | WindowedRms with eps=0 and outer_eps | torch adds eps outside the root, equation 9 inside |
| RMSprop with momentum | Rmsprop | slots as they are |
| RMSprop, centered | CenteredRmsprop | slots as they are |
| SGD with momentum | Momentum | torch's buffer is Δx / −η |
| SGD with dampening or nesterov | SgdMomentum | slot as it is |
| SGD | Sgd | no slots |
| Adam, AdamW | Adam, AdamW | exp_avg is grad_avg, exp_avg_sq is square_avg |
| NAdam | Nadam | likewise; mu_product follows from the step |

If torch's settings fit several methods, `from_state_dict(…, method=SgdMomentum)` chooses one: every SGD is an
SgdMomentum too, and every RMSprop that is not centered is an Rmsprop. Each parameter has its own step counter, in torch
and here.

Groups of parameters travel both ways. An error names settings of torch that the service does not have, such as amsgrad
or maximize. An error also names what a state_dict cannot hold: schedule, clipping, decoupled weight decay, consistency
and the parameters x themselves. `OptimizerState.without` leaves them out; nothing is left out silently.

torch keeps schedules apart from its optimizers, so a state_dict has the present learning rate only. torch's SGD counts
no steps; if a schedule continues in the service, pass the number of steps to `from_state_dict`.
"""

from optserve.torch.remote_optimizer import RemoteOptimizer
from optserve.torch.state_dicts import from_state_dict, param_groups, to_state_dict

__all__ = ["RemoteOptimizer", "from_state_dict", "param_groups", "to_state_dict"]
