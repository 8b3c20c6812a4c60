"""Prefixes in a vision transformer: PrefixAttention takes the place of nn.MultiheadAttention.

Run it with ``python examples/vit.py``; it needs only torch. A small transformer learns to tell horizontal stripes from
vertical ones and is frozen. A new head then learns diagonal stripes: first alone, then with a prefix in each layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prefix_attn import PrefixAttention

SIZE, PATCH, WIDTH = 16, 4, 32


class VisionTransformer(nn.Module):
    """Patches, positions, nn.TransformerEncoder, mean, head."""

    def __init__(self) -> None:
        """Two layers of four heads."""
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, kernel_size=PATCH, stride=PATCH)
        self.positions = nn.Parameter(0.02 * torch.randn((SIZE // PATCH) ** 2, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, nhead=4, dim_feedforward=64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, SIZE, SIZE) -> (B, 2)."""
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.encoder(tokens).mean(dim=1))


def stripes(count: int, angles: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Noisy stripes in one of two directions, in degrees, and which of them it is."""
    labels = torch.randint(2, (count,))
    angle = torch.tensor(angles).deg2rad()[labels, None, None]
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    phase, noise = 6.28 * torch.rand(count, 1, 1), 0.5 * torch.randn(count, SIZE, SIZE)
    return (torch.sin(x * angle.cos() + y * angle.sin() + phase) + noise)[:, None], labels


@torch.no_grad()
def accuracy(model: nn.Module, angles: tuple[float, float]) -> float:
    """The share of 1000 new images that the model gets right."""
    images, labels = stripes(1000, angles)
    return (model(images).argmax(dim=1) == labels).float().mean().item()


def train(name: str, model: nn.Module, angles: tuple[float, float]) -> None:
    """Train whatever is trainable, and print the accuracy before and after."""
    trainable, before = [p for p in model.parameters() if p.requires_grad], accuracy(model, angles)
    optimizer = torch.optim.Adam(trainable, lr=1e-2)
    for _ in range(100):
        images, labels = stripes(64, angles)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    count, after = sum(p.numel() for p in trainable), accuracy(model, angles)
    print(f"{name:17} {count:6} parameters, accuracy {before:.1%} -> {after:.1%}")


def main() -> None:
    """The first task with the whole model, the second with a head, then with a head and prefixes."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the tensors are too small for more
    train("everything", model := VisionTransformer(), (0, 90))
    model.requires_grad_(False)
    model.head = nn.Linear(WIDTH, 2)
    train("head", model, (45, 135))
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.MultiheadAttention):
            model.set_submodule(name, PrefixAttention.from_multihead(module, prefix_length=8))
    model.head = nn.Linear(WIDTH, 2)
    train("head and prefixes", model, (45, 135))


if __name__ == "__main__":
    main()
