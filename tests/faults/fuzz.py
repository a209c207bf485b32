"""Damaged and hostile checkpoints: each is opened, or refused in our own words, within a bound of
memory. Run as a program: `python fuzz.py FOLDER SEED COUNT`; prints what came of them."""

import json
import random
import resource
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from svdmerge.errors import SvdmergeError
from svdmerge.storage.adapter import adapter_file, open_adapter
from svdmerge.storage.architecture import BaseNames
from svdmerge.storage.checkpoint import open_checkpoint
from svdmerge.storage.filesystem import Folder

# What opening may allocate above what the process holds before.
MEMORY_BYTES = 512 << 20
NUMBERS = (-1, 0, 1, 2, 7, 8, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30, -(10**30), 1.5, 9e99)
NAMES = (
    "..",
    "../x",
    "/etc/passwd",
    "a/../../x",
    "\0",
    "x" * 300,
    "é",
    "",
    "file://x",
    "C:\\",
    ".",
)
DTYPES = ("F32", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "F4", "", "f32", "Q" * 99)


def valid(rng: random.Random) -> tuple[dict[str, Any], bytes]:
    """A header and its data: a few small tensors, one after another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for i in range(rng.randint(1, 4)):
        shape = [rng.randint(0, 3) for _ in range(rng.randint(0, 3))]
        size = 4
        for n in shape:
            size *= n
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [position, position + size]}
        header[f"layer.{i}.weight"] = entry
        position += size
    return header, rng.randbytes(position)


def encoded(text: bytes, data: bytes, length: int | None = None) -> bytes:
    length = len(text) if length is None else length
    return (length % 2**64).to_bytes(8, "little") + text + data


def deep(rng: random.Random) -> bytes:
    depth = rng.choice((10, 1000, 100_000))
    return rng.choice((b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth))


def mutated(rng: random.Random) -> bytes:
    """The bytes of a safetensors file to which one or more things were done."""
    header, data = valid(rng)
    names = [n for n in header if n != "__metadata__"]
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        entry = header[rng.choice(names)]
        change = rng.randrange(9)
        if change == 0:
            entry["dtype"] = rng.choice((*DTYPES, 3, None, ["F32"]))
        elif change == 1:
            entry["shape"] = rng.choice(([rng.choice(NUMBERS)], "12", None, [[2]], [True], {}))
        elif change == 2:
            entry["shape"] = [rng.choice(NUMBERS) for _ in range(rng.randint(0, 9))]
        elif change == 3:
            entry["data_offsets"] = rng.choices(NUMBERS, k=rng.choice((0, 1, 2, 2, 3)))
        elif change == 4:
            entry["data_offsets"] = [rng.randint(-8, 24), rng.randint(-8, 48)]
        elif change == 5:
            entry.pop(rng.choice(list(entry) or ["x"]), None)
        elif change == 6:
            header[rng.choice(NAMES)] = dict(entry)
        elif change == 7:
            header["__metadata__"] = rng.choice((None, 3, {"format": 4}, [1], "x", {"a": {"b": 1}}))
        else:
            header[rng.choice(names)] = rng.choice((None, 3, "x", [1, 2]))
            break
    text = json.dumps(header).encode()
    change = rng.randrange(16)
    if change == 0:
        lengths = (0, 1, len(text) - 1, len(text) + 1, 10**8, 2**40, -1)
        return encoded(text, data, rng.choice(lengths))
    if change == 1:
        whole = encoded(text, data)
        return whole[: rng.randrange(len(whole) + 1)]
    if change == 2:
        whole = bytearray(encoded(text, data))
        for _ in range(rng.randint(1, 8)):
            whole[rng.randrange(len(whole))] = rng.randrange(256)
        return bytes(whole)
    if change == 3:
        return encoded(deep(rng), data)
    if change == 4:  # a name twice
        twice = text[:-1] + b"," + json.dumps({names[0]: header[names[0]]}).encode()[1:]
        return encoded(twice, data)
    if change == 5:
        return encoded(text.replace(b"layer", rng.choice((b"\xff\xfe", b"\xc3\x28"))), data)
    if change == 6:
        return encoded(text, data + rng.randbytes(rng.randint(1, 9)))
    if change == 7:
        return encoded(text.replace(b'"shape"', b'"shape": NaN, "x"'), data)
    return encoded(text, data)


def sharded(folder: Path, rng: random.Random) -> None:
    """A model whose index was damaged; its one shard may be damaged too."""
    header, data = valid(rng)
    shard = "model-00001-of-00001.safetensors"
    whole = encoded(json.dumps(header).encode(), data) if rng.random() < 0.5 else mutated(rng)
    (folder / shard).write_bytes(whole)
    names = [n for n in header if n != "__metadata__"]
    target = rng.choice((shard, *NAMES, 3, None, [shard]))
    weight_map: Any = {n: rng.choice((shard, target)) for n in names}
    weight_map = rng.choice((weight_map, weight_map, weight_map, None, [], "x", {}))
    metadata = rng.choice(({}, None, {"total_size": -1}))
    raw = json.dumps({"metadata": metadata, "weight_map": weight_map}).encode()
    if rng.random() < 0.2:
        cut = raw[: rng.randrange(len(raw))]
        raw = rng.choice((deep(rng), cut, rng.randbytes(20), b"", b"null"))
    (folder / "model.safetensors.index.json").write_bytes(raw)


def single(folder: Path, rng: random.Random) -> None:
    (folder / "model.safetensors").write_bytes(mutated(rng))
    if rng.random() < 0.2:
        config = rng.choice((b"{", b"[]", b'{"vocab_size": -3}', b'{"vocab_size": "x"}', deep(rng)))
        (folder / "config.json").write_bytes(config)


def open_whole(folder: Path) -> None:
    """Open a model and read each of its tensors."""
    for ref in open_checkpoint(str(folder)).tensors.values():
        ref.read_bytes()


SHAPES = {"layer.0.weight": (2, 3), "layer.1.weight": (4, 4), "layer.1.bias": (4,)}


def adapter(folder: Path, rng: random.Random) -> None:
    """An adapter of two layers to which something was done."""
    tensors: dict[str, Any] = {}
    position = 0
    for i, (m, n) in enumerate(((2, 3), (4, 4))):
        rank = rng.choice((0, 1, 2, 2, 2))
        for half, shape in (("A", [rank, n]), ("B", [m, rng.choice((rank, rank, rank, 3))])):
            if rng.random() < 0.08:
                continue
            name = rng.choice(("layer", "layer", "layer", "base_model.model.layer", "x", "lora_te"))
            size = 4 * shape[0] * shape[1]
            offsets = [position, position + size]
            entry = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
            tensors[f"{name}.{i}.lora_{half}.weight"] = entry
            position += size
    text = json.dumps(tensors).encode()
    whole = encoded(text, bytes(position)) if rng.random() < 0.8 else mutated(rng)
    (folder / "adapter_model.safetensors").write_bytes(whole)
    config: Any = {"peft_type": "LORA", "r": 2, "lora_alpha": rng.choice((*NUMBERS, "x", None))}
    config["rank_pattern"] = rng.choice(({}, {"(": 3}, {"layer.0": rng.choice(NUMBERS)}, [], "x"))
    config["target_modules"] = rng.choice((["layer"], None, 3))
    raw = rng.choice((json.dumps(config).encode(),) * 4 + (b"[]", b"{", deep(rng)))
    (folder / "adapter_config.json").write_bytes(raw)


def open_adapted(folder: Path) -> None:
    """Open an adapter and read each of its factors."""
    found = adapter_file(Folder.at(folder))
    assert found is not None
    for delta in open_adapter(*found, base=BaseNames(shapes=SHAPES, config={})).low_rank.values():
        delta.read()


KINDS: tuple[tuple[Callable[[Path, random.Random], None], Callable[[Path], None]], ...] = (
    (single, open_whole), (single, open_whole), (sharded, open_whole), (adapter, open_adapted),
)  # fmt: skip


def main(root: Path, seed: int, count: int) -> Counter[str]:
    """What came of each: `opened`, or the class of our error. Anything else is raised."""
    root.mkdir()
    found: Counter[str] = Counter()
    for i in range(count):
        rng = random.Random(f"{seed}-{i}")
        make, use = KINDS[i % len(KINDS)]
        folder = root / "model"
        folder.mkdir()
        make(folder, rng)
        before = {p.name for p in folder.iterdir()}
        try:
            use(folder)
            found["opened"] += 1
        except SvdmergeError as error:
            found[type(error).__name__] += 1
        except BaseException:
            sys.stderr.write(f"seed {seed}, case {i}\n")
            raise
        if {p.name for p in folder.iterdir()} != before or len(list(root.iterdir())) != 1:
            raise AssertionError(f"seed {seed}, case {i}: something was written")
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    return found


if __name__ == "__main__":
    import torch  # noqa: F401  what reading needs is no growth

    with Path("/proc/self/statm").open() as statm:
        held = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_BYTES,) * 2)
    outcome = main(Path(sys.argv[1]) / "fuzz", int(sys.argv[2]), int(sys.argv[3]))
    sys.stdout.write(json.dumps(outcome))
