"""What a program with Keras does with the optimizer, on the backend of KERAS_BACKEND: a process for each backend.

    python keras_program.py TARGET NAME SCENARIO…

Each scenario raises if something is wrong.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import optserve
import optserve.keras
from optserve.keras import RemoteOptimizer

RNG = np.random.default_rng(3)
X = RNG.standard_normal((64, 4)).astype("float32")
Y = np.sin(X @ RNG.standard_normal((4, 2))).astype("float32")
STEPS_PER_EPOCH = 8


def net() -> Any:
    keras.utils.set_random_seed(11)
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(16, activation="tanh"), keras.layers.Dense(2)])


def fitted(optimizer: Any, epochs: int = 4, **settings: Any) -> tuple[Any, list[float]]:
    """A net after some epochs, and the loss of each."""
    model = net()
    model.compile(optimizer=optimizer, loss="mse")
    history = model.fit(X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, **settings)
    return model, history.history["loss"]


def weights(model: Any) -> list[np.ndarray]:
    return [np.asarray(keras.ops.convert_to_numpy(variable)) for variable in model.trainable_variables]


def same(ours: Any, theirs: Any, tolerance: float = 2e-5) -> None:
    """Fit both; their weights agree but for rounding."""
    mine, loss = fitted(ours)
    other, _ = fitted(theirs)
    assert loss[-1] < loss[0], loss
    close(mine, other, tolerance)


def close(ours: Any, theirs: Any, tolerance: float = 2e-5) -> None:
    for mine, other in zip(weights(ours), weights(theirs), strict=True):
        assert np.abs(mine - other).max() <= tolerance * max(np.abs(other).max(), 0.1), np.abs(mine - other).max()


def methods(client: optserve.Client, name: str) -> None:
    """The methods whose formulas agree."""
    kinds = keras.optimizers
    # Keras' Adam has its epsilon at the root of the uncorrected average; a small one hardly matters.
    rows = [
        (optserve.Adam(learning_rate=0.01, eps=1e-12), kinds.Adam(0.01, epsilon=1e-12)),
        (optserve.Sgd(learning_rate=0.05), kinds.SGD(0.05)),
        (optserve.SgdMomentum(learning_rate=0.05), kinds.SGD(0.05, momentum=0.9)),
        (optserve.Momentum(learning_rate=0.05, rho=0.8), kinds.SGD(0.05, momentum=0.8)),
        (optserve.SgdMomentum(learning_rate=0.05, nesterov=True), kinds.SGD(0.05, momentum=0.9, nesterov=True)),
        (optserve.Adadelta(learning_rate=1.0, eps=1e-4), kinds.Adadelta(1.0, rho=0.95, epsilon=1e-4)),
        (optserve.Adagrad(learning_rate=0.1, eps=1e-12), kinds.Adagrad(0.1, 0.0, epsilon=1e-24)),
        (optserve.WindowedRms(learning_rate=0.003, eps=1e-6), kinds.RMSprop(0.003, rho=0.9, epsilon=1e-6)),
        (optserve.Lion(learning_rate=0.003), kinds.Lion(0.003)),
        (
            optserve.Nadam(learning_rate=0.01, eps=1e-7, momentum_decay=1.0),
            kinds.Nadam(0.01, epsilon=1e-7),
        ),
    ]
    for index, (algorithm, theirs) in enumerate(rows):
        print(algorithm)
        same(RemoteOptimizer(client, algorithm, name=f"{name}-{index}"), theirs, 5e-5)
        assert client.optimizer(f"{name}-{index}").current_step == 4 * STEPS_PER_EPOCH


def settings(client: optserve.Client, name: str) -> None:
    """What Keras itself adds to a method: schedules, decay, clipping, averages."""
    schedule = keras.optimizers.schedules.CosineDecay(0.02, 20, warmup_steps=5, warmup_target=0.05)
    rows: list[dict[str, Any]] = [
        {"learning_rate": schedule},
        {"learning_rate": 0.01, "weight_decay": 0.1},
        {"learning_rate": 0.01, "global_clipnorm": 0.1},
        {"learning_rate": 0.01, "use_ema": True, "ema_overwrite_frequency": 3},
        {"learning_rate": 0.05, "gradient_accumulation_steps": 4},
        {"learning_rate": 0.01, "loss_scale_factor": 128.0},
    ]
    for index, row in enumerate(rows):
        print(row)
        ours = RemoteOptimizer(client, optserve.Adam(eps=1e-12), name=f"{name}-{index}", **row)
        same(ours, keras.optimizers.Adam(epsilon=1e-12, **row), 1e-4)
        made = 4 * STEPS_PER_EPOCH // row.get("gradient_accumulation_steps", 1)
        assert ours.optimizer.current_step == made == int(ours._count.numpy())


def callbacks(client: optserve.Client, name: str) -> None:
    """Callbacks set the learning rate while `fit` runs."""

    def halved(epoch: int, rate: float) -> float:
        return rate / 2 if epoch else rate

    def call() -> Any:
        return keras.callbacks.LearningRateScheduler(halved)

    ours, _ = fitted(RemoteOptimizer(client, optserve.Sgd(learning_rate=0.1), name=name), callbacks=[call()])
    theirs, _ = fitted(keras.optimizers.SGD(0.1), callbacks=[call()])
    close(ours, theirs)


def mixed(client: optserve.Client, name: str) -> None:
    """A float16 policy, with the loss scaling of Keras, and bfloat16 variables."""
    keras.config.set_dtype_policy("mixed_float16")
    inner = RemoteOptimizer(client, optserve.Adam(learning_rate=0.01), name=name)
    model, loss = fitted(keras.optimizers.LossScaleOptimizer(inner))
    assert loss[-1] < 0.9 * loss[0], loss
    assert {str(variable.dtype) for variable in model.trainable_variables} == {"float32"}
    keras.config.set_dtype_policy("bfloat16")
    model, loss = fitted(RemoteOptimizer(client, optserve.Adam(learning_rate=0.01), name=f"{name}-2"))
    assert loss[-1] < 0.9 * loss[0], loss
    assert {str(variable.dtype) for variable in model.trainable_variables} == {"bfloat16"}


def saved(client: optserve.Client, name: str) -> None:
    """A model that is saved and loaded goes on with its optimizer."""
    ours, _ = fitted(RemoteOptimizer(client, optserve.Adam(learning_rate=0.01), name=name), 2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        ours.save(path)
        loaded: Any = keras.models.load_model(path)
    assert loaded.optimizer.optimizer.current_step == 2 * STEPS_PER_EPOCH
    loaded.fit(X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    straight, _ = fitted(RemoteOptimizer(client, optserve.Adam(learning_rate=0.01), name=f"{name}-2"), 4)
    for mine, other in zip(weights(loaded), weights(straight), strict=True):
        np.testing.assert_array_equal(mine, other)
    # The old model is of an earlier step now.
    # JAX raises an error of its own.
    with pytest.raises(Exception, match="is at step 32, not 16"):
        ours.fit(X, Y, batch_size=8, verbose=0)


def frozen(client: optserve.Client, name: str) -> None:
    """Only trainable variables have a parameter; eager calls work too."""
    model = net()
    model.layers[0].trainable = False
    optimizer = RemoteOptimizer(client, optserve.Sgd(learning_rate=1.0), name=name)
    optimizer.build(model.trainable_variables)
    before = weights(model)
    optimizer.apply([keras.ops.ones(variable.shape) for variable in model.trainable_variables])
    for old, new in zip(before, weights(model), strict=True):
        np.testing.assert_allclose(new, old - 1, rtol=1e-6)
    parameters = optimizer.optimizer.export_state().parameters
    assert list(parameters) == ["0/kernel", "1/bias"], parameters
    assert optimizer.optimizer.current_step == 1
    # Without its gradient a variable and its state stay as they are.
    import warnings

    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        optimizer.apply([None, keras.ops.ones((2,))])
    assert optimizer.optimizer.current_step == 2
    np.testing.assert_array_equal(weights(model)[0], before[0] - 1)


def refusals(client: optserve.Client, name: str) -> None:
    """Wrong use is said at once."""

    def refused(call: Callable[[], object], words: str) -> None:
        with pytest.raises(optserve.OptserveError, match=words):
            call()

    refused(lambda: RemoteOptimizer(client, optserve.Vsgd(), name=name), "diagonal of the Hessian")
    kind: Any = optserve.Adam
    refused(lambda: RemoteOptimizer(client, kind, name=name), "class Adam itself")
    refused(lambda: RemoteOptimizer(client, optserve.Adam(), name=name).optimizer, "call build or fit first")
    fitted(RemoteOptimizer(client, optserve.Adam(), name=name), 1)
    refused(lambda: fitted(RemoteOptimizer(client, optserve.Adam(), name=name), 1), "if_exists='resume' goes on")
    resumed = RemoteOptimizer(client, optserve.Adam(), name=name, if_exists="resume")
    fitted(resumed, 1)
    assert resumed.optimizer.current_step == 2 * STEPS_PER_EPOCH
    replaced = RemoteOptimizer(client, optserve.Sgd(), name=name, if_exists="replace")
    fitted(replaced, 1)
    assert replaced.optimizer.current_step == STEPS_PER_EPOCH
    refused(lambda: RemoteOptimizer(client, optserve.Sgd(), name=name, if_exists=any), "if_exists is 'error'")  # type: ignore[arg-type]


def main(target: str, name: str, *chosen: str) -> None:
    """Run the chosen scenarios."""
    scenarios = {
        function.__name__: function for function in (methods, settings, callbacks, mixed, saved, frozen, refusals)
    }
    with optserve.connect(target) as client:
        for scenario in chosen:
            print(scenario)
            scenarios[scenario](client, f"{name}-{scenario}")


if __name__ == "__main__":
    main(*sys.argv[1:])
