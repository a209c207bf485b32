"""The tuned model's figure on its test, as huggingface_hub reads it back."""

from pathlib import Path

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries
from tune_case import make_case

from svdmerge.recipe import TuneConfig
from svdmerge.training.eval_results import eval_results
from svdmerge.training.result import Row, TuneResult

ROW = Row(
    name="tuned", accuracy=0.875, trained=9, trained_with_head=12, seconds=1.0, loo_error=None
)
RESULT = TuneResult(
    rows=(ROW,), sources=(), best_source="", curve=(), notes=(), verdict="", resumed=False, out="",
    num_train=36, num_test=90, num_classes=3,
)  # fmt: skip


def test_a_test_on_the_hub_names_its_dataset_and_revision() -> None:
    config = TuneConfig(train="-", test="hf://datasets/org/cats@abc123/test.parquet")
    ((path, text),) = eval_results(config, RESULT, row="tuned").items()
    (entry,) = parse_eval_result_entries(yaml.safe_load(text))
    assert path == ".eval_results/cats.yaml"
    assert (entry.dataset_id, entry.dataset_revision) == ("org/cats", "abc123")
    assert (entry.task_id, entry.value) == ("default", 0.875)
    assert entry.notes == "accuracy on 90 examples, after training 9 singular values on 36"


def test_a_dataset_of_no_hub_is_not_claimed_to_be_one() -> None:
    for test in ("data/test.parquet", "s3://datasets/org/cats/test.parquet"):
        assert eval_results(TuneConfig(train="-", test=test), RESULT, row="tuned") == {}
    with pytest.raises(ValueError, match="dataset"):
        TuneConfig(train="-", test="-", dataset="cats")


def test_a_tuned_folder_holds_the_result_among_its_files(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    result = case.tune(case.config(dataset="org/cats", dataset_task="easy"))
    text = (tmp_path / "tuned" / ".eval_results" / "cats.yaml").read_text()
    (entry,) = parse_eval_result_entries(yaml.safe_load(text))
    assert (entry.dataset_id, entry.task_id) == ("org/cats", "easy")
    assert entry.value == round(result.row("tuned").accuracy, 6)
    assert ".eval_results/cats.yaml" in (tmp_path / "tuned" / "tune.json").read_text()
