"""Training examples into Ray Train's workers by Ray Data: prepared once, in parallel, in order.

Workers draw other examples each epoch, and the draw is a function of (seed, epoch) and row numbers
alone, so that any number of workers takes the same steps. So the rows carry their numbers, each
worker receives them all (few-shot targets are small), and puts them in order.
"""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors import torch as files
from torch import Tensor

from svdmerge.recipe import TuneConfig
from svdmerge.storage.checkpoint import Checkpoint
from svdmerge.training.data import Column, Examples, draw_training, prepare

# Of one task that tokenises or decodes: enough to be worth a task, few enough to spread out.
ROWS_PER_BLOCK = 256
# What a plain tensor is called among an example's columns.
_PLAIN = ""


def dataset(config: TuneConfig, *, base: Checkpoint) -> Any:
    """A Ray Data set of the drawn training examples: row, label, and inputs as safetensors.

    It is computed here, once for all workers and restarts, and lies in Ray's object store.

    Raises:
        TrainingError: as `load_training`.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    # Its bars would run through ours, and a line that says so once is no news to a user.
    context.enable_progress_bars = False
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    column = draw_training(config)
    table = pa.table({
        "row": np.arange(len(column.labels)),
        "number": column.numbers,
        "label": column.labels,
        "input": column.inputs.combine_chunks(),
    })  # fmt: skip
    starts = range(0, table.num_rows, ROWS_PER_BLOCK)
    blocks = ray.data.from_arrow([table.slice(start, ROWS_PER_BLOCK) for start in starts])
    preparation = _Preparation(config=config, base=base, path=column.path)
    prepared = blocks.map_batches(preparation, batch_format="pyarrow", batch_size=None)
    return prepared.materialize()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Preparation:
    """Raw rows to inputs."""

    config: TuneConfig
    base: Checkpoint
    path: str

    def __call__(self, table: pa.Table) -> pa.Table:
        column = Column(
            path=self.path,
            inputs=table.column("input"),
            labels=table.column("label").to_numpy(),
            numbers=table.column("number").to_numpy(),
        )
        examples = prepare(column, config=self.config, base=self.base)
        inputs: list[Any] = list(examples.inputs)
        packed = [files.save({_PLAIN: x} if isinstance(x, Tensor) else x) for x in inputs]
        return pa.table({
            "row": table.column("row"),
            "label": table.column("label"),
            "inputs": pa.array(packed, pa.large_binary()),
        })  # fmt: skip


def received(shard: Any, *, like: Examples) -> Examples:
    """The examples of a worker's part of the data set, in the order of their rows.

    `like` holds, with or without rows, how the driver's examples are padded and scaled.
    """
    parts: list[pa.Table] = list(shard.iter_batches(batch_format="pyarrow", batch_size=None))
    table = pa.concat_tables(parts).sort_by("row")
    inputs = [files.load(packed) for packed in table.column("inputs").to_pylist()]
    plain = all(set(x) == {_PLAIN} for x in inputs)
    return Examples(
        inputs=torch.stack([x[_PLAIN] for x in inputs]) if plain else inputs,
        labels=torch.from_numpy(table.column("label").to_numpy().copy()),
        padding=like.padding,
        scaling=like.scaling,
    )
