"""A causal language model goes through merging and tuning, judged in nats per token."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import LETTERS, gpt2, moved, save_tokenizer, text
from transformers import GPT2LMHeadModel, GPT2Model

from svdmerge.errors import TrainingError
from svdmerge.recipe import Recipe, TuneConfig, parse_recipe
from svdmerge.storage.checkpoint import open_checkpoint
from svdmerge.training.backbone import build_backbone, load_weights
from svdmerge.training.data import load_target
from svdmerge.training.language import nll_per_example
from svdmerge.training.result import TuneResult
from svdmerge.workflow import rank, run

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base that knows a little of the target, two sources near it, and texts."""
    torch.manual_seed(0)
    base = gpt2()
    base.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    for number in range(2):
        source = moved(gpt2_of(tmp_path / "base"), seed=number + 1)
        source.save_pretrained(tmp_path / f"source-{number}")
    for name, numbers in (("train", range(16)), ("test", range(16, 28))):
        lines = [json.dumps({"text": text(i)}) for i in numbers]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def gpt2_of(folder: Path) -> Any:
    return GPT2LMHeadModel.from_pretrained(folder).eval()


def recipe(folder: Path, parameters: Any = None, **tune: Any) -> Recipe:
    settings = {
        "task": "causal_lm", "train": str(folder / "train.jsonl"), "epochs": 6,
        "test": str(folder / "test.jsonl"), "learning_rate": 0.3, "num_values": 8, "batch_size": 8,
    }  # fmt: skip
    return parse_recipe({
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / f"source-{i}"), "admit": True} for i in range(2)],
        "parameters": parameters or {"k": 8},
        "store": str(folder / "store"),
        "out": str(folder / "merged"),
        "tune": settings | tune,
    })  # fmt: skip


def own_nll(model: Any, line: str) -> float:
    ids = torch.tensor([[LETTERS.index(letter) + 1 for letter in line]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1]
    return float(F.cross_entropy(logits, ids[0, 1:]))


def test_each_text_costs_the_mean_nats_of_its_predicted_tokens_whatever_the_padding(
    folder: Path,
) -> None:
    config = recipe(folder).tune
    assert isinstance(config, TuneConfig)
    base = open_checkpoint(str(folder / "base"))
    backbone = build_backbone(config, base=base)
    load_weights(backbone, checkpoint=base, base=base)
    found = nll_per_example(backbone, load_target(config, base=base).test, device=CPU)
    model = gpt2_of(folder / "base")
    expected = [own_nll(model, text(i)) for i in range(16, 28)]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_a_language_model_is_merged_and_tuned_and_its_export_has_the_rows_likelihood(
    folder: Path,
) -> None:
    report = run(recipe(folder), address="none")
    result: TuneResult = report.tune
    names = [row.name for row in result.rows]
    assert names[0] == "base"
    assert names[2:] == ["merged", "tuned"]
    tuned, merged = result.row("tuned"), result.row("merged")
    assert tuned.nll is not None
    assert merged.nll is not None
    assert tuned.nll < merged.nll - 0.05
    assert tuned.perplexity == pytest.approx(math.exp(tuned.nll))
    assert tuned.trained == tuned.trained_with_head == 4 * 8
    assert result.curve[-1].loss < result.curve[0].loss
    [stored] = (folder / "store").glob("runs/*/attempts/*/run.json")
    kept = json.loads(stored.read_text())["tune"]
    assert [point["loss"] for point in kept["curve"]] == [p.loss for p in result.curve]
    assert kept["rows"][-1]["nll"] == tuned.nll
    assert result.best_source == min(result.sources, key=lambda s: s.loo_error).name
    assert "nats per token after" in result.verdict
    adapted = gpt2_of(folder / "merged-tuned")
    nll = sum(own_nll(adapted, text(i)) for i in range(16, 28)) / 12
    assert nll == pytest.approx(tuned.nll, abs=1e-4)
    assert not (folder / "merged-tuned" / "head.safetensors").exists()
    assert TuneResult.from_json(result.to_json()) == result


def trained_on_texts(folder: Path) -> Any:
    """The base, its matrices trained for a few steps on texts like the target's."""
    model = gpt2_of(folder / "base").requires_grad_(False)
    blocks = [p for n, p in model.named_parameters() if ".h." in n and p.dim() == 2]
    optimizer = torch.optim.Adam([p.requires_grad_() for p in blocks], lr=0.02)
    for step in range(30):
        ids = torch.tensor(
            [[LETTERS.index(x) + 1 for x in text(7 * i + step)[:10]] for i in range(8)]
        )
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model


def test_the_source_that_knows_the_texts_ranks_first_and_is_merged_where_asked(
    folder: Path,
) -> None:
    trained_on_texts(folder).save_pretrained(folder / "source-1")
    found = rank(recipe(folder), address="none")
    assert found.sources[0].name == str(folder / "source-1")
    assert found.sources[0].low > 0
    config = recipe(folder).tune
    assert isinstance(config, TuneConfig)
    base = open_checkpoint(str(folder / "base"))
    expected = [own_nll(gpt2_of(folder / "base"), text(i)) for i in range(16)]
    assert found.num_examples == len(load_target(config, base=base).train) == 16
    assert found.base_loss == pytest.approx(sum(expected) / 16, rel=1e-4)
    chosen = recipe(folder, parameters={"k": 8, "salience": "target", "scale": "auto"})
    report = run(chosen, address="none")
    assert report.tune.row("merged").nll < report.tune.row("base").nll


def test_the_output_layer_stays_tied_and_frozen(folder: Path) -> None:
    run(recipe(folder, epochs=1), address="none")
    start, adapted = gpt2_of(folder / "base"), gpt2_of(folder / "merged-tuned")
    assert torch.equal(adapted.lm_head.weight, start.transformer.wte.weight)
    assert adapted.lm_head.weight is adapted.transformer.wte.weight


def test_a_checkpoint_saved_without_its_output_layer_is_a_language_model_too(
    folder: Path,
) -> None:
    whole = gpt2_of(folder / "base")
    bare = GPT2Model(whole.config)
    bare.load_state_dict(whole.transformer.state_dict())
    bare.save_pretrained(folder / "bare")
    save_tokenizer(folder / "bare")
    config = recipe(folder).tune
    assert isinstance(config, TuneConfig)
    found: list[torch.Tensor] = []
    for name in ("base", "bare"):
        base = open_checkpoint(str(folder / name))
        backbone = build_backbone(config, base=base)
        load_weights(backbone, checkpoint=base, base=base)
        test = load_target(config, base=base).test
        found.append(nll_per_example(backbone, test, device=CPU))
    assert torch.equal(*found)


def test_a_text_of_which_nothing_can_be_foretold_is_told_by_row(folder: Path) -> None:
    (folder / "train.jsonl").write_text('{"text": "abc"}\n{"text": ""}\n')
    with pytest.raises(TrainingError, match=r"train\.jsonl, row 1: its text has 0 tokens"):
        run(recipe(folder), address="none")


def test_likelihoods_that_are_no_numbers_are_told_and_never_reported(folder: Path) -> None:
    with pytest.raises(TrainingError, match=r"likelihoods of 12 of 12 examples are NaN or Inf"):
        run(recipe(folder, learning_rate=1e25, epochs=1, batch_size=64), address="none")


def test_a_model_without_next_token_scores_is_told(folder: Path) -> None:
    with pytest.raises(TrainingError, match="the language model returned"):
        run(recipe(folder, model="transformers:AutoModel"), address="none")
