import pytest
import torch

from svdmerge.core.components import RankOneComponents, concatenate, flat, none


def components(m: int, k: int, n: int, seed: int = 0) -> RankOneComponents:
    generator = torch.Generator().manual_seed(seed)
    return RankOneComponents(
        u=torch.randn(m, k, generator=generator),
        s=torch.randn(k, generator=generator),
        vh=torch.randn(k, n, generator=generator),
    )


def test_the_dense_form_is_the_sum_of_outer_products() -> None:
    c = components(4, 3, 5)
    total = sum(c.s[i] * torch.outer(c.u[:, i], c.vh[i]) for i in range(3))
    assert torch.allclose(c.dense(), total, rtol=1e-6, atol=1e-6)


def test_a_slice_holds_those_components_and_no_others() -> None:
    c = components(4, 5, 6)
    part = c.slice(1, 3)
    assert len(part) == 2
    assert torch.equal(part.u, c.u[:, 1:3])
    assert torch.equal(part.s, c.s[1:3])
    assert torch.equal(part.vh, c.vh[1:3])
    assert len(c.slice(4, 99)) == 1
    assert len(c.slice(5, 9)) == 0


def test_parts_concatenated_are_a_list_of_their_sum_in_their_order() -> None:
    one, other = components(4, 2, 5, 1), components(4, 3, 5, 2)
    both = concatenate([one, other])
    assert torch.equal(both.s, torch.cat([one.s, other.s]))
    assert torch.allclose(both.dense(), one.dense() + other.dense(), rtol=1e-5, atol=1e-6)


def test_slices_concatenated_again_are_the_whole() -> None:
    c = components(3, 7, 4)
    again = concatenate([c.slice(i, i + 2) for i in range(0, 7, 2)])
    assert torch.equal(again.u, c.u)
    assert torch.equal(again.s, c.s)
    assert torch.equal(again.vh, c.vh)


def test_no_components_sum_to_zero_and_add_nothing() -> None:
    c = components(3, 2, 4)
    assert torch.equal(none(3, 4).dense(), torch.zeros(3, 4))
    assert torch.equal(concatenate([none(3, 4), c]).dense(), c.dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_flat_difference_comes_back_bit_by_bit(dtype: torch.dtype) -> None:
    values = torch.randn(1, 9, dtype=dtype)
    assert torch.equal(flat(values).dense(), values)
    assert len(flat(values)) == 1


def test_another_dtype_holds_the_same_components() -> None:
    c = components(3, 2, 4)
    wide = c.to(torch.float64)
    assert wide.u.dtype == wide.s.dtype == wide.vh.dtype == torch.float64
    assert torch.equal(wide.to(torch.float32).u, c.u)


@pytest.mark.parametrize(
    ("u", "s", "vh"),
    [
        ((4, 3), (2,), (3, 5)),
        ((4, 3), (3,), (2, 5)),
        ((4, 3), (3, 1), (3, 5)),
        ((4,), (3,), (3, 5)),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(
    u: tuple[int, ...], s: tuple[int, ...], vh: tuple[int, ...]
) -> None:
    with pytest.raises(Exception, match=r"shape|type"):
        RankOneComponents(u=torch.zeros(u), s=torch.zeros(s), vh=torch.zeros(vh))
