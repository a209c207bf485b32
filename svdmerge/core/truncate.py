"""The best approximation of a sum of components by fewer, and what it leaves out."""

from dataclasses import dataclass

from svdmerge.core.components import RankOneComponents
from svdmerge.core.merge import recompress


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Truncated:
    """Leading components of a sum, and Frobenius norms."""

    components: RankOneComponents
    lost: float
    """Of what is left out."""
    norm: float
    """Of the sum."""


def truncated(parts: RankOneComponents, *, rank: int) -> Truncated:
    """The leading components of the sum's SVD, `rank` at most.

    No matrix of that rank is nearer to the sum (Eckart and Young, 1936).
    """
    whole = recompress(parts)
    return Truncated(
        components=whole.slice(0, min(rank, len(whole))),
        lost=float(whole.s[rank:].norm()),
        norm=float(whole.s.norm()),
    )
