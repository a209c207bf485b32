"""Which sources to merge for a target, and how strongly, by losses of its held-out examples."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from svdmerge.core.evidence import choose

# Numbers of sources merged, best first. Nested sets, roughly doubling: each is one more look at
# the same few examples, and the best of many looks is luck.
SET_SIZES = (2, 3, 5, 10, 20, 50, 100)
# Sum of the merged sources' weights. 1 is the plain average; sources that share directions are
# over-counted by their number, while those that do not are worth their full strength each.
TOTALS = (0.5, 1.0, 1.5, 2.0, 3.0)
# Of the best source alone: as it is, or part of the way from the base (WiSE-FT, 2109.01903).
ALONE = (1.0, 0.75, 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Sources that are merged with equal weights, and the sum of these; none is the base itself."""

    sources: tuple[str, ...] = ()
    total: float = 0.0

    @property
    def weight(self) -> float:
        """Of each source."""
        return self.total / len(self.sources) if self.sources else 0.0


BASE = Mix()
Losses = Float[Tensor, " b"]
Judge = Callable[[Sequence[Mix]], Sequence[Losses]]


def alone(source: str) -> Mix:
    """A source as it is."""
    return Mix(sources=(source,), total=1.0)


def mixes(order: Sequence[str], *, gains: Mapping[str, float]) -> list[Mix]:
    """The merges to consider besides the base and the best source alone, simplest first.

    `order` holds the sources, best first; merged are the best m of those that lower the loss.
    """
    helping = tuple(s for s in order if gains[s] > 0)
    sets = [helping[:m] for m in SET_SIZES if m <= len(helping)]
    found = [Mix(sources=tuple(order[:1]), total=t) for t in ALONE[1:]]
    return found + [Mix(sources=members, total=t) for members in sets for t in TOTALS]


def gate(
    sources: Mapping[str, Losses], *, base: Losses, judge: Judge
) -> tuple[Mix, dict[Mix, Losses]]:
    """The merge that the examples ask for, and the losses of all that were considered.

    `sources` holds each source's losses as it is, `judge` gives those of mixes, on the same b
    examples. Starts from the better of the base and the best source; a merge takes their place only
    if it is better by more than noise (`core.evidence.choose`).
    """
    means = {s: float(x.double().mean()) for s, x in sources.items()}
    order = sorted(sources, key=lambda s: (means[s], s))
    start = float(base.double().mean())
    found: dict[Mix, Losses] = {BASE: base, alone(order[0]): sources[order[0]]}
    single = min(found, key=lambda mix: float(found[mix].double().mean()))
    rest = mixes(order, gains={s: start - mean for s, mean in means.items()})
    found |= dict(zip(rest, judge(rest), strict=True))
    ordered = [single, *rest]
    return ordered[choose([found[mix] for mix in ordered])], found
