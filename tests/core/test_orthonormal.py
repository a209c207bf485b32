"""Orthonormal columns by Cholesky, which a GPU takes: as good as Householder's."""

import pytest
import torch
from spectra import orthonormal as random_columns

from svdmerge.core.orthonormal import cholesky_qr, orthonormal


def conditioned(condition: float, *, seed: int) -> torch.Tensor:
    s = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), 16, dtype=torch.float64)
    u, v = random_columns(300, 16, seed=seed), random_columns(16, 16, seed=seed + 1)
    return ((u * s) @ v.T).float()


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e6])
def test_columns_are_orthonormal_and_give_the_matrix_back(condition: float) -> None:
    x = torch.stack([conditioned(condition, seed=seed) for seed in (1, 5)])
    for q, r in (cholesky_qr(x), orthonormal(x)):
        assert q.dtype == torch.float32
        assert torch.all((q.mT @ q - torch.eye(16)).abs() <= 1e-5)
        assert torch.all((q @ r - x).abs() <= 1e-6)
        assert torch.equal(r, r.triu())


def test_a_stack_gives_what_each_matrix_gives() -> None:
    x = torch.stack([conditioned(1e3, seed=seed) for seed in (1, 5, 9)])
    together = cholesky_qr(x)
    for i in range(3):
        assert torch.allclose(together.q[i], cholesky_qr(x[i]).q, rtol=0, atol=1e-6)


def test_columns_that_are_zero_stay_zero_and_disturb_no_other() -> None:
    x = conditioned(10.0, seed=1)
    x[:, 3] = 0.0
    q, r = cholesky_qr(x)
    assert float(q[:, 3].abs().max()) == 0.0
    assert torch.all((q @ r - x).abs() <= 1e-6)
    assert torch.equal(cholesky_qr(torch.zeros(9, 4)).q, torch.zeros(9, 4))
