"""Planning a merge of large sharded checkpoints whose files are nothing but headers and holes."""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdmerge.storage.checkpoint import INDEX

Shapes = dict[str, tuple[int, ...]]
# Of a decoder of 20 billion parameters: 40 GB in bfloat16.
LAYERS, WIDTH, HIDDEN, VOCABULARY = 48, 6144, 16384, 50432


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """What the command took, in a process of its own, start-up and imports included."""

    num_bytes: int
    """Of the output's tensors."""
    num_tensors: int
    num_sources: int
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int


def decoder(
    *,
    layers: int = LAYERS,
    width: int = WIDTH,
    hidden: int = HIDDEN,
    vocabulary: int = VOCABULARY,
) -> Shapes:
    """Names and shapes of a Llama-like decoder."""
    shapes: Shapes = {
        "model.embed_tokens.weight": (vocabulary, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (vocabulary, width),
    }
    for i in range(layers):
        block = f"model.layers.{i}"
        shapes |= {f"{block}.self_attn.{n}_proj.weight": (width, width) for n in "qkvo"}
        shapes |= {f"{block}.mlp.{n}_proj.weight": (hidden, width) for n in ("gate", "up")}
        shapes[f"{block}.mlp.down_proj.weight"] = (width, hidden)
        shapes |= {f"{block}.{n}.weight": (width,) for n in ("input_layernorm", "post_norm")}
    return shapes


def write_sparse(folder: Path, shapes: Shapes, *, num_shards: int) -> Path:
    """A bfloat16 checkpoint whose data are holes: zeros that take no place on the disk."""
    folder.mkdir(parents=True)
    sizes = {name: 2 * math.prod(shape) for name, shape in shapes.items()}
    weight_map: dict[str, str] = {}
    limit, number, header, position = sum(sizes.values()) / num_shards, 1, dict[str, Any](), 0
    parts: list[tuple[dict[str, Any], int]] = []
    for name, size in sizes.items():
        offsets = [position, position + size]
        header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": offsets}
        weight_map[name] = f"model-{number:05d}-of-{num_shards:05d}.safetensors"
        position += size
        if position >= limit and number < num_shards:
            parts.append((header, position))
            number, header, position = number + 1, {}, 0
    parts.append((header, position))
    for i, (entries, end) in enumerate(parts, start=1):
        text = json.dumps(entries).encode()
        with (folder / f"model-{i:05d}-of-{num_shards:05d}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    return folder


def time_plan(root: Path, *, num_sources: int) -> Planned:
    """What `svdmerge plan` takes, start to end.

    The peak counts the caller's own memory too, if that is larger: call it from a small process.
    """
    recipe = root / "recipe.yml"
    fields = {
        "base_model": str(root / "base"),
        "models": [str(root / f"source-{i}") for i in range(num_sources)],
        "store": str(root / "store"),
        "out": str(root / "merged"),
        "resources": {"memory": "16GiB"},
    }
    recipe.write_text(json.dumps(fields))  # which is YAML too
    program = "from svdmerge.cli import main; main()"
    start = time.perf_counter()
    with (root / "plan.json").open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", program, "plan", str(recipe), "--json"], stdout=out
        )
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if process.returncode is None:
        process.returncode = os.waitstatus_to_exitcode(status)  # it was waited for
    found = json.loads((root / "plan.json").read_text())
    return Planned(
        num_bytes=found["output_bytes"],
        num_tensors=len(found["tensors"]),
        num_sources=found["num_sources"],
        seconds=seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_rss_bytes=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    )
