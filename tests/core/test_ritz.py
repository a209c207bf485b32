"""Leading eigenpairs by subspace iteration: those of LAPACK, or their residuals say otherwise."""

import numpy as np
import pytest
import torch
from spectra import orthonormal

from svdmerge.core.ritz import by_eigh, by_subspace, each_on_host

SIZE, WIDTH = 96, 16
SPECTRA = {
    "power law": torch.arange(1, SIZE + 1) ** -1.2,
    "twelve above noise": torch.cat([torch.linspace(1, 0.1, 12), torch.linspace(0.01, 0, 84)]),
    "low rank": torch.cat([torch.linspace(1, 0.5, 5), torch.zeros(SIZE - 5)]),
    "as steep as float32 holds": torch.logspace(0, -8, SIZE),
    "repeated": torch.cat([torch.ones(10), 0.5 * torch.arange(1, SIZE - 9) ** -1.2]),
    "nothing": torch.zeros(SIZE),
}


def stack(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices of these eigenvalues, and couplings to a next block of a thousandth of the first."""
    vectors = torch.stack([orthonormal(SIZE, SIZE, seed=seed) for seed in (1, 2)])
    gram = (vectors * values.double()) @ vectors.mT
    coupling = torch.stack([orthonormal(WIDTH, WIDTH, seed=seed) for seed in (3, 4)])
    return gram.float(), (1e-3 * values[0] * coupling).float()


@pytest.mark.parametrize("name", SPECTRA)
def test_a_subspace_holds_the_pairs_of_the_eigensolver(name: str) -> None:
    gram, coupling = stack(SPECTRA[name])
    found, expected = by_subspace(gram, coupling), by_eigh(gram, coupling)
    scale = max(1e-30, float(SPECTRA[name][0]))
    assert np.abs(found.values - expected.values).max() <= 2e-6 * scale
    assert found.vectors.dtype == torch.float32
    residuals = residuals_of(gram, coupling, found.vectors, found.values)
    assert np.abs(found.residuals - residuals).max() <= 2e-6 * scale


def test_what_a_subspace_lacks_shows_in_its_residuals() -> None:
    gram, coupling = stack(1.0 - torch.arange(SIZE) / 1e4)
    found = by_subspace(gram, 0.0 * coupling)
    residuals = residuals_of(gram, 0.0 * coupling, found.vectors, found.values)
    assert residuals.max() > 1e-4
    assert np.abs(found.residuals - residuals).max() <= 2e-6


def residuals_of(
    gram: torch.Tensor, coupling: torch.Tensor, vectors: torch.Tensor, values: np.ndarray
) -> np.ndarray:
    v = vectors.double()
    rest = gram.double() @ v - v * torch.from_numpy(values)[:, None]
    beyond = coupling.double() @ v[:, -WIDTH:]
    return torch.linalg.vector_norm(torch.cat([rest, beyond], dim=1), dim=1).numpy()


def test_a_basis_of_one_block_is_solved_as_it_is() -> None:
    gram, coupling = stack(SPECTRA["power law"])
    small = gram[:, :WIDTH, :WIDTH]
    expected = by_eigh(small, coupling)
    found = by_subspace(small, coupling)
    np.testing.assert_allclose(found.values, expected.values, atol=1e-6)
    np.testing.assert_allclose(found.residuals, expected.residuals, atol=1e-6)


def test_the_host_solves_each_of_a_stack() -> None:
    gram, _ = stack(SPECTRA["power law"])
    for got, expected in zip(
        each_on_host(torch.linalg.svd, gram), torch.linalg.svd(gram), strict=True
    ):
        assert torch.equal(got, expected)
    one = each_on_host(torch.linalg.eigh, gram[0])
    assert [x.shape for x in one] == [(SIZE,), (SIZE, SIZE)]
