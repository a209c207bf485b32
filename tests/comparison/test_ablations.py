"""Which components the ablations of AXIS take."""

import numpy as np
import pytest
import torch

from svdmerge.comparison.ablations import (
    ABLATIONS,
    Choice,
    arbitrary,
    bottom,
    kept,
    leading,
)
from svdmerge.comparison.trained import TRAINED
from svdmerge.comparison.untrained import UNTRAINED
from svdmerge.core.components import RankOneComponents
from svdmerge.core.svd import exact

SPECTRUM = np.array([5.0, 4.0, 3.0, 2.0, 1.0, 0.0])


def sources() -> list[RankOneComponents]:
    generator = torch.Generator().manual_seed(0)
    return [exact(x * torch.randn(6, 8, generator=generator)) for x in (3.0, 1.0)]


def test_the_top_and_the_bottom_of_a_spectrum_leave_out_zeros() -> None:
    assert leading(SPECTRUM, 2, 0).tolist() == [0, 1]
    assert sorted(bottom(SPECTRUM, 2, 0).tolist()) == [3, 4]
    drawn = arbitrary(SPECTRUM, 5, 0).tolist()
    assert sorted(drawn) == [0, 1, 2, 3, 4]
    assert arbitrary(SPECTRUM, 2, 7).tolist() == arbitrary(SPECTRUM, 2, 7).tolist()


def test_the_leading_choice_is_the_top_k_of_all_sources() -> None:
    parts = sources()
    every = torch.cat([p.s for p in parts]).sort(descending=True).values
    found = kept(parts, k=4, choice=leading, seed=0)
    torch.testing.assert_close(found.s.sort(descending=True).values, every[:4])


@pytest.mark.parametrize("choice", [arbitrary, bottom])
def test_other_choices_take_as_many_of_each_source(choice: Choice) -> None:
    parts = sources()
    top, other = (kept(parts, k=4, choice=c, seed=0) for c in (leading, choice))
    counts = [int(torch.isin(top.s, p.s).sum()) for p in parts]
    assert [int(torch.isin(other.s, p.s).sum()) for p in parts] == counts
    assert float(other.s.sum()) < float(top.s.sum())


def test_no_two_entrants_share_a_name() -> None:
    assert len(UNTRAINED | TRAINED | ABLATIONS) == len(UNTRAINED) + len(TRAINED) + len(ABLATIONS)
