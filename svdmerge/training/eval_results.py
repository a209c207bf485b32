"""What a tuned model reached on a dataset of the hub, as the hub's model pages read it."""

import re

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from svdmerge.recipe import TuneConfig
from svdmerge.training.result import TuneResult

FOLDER = ".eval_results"
_ON_HUB = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/")


def eval_results(config: TuneConfig, result: TuneResult, *, row: str) -> dict[str, bytes]:
    """Files by path: one, with the row's figure on the test examples; none where the test is of no
    dataset of the hub, for the hub knows no other.

    The dataset is the one that `tune.dataset` names, or that `tune.test` lies in. The figure is the
    accuracy from 0 to 1, or of a language model nats per predicted token.

    Reference: https://huggingface.co/docs/hub/eval-results
    """
    found = _ON_HUB.match(config.test)
    dataset = config.dataset or (found[1] if found else None)
    if dataset is None:
        return {}
    measured = result.row(row)
    what = "accuracy" if measured.nll is None else "nats per predicted token"
    entry = EvalResultEntry(
        dataset_id=dataset,
        task_id=config.dataset_task,
        value=round(measured.accuracy if measured.nll is None else measured.nll, 6),
        dataset_revision=found[2] if found and config.dataset is None else None,
        notes=f"{what} on {result.num_test} examples, after training {measured.trained} singular "
        f"values on {result.num_train}",
    )
    text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
    return {f"{FOLDER}/{dataset.rpartition('/')[2]}.yaml": text.encode()}
