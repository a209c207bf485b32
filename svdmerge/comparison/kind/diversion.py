"""Is knowledge diverted? Losses of each class under each class's tailors, beside two controls."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from svdmerge.comparison.kind.study import Study
from svdmerge.core.kind.replace import decomposable

CONTROLS = ("gated", "random gate", "dense split by SVD")


@dataclass(frozen=True, slots=True, kw_only=True)
class Diversion:
    """What a loss matrix says."""

    gap: float
    """Mean loss under other classes' tailors over that under their own, minus one."""
    hits: float
    """Share of images whose loss is least under their own class's tailors."""
    rows_won: int
    """Classes whose mean loss is least under their own tailors."""


def split_by_svd(study: Study, dense: nn.Module, *, seed: int) -> nn.Module:
    """The dense model with its matrices cut to their leading components, dealt to the gate."""
    split = study.objective(study.old, spec=None, seed=seed).model()
    split.load_state_dict(dense.state_dict())
    decomposable(split, replace(study.spec(study.old, seed=seed), start="svd"))
    return split.eval().requires_grad_(False)


def gate_losses(study: Study, model: nn.Module) -> Tensor:
    """(images, classes): each old test image's loss under each class's tailors.

    The class embedding is the image's own throughout: what differs is the tailors alone.
    """
    images = study.few(study.old)
    columns = [
        study.losses(
            model, images, num_draws=2, gates=torch.full((len(images),), gate, dtype=torch.int64)
        )
        for gate in range(len(study.old))
    ]
    return torch.stack(columns, dim=1)


def class_means(losses: Tensor, *, labels: Tensor) -> Tensor:
    """(classes, classes): the mean of L(row's images, column's tailors)."""
    return torch.stack([losses[labels == c].mean(dim=0) for c in range(losses.shape[1])])


def diversion(losses: Tensor, *, labels: Tensor) -> Diversion:
    """Sums up (images, classes) of losses."""
    own = losses.gather(1, labels[:, None])[:, 0]
    others = (losses.sum(dim=1) - own) / (losses.shape[1] - 1)
    matrix = class_means(losses, labels=labels)
    least = matrix.argmin(dim=1) == torch.arange(len(matrix))
    return Diversion(
        gap=float(others.mean() / own.mean() - 1.0),
        hits=float((losses.argmin(dim=1) == labels).double().mean()),
        rows_won=int(least.sum()),
    )


def matrices(study: Study, seed: int) -> dict[str, Tensor]:
    """(images, classes) of losses for the gated model and both controls, and the labels."""

    def work() -> dict[str, Tensor]:
        models = (
            study.gated(seed),
            study.random_gate(seed),
            split_by_svd(study, study.dense(seed), seed=seed),
        )
        found = {
            name: gate_losses(study, model) for name, model in zip(CONTROLS, models, strict=True)
        }
        return found | {"labels": study.few(study.old).labels}

    return study.measured(f"matrices-{seed}", work)


def old_losses(study: Study, seed: int) -> dict[str, Tensor]:
    """Losses of the old test images: by the gated model and by the dense one of its parameters."""

    def work() -> dict[str, Tensor]:
        images = study.tested.of_classes(study.old)
        return {
            "gated": study.losses(study.gated(seed), images),
            "dense": study.losses(study.dense(seed), images),
            "labels": images.labels,
        }

    return study.measured(f"old-{seed}", work)


def random_losses(study: Study, seed: int) -> dict[str, Tensor]:
    """`old_losses`, and the random gate's model under tailors drawn for each image."""

    def work() -> dict[str, Tensor]:
        images = study.tested.of_classes(study.old)
        # The model never learnt to go by classes: no choice is better than another.
        drawn = torch.randint(
            len(study.old), (len(images),), generator=torch.Generator().manual_seed(seed)
        )
        model = study.random_gate(seed)
        return {"random gate": study.losses(model, images, gates=drawn)}

    return old_losses(study, seed) | study.measured(f"random-{seed}", work)
