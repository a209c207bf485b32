"""A small transformer, made decomposable, batches for it, and an objective."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdmerge.core.kind.gate import ClassGate, gate_of, gated
from svdmerge.core.kind.layer import DecomposableLinear
from svdmerge.core.kind.replace import Spec, decomposable

WIDTH, TOKENS = 12, 5
GATE = gate_of({"a": ["one"], "b": ["two"], "c": ["two", "three"]})


class Attention(nn.Module):
    def __init__(self, d: int = WIDTH) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


class Mlp(nn.Module):
    def __init__(self, d: int = WIDTH) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, d: int = WIDTH) -> None:
        super().__init__()
        self.attn, self.mlp, self.norm = Attention(d), Mlp(d), nn.LayerNorm(d)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.mlp(self.norm(x))


class Transformer(nn.Module):
    """Two blocks and a head: (b, t, d) -> (b, d)."""

    def __init__(self, d: int = WIDTH) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(d) for _ in range(2))
        self.head = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=1))


def gated_transformer(
    gate: ClassGate = GATE, **spec: object
) -> tuple[Transformer, dict[str, DecomposableLinear]]:
    torch.manual_seed(0)
    model = Transformer()
    return model, decomposable(model, Spec(gate=gate, **spec))  # type: ignore[arg-type]


def batch(size: int, seed: int = 1) -> Tensor:
    return torch.randn(size, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


class Toy:
    """Twelve inputs of three classes; each class's outputs go to another constant."""

    def __init__(self, scale: float = 1.0) -> None:
        self.x, self.classes = batch(12) * scale, torch.arange(12) % len(GATE.classes)

    num_examples = 12

    def model(self) -> nn.Module:
        return gated_transformer()[0]

    def losses(self, model: nn.Module, rows: Sequence[int], *, step: int) -> Tensor:
        del step
        classes = self.classes[list(rows)]
        with gated(model, classes):
            out = model(self.x[list(rows)])
        return F.mse_loss(out, classes[:, None].expand_as(out).float(), reduction="none").mean(1)

    def measure(self, model: nn.Module, *, step: int) -> dict[str, float]:
        return {"mean": float(self.losses(model, range(12), step=step).mean())}
