"""Whether a source comes from this base: how large and how flat its difference is."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median

# ||D|| / ||W_0|| of two models that share no ancestor is 1.4, whatever they learned; of fine-tunes
# measured 0.01 to 0.1, of long continued pre-training 0.3.
UNRELATED = 0.7
# Among sources of one library: so many times the others' median, where it is not small either.
OUTLYING, SMALL = 10.0, 0.2
# What a base's norm counts for at least: of a base of zeros only itself is kin, and reports hold no
# infinities, which are no JSON.
LEAST = 1e-30


@dataclass(frozen=True, slots=True, kw_only=True)
class Norms:
    """Of one matrix of a source: its difference's norms and the base's."""

    fro: float
    base_fro: float
    largest: float | None = None
    """||D||_2, where it is known."""
    rank: int = 1
    """min(m, n)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kinship:
    """A source's difference to its base, over all decomposed matrices."""

    norm: float
    """||D||_F over ||W_0||_F; the squares of matrices added up."""
    effective_rank: float | None
    """||D||_F^2 / ||D||_2^2 over the rank, median over matrices: near 0 of a low-rank change, of
    noise a quarter. None where no matrix tells it."""


def kinship_of(matrices: Iterable[Norms]) -> Kinship | None:
    """What matrices tell of their source; None if there are none."""
    found = list(matrices)
    if not found:
        return None
    size, base = math.hypot(*(x.fro for x in found)), math.hypot(*(x.base_fro for x in found))
    norm = size / max(base, LEAST)
    ranks = [(x.fro / x.largest) ** 2 / x.rank for x in found if x.largest]
    return Kinship(norm=norm, effective_rank=median(ranks) if ranks else None)


def strangers(sources: Mapping[str, Kinship]) -> dict[str, str]:
    """Sources that seem to come from another base, with the reason in numbers.

    The norm decides: nothing that fine-tuning does takes weights as far as another start lies. The
    effective rank is told beside it, for a person to judge.
    """
    found: dict[str, str] = {}
    for name, kinship in sources.items():
        others = [k.norm for n, k in sources.items() if n != name]
        usual = median(others) if others else None
        outlying = usual is not None and SMALL < kinship.norm > OUTLYING * usual
        # Not >=, and a NaN is no kin.
        if not kinship.norm <= UNRELATED or outlying:
            beside = f", the others' median {usual:.3g}" if usual is not None else ""
            rank = kinship.effective_rank
            flat = f", of effective rank {rank:.1%}" if rank is not None else ""
            far = f"its difference is {kinship.norm:.3g} times the base's norm"
            found[name] = far + beside + flat
    return found
