"""Are learngenes class-agnostic? How alike those of models of disjoint classes are, and tailors."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from svdmerge.comparison.kind.study import Study
from svdmerge.core.cka import linear_cka
from svdmerge.core.diffusion import noisy
from svdmerge.core.kind.layer import DecomposableLinear
from svdmerge.core.kind.replace import layers_of
from svdmerge.core.overlap import overlap
from svdmerge.training.kind.denoising import predict
from svdmerge.training.labelled_images import LabelledImages

SETS = ((0, 1, 2), (3, 4, 5))
NUM_IMAGES = 64


def likeness(study: Study) -> dict[str, Tensor]:
    """By kind of pair, (layers, 4): CKA of learngenes' and of tailors' outputs, and the overlap of
    their output spans, for two models.

    `disjoint`: other classes, the same start. `floor`: the same classes and two seeds. `untrained`:
    two seeds before training. Outputs are of images of a class that neither model saw.
    """

    def work() -> dict[str, Tensor]:
        first, second = SETS
        models = {(i, s): study.gated(s, c) for i, c in enumerate(SETS) for s in (0, 1)}
        fresh = [
            study.objective(c, spec=study.spec(c, seed=s), seed=s).model()
            for c, s in ((first, 0), (second, 1))
        ]
        pairs = {
            "disjoint": [(models[0, s], models[1, s]) for s in (0, 1)],
            "disjoint, two seeds": [(models[0, 0], models[1, 1]), (models[0, 1], models[1, 0])],
            "floor": [(models[i, 0], models[i, 1]) for i in (0, 1)],
            "untrained": [(fresh[0], fresh[1])],
        }
        images = _images(study)
        return {
            name: torch.stack([_compared(a, b, images) for a, b in found]).mean(dim=0)
            for name, found in pairs.items()
        }

    return study.measured("likeness", work)


def _images(study: Study) -> LabelledImages:
    (unseen,) = (c for c in study.old if all(c not in s for s in SETS))
    found = study.tested.of_classes((unseen,))
    return LabelledImages(pixels=found.pixels[:NUM_IMAGES], labels=found.labels[:NUM_IMAGES])


def _compared(a: nn.Module, b: nn.Module, images: LabelledImages) -> Tensor:
    outputs = [_outputs(model, images) for model in (a, b)]
    rows: list[list[float]] = []
    for path, layer in layers_of(a).items():
        other = layers_of(b)[path]
        (x, tailored), (y, other_tailored) = (found[path] for found in outputs)
        rows.append(
            [
                linear_cka(x, y),
                linear_cka(tailored, other_tailored),
                overlap(_span(layer, learngenes=True), _span(other, learngenes=True)),
                overlap(_span(layer, learngenes=False), _span(other, learngenes=False)),
            ]
        )
    return torch.tensor(rows)


def _span(layer: DecomposableLinear, *, learngenes: bool) -> Tensor:
    """An orthonormal basis of the columns of U that learngenes, or tailors, write to."""
    own = (layer.group == 0) == learngenes
    return torch.linalg.qr(layer.u.detach()[:, own]).Q


@torch.no_grad()
def _outputs(model: nn.Module, images: LabelledImages) -> dict[str, tuple[Tensor, Tensor]]:
    """By layer, what learngenes and what all tailors add for each token (b t, m)."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        layer.register_forward_hook(partial(_kept, found, path))
        for path, layer in layers_of(model).items()
    ]
    generator = torch.Generator().manual_seed(0)
    x = images.scaled()
    noise = torch.randn(x.shape, generator=generator)
    times = torch.rand(len(x), generator=generator)
    predict(model, images.labels * 0)(noisy(x, noise=noise, times=times), times)
    for hook in hooks:
        hook.remove()
    return found


def _kept(
    found: dict[str, tuple[Tensor, Tensor]],
    path: str,
    layer: DecomposableLinear,
    inputs: tuple[Tensor, ...],
    _: Any,
) -> None:
    along = (inputs[0] @ layer.vh.T) * layer.s
    learnt = layer.group == 0
    parts: list[Tensor] = [
        (along[..., own] @ layer.u[:, own].T).flatten(0, -2) for own in (learnt, ~learnt)
    ]
    found[path] = (parts[0], parts[1])
