"""Frozen weights shared out over two processes: half the bytes on each, the same numbers.

Real: two processes, gloo, FSDP. Made up: the model and the data.
"""

from typing import Any

import pytest
import torch
from tiny_backbone import FEATURES
from torch import nn
from torch.distributed import destroy_process_group, init_process_group
from torch.multiprocessing.spawn import spawn
from tune_case import NUM_CLASSES, make_case

from svdmerge.storage.filesystem import Folder
from svdmerge.training.checkpointing import State, load_file, save_file
from svdmerge.training.data import load_target
from svdmerge.training.loop import Group, Loop
from svdmerge.training.objective import objective_of
from svdmerge.training.sharding import blocks, held_bytes
from svdmerge.training.trainee import HEAD, Job, build_trainee

WORLD = 2


def trained(job: Job, group: Group, *, sharded: bool, epochs: int, start: State | None) -> State:
    """A state after some epochs, with the bytes that this process holds of frozen weights."""
    examples = load_target(job.config, base=job.base).train
    trainee = build_trainee(
        job, examples=examples, objective=objective_of(job.config), device=torch.device("cpu"),
        sharded=sharded,
    )  # fmt: skip
    loop = Loop(trainee, examples=examples, config=job.config, group=group)
    if start is not None:
        loop.restore(start)
    for _ in range(epochs):
        loop.run_epoch()
    return loop.state() | {"held_bytes": held_bytes(trainee.backbone.module)}


def process(rank: int, job: Job) -> None:
    """One of the processes: an unsharded training, a sharded one, and one resumed half way."""
    torch.set_num_threads(1)
    meeting = f"file://{job.folder.path()}/meeting"
    init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD)
    group = Group(rank=rank, world=WORLD)
    whole = trained(job, group, sharded=False, epochs=4, start=None)
    parts = trained(job, group, sharded=True, epochs=4, start=None)
    half = trained(job, group, sharded=True, epochs=2, start=None)
    resumed = trained(job, group, sharded=True, epochs=2, start=half)
    found = {"whole": whole, "parts": parts, "resumed": resumed}
    save_file(job.folder, f"found-{rank}.pt", found)
    destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, State]]:
    """What each process found. 25 of 36 examples train in batches of 8, each in parts of 3, so the
    last batch has one row and one process none; 11 are held out, in shares of 6 and 5."""
    case = make_case(tmp_path_factory.mktemp("case"))
    config = case.config(
        num_workers=WORLD, shard=True, validation_share=0.3, accumulate=3, patience=9
    )
    folder = Folder.at(case.root / "job")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(NUM_CLASSES, FEATURES, generator=generator)
    save_file(folder, HEAD, {"weight": weight, "bias": torch.zeros(NUM_CLASSES)})
    job = Job(
        config=config, base=case.base, merged=case.merged, factors=case.factors,
        parameters=case.parameters, folder=folder, threads=1,
    )  # fmt: skip
    spawn(process, args=(job,), nprocs=WORLD)
    alone = trained(job, Group(), sharded=False, epochs=4, start=None)
    return [load_file(folder, f"found-{rank}.pt") | {"alone": alone} for rank in range(WORLD)]


def numbers(state: State) -> dict[str, Any]:
    held_out = [point["held_out_loss"] for point in state["curve"]]
    return {**state["sigma_change"], **state["head"], "held_out": torch.tensor(held_out)}


@pytest.mark.parametrize("rank", range(WORLD))
def test_a_sharded_training_has_the_values_of_an_unsharded_one(
    found: list[dict[str, State]], rank: int
) -> None:
    whole, parts = numbers(found[rank]["whole"]), numbers(found[rank]["parts"])
    assert any(float(v.abs().max()) > 0.01 for n, v in whole.items() if n.startswith("encoder"))
    for name, values in whole.items():
        torch.testing.assert_close(parts[name], values, rtol=1e-5, atol=1e-5)


def test_a_process_without_rows_of_a_batch_changes_nothing(found: list[dict[str, State]]) -> None:
    alone, parts = numbers(found[0]["alone"]), numbers(found[0]["parts"])
    for name, values in alone.items():
        # Sums in another order, which AdamW's first steps divide by their own size.
        torch.testing.assert_close(parts[name], values, rtol=1e-3, atol=1e-4)


def test_a_process_holds_about_half_of_the_frozen_bytes(found: list[dict[str, State]]) -> None:
    [whole] = {int(f["whole"]["held_bytes"]) for f in found}
    held = [int(f["parts"]["held_bytes"]) for f in found]
    assert whole <= sum(held) < 1.05 * whole  # rows are whole: an odd one is on one process
    assert max(held) < 0.55 * whole


def test_a_resumed_sharded_training_goes_on_bit_for_bit(found: list[dict[str, State]]) -> None:
    for of_process in found:
        parts, resumed = numbers(of_process["parts"]), numbers(of_process["resumed"])
        assert all(torch.equal(parts[name], resumed[name]) for name in parts)
    first, second = (numbers(of_process["parts"]) for of_process in found)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_blocks_are_the_members_of_outermost_lists_that_hold_weights() -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    nested = nn.ModuleList([nn.ModuleList([nn.Linear(2, 2)])])
    model = nn.ModuleDict({
        "embeddings": nn.Embedding(3, 2),
        "encoder": nn.ModuleDict({"layer": nn.ModuleList([inner, nn.GELU()])}),
        "nested": nested,
    })  # fmt: skip
    assert list(blocks(model)) == [inner, nested[0][0]]  # pyright: ignore
