"""Tuning whole, in this process: what is compared, what resumes, what is written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tune_case import MATRICES, NUM_CLASSES, Case, make_case, write_examples

from svdmerge.core.discriminant import discriminant
from svdmerge.errors import OutputError, TrainingError
from svdmerge.storage.filesystem import Folder
from svdmerge.training import tune as tuning
from svdmerge.training.backbone import build_backbone, load_weights
from svdmerge.training.checkpointing import load_file as load_state
from svdmerge.training.data import load_target
from svdmerge.training.features import extract
from svdmerge.training.head import fitted_head
from svdmerge.training.result import Row, TuneResult, verdict

CPU = torch.device("cpu")


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return make_case(tmp_path)


def trained_state(case: Case, run: str = "run") -> dict[str, Any]:
    [path] = (case.root / run / "tune").glob("*/trained.pt")
    return load_state(Folder.at(path.parent), path.name)


def same(a: Any, b: Any) -> bool:
    """Bit for bit, whatever the nesting; times and counts of resumes apart."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(
            same(a[k], b[k]) for k in a if k not in ("seconds", "resumes")
        )
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_rows_hold_base_best_source_merged_and_tuned(case: Case) -> None:
    result = case.tune()
    names = [row.name for row in result.rows]
    assert names[0] == "base"
    assert names[1].startswith("best source: source-")
    assert names[2:] == ["merged", "tuned", "tuned, head in closed form"]
    head = NUM_CLASSES * 16 + NUM_CLASSES
    assert [r.trained for r in result.rows] == [0, 0, 0, 6, 6]
    assert [r.trained_with_head for r in result.rows] == [head] * 3 + [head + 6] * 2
    assert all(r.seconds > 0 and r.accuracy > 1 / NUM_CLASSES for r in result.rows)
    assert len(result.curve) == 4
    assert result.curve[-1].loss < result.curve[0].loss
    assert (result.num_train, result.num_test) == (36, 90)
    assert TuneResult.from_json(result.to_json()) == result


def test_each_probe_is_the_head_on_that_models_features(case: Case) -> None:
    result = case.tune()
    target = load_target(case.config(), base=case.base)
    backbone = build_backbone(case.config(), base=case.base)
    for name, model in (("base", case.base), ("merged", case.merged)):
        load_weights(backbone, checkpoint=model, base=case.base)
        train, test = (extract(backbone, e, device=CPU) for e in (target.train, target.test))
        labels = target.train.labels
        found = discriminant(train, labels=labels, num_classes=NUM_CLASSES)
        head = fitted_head(train, labels=labels, closed=found)
        row = result.row(name)
        assert row.accuracy == head.accuracy(test, labels=target.test.labels)
        assert row.loo_error == float(found.log_loss.mean())


def test_the_best_source_is_chosen_without_the_test_examples(case: Case) -> None:
    first = case.tune()
    assert first.best_source == min(first.sources, key=lambda s: s.loo_error).name
    # Other test examples, on which the sources may rank otherwise: the choice stays.
    write_examples(case.root / "test.parquet", per_class=9, seed=123, easy=0.1)
    second = case.tune(run="other", out="other-tuned")
    assert [s.name for s in second.sources] == [s.name for s in first.sources]
    assert second.rows[1].name == first.rows[1].name


def test_a_matrix_outside_the_features_is_not_trained_and_said_so(case: Case) -> None:
    result = case.tune()
    assert any("take no part in the features" in n and "pooler" in n for n in result.notes)
    assert "pooler.weight" not in trained_state(case)["sigma_change"]


def test_fewer_values_than_asked_for_are_said(case: Case) -> None:
    result = case.tune(case.config(num_values=7))
    assert "trains 4 of 7 values per matrix: merged factors have 4 components" in result.notes[0]
    assert result.row("tuned").trained == 8


def test_null_space_trains_as_many_as_asked_for(case: Case) -> None:
    result = case.tune(case.config(num_values=7, null_space=True))
    assert result.row("tuned").trained == 14
    assert not any("merged factors have" in n for n in result.notes)


def test_the_exported_model_gives_the_tuned_rows_accuracy(case: Case) -> None:
    from tiny_backbone import TinyNet

    result = case.tune()
    out = case.root / "tuned"
    net = TinyNet({})
    net.load_state_dict(load_file(out / "model.safetensors"))
    head = load_file(out / "head.safetensors")
    target = load_target(case.config(), base=case.base)
    with torch.no_grad():
        scores = net(target.test.inputs) @ head["weight"].T + head["bias"]
    accuracy = float((scores.argmax(1) == target.test.labels).double().mean())
    assert accuracy == pytest.approx(result.row("tuned").accuracy, abs=0.012)
    assert head["classes"].tolist() == [0, 1, 2]
    adapter = load_file(out / "adapter.safetensors")
    assert sum(t.numel() for t in adapter.values()) == result.row("tuned").trained


def test_the_exported_weights_are_merged_plus_the_changed_values(case: Case) -> None:
    case.tune()
    adapted = load_file(case.root / "tuned" / "model.safetensors")
    merged = load_file(case.root / "merged" / "model.safetensors")
    for name, change in trained_state(case)["sigma_change"].items():
        c = case.factors.read(name, range(len(change)))
        expected = merged[name].double() + (c.u.double() * change.double()) @ c.vh.double()
        torch.testing.assert_close(adapted.pop(name), expected.float())
    assert all(torch.equal(tensor, merged[name]) for name, tensor in adapted.items())


def test_the_output_keeps_the_bases_dtype(tmp_path: Path) -> None:
    case = make_case(tmp_path, dtype=torch.bfloat16)
    case.tune()
    held = load_file(case.root / "tuned" / "model.safetensors")
    assert {t.dtype for t in held.values()} == {torch.bfloat16}


class Interrupted(Exception):
    pass


def interrupt_at(epoch: int) -> Any:
    def on_progress(name: str, done: int, total: int) -> None:
        del total
        if name == "tune" and done == epoch:
            raise Interrupted

    return on_progress


@pytest.mark.parametrize(("every", "epoch"), [(1, 1), (1, 3), (2, 3), (3, 1)])
def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(
    case: Case, every: int, epoch: int
) -> None:
    config = case.config(checkpoint_every=every)
    undisturbed = case.tune(config, run="undisturbed", out="a")
    assert not undisturbed.resumed
    with pytest.raises(Interrupted):
        case.tune(config, run="cut", out="b", on_progress=interrupt_at(epoch))
    assert not (case.root / "b").exists()
    resumed = case.tune(config, run="cut", out="b")
    assert resumed.resumed == (epoch >= every)
    assert same(trained_state(case, "undisturbed"), trained_state(case, "cut"))
    assert resumed.curve == undisturbed.curve
    weights = [(case.root / out / "model.safetensors").read_bytes() for out in "ab"]
    assert weights[0] == weights[1]


def test_a_second_run_computes_no_feature_and_no_epoch_again(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = case.tune()

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr("svdmerge.training.objective.extract", refuse)
    monkeypatch.setattr("svdmerge.training.loop.Loop.run_epoch", refuse)
    second = case.tune()
    assert second.resumed
    assert [(r.name, r.accuracy) for r in second.rows] == [(r.name, r.accuracy) for r in first.rows]


def test_other_settings_train_afresh_and_other_places_do_not(case: Case) -> None:
    case.tune()
    assert case.tune(case.config(checkpoint_every=2), out="c").resumed
    assert not case.tune(case.config(learning_rate=0.01), out="d").resumed
    assert not case.tune(case.config(seed=1), out="e").resumed


def test_a_foreign_folder_is_never_replaced(case: Case) -> None:
    (case.root / "tuned").mkdir()
    (case.root / "tuned" / "precious.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds something else"):
        case.tune()
    assert (case.root / "tuned" / "precious.txt").read_text() == "mine"


def test_an_earlier_output_is_replaced_whole(case: Case) -> None:
    case.tune()
    (case.root / "tuned" / "stray.json").write_text("{}")
    case.tune(case.config(seed=1))
    assert not (case.root / "tuned" / "stray.json").exists()
    manifest = json.loads((case.root / "tuned" / "tune.json").read_text())
    assert set(manifest["files"]) == {
        "model.safetensors", "adapter.safetensors", "head.safetensors", "config.json",
    }  # fmt: skip


def test_a_target_and_an_output_elsewhere_work_alike(case: Case, memory_uri: str) -> None:
    local = case.tune()
    remote = tuning.tune(
        case.config(),
        base=case.base,
        merged=case.merged,
        sources=case.sources,
        factors=case.factors,
        parameters=case.parameters,
        run_folder=Folder.at(f"{memory_uri}/run"),
        out=Folder.at(f"{memory_uri}/tuned"),
        threads=1,
        use_ray=False,
        on_progress=lambda *_: None,
    )
    assert [r.accuracy for r in remote.rows] == [r.accuracy for r in local.rows]
    names = Folder.at(f"{memory_uri}/tuned").names()
    assert "tune.json" in names
    assert ".svdmerge-tune-partial" not in names


def test_a_loss_that_is_no_number_is_told_with_the_way_out(case: Case) -> None:
    with pytest.raises(TrainingError, match="the loss became nan"):
        case.tune(case.config(learning_rate=1e30, head_learning_rate=1e30))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere:build", "cannot be imported"),
        ("tiny_backbone:absent", "cannot be imported"),
        ("tiny_backbone", "cannot be imported"),
        ("tiny_backbone:build_number", "expected an nn.Module"),
        ("tiny_backbone:build_sequences", r"the backbone returned \[\d+, 1, 16\]"),
        ("tiny_backbone:build_other", "net.encoder.0.bias is missing from the checkpoint"),
        ("transformers:AutoModel", "cannot be built"),
    ],
)
def test_a_backbone_that_does_not_fit_is_told(case: Case, model: str, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        case.tune(case.config(model=model))


def test_nothing_to_tune_is_an_error(case: Case) -> None:
    with pytest.raises(TrainingError, match="none of 1 merged matrices can be tuned"):
        case.tune(parameters={"norm.weight": 1})
    with pytest.raises(TrainingError, match="takes part in the features"):
        case.tune(parameters={"pooler.weight": 4})


def test_an_untouched_matrix_trains_only_in_its_null_space(case: Case) -> None:
    parameters = dict.fromkeys(MATRICES, 4) | {"encoder.0.weight": 0}
    result = case.tune(parameters=parameters)
    assert result.row("tuned").trained == 3
    assert any("no merged components to tune" in n for n in result.notes)
    full = case.tune(case.config(null_space=True), parameters=parameters, out="full")
    assert full.row("tuned").trained == 6


def row(name: str, accuracy: float) -> Row:
    return Row(
        name=name, accuracy=accuracy, trained=0, trained_with_head=0, seconds=0.0, loo_error=None
    )


@pytest.mark.parametrize(
    ("tuned", "best", "said"),
    [
        (0.70, 0.80, "WORSE than not tuning: 0.700 after, 0.750 before"),
        (0.75, 0.70, "no clear difference"),
        (0.85, 0.80, "Tuning helped the merged model"),
        (0.78, 0.80, "best does better untuned, 0.800: use it instead"),
    ],
)
def test_the_verdict_says_plainly_what_pays(tuned: float, best: float, said: str) -> None:
    merged = row("merged", 0.75)
    told = verdict(
        tuned=row("tuned", tuned), merged=merged, others=(merged, row("best", best)), num_test=1000
    )
    assert said in told
