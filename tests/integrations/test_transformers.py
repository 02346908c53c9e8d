"""`optserve.torch.RemoteOptimizer` in the Trainer of transformers and in Accelerate, beside torch's own AdamW."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from torch.utils.data import DataLoader

import optserve
import optserve.torch

TOKENS = torch.randint(0, 40, (48, 12), generator=torch.Generator().manual_seed(5))
DATA: Any = [{"input_ids": row, "labels": row} for row in TOKENS]


def language_model() -> Any:
    """A transformer with random weights: no file is read, and nothing is loaded."""
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return transformers.GPT2LMHeadModel(config)


def arguments(folder: Path, **settings: Any) -> Any:
    return transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, num_train_epochs=3, learning_rate=1e-2,
        weight_decay=0.1, lr_scheduler_type="cosine", warmup_steps=4, max_grad_norm=0.5, gradient_accumulation_steps=2,
        report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
        **{"save_strategy": "no", **settings},
    )  # fmt: skip


def trained(folder: Path, model: Any, resume: str | None = None, settings: Any = None, **optimizer: Any) -> Any:
    """The model after its training."""
    trainer = transformers.Trainer(model, arguments(folder, **(settings or {})), train_dataset=DATA, **optimizer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_close(ours: Any, theirs: Any) -> None:
    moved = 0.0
    for (name, mine), other, begun in zip(
        ours.named_parameters(), theirs.parameters(), language_model().parameters(), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=2e-5, msg=name)
        moved = max(moved, (mine - begun).abs().max().item())
    assert moved > 0.01, "the model was trained"


def cosine(optimizer: Any) -> Any:
    return transformers.get_cosine_schedule_with_warmup(optimizer, 4, 18)


def test_the_trainer_trains_with_the_optimizer_that_it_is_given(client, name, tmp_path):
    local = language_model()
    torchs = torch.optim.AdamW(local.parameters(), lr=1e-2, weight_decay=0.1)
    theirs = trained(tmp_path / "a", local, optimizers=(torchs, cosine(torchs)))
    model = language_model()
    remote = optserve.torch.RemoteOptimizer(
        model.named_parameters(), client, optserve.AdamW(learning_rate=1e-2), name=name, weight_decay=0.1
    )
    ours = trained(tmp_path / "b", model, optimizers=(remote, cosine(remote)))
    assert_close(ours.model, theirs.model)
    assert remote.remote.current_step == 18 == ours.state.global_step
    losses = [entry["train_loss"] for trainer in (ours, theirs) for entry in trainer.state.log_history[-1:]]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_trainer_makes_the_optimizer_with_its_own_groups(client, name, tmp_path):
    """Biases and norms do not decay, which the Trainer arranges in param groups."""
    theirs = trained(tmp_path / "a", language_model())
    settings = {"server": client, "algorithm": optserve.AdamW(), "name": name, "lr": 1e-2}
    ours = trained(
        tmp_path / "b", language_model(), optimizer_cls_and_kwargs=(optserve.torch.RemoteOptimizer, settings)
    )
    assert_close(ours.model, theirs.model)
    assert client.optimizer(name).current_step == 18


def test_a_training_is_resumed_from_a_checkpoint_of_the_trainer(client, name, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 9}

    def run(name: str, folder: str, resume: str | None = None) -> Any:
        settings = {"server": client, "algorithm": optserve.AdamW(), "name": name, "lr": 1e-2, "if_exists": "replace"}
        return trained(
            tmp_path / folder, language_model(), resume, saving,
            optimizer_cls_and_kwargs=(optserve.torch.RemoteOptimizer, settings),
        )  # fmt: skip

    straight = run(name, "a")
    # The checkpoint brings the state along, in torch's layout.
    resumed = run(name, "b", str(tmp_path / "a" / "checkpoint-9"))
    assert_close(resumed.model, straight.model)
    for mine, other in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(mine, other)
    # Torch's own AdamW goes on from it too.
    assert_close(trained(tmp_path / "c", language_model(), str(tmp_path / "a" / "checkpoint-9")).model, straight.model)


def test_the_documentation_is_right(server, tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text()
    trainer, accelerate = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"target": server.target}
    exec(trainer, scope)  # noqa: S102
    assert scope["trainer"].state.global_step == 12
    exec(accelerate, scope)  # noqa: S102
    assert scope["optimizer"].optimizer.remote.current_step == 12


def accelerated(make: Any, folder: Path | None = None) -> Any:
    """A model after 24 batches, in which each step accumulates two."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = language_model()
    optimizer = make(model)
    batches: Any = DataLoader(DATA, batch_size=4)
    model, optimizer, batches, scheduler = accelerator.prepare(model, optimizer, batches, cosine(optimizer))
    for epoch in range(2):
        for batch in batches:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        if folder is not None and epoch == 0:
            # Its own state goes in and out between two steps.
            accelerator.save_state(str(folder))
            accelerator.load_state(str(folder))
    return accelerator.unwrap_model(model)


def test_accelerate_trains_and_saves(client, name, tmp_path):
    theirs = accelerated(lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2))
    ours = accelerated(
        lambda model: optserve.torch.RemoteOptimizer(
            model.named_parameters(), client, optserve.AdamW(learning_rate=1e-2), name=name
        ),
        tmp_path,
    )
    assert_close(ours, theirs)
    assert client.optimizer(name).current_step == 12
