"""FP8 weights are read as what they stand for, whatever their scales are of and lie in."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from svdmerge.errors import CheckpointError
from svdmerge.recipe import parse_recipe
from svdmerge.storage.checkpoint import open_checkpoint
from svdmerge.workflow import run

FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 3]}}
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def weights(shape: tuple[int, ...], dtype: torch.dtype = E4M3) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(shape).to(dtype)


def saved(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] = FP8) -> str:
    """A model whose scales lie in a shard of their own."""
    folder.mkdir(parents=True)
    parts = {"a.safetensors": {n: t for n, t in tensors.items() if "scale" not in n}}
    parts["b.safetensors"] = {n: t for n, t in tensors.items() if "scale" in n}
    for file, part in parts.items():
        save_file(part, folder / file)
    index = {n: file for file, part in parts.items() for n in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def by_blocks(weight: Tensor, scale: Tensor, rows: int, columns: int) -> Tensor:
    """Entry by entry."""
    found = weight.float().clone()
    for i in range(found.shape[0]):
        for j in range(found.shape[1]):
            found[i, j] *= scale[i // rows, j // columns]
    return found


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("shape", [(8, 6), (9, 7)])
def test_scales_of_blocks(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = weights(shape, dtype)
    scale = torch.rand(-(-shape[0] // 4), -(-shape[1] // 3)) + 0.5
    place = saved(tmp_path / "m", {"x.weight": weight, "x.weight_scale_inv": scale})
    checkpoint = open_checkpoint(place)
    assert list(checkpoint.tensors) == ["x.weight"]
    wanted = by_blocks(weight, scale, 4, 3)
    ref = checkpoint.tensors["x.weight"]
    assert torch.equal(ref.read(), wanted)
    some = ref.read_bytes(start=2 * shape[1], count=3 * shape[1])
    assert torch.equal(ref.decode(some, start=2 * shape[1]), wanted[2:5].reshape(-1))


@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([[0.5]])])
def test_a_scale_of_the_tensor(tmp_path: Path, scale: Tensor) -> None:
    weight = weights((5, 4))
    place = saved(tmp_path / "m", {"x.weight": weight, "x.weight_scale": scale})
    assert torch.equal(open_checkpoint(place).tensors["x.weight"].read(), weight.float() * 0.5)


@pytest.mark.parametrize("shape", [(5,), (5, 1)])
def test_scales_of_channels(tmp_path: Path, shape: tuple[int, ...]) -> None:
    weight, scale = weights((5, 4)), torch.arange(1.0, 6.0)
    place = saved(tmp_path / "m", {"x.weight": weight, "x.weight_scale": scale.reshape(shape)})
    wanted = weight.float() * scale[:, None]
    assert torch.equal(open_checkpoint(place).tensors["x.weight"].read(), wanted)


def test_scales_of_a_stack_of_experts(tmp_path: Path) -> None:
    weight, scale = weights((3, 8, 6)), torch.rand(3, 2, 2) + 0.5
    place = saved(tmp_path / "m", {"experts": weight, "experts_scale_inv": scale})
    wanted = torch.stack([by_blocks(w, s, 4, 3) for w, s in zip(weight, scale, strict=True)])
    ref = open_checkpoint(place).tensors["experts"]
    assert torch.equal(ref.read(), wanted)
    second = ref.decode(ref.read_bytes(start=48, count=48), start=48)
    assert torch.equal(second, wanted[1].reshape(-1))


def test_values_without_a_scale_are_what_they_are(tmp_path: Path) -> None:
    weight = weights((4, 4), E5M2)
    save_file({"x.weight": weight}, tmp_path / "model.safetensors")
    assert torch.equal(open_checkpoint(str(tmp_path)).tensors["x.weight"].read(), weight.float())


def test_a_scale_that_is_missing_is_told(tmp_path: Path) -> None:
    place = saved(tmp_path / "m", {"x.weight": weights((4, 4)), "y_scale": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"x.weight is F8_E4M3 and has no scale"):
        open_checkpoint(place)


@pytest.mark.parametrize("shape", [(2, 3), (7,), (4, 4, 4), (0,)])
def test_a_scale_that_does_not_fit_is_told(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = {"x.weight": weights((8, 6)), "x.weight_scale_inv": torch.ones(shape)}
    with pytest.raises(CheckpointError, match="does not fit"):
        open_checkpoint(saved(tmp_path / "m", tensors))


@pytest.mark.parametrize("block", [["x", 3], [0, 0], 5, [128, None]])
def test_blocks_that_are_no_lengths_are_told(tmp_path: Path, block: object) -> None:
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": block}}
    tensors = {"x.weight": weights((8, 6)), "x.weight_scale_inv": torch.ones(1, 1)}
    with pytest.raises(CheckpointError, match="weight_block_size"):
        open_checkpoint(saved(tmp_path / "m", tensors, config))


def test_other_quantisations_are_refused_by_name(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "gptq"}}
    tensors = {"x.qweight": torch.zeros(2, 2, dtype=torch.int32), "x_scale": torch.ones(1)}
    with pytest.raises(CheckpointError, match="quantised by gptq"):
        open_checkpoint(saved(tmp_path / "m", tensors, config))


def test_a_base_in_fp8_and_a_source_in_bfloat16_merge_to_bfloat16(tmp_path: Path) -> None:
    weight, scale = weights((8, 6)), torch.rand(2, 2) + 0.5
    tuned = by_blocks(weight, scale, 4, 3) + 0.05 * torch.outer(torch.arange(8.0), torch.ones(6))
    base = saved(tmp_path / "base", {"x.weight": weight, "x.weight_scale_inv": scale})
    (tmp_path / "tuned").mkdir()
    save_file({"x.weight": tuned.bfloat16()}, tmp_path / "tuned" / "model.safetensors")
    recipe = parse_recipe(
        {
            "base_model": base, "models": [str(tmp_path / "tuned")],
            "parameters": {"k": "100%"},
            "store": str(tmp_path / "store"), "out": str(tmp_path / "out"),
        }
    )  # fmt: skip
    run(recipe, address="none")
    merged = open_checkpoint(str(tmp_path / "out"))
    assert merged.tensors["x.weight"].dtype == "BF16"
    assert list(merged.tensors) == ["x.weight"]
    assert torch.equal(merged.tensors["x.weight"].read(), tuned.bfloat16())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
