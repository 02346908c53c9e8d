"""A network in PyTorch learns MNIST with AdamW on a server. Three lines are new; they end with `# optserve`.

    optserve serve &
    python examples/torch_mnist.py                      # or with another server: HOST:PORT

One sees the test error fall to about 2 % in 3 epochs, as with torch.optim.AdamW:

    epoch 1   test error 3.68 %
    epoch 2   test error 2.52 %
    epoch 3   test error 2.22 %
"""

import sys

import torch
from torch import nn

import optserve.torch  # optserve
from optserve_demo.mnist import data

EPOCHS, BATCH = 3, 100
SERVER = sys.argv[1] if sys.argv[1:] else "127.0.0.1:50051"

mnist = data.load()
images, labels = torch.tensor(mnist.train_images), torch.tensor(mnist.train_labels).long()
test_images, test_labels = torch.tensor(mnist.test_images), torch.tensor(mnist.test_labels).long()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(images.shape[1], 300), nn.ReLU(), nn.Linear(300, mnist.classes))
optimizer = optserve.torch.RemoteOptimizer(model.parameters(), SERVER, optserve.AdamW(learning_rate=1e-3))  # optserve
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * -(-len(images) // BATCH))
for epoch in range(1, EPOCHS + 1):
    for batch in torch.randperm(len(images)).split(BATCH):
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    with torch.no_grad():
        wrong = (model(test_images).argmax(1) != test_labels).double().mean().item()
    print(f"epoch {epoch}   test error {100 * wrong:.2f} %", flush=True)
optimizer.close()  # optserve
