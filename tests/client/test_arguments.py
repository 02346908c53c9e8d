"""What users pass for arrays, mappings and settings: it works, or one clear sentence says what to pass instead."""

import re

import numpy as np
import pytest
import torch

import optserve

BFLOAT16 = np.dtype("V2")
"""As far as NumPy knows it without the package that adds it."""

SHAPES = {"w": (3, 2), "b": (2,)}


def grads(value: float = 1.0, dtype="float32") -> dict[str, np.ndarray]:
    return {name: np.full(shape, value, dtype) for name, shape in SHAPES.items()}


def tensors(**options) -> dict[str, torch.Tensor]:
    return {name: torch.ones(shape, **options) for name, shape in SHAPES.items()}


@pytest.fixture
def opt(client, name):
    return client.create_optimizer(name, optserve.Sgd(learning_rate=1.0), grads())


@pytest.fixture(params=["shm", "grpc"])
def carried(request, client, name):
    client.create_optimizer(name, optserve.Sgd(learning_rate=1.0), {"a": np.ones(2), "b": np.ones(2)})
    return client.optimizer(name, transport=request.param)


def refused(message: str):
    return pytest.raises(optserve.InvalidArgumentError, match=message)


# --- Gradients


def test_a_gradient_that_is_none_is_left_out_if_the_step_is_partial(opt):
    given = {**grads(), "b": None}
    with refused(r"The gradient of 'b' is None.* pass partial=True"):
        opt.step(given)
    assert list(opt.step(given, partial=True)) == ["w"]
    assert list(opt.step(grads(), partial=True)) == ["w", "b"]
    with refused("at least one gradient"):
        opt.step(dict.fromkeys(SHAPES), partial=True)
    with refused("no parameter 'x'"):
        opt.step({**grads(), "x": None}, partial=True)
    with refused(r"The gradient of 'b' is None.* `begin_step`"), opt.begin_step() as step:
        step.send("w", grads()["w"])
        step.send("b", None)
    assert opt.current_step == 2


@pytest.mark.parametrize(
    "make",
    [
        tensors,
        lambda: tensors(requires_grad=True),
        lambda: {name: torch.nn.Parameter(tensor) for name, tensor in tensors().items()},
        lambda: {name: array.astype(">f4") for name, array in grads().items()},
        lambda: {name: np.asfortranarray(array) for name, array in grads().items()},
        lambda: {name: array.view(np.memmap) for name, array in grads().items()},
        lambda: {name: Tinygrad(array, "float", 4) for name, array in grads().items()},
        lambda: {name: TensorFlow(array, np.float32) for name, array in grads().items()},
    ],
    ids=["torch", "requires grad", "parameters", "big-endian", "fortran", "memmap", "tinygrad", "tensorflow"],
)
def test_arrays_of_any_library_are_taken_in_the_parameters_dtype(opt, make):
    for update in opt.step(make()).values():
        assert (update.dtype, update.tolist()) == (np.float32, np.full(update.shape, -1.0).tolist())


@pytest.mark.parametrize(
    ("gradient", "message"),
    [
        (torch.ones(2, dtype=torch.bfloat16), r"The gradient of 'b' is torch\.bfloat16, which is neither"),
        (torch.ones(2, dtype=torch.float16), "'b' is float16, not float32; convert it"),
        (torch.ones(2, dtype=torch.float64), "'b' is float64, not float32; convert it"),
        (torch.ones(2, dtype=torch.int64), r"'b' is torch\.int64, which is neither"),
        (torch.ones(2).to_sparse(), "'b' cannot be read as an array"),
        (torch.ones(2, device="meta"), "'b' cannot be read as an array"),
        (np.ma.masked_array(np.ones(2, np.float32), [True, False]), r"'b' is a masked array.*\.filled\(0\)"),
        (np.zeros(2, BFLOAT16), r"'b' is \|V2, not float32"),
        (np.ones(2), "'b' is float64, not float32"),
        ([1.0, 2.0], "'b' is float64, not float32"),
        ("12", "'b' has shape"),
        ([[1.0], [2.0, 3.0]], "'b' cannot be read as an array"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(getattr(value, "dtype", type(value).__name__)),
)
def test_a_gradient_of_another_dtype_is_never_converted_in_silence(opt, gradient, message):
    with refused(message):
        opt.step({**grads(), "b": gradient})
    assert opt.current_step == 0


def test_a_dtype_that_becomes_a_wider_one_on_the_way_is_refused(opt):
    # tinygrad's bfloat16 tensors give float32 arrays, and its `float` is no float64.
    with refused("'b' is dtypes.bfloat16, which is neither"):
        opt.step({**grads(), "b": Tinygrad(np.ones(2, np.float32), "__bf16", 2, "bfloat16")})
    with refused("'b' is dtypes.half, and became float32 instead of float16"):
        opt.step({**grads(), "b": Tinygrad(np.ones(2, np.float32), "half", 2)})


@pytest.mark.parametrize("grads", [[np.ones(2)], np.ones(2), iter([]), None, 3], ids=lambda v: type(v).__name__)
def test_what_is_no_mapping_is_refused_as_such(client, opt, grads):
    kind = type(grads).__name__
    with refused(rf"gradients must be a mapping by name.* not of type {kind}"):
        opt.step(grads)
    with refused(rf"params must be a mapping by name.*named_parameters.* not of type {kind}"):
        client.create_optimizer("never", optserve.Sgd(), grads)
    with refused("must be a mapping by name"):
        optserve.with_weight_decay(grads, {}, 0.1)
    with refused("parameters must be a mapping by name"):
        opt.push_parameters(grads)
    if grads is not None:
        with refused("out must be a mapping by name"):
            opt.step({"w": np.ones((3, 2), np.float32), "b": np.ones(2, np.float32)}, out=grads)


def test_model_parameters_is_named_as_the_mistake_that_it_is(client, name):
    model = torch.nn.Linear(3, 2)
    with refused(r"such as dict\(model\.named_parameters\(\)\), not of type generator"):
        client.create_optimizer(name, optserve.Sgd(), model.parameters())


def test_an_output_is_an_array_of_numpy(opt):
    with refused(r"output of 'w' must be an array of NumPy, not of type Tensor.*tensor\.detach\(\)\.numpy\(\)"):
        opt.step(grads(), out=tensors())
    lent = tensors()
    opt.step(grads(2.0), out={name: tensor.numpy() for name, tensor in lent.items()})
    assert lent["w"].tolist() == [[-2.0, -2.0]] * 3


# --- Buffers


def test_gradients_may_be_exchanged_among_buffers(carried):
    buffers = carried.buffers()
    buffers["a"][:], buffers["b"][:] = 1.0, 2.0
    updates = carried.step({"a": buffers["b"], "b": buffers["a"]})
    assert (updates["a"].tolist(), updates["b"].tolist()) == ([-2.0, -2.0], [-1.0, -1.0])


def test_outputs_and_single_gradients_in_the_buffer_of_another_are_refused(client, name):
    client.create_optimizer(name, optserve.Sgd(learning_rate=1.0), {"a": np.ones(2), "b": np.ones(2)})
    opt = client.optimizer(name, transport="shm")
    buffers = opt.buffers()
    exchanged = {"a": buffers["b"], "b": buffers["a"]}
    with refused("array for 'a' is in the buffer of another parameter"):
        opt.step({"a": np.ones(2), "b": np.ones(2)}, out=exchanged)
    with refused("array for 'a' is in the buffer of another parameter"), opt.begin_step() as step:
        step.send("a", exchanged["a"])
    buffers = opt.buffers()
    buffers["a"][:], buffers["b"][:] = 1.0, 2.0
    assert opt.step(buffers, out=buffers)["b"].tolist() == [-2.0, -2.0]


# --- Parameters


class Tinygrad:
    """Has what a tensor of tinygrad has: no __array__, and dtypes by C's names."""

    def __init__(self, array: np.ndarray, name: str, itemsize: int, shown: str = "") -> None:
        self.array, self.shape = array, array.shape

        class DType:
            def __init__(self) -> None:
                self.name, self.itemsize = name, itemsize

            def __str__(self) -> str:
                return f"dtypes.{shown or name}"

        self.dtype = DType()

    def numpy(self) -> np.ndarray:
        return self.array


class TensorFlow:
    """Has what a tensor of TensorFlow has: a dtype that says NumPy's."""

    def __init__(self, array: np.ndarray, as_numpy_dtype: type | np.dtype) -> None:
        self.array, self.shape = array, array.shape

        class DType:
            def __init__(self) -> None:
                self.as_numpy_dtype = as_numpy_dtype

            def __str__(self) -> str:
                return f"<dtype: {np.dtype(as_numpy_dtype).name!r}>"

        self.dtype = DType()

    def numpy(self) -> np.ndarray:
        return self.array

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.array, dtype)


def dtype_on_the_server(client, name, param) -> np.dtype:
    made = client.create_optimizer(name, optserve.Sgd(), {"x": param})
    return np.dtype(made.export_state().parameters["x"].dtype)


@pytest.mark.parametrize(
    ("param", "dtype"),
    [
        (Tinygrad(np.ones(2, "f4"), "float", 4), "float32"),
        (Tinygrad(np.ones(2, "f8"), "double", 8), "float64"),
        (TensorFlow(np.ones(2, "f4"), np.float32), "float32"),
        (TensorFlow(np.ones(2, "f8"), np.float64), "float64"),
        (torch.ones(2), "float32"),
        (torch.ones(2, dtype=torch.float64), "float64"),
        (np.ones(2, ">f8"), "float64"),
        (optserve.TensorSpec((2,), "float64"), "float64"),
        (optserve.TensorSpec((2,), np.float32), "float32"),
    ],
)
def test_the_dtype_of_any_library_is_that_of_the_state(client, name, param, dtype):
    assert dtype_on_the_server(client, name, param) == dtype


@pytest.mark.parametrize(
    "param",
    [
        Tinygrad(np.ones(2, "f2"), "half", 2),
        Tinygrad(np.ones(2, "f4"), "__bf16", 2, "bfloat16"),
        TensorFlow(np.ones(2, "f2"), np.float16),
        TensorFlow(np.zeros(2, BFLOAT16), BFLOAT16),
        torch.ones(2, dtype=torch.bfloat16),
        torch.ones(2, dtype=torch.int32),
        np.ones(2, np.int64),
        optserve.TensorSpec((2,), "no dtype"),
    ],
)
def test_another_dtype_is_refused_by_name(client, name, param):
    with refused("'x' is .*; a parameter's state is float32 or float64"):
        client.create_optimizer(name, optserve.Sgd(), {"x": param})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"x": [1.0, 2.0]}, "'x' is of type list, which has no shape and dtype"),
        ({"x": None}, "'x' is of type NoneType"),
        ({3: np.ones(2)}, "cannot be created from these arguments"),
        ({"x": optserve.TensorSpec((None, 2))}, "cannot be created from these arguments"),  # pyright: ignore[reportArgumentType]
        ({"x": optserve.TensorSpec((-1,))}, "cannot be created from these arguments"),
    ],
)
def test_a_parameter_without_shape_or_name_is_refused(client, name, params, message):
    with refused(message):
        client.create_optimizer(name, optserve.Sgd(), params)


@pytest.mark.parametrize("make", [tensors, lambda: tensors(requires_grad=True), grads], ids=["torch", "grad", "numpy"])
def test_hosted_parameters_of_any_library_are_uploaded(client, name, make):
    opt = client.create_optimizer(name, optserve.Sgd(), make(), hosted=True)
    assert {key: x.tolist() for key, x in opt.pull_parameters().arrays.items()} == {
        key: x.tolist() for key, x in grads().items()
    }


def test_specs_and_tensors_without_memory_wait_for_an_upload(client, name):
    opt = client.create_optimizer(name, optserve.Sgd(), tensors(device="meta"), hosted=True)
    with pytest.raises(optserve.FailedPreconditionError, match="not been uploaded"):
        opt.pull_parameters()
    with refused("'b' has no values, but other parameters have"):
        client.create_optimizer(
            f"{name}-2", optserve.Sgd(), {"w": np.ones(2), "b": optserve.TensorSpec((2,))}, hosted=True
        )


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.array([1.0, np.nan]), "nan"),
        (np.ma.masked_array(np.ones(2), [True, False]), "Parameter 'x' is a masked array"),
    ],
)
def test_a_hosted_creation_whose_upload_is_refused_can_be_made_again(client, name, bad, message):
    with refused(message):
        client.create_optimizer(name, optserve.Sgd(), {"x": bad}, hosted=True)
    assert name not in [item.name for item in client.list_optimizers()]
    opt = client.create_optimizer(name, optserve.Sgd(), {"x": np.ones(2)}, hosted=True)
    assert opt.pull_parameters().arrays["x"].tolist() == [1, 1]


def test_weight_decay_takes_tensors(client):
    model = {name: torch.nn.Parameter(torch.full(shape, 2.0)) for name, shape in SHAPES.items()}
    expected = {name: array.tolist() for name, array in grads(2.0).items()}
    for given in (grads(), tensors(), {**tensors(), "b": None}):
        decayed = optserve.with_weight_decay(given, model, 0.5)
        assert all(decayed[name].tolist() == expected[name] for name in given if given[name] is not None)
        assert all(decayed[name] is None for name in given if given[name] is None)
    with refused(r"The gradient of 'b' is torch\.bfloat16"):
        optserve.with_weight_decay({"b": torch.ones(2, dtype=torch.bfloat16)}, model, 0.5)


# --- Settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": optserve.Adadelta}, r"algorithm is the class Adadelta itself; pass Adadelta(…)"),
        ({"algorithm": "adadelta"}, "algorithm must be something like Adadelta(), not 'adadelta'"),
        ({"schedule": optserve.Cosine}, r"schedule is the class Cosine itself; pass Cosine(…)"),
        ({"schedule": 0.5}, "schedule must be something like Cosine(period_steps=100), not 0.5"),
        ({"clipping": 1.0}, "clipping must be something like Clipping(global_norm=1.0), not 1.0"),
        ({"consistency": optserve.Async}, r"consistency is the class Async itself; pass Async(…)"),
        ({"groups": optserve.Group(["w"], {})}, "groups must be a sequence"),
        ({"groups": {"w": {"rho": 0.5}}}, "groups must be a sequence"),
        ({"groups": [("w", {})]}, "A group must be something like"),
        ({"weight_decay": "0.1"}, "cannot be created from these arguments"),
    ],
)
def test_a_class_or_something_else_where_a_setting_belongs(client, name, opt, options, message):
    with refused(re.escape(message)):
        client.create_optimizer(f"{name}-2", **{"algorithm": optserve.Sgd(), "params": grads(), **options})
    with refused(re.escape(message.replace("cannot be created from these arguments", "weight_decay cannot be '0.1'"))):
        opt.update(**options)


def test_a_group_takes_a_sequence_of_names():
    with refused(r"pass \['w'\]"):
        optserve.Group("w", {})
    assert optserve.Group(["w"], {}) == optserve.Group(("w",), {})
    listed = optserve.AtSteps(rate=0.5, milestones=[1, 2])  # pyright: ignore[reportArgumentType]
    assert listed == optserve.AtSteps(rate=0.5, milestones=(1, 2))


@pytest.mark.parametrize("transport", ["GRPC", "tcp", None])
def test_a_transport_that_there_is_not_is_refused(client, name, opt, transport):
    with refused(f"transport must be one of auto, grpc, shm, not {transport!r}"):
        client.optimizer(name, transport=transport)


def test_names_are_strings(client, opt):
    for call in (client.optimizer, client.delete_optimizer, client.list_checkpoints, client.worker):
        with refused("The name of an optimizer must be a string, not of type Optimizer"):
            call(opt)


# --- Updates of single hyper-parameters


@pytest.mark.parametrize("method", [optserve.Adadelta(rho=0.9, eps=1e-5), optserve.Vsgd(eps=1e-3)])
def test_one_hyperparameter_is_changed_and_the_others_stay(client, name, method):
    opt = client.create_optimizer(name, method, grads(), clipping=optserve.Clipping(value=1.0))
    opt.update(eps=1e-4)
    assert opt.algorithm == type(method)(**{**vars(method), "eps": 1e-4})
    assert opt.clipping == optserve.Clipping(value=1.0)


def test_what_is_true_or_false_is_that_everywhere(client, name):
    method = optserve.SgdMomentum(momentum=0.5, nesterov=True)
    opt = client.create_optimizer(name, method, grads(), groups=[optserve.Group(["w"], {"nesterov": False})])
    assert (opt.algorithm, opt.groups[0].overrides) == (method, {"nesterov": False})
    opt.update(nesterov=False)
    assert opt.algorithm == optserve.SgdMomentum(momentum=0.5)
    for bad, message in (
        ({"nesterov": 1}, "nesterov of sgd_momentum cannot be 1: it is True or False"),
        ({"groups": [optserve.Group(["w"], {"nesterov": 2})]}, "nesterov of sgd_momentum cannot be 2"),
        ({"algorithm": optserve.SgdMomentum(momentum=0.0, nesterov=True)}, "needs a positive momentum"),
        (
            {"algorithm": optserve.SgdMomentum(nesterov=True), "groups": [optserve.Group(["w"], {"dampening": 0.5})]},
            "and a dampening of 0.5; it needs",
        ),
    ):
        with refused(message):
            opt.update(**bad)
    with pytest.raises(TypeError, match="nesterov of SgdMomentum is True or False, not 2"):
        optserve.SgdMomentum(nesterov=2).to_message()  # pyright: ignore[reportArgumentType]


def test_single_hyperparameters_are_checked(client, name):
    opt = client.create_optimizer(name, optserve.Adadelta(), grads())
    opt.update(learning_rate=0.5, rho=0.9, schedule=optserve.InverseTime(decay=1.0))
    assert opt.algorithm == optserve.Adadelta(rho=0.9, learning_rate=0.5)
    for bad, message in (
        ({"lr": 0.5}, "adadelta has no 'lr'; it has rho, eps, learning_rate"),
        ({"rho": 1.5}, r"adadelta.rho is 1.5, but must lie in \[0, 1\)"),
        ({"rho": "half"}, "rho of adadelta cannot be 'half'"),
        ({"algorithm": optserve.Adadelta(), "rho": 0.5}, "but not both"),
    ):
        with refused(message):
            opt.update(**bad)
    assert opt.algorithm == optserve.Adadelta(rho=0.9, learning_rate=0.5)
