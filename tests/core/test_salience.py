from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from svdmerge.core.salience import SALIENCES, denoised, relative, sigma
from svdmerge.core.svd import exact
from svdmerge.core.topk import top_k
from svdmerge.recipe import Parameters

numbers = st.one_of(st.just(0.0), st.floats(1e-6, 1e6))
values = hnp.arrays(np.float64, st.integers(0, 20), elements=numbers)


def test_every_salience_of_the_recipe_is_there_and_no_other() -> None:
    named = set(get_args(Parameters.model_fields["salience"].annotation))
    assert set(SALIENCES) == named - {"target"}  # a target weighs whole sources, not components


@given(values)
def test_sigma_is_the_singular_value_whatever_the_norm(s: np.ndarray) -> None:
    assert np.array_equal(sigma(s, fro=123.0, noise=1e9), s)


@given(values.filter(lambda s: s.any()), st.floats(1e-3, 1e3))
def test_relative_does_not_change_with_a_sources_scale(s: np.ndarray, scale: float) -> None:
    fro = float(np.linalg.norm(s))
    one, other = relative(s, fro=fro, noise=0.0), relative(scale * s, fro=scale * fro, noise=0.0)
    assert np.allclose(one, other, rtol=1e-12, atol=0)
    assert np.linalg.norm(one) == pytest.approx(1.0)


def test_a_zero_matrix_has_no_salience_and_no_nan() -> None:
    got = relative(np.zeros(4), fro=0.0, noise=0.0)
    assert np.array_equal(got, np.zeros(4))


def kept_of_each(spectra: list[np.ndarray], *, k: int, salience: str) -> list[int]:
    """How many of the top k come from each source."""
    of = SALIENCES[salience]
    ranked = np.concatenate([of(s, fro=float(np.linalg.norm(s)), noise=0.0) for s in spectra])
    tie = np.repeat(np.arange(len(spectra)), [len(s) for s in spectra])
    index = np.concatenate([np.arange(len(s)) for s in spectra])
    chosen = tie[top_k(ranked, tie=tie, index=index, k=k)]
    return [int((chosen == source).sum()) for source in range(len(spectra))]


def noisy_sources(*, per_entry: bool) -> list[np.ndarray]:
    """Spectra of four low-rank differences, the first with noise of 0.5 ||D||_F."""
    generator = torch.Generator().manual_seed(0)
    spectra: list[np.ndarray] = []
    for source in range(4):
        left = torch.randn(96, 24, generator=generator, dtype=torch.float64)
        d = left @ torch.randn(24, 64, generator=generator, dtype=torch.float64)
        if source == 0:
            noise = torch.randn(96, 64, generator=generator, dtype=torch.float64)
            size = 1.0 if per_entry else 1.0 / float(torch.linalg.matrix_norm(noise))
            d = d + 0.5 * float(torch.linalg.matrix_norm(d)) * size * noise
        spectra.append(exact(d).s.numpy())
    return spectra


def test_noise_per_entry_takes_every_slot_by_sigma() -> None:
    spectra = noisy_sources(per_entry=True)
    assert kept_of_each(spectra, k=20, salience="sigma") == [20, 0, 0, 0]
    assert kept_of_each(spectra, k=20, salience="relative")[0] == 0


def test_noise_of_half_the_norm_takes_about_its_share_by_sigma() -> None:
    kept = kept_of_each(noisy_sources(per_entry=False), k=20, salience="sigma")
    assert min(kept) >= 2


def test_denoised_is_the_singular_value_above_the_noise_and_nothing_below() -> None:
    s = np.array([3.0, 2.0, 1.0, 0.5])
    assert denoised(s, fro=9.0, noise=1.0).tolist() == [3.0, 2.0, 0.0, 0.0]
