"""Small merges for tests, what they leave behind, and AXIS once more: dense, in float64."""

import hashlib
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from tiny import tiny_base, tiny_source, write_model
from torch import Tensor

from svdmerge.core.methods.registry import METHODS
from svdmerge.engine.inventory import Inventory, take_inventory
from svdmerge.engine.plan import Plan, make_plan
from svdmerge.engine.runtime import InProcess
from svdmerge.progress import SILENT
from svdmerge.recipe import Recipe, parse_recipe
from svdmerge.report.run_report import RunReport
from svdmerge.storage.hf_model import PROVENANCE, load_factors, read_factors
from svdmerge.storage.manifest import Commit
from svdmerge.workflow import run

K = "20%"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """A base, its fine-tunes, and a place for a store and an output."""

    root: Path
    base: Path
    sources: tuple[Path, ...]
    admit: bool = False
    """For made-up differences, as large as the base or larger."""

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def store(self) -> Path:
        return self.root / "store"

    def raw(self, **changes: Any) -> dict[str, Any]:
        """The recipe as its YAML holds it."""
        method = METHODS.get(str(changes.get("merge_method", "axis")))
        return {
            "base_model": str(self.base),
            "models": [
                {"model": str(s), "admit": True} if self.admit else str(s) for s in self.sources
            ],
            "parameters": {} if method is not None and "k" not in method.parameters else {"k": K},
            "store": str(self.store),
            "out": str(self.out),
        } | changes

    def write_recipe(self, **changes: Any) -> Path:
        """The recipe as a file."""
        path = self.root / "recipe.yml"
        path.write_text(yaml.safe_dump(self.raw(**changes)))
        return path

    def recipe(self, **changes: Any) -> Recipe:
        return parse_recipe(self.raw(**changes))

    def plan(self, **changes: Any) -> Plan:
        return make_plan(self.recipe(**changes))

    def run(self, **changes: Any) -> RunReport:
        """The whole workflow in this process."""
        return run(self.recipe(**changes), address="none")


def tiny_bench(root: Path, *, num_sources: int = 3, **options: Any) -> Bench:
    """Every kind of tensor there is: about a third of a second a run."""
    base = tiny_base(root / "base")
    sources = tuple(
        tiny_source(root / f"source-{i}", base, i, **options) for i in range(1, num_sources + 1)
    )
    return Bench(root=root, base=base, sources=sources)


MICRO_SHAPES = {"a.weight": (24, 18), "b.weight": (9, 20), "a.bias": (24,)}


def micro_model(folder: Path, *, seed: int, base: Path | None = None, **changes: Tensor) -> Path:
    """Two matrices, a vector and an integer: the least that has every kind of unit."""
    generator = torch.Generator().manual_seed(seed)
    start = load_file(base / "model.safetensors") if base else {}
    tensors: dict[str, Tensor] = {
        name: torch.randn(shape, generator=generator) * (0.1 if base else 1.0)
        + start.get(name, torch.zeros(()))
        for name, shape in MICRO_SHAPES.items()
    }
    tensors["steps"] = torch.tensor([7])
    return write_model(folder, tensors | changes, {"model_type": "micro"})


def micro_bench(root: Path, *, num_sources: int = 3) -> Bench:
    """The smallest merge, for tests that repeat it many times."""
    base = micro_model(root / "base", seed=0)
    sources = tuple(
        micro_model(root / f"source-{i}", seed=i, base=base) for i in range(1, num_sources + 1)
    )
    return Bench(root=root, base=base, sources=sources)


def command(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`svdmerge ...` in a process of its own."""
    program = [sys.executable, "-c", "from svdmerge.cli import main; main()"]
    return subprocess.run(
        [*program, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False
    )


# --- what a run leaves ---


def inventory_of(plan: Plan) -> Inventory:
    """What the store holds now."""
    return take_inventory(plan, runtime=InProcess(), progress=SILENT)


def weights(out: Path) -> dict[str, bytes]:
    """The bytes of every weights file and index."""
    files = [*out.glob("*.safetensors"), *out.glob("*.safetensors.index.json")]
    return {f.name: f.read_bytes() for f in sorted(files)}


def outcome(out: Path) -> dict[str, bytes]:
    """The bytes that repeated runs must agree in: weights and provenance."""
    return weights(out) | {PROVENANCE: (out / PROVENANCE).read_bytes()}


def tree(folder: Path, *, below: str = "") -> dict[str, str]:
    """sha256 of every file, by relative path."""
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted((folder / below).rglob("*"))
        if f.is_file()
    }


def units(report: RunReport, stage: str = "decompose") -> int:
    """Units of a stage that ran; none if the stage did not."""
    return sum(s.num_units for s in report.stages if s.name == stage)


def matrices_done(report: RunReport, stage: str = "decompose") -> int:
    """Matrices of a stage's units."""
    return sum(s.num_matrices for s in report.stages if s.name == stage)


def stored_blocks(store: Path) -> Counter[tuple[str, str, int]]:
    """How often each block is stored: by source, matrix and first index."""
    found: Counter[tuple[str, str, int]] = Counter()
    for path in (store / "commits").rglob("*.json"):
        commit = Commit.from_json(path.read_bytes())
        source = path.relative_to(store / "commits").parts[1]
        found.update((source, b.parameter, b.first) for b in commit.blocks)
    return found


def factor_deltas(plan: Plan) -> dict[str, np.ndarray]:
    """Every merged difference before the cast, by matrix, from a run's stored factors."""
    committed = load_factors(plan.run_folder.child("factors"))
    return {
        p.id.removesuffix("#flat"): read_factors(committed, p).dense().numpy()
        for p in plan.parameters
        if p.action != "equal"
    }


# --- AXIS as the paper tells it (arXiv 2508.19353), sharing nothing with the library ---


def numbers(model: Path) -> dict[str, np.ndarray]:
    """Every tensor of a model folder, floats as float64, by safetensors' own reader."""
    found: dict[str, np.ndarray] = {}
    for file in sorted(model.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            found[name] = (tensor.double() if tensor.is_floating_point() else tensor).numpy()
    return found


def is_kept_as_base(name: str, array: np.ndarray) -> bool:
    """Integers, embeddings and positions."""
    return array.dtype.kind in "iub" or "embed" in name or "position" in name


def stack_of(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """The matrices in a tensor, by id; a vector is none."""
    if array.ndim == 2:
        return {name: array}
    if array.ndim == 4:
        return {name: array.reshape(array.shape[0], -1)}
    if array.ndim == 3 and "experts" in name:
        return {f"{name}[{i}]": array[i] for i in range(len(array))}
    return {}


def num_kept(k: float | int, rank: int) -> int:
    """The budget of a matrix: a share of its rank, or a count."""
    return max(1, int(k * rank + 1e-9)) if isinstance(k, float) else min(k, rank)


def dense_axis(
    base: Mapping[str, np.ndarray],
    sources: Sequence[Mapping[str, np.ndarray]],
    *,
    k: float | int,
    source_weights: Sequence[float] | None = None,
    salience: str = "sigma",
    scale: float = 1.0,
    only: Iterable[str] | None = None,
) -> dict[str, np.ndarray]:
    """Every merged difference by matrix id: SVDs pooled and sorted, the top k summed densely.

    Vectors are averaged. What stays the base's is left out.
    """
    source_weights = source_weights or [1.0] * len(sources)
    merged: dict[str, np.ndarray] = {}
    for name in base if only is None else only:
        start = base[name]
        if is_kept_as_base(name, start):
            continue
        deltas = [source[name] - start for source in sources]
        if not stack_of(name, start):
            terms = [w * d for w, d in zip(source_weights, deltas, strict=True)]
            merged[name] = scale * sum(terms) / len(sources)
        for matrix in stack_of(name, start):
            parts = [stack_of(name, d)[matrix] for d in deltas]
            merged[matrix] = scale * _top_sum(parts, source_weights, k=k, salience=salience)
    return merged


def _top_sum(
    deltas: Sequence[np.ndarray], source_weights: Sequence[float], *, k: float | int, salience: str
) -> np.ndarray:
    pool: list[tuple[float, int, int]] = []
    svds: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for number, (delta, weight) in enumerate(zip(deltas, source_weights, strict=True)):
        svds.append(np.linalg.svd(delta, full_matrices=False))
        norm = float(np.linalg.norm(delta)) if salience == "relative" else 1.0
        s = svds[-1][1]
        pool += [(weight * s[i] / norm if norm else 0.0, number, i) for i in range(len(s))]
    pool.sort(key=lambda item: -item[0])
    merged = np.zeros_like(deltas[0])
    for _, number, i in pool[: num_kept(k, min(deltas[0].shape))]:
        u, s, vh = svds[number]
        merged += source_weights[number] * s[i] * np.outer(u[:, i], vh[i])
    return merged


def output_deltas(out: Path, base: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Merged differences as the output holds them, by matrix id."""
    found: dict[str, np.ndarray] = {}
    for name, array in numbers(out).items():
        if is_kept_as_base(name, array):
            continue
        delta = array - base[name]
        found |= stack_of(name, delta) or {name: delta}
    return found


def distance(got: np.ndarray, expected: np.ndarray) -> float:
    """Relative Frobenius error; of a zero, the absolute one."""
    size = float(np.linalg.norm(expected))
    return float(np.linalg.norm(got.reshape(expected.shape) - expected)) / (size or 1.0)


def worst_distance(got: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """The largest relative Frobenius error of all matrices, which must be the same ones."""
    assert set(got) == set(expected)
    return max(distance(got[name], expected[name]) for name in expected)
