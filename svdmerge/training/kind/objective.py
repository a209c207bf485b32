"""What a decomposable model learns: the protocol that the loop trains by."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn


class Objective(Protocol):
    """A task: its model, its examples and their losses. Built, or unpickled, in every process."""

    @property
    def num_examples(self) -> int:
        """Examples that there are to train on, numbered from 0."""
        ...

    def model(self) -> nn.Module:
        """A fresh model on the CPU, the same bits in every process."""
        ...

    def losses(self, model: nn.Module, rows: Sequence[int], *, step: int) -> Tensor:
        """Losses (b,) of some examples on the model's device, each under its own class's gate.

        Whatever is random in them follows from `step` and each row alone, so that any number of
        processes, and a resumed one, takes the same steps.
        """
        ...

    def measure(self, model: nn.Module, *, step: int) -> dict[str, float]:
        """Numbers told beside the loss, by the first process alone; the model is in eval mode, its
        weights averaged where the settings say so. The place to write sample pictures too."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How training goes, whatever is learnt."""

    steps: int
    batch_size: int
    """Examples per step, over all workers."""
    learning_rate: float
    """The peak: risen to linearly over `warmup_steps`, then a cosine down to zero."""
    warmup_steps: int = 0
    weight_decay: float = 0.0
    """Of matrices and factors; see `GatedAdamW`."""
    ema: float = 0.0
    """Share of the averaged weights that a step keeps; 0 averages none."""
    max_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    measure_every: int = 0
    """Steps between measurements; 0 measures once, at the end."""
    seed: int = 0
    """Of the order of examples."""
    checkpoint_every_s: float = 20.0
    num_workers: int | tuple[int, int] = 1
    use_gpu: bool = False
    threads: int = 1
