"""Diffusion against closed forms: of Gaussian images the best prediction is known."""

import math

import pytest
import torch
from torch import Tensor

from svdmerge.core.diffusion import (
    Predict,
    ddim_sample,
    denoising_losses,
    noisy,
    velocity,
)

MEAN, STD = 0.3, 0.4


def gaussian_oracle(mean: float, std: float) -> Predict:
    """E[v | x_t] of images whose pixels are independent N(mean, std^2)."""

    def predict(x: Tensor, times: Tensor) -> Tensor:
        angle = times.reshape(-1, 1, 1, 1) * math.pi / 2
        alpha, sigma = torch.cos(angle), torch.sin(angle)
        variance = alpha**2 * std**2 + sigma**2
        clean = mean + alpha * std**2 / variance * (x - alpha * mean)
        noise = sigma / variance * (x - alpha * mean)
        return alpha * noise - sigma * clean

    return predict


def test_ddim_with_the_best_prediction_samples_the_gaussian() -> None:
    start = torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    made = ddim_sample(gaussian_oracle(MEAN, STD), start, num_steps=1000)
    # The flow's map from noise to image is affine: x = mean + std * start.
    torch.testing.assert_close(made, MEAN + STD * start, rtol=0, atol=6e-3)


def test_ddims_error_falls_with_the_number_of_steps() -> None:
    start = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    errors = [
        float(
            (ddim_sample(gaussian_oracle(MEAN, STD), start, num_steps=n) - MEAN - STD * start)
            .abs()
            .max()
        )
        for n in (10, 20, 40)
    ]
    assert errors[0] > 1.8 * errors[1] > 3.2 * errors[2]  # of first order


def test_a_point_of_data_is_reached_exactly_whatever_the_steps() -> None:
    start = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    made = ddim_sample(gaussian_oracle(0.7, 0.0), start, num_steps=3)
    torch.testing.assert_close(made, torch.full_like(start, 0.7), rtol=0, atol=1e-5)


def test_the_limit_clamps_the_estimate_of_the_image() -> None:
    start = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    made = ddim_sample(gaussian_oracle(1.7, 0.0), start, num_steps=5, limit=1.0)
    torch.testing.assert_close(made, torch.ones_like(start), rtol=0, atol=1e-5)


def test_image_and_noise_follow_from_what_is_predicted() -> None:
    generator = torch.Generator().manual_seed(4)
    x, e = torch.randn(2, 5, 3, 4, 4, generator=generator)
    t = torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0])
    seen, v = noisy(x, noise=e, times=t), velocity(x, noise=e, times=t)
    alpha = torch.cos(t * math.pi / 2).view(-1, 1, 1, 1)
    sigma = torch.sin(t * math.pi / 2).view(-1, 1, 1, 1)
    torch.testing.assert_close(alpha * seen - sigma * v, x)
    torch.testing.assert_close(sigma * seen + alpha * v, e)
    torch.testing.assert_close(seen[0], x[0])
    torch.testing.assert_close(seen[-1], e[-1], rtol=0, atol=1e-6)


def test_the_best_prediction_has_the_least_loss_and_it_is_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(5)
    num = 4000
    x = MEAN + STD * torch.randn(num, 1, 4, 4, generator=generator)
    e = torch.randn(num, 1, 4, 4, generator=generator)
    t = torch.full((num,), 0.5)
    losses = denoising_losses(gaussian_oracle(MEAN, STD), x, noise=e, times=t)
    # At t = 1/2 both factors are sqrt(1/2); Var[v | x_t] = std^2 / (alpha^2 std^2 + sigma^2).
    assert losses.mean().item() == pytest.approx(STD**2 / (0.5 * STD**2 + 0.5), rel=0.02)
    worse = denoising_losses(gaussian_oracle(MEAN, 1.3 * STD), x, noise=e, times=t)
    assert worse.mean() > losses.mean()
