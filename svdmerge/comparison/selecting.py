"""Made-up spectra for measuring the selection: in a store as a decomposition leaves it."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from svdmerge.core.params import Action, Parameter
from svdmerge.engine.plan import Plan
from svdmerge.storage import layout
from svdmerge.storage.checkpoint import SINGLE
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.manifest import Commit, Covered, Entry
from svdmerge.storage.shards import Block, Spectrum, encode_spectra

# Exponents of the sources' spectra, as measured on fine-tuned models.
STEEPNESS = (0.6, 0.9)
# What a stored block would take: its bytes are not there, for a selection reads none of them.
STUB = b"a shard without components"


def hollow_model(folder: Path, *, num_matrices: int, rank: int) -> Path:
    """A checkpoint of square bfloat16 matrices whose header is real and whose bytes are a hole."""
    size = 2 * rank * rank
    header: dict[str, object] = {"__metadata__": {"name": folder.name}}
    for i in range(num_matrices):
        header[f"layers.{i:04d}.weight"] = {
            "dtype": "BF16", "shape": [rank, rank], "data_offsets": [i * size, (i + 1) * size],
        }  # fmt: skip
    text = json.dumps(header).encode()
    folder.mkdir(parents=True)
    with (folder / SINGLE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + num_matrices * size)
    (folder / "config.json").write_text("{}")
    return folder


def made_spectrum(source: int, parameter: Parameter) -> Spectrum:
    """All values of a matrix: a power law, whose size and exponent follow from the names."""
    digest = hashlib.sha256(f"{source} {parameter.id}".encode()).hexdigest()
    generator = np.random.default_rng(int(digest[:16], 16))
    s = made_values(parameter.rank, generator)
    return Spectrum(
        parameter=parameter.id, sha256=digest, m=parameter.m, n=parameter.n,
        fro=float(np.linalg.norm(s)), bound=0.0, noise=float(s[-1]), first=0, s=s, solver="exact",
    )  # fmt: skip


def made_values(rank: int, generator: np.random.Generator) -> Float[np.ndarray, " r"]:
    """Descending: a power law, with a little noise so that it is none exactly."""
    scale, power = generator.lognormal(0.0, 0.5), generator.uniform(*STEEPNESS)
    law = scale * np.arange(1, rank + 1, dtype=np.float32) ** -np.float32(power)
    return np.sort(law * generator.uniform(0.95, 1.05, rank).astype(np.float32))[::-1].copy()


def fill(plan: Plan) -> int:
    """Number of values put into the plan's store: commits and sidecars as an exact decomposition
    of every source would leave them, with the components' bytes left out."""
    total = 0
    for number, source in enumerate(plan.sources):
        for group in plan.groups:
            spectra = [made_spectrum(number, p) for p in group if p.action is Action.DECOMPOSE]
            _commit(plan, source.revision, group, spectra)
            total += sum(len(x.s) for x in spectra)
    return total


def _commit(
    plan: Plan, revision: str, group: Sequence[Parameter], spectra: Sequence[Spectrum]
) -> None:
    key = layout.group_key(f"{p.source_id} made up" for p in group)
    place = f"{key}/0-{max(plan.depth(p) for p in group) - 1}"
    data = f"{layout.components_path(plan.base_key, revision)}/{place}"
    commit = Commit(
        shard=_put(plan.store, f"{data}.arrow", STUB),
        spectrum=_put(plan.store, f"{data}.spectrum.arrow", encode_spectra(spectra)),
        covered=tuple(
            Covered(
                parameter=x.parameter, first=0, depth=plan.depth(p), source_sha256=x.sha256,
                base_sha256=x.sha256,
            )
            for p, x in zip(group, spectra, strict=True)
        ),
        blocks=tuple(_blocks(plan, group, spectra)),
        solver="exact",
        numerics="made up",
    )  # fmt: skip
    path = f"{layout.commits_path(plan.base_key, revision)}/{place}.json"
    _write(plan.store, path, commit.to_json())


def _blocks(plan: Plan, group: Sequence[Parameter], spectra: Sequence[Spectrum]) -> Iterator[Block]:
    offset = 0
    for p, x in zip(group, spectra, strict=True):
        for first in range(0, plan.depth(p), layout.BLOCK):
            size = 4 * layout.BLOCK * (p.m + p.n)
            yield Block(
                parameter=p.id, first=first, count=layout.BLOCK, offset=offset, size=size,
                sha256=x.sha256,
            )  # fmt: skip
            offset += size


def _put(store: Folder, path: str, data: bytes) -> Entry:
    _write(store, path, data)
    return Entry(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest())


def _write(store: Folder, path: str, data: bytes) -> None:
    # Not `Folder.put`: thousands of syncs would take minutes, and nothing here is worth keeping.
    target = Path(store.path(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
