"""Linear CKA against its definition by kernels, and its invariances."""

import pytest
import torch

from svdmerge.core.cka import linear_cka


def normal(num: int, dim: int, *, seed: int) -> torch.Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed)).double()


def test_it_is_the_normalised_hsic_of_centred_gram_matrices() -> None:
    x, y = normal(12, 3, seed=0), normal(12, 5, seed=1)
    h = torch.eye(12).double() - 1 / 12

    def hsic(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(torch.trace(a @ a.T @ h @ b @ b.T @ h))

    wanted = hsic(x, y) / (hsic(x, x) * hsic(y, y)) ** 0.5
    assert linear_cka(x.float(), y.float()) == pytest.approx(wanted, rel=1e-5)


def test_rotation_scale_and_shift_change_nothing() -> None:
    x = normal(40, 6, seed=2)
    rotation = torch.linalg.qr(normal(6, 6, seed=3)).Q
    assert linear_cka(x, 3.0 * x @ rotation + 7.0) == pytest.approx(1.0, abs=1e-9)


def test_unrelated_representations_of_many_samples_are_near_zero() -> None:
    assert linear_cka(normal(2000, 4, seed=4), normal(2000, 4, seed=5)) < 0.02


def test_a_constant_representation_is_like_nothing() -> None:
    assert linear_cka(torch.ones(5, 2), normal(5, 2, seed=6).float()) == 0.0
