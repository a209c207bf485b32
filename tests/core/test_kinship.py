"""A source of another base is told from a fine-tune by how far it lies."""

import math

import pytest

from svdmerge.core.kinship import Kinship, strangers


def kin(norm: float, rank: float = 0.05) -> Kinship:
    return Kinship(norm=norm, effective_rank=rank)


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
