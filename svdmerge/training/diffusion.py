"""The training loop of a class-conditional diffusion model, alone or as one of several processes.

What a step does follows from the seed and the step alone: its images, times and noise are drawn for
the whole global batch, and each process takes its own share of them.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svdmerge.core.diffusion import Predict, ddim_sample, denoising_losses, update_average
from svdmerge.errors import TrainingError
from svdmerge.training.checkpointing import Checkpoints, State
from svdmerge.training.data import epoch_order, share
from svdmerge.training.labelled_images import LabelledImages
from svdmerge.training.loop import Group, Point

# Labels of a batch and a seeded generator in, the class whose tailors each image uses out.
GateChoice = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusionTraining:
    """How long and how fast."""

    steps: int
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    """Steps of a linearly growing rate; a cosine to zero follows."""
    average_decay: float = 0.995
    """Of the averaged weights, which are what is kept: over about 200 steps."""
    seed: int = 0
    checkpoint_every: int = 500
    """Steps; the last one is always saved."""
    report_every: int = 50
    """Steps that a point of the loss curve is the mean of."""

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return self.learning_rate * warm * 0.5 * (1.0 + math.cos(math.pi * step / self.steps))


def own_tailors(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Each image uses its own class's tailors."""
    del generator
    return labels


class DiffusionLoop:
    """A training between steps: the model, its averaged weights, the optimizer and the curve."""

    def __init__(
        self,
        model: nn.Module,
        *,
        images: LabelledImages,
        training: DiffusionTraining,
        group: Group | None = None,
        gate: GateChoice = own_tailors,
    ) -> None:
        self.model, self._images, self._training = model, images, training
        self._group, self._gate = group or Group(), gate
        self._trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self._trained:
            raise TrainingError("diffusion: nothing is left to train", "", "Unfreeze a layer.")
        # No weight decay: a few thousand steps on each image's dozen noisings overfit nothing.
        self._optimizer = optimizer_of(model)
        self._average = {n: p.detach().clone() for n, p in self._trained.items()}
        self._since_report = torch.zeros(2, dtype=torch.float64)
        self._seconds = 0.0
        self.step = 0
        self.curve: list[Point] = []

    @property
    def done(self) -> bool:
        """Whether no step is left."""
        return self.step >= self._training.steps

    @property
    def due(self) -> bool:
        """Whether a checkpoint is to be saved now; the same on all processes."""
        return self.done or self.step % self._training.checkpoint_every == 0

    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights of what trains, by name."""
        return {n: v.clone() for n, v in self._average.items()}

    def state(self) -> State:
        """All that a resume needs."""
        return {
            "epoch": self.step,  # what checkpoints are named by
            "values": {n: p.detach().clone() for n, p in self._trained.items()},
            "average": self.averaged(),
            "optimizer": self._optimizer.state_dict(),
            "since_report": self._since_report.clone(),
            "curve": [dict(point) for point in self.curve],
            "seconds": self._seconds,
        }

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """Continue from a state, bit for bit."""
        for name, parameter in self._trained.items():
            parameter.copy_(state["values"][name])
            self._average[name].copy_(state["average"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self._since_report = state["since_report"].clone()
        self.step, self._seconds = state["epoch"], state["seconds"]
        self.curve = [dict(point) for point in state["curve"]]

    def run_step(self) -> None:
        """Train on one batch.

        Raises:
            TrainingError: the loss is no longer finite.
        """
        start = time.perf_counter()
        for parameters in self._optimizer.param_groups:
            parameters["lr"] = self._training.rate(self.step)
        loss = self._descend()
        if not math.isfinite(loss):
            raise TrainingError(
                f"diffusion: the loss became {loss} in step {self.step + 1}",
                f"learning_rate {self._training.learning_rate}.",
                "Lower it.",
            )
        update_average(
            self._average,
            {n: p.detach() for n, p in self._trained.items()},
            decay=self._training.average_decay,
            step=self.step,
        )
        self.step += 1
        self._since_report += torch.tensor([loss, 1.0], dtype=torch.float64)
        self._seconds += time.perf_counter() - start
        if self.step % self._training.report_every == 0 or self.done:
            total, count = self._since_report.tolist()
            self.curve.append(
                {"step": self.step, "loss": total / count, "seconds": self._seconds}
            )
            self._since_report.zero_()

    def _descend(self) -> float:
        """One optimizer step on a global batch; its mean loss."""
        rows, generator = self._rows(), self._generator()
        times, noise = self._noise(len(rows), generator)
        labels = self._images.labels[rows]
        gates = self._gate(labels, generator)
        own = list(share(range(len(rows)), rank=self._group.rank, world=self._group.world))
        parameters = list(self._trained.values())
        flat = torch.zeros(sum(p.numel() for p in parameters) + 1)
        if own:
            losses = denoising_losses(
                predict(self.model, labels[own], gates=gates[own]),
                self._images.scaled([rows[i] for i in own]),
                noise=noise[own],
                times=times[own],
            )
            loss = losses.sum() / len(rows)
            grads = torch.autograd.grad(loss, parameters)
            flat[:-1] = torch.cat([g.reshape(-1) for g in grads])
            flat[-1] = loss.detach()
        self._group.add(flat)
        pieces = flat[:-1].split([p.numel() for p in parameters])
        for parameter, grad in zip(parameters, pieces, strict=True):
            parameter.grad = grad.view_as(parameter)
        self._optimizer.step()
        return float(flat[-1])

    def _rows(self) -> list[int]:
        """The step's images, over all processes: epochs follow each other without a short batch."""
        size, num = self._training.batch_size, len(self._images)
        first = self.step * size
        orders = {
            epoch: epoch_order(num, seed=self._training.seed, epoch=epoch)
            for epoch in {first // num, *(range(first // num, (first + size - 1) // num + 1))}
        }
        return [orders[i // num][i % num] for i in range(first, first + size)]

    def _generator(self) -> torch.Generator:
        # An odd multiplier keeps the draws of neighbouring seeds apart.
        seed = self._training.seed * 1_000_003 + self.step
        return torch.Generator().manual_seed(seed)

    def _noise(self, num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Times (num,) and noise. Times are spread evenly over the batch from one random offset.

        Their loss differs much more than images do; an even spread takes that out of the mean
        (arXiv 2107.00630, appendix I.1).
        """
        times = (torch.rand(1, generator=generator) + torch.arange(num) / num) % 1.0
        shape = (num, *self._images.pixels.shape[1:])
        return times, torch.randn(shape, generator=generator)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of what trains in a model."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, weight_decay=0.0, foreach=True)


def predict(model: nn.Module, labels: Tensor, *, gates: Tensor | None = None) -> Predict:
    """The model with its classes bound; `gates` are classes to use the tailors of, if others."""
    del gates
    return lambda images, times: model(images, times, labels)


def train_diffusion(
    loop: DiffusionLoop, *, checkpoints: Checkpoints, on_step: Callable[[DiffusionLoop], None]
) -> State:
    """The state after the last step, from the latest checkpoint on if there is one."""
    if (state := checkpoints.latest()) is not None:
        loop.restore(state)
    while not loop.done:
        loop.run_step()
        if loop.due:
            checkpoints.save(loop.state())
        on_step(loop)
    return loop.state()


@torch.no_grad()
def held_out_losses(
    model: nn.Module,
    images: LabelledImages,
    *,
    num_draws: int = 4,
    seed: int = 0,
    gates: Tensor | None = None,
    batch_size: int = 100,
) -> Tensor:
    """Each image's denoising loss (n,), the mean over `num_draws` times and noises of its own.

    The draws follow from seed and place alone, so models are compared on the same noisy images;
    times lie evenly in each image's draws.
    """
    generator = torch.Generator().manual_seed(seed)
    num, total = len(images), torch.zeros(len(images), dtype=torch.float64)
    offsets = torch.rand(num, generator=generator)
    for draw in range(num_draws):
        times = (offsets + draw / num_draws) % 1.0
        for rows in torch.arange(num).split(batch_size):
            shape = (len(rows), *images.pixels.shape[1:])
            total[rows] += denoising_losses(
                predict(model, images.labels[rows], gates=None if gates is None else gates[rows]),
                images.scaled(rows.tolist()),
                noise=torch.randn(shape, generator=generator),
                times=times[rows],
            ).double()
    return total / num_draws


@torch.no_grad()
def samples(
    model: nn.Module, labels: Sequence[int], *, shape: tuple[int, ...], num_steps: int, seed: int
) -> Tensor:
    """An image (n, channels, h, w) of each label, pixels from about -1 to 1."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn((len(labels), *shape), generator=generator)
    made = [
        ddim_sample(predict(model, chosen), noise, num_steps=num_steps, limit=1.0)
        for chosen, noise in zip(
            torch.tensor(list(labels)).split(100), start.split(100), strict=True
        )
    ]
    return torch.cat(made)
