"""The full decomposition by the Gram matrix, against planted ones and LAPACK's."""

import pytest
import torch
from spectra import SHAPES, SPECTRA, planted

from svdmerge.core.gram import by_gram

EPS = torch.finfo(torch.float64).eps


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize(("m", "n"), [*SHAPES, (150, 140)])
def test_values_matrix_and_vectors_are_the_planted_ones(kind: str, m: int, n: int) -> None:
    p = planted(SPECTRA[kind](min(m, n)), m=m, n=n, seed=m + n)
    rounding = EPS * max(m, n) * float(p.s[0])
    c = by_gram(p.matrix)
    assert torch.all((c.s - p.s).abs() <= 4 * rounding)
    assert torch.all(c.s[:-1] >= c.s[1:])
    assert torch.linalg.matrix_norm(c.dense() - p.matrix) <= 40 * rounding
    for vectors in (c.u[:, c.s > 0], c.vh[c.s > 0].T):
        # Of values near rounding, directions are only as good as rounding leaves them.
        large = vectors[:, (c.s > 1e-9 * c.s.max())[c.s > 0]]
        identity = torch.eye(large.shape[1], dtype=torch.float64)
        assert torch.all((large.T @ large - identity).abs() <= 1e-9)


@pytest.mark.parametrize(("kind", "rank"), [("low-rank", 5), ("zero", 0)])
def test_values_that_are_rounding_alone_are_exactly_zero(kind: str, rank: int) -> None:
    c = by_gram(planted(SPECTRA[kind](30), m=40, n=30, seed=1).matrix)
    assert int((c.s > 0).sum()) == rank
