"""FP8 weights and their scales: by tensor, by channel or by block, in whatever file they lie."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from svdmerge.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from svdmerge.storage.checkpoint import TensorRef

FP8 = frozenset({"F8_E4M3", "F8_E5M2"})
# What checkpoints call a weight's scale; all of them multiply it, "inv" or not.
_SUFFIXES = ("_scale_inv", "_scale")
# Of activations: no weight depends on them.
_IGNORED = (".input_scale", ".activation_scale", ".k_scale", ".v_scale")
# Where a configuration names no size of blocks: that of the models that introduced them.
_BLOCK = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What a quantised tensor is multiplied by."""

    ref: "TensorRef"
    blocks: tuple[int, ...]
    """Entries of the tensor per entry of the scale, dimension by dimension."""


def scaled(
    tensors: Mapping[str, "TensorRef"], *, config: Mapping[str, Any], place: str
) -> dict[str, "TensorRef"]:
    """The tensors, the FP8 ones with their scales; scales are no tensors of the model any more.

    Raises:
        CheckpointError: the model is quantised in another way, a scale is missing where the
            configuration promises one, or it fits its weight in no way.
    """
    quantised = {name: ref for name, ref in tensors.items() if ref.dtype in FP8}
    settings = _settings(config, place)
    if not quantised:
        return dict(tensors)
    scales: dict[str, str] = {}
    for name, ref in quantised.items():
        found = next((n for s in _SUFFIXES if (n := f"{name}{s}") in tensors), None)
        if found is None and settings:
            raise CheckpointError(
                f"{place}: {name} is {ref.dtype} and has no scale",
                f"Expected {name}{_SUFFIXES[0]} or {name}{_SUFFIXES[1]} in one of its files.",
                "Fetch the checkpoint again, or dequantise it first.",
            )
        if found is not None:
            scales[name] = found
    gone = set(scales.values())
    block = _block(settings, place)
    kept = {n: r for n, r in tensors.items() if n not in gone and not n.endswith(_IGNORED)}
    for name, scale in scales.items():
        kept[name] = replace(kept[name], scale=_fitted(kept[name], tensors[scale], block, place))
    return kept


def _settings(config: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    raw = config.get("quantization_config")
    if not isinstance(raw, dict):
        return {}
    settings = cast(dict[str, Any], raw)
    method = str(settings.get("quant_method", ""))
    if method not in ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "finegrained_fp8"):
        raise CheckpointError(
            f"{place}: is quantised by {method or 'a method it does not name'}",
            "Of quantised weights only FP8 with its scales is read.",
            "Dequantise the checkpoint first.",
        )
    return settings


def _block(settings: Mapping[str, Any], place: str) -> Sequence[int]:
    block = settings.get("weight_block_size") or (_BLOCK, _BLOCK)
    if not isinstance(block, Sequence) or not all(type(b) is int and b > 0 for b in block):
        raise CheckpointError(
            f"{place}: its weight_block_size is {block!r}", "Expected two lengths.", "Correct it."
        )
    return cast(Sequence[int], block)


def _fitted(ref: "TensorRef", scale: "TensorRef", block: Sequence[int], place: str) -> Scale:
    sizes, shape = tuple(scale.shape), ref.shape
    if scale.numel == 1:
        sizes = (1,) * len(shape)
    elif len(sizes) == 1 and len(shape) > 1:  # one for each channel
        sizes = (*sizes, *(1,) * (len(shape) - 1))
    whole = (1,) * (len(shape) - len(block)) + tuple(block)
    blocks = tuple(
        1 if s == d else d if s == 1 else b for s, d, b in zip(sizes, shape, whole, strict=False)
    )
    if len(sizes) != len(shape) or any(
        -(-d // max(1, b)) != s for s, d, b in zip(sizes, shape, blocks, strict=False)
    ):
        raise CheckpointError(
            f"{place}: {scale.name} is {list(scale.shape)}",
            f"It does not fit {ref.name} {list(shape)} in blocks of {list(block)}.",
            "Do not use this checkpoint unless you know who wrote it.",
        )
    return Scale(ref=replace(scale, shape=sizes), blocks=blocks)


def dequantised(
    values: "torch.Tensor", scale: Scale, *, shape: Sequence[int], start: int
) -> "torch.Tensor":
    """Values of a tensor of that shape from element `start` on, flat, times their scales; float32.

    Whole rows, for only these are ever read.
    """
    import torch

    width = shape[-1] if shape else 1
    rows = torch.arange(start // width, (start + len(values)) // width)
    index: list[torch.Tensor] = []
    for size, block in zip(reversed(shape[:-1]), reversed(scale.blocks[:-1]), strict=True):
        index.insert(0, rows % size // block)
        rows = rows // size
    by_row = scale.ref.read().to(torch.float32)[tuple(index)]
    by_row = by_row.reshape(-1, scale.ref.shape[-1] if shape else 1)
    entries = by_row.repeat_interleave(scale.blocks[-1] if shape else 1, dim=1)[:, :width]
    return (values.to(torch.float32).reshape(-1, width) * entries).reshape(-1)
