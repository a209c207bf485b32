"""How wide blocks of components are, and how many steps they may take: from shapes alone.

Imports no torch, for plans need these numbers and no tensors.
"""

# Components of a block at least. Winners of a source are few (about 5 of 384 on real differences);
# yet a product of fewer columns takes no less time.
WIDTH = 16
# Share of the rank that a block of a larger matrix has: what a tenth of it comes to over eight
# sources. Wider, most of many sources' blocks goes unused; narrower, few sources need many of them.
BLOCK_SHARE = 1 / 80
# Steps of Lanczos at most: a basis of a quarter of the rank, yet enough for small matrices. Power
# laws of exponent 0.6 to 0.9 need six to eight.
MIN_STEPS, BASIS_SHARE = 12, 1 / 4
# The least where memory bounds the basis, which starts again if it must.
MIN_STEPS_WITHIN = 10


def block_width(rank: int) -> int:
    """Components of a block of a matrix whose smaller side is `rank`, in whole sixteens."""
    return max(1, int(BLOCK_SHARE * rank) // WIDTH) * WIDTH


def max_steps(rank: int) -> int:
    """Steps of Lanczos for a basis of BASIS_SHARE of the rank, at least MIN_STEPS."""
    return max(MIN_STEPS, int(BASIS_SHARE * rank / block_width(rank)))


def steps_within(rank: int, *, itemsize: int) -> int:
    """Steps of Lanczos where its basis is what needs most memory: in float64 half of those in
    float32."""
    return max(MIN_STEPS_WITHIN, int(BASIS_SHARE * 4 / itemsize * rank / block_width(rank)))
