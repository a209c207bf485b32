"""Tables of results for a terminal; they fit 80 columns."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from rich.table import Table

if TYPE_CHECKING:  # the results' modules need torch; showing a plan does not
    from svdmerge.claims import Check
    from svdmerge.core.kinship import Kinship
    from svdmerge.engine.estimate import Estimate
    from svdmerge.engine.kinship import DeepPlan
    from svdmerge.engine.whatif import Outcome
    from svdmerge.report.run_report import RunReport
    from svdmerge.storage.maintenance import StoredSource
    from svdmerge.storage.releases import Release
    from svdmerge.targeting import Ranking
    from svdmerge.tick import TickResult
    from svdmerge.training.result import Row
    from svdmerge.training.targets import TargetOutcome, TargetsResult


def table(title: str, *, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table; columns after the first are right-aligned."""
    made = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    return made


def size(num_bytes: float) -> str:
    """1536 -> 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def plan_tables(found: "Estimate") -> list[Table]:
    """What happens to every tensor, alike ones together, and the costs."""
    alike: Counter[tuple[str, str, str, str]] = Counter()
    example: dict[tuple[str, str, str, str], str] = {}
    for t in found.tensors:
        shape = "x".join(map(str, t.shape)) or "scalar"
        key = (t.action, shape, t.dtype, "" if t.k is None else str(t.k))
        alike[key] += 1
        example.setdefault(key, t.name)
    tensors = table(
        "Tensors",
        columns=(
            *("first of its kind", "num", "shape", "dtype", "action"),
            "k" if found.scope == "layer" else "k, at most",
        ),
        rows=((example[key], num, key[1], key[2], key[0], key[3]) for key, num in alike.items()),
    )
    costs = table(
        "Costs, if nothing is stored yet",
        columns=("", ""),
        rows=(
            ("sources", found.num_sources),
            ("units of work", found.num_units),
            ("read", size(found.read_bytes)),
            ("store", size(found.store_bytes)),
            ("output", size(found.output_bytes)),
            ("floating-point operations", f"{found.flops:.2g}"),
            ("peak memory of a task", size(found.peak_task_bytes)),
            ("CPU time, a guess", f"{found.cpu_seconds:.0f} s over all cores"),
        ),
    )
    unlike = [
        table(
            f"Unlike the base: {source}",
            columns=("tensor", "", "what stands for it"),
            rows=((name, x.kind, x.told) for name, x in names.items()),
        )
        for source, names in found.unlike.items()
    ]
    return [tensors, costs, *unlike]


def deep_tables(found: "DeepPlan") -> list[Any]:
    """How far each source lies from the base, and what it took to see that."""
    return [
        kinship_table(found.kinships),
        f"read {size(found.read_bytes)} of weights in {found.seconds:.1f} s; "
        f"{len(found.from_store)} of {len(found.kinships)} sources known from the store",
    ]


def kinship_table(found: "Mapping[str, Kinship | None]") -> Table:
    """Relative norm and effective rank of each source's difference."""
    return table(
        "Distance to the base",
        columns=("source", "norm, relative", "effective rank"),
        rows=((name, *_kinship_cells(kinship)) for name, kinship in found.items()),
    )


def _kinship_cells(kinship: "Kinship | None") -> tuple[str, str]:
    if kinship is None:
        return "an adapter", "not judged"
    rank = kinship.effective_rank
    return f"{kinship.norm:.3g}", "-" if rank is None else f"{rank:.1%}"


def run_tables(report: "RunReport") -> list[Any]:
    """Stages, who helps the target, what was kept of whom, and accuracies if it was tuned."""
    stages = table(
        "Stages",
        columns=("stage", "units", "matrices", "read", "stored", "seconds"),
        rows=(
            (s.name, s.num_units, s.num_matrices, size(s.bytes_read), size(s.bytes_stored),
             f"{s.seconds:.1f}")
            for s in report.stages
        ),
    )  # fmt: skip
    kept = table("Components kept", columns=("source", "num"), rows=report.kept.items())
    tables: list[Any] = [stages] if report.stages else []
    tables += ranking_tables(report.ranking) if report.ranking is not None else []
    tables += [report.adaptation.verdict] if report.adaptation is not None else []
    tables += [kinship_table(report.kinship)] if report.kinship else []
    tables += [kept] if report.kept else []
    tables += [f"warning: {told}" for told in report.warnings]
    return [*tables, *([_tuned_table(report.tune)] if report.tune is not None else [])]


def _tuned_table(tune: Any) -> Table:
    """Of one target all rows, of many a row each."""
    if hasattr(tune, "targets"):
        return targets_table(tune)
    return (accuracy_table if tune.rows[0].nll is None else likelihood_table)(tune.rows)


def targets_table(found: "TargetsResult") -> Table:
    """Every target's accuracies beside its adapter's size; a target that failed says so.

    A language target shows its perplexity.
    """
    return table(
        "Accuracy on the targets' test examples",
        columns=("target", "base", "best source", "merged", "tuned", "adapter"),
        rows=(_target_row(target) for target in found.targets),
    )


def _target_row(target: "TargetOutcome") -> Sequence[object]:
    if target.result is None:
        return (target.name, "FAILED", "", "", "", target.error.splitlines()[0])
    of = {r.name.partition(":")[0]: _measured(r) for r in target.result.rows}
    shown = (of.get(name, "") for name in ("base", "best source", "merged", "tuned"))
    return (target.name, *shown, size(target.adapter_bytes))


def _measured(row: "Row") -> str:
    if row.nll is None:
        return f"{row.accuracy:.3f}"
    return "inf ppl" if row.perplexity is None else f"{row.perplexity:.4g} ppl"


class AccuracyRow(Protocol):
    """A model on a target: what tuning and the demo report."""

    @property
    def name(self) -> str: ...
    @property
    def accuracy(self) -> float: ...
    @property
    def trained(self) -> int: ...
    @property
    def trained_with_head(self) -> int: ...
    @property
    def seconds(self) -> float: ...


def ranking_tables(found: "Ranking") -> list[Any]:
    """Sources by their help for a target, near-duplicates, and what it comes to."""
    rows = [
        (
            s.name + " (noise)" * s.noise,
            f"{s.loss:.4f}",
            f"{s.gain:+.4f}",
            f"{s.low:+.4f} .. {s.high:+.4f}",
        )
        for s in found.sources
    ]
    parts: list[Any] = [
        table(
            f"Held-out loss of {found.num_examples} examples, in nats (base {found.base_loss:.4f})",
            columns=("source", "loss", "gain", "95 % interval"),
            rows=rows,
        )
    ]
    if found.near_duplicates:
        alike = [(a, b, f"{cosine:.2f}") for a, b, cosine in found.near_duplicates]
        parts.append(table("Near-duplicates", columns=("source", "and", "overlap"), rows=alike))
    return [*parts, found.verdict]


def accuracy_table(rows: Iterable[AccuracyRow]) -> Table:
    """Accuracy beside the comparators, all with the same head solver."""
    return table(
        "Accuracy on the target's test examples",
        columns=("model", "accuracy", "trained", "with head", "seconds"),
        rows=(
            (r.name, f"{r.accuracy:.3f}", r.trained, r.trained_with_head, f"{r.seconds:.1f}")
            for r in rows
        ),
    )


def likelihood_table(rows: Iterable["Row"]) -> Table:
    """Likelihood of the target's texts beside the comparators'."""
    return table(
        "The target's test texts, by each model's own output layer",
        columns=("model", "nats per token", "perplexity", "tokens right", "trained", "seconds"),
        rows=(
            (r.name, f"{r.nll:.4f}", "-" if r.perplexity is None else f"{r.perplexity:.4g}",
             f"{r.accuracy:.3f}", r.trained, f"{r.seconds:.1f}")
            for r in rows
        ),
    )  # fmt: skip


def demo_tables(
    rows: Iterable[AccuracyRow], *, seconds: Mapping[str, float], paths: Mapping[str, str]
) -> list[Table]:
    """The demo's accuracies, its time by step, and where the outputs are."""
    steps = ((name, f"{value:.1f}") for name, value in seconds.items())
    return [
        accuracy_table(rows),
        table("Time", columns=("step", "seconds"), rows=steps),
        table("Outputs", columns=("what", "where"), rows=paths.items()),
    ]


def whatif_table(outcomes: Sequence["Outcome"]) -> Table:
    """What each budget keeps and leaves out."""
    sources = list(outcomes[0].kept) if outcomes else []
    rows: list[tuple[object, ...]] = [
        ("energy kept", *(f"{o.energy:.1%}" for o in outcomes)),
        ("left out (Frobenius), at most", *(f"{o.frobenius:.3g}" for o in outcomes)),
        ("left out (spectral), at most", *(f"{o.spectral:.3g}" for o in outcomes)),
        ("merged factors", *(size(o.factor_bytes) for o in outcomes)),
        ("components to store", *(size(o.store_bytes) for o in outcomes)),
        ("certain", *("yes" if o.certain else "deepen first" for o in outcomes)),
    ]
    rows += [(source, *(o.kept[source] for o in outcomes)) for source in sources]
    names = [f"{o.k:.4g}" if isinstance(o.k, float) else str(o.k) for o in outcomes]
    return table("Components kept", columns=("k", *names), rows=rows)


def tick_tables(found: "TickResult") -> list[Any]:
    """What a tick found, did, and released."""
    tables = run_tables(found.run) if found.run is not None else []
    tables += [f"left out: {name}: {why}" for name, why in found.skipped.items()]
    tables += [f"warning: {told}" for told in found.warnings]
    current = f"release {found.release.n}: {found.release.model}" if found.release else "no release"
    return [*tables, f"{found.status}: {found.why}", current]


def releases_table(releases: Sequence["Release"]) -> Table:
    """Releases, oldest first."""
    return table(
        "Releases",
        columns=("n", "released", "model", "why"),
        rows=((r.n, r.released_at, r.model, r.why) for r in releases),
    )


_OUTCOMES = {True: "held", False: "FAILED", None: "not checked"}


def verify_table(checks: Sequence["Check"]) -> Table:
    """Claims and whether they held."""
    return table(
        "Claims",
        columns=("claim", "", "detail"),
        rows=((c.claim, _OUTCOMES[c.held], c.detail) for c in checks),
    )


def store_table(sources: Sequence["StoredSource"]) -> Table:
    """What a store holds."""
    return table(
        "Sources in the store",
        columns=("base", "source", "commits", "components", "size"),
        rows=(
            (s.base[:12], s.source[:12], s.num_commits, s.num_components, size(s.size_bytes))
            for s in sources
        ),
    )
