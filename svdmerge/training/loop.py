"""The training loop of one process: the same alone, and as one of several under Ray Train."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from svdmerge.core.evidence import choose, standard_error
from svdmerge.errors import TrainingError
from svdmerge.recipe import TuneConfig
from svdmerge.training.checkpointing import Checkpoints, State
from svdmerge.training.data import Examples, epoch_order, global_batches, hold_out, share
from svdmerge.training.trainee import Trainee

Point = dict[str, float]
"""An epoch of the curve, by the names of `EpochPoint`."""


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
    """A training run between epochs: optimizer, epochs done, the curve, and the best values yet."""

    def __init__(
        self, trainee: Trainee, *, examples: Examples, config: TuneConfig, group: Group
    ) -> None:
        self._trainee, self._examples, self._config, self._group = trainee, examples, config, group
        self._rows, self._held = hold_out(
            examples.labels.numpy(), share=config.validation_share, seed=config.seed
        )
        self._values = trainee.values()
        self._head = list(trainee.head.parameters())
        # No weight decay: zero change means the merge as it is, and the head starts from a ridge
        # solution whose penalty leave-one-out chose; shrinking either has no reason.
        self._optimizer = torch.optim.AdamW(
            [{"params": self._values}, {"params": self._head}],
            lr=config.learning_rate,
            weight_decay=0.0,
        )
        self._steps_per_epoch = math.ceil(len(self._rows) / config.batch_size)
        self._seconds, self._resumes = 0.0, 0
        self._saved_at, self._due = time.monotonic(), False
        self.epoch = 0
        self.curve: list[Point] = []
        # Epoch 0 competes: where no epoch is clearly better, nothing is changed.
        self._start: State = self._candidate(self._held_out()[0]) if self._held else {}
        self._best = self._start

    @property
    def done(self) -> bool:
        """Whether no epoch is left, or too many went by without a better held-out loss."""
        waited = self.epoch - self._best["epoch"] if self._best else 0
        return self.epoch >= self._config.epochs or waited >= self._config.patience

    @property
    def due(self) -> bool:
        """Whether a checkpoint is to be saved now; the same on all processes."""
        return self.done or (self._due and self.epoch % self._config.checkpoint_every == 0)

    def state(self) -> State:
        """All that a resume needs. The schedule and the order follow from the epoch."""
        self._saved_at = time.monotonic()
        return {
            "epoch": self.epoch,
            **self._trained(),
            "optimizer": self._optimizer.state_dict(),
            "curve": [dict(point) for point in self.curve],
            "start": self._start,
            "best": self._best,
            "seconds": self._seconds,
            "resumes": self._resumes,
        }

    def restore(self, state: State) -> None:
        """Continue from a state, bit for bit."""
        with torch.no_grad():
            for name, value in state["sigma_change"].items():
                self._trainee.layers[name].sigma_change.copy_(value)
            for name, parameter in self._trainee.head.named_parameters():
                parameter.copy_(state["head"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self.epoch, self._seconds = state["epoch"], state["seconds"]
        self._start, self._best = state["start"], state["best"]
        self._resumes = state["resumes"] + 1
        self.curve = [dict(point) for point in state["curve"]]

    def run_epoch(self) -> None:
        """Train once on every example that is not held out, then measure those that are.

        Raises:
            TrainingError: the loss is no longer finite.
        """
        start = time.perf_counter()
        order = epoch_order(len(self._rows), seed=self._config.seed, epoch=self.epoch)
        loss, right = 0.0, 0.0
        batches = global_batches(order, batch_size=self._config.batch_size)
        for number, batch in enumerate(batches):
            self._set_rates(self.epoch * self._steps_per_epoch + number)
            sums = self._step([self._rows[i] for i in batch])
            loss, right = loss + sums[0], right + sums[1]
        self._check_finite(loss)
        self.epoch += 1
        point = {"loss": loss / len(order), "accuracy": right / len(order)}
        if self._held:
            losses, share_right = self._held_out()
            held_out_loss = float(losses.mean())
            point |= {"held_out_loss": held_out_loss, "held_out_accuracy": share_right}
            if held_out_loss < float(self._best["losses"].mean()):
                self._best = self._candidate(losses)
        self.curve.append(point)
        self._seconds += time.perf_counter() - start

    def _step(self, batch: list[int]) -> tuple[float, float]:
        """One step on a global batch; the sums of its losses and of how much was right."""
        parameters = [*self._values, *self._head]
        own = share(batch, rank=self._group.rank, world=self._group.world)
        total = sum(p.numel() for p in parameters)
        flat = torch.zeros(total + 3, device=self._trainee.device)
        # Of no more parts than the largest share has rows.
        for part in range(min(self._config.accumulate, self._largest(len(batch)))):
            losses, right = self._losses(share(own, rank=part, world=self._config.accumulate))
            # Divided by the global batch, so that all parts' gradients add up to its mean.
            grads = torch.autograd.grad(losses.sum() / len(batch), parameters)
            flat[:total] += torch.cat([g.reshape(-1) for g in grads])
            flat[total] += losses.detach().sum()
            flat[total + 1] += right.sum()
        flat[total + 2] = self._wants_checkpoint()
        self._group.add(flat)
        sizes = [p.numel() for p in parameters]
        for parameter, grad in zip(parameters, flat[:total].split(sizes), strict=True):
            parameter.grad = grad.view_as(parameter)
        self._optimizer.step()
        loss, right, due = flat[total:].tolist()
        self._due = due > 0
        return loss, right

    def _largest(self, num_rows: int) -> int:
        """Rows of the largest share of so many."""
        return math.ceil(num_rows / self._group.world)

    def _losses(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The losses of rows, and how much of them is right; none of no rows.

        Every process runs the same passes, if need be on a row that counts for nothing: where the
        frozen weights are shared out, the others wait for it.
        """
        losses, right = self._trainee.losses(self._examples, list(rows or self._rows[:1]))
        return losses[: len(rows)], right[: len(rows)]

    def _wants_checkpoint(self) -> float:
        """1 where this process decides so: clocks differ, so one of them decides for all."""
        waited = time.monotonic() - self._saved_at
        return float(self._group.rank == 0 and waited >= self._config.checkpoint_every_s)

    @torch.no_grad()
    def _held_out(self) -> tuple[Tensor, float]:
        """Losses of what is held out (b,) and its accuracy; the same bits on every process."""
        found = torch.zeros(2, len(self._held), dtype=torch.float64, device=self._trainee.device)
        own = share(range(len(self._held)), rank=self._group.rank, world=self._group.world)
        size = self._config.batch_size
        for start in range(0, self._largest(len(self._held)), size):
            places = own[start : start + size]
            losses, right = self._losses([self._held[place] for place in places])
            found[:, list(places)] = torch.stack([losses, right]).double()
        self._group.add(found)
        losses, right = found.cpu()
        return losses, float(right.mean())

    def _candidate(self, losses: Tensor) -> State:
        return {"epoch": self.epoch, "losses": losses, **self._trained()}

    def _trained(self) -> State:
        values = [v.detach().cpu().clone() for v in self._values]
        head = self._trainee.head.named_parameters()
        return {
            "sigma_change": dict(zip(sorted(self._trainee.layers), values, strict=True)),
            "head": {name: p.detach().cpu().clone() for name, p in head},
        }

    def _set_rates(self, step: int) -> None:
        """Cosine from the full rates to zero over the whole training, a function of the step."""
        total = self._steps_per_epoch * self._config.epochs
        factor = 0.5 * (1.0 + math.cos(math.pi * step / total))
        rates = (self._config.learning_rate, self._config.head_learning_rate)
        groups: list[dict[str, Any]] = self._optimizer.param_groups
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * factor

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise TrainingError(
                f"tuning: the loss became {loss} in epoch {self.epoch + 1}",
                f"learning_rate {self._config.learning_rate}, "
                f"head_learning_rate {self._config.head_learning_rate}.",
                "Lower the learning rates.",
            )


def train(loop: Loop, *, checkpoints: Checkpoints, on_epoch: Callable[[Loop], None]) -> State:
    """The state after the last epoch, from the latest checkpoint on if there is one."""
    if (state := checkpoints.latest()) is not None:
        loop.restore(state)
    while not loop.done:
        loop.run_epoch()
        if loop.due:
            checkpoints.save(loop.state())
        on_epoch(loop)
    return loop.state()


def chosen(state: State) -> State:
    """The state with the values of the best epoch by the held-out losses, if any are held out.

    Of ten epochs one is best by luck: where it is not better than none by more than noise
    (`core.evidence.choose`), nothing is changed. `gain` and `error` tell by how much it was better.
    """
    if not state["best"]:
        return state
    candidates = [state["start"], state["best"]]
    start, trained = (candidate["losses"] for candidate in candidates)
    best = candidates[choose([start, trained])]
    told = {"gain": float((start - trained).mean()), "error": standard_error(start - trained)}
    return state | told | {"best": best, **{k: best[k] for k in ("sigma_change", "head")}}
