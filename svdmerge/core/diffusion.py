"""Denoising diffusion: noisy images, the loss of a prediction, and samples.

Images x are about -1 to 1, times 0 (clean) to 1 (noise): x_t = alpha x + sigma noise with
alpha = cos(pi t / 2) and sigma = sin(pi t / 2). A network predicts v = alpha noise - sigma x, from
which both follow, x = alpha x_t - sigma v and noise = sigma x_t + alpha v, at either end alike;
a prediction of the noise says nothing of x where t = 1, one of x nothing of the noise where t = 0.

References: arXiv 2102.09672, section 3.2 (cosine schedule); 2202.00512, section 4 and appendix D
(this angle, and v).
"""

import itertools
import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

# A network with its classes bound: noisy images and times in, v out.
Predict = Callable[[Tensor, Tensor], Tensor]


def noisy(
    images: Float[Tensor, "b e h w"],
    *,
    noise: Float[Tensor, "b e h w"],
    times: Float[Tensor, " b"],
) -> Float[Tensor, "b e h w"]:
    """The images at their times."""
    alpha, sigma = _alpha_sigma(times)
    return alpha * images + sigma * noise


def velocity(
    images: Float[Tensor, "b e h w"],
    *,
    noise: Float[Tensor, "b e h w"],
    times: Float[Tensor, " b"],
) -> Float[Tensor, "b e h w"]:
    """What is predicted: v = alpha noise - sigma x."""
    alpha, sigma = _alpha_sigma(times)
    return alpha * noise - sigma * images


def denoising_losses(
    predict: Predict,
    images: Float[Tensor, "b e h w"],
    *,
    noise: Float[Tensor, "b e h w"],
    times: Float[Tensor, " b"],
) -> Float[Tensor, " b"]:
    """Each image's mean squared error of v.

    In the noise's terms this weighs the error by 1 + SNR (2202.00512, section 4.2).
    """
    predicted = predict(noisy(images, noise=noise, times=times), times)
    wanted = velocity(images, noise=noise, times=times)
    return (predicted - wanted).square().flatten(1).mean(dim=1)


@torch.no_grad()
def ddim_sample(
    predict: Predict,
    start: Float[Tensor, "b e h w"],
    *,
    num_steps: int,
    limit: float = math.inf,
) -> Float[Tensor, "b e h w"]:
    """Images that the network makes of noise `start`, in steps of equal time and no fresh noise.

    `limit` clamps each estimate of the clean image: 1 for pixels from -1 to 1.

    Reference: arXiv 2010.02502, equation 12 with sigma = 0.
    """
    x = start
    times = torch.linspace(1.0, 0.0, num_steps + 1, device=x.device)
    for now, later in itertools.pairwise(times):
        alpha, sigma = _alpha_sigma(now)
        v = predict(x, now.expand(len(x)))
        clean, noise = alpha * x - sigma * v, sigma * x + alpha * v
        if limit < math.inf:
            clean = clean.clamp(-limit, limit)
            # The noise that takes the clamped image to where we are; sigma > 0 before the end.
            noise = (x - alpha * clean) / sigma
        alpha, sigma = _alpha_sigma(later)
        x = alpha * clean + sigma * noise
    return x


def _alpha_sigma(times: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of image and noise, shaped to multiply images."""
    angle = times.reshape(-1, 1, 1, 1) * (math.pi / 2)
    return angle.cos(), angle.sin()
