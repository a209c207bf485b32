"""Principal angles against an independent formula, and at the spans whose angles are known."""

import numpy as np
import pytest
import torch
from torch import Tensor

from svdmerge.core.overlap import overlap, principal_cosines


def span(m: int, i: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(m, i, generator=generator, dtype=torch.float64))[0]


def test_the_same_span_overlaps_wholly_in_whatever_basis() -> None:
    a, turn = span(20, 5, seed=0), span(5, 5, seed=1)
    assert overlap(a, a @ turn) == pytest.approx(1.0)
    torch.testing.assert_close(principal_cosines(a, a @ turn), torch.ones(5, dtype=torch.float64))


def test_orthogonal_spans_do_not_overlap() -> None:
    whole = span(20, 9, seed=2)
    assert overlap(whole[:, :4], whole[:, 4:]) == pytest.approx(0.0, abs=1e-20)


def test_random_spans_overlap_by_their_share_of_the_space() -> None:
    found = [overlap(span(64, 8, seed=2 * s), span(64, 8, seed=2 * s + 1)) for s in range(60)]
    assert np.mean(found) == pytest.approx(8 / 64, abs=0.01)


@pytest.mark.parametrize(("i", "j"), [(3, 3), (2, 5), (6, 1)])
def test_cosines_are_those_of_the_product_of_projectors(i: int, j: int) -> None:
    a, b = span(12, i, seed=4), span(12, j, seed=5)
    projected = (a @ a.T @ b @ b.T @ a @ a.T).numpy()
    squares = np.sort(np.linalg.eigvalsh((projected + projected.T) / 2))[::-1][: min(i, j)]
    np.testing.assert_allclose(principal_cosines(a, b).numpy() ** 2, squares, atol=1e-12)
    assert overlap(a, b) == pytest.approx(squares.mean())
    assert overlap(a, b) == pytest.approx(overlap(b, a))


def test_a_known_angle_is_found() -> None:
    a, b = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.6], [0.8]])
    assert overlap(a, b) == pytest.approx(0.36)


def test_cosines_never_pass_one() -> None:
    a = span(200, 8, seed=6).float()
    assert float(principal_cosines(a, a).max()) <= 1.0


def test_an_empty_span_overlaps_with_nothing() -> None:
    assert overlap(torch.zeros(4, 0), span(4, 2, seed=7)) == 0.0
