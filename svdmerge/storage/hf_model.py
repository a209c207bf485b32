"""The output in the base's layout: weights streamed by tiles, index and side files."""

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float

from svdmerge.core.components import RankOneComponents, none
from svdmerge.core.delta import DTYPE, all_finite
from svdmerge.core.params import Action, Parameter
from svdmerge.errors import CheckpointError, ContentError, StoreError
from svdmerge.storage.checkpoint import (
    FLOATING,
    ITEM_BYTES,
    SINGLE,
    TILE,
    TORCH_NAMES,
    Checkpoint,
    TensorRef,
)
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.manifest import Committed
from svdmerge.storage.quantised import FP8

RECIPE = "svdmerge_recipe.yml"
PROVENANCE = "provenance/components.parquet"
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# Of configurations and tokenizers; the largest vocabularies stay well below.
MAX_SIDE_FILE_BYTES = 100 << 20
SIDE_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
# Where the base was tuned or merged by svdmerge, its claims are not the output's, and a PEFT
# configuration would make loaders apply an adapter to it.
NOT_COPIED = ("_manifest.json", "tune.json", "targets.json", "adapter_config.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputTensor:
    """A tensor of the output: the base's, and the matrices to add to it."""

    base: TensorRef
    dtype: str
    matrices: tuple[Parameter, ...]

    @property
    def nbytes(self) -> int:
        """Size in the output."""
        return self.base.numel * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenFile:
    """A file as it was written."""

    file: str
    size: int
    sha256: str


def output_tensors(
    base: Checkpoint, *, parameters: Sequence[Parameter], out_dtype: str
) -> list[OutputTensor]:
    """Every tensor of the output, in the base's order of names; integers keep their dtype."""
    by_tensor: dict[str, list[Parameter]] = {}
    for p in parameters:
        if p.action is not Action.EQUAL:
            by_tensor.setdefault(p.tensor, []).append(p)
    return [
        OutputTensor(
            base=ref,
            dtype=_written_as(ref, out_dtype),
            matrices=tuple(by_tensor.get(name, ())),
        )
        for name, ref in base.tensors.items()
    ]


def _written_as(ref: TensorRef, out_dtype: str) -> str:
    if ref.dtype not in FLOATING:
        return ref.dtype
    # FP8 would need scales of its own: merged weights are written without.
    return DTYPES.get(out_dtype, "BF16" if ref.dtype in FP8 else ref.dtype)


def split(tensors: Sequence[OutputTensor], *, max_bytes: int) -> dict[str, list[OutputTensor]]:
    """Tensors by file name: one `model.safetensors`, or numbered shards of at most `max_bytes`.

    A tensor larger than that gets a shard of its own.
    """
    shards: list[list[OutputTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    total = len(shards)
    return {f"model-{i:05d}-of-{total:05d}.safetensors": s for i, s in enumerate(shards, start=1)}


def index_json(files: Mapping[str, Sequence[OutputTensor]]) -> bytes:
    """The index of a sharded model; `total_size` counts bytes."""
    every = [t for tensors in files.values() for t in tensors]
    weight_map = {t.base.name: file for file, tensors in files.items() for t in tensors}
    metadata = {
        "total_size": sum(t.nbytes for t in every),
        "total_parameters": sum(t.base.numel for t in every),
    }
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


def write_safetensors(
    folder: Folder, file: str, *, tensors: Sequence[OutputTensor], factors: Folder
) -> WrittenFile:
    """A weights file, streamed: memory is that of a tile and one matrix's factors, whatever the
    file's size.

    The safetensors library writes from tensors that are all in memory, so the header (the format's
    few lines) is made here.
    """
    committed = load_factors(factors)
    header = _header(tensors)
    digest, size = hashlib.sha256(), 0
    tiles = (output_tiles(t, factors=committed) for t in tensors)
    blocks = itertools.chain([header], itertools.chain.from_iterable(tiles))
    with folder.writing(file) as out:
        for block in blocks:
            out.write(block)
            digest.update(block)
            size += len(block)
    return WrittenFile(file=file, size=size, sha256=digest.hexdigest())


def load_factors(folder: Folder) -> Committed:
    """The merged factors in a run's folder."""
    return Committed.load(folder, commits="", data="")


def output_tiles(tensor: OutputTensor, *, factors: Committed) -> Iterator[bytes]:
    """A tensor of the output as stored, by tiles: the base's own bytes where nothing is added or
    cast.

    Raises:
        ContentError: a value does not fit the output's dtype.
    """
    if not tensor.matrices and tensor.dtype == tensor.base.dtype:
        for start in range(0, tensor.base.numel, TILE):
            yield tensor.base.read_bytes(start=start, count=min(TILE, tensor.base.numel - start))
        return
    for _, merged in merged_tiles(tensor, factors=factors):
        cast = merged.to(getattr(torch, TORCH_NAMES[tensor.dtype]))
        if not all_finite(cast) and (tensor.matrices or all_finite(merged)):
            largest = float(merged.nan_to_num(posinf=math.inf, neginf=-math.inf).abs().max())
            raise ContentError(
                f"{tensor.base.name}: overflows {tensor.dtype}",
                f"Its largest value is {largest:.3g}.",
                "Use a wider `out_dtype`, or smaller weights and `scale`.",
            )
        yield cast.view(torch.uint8).numpy().tobytes()


def merged_tiles(
    tensor: OutputTensor, *, factors: Committed
) -> Iterator[tuple[int, Float[torch.Tensor, " t"]]]:
    """Base + merged difference in float64, before the cast: tiles of entries one after another, and
    the first entry of each."""
    for p in tensor.matrices or (_as_row(tensor.base),):
        added = read_factors(factors, p) if tensor.matrices else none(p.m, p.n)
        for rows, columns in _tiles(p):
            start = p.start + rows.start * p.n + columns.start
            data = tensor.base.read_bytes(start=start, count=len(rows) * len(columns))
            part = RankOneComponents(
                u=added.u[rows.start : rows.stop], s=added.s,
                vh=added.vh[:, columns.start : columns.stop],
            )  # fmt: skip
            yield start, tensor.base.decode(data).to(DTYPE) + part.dense().reshape(-1)


def _as_row(ref: TensorRef) -> Parameter:
    return Parameter(id="", tensor=ref.name, start=0, m=1, n=ref.numel, action=Action.BASE)


def _tiles(p: Parameter) -> Iterator[tuple[range, range]]:
    """Rows and columns of a matrix's tiles, each without a gap in memory: whole rows, or parts of
    one."""
    height = max(1, TILE // max(1, p.n))
    width = max(1, p.n if height > 1 else TILE)
    for first in range(0, p.m, height):
        for left in range(0, p.n, width):
            yield range(first, min(first + height, p.m)), range(left, min(left + width, p.n))


def read_factors(factors: Committed, parameter: Parameter) -> RankOneComponents:
    """The merged factors of a matrix, in float64."""
    depth = factors.depth(parameter.id)
    if depth == 0:
        if parameter.id not in factors:
            raise StoreError(
                f"{factors.store.uri}: {parameter.id} has no merged factors",
                "The run that should have stored them did not finish.",
                "Run the same command again.",
            )
        return none(parameter.m, parameter.n)
    return factors.read(parameter.id, range(depth)).to(DTYPE)


def _header(tensors: Sequence[OutputTensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        entries[tensor.base.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.base.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    # Padded to eight bytes, as the library does, so that the data are aligned.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def copy_side_files(base: Checkpoint, out: Folder) -> list[str]:
    """Configuration and tokenizer files copied from the base's folder; their names."""
    found = base.folder.names()
    # An index of other weights (.bin, a variant) would point at files that are not there.
    skipped = (".index.json", *NOT_COPIED)
    names = [n for n in found if n.endswith(SIDE_SUFFIXES) and not n.endswith(skipped)]
    if "modules.json" in names:  # sentence-transformers keep their pooling in folders named there
        names += [f"{path}/config.json" for path in _module_folders(base) if path in found]
    copied: list[str] = []
    for name in names:
        stat = base.folder.stat(name)
        if stat is not None and stat.size <= MAX_SIDE_FILE_BYTES:
            out.put(name, _unquantised(base) if name == "config.json" else base.folder.read(name))
            copied.append(name)
    return copied


def _unquantised(base: Checkpoint) -> bytes:
    """The base's configuration, without a quantisation that the output does not have."""
    if "quantization_config" not in base.config:
        return base.folder.read("config.json")
    config = {k: v for k, v in base.config.items() if k != "quantization_config"}
    return (json.dumps(config, indent=2) + "\n").encode()


def _module_folders(base: Checkpoint) -> list[str]:
    """What a `modules.json` names; the caller takes only what lies directly in the base's folder.

    Raises:
        CheckpointError: it is not valid JSON.
    """
    try:
        modules = json.loads(base.folder.read("modules.json"))
    except ValueError as error:
        raise CheckpointError(
            f"{base.folder.uri}/modules.json: not valid JSON", str(error), "Fetch it again."
        ) from None
    listed: list[Any] = modules if isinstance(modules, list) else []
    return [str(m["path"]) for m in listed if isinstance(m, dict) and m.get("path")]
