"""The training loop of a decomposable model, in one process or as one of several."""

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from svdmerge.core.kind.optimizer import GatedAdamW
from svdmerge.errors import TrainingError
from svdmerge.training.checkpointing import Checkpoints, State
from svdmerge.training.data import epoch_order, share
from svdmerge.training.kind.objective import Objective, Settings
from svdmerge.training.loop import Group, Point

# Points of the loss curve, whatever the number of steps: enough to draw, few enough to carry.
NUM_POINTS = 100


class KindLoop:
    """A training run between steps: model, its average, optimizer and curve."""

    def __init__(
        self, objective: Objective, *, settings: Settings, group: Group, device: torch.device
    ) -> None:
        self._objective, self._settings, self._group = objective, settings, group
        self.model = objective.model().to(device).train()
        self._device = device
        self._optimizer = GatedAdamW(
            self.model, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        self._average = [p.detach().clone() for p in self._trained] if settings.ema else []
        self._sum, self._count = 0.0, 0
        self._seconds, self._resumes = 0.0, 0
        self._saved_at, self._due = time.monotonic(), False
        self.epoch = 0
        """Steps done."""
        self.curve: list[Point] = []

    @property
    def done(self) -> bool:
        """Whether no step is left."""
        return self.epoch >= self._settings.steps

    @property
    def due(self) -> bool:
        """Whether a checkpoint is to be saved now; the same on all processes."""
        return self.done or self._due

    def state(self) -> State:
        """All that a resume needs. Rates and the order of examples follow from the step."""
        self._saved_at = time.monotonic()
        return {
            "epoch": self.epoch,
            "model": {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()},
            "average": [v.cpu().clone() for v in self._average],
            "optimizer": self._optimizer.state_dict(),
            "curve": [dict(point) for point in self.curve],
            "sum": (self._sum, self._count),
            "seconds": self._seconds,
            "resumes": self._resumes,
        }

    def restore(self, state: State) -> None:
        """Continue from a state, bit for bit."""
        self.model.load_state_dict(state["model"])
        for value, saved in zip(self._average, state["average"], strict=True):
            value.copy_(saved)
        self._optimizer.load_state_dict(state["optimizer"])
        self.epoch, self._seconds = state["epoch"], state["seconds"]
        self._sum, self._count = state["sum"]
        self._resumes = state["resumes"] + 1
        self.curve = [dict(point) for point in state["curve"]]

    def run_step(self) -> None:
        """Train on one batch; a point of the curve, and measurements, where they are due.

        Raises:
            TrainingError: the loss is no longer finite.
        """
        start = time.perf_counter()
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate()
        loss = self._step(batch_of(self.epoch, self._objective.num_examples, self._settings))
        if not math.isfinite(loss):
            raise TrainingError(
                f"training: the loss became {loss} in step {self.epoch + 1}",
                f"learning_rate {self._settings.learning_rate}.",
                "Lower the learning rate.",
            )
        self.epoch += 1
        self._sum, self._count = self._sum + loss, self._count + 1
        self._note()
        self._seconds += time.perf_counter() - start

    def averaged(self) -> State:
        """The model's state with averaged weights where the settings average, on the CPU."""
        with self._swapped():
            return {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}

    def _step(self, batch: Sequence[int]) -> float:
        """One step on a global batch; its mean loss."""
        own = list(share(batch, rank=self._group.rank, world=self._group.world))
        self._optimizer.zero_grad()
        total = sum(p.numel() for p in self._trained)
        flat = torch.zeros(total + 2, device=self._device)
        if own:
            # Divided by the global batch, so that all processes' gradients add up to its mean.
            losses = self._objective.losses(self.model, own, step=self.epoch)
            (losses.sum() / len(batch)).backward()
            flat[total] = losses.detach().sum() / len(batch)
            flat[:total] = torch.cat([_grad(p).reshape(-1) for p in self._trained])
        flat[total + 1] = self._wants_checkpoint()
        self._group.add(flat)
        grads = flat[:total]
        grads *= (self._settings.max_norm / (grads.norm() + 1e-12)).clamp(max=1.0)
        sizes = [p.numel() for p in self._trained]
        for parameter, grad in zip(self._trained, grads.split(sizes), strict=True):
            parameter.grad = grad.view_as(parameter)
        self._optimizer.step()
        for value, parameter in zip(self._average, self._trained, strict=False):
            value.lerp_(parameter.detach(), 1.0 - self._settings.ema)
        loss, due = flat[total:].tolist()
        self._due = due > 0
        return loss

    def _note(self) -> None:
        settings = self._settings
        if self.epoch % max(1, settings.steps // NUM_POINTS) == 0 or self.done:
            self.curve.append({"step": float(self.epoch), "loss": self._sum / self._count})
            self._sum, self._count = 0.0, 0
        every = settings.measure_every
        if self._group.rank == 0 and (self.done or (every and self.epoch % every == 0)):
            with self._swapped(), torch.no_grad():
                self.model.eval()
                found = self._objective.measure(self.model, step=self.epoch)
                self.model.train()
            if found:
                self.curve.append({"step": float(self.epoch), **found})

    def _swapped(self) -> "_Swapped":
        return _Swapped(self._trained, self._average)

    def _rate(self) -> float:
        peak, warmup = self._settings.learning_rate, self._settings.warmup_steps
        if self.epoch < warmup:
            return peak * (self.epoch + 1) / warmup
        share_done = (self.epoch - warmup) / max(1, self._settings.steps - warmup)
        return peak * 0.5 * (1.0 + math.cos(math.pi * share_done))

    def _wants_checkpoint(self) -> float:
        """1 where this process decides so: clocks differ, so one of them decides for all."""
        waited = time.monotonic() - self._saved_at
        return float(self._group.rank == 0 and waited >= self._settings.checkpoint_every_s)


class _Swapped:
    """Within it, the parameters hold their averages, if there are any."""

    def __init__(self, parameters: list[nn.Parameter], averages: list[Tensor]) -> None:
        self._pairs = list(zip(parameters, averages, strict=False))

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *_: Any) -> None:
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, average in self._pairs:
            held = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(held)


# Of the epoch that steps are drawn from: shuffling anew for each would cost more than small steps.
_order = functools.lru_cache(maxsize=2)(epoch_order)


def batch_of(step: int, num_examples: int, settings: Settings) -> Sequence[int]:
    """The rows of a step: epochs of shuffled examples, each a function of (seed, epoch) alone."""
    size = min(settings.batch_size, num_examples)
    per_epoch = math.ceil(num_examples / size)
    epoch, place = divmod(step, per_epoch)
    order = _order(num_examples, seed=settings.seed, epoch=epoch)
    return order[place * size : (place + 1) * size]


def train_kind(
    loop: KindLoop, *, checkpoints: Checkpoints, on_step: Callable[[KindLoop], None]
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


def _grad(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
