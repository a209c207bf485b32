"""Diffusion as an objective: what is random, what each class reaches, what is learnt and drawn."""

import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_images import NETWORK, tiny_diffusion, write_images

from svdmerge.core.kind.replace import layers_of
from svdmerge.errors import TrainingError
from svdmerge.storage.filesystem import Folder
from svdmerge.training.kind.denoising import held_out_losses, samples
from svdmerge.training.kind.diffusion import unread
from svdmerge.training.kind.fit import fit_kind
from svdmerge.training.kind.objective import Settings
from svdmerge.training.labelled_images import read_labelled_images


@pytest.fixture
def table(tmp_path: Path) -> str:
    return write_images(tmp_path / "images.parquet")


def test_losses_of_a_batch_are_those_of_its_images_one_by_one(table: str) -> None:
    task = tiny_diffusion(table)
    model, rows = task.model(), [5, 0, 11, 7]
    torch.nn.init.normal_(model.get_parameter("final.weight"))
    together = task.losses(model, rows, step=3)
    apart = torch.cat([task.losses(model, [row], step=3) for row in rows])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(task.losses(model, rows, step=4), together)


def test_an_image_reaches_the_tailors_of_its_class_alone_unless_the_gate_is_random(
    table: str,
) -> None:
    for random_gate in (False, True):
        task = tiny_diffusion(table, random_gate=random_gate)
        model = task.model()
        with torch.no_grad():  # nothing reaches a layer behind a branch that is switched off
            for name, parameter in model.named_parameters():
                if "modulation" in name or name.startswith("final"):
                    parameter.normal_(std=0.1)
        labels = task.labels
        rows = (labels == 1).nonzero()[:, 0].tolist()
        task.losses(model, rows, step=0).sum().backward()
        for layer in layers_of(model).values():
            assert layer.s.grad is not None
            reached = set(layer.group[layer.s.grad != 0].tolist())
            assert reached == ({0, 1, 2, 3} if random_gate else {0, 2})


def test_losses_are_taken_where_the_model_is(table: str) -> None:
    task = tiny_diffusion(table)
    # Of tensors without values: whatever stayed on the CPU would be refused.
    assert task.losses(task.model().to("meta"), [0, 1, 2], step=0).device.type == "meta"


def test_training_learns_and_the_same_call_again_reads_the_result(
    table: str, tmp_path: Path
) -> None:
    task = tiny_diffusion(table, test=table, pictures=str(tmp_path / "pictures"))
    settings = Settings(
        steps=60, batch_size=8, learning_rate=3e-3, warmup_steps=5, measure_every=30, ema=0.9
    )
    folder, opener = Folder.at(tmp_path / "job"), partial(unread, task)
    assert pickle.loads(pickle.dumps(opener))().num_examples == 24
    state = fit_kind(opener, settings=settings, folder=folder, use_ray=False, on_step=_unseen)
    held = [p["held_out_loss"] for p in state["curve"] if "held_out_loss" in p]
    assert len(held) == 2
    assert held[1] < held[0]
    names = sorted(p.name for p in (tmp_path / "pictures").iterdir())
    assert names == ["samples-000030.png", "samples-000060.png"]
    again = fit_kind(opener, settings=settings, folder=folder, use_ray=False, on_step=_unseen)
    assert again["curve"] == state["curve"]


def test_held_out_losses_are_the_same_draws_for_every_model_and_gate(table: str) -> None:
    images = read_labelled_images(table, channels=1, size=8).of_classes((0, 1, 3))
    model = tiny_diffusion(table).model()
    first = held_out_losses(model, images)
    assert torch.equal(first, held_out_losses(model, images))
    # A new model predicts zero whatever its gate: only the draws are left in its losses.
    assert torch.equal(first, held_out_losses(model, images, gates=(images.labels + 1) % 3))
    assert torch.equal(first, held_out_losses(tiny_diffusion(table, spec=None).model(), images))


def test_samples_follow_from_the_seed_and_stay_within_pixels(table: str) -> None:
    model = tiny_diffusion(table).model()
    made = samples(model, [0, 2], shape=(1, 8, 8), num_steps=4, seed=1)
    assert made.shape == (2, 1, 8, 8)
    assert float(made.abs().max()) <= 1.0
    assert torch.equal(made, samples(model, [0, 2], shape=(1, 8, 8), num_steps=4, seed=1))


def test_images_of_another_size_and_classes_without_images_are_errors(table: str) -> None:
    with pytest.raises(TrainingError, match="8 x 8 pixels"):
        read_labelled_images(table, channels=1, size=16)
    with pytest.raises(TrainingError, match=r"\[7\] have no image"):
        _ = tiny_diffusion(table, classes=(0, 1, 7)).num_examples
    with pytest.raises(TrainingError, match="3 classes for 2"):
        tiny_diffusion(table, classes=(0, 1))
    assert NETWORK.num_classes == 3


def _unseen(step: int) -> None:
    del step
