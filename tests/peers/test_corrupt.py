"""Damaged differences: how strong each noise is, what pruning keeps, and that seeds decide all."""

import pytest
import torch

from svdmerge.errors import TrainingError
from svdmerge.peers.corrupt import noise_by_entry, noise_by_norm, pruned, without_tokens

GENERATOR = torch.Generator().manual_seed(0)
CLEAN = {n: 0.01 * torch.randn(60, 40, generator=GENERATOR) for n in ("a", "b")}


def test_noise_by_entry_has_the_norm_as_deviation_of_every_entry() -> None:
    noisy = noise_by_entry(CLEAN, factor=0.5, seed=0)
    for name, d in CLEAN.items():
        deviation = float((noisy[name] - d).std())
        assert deviation == pytest.approx(0.5 * float(d.norm()), rel=0.05)


def test_noise_by_norm_has_exactly_its_share_of_the_norm() -> None:
    noisy = noise_by_norm(CLEAN, factor=0.5, seed=0)
    for name, d in CLEAN.items():
        assert float((noisy[name] - d).norm()) == pytest.approx(0.5 * float(d.norm()), rel=1e-4)


@pytest.mark.parametrize("damage", [noise_by_entry, noise_by_norm])
def test_noise_follows_from_seed_and_name_alone(damage) -> None:  # type: ignore[no-untyped-def]
    first = damage(CLEAN, factor=1.0, seed=3)
    again = damage(dict(reversed(CLEAN.items())), factor=1.0, seed=3)
    other = damage(CLEAN, factor=1.0, seed=4)
    noise = {n: (first[n] - CLEAN[n]) / CLEAN[n].norm() for n in CLEAN}
    for name in CLEAN:
        assert torch.equal(first[name], again[name])
        assert not torch.allclose(first[name], other[name])
    assert not torch.allclose(noise["a"], noise["b"])


def test_noise_leaves_a_zero_difference_and_the_input_alone() -> None:
    zero = {"z": torch.zeros(3, 4), "v": torch.zeros(5)}
    for damage in (noise_by_entry, noise_by_norm):
        assert all(torch.equal(damage(zero, factor=1.0, seed=0)[n], zero[n]) for n in zero)
    before = CLEAN["a"].clone()
    noise_by_entry(CLEAN, factor=1.0, seed=0)
    assert torch.equal(CLEAN["a"], before)


def test_pruning_keeps_the_largest_entries_as_they_are() -> None:
    kept = pruned(CLEAN, share=0.1)
    for name, d in CLEAN.items():
        live = kept[name] != 0
        assert int(live.sum()) == 240
        assert torch.equal(kept[name][live], d[live])
        assert float(d[live].abs().min()) >= float(d[~live].abs().max())


def test_pruning_takes_the_earlier_of_equal_entries() -> None:
    equal = {"e": torch.tensor([[1.0, -1.0], [1.0, 0.5]])}
    assert pruned(equal, share=0.5)["e"].tolist() == [[1.0, -1.0], [0.0, 0.0]]
    assert torch.equal(pruned(equal, share=1.0)["e"], equal["e"])
    assert not pruned(equal, share=0.0)["e"].any()
    with pytest.raises(TrainingError, match=r"1\.5"):
        pruned(equal, share=1.5)


def test_dropped_tokens_are_inner_ones_of_a_seeded_choice_in_their_order() -> None:
    tokens = [101, *range(20), 102]
    found = without_tokens(tokens, share=0.3, row=4, seed=0)
    assert len(found) == 2 + 14
    assert (found[0], found[-1]) == (101, 102)
    assert found[1:-1] == sorted(set(found[1:-1]))
    assert found == without_tokens(tokens, share=0.3, row=4, seed=0)
    assert found != without_tokens(tokens, share=0.3, row=5, seed=0)
    assert found != without_tokens(tokens, share=0.3, row=4, seed=1)


@pytest.mark.parametrize("tokens", [[], [101], [101, 102], [101, 7, 102]])
def test_short_texts_keep_their_markers(tokens: list[int]) -> None:
    assert without_tokens(tokens, share=0.0, row=0, seed=0) == tokens
    assert without_tokens(tokens, share=1.0, row=0, seed=0) == [t for t in tokens if t > 100]
