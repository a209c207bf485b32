"""Loss on novel classes as training goes on, for every way to start."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from svdmerge.comparison.kind.entrants import Entrant
from svdmerge.comparison.kind.study import Study
from svdmerge.training.checkpointing import State
from svdmerge.training.kind.denoising import held_out_losses
from svdmerge.training.kind.diffusion import Diffusion
from svdmerge.training.kind.loop import KindLoop, train_kind
from svdmerge.training.kind.objective import Settings
from svdmerge.training.labelled_images import LabelledImages
from svdmerge.training.loop import Group

NUM_POINTS = 6
NUM_DRAWS = 2
# Learning rates tried for each entrant.
RATES = (2e-3, 6e-3, 1.8e-2)


@dataclass(kw_only=True)
class _Transferring:
    """Denoising of the novel classes by a model that is there; notes its held-out losses."""

    diffusion: Diffusion
    started: nn.Module
    images: LabelledImages
    noted: dict[int, Tensor] = field(default_factory=dict[int, Tensor])

    @property
    def num_examples(self) -> int:
        return self.diffusion.num_examples

    def model(self) -> nn.Module:
        return self.started

    def losses(self, model: nn.Module, rows: Sequence[int], *, step: int) -> Tensor:
        return self.diffusion.losses(model, rows, step=step)

    def measure(self, model: nn.Module, *, step: int) -> dict[str, float]:
        found = held_out_losses(model, self.images, num_draws=NUM_DRAWS)
        self.noted[step] = found
        return {"held_out_loss": float(found.mean())}


class _Unkept:
    """Keeps no state: a transfer takes seconds and starts again."""

    def latest(self) -> State | None:
        return None

    def save(self, state: State) -> None:
        del state


def transferred(
    study: Study, entrant: Entrant, seed: int, *, steps: int, learning_rate: float
) -> dict[str, Tensor]:
    """An entrant's losses (points, images) at `steps`, its curve of training losses, the number of
    values that trained, and the images' labels."""
    name = f"transfer-{entrant.name}-{seed}-{steps}-{learning_rate}".replace(" ", "_")
    return study.measured(name.replace(",", "").replace("'", ""), lambda: _run(
        study, entrant, seed, steps=steps, learning_rate=learning_rate
    ))  # fmt: skip


def _run(
    study: Study, entrant: Entrant, seed: int, *, steps: int, learning_rate: float
) -> dict[str, Tensor]:
    images = study.few(study.novel)
    model = entrant.build(study, seed)
    objective = _Transferring(
        diffusion=study.objective(study.novel, spec=None, seed=seed), started=model, images=images
    )
    settings = replace(
        study.settings, steps=steps, learning_rate=learning_rate, warmup_steps=20, ema=0.95,
        measure_every=max(1, steps // NUM_POINTS),
    )  # fmt: skip
    objective.measure(model.to(study.device).eval(), step=0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    curve = _trained(objective, settings, device=torch.device(study.device))
    return {
        "steps": torch.tensor(list(objective.noted)),
        "losses": torch.stack(list(objective.noted.values())),
        "curve": torch.tensor([point["loss"] for point in curve if "loss" in point]),
        "trained": torch.tensor(trained),
        "labels": images.labels,
    }


def _trained(
    objective: _Transferring, settings: Settings, *, device: torch.device
) -> list[dict[str, float]]:
    loop = KindLoop(objective, settings=settings, group=Group(), device=device)
    return train_kind(loop, checkpoints=_Unkept(), on_step=lambda loop: None)["curve"]


def chosen_rate(study: Study, entrant: Entrant) -> float:
    """Of `RATES` the one of least training loss over the second half of a short run with seed 0:
    no held-out image takes part in the choice."""

    def late(rate: float) -> float:
        steps = study.transfer_steps // 3
        curve = transferred(study, entrant, 0, steps=steps, learning_rate=rate)["curve"]
        return float(curve[len(curve) // 2 :].mean())

    return min(RATES, key=late)
