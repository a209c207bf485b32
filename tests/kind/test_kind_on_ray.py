"""Decomposable training under Ray Train: the numbers of one process.

Real: Ray, its workers, gloo, checkpoints on disk. Made up: the data.
"""

import pytest
import torch
from kind_task import task

from svdmerge.kind import folder, workflow
from svdmerge.kind.recipe import parse_kind_recipe
from svdmerge.storage.filesystem import Folder


@pytest.mark.usefixtures("ray_session")
def test_two_workers_end_with_the_numbers_of_one_process(tmp_path, monkeypatch):
    # Batches of 15: the workers' parts differ in size, the last one's are of 5 and 5.
    raw = task(tmp_path, steps=12, batch_size=15)
    # Places relative to where the command runs, which is not where workers do.
    monkeypatch.chdir(tmp_path)
    raw["train"] |= {"base_model": "base", "train": "train.parquet", "test": "./test.parquet"}
    states, curves = [], []
    for address, workers in (("none", 1), ("local", 2)):
        own = {"model": str(tmp_path / address), "store": str(tmp_path / f"{address}-store")}
        wanted = raw | own | {"train": raw["train"] | {"num_workers": workers}}
        curves.append(workflow.train(parse_kind_recipe(wanted), address=address).curve)
        states.append(folder.read(Folder.at(own["model"])).state)
    for one, other in zip(*curves, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    for name, value in states[0].items():
        # Softmax cancels a key's bias: its gradient is rounding alone, which Adam makes steps of.
        if not name.endswith("key.bias"):
            torch.testing.assert_close(value, states[1][name], rtol=1e-3, atol=1e-4)
