"""The drawing demo, shortened: every stage follows the other, and pictures are there to look at."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from svdmerge.core.kind.replace import layers_of
from svdmerge.errors import OutputError, RecipeError
from svdmerge.kind.diffusion import train_diffusion
from svdmerge.kind.drawing_demo import DrawingResult, DrawingSettings, run_drawing_demo
from svdmerge.kind.folder import load, read
from svdmerge.storage.filesystem import Folder
from svdmerge.training.kind.diffusion import Diffusion
from svdmerge.training.kind.objective import Settings

SHORT = DrawingSettings(
    width=24, depth=1, steps=40, transfer_steps=20, num_learngenes=8, sample_steps=10,
    classifier_epochs=5,
)  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drawing")


@pytest.fixture(scope="module")
def result(out: Path) -> DrawingResult:
    return run_drawing_demo(out, address="none", settings=SHORT)


def test_a_recombined_model_draws_as_the_full_one_does_with_fewer_parameters(
    result: DrawingResult,
) -> None:
    rows = {row.name: row for row in result.rows}
    full, small = rows["the same, two digits"], rows["recombined"]
    assert result.max_difference <= 1e-5
    assert small.held_out_loss == pytest.approx(full.held_out_loss, abs=1e-5)
    assert small.parameters < full.parameters
    assert small.flops is not None
    assert full.flops is not None
    assert small.flops < full.flops
    assert result.classifier_accuracy > 0.8


def test_pictures_are_written_for_every_model(result: DrawingResult) -> None:
    assert len(result.pictures) == len(result.rows) == 5
    picture = np.asarray(Image.open(io.BytesIO(Path(result.pictures[0]).read_bytes())))
    assert picture.shape == (7 * 9 * 4, 10 * 9 * 4)
    assert picture.max() > 100


def test_learngenes_and_other_matrices_stand_still_in_transfer(
    result: DrawingResult, out: Path
) -> None:
    del result
    old, new = (load(read(Folder.at(out / name))) for name in ("model", "transferred"))
    for path, layer in layers_of(new).items():
        source, num = layers_of(old)[path], SHORT.num_learngenes
        assert torch.equal(layer.u[:, :num], source.u[:, :num])
        assert torch.equal(layer.vh[:num], source.vh[:num])
        assert not torch.equal(layer.u[:, num:], source.u[:, num : layer.u.shape[1]])
    assert torch.equal(new.get_parameter("final.weight"), old.get_parameter("final.weight"))
    assert not torch.equal(
        new.get_parameter("class_embed.weight"), old.get_parameter("class_embed.weight")[:3]
    )


def test_the_same_call_again_reads_what_was_trained(result: DrawingResult, out: Path) -> None:
    again = run_drawing_demo(out, address="none", settings=SHORT)
    assert [r.held_out_loss for r in again.rows] == [r.held_out_loss for r in result.rows]


def test_an_objective_without_a_gate_and_a_foreign_folder_are_errors(
    result: DrawingResult, out: Path, tmp_path: Path
) -> None:
    del result
    dense = Diffusion(
        network=SHORT.network(2), train=str(out / "train.parquet"), classes=(0, 1), spec=None
    )
    settings = Settings(steps=1, batch_size=2, learning_rate=1e-3)

    def train(folder: Path) -> None:
        train_diffusion(
            dense, settings=settings, names=("0", "1"), out=Folder.at(folder),
            store=Folder.at(tmp_path / "store"), use_ray=False, on_step=lambda step: None,
        )  # fmt: skip

    with pytest.raises(RecipeError, match="its gate does not know 0, 1"):
        train(tmp_path / "new")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds something else"):
        train(tmp_path / "foreign")
