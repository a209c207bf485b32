"""Matrices that no task may hold: decomposed in blocks of rows, they are what full SVDs give."""

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from merging import Bench, outcome, tree
from tiny import read_model, write_model
from torch import Tensor

from svdmerge.core.params import Action, matrices
from svdmerge.engine import row_blocks
from svdmerge.engine.decompose import decompose, load_source
from svdmerge.engine.estimate import estimate
from svdmerge.engine.memory import iteration_bytes, pass_bytes, survey_bytes
from svdmerge.engine.plan import Plan
from svdmerge.engine.runtime import InProcess
from svdmerge.engine.tally import Tally
from svdmerge.errors import ContentError, ResourceError, SolverError
from svdmerge.progress import SILENT
from svdmerge.storage.checkpoint import TensorRef
from svdmerge.storage.manifest import Committed
from svdmerge.workflow import run

NAME = "a.weight"
# 68,000 entries in five blocks of rows.
RESOURCES = {"resources": {"max_matrix": "128KiB"}}
K = {"parameters": {"k": 24}}


def power(rank: int) -> Tensor:
    return 0.5 * torch.arange(1, rank + 1, dtype=torch.float64) ** -0.7


def matrix(s: Tensor, *, m: int, n: int, seed: int) -> Tensor:
    """A matrix with these singular values and random directions."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(d, len(s), generator=generator, dtype=torch.float64)).Q
        for d in (m, n)
    )
    return (u * s) @ v.T


def models(root: Path, deltas: Sequence[Tensor]) -> Bench:
    """A base in bfloat16 and its fine-tunes by these differences, rounded."""
    m, n = deltas[0].shape
    start = 0.02 * torch.randn(m, n, generator=torch.Generator().manual_seed(0)).bfloat16()
    return Bench(
        root=root,
        base=write_model(root / "base", {NAME: start, "b.weight": torch.zeros(6, 5)}),
        sources=tuple(
            write_model(
                root / f"source-{i}",
                {
                    NAME: (start.double() + d).bfloat16(),
                    "b.weight": torch.full((6, 5), i + 1.0),
                },
            )
            for i, d in enumerate(deltas)
        ),
        admit=True,
    )


def falling(root: Path, *, shape: tuple[int, int] = (200, 340), num_sources: int = 2) -> Bench:
    m, n = shape
    return models(
        root,
        [(1 + i / 4) * matrix(power(min(shape)), m=m, n=n, seed=i) for i in range(num_sources)],
    )


def differences(bench: Bench) -> list[Tensor]:
    from safetensors.torch import load_file

    base, *others = (
        load_file(folder / "model.safetensors")[NAME].double()
        for folder in (bench.base, *bench.sources)
    )
    return [source - base for source in others]


def committed(plan: Plan) -> list[Committed]:
    """What is stored of each source, in the order of the recipe."""
    by_name = {s.reference: load_source(plan, s) for s in plan.sources}
    return [by_name[m.model] for m in plan.recipe.models]


@dataclass
class Failing:
    """A runtime that stops like a driver that is killed, after so many maps."""

    left: int
    address: str = "none"
    tally: Tally = field(default_factory=Tally)

    def map(self, task: Callable[..., Any], units: Sequence[Any], **options: Any) -> list[Any]:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return InProcess().map(task, units, **options)


@pytest.mark.parametrize("shape", [(200, 340), (340, 200)])
def test_what_is_stored_and_selected_is_what_full_svds_give(
    tmp_path: Path, shape: tuple[int, int]
) -> None:
    bench = falling(tmp_path, shape=shape)
    report = bench.run(**RESOURCES, **K)
    base = float(read_model(bench.base)[NAME].double().norm())
    for i, delta in enumerate(differences(bench)):
        kinship = report.kinship[str(bench.sources[i])]
        assert kinship is not None
        size = math.hypot(float(delta.norm()), (i + 1) * 30**0.5)  # b.weight's too
        assert kinship.norm == pytest.approx(size / base, rel=1e-6)
    exact = [torch.linalg.svd(d, full_matrices=False) for d in differences(bench)]
    ranked = sorted((float(s), i) for i, e in enumerate(exact) for s in e.S)[-24:]
    # And one of the other matrix each, whose changes are of rank one.
    assert list(report.kept.values()) == [1 + sum(j == i for _, j in ranked) for i in range(2)]
    for stored, (u, s, vh) in zip(committed(bench.plan(**RESOURCES, **K)), exact, strict=True):
        found = stored.read(NAME, range(stored.held(NAME)))
        size = len(found)
        assert size >= 16
        assert torch.allclose(found.s.double(), s[:size], rtol=0, atol=1e-5 * float(s[0]))
        # Up to the sign, and no turn among neighbours: planted values stand apart.
        for got, expected in ((found.u.T, u.T[:size]), (found.vh, vh[:size])):
            assert torch.all((got.double() * expected).sum(dim=1).abs() > 1 - 1e-4)
        for part in stored.spectra()[NAME]:
            assert part.bound >= float(s[part.first + len(part.s)])
            assert "by rows" in part.solver
            assert part.fro == pytest.approx(float(s.square().sum().sqrt()), rel=1e-12)


def test_records_are_those_of_a_matrix_held_whole_but_for_the_solvers_rounding(
    tmp_path: Path,
) -> None:
    """Checksums, norms and the edge of the noise, by which ties break and saliences count."""
    bench = falling(tmp_path)
    bench.run(**RESOURCES, **K)
    bench.run(**K, store=str(tmp_path / "whole"), out=str(tmp_path / "out-whole"))
    plans = bench.plan(**RESOURCES, **K), bench.plan(**K, store=str(tmp_path / "whole"))
    for by_rows, held in zip(*map(committed, plans), strict=True):
        one, other = by_rows.spectra()[NAME][0], held.spectra()[NAME][0]
        assert one.sha256 == other.sha256
        assert one.fro == pytest.approx(other.fro, rel=1e-12)
        assert one.noise == pytest.approx(other.noise, rel=1e-6)
        covered = [c for commit in by_rows.commits for c in commit.covered if c.parameter == NAME]
        held_covered = [c for x in held.commits for c in x.covered if c.parameter == NAME]
        assert {c.base_sha256 for c in covered} == {c.base_sha256 for c in held_covered}


def test_the_same_bits_in_this_process_and_on_ray(tmp_path: Path, ray_session: None) -> None:
    bench = falling(tmp_path)
    bench.run(**RESOURCES, **K)
    first, stored = outcome(bench.out), tree(bench.store, below="components")
    other = {"store": str(tmp_path / "ray"), "out": str(tmp_path / "out-ray")}
    run(bench.recipe(**RESOURCES, **K, **other), address="local")
    assert outcome(tmp_path / "out-ray") == first
    assert tree(tmp_path / "ray", below="components") == stored


def test_what_was_committed_before_a_driver_was_killed_is_kept(tmp_path: Path) -> None:
    bench = falling(tmp_path, num_sources=1)
    plan = bench.plan(**RESOURCES, **K)
    runtime = Failing(left=25)  # in the second block
    with pytest.raises(KeyboardInterrupt):
        decompose(plan, runtime=runtime, progress=SILENT)
    before = tree(bench.store, below="components")
    assert committed(plan)[0].depth(NAME) == 16
    assert not tree(bench.store, below="scratch")
    bench.run(**RESOURCES, **K)
    assert before.items() < tree(bench.store, below="components").items()
    resumed = outcome(bench.out)
    shutil.rmtree(bench.store)
    bench.run(**RESOURCES, **K)
    assert outcome(bench.out) == resumed


@pytest.mark.parametrize("kind", ["power law", "noise"])
@pytest.mark.parametrize("held_first", [True, False])
def test_what_was_stored_of_a_matrix_held_whole_goes_on_by_rows_and_the_other_way_round(
    tmp_path: Path, kind: str, held_first: bool
) -> None:
    noise = torch.randn(340, 200, generator=torch.Generator().manual_seed(1)).double() / 32
    bench = models(
        tmp_path, [matrix(power(200), m=340, n=200, seed=1) if kind != "noise" else noise]
    )
    order = [{}, RESOURCES] if held_first else [RESOURCES, {}]
    for k, resources in zip((24, 60), order, strict=True):
        bench.run(**resources, parameters={"k": k}, out=str(tmp_path / f"out-{k}"))
    stored, exact = committed(bench.plan(**K))[0], differences(bench)[0]
    found, values = stored.read(NAME, range(60)), torch.linalg.svdvals(exact)
    assert stored.depth(NAME) >= 60
    assert torch.all((found.s.double() - values[:60]).abs() <= 1e-5 * values[0])
    residuals = exact @ found.vh.double().T - found.u.double() * found.s.double()
    assert torch.all(torch.linalg.vector_norm(residuals, dim=0) <= 1e-4 * values[0])


def test_a_pass_reads_the_tensors_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = falling(tmp_path, num_sources=1)
    plan, read = bench.plan(**RESOURCES, **K), list[int]()
    honest = TensorRef.read_bytes

    def counted(self: TensorRef, **options: Any) -> bytes:
        data = honest(self, **options)
        read.append(len(data) if self.name == NAME else 0)
        return data

    monkeypatch.setattr(TensorRef, "read_bytes", counted)
    receipts = decompose(plan, runtime=InProcess(), progress=SILENT)
    passes = sum(int(x.solver.split()[-2]) for x in committed(plan)[0].spectra()[NAME])
    surveys = len(committed(plan)[0].spectra()[NAME])
    assert passes > 20
    assert sum(read) == (passes + surveys) * 2 * 2 * 200 * 340
    assert sum(r.bytes_read for r in receipts) == sum(read) + 2 * 4 * 30


def test_a_matrix_of_zeros_and_one_of_low_rank_end(tmp_path: Path) -> None:
    low = matrix(torch.tensor([3.0, 2.0, 1.0]), m=200, n=340, seed=1)
    bench = models(tmp_path, [torch.zeros(200, 340), low])
    bench.run(**RESOURCES, **K)
    zero, low_rank = committed(bench.plan(**RESOURCES, **K))
    assert (zero.held(NAME), zero.spectra()[NAME][-1].bound) == (0, 0.0)
    assert torch.allclose(low_rank.read(NAME, range(3)).s, torch.tensor([3.0, 2.0, 1.0]), rtol=1e-3)


@pytest.mark.parametrize("kind", ["noise", "flat"])
def test_a_flat_spectrum_is_decomposed_as_deep_as_it_is_asked_for(
    tmp_path: Path, kind: str
) -> None:
    generator = torch.Generator().manual_seed(1)
    flat = torch.randn(340, 200, generator=generator, dtype=torch.float64)
    bench = models(tmp_path, [torch.linalg.qr(flat).Q if kind == "flat" else flat / 32])
    bench.run(**RESOURCES, **K)
    stored, exact = committed(bench.plan(**RESOURCES, **K))[0], differences(bench)[0]
    values = torch.linalg.svdvals(exact)
    assert stored.held(NAME) >= 24
    found = stored.read(NAME, range(24)).s.double()
    assert torch.all((found.cummin(dim=0).values - values[:24]).abs() <= 1e-5 * values[0])


def test_where_nothing_converges_an_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svdmerge.engine.row_blocks.lanczos_block", lambda *_, **__: None)
    with pytest.raises(SolverError) as caught:
        falling(tmp_path, num_sources=1).run(**RESOURCES, **K)
    what, why, fix = caught.value.args
    assert "a.weight (200 x 340)" in what
    assert "flat" in why
    assert "max_matrix: 1MiB, memory: " in fix


def test_what_is_not_finite_is_told_and_no_scratch_stays(tmp_path: Path) -> None:
    bad = torch.zeros(200, 340, dtype=torch.float64)
    bad[150, 7] = float("nan")
    bench = models(tmp_path, [bad])
    with pytest.raises(ContentError, match=r"a\.weight holds NaN or Inf"):
        bench.run(**RESOURCES, **K)
    assert not tree(bench.store, below="scratch")


def test_of_several_at_once_the_one_that_failed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_session: None
) -> None:
    bench, honest = falling(tmp_path, num_sources=3), row_blocks.lanczos_block

    def failing(*args: Any, **options: Any) -> Any:
        if options["fro"] > 1.4 * norms[0]:
            raise SolverError("the third one")
        return honest(*args, **options)

    norms = [float(torch.linalg.vector_norm(d)) for d in differences(bench)]
    monkeypatch.setattr("svdmerge.engine.row_blocks.lanczos_block", failing)
    with pytest.raises(SolverError, match="the third one"):
        run(bench.recipe(**RESOURCES, **K), address="local")
    monkeypatch.undo()
    assert run(bench.recipe(**RESOURCES, **K), address="local").status == "done"
    assert not tree(bench.store, below="scratch")


# --- the plan ---


def sparse_model(folder: Path, *, m: int, n: int) -> Path:
    """A model of one matrix, of which only the header takes room."""
    import json

    folder.mkdir()
    entry = {"dtype": "BF16", "shape": [m, n], "data_offsets": [0, 2 * m * n]}
    header = json.dumps({NAME: entry}).encode()
    file = folder / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with file.open("r+b") as out:
        out.truncate(8 + len(header) + 2 * m * n)
    return folder


@pytest.mark.parametrize("shape", [(8192, 28672), (28672, 8192)])
def test_the_largest_matrices_of_today_fit_tasks_of_a_gibibyte(
    tmp_path: Path, shape: tuple[int, int]
) -> None:
    m, n = shape
    bench = Bench(
        root=tmp_path,
        base=sparse_model(tmp_path / "base", m=m, n=n),
        sources=(sparse_model(tmp_path / "source", m=m, n=n),),
    )
    plan = bench.plan(parameters={"k": "10%"}, resources={"memory": "1GiB"})
    (parameter,) = plan.parameters
    assert plan.block_rows(parameter) == {8192: 547, 28672: 2048}[m]
    with pytest.raises(ResourceError, match="decomposing it needs"):
        bench.plan(parameters={"k": "10%", "svd": "exact"}, resources={"memory": "1GiB"})


def test_memory_grows_with_the_depth_and_stays_below_that_of_a_tensor() -> None:
    one, long = (
        matrices("x", shape=shape, action=Action.DECOMPOSE)[0]
        for shape in ((8192, 8192), (1 << 20, 8192))
    )
    assert iteration_bytes(one, depth=96) < iteration_bytes(one, depth=960)
    assert iteration_bytes(long, depth=96) < 2 * long.numel  # one of the tensors in bfloat16
    assert survey_bytes(8192) == survey_bytes(100)
    few, many = (pass_bytes(m=512, n=8192, columns=c, itemsize=4) for c in (16, 512))
    assert few < many


def test_the_plan_counts_the_passes_of_a_first_block_about(tmp_path: Path) -> None:
    bench = falling(tmp_path, num_sources=1)
    plan = bench.plan(**RESOURCES)
    decompose(plan, runtime=InProcess(), progress=SILENT)
    passes = 1 + int(committed(plan)[0].spectra()[NAME][0].solver.split()[-2])
    of_one = 2 * 2 * 200 * 340
    planned = (estimate(plan).read_bytes - 2 * 4 * 30) / of_one
    assert abs(planned - passes) <= 2


def test_what_no_task_may_hold_travels_alone_by_its_shape_only(tmp_path: Path) -> None:
    bench = falling(tmp_path)
    plan = bench.plan(**RESOURCES)
    assert [[p.id for p in group] for group in plan.groups] == [[NAME], ["b.weight"]]
    assert plan.hash != bench.plan().hash
    ample = {"resources": {"max_matrix": "128KiB", "memory": "64GiB"}}
    assert bench.plan(**ample).block_rows(plan.parameters[0]) == plan.block_rows(plan.parameters[0])
