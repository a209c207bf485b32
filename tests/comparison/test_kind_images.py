"""The image benchmark at its smallest: what it measures is kept, and means what it says."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kind_case import tiny_study

from svdmerge.comparison.kind.ahead import fill, with_best_rates
from svdmerge.comparison.kind.diversion import (
    CONTROLS,
    diversion,
    gate_losses,
    matrices,
    random_losses,
    split_by_svd,
)
from svdmerge.comparison.kind.entrants import entrants, kind, lora
from svdmerge.comparison.kind.explanations import explained, variants
from svdmerge.comparison.kind.likeness import likeness
from svdmerge.comparison.kind.pairs import AS_SEEN, recombined, seen_losses, width_of
from svdmerge.comparison.kind.plots import draw_curves, draw_matrices
from svdmerge.comparison.kind.quality import nearest_old, quality, real_quality
from svdmerge.comparison.kind.report import (
    distance_table,
    diversion_table,
    explanation_table,
    likeness_table,
    matrix_table,
    over_seeds,
    pair_table,
    pretrained_table,
    quality_table,
    transfer_table,
)
from svdmerge.comparison.kind.study import Study, num_parameters
from svdmerge.comparison.kind.transfer import chosen_rate, transferred
from svdmerge.core.kind.gate import gated
from svdmerge.core.kind.replace import layers_of


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return tiny_study(tmp_path_factory.mktemp("study"))


def test_a_model_is_trained_once_and_then_read(study: Study) -> None:
    first = study.gated(0).state_dict()
    again = replace(study, steps=10**6).gated(0).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_whole_gated_model_has_the_parameters_of_the_dense_one(study: Study) -> None:
    # 42 of 64: rank 2/3 of the width; biases and scales are what is left.
    gated_size, dense_size = num_parameters(study.gated(0)), num_parameters(study.dense(0))
    assert gated_size == pytest.approx(dense_size, rel=0.1)


def test_a_matrix_of_losses_is_summed_up_by_its_diagonal() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    losses = torch.tensor([[1.0, 1.5], [1.0, 1.3], [2.0, 1.0], [0.9, 1.0]])
    found = diversion(losses, labels=labels)
    assert found.gap == pytest.approx((1.5 + 1.3 + 2.0 + 0.9) / 4.0 - 1.0)
    assert found.hits == 0.75
    assert found.rows_won == 2


def test_splitting_a_dense_model_keeps_its_leading_components(study: Study) -> None:
    dense = study.dense(0)
    split = split_by_svd(study, dense, seed=0)
    path, layer = next(iter(layers_of(split).items()))
    s = torch.linalg.svdvals(dense.get_parameter(f"{path}.weight"))
    kept = layer.s.abs().sort(descending=True).values
    torch.testing.assert_close(kept, s[: len(kept)])
    assert gate_losses(study, split).shape == (len(study.few(study.old)), len(study.old))


def test_a_recombined_model_gives_the_whole_ones_outputs(study: Study) -> None:
    whole = study.gated(0)
    smaller = recombined(whole, [study.names[c] for c in study.pairs[0]])
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 1, 8, 8, generator=generator)
    times, labels = torch.tensor([0.3, 0.7]), torch.tensor(study.pairs[0])
    with gated(whole, labels):
        wanted = whole(images, times, labels)
    with gated(smaller, torch.arange(2)):
        torch.testing.assert_close(smaller(images, times, labels), wanted, rtol=0, atol=1e-5)
    assert num_parameters(smaller) < num_parameters(whole)


def test_the_dense_model_of_a_pair_is_of_the_recombined_ones_size(study: Study) -> None:
    found = seen_losses(study, 0)
    recombined_size, _, dense_size = found["sizes"].tolist()
    # Widths go in steps of four: at 16 that is coarse.
    assert dense_size == pytest.approx(recombined_size, rel=0.25)
    assert width_of(study, 10**9) == study.width
    assert found[AS_SEEN].shape == found["dense"].shape


def test_entrants_train_what_they_say_and_start_where_they_say(study: Study) -> None:
    images = study.few(study.novel)
    assert len({e.name for e in entrants()}) == len(entrants())
    tailors = kind(study, 0)
    for path, layer in layers_of(tailors).items():
        learnt = layers_of(study.gated(0))[path].components().slice(0, study.num_learngenes)
        assert layer.base is not None
        assert not layer.base.requires_grad
        torch.testing.assert_close(layer.base, learnt.dense(), rtol=1e-5, atol=1e-5)
    trained = [
        sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (tailors, lora(study, 0))
    ]
    assert trained[1] <= trained[0]
    assert trained[1] == pytest.approx(trained[0], rel=0.1)
    # LoRA and zero-started tailors begin as the dense model itself.
    starts = {e.name: e for e in entrants()}
    labels, times = images.labels[:4], torch.full((4,), 0.5)
    outputs: list[torch.Tensor] = []
    for name in ("whole dense model + tailors", "LoRA of equal size", "full fine-tuning"):
        model = starts[name].build(study, 0)
        if layers_of(model):
            with gated(model, labels):
                outputs.append(model(images.scaled(slice(4)), times, labels))
        else:
            outputs.append(model(images.scaled(slice(4)), times, labels))
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=1e-4, atol=1e-5)


def test_what_tables_read_can_be_made_ahead(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(study, [0], parts=("sizes", "diversion", "transfer", "samples"), num_jobs=1)
    monkeypatch.setattr("svdmerge.comparison.kind.study.KindLoop", None)
    monkeypatch.setattr("svdmerge.comparison.kind.transfer.KindLoop", None)
    seen_losses(study, 0)
    random_losses(study, 0)
    for e in entrants():
        transferred(study, e, 0, steps=6, learning_rate=chosen_rate(study, e))


def test_learning_rates_are_chosen_by_training_loss(study: Study) -> None:
    chosen = with_best_rates(replace(study, steps=20), [1e-8, 1e-2], num_jobs=1)
    assert (chosen.learning_rate, chosen.dense_rate) == (1e-2, 1e-2)


def test_all_tables_and_figures_come_from_what_is_kept(study: Study, tmp_path: Path) -> None:
    results = {
        e.name: [transferred(study, e, 0, steps=6, learning_rate=chosen_rate(study, e))]
        for e in entrants()
    }
    assert all(list(r[0]["steps"]) == list(range(7)) for r in results.values())
    for r in results.values():
        assert r[0]["losses"].shape == (7, len(study.few(study.novel)))
    old, found = [random_losses(study, 0)], [matrices(study, 0)]
    assert set(found[0]) == {*CONTROLS, "labels"}
    names = [study.names[c] for c in study.old]
    judged = quality(study, "gated-0", study.gated(0), classes=study.old, seed=0)
    floor = real_quality(study, study.old)
    assert floor.accuracy > judged.accuracy
    lines = [
        *pretrained_table(old),
        *diversion_table(found),
        *matrix_table(found[0], names),
        *pair_table([seen_losses(study, 0)]),
        *transfer_table(results, first="learngenes + tailors"),
        *distance_table(
            results, first="learngenes + tailors", names=["h", "i", "j"], nearest=nearest_old(study)
        ),
        *explanation_table(explained(study, [0])),
        *quality_table({"gated": [judged]}),
        *likeness_table(likeness(study)),
    ]
    assert all(line.startswith("|") for line in lines)
    draw_matrices(found, names, tmp_path / "m.png")
    draw_curves(results, tmp_path / "c.png")
    assert (study.out / "pictures/gated-0.png").is_file()


def test_variants_change_one_thing_at_a_time_and_keep_the_rank(study: Study) -> None:
    study = replace(study, num_learngenes=18, num_tailors=14)
    found = dict(variants(study))
    assert len(found) == 6
    for changed in found.values():
        assert changed.num_learngenes + changed.num_tailors == 32
        assert changed.num_new == study.num_new
    gates = {name: changed.shared_gate(study.old) for name, changed in found.items()}
    assert len(gates["two classes a tailor group"].groups) == 4
    assert gates["overlapping groups"].uses[6] == (0, 6)
    assert len({str(changed.out) for changed in found.values()}) == 6


def test_intervals_over_seeds_are_students() -> None:
    found = over_seeds([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.high - 2.0 == pytest.approx(4.302653 / 3**0.5, rel=1e-5)
    assert over_seeds([0.5]).percent() == "+50.0 %"
