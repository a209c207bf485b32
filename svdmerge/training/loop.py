"""The training loop of one process: the same alone, and as one of several under Ray Train."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from svdmerge.errors import TrainingError
from svdmerge.recipe import TuneConfig
from svdmerge.training.checkpointing import Checkpoints, State
from svdmerge.training.data import Examples, epoch_order, global_batches, share
from svdmerge.training.trainee import Trainee


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The training processes, and which one this is."""

    rank: int = 0
    world: int = 1

    def add(self, vector: Tensor) -> None:
        """Replace the vector by its sum over all processes.

        What trains is a few thousand values, so their gradients travel as one small vector; the
        sums, hence the steps, are the same bits on every process.
        """
        if self.world > 1:
            torch.distributed.all_reduce(vector)


class Loop:
    """A training run between epochs: optimizer, epochs done, and the curve so far."""

    def __init__(
        self, trainee: Trainee, *, examples: Examples, config: TuneConfig, group: Group
    ) -> None:
        self._trainee, self._examples, self._config, self._group = trainee, examples, config, group
        self._values = trainee.values()
        self._head = list(trainee.head.parameters())
        # No weight decay: zero change means the merge as it is, and the head starts from a ridge
        # solution whose penalty leave-one-out chose; shrinking either has no reason.
        self._optimizer = torch.optim.AdamW(
            [{"params": self._values}, {"params": self._head}],
            lr=config.learning_rate,
            weight_decay=0.0,
        )
        self._steps_per_epoch = math.ceil(len(examples) / config.batch_size)
        self._seconds = 0.0
        self._resumes = 0
        self.epoch = 0
        self.curve: list[tuple[float, float]] = []

    def state(self) -> State:
        """All that a resume needs. The schedule and the order follow from the epoch."""
        names = sorted(self._trainee.layers)
        values = [v.detach().cpu().clone() for v in self._values]
        return {
            "epoch": self.epoch,
            "sigma_change": dict(zip(names, values, strict=True)),
            "head": {n: p.detach().cpu().clone() for n, p in self._head_parameters()},
            "optimizer": self._optimizer.state_dict(),
            "curve": [list(point) for point in self.curve],
            "seconds": self._seconds,
            "resumes": self._resumes,
        }

    def restore(self, state: State) -> None:
        """Continue from a state, bit for bit."""
        with torch.no_grad():
            for name, value in state["sigma_change"].items():
                self._trainee.layers[name].sigma_change.copy_(value)
            for name, parameter in self._head_parameters():
                parameter.copy_(state["head"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self.epoch, self._seconds = state["epoch"], state["seconds"]
        self._resumes = state["resumes"] + 1
        self.curve = [(loss, accuracy) for loss, accuracy in state["curve"]]

    def run_epoch(self) -> None:
        """Train on every example once.

        Raises:
            TrainingError: the loss is no longer finite.
        """
        start = time.perf_counter()
        order = epoch_order(len(self._examples), seed=self._config.seed, epoch=self.epoch)
        loss, correct = 0.0, 0.0
        batches = global_batches(order, batch_size=self._config.batch_size)
        for number, batch in enumerate(batches):
            self._set_rates(self.epoch * self._steps_per_epoch + number)
            sums = self._step(list(batch))
            loss, correct = loss + sums[0], correct + sums[1]
        if not math.isfinite(loss):
            raise TrainingError(
                f"tuning: the loss became {loss} in epoch {self.epoch + 1}",
                f"learning_rate {self._config.learning_rate}, "
                f"head_learning_rate {self._config.head_learning_rate}.",
                "Lower the learning rates.",
            )
        self.epoch += 1
        self.curve.append((loss / len(order), correct / len(order)))
        self._seconds += time.perf_counter() - start

    def _step(self, batch: list[int]) -> tuple[float, float]:
        """One step on a global batch; the sums of its losses and of its right answers."""
        parameters = [*self._values, *self._head]
        own = list(share(batch, rank=self._group.rank, world=self._group.world))
        total = sum(p.numel() for p in parameters)
        flat = torch.zeros(total + 2, device=self._trainee.device)
        if own:
            losses, right = self._trainee.losses(self._examples, own)
            # Divided by the global batch, so that the workers' gradients add up to its mean.
            grads = torch.autograd.grad(losses.sum() / len(batch), parameters)
            torch.cat([g.reshape(-1) for g in grads], out=flat[:total])
            flat[total] = losses.detach().sum()
            flat[total + 1] = right.sum()
        self._group.add(flat)
        sizes = [p.numel() for p in parameters]
        for parameter, grad in zip(parameters, flat[:total].split(sizes), strict=True):
            parameter.grad = grad.view_as(parameter)
        self._optimizer.step()
        return float(flat[total]), float(flat[total + 1])

    def _set_rates(self, step: int) -> None:
        """Cosine from the full rates to zero over the whole training, a function of the step."""
        total = self._steps_per_epoch * self._config.epochs
        factor = 0.5 * (1.0 + math.cos(math.pi * step / total))
        rates = (self._config.learning_rate, self._config.head_learning_rate)
        groups: list[dict[str, Any]] = self._optimizer.param_groups
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * factor

    def _head_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return list(self._trainee.head.named_parameters())


def train(
    loop: Loop, *, config: TuneConfig, checkpoints: Checkpoints, on_epoch: Callable[[int], None]
) -> State:
    """The state after the last epoch, from the latest checkpoint on if there is one."""
    if (state := checkpoints.latest()) is not None:
        loop.restore(state)
    while loop.epoch < config.epochs:
        loop.run_epoch()
        if loop.epoch % config.checkpoint_every == 0 or loop.epoch == config.epochs:
            checkpoints.save(loop.state())
        on_epoch(loop.epoch)
    return loop.state()
