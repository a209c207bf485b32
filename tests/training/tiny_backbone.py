"""A backbone that recipes of these tests name; it can kill its own process while it trains."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

INPUTS, WIDTH, FEATURES = 12, 20, 16


class TinyNet(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config, self.steps = config, 0
        self.encoder = nn.Sequential(
            nn.Linear(INPUTS, WIDTH), nn.GELU(), nn.Linear(WIDTH, FEATURES)
        )
        self.norm = nn.LayerNorm(FEATURES)
        self.pooler = nn.Linear(FEATURES, FEATURES)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and "kill_marker" in self.config:
            self._maybe_die()
        hidden = self.norm(self.encoder(inputs))
        self.pooler(hidden)  # called, and its output dropped, as transformers' models do
        return hidden

    def _maybe_die(self) -> None:
        self.steps += 1
        marker = Path(self.config["kill_marker"])
        if self.steps == self.config["kill_at_step"] and not marker.exists():
            # Reports are committed every two seconds or so; death before that restarts at zero.
            time.sleep(self.config["pause_s"])
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def build(config: dict[str, Any]) -> nn.Module:
    return TinyNet(config)


def build_number(config: dict[str, Any]) -> int:
    del config
    return 3


class Sequences(TinyNet):
    """Features of the wrong shape."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs)[:, None]


def build_sequences(config: dict[str, Any]) -> nn.Module:
    return Sequences(config)


def build_other(config: dict[str, Any]) -> nn.Module:
    return nn.ModuleDict({"net": TinyNet(config)})


class Outer(nn.Module):
    """A parameter of its own, and a module whose name ends with this one's."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))
        self.in_outer = nn.LayerNorm(2)


class Scaled(TinyNet):
    """A parameter that belongs to the model itself."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.scale, self.outer = nn.Parameter(torch.ones(1)), Outer()


def build_scaled(config: dict[str, Any]) -> nn.Module:
    return Scaled(config)


def own_cross_entropy(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(scores, labels, reduction="none")


def hinge(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    right = scores.gather(1, labels[:, None])
    return (1 + scores - right).clamp(min=0).sum(dim=1) - 1


def mean_loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(scores, labels)


def no_loss(scores: torch.Tensor, labels: torch.Tensor) -> None:
    del scores, labels


def failing_loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return scores - labels[:, None, None, None, None] @ scores
