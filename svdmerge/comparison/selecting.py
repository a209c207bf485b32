"""What selecting costs, on made-up spectra: from a store as it would be, or streamed, too many for
one."""

import hashlib
import json
import os
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from svdmerge.core.contest import Rivals
from svdmerge.core.histogram import Histogram
from svdmerge.core.params import Action, Parameter
from svdmerge.engine.plan import Plan
from svdmerge.engine.select_tasks import Budget, rivals_of, spread
from svdmerge.engine.winners import Listed
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
        fro=float(np.linalg.norm(s)), base_fro=None, bound=0.0, noise=float(s[-1]),
        first=0, s=s, solver="exact",
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


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamUnit:
    """Made-up matrices of many sources, drawn when they are looked at and never stored."""

    name: str
    first: int
    num_matrices: int
    num_sources: int
    rank: int
    memory_bytes: int = 512 << 20
    threads: int = 1


def stream_units(num_values: int, *, num_sources: int, rank: int) -> list[StreamUnit]:
    """As many matrices as make up so many values, sixteen in each unit."""
    num_matrices = -(-num_values // (num_sources * rank))
    return [
        StreamUnit(
            name=f"stream {first}", first=first, num_matrices=min(16, num_matrices - first),
            num_sources=num_sources, rank=rank,
        )
        for first in range(0, num_matrices, 16)
    ]  # fmt: skip


def streamed(unit: StreamUnit) -> Iterator[tuple[Budget, list[Listed]]]:
    """Each matrix with all sources' values: power laws of 31 exponents and any size."""
    counts = np.arange(1, unit.rank + 1, dtype=np.float32)
    laws = [counts ** -np.float32(power) for power in np.linspace(*STEEPNESS, 31)]
    for i in range(unit.first, unit.first + unit.num_matrices):
        generator = np.random.default_rng(i)
        parameter = Parameter(
            id=f"{i}", tensor=f"{i}", start=0, m=unit.rank, n=unit.rank, action=Action.DECOMPOSE
        )
        listed = [
            _listed(parameter, source, law=laws[power], scale=np.float32(scale))
            for source, (power, scale) in enumerate(
                zip(
                    generator.integers(0, 31, unit.num_sources),
                    generator.lognormal(0.0, 0.5, unit.num_sources),
                    strict=True,
                )
            )
        ]
        k = max(1, unit.rank // 10)
        yield Budget(parameter=parameter, k=k, most=unit.rank, slots=k), listed


def weigh(unit: StreamUnit) -> Histogram:
    """The histogram of a unit's matrices."""
    return spread(streamed(unit), salience="sigma")


def contest(unit: StreamUnit, *, cut: int, k: int) -> tuple[dict[str, int], Rivals]:
    """The counts above the cut and the rivals of a unit's matrices."""
    return rivals_of(streamed(unit), salience="sigma", cut=cut, k=k)


def _listed(
    parameter: Parameter, source: int, *, law: Float[np.ndarray, " r"], scale: np.float32
) -> Listed:
    name = f"{source:064d}"
    spectrum = Spectrum(
        parameter=parameter.id, sha256=name, m=parameter.m, n=parameter.n, fro=1.0, bound=0.0,
        base_fro=None, noise=0.0, first=0, s=law * scale, solver="made up",
    )  # fmt: skip
    return Listed(sha256=name, source=name, weight=1.0, spectra=[spectrum])


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a process took so far."""

    pid: int
    peak_bytes: int
    cpu_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A unit that asks a worker for its usage."""

    name: str = "usage"
    memory_bytes: int = 1 << 20
    threads: int = 1


def usage(question: Question | None = None) -> Usage:
    """Of this process; a moment later, so that every worker gets asked."""
    if question is not None:
        time.sleep(0.2)
    used = resource.getrusage(resource.RUSAGE_SELF)
    return Usage(
        pid=os.getpid(), peak_bytes=used.ru_maxrss << 10, cpu_s=used.ru_utime + used.ru_stime
    )
