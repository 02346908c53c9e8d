"""The options of `optserve mnist`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Optional

import typer

from optserve import algorithms

if TYPE_CHECKING:
    MethodName = str
else:
    # All methods of the package. A type checker would need a literal list.
    MethodName = Literal[tuple(algorithms.ALGORITHMS)]
AnnealName = Literal["none", "plateau"]
ActivationName = Literal["tanh", "relu", "logistic"]

Target = Annotated[
    Optional[str], typer.Option(help="Server, HOST:PORT. Without it a local server is started and stopped.")
]
Method = Annotated[MethodName, typer.Option(help="Method.")]
Rho = Annotated[Optional[float], typer.Option(help="Decay constant; the method's default.")]
Eps = Annotated[Optional[float], typer.Option(help="Conditioning constant; the method's default.")]
LearningRate = Annotated[Optional[float], typer.Option(help="Learning rate; the method's default.")]
WeightDecay = Annotated[
    float,
    typer.Option(min=0.0, help="Times the weights, added to their gradient; with replicas decoupled from it."),
]
Anneal = Annotated[
    AnnealName,
    typer.Option(
        help="plateau: halve the learning rate when the error on 5,000 held-out training images has not fallen "
        "for --patience epochs."
    ),
]
Patience = Annotated[int, typer.Option(min=1, max=10_000, help="Epochs, see --anneal.")]
Activation = Annotated[ActivationName, typer.Option(help="Hidden units.")]
Epochs = Annotated[int, typer.Option(min=1, max=10_000, help="Passes over the training images.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the initial weights and of the order of the images.")]
Replicas = Annotated[
    int, typer.Option(min=1, max=4096, help="Replicas that share the weights, which the server then holds.")
]
ConsistencyText = Annotated[
    str, typer.Option(help="Consistency of replicas: async, bounded:S, sync, or sync:B with B backup workers.")
]
ScaleByStaleness = Annotated[
    bool,
    typer.Option(help="Divide the learning rate by 1 + how many steps old a replica's gradient is."),
]
PushEvery = Annotated[
    int, typer.Option(min=1, max=10_000, help="Batches of a replica whose mean gradient is one step.")
]
FetchEvery = Annotated[int, typer.Option(min=1, max=10_000, help="Batches after which a replica takes new weights.")]
DataDir = Annotated[
    Optional[Path], typer.Option(help="Folder with the four IDX files, plain or .gz. Default: fetched and cached.")
]
Json = Annotated[Optional[Path], typer.Option("--json", help="Write a report to this file.", dir_okay=False)]
Plot = Annotated[
    Optional[Path], typer.Option(help="Draw the test error per epoch to this .png or .svg.", dir_okay=False)
]
Backend = Annotated[str, typer.Option(help="Backend of the local server.")]
