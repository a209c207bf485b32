"""The training loop's settings: parts of a step, held-out examples, precision, checkpoints."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tune_case import Case, make_case

from svdmerge.core.components import RankOneComponents
from svdmerge.core.factored import FactoredLinear
from svdmerge.errors import TrainingError
from svdmerge.storage.filesystem import Folder
from svdmerge.training.checkpointing import State, load_file
from svdmerge.training.data import hold_out
from svdmerge.training.loop import chosen


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return make_case(tmp_path)


def trained(case: Case, name: str, **changes: Any) -> State:
    case.tune(case.config(**changes), run=name, out=f"{name}-out")
    [path] = (case.root / name / "tune").glob("*/trained.pt")
    return load_file(Folder.at(path.parent), path.name)


@pytest.mark.parametrize("accumulate", [2, 3, 100])
def test_a_step_in_parts_is_the_step_of_the_whole_batch(case: Case, accumulate: int) -> None:
    whole, parts = trained(case, "whole"), trained(case, "parts", accumulate=accumulate)
    for name, change in whole["sigma_change"].items():
        torch.testing.assert_close(change, parts["sigma_change"][name], rtol=1e-4, atol=1e-6)
    assert whole["curve"][-1]["loss"] == pytest.approx(parts["curve"][-1]["loss"], abs=1e-6)


def test_bfloat16_trains_near_float32_and_keeps_values_and_head_in_float32(case: Case) -> None:
    full, half = trained(case, "full"), trained(case, "half", precision="bfloat16")
    assert {v.dtype for v in half["sigma_change"].values()} == {torch.float32}
    assert {v.dtype for v in half["head"].values()} == {torch.float32}
    assert half["curve"][-1]["loss"] == pytest.approx(full["curve"][-1]["loss"], rel=0.05)


@pytest.mark.parametrize("num_rows", [1, 50])
def test_both_forms_of_a_tuned_layer_have_gradients_under_autocast(num_rows: int) -> None:
    torch.manual_seed(0)
    directions = RankOneComponents(u=torch.randn(6, 2), s=torch.ones(2), vh=torch.randn(2, 5))
    layer = FactoredLinear(torch.nn.Linear(5, 6), directions=directions)
    x = torch.randn(num_rows, 5, requires_grad=True)

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(layer(x).float().square().sum(), [x, layer.sigma_change])

    exact = gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near = gradients()
    for a, b in zip(exact, near, strict=True):
        assert b.dtype == torch.float32
        assert float((a - b).norm() / a.norm()) < 0.05


@given(
    counts=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    share=st.floats(0.05, 0.95),
    seed=st.integers(0, 99),
)
def test_a_share_of_every_class_is_held_out_and_one_example_stays(
    counts: list[int], share: float, seed: int
) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    expected = [min(int(share * c + 0.5), c - 1) for c in counts]
    if not sum(expected):
        with pytest.raises(TrainingError, match="comes to no example"):
            hold_out(labels, share=share, seed=seed)
        return
    kept, held = hold_out(labels, share=share, seed=seed)
    assert sorted(kept + held) == list(range(len(labels)))
    assert np.bincount(labels[held], minlength=len(counts)).tolist() == expected


def test_without_a_share_all_rows_are_trained_on() -> None:
    assert hold_out(np.array([0, 1, 0]), share=0.0, seed=0) == ([0, 1, 2], [])


def test_the_values_of_the_best_epoch_on_what_is_held_out_are_kept(case: Case) -> None:
    config = case.config(validation_share=0.3, epochs=12, patience=2, learning_rate=0.5)
    result = case.tune(config)
    assert result.num_held_out == 12
    assert result.held_out_gain is not None
    [told] = [note for note in result.notes if "held-out examples" in note]
    assert f"by {result.held_out_gain:.4f} nats" in told
    assert (result.best_epoch == 0) == told.startswith("nothing is changed")
    losses = [x for point in result.curve if (x := point.held_out_loss) is not None]
    least = 1 + min(range(len(losses)), key=lambda i: losses[i])
    assert len(losses) == len(result.curve) == min(least + config.patience, config.epochs)
    assert result.best_epoch in (0, least)
    fewer = case.config(validation_share=0.3, epochs=12, patience=12, learning_rate=0.5)
    again = case.tune(fewer, run="patient", out="patient-out")
    assert len(again.curve) == 12
    assert again.curve[: len(losses)] == result.curve


def candidate(epoch: int, *losses: float) -> State:
    values = {"sigma_change": {"layer": torch.tensor([float(epoch)])}, "head": {}}
    return {"epoch": epoch, "losses": torch.tensor(losses), **values}


@pytest.mark.parametrize(
    ("best", "kept"),
    [
        ((0.9, 0.9, 0.8, 0.9), 3),  # better on every example
        ((1.9, 0.1, 1.9, 0.0), 0),  # better on the mean alone, by less than its noise
        ((1.0, 1.0, 1.0, 1.0), 0),
    ],
)
def test_an_epoch_is_kept_if_it_is_better_by_more_than_noise(
    best: tuple[float, ...], kept: int
) -> None:
    state = {"start": candidate(0, 1.0, 1.0, 1.0, 1.0), "best": candidate(3, *best), "epoch": 5}
    found = chosen(state)
    assert found["best"]["epoch"] == kept
    assert float(found["sigma_change"]["layer"]) == kept
    assert found["epoch"] == 5
    differences = 1.0 - np.array(best)
    assert found["gain"] == pytest.approx(differences.mean())
    assert found["error"] == pytest.approx(differences.std(ddof=1) / 2)


def test_a_head_of_rate_zero_stays_as_it_started(case: Case) -> None:
    frozen = trained(case, "run", head_learning_rate=0.0)
    begun = trained(case, "begun", head_learning_rate=1e-30, learning_rate=1e-30)
    assert any(bool(v.any()) for v in frozen["sigma_change"].values())
    for name, value in frozen["head"].items():
        assert torch.equal(value, begun["head"][name])


def test_where_no_epoch_is_better_nothing_is_changed(case: Case) -> None:
    state = trained(
        case, "run", validation_share=0.3, patience=1, learning_rate=1e4, head_learning_rate=1e4
    )
    assert state["best"]["epoch"] == 0
    assert state["epoch"] == 1
    assert not any(bool(v.any()) for v in state["sigma_change"].values())


def test_the_clock_decides_when_states_are_kept_but_no_number(case: Case) -> None:
    often, seldom = trained(case, "often"), trained(case, "seldom", checkpoint_every_s=1000)
    [places] = [sorted(case.root.glob(f"{r}/tune/*/checkpoints")) for r in ("seldom",)]
    assert len(list(places[0].iterdir())) == 1
    for name, change in often["sigma_change"].items():
        assert torch.equal(change, seldom["sigma_change"][name])


def test_a_loss_by_import_path_is_what_trains(case: Case) -> None:
    plain = trained(case, "plain", loss="cross_entropy")
    same = trained(case, "same", loss="tiny_backbone:own_cross_entropy")
    other = trained(case, "other", loss="tiny_backbone:hinge")
    assert plain["curve"] == same["curve"]
    assert plain["curve"] != other["curve"]


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("nowhere:loss", "loss: nowhere:loss: cannot be imported"),
        ("cross-entropy", "loss: cross-entropy: cannot be imported"),
        ("tiny_backbone:mean_loss", r"loss: returned shape \[\] for 1 examples"),
        ("tiny_backbone:no_loss", "loss: returned None for 1 examples"),
        ("tiny_backbone:failing_loss", r"loss: fails on scores \[1, 3\], labels \[1\]"),
    ],
)
def test_a_loss_that_cannot_be_used_is_told(case: Case, loss: str, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        case.tune(case.config(loss=loss))
