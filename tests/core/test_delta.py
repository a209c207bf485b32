import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svdmerge.core.delta import all_finite, delta


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_difference_is_taken_in_float64(dtype: torch.dtype) -> None:
    source = torch.tensor([[1.0, 2.0]]).to(dtype)
    base = torch.tensor([[0.5, -2.0]]).to(dtype)
    got = delta(source, base=base)
    assert got.dtype == torch.float64
    assert got.tolist() == [[0.5, 4.0]]


def test_a_difference_below_half_precision_is_not_lost() -> None:
    base = torch.tensor([[256.0]], dtype=torch.bfloat16)
    source = torch.tensor([[256.0 + 1e-4]], dtype=torch.float64)
    assert delta(source, base=base).item() == pytest.approx(1e-4, rel=1e-9)


def test_inputs_are_left_as_they_were() -> None:
    source, base = torch.ones(2, 2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)
    delta(source, base=base)
    assert torch.equal(source, torch.ones(2, 2).double())
    assert torch.equal(base, torch.ones(2, 2).double())


def test_matrices_of_different_shapes_are_refused_by_the_signature() -> None:
    with pytest.raises(Exception, match=r"m n|shape"):
        delta(torch.zeros(2, 3), base=torch.zeros(3, 2))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@given(place=st.integers(0, 99))
def test_one_number_that_is_none_is_found_wherever_it_is(bad: float, place: int) -> None:
    values = torch.ones(100)
    values[place] = bad
    assert not all_finite(values)


def test_two_infinities_that_would_cancel_are_found() -> None:
    assert not all_finite(torch.tensor([math.inf, -math.inf]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_numbers_whose_sum_overflows_are_finite(dtype: torch.dtype) -> None:
    assert all_finite(torch.full((100,), torch.finfo(dtype).max, dtype=dtype))


def test_nothing_is_finite() -> None:
    assert all_finite(torch.zeros(0))
    assert all_finite(torch.zeros(3, 0))
