"""A source of another base is told from a fine-tune by how far it lies."""

import math

import pytest

from svdmerge.core.kinship import Kinship, Norms, kinship_of, strangers


def kin(norm: float, rank: float = 0.05) -> Kinship:
    return Kinship(norm=norm, effective_rank=rank)


def test_squares_add_up_over_matrices_and_ranks_have_a_median() -> None:
    found = kinship_of([
        Norms(fro=3.0, base_fro=30.0, largest=3.0, rank=4),
        Norms(fro=4.0, base_fro=40.0, largest=2.0, rank=8),
        Norms(fro=0.0, base_fro=0.0, largest=0.0, rank=8),
        Norms(fro=0.0, base_fro=0.0),
    ])  # fmt: skip
    assert found == Kinship(norm=0.1, effective_rank=0.375)  # of 1/4 and 4/8
    assert kinship_of([]) is None
    assert kinship_of([Norms(fro=0.1, base_fro=1.0)]) == Kinship(norm=0.1, effective_rank=None)


def test_of_a_base_of_zeros_only_itself_is_kin() -> None:
    same, other = (kinship_of([Norms(fro=fro, base_fro=0.0)]) for fro in (0.0, 1e-3))
    assert same is not None
    assert other is not None
    assert math.isfinite(other.norm)
    assert list(strangers({"same": same, "other": other})) == ["other"]


def test_an_effective_rank_that_is_unknown_is_not_told() -> None:
    (told,) = strangers({"a": Kinship(norm=2.0, effective_rank=None)}).values()
    assert told == "its difference is 2 times the base's norm"


def test_fine_tunes_are_kin() -> None:
    assert strangers({"a": kin(0.02), "b": kin(0.05), "c": kin(0.3)}) == {}
    assert strangers({"a": kin(0.5)}) == {}
    assert strangers({}) == {}


@pytest.mark.parametrize("norm", [1.41, 0.8, math.inf, math.nan])
def test_what_lies_as_far_as_another_model_is_none(norm: float) -> None:
    assert list(strangers({"a": kin(0.02), "b": kin(norm)})) == ["b"]
    assert list(strangers({"b": kin(norm)})) == ["b"]


def test_what_lies_much_farther_than_the_others_is_none() -> None:
    found = strangers({"a": kin(0.02), "b": kin(0.03), "c": kin(0.5, 0.24)})
    assert list(found) == ["c"]
    assert (
        "0.5 times the base's norm, the others' median 0.025, of effective rank 24.0%"
        in (found["c"])
    )


def test_small_differences_are_kin_however_small_the_others_are() -> None:
    assert strangers({"a": kin(1e-6), "b": kin(0.1)}) == {}


def test_the_base_itself_is_kin() -> None:
    assert strangers({"a": kin(0.0), "b": kin(0.0)}) == {}
