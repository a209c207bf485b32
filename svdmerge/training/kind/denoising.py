"""What a trained diffusion model does: held-out losses and samples, with any class's tailors."""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from svdmerge.core.diffusion import Predict, ddim_sample, denoising_losses
from svdmerge.core.kind.gate import GateRows, gated
from svdmerge.training.labelled_images import LabelledImages

# Images at once: activations of a small network's batch then stay in the caches.
_BATCH = 100


def predict(model: nn.Module, labels: Tensor, *, gates: Tensor | None = None) -> Predict:
    """The model with its classes bound; `gates` are classes to use the tailors of, if others.

    A dense model has no gate and is told the labels alone.
    """
    switched = any(isinstance(module, GateRows) for module in model.modules())
    chosen = labels if gates is None else gates

    def velocity(images: Tensor, times: Tensor) -> Tensor:
        with gated(model, chosen) if switched else contextlib.nullcontext():
            return model(images, times, labels)

    return velocity


@torch.no_grad()
def held_out_losses(
    model: nn.Module,
    images: LabelledImages,
    *,
    num_draws: int = 4,
    seed: int = 0,
    gates: Tensor | None = None,
) -> Tensor:
    """Each image's denoising loss (n,), the mean over `num_draws` times and noises of its own.

    The draws follow from seed and place alone, so models are compared on the same noisy images;
    an image's times lie evenly, which takes most of their scatter out of its mean.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    num, total = len(images), torch.zeros(len(images), dtype=torch.float64)
    offsets = torch.rand(num, generator=generator)
    for draw in range(num_draws):
        times = (offsets + draw / num_draws) % 1.0
        for rows in torch.arange(num).split(_BATCH):
            noise = torch.randn((len(rows), *images.pixels.shape[1:]), generator=generator)
            labels = images.labels[rows].to(device)
            losses = denoising_losses(
                predict(model, labels, gates=None if gates is None else gates[rows].to(device)),
                images.scaled(rows.tolist()).to(device),
                noise=noise.to(device),
                times=times[rows].to(device),
            )
            total[rows] += losses.double().cpu()
    return total / num_draws


def samples(
    model: nn.Module,
    labels: Sequence[int],
    *,
    shape: tuple[int, ...],
    num_steps: int,
    seed: int,
    gates: Sequence[int] | None = None,
) -> Tensor:
    """An image (n, channels, h, w) of each label, pixels from -1 to 1.

    The noise it starts from follows from seed and place, so models can be compared image by image.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    start = torch.randn((len(labels), *shape), generator=generator).to(device)
    named, switched = (torch.tensor(list(c), device=device) for c in (labels, gates or labels))
    made = [
        ddim_sample(
            predict(model, named[part], gates=switched[part]),
            start[part],
            num_steps=num_steps,
            limit=1.0,
        )
        for part in torch.arange(len(named)).split(_BATCH)
    ]
    return torch.cat(made).clamp(-1.0, 1.0).cpu()
