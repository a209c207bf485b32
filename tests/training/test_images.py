"""Images are decoded and scaled as the base's folder says, and a classifier of them is tuned."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_models import SIZE, encoded, moved, picture, vit
from transformers import ViTImageProcessorPil, ViTModel

from svdmerge.errors import TrainingError
from svdmerge.recipe import Recipe, TuneConfig, parse_recipe
from svdmerge.storage.checkpoint import open_checkpoint
from svdmerge.storage.filesystem import Folder
from svdmerge.training.data import Examples, load_target, load_training
from svdmerge.workflow import rank, run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base, two sources near it, and images in one folder per class."""
    torch.manual_seed(0)
    vit().save_pretrained(tmp_path / "base")
    for number in range(2):
        source = moved(ViTModel.from_pretrained(tmp_path / "base"), seed=number + 1)
        source.save_pretrained(tmp_path / f"source-{number}")
    for part, numbers in (("train", range(16)), ("test", range(16, 28))):
        for i in numbers:
            place = tmp_path / part / ("above", "left")[i % 2]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{i:03d}.png").write_bytes(encoded(picture(i % 2, seed=i)))
    return tmp_path


def config(folder: Path, **changes: Any) -> TuneConfig:
    fields: dict[str, Any] = {
        "task": "image", "train": str(folder / "train"), "test": str(folder / "test"),
        "input": "image", "epochs": 2, "num_values": 4, "batch_size": 8,
    }  # fmt: skip
    return TuneConfig.model_validate(fields | changes)


def recipe(folder: Path, **tune: Any) -> Recipe:
    return parse_recipe({
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / f"source-{i}"), "admit": True} for i in range(2)],
        "parameters": {"k": 4},
        "store": str(folder / "store"),
        "out": str(folder / "merged"),
        "tune": config(folder, **tune).model_dump(),
    })  # fmt: skip


def training(folder: Path, **changes: Any) -> Examples:
    return load_training(config(folder, **changes), base=open_checkpoint(str(folder / "base")))


def test_an_image_classifier_is_merged_tuned_and_exported(folder: Path) -> None:
    result = run(recipe(folder), address="none").tune
    assert [r.name for r in result.rows][2:] == ["merged", "tuned", "tuned, head in closed form"]
    assert result.classes == ("above", "left")
    assert len(rank(recipe(folder), address="none").sources) == 2
    assert result.row("merged").accuracy >= 0.75
    _, info = ViTModel.from_pretrained(folder / "merged-tuned", output_loading_info=True)
    assert not info["missing_keys"]


@pytest.mark.usefixtures("ray_session")
def test_workers_that_get_their_images_by_ray_data_end_with_the_numbers_of_one_process(
    folder: Path,
) -> None:
    settings = {"validation_share": 0.25, "epochs": 3, "num_workers": (1, 2)}
    found = {}
    for address in ("local", "none"):
        with_own = recipe(folder, **settings).model_copy(
            update={"store": str(folder / address), "out": str(folder / f"{address}-merged")}
        )
        found[address] = run(with_own, address=address).tune
    together, alone = found["local"], found["none"]
    assert together.best_epoch == alone.best_epoch
    assert together.num_held_out == alone.num_held_out == 4
    for a, b in zip(together.curve, alone.curve, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-4)
        assert a.held_out_loss == pytest.approx(b.held_out_loss, rel=1e-4)
    [progress] = (folder / "local").glob("runs/*/tune/*/progress.json")
    assert json.loads(progress.read_text())["epoch"] == 3


def by_hand(folder: Path, name: str, *, mean: float, std: float) -> torch.Tensor:
    image = Image.open(folder / "train" / name).convert("RGB")
    resized = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1).float() / 255
    return (pixels - mean) / std


def test_without_a_processor_images_take_the_configs_size_and_lie_between_minus_one_and_one(
    folder: Path,
) -> None:
    batch = training(folder).batch([0, 9])
    assert isinstance(batch, torch.Tensor)
    for found, name in zip(batch, ("above/000.png", "left/003.png"), strict=True):
        torch.testing.assert_close(found, by_hand(folder, name, mean=0.5, std=0.5))


def test_the_processor_beside_the_base_decides(folder: Path) -> None:
    processor = ViTImageProcessorPil(
        size={"height": SIZE, "width": SIZE}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]
    )
    processor.save_pretrained(folder / "base")
    batch = training(folder).batch([0])
    assert isinstance(batch, torch.Tensor)
    image = Image.open(folder / "train" / "above" / "000.png").convert("RGB")
    expected = processor(images=image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch, expected)


def table(folder: Path, images: pa.Array, name: str = "images.parquet") -> str:
    labels = [i % 2 for i in range(len(images))]
    pq.write_table(pa.table({"image": images, "label": labels}), folder / name)
    return str(folder / name)


def test_bytes_structs_paths_and_json_lines_hold_the_same_images(folder: Path) -> None:
    data = [encoded(picture(i % 2, seed=i)) for i in range(4)]
    paths = [f"train/{('above', 'left')[i % 2]}/{i:03d}.png" for i in range(4)]
    lines = [json.dumps({"image": p, "label": i % 2}) for i, p in enumerate(paths)]
    (folder / "images.jsonl").write_text("\n".join(lines))
    places = [
        table(folder, pa.array(data), "bytes.parquet"),
        table(folder, pa.array([{"bytes": d, "path": None} for d in data]), "struct.parquet"),
        table(folder, pa.array(paths), "paths.parquet"),
        str(folder / "images.jsonl"),
    ]
    digests = {training(folder, train=place).digest() for place in places}
    assert len(digests) == 1


def test_a_folder_in_another_filesystem_is_read_the_same(folder: Path, memory_uri: str) -> None:
    for path in (folder / "train").rglob("*.png"):
        name = path.relative_to(folder / "train").as_posix()
        Folder.at(memory_uri).put(name, path.read_bytes())
    assert training(folder, train=memory_uri).digest() == training(folder).digest()


def test_an_image_that_cannot_be_decoded_is_told_by_place(folder: Path) -> None:
    place = table(folder, pa.array([encoded(picture(0, seed=0)), b"no image"]))
    with pytest.raises(TrainingError, match=r"images\.parquet, row 1: is no image"):
        training(folder, train=place)
    (folder / "train" / "left" / "001.png").write_bytes(encoded(picture(0, seed=0))[:60])
    with pytest.raises(TrainingError, match=r"train, row 8: is no image"):
        training(folder)


def test_a_missing_path_and_an_empty_cell_are_told_by_place(folder: Path) -> None:
    with pytest.raises(TrainingError, match=r"row 0: its image gone\.png cannot be read"):
        training(folder, train=table(folder, pa.array(["gone.png", "gone.png"])))
    empty = pa.array(
        [{"bytes": None, "path": None}] * 2, pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    with pytest.raises(TrainingError, match="row 0: holds neither bytes nor a path"):
        training(folder, train=table(folder, empty))


def test_a_column_of_numbers_is_no_image(folder: Path) -> None:
    with pytest.raises(TrainingError, match="column `image` is int64"):
        training(folder, train=table(folder, pa.array([1, 2])))


def test_folders_must_agree_on_their_classes_and_hold_images(folder: Path) -> None:
    base = open_checkpoint(str(folder / "base"))
    (folder / "test" / "left").rename(folder / "test" / "right")
    with pytest.raises(TrainingError, match="the sub-folder right is no class"):
        load_target(config(folder), base=base)
    (folder / "train" / "stray.png").write_bytes(b"")
    with pytest.raises(TrainingError, match=r"holds stray\.png in no sub-folder"):
        load_target(config(folder), base=base)
    (folder / "bare").mkdir()
    with pytest.raises(TrainingError, match="no image in a sub-folder"):
        load_target(config(folder, train=str(folder / "bare")), base=base)


def test_a_processor_that_cannot_be_used_is_told(folder: Path) -> None:
    (folder / "base" / "preprocessor_config.json").write_text("{")
    with pytest.raises(TrainingError, match=r"its preprocessor_config\.json cannot be used"):
        training(folder)


def test_a_camera_held_sideways_and_a_model_of_grey_images_are_understood(folder: Path) -> None:
    upright = picture(0, seed=0)
    turned, exif = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # stored turned left by a quarter
    buffer = io.BytesIO()
    turned.save(buffer, "PNG", exif=exif)
    same = table(folder, pa.array([encoded(upright), buffer.getvalue()]))
    inputs = training(folder, train=same).inputs
    assert torch.equal(inputs[0], inputs[1])
    settings = json.loads((folder / "base" / "config.json").read_text())
    (folder / "base" / "config.json").write_text(json.dumps(settings | {"num_channels": 1}))
    batch = training(folder).batch([0])
    assert isinstance(batch, torch.Tensor)
    assert list(batch.shape) == [1, 1, SIZE, SIZE]
