"""What a recipe's words suggest and its plan does not do is told, on the terminal too."""

from pathlib import Path

import pytest
import torch
from merging import Bench, command, micro_bench, micro_model

from svdmerge.engine.notices import notices


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return micro_bench(tmp_path)


def test_nothing_unusual_is_nothing_told(bench: Bench) -> None:
    for changes in ({}, {"parameters": {"k": "100%"}}, {"parameters": {"k": 9}}):
        assert notices(bench.plan(**changes)) == []


def test_a_count_above_a_matrix_rank_is_told(bench: Bench) -> None:
    (told,) = notices(bench.plan(parameters={"k": 10}))
    assert "k: 10 is more than the rank of 1 matrices, first b.weight of rank 9" in told
    assert notices(bench.plan(merge_method="average", parameters={})) == []


def test_a_policy_that_fits_no_tensor_is_told(bench: Bench) -> None:
    policies = [{"match": "*.bias", "policy": "base"}, {"match": "nosuch*", "policy": "base"}]
    assert notices(bench.plan(policies=policies)) == [
        "policies: 'nosuch*' matches no tensor of the base"
    ]


def test_all_is_in_the_report_and_on_the_terminal(bench: Bench) -> None:
    micro_model(bench.sources[0], seed=1, base=bench.base, extra=torch.ones(3))
    changes = {"parameters": {"k": 1000}, "policies": [{"match": "nosuch*", "policy": "base"}]}
    told = bench.run(**changes).warnings
    assert [word in line for word, line in zip(("extra", "1000", "nosuch"), told, strict=True)] == [
        True
    ] * 3
    done = command("run", bench.write_recipe(**changes), "--address", "none")
    shown = " ".join(done.stdout.split())
    for word in ("tensors that the base lacks", "k: 1000 is more", "'nosuch*' matches no"):
        assert word in shown
