"""The optimizer alone, in a loop that knows no language model: python examples/vision.py [IMAGES.npz [STEPS]]

A small ConvNet learns to classify images. Each channel has a learning rate of its own: those that matter least to the loss so far learn
fastest. The loop has a cosine schedule and a checkpoint halfway; a second loop resumes from it and ends in the same bits. IMAGES.npz holds
x_train, uint8 [n, height, width] or [n, height, width, colours], and y_train, integers [n], as Keras' MNIST and CIFAR do; default:
stripes that are drawn here. Needs torch and numpy only.
"""

from __future__ import annotations

import sys

import numpy
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from adept_fast import AdamW


def stripes(count: int = 512, size: int = 16) -> tuple[Tensor, Tensor]:
    """Draw stripes in 4 directions, with noise: images [count, 1, size, size] in [0, 1], and directions [count]."""
    labels = torch.arange(count) % 4
    across, down = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="xy")
    phases = torch.stack([across, down, across + down, across - down])[labels]
    waves = torch.sin(phases * (0.6 + 0.6 * torch.rand(count, 1, 1))) / 2 + 0.5
    return (waves + 0.5 * torch.rand(count, size, size)).unsqueeze(1), labels


def load(file: str) -> tuple[Tensor, Tensor]:
    with numpy.load(file, allow_pickle=False) as arrays:
        images, labels = torch.from_numpy(arrays["x_train"]), torch.from_numpy(arrays["y_train"]).long().flatten()
    images = images.float() / 255
    return (images.unsqueeze(1) if images.ndim == 3 else images.movedim(-1, 1)), labels


def network(colours: int, classes: int) -> nn.Module:
    def layer(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(*layer(colours, 16), *layer(16, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes))


def set_channel_rates(model: nn.Module, optimizer: AdamW) -> None:
    """Give each channel of a convolution a rate from 0 to 2 by its rank in sum |weight * gradient|, the most important one the lowest."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            importance = (module.weight.detach() * module.weight.grad).abs().sum((1, 2, 3))
            ranks = importance.argsort().argsort()
            optimizer.set_unit_lr(module.weight, 2 * (1 - (ranks + 0.5) / len(ranks)), dim=0)


class Training:
    """Model, optimizer and schedule of one run. A step's batch depends on its number alone, so that a resumed run sees the same ones."""

    def __init__(self, images: Tensor, labels: Tensor, steps: int) -> None:
        self.images, self.labels, self.step, self.steps = images, labels, 0, steps
        torch.manual_seed(0)
        self.model = network(images.shape[1], int(labels.max()) + 1)
        self.optimizer = AdamW(self.model.parameters(), lr=1e-2, weight_decay=0.05)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.parts = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}

    def run(self, until: int) -> None:
        while self.step < until:
            chosen = torch.randint(len(self.labels), (32,), generator=torch.Generator().manual_seed(self.step))
            loss = cross_entropy(self.model(self.images[chosen]), self.labels[chosen])
            loss.backward()
            if self.step % 10 == 0:
                set_channel_rates(self.model, self.optimizer)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
            self.step += 1
            if self.step % 10 == 0:
                print(f"step {self.step}: loss {loss.item():.3f}, learning rate {self.schedule.get_last_lr()[0]:.4f}", flush=True)

    def save(self, file: str) -> None:
        torch.save({"step": self.step, **{name: part.state_dict() for name, part in self.parts.items()}}, file)

    def resume(self, file: str) -> None:
        state = torch.load(file, weights_only=True)
        self.step = state["step"]
        for name, part in self.parts.items():
            part.load_state_dict(state[name])  # the optimizer's state holds the rates of the channels


def main(file: str | None = None, steps: str = "60") -> None:
    torch.manual_seed(0)
    images, labels = load(file) if file else stripes()
    first = Training(images, labels, int(steps))
    first.run(int(steps) // 2)
    first.save("vision.pt")
    first.run(int(steps))

    resumed = Training(images, labels, int(steps))
    resumed.resume("vision.pt")
    resumed.run(int(steps))
    same = all(a.equal(b) for a, b in zip(first.model.parameters(), resumed.model.parameters(), strict=True))
    with torch.no_grad():
        right = (resumed.model.eval()(images).argmax(1) == labels).float().mean()
    rates = resumed.optimizer.unit_lr(resumed.model[0].weight)
    print(f"right answers: {right:.1%}; resumed run ends in the same bits: {same}")
    print(f"rates of the first convolution's channels: {[round(rate, 2) for rate in rates[0].tolist()]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
