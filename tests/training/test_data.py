"""Reading, drawing, ordering and batching a target's examples."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tune_case import make_case

from svdmerge.errors import TrainingError
from svdmerge.recipe import TuneConfig
from svdmerge.storage.filesystem import Folder
from svdmerge.training.data import (
    Examples,
    draw,
    epoch_order,
    global_batches,
    load_target,
    load_training,
    share,
)


@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    per_class=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_a_draw_takes_so_many_of_every_class_the_same_each_time(
    counts: list[int], per_class: int, seed: int
) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    rows = draw(labels, per_class=per_class, seed=seed)
    assert rows == sorted(set(rows))
    assert np.bincount(labels[rows]).tolist() == [min(c, per_class) for c in counts]
    assert rows == draw(labels, per_class=per_class, seed=seed)


def test_a_draw_of_more_contains_the_draw_of_fewer_and_another_seed_draws_others() -> None:
    labels = np.arange(300) % 3
    few, many, other = (
        set(draw(labels, per_class=n, seed=s)) for n, s in ((5, 0), (20, 0), (5, 1))
    )
    assert few < many
    assert few != other
    assert len(draw(labels, per_class=None, seed=0)) == 300


def test_a_known_draw_stays_what_it_was() -> None:
    """The hash is a contract: results of different versions are on the same examples."""
    assert draw(np.arange(20) % 2, per_class=2, seed=0) == EXPECTED_DRAW


EXPECTED_DRAW = [1, 8, 13, 14]


@given(
    num=st.integers(1, 60), batch_size=st.integers(1, 20), world=st.integers(1, 5),
    epoch=st.integers(0, 50),
)  # fmt: skip
def test_workers_share_each_global_batch_whole_and_without_overlap(
    num: int, batch_size: int, world: int, epoch: int
) -> None:
    order = epoch_order(num, seed=0, epoch=epoch)
    assert sorted(order) == list(range(num))
    assert order == epoch_order(num, seed=0, epoch=epoch)
    for batch in global_batches(order, batch_size=batch_size):
        parts = [share(batch, rank=r, world=world) for r in range(world)]
        assert sorted(i for part in parts for i in part) == sorted(batch)


def test_every_epoch_has_its_own_order() -> None:
    assert len({tuple(epoch_order(30, seed=0, epoch=e)) for e in range(10)}) == 10


def test_texts_are_padded_to_the_longest_of_their_batch() -> None:
    rows = [
        {"input_ids": torch.arange(1, n + 1), "attention_mask": torch.ones(n, dtype=torch.int64)}
        for n in (4, 2, 3)
    ]
    padding = {"input_ids": 7, "attention_mask": 0}
    examples = Examples(inputs=rows, labels=torch.tensor([0, 1, 0]), padding=padding)
    batch = examples.batch([1, 2])
    assert isinstance(batch, dict)
    assert batch["input_ids"].tolist() == [[1, 2, 7], [1, 2, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert examples.by_length() == [1, 2, 0]


def config(train: Path, test: Path, **changes: Any) -> TuneConfig:
    fields: dict[str, Any] = {"task": "tensor", "input": "x", "train": str(train)}
    return TuneConfig(**(fields | {"test": str(test)} | changes))


def write(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write(tmp_path / "good.parquet", x=[[0.0, 1.0]] * 4, label=[0, 1, 0, 1])


def no_column(p: Path) -> Path:
    return write(p, y=[[1.0]], label=[0])


def float_labels(p: Path) -> Path:
    return write(p, x=[[1.0], [2.0]], label=[0.0, 1.0])


def gap(p: Path) -> Path:
    return write(p, x=[[1.0]] * 2, label=[0, 2])


def far_apart(p: Path) -> Path:
    return write(p, x=[[1.0]] * 3, label=[0, 1, 2**62])


def late_start(p: Path) -> Path:
    return write(p, x=[[1.0]] * 2, label=[1, 2])


def no_number(p: Path) -> Path:
    return write(p, x=[[1.0, 2.0], [1.0, float("nan")]], label=[0, 1])


def null_inside(p: Path) -> Path:
    return write(p, x=[[[1.0], [2.0]], [[None], [1.0]]], label=[0, 1])


def negative(p: Path) -> Path:
    return write(p, x=[[1.0]] * 2, label=[-1, 0])


def one_class(p: Path) -> Path:
    return write(p, x=[[1.0]] * 2, label=[0, 0])


def nulls(p: Path) -> Path:
    return write(p, x=[[1.0], None], label=[0, 1])


def empty(p: Path) -> Path:
    return write(p, x=pa.array([], pa.list_(pa.float32())), label=pa.array([], pa.int32()))


def ragged(p: Path) -> Path:
    return write(p, x=[[1.0], [1.0, 2.0]], label=[0, 1])


def strings(p: Path) -> Path:
    return write(p, x=[["a"], ["b"]], label=[0, 1])


def not_parquet(p: Path) -> Path:
    p.write_bytes(b"text,label\n")
    return p


FAULTS = [
    (no_column, "has no column `x`"),
    (float_labels, "column `label` is double"),
    (gap, "no example of class 1"),
    (far_apart, "no example of class 2"),
    (late_start, "no example of class 0"),
    (no_number, "row 1: column `x` holds NaN, Inf or nulls"),
    (null_inside, "row 1: column `x` holds NaN, Inf or nulls"),
    (negative, "holds the label -1"),
    (one_class, "holds one class"),
    (nulls, "column `x` holds 1 nulls"),
    (empty, "has no rows"),
    (ragged, "lists of 2 lengths"),
    (strings, "holds string"),
    (not_parquet, "cannot be read as parquet"),
    (lambda p: p, "cannot be read as parquet"),
]


@pytest.mark.parametrize(("make", "message"), FAULTS)
def test_a_wrong_file_is_told_by_name(make: Any, message: str, good: Path) -> None:
    path = make(good.parent / "bad.parquet")
    base = make_case(good.parent / "case").base
    with pytest.raises(TrainingError, match=message) as told:
        load_target(config(path, good), base=base)
    assert "bad.parquet" in str(told.value)


def test_a_test_label_that_training_lacks_is_told(good: Path) -> None:
    test = write(good.parent / "test.parquet", x=[[1.0, 2.0]], label=[2])
    base = make_case(good.parent / "case").base
    with pytest.raises(TrainingError, match=r"test\.parquet: column `label` holds the label 2"):
        load_target(config(good, test), base=base)


def test_text_wants_strings(good: Path) -> None:
    base = make_case(good.parent / "case").base
    with pytest.raises(TrainingError, match="`task: text` needs strings"):
        load_target(config(good, good, task="text"), base=base)


def test_a_class_with_fewer_examples_than_asked_for_is_noted(good: Path) -> None:
    base = make_case(good.parent / "case").base
    target = load_target(config(good, good, per_class=3), base=base)
    assert "2 classes have fewer than 3 training examples; class 0 has 2" in target.notes


def test_measuring_on_the_training_file_is_noted(good: Path) -> None:
    base = make_case(good.parent / "case").base
    notes = load_target(config(good, good), base=base).notes
    assert any("says nothing of new examples" in note for note in notes)


FIXED = pa.array([[[1, 2], [3, 4]], [[5, 6], [7, 8]]], pa.list_(pa.list_(pa.int8(), 2), 2))
LISTS = pa.array([[[1, 2], [3, 4]], [[5, 6], [7, 8]]], pa.list_(pa.list_(pa.float64())))


@pytest.mark.parametrize("column", [FIXED, LISTS])
def test_nested_lists_become_one_float_tensor(column: pa.Array, tmp_path: Path) -> None:
    path = write(tmp_path / "images.parquet", x=column, label=[0, 1])
    base = make_case(tmp_path / "case").base
    inputs = load_training(config(path, path), base=base).inputs
    assert isinstance(inputs, torch.Tensor)
    assert inputs.dtype == torch.float32
    assert inputs.tolist() == [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]


def test_examples_are_read_from_any_filesystem(good: Path, memory_uri: str) -> None:
    Folder.at(memory_uri).put("target.parquet", good.read_bytes())
    place = f"{memory_uri}/target.parquet"
    base = make_case(good.parent / "case").base
    settings = config(good, good).model_copy(update={"train": place, "test": place})
    target = load_target(settings, base=base)
    assert target.num_classes == 2
    assert target.train.digest() == load_target(config(good, good), base=base).train.digest()
