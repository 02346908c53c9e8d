"""What the README shows works as it is written."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
from google.protobuf import descriptor_pb2

import optserve
from optserve_server.domain.config import ServerConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


TEN_LINES, MOVING, ANNEALED, SHARED = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_ten_lines_run():
    done = subprocess.run([sys.executable, "-c", TEN_LINES], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("100 [")


def test_a_run_moves_as_it_is_shown(client, name):
    import torch

    model = torch.nn.Linear(3, 2)
    torch_optimizer = torch.optim.Adadelta(model.parameters(), rho=0.95)
    opt = client.create_optimizer(name, optserve.Adadelta(), dict(model.named_parameters()))
    opt.step({key: parameter.detach().numpy() for key, parameter in model.named_parameters()})
    shown = {"opt": opt, "client": client, "model": model, "torch_optimizer": torch_optimizer}
    exec(MOVING.replace('"theirs"', f'"{name}-2"'), shown)  # noqa: S102
    assert shown["opt"].current_step == 1
    client.delete_optimizer(f"{name}-2")


def test_settings_are_as_they_are_shown(client, name, capsys):
    params = {"w": np.ones((3, 2)), "b": np.ones(2)}
    shown = {"optserve": optserve, "client": client, "params": params, "grads": params}
    exec(ANNEALED.replace('"annealed"', f'"{name}"'), shown)  # noqa: S102
    assert capsys.readouterr().out.startswith("{0.0: 0.1")
    assert shown["opt"].schedule is None
    assert shown["grads"]["w"][0, 0] == 1 + 1e-4


def test_workers_share_a_model_as_it_is_shown(client, name):
    zeros = {"w": np.zeros((3, 2)), "b": np.zeros(2)}
    shown = {"optserve": optserve, "client": client, "params": zeros}
    exec(SHARED.replace('"shared"', f'"{name}"'), shown)  # noqa: S102
    pulled = client.optimizer(name).pull_parameters()
    assert pulled.step == 10
    assert all((array > 0).all() for array in pulled.arrays.values()), "it moves towards 1"


def test_the_commands_work_as_they_are_shown(client, server, tmp_path):
    client.create_optimizer("mine", optserve.Adadelta(), {"b": np.zeros(2, np.float32)})
    block = re.findall(r"named `mine`:\n\n```\n(.*?)```", README, re.DOTALL)[0]
    commands = [line.split("#")[0].split() for line in block.splitlines()]
    assert len(commands) == 4
    try:
        for command in commands:
            assert command[0] == "optserve"
            done = subprocess.run(
                [Path(sys.executable).parent / "optserve", *command[1:], "--target", server.target],
                capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
    finally:
        client.delete_checkpoint("mine", "epoch-1")
        client.delete_optimizer("mine")


def test_a_client_in_another_language_has_all_that_it_includes(tmp_path):
    assert "protoc -I proto --cpp_out=client $(find proto -name '*.proto')" in README
    files = [str(path) for path in (ROOT / "proto").rglob("*.proto")]
    made = tmp_path / "descriptors"
    tool = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}", f"--descriptor_set_out={made}", *files]
    subprocess.run(tool, check=True, capture_output=True)
    generated = descriptor_pb2.FileDescriptorSet.FromString(made.read_bytes()).file
    names = {file.name for file in generated}
    # Those of google/protobuf come with every language's runtime.
    included = {name for file in generated for name in file.dependency if not name.startswith("google/protobuf/")}
    assert included <= names


def test_a_method_is_shown_with_its_hyperparameters():
    shown = re.findall(r"^\| .* \| `(\w+)\((.*?)\)` \|", README, re.MULTILINE)
    assert shown
    for name, hyperparameters in shown:
        assert [field.name for field in fields(getattr(optserve, name))] == hyperparameters.split(", "), name


def test_the_limits_that_the_protocol_shows_are_settings_with_their_defaults():
    shown = re.findall(r"^\| `(\w+)` \| (.*?) \|", (ROOT / "docs/protocol.md").read_text(), re.MULTILINE)
    settings = {item.name: item.default for item in fields(ServerConfig)}
    assert len(shown) > 5
    assert {name for name, _ in shown} <= settings.keys()
    assert all(float(default) == settings[name] for name, default in shown if default.isdigit())


def test_every_link_within_the_project_leads_somewhere():
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_the_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([a-z-]+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile
