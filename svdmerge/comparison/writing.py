"""Writing a model of given size from its base and merged factors, beside copying as many bytes."""

import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from svdmerge.comparison.large import own_rss_bytes
from svdmerge.comparison.planning import Shapes, write_sparse
from svdmerge.core.components import RankOneComponents, flat
from svdmerge.core.params import Parameter
from svdmerge.engine import assemble
from svdmerge.engine.plan import Plan, make_plan
from svdmerge.engine.runtime import Runtime
from svdmerge.progress import SILENT
from svdmerge.recipe import parse_recipe
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.hf_model import put_index
from svdmerge.storage.manifest import Covered, put_unit
from svdmerge.storage.shards import Rows

# Merged components of each matrix.
RANK = 16
# Of weights, and bytes of them written at once.
SCALE, PIECE_BYTES = 0.02, 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What writing took."""

    num_bytes: int
    num_files: int
    copy_s: tuple[float, ...]
    """Of dd with conv=fsync, file after file, before and after."""
    seconds: float
    """Until every file was written, synced, reopened and checked, and the index was there."""
    peak_rss_bytes: int
    """Of the largest worker so far."""

    @property
    def ratio(self) -> float:
        """Times the copy's mean."""
        return self.seconds * len(self.copy_s) / sum(self.copy_s)


def prepare(root: Path, shapes: Shapes, *, num_shards: int) -> Plan:
    """The plan of a merge of which everything but writing is done: a base of random weights, and
    random factors. The source is only headers, for nothing of it is read any more."""
    base = write_sparse(root / "base", shapes, num_shards=num_shards)
    block = (SCALE * torch.randn(PIECE_BYTES // 2, generator=_seeded(0))).bfloat16()
    for file in weights_of(base):
        _fill(file, block.view(torch.uint8).numpy().tobytes())
    source = write_sparse(root / "source", shapes, num_shards=num_shards)
    plan = make_plan(
        parse_recipe(
            {
                "base_model": str(base),
                "models": [str(source)],
                "parameters": {"k": RANK},
                "store": str(root / "store"),
                "out": str(root / "merged"),
                "resources": {"memory": "16GiB"},
            }
        )
    )
    _put_factors(plan)
    return plan


def weights_of(folder: Path) -> list[Path]:
    """A model's weights files."""
    return sorted(folder.glob("*.safetensors"))


def measure(plan: Plan, root: Path, *, runtime: Runtime) -> Written:
    """Seconds of writing the plan's model, and of dd for its base's files before and after."""
    files = weights_of(Path(plan.base.folder.path()))
    before = _copy(files, root / "copy")
    out, start = Folder.at(root / "merged"), time.perf_counter()
    written = assemble.write_model(plan, out, runtime=runtime, progress=SILENT)
    put_index(out, assemble.output_files(plan))
    seconds = time.perf_counter() - start
    peak = own_rss_bytes(runtime, num=8)
    return Written(
        num_bytes=sum(w.size for w in written),
        num_files=len(written),
        copy_s=(before, _copy(files, root / "copy")),
        seconds=seconds,
        peak_rss_bytes=peak,
    )


def _copy(files: Sequence[Path], to: Path) -> float:
    """Seconds of dd with sync; the copies are removed."""
    to.mkdir()
    start = time.perf_counter()
    for file in files:
        command = ["dd", f"if={file}", f"of={to / file.name}", "bs=16M", "conv=fsync"]
        subprocess.run(command, check=True, capture_output=True)
    seconds = time.perf_counter() - start
    for file in to.iterdir():
        file.unlink()
    to.rmdir()
    return seconds


def _fill(path: Path, block: bytes) -> None:
    """Put weights in the place of a file's holes."""
    with path.open("r+b") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
        left = path.stat().st_size - begin
        file.seek(begin)
        while left > 0:
            left -= file.write(block[:left])


def _put_factors(plan: Plan) -> None:
    made = {p: _factors(p) for p in plan.parameters}
    put_unit(
        plan.run_folder.child(assemble.FACTORS),
        data_prefix="all",
        commit_path="all.json",
        rows=[Rows(parameter=p.id, kind=_kind(p), first=0, components=c) for p, c in made.items()],
        spectra=[],
        covered=[
            Covered(parameter=p.id, first=0, depth=len(c), source_sha256="", base_sha256="")
            for p, c in made.items()
        ],
        solver="random",
        numerics="",
    )


def _kind(parameter: Parameter) -> Literal["merged", "flat"]:
    return "merged" if parameter.is_factored else "flat"


def _factors(parameter: Parameter) -> RankOneComponents:
    if not parameter.is_factored:
        return flat(torch.zeros(1, parameter.n))
    rank = min(RANK, parameter.m, parameter.n)
    u, vh = (
        torch.nn.functional.normalize(torch.randn(shape, generator=_seeded(1)), dim=dim)
        for shape, dim in (((parameter.m, rank), 0), ((rank, parameter.n), 1))
    )
    return RankOneComponents(u=u, s=torch.linspace(1, 0.1, rank), vh=vh)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
