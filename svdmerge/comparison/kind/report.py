"""The benchmark's tables as Markdown, from what was measured; intervals are over seeds."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from svdmerge.comparison.kind.diversion import CONTROLS, class_means, diversion
from svdmerge.comparison.kind.explanations import Explained
from svdmerge.comparison.kind.pairs import AS_SEEN
from svdmerge.comparison.kind.quality import Quality


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean over seeds and its 95 % interval."""

    mean: float
    low: float
    high: float
    num: int

    def percent(self) -> str:
        """As `+1.2 % [0.3, 2.1]`; without the ends for one seed."""
        text = f"{100 * self.mean:+.1f} %"
        return text if self.num < 2 else f"{text} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


def over_seeds(values: Sequence[float]) -> Interval:
    """Student's interval of the mean: few seeds make it wide, as they should."""
    from scipy.special import stdtrit

    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        return Interval(mean=float(x.mean()), low=-np.inf, high=np.inf, num=len(x))
    half = float(stdtrit(len(x) - 1, 0.975)) * float(x.std(ddof=1)) / len(x) ** 0.5
    mean = float(x.mean())
    return Interval(mean=mean, low=mean - half, high=mean + half, num=len(x))


def relative(a: Tensor, b: Tensor) -> float:
    """How much larger the mean of a is than that of b, as a share."""
    return float(a.double().mean() / b.double().mean() - 1.0)


def pretrained_table(old: Sequence[Mapping[str, Tensor]]) -> Iterator[str]:
    """The gated model's loss on the classes it learnt beside dense ones' and the random gate's."""
    yield "| against | loss of gated | loss of other | gated minus other | by seed |"
    yield "|---|---|---|---|---|"
    for other in (name for name in ("dense", "random gate") if name in old[0]):
        gaps = [relative(o["gated"], o[other]) for o in old]
        yield _row(
            f"{other}, equal parameters",
            _mean(o["gated"] for o in old),
            _mean(o[other] for o in old),
            over_seeds(gaps).percent(),
            _each(gaps),
        )


def pair_table(pairs: Sequence[Mapping[str, Tensor]]) -> Iterator[str]:
    """The recombined models beside dense ones of their size."""
    yield "| model | parameters | loss | recombined minus this | by seed |"
    yield "|---|---|---|---|---|"
    for place, name in enumerate(("recombined", "gated", "dense", AS_SEEN)):
        if name not in pairs[0]:
            continue
        gaps = [relative(p["recombined"], p[name]) for p in pairs]
        sizes = "/".join(f"{int(p['sizes'][min(place, 2)]):,}" for p in pairs[:1])
        told = over_seeds(gaps).percent() if name != "recombined" else ""
        yield _row(name, sizes, _mean(p[name] for p in pairs), told, _each(gaps))


def diversion_table(matrices: Sequence[Mapping[str, Tensor]]) -> Iterator[str]:
    """What the loss matrices say of the gated model and both controls."""
    yield "| model | loss under others' tailors | images least under their own | classes | "
    yield "|---|---|---|---|"
    for name in CONTROLS:
        found = [diversion(m[name], labels=m["labels"]) for m in matrices]
        hits = over_seeds([f.hits for f in found])
        yield _row(
            name,
            over_seeds([f.gap for f in found]).percent(),
            f"{100 * hits.mean:.0f} % (chance 14)",
            ", ".join(f"{f.rows_won}/7" for f in found),
        )
    for control in CONTROLS[1:]:
        gaps = [
            diversion(m[CONTROLS[0]], labels=m["labels"]).gap
            - diversion(m[control], labels=m["labels"]).gap
            for m in matrices
        ]
        yield _row(f"gated minus {control}", over_seeds(gaps).percent(), "", "")


def matrix_table(measured: Mapping[str, Tensor], names: Sequence[str]) -> Iterator[str]:
    """L(row sampled, column gated) of the gated model over its diagonal, in per cent above it."""
    matrix = class_means(measured[CONTROLS[0]], labels=measured["labels"])
    yield _row("", *names)
    yield "|" + "---|" * (len(names) + 1)
    for name, row, own in zip(names, matrix, matrix.diagonal(), strict=True):
        yield _row(name, *(f"{100 * (float(v) / float(own) - 1):+.1f}" for v in row))


def transfer_table(
    results: Mapping[str, Sequence[Mapping[str, Tensor]]], *, first: str
) -> Iterator[str]:
    """Held-out losses along training, by entrant; then how much each is above the first."""
    steps = next(iter(results.values()))[0]["steps"].tolist()
    yield _row("start", "trained values", *(f"step {s}" for s in steps), "first minus this, end")
    yield "|" + "---|" * (len(steps) + 3)
    for name, seeds in results.items():
        means = torch.stack([r["losses"].double().mean(dim=1) for r in seeds]).mean(dim=0)
        gaps = [
            relative(a["losses"][-1], b["losses"][-1])
            for a, b in zip(results[first], seeds, strict=False)
        ]
        yield _row(
            name, f"{int(seeds[0]['trained']):,}", *(f"{v:.4f}" for v in means.tolist()),
            "" if name == first else over_seeds(gaps).percent(),
        )  # fmt: skip


def distance_table(
    results: Mapping[str, Sequence[Mapping[str, Tensor]]],
    *,
    first: str,
    names: Sequence[str],
    nearest: Sequence[tuple[str, float]],
) -> Iterator[str]:
    """By novel class: how far the old classes are, and the first entrant's final loss minus each
    other's."""
    others = [name for name in results if name != first]
    yield _row("novel class", "nearest old", "Frechet distance", *others)
    yield "|" + "---|" * (len(others) + 3)
    for label, (name, (near, distance)) in enumerate(zip(names, nearest, strict=True)):
        gaps = [
            over_seeds(
                [
                    relative(_final(a, label), _final(b, label))
                    for a, b in zip(results[first], results[other], strict=False)
                ]
            )
            for other in others
        ]
        yield _row(name, near, f"{distance:.2f}", *(gap.percent() for gap in gaps))


def _final(result: Mapping[str, Tensor], label: int) -> Tensor:
    """Losses of a class's images at the end."""
    return result["losses"][-1][result["labels"] == label]


def explanation_table(found: Iterable[Explained]) -> Iterator[str]:
    """What each way to pre-train makes of both claims."""
    yield "| pre-trained | gated minus dense, old classes | novel: learngenes | LoRA | difference |"
    yield "|---|---|---|---|---|"
    for e in found:
        old = [relative(o["gated"], o["dense"]) for o in e.old]
        ends = [
            (a["losses"][-1], b["losses"][-1]) for a, b in zip(e.learngenes, e.lora, strict=True)
        ]
        yield _row(
            e.name,
            over_seeds(old).percent(),
            _mean(a for a, _ in ends),
            _mean(b for _, b in ends),
            over_seeds([relative(a, b) for a, b in ends]).percent(),
        )


def quality_table(found: Mapping[str, Sequence[Quality]]) -> Iterator[str]:
    """Distances in the classifier's feature space, and what it takes samples for."""
    yield "| images | kernel distance | Frechet distance | precision | recall | as meant |"
    yield "|---|---|---|---|---|---|"
    fields: tuple[Callable[[Quality], float], ...] = (
        lambda q: q.kernel,
        lambda q: q.frechet,
        lambda q: q.precision,
        lambda q: q.recall,
        lambda q: q.accuracy,
    )
    for name, seeds in found.items():
        yield _row(name, *(f"{np.mean([field(q) for q in seeds]):.3f}" for field in fields))


def likeness_table(found: Mapping[str, Tensor]) -> Iterator[str]:
    """CKA and span overlap of learngenes and tailors, means over layers."""
    yield "| two models | CKA learngenes | tailors | span overlap learngenes | tailors |"
    yield "|---|---|---|---|---|"
    for name, values in found.items():
        yield _row(name, *(f"{v:.3f}" for v in values.mean(dim=0).tolist()))


def _mean(values: Iterable[Tensor]) -> str:
    return f"{np.mean([float(v.double().mean()) for v in values]):.4f}"


def _each(values: Sequence[float]) -> str:
    return ", ".join(f"{100 * v:+.1f}" for v in values)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
