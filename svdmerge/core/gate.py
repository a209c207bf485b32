"""Which sources to merge for a target, and how strongly, by losses of its held-out examples."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from svdmerge.core.evidence import standard_error, surely_better

# Numbers of sources merged, best first. Nested sets, roughly doubling: each is one more look at
# the same few examples, and the best of many looks is luck.
SET_SIZES = (2, 3, 5, 10, 20, 50, 100)
# Sum of the merged sources' weights. 1 is the plain average; sources that share directions are
# over-counted by their number, while those that do not are worth their full strength each.
TOTALS = (0.5, 1.0, 1.5, 2.0, 3.0)
# Standard errors by which a model must fall behind the best one to weigh e times less. Of 0.25,
# 0.35, 0.5 and 1, on three targets of 16 to 48 examples: larger ones dilute a clear best source,
# smaller ones trust whichever of many equals was luckiest.
SOFTNESS = 0.35
# The same of merges, which share sources and so differ less. On two other targets of sixteen
# examples, ten draws in all: 75.1 % with 1 as with 2; 72.0 % if the merge of least loss was taken,
# or a simpler one within half a standard error; 74.2 % if always five were averaged.
MERGES_SOFTNESS = 1.0
# Always considered: the sources that look best at the strength that task arithmetic gives each
# (arXiv 2212.04089: 0.3 to 0.4). Of twenty sources sixteen examples cannot tell the best one, and
# the one that looks so is as often lucky; five that look good are seldom all so.
AVERAGED = 5
EACH = 0.3
# Weights below this are left out: they change nothing but the number of sources to read.
LEAST = 0.01

Losses = Float[Tensor, " b"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Sources with their shares, which add up to 1, and their strength together; none: the base."""

    shares: tuple[tuple[str, float], ...] = ()
    total: float = 0.0

    @property
    def weights(self) -> dict[str, float]:
        """Each source's strength."""
        return {source: share * self.total for source, share in self.shares}


Judge = Callable[[Sequence[Mix]], Sequence[Losses]]
BASE = Mix()


def alone(source: str) -> Mix:
    """A source as it is."""
    return Mix(shares=((source, 1.0),), total=1.0)


def equal(sources: Sequence[str], *, total: float) -> Mix:
    """Sources that count alike."""
    return Mix(shares=tuple((s, 1.0 / len(sources)) for s in sources), total=total)


def soft(sources: Mapping[str, Losses], *, base: Losses) -> Mix:
    """Sources and base weighed by how far each falls behind the best of them.

    A weight is exp(-gap / (SOFTNESS * its standard error)) of the paired difference to the best
    one, and all add up to 1, the base's part being what the merge falls short of full strength. So
    what the examples cannot tell apart is averaged, and with more examples the best one takes all.
    """
    models: dict[str | None, Losses] = {None: base, **sources}
    means = {name: float(x.double().mean()) for name, x in models.items()}
    best = min(models, key=lambda name: (means[name], name or ""))
    weights = {
        name: _weight(x - models[best], gap=means[name] - means[best], softness=SOFTNESS)
        for name, x in models.items()
    }
    whole = sum(weights.values())
    kept = {n: w / whole for n, w in weights.items() if n is not None and w / whole >= LEAST}
    return _of(kept)


def blend(merges: Mapping[Mix, Losses]) -> Mix:
    """The mean of merges, each weighing e times less for every standard error behind the best.

    The merge of least loss among thirty is the luckiest one of those that the examples cannot tell
    apart; the mean of these is none of their extremes. With more examples the best one takes all.
    """
    means = {mix: float(x.double().mean()) for mix, x in merges.items()}
    best = min(merges, key=lambda mix: (means[mix], mix.total, mix.shares))
    found = {
        mix: _weight(x - merges[best], gap=means[mix] - means[best], softness=MERGES_SOFTNESS)
        for mix, x in merges.items()
    }
    whole = sum(found.values())
    kept = {mix: weight for mix, weight in found.items() if weight >= LEAST * whole}
    whole, weights = sum(kept.values()), dict[str, float]()
    for mix, weight in kept.items():
        for source, strength in mix.weights.items():
            weights[source] = weights.get(source, 0.0) + weight / whole * strength
    return _of({source: w for source, w in weights.items() if w >= LEAST})


def _of(weights: Mapping[str, float]) -> Mix:
    """The mix with these strengths."""
    total = sum(weights.values())
    if total < LEAST:
        return BASE
    return Mix(shares=tuple(sorted((s, w / total) for s, w in weights.items())), total=total)


def _weight(difference: Losses, *, gap: float, softness: float) -> float:
    if gap <= 0.0:
        return 1.0
    error = standard_error(difference)
    return math.exp(-gap / (softness * error)) if error > 0.0 else 0.0


def mixes(order: Sequence[str], *, gains: Mapping[str, float]) -> list[Mix]:
    """The merges to consider, simplest first: the best m of the sources that lower the loss."""
    helping = tuple(s for s in order if gains[s] > 0)
    sets = [helping[:m] for m in SET_SIZES if m <= len(helping)]
    return [equal(members, total=t) for members in sets for t in TOTALS]


def heard(
    sources: Mapping[str, Losses], *, base: Losses, doubted: Collection[str]
) -> dict[str, Losses]:
    """The sources without those doubted ones whose help is not sure among all (b losses each)."""
    if not sources:
        return {}
    sure = surely_better(torch.stack([base - losses for losses in sources.values()]))
    return {
        name: losses
        for (name, losses), is_sure in zip(sources.items(), sure, strict=True)
        if is_sure or name not in doubted
    }


def gate(
    sources: Mapping[str, Losses], *, base: Losses, judge: Judge, doubted: Collection[str] = ()
) -> tuple[Mix, dict[Mix, Losses]]:
    """The merge that the examples ask for, and the losses of all that were considered.

    `sources` holds each source's losses as it is, `judge` gives those of mixes, on the same b
    examples. `doubted` are those whose change looks like noise: they take part only where their
    help is sure. The merge is the blend of all that are considered, or the base if that is no
    better.
    """
    sources = heard(sources, base=base, doubted=doubted)
    if not sources:
        return BASE, {BASE: base}
    means = {s: float(x.double().mean()) for s, x in sources.items()}
    order = sorted(sources, key=lambda s: (means[s], s))
    start = float(base.double().mean())
    found: dict[Mix, Losses] = {BASE: base, alone(order[0]): sources[order[0]]}
    few = order[:AVERAGED]
    wanted = [
        soft(sources, base=base),
        equal(few, total=max(1.0, EACH * len(few))),
        *mixes(order, gains={s: start - mean for s, mean in means.items()}),
    ]
    asked = [mix for mix in dict.fromkeys(wanted) if mix not in found]
    found |= dict(zip(asked, judge(asked), strict=True))
    chosen = blend(found)
    if chosen not in found:
        found[chosen] = judge([chosen])[0]
    # What the examples call no better than nothing is nothing.
    return chosen if float(found[chosen].double().mean()) < start else BASE, found
