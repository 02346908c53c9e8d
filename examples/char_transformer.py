"""A small language model, which survives `kill -9` of its server and of itself.

    optserve serve --port 50051 --data-dir state &
    python examples/char_transformer.py --target 127.0.0.1:50051

A transformer in PyTorch learns to write, letter by letter, like the reference manual that Python's own `help()` shows.
The server holds its weights and makes the steps: AdamW, with a warm-up and a cosine schedule, clipping by the global
norm, and weight decay on the matrices alone.

The client keeps nothing that would have to be saved. The number of steps says which letters come next, and that number
and the weights are the server's, on its disk before a step is acknowledged. So kill whichever you like, at any time:

- the client: start it again with the same command. It goes on at the step where it was.
- the server: start it again with the same command. The client waits for it, up to five minutes, and goes on.

Either way the run ends with the same bits as one that was never disturbed. One sees:

    step  10 of 300   loss 3.755   learning rate 0.00097
    …
    step 300 of 300   loss 2.416   learning rate 0.00000
    SHA-256 of the weights: 10ea98c3…

and at last a few lines of what the model has learned to write. Needs torch.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from pydoc_data.topics import topics

import numpy as np
import torch
from torch import nn

import optserve

CONTEXT, WIDTH, HEADS, LAYERS, BATCH = 64, 96, 4, 2, 16

TEXT = "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore")
LETTERS = sorted(set(TEXT))
NUMBERS = torch.tensor([LETTERS.index(letter) for letter in TEXT])


class Transformer(nn.Module):
    """Says for each letter of a text which one comes next."""

    def __init__(self) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(len(LETTERS), WIDTH), nn.Embedding(CONTEXT, WIDTH)
        block = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.scores = nn.Linear(WIDTH, len(LETTERS))

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Scores of shape (batch, length, letters), for the numbers of letters, of shape (batch, length)."""
        length = text.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        x = self.letters(text) + self.places(torch.arange(length))
        return self.scores(self.blocks(x, mask=mask, is_causal=True))


def batch_of(step: int) -> torch.Tensor:
    """Passages of the text, of shape (batch, context + 1). They follow from the step alone."""
    starts = np.random.default_rng(step).integers(0, len(NUMBERS) - CONTEXT, BATCH)
    return torch.stack([NUMBERS[start : start + CONTEXT + 1] for start in starts])


def put(arrays: Mapping[str, np.ndarray], model: nn.Module) -> None:
    """Put the server's weights into the model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(arrays[name]))


def optimizer_for(model: nn.Module, client: optserve.Client, name: str, steps: int) -> optserve.Optimizer:
    """The optimizer of that name; a new one, with the model's weights, if the server has none yet."""
    weights = {key: parameter.detach().numpy() for key, parameter in model.named_parameters()}
    return client.get_or_create_optimizer(
        name,
        optserve.AdamW(learning_rate=3e-3, beta2=0.99),
        weights,
        hosted=True,
        # The cosine begins after the warm-up.
        schedule=optserve.Cosine(period_steps=steps - steps // 10, warmup_steps=steps // 10),
        clipping=optserve.Clipping(global_norm=1.0),
        weight_decay=1e-4,
        groups=[optserve.Group([key for key, array in weights.items() if array.ndim < 2], weight_decay=0.0)],
    )


def train(model: nn.Module, opt: optserve.Optimizer, steps: int) -> None:
    """Make those of the steps that are left."""
    put(opt.pull_parameters().arrays, model)
    while (step := opt.current_step) < steps:
        text = batch_of(step)
        scores = model(text[:, :-1])
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), text[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        grads = {name: item.grad.numpy() for name, item in model.named_parameters() if item.grad is not None}
        put(opt.step(grads, reply="parameters"), model)
        if opt.current_step % 10 == 0:
            # The server tells the rate that its schedule gave; not if it was killed before its reply arrived.
            rates = opt.last_result.learning_rates if opt.last_result else ()
            rate = f"   learning rate {rates[0]:.5f}" if rates else ""
            print(f"step {opt.current_step:3} of {steps}   loss {loss.item():.3f}{rate}", flush=True)


def written(model: nn.Module, beginning: str, count: int) -> str:
    """The beginning of a text, and so many letters that the model adds."""
    source = torch.Generator().manual_seed(0)
    text = [LETTERS.index(letter) for letter in beginning.encode()]
    with torch.no_grad():
        for _ in range(count):
            likely = model(torch.tensor([text[-CONTEXT:]]))[0, -1].softmax(0)
            text.append(int(torch.multinomial(likely, 1, generator=source)))
    return bytes(LETTERS[number] for number in text).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", help="the server, HOST:PORT; by default one is started, which keeps nothing")
    parser.add_argument("--name", default="char-transformer", help="of the optimizer on the server")
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    torch.manual_seed(0)
    # The bits are the same in every run, and one thread is enough for a model so small.
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    model = Transformer()
    with ExitStack() as stack:
        target = args.target or stack.enter_context(optserve.local_server()).target
        client = stack.enter_context(optserve.connect(target))
        train(model, optimizer_for(model, client, args.name, args.steps), args.steps)
    digest = hashlib.sha256(b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters()))
    print(f"SHA-256 of the weights: {digest.hexdigest()}")
    print(written(model, "The ", 300))


if __name__ == "__main__":
    main()
