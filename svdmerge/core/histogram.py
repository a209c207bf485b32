"""Counts of saliences in fixed bins: they add up exactly, so any number of parts gives one cut."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

Array = np.ndarray

# Of a positive float32 (8 bits of exponent, 23 of mantissa) the bits that a bin does not tell
# apart: 2^19 bins in all, each 1/2048 of its value wide. For a power law 1/2000 of what lies above
# a bin lies in it, so that few candidates are left; 4 MiB hold all bins of one part.
DROPPED_BITS = 12
NUM_BINS = 1 << (31 - DROPPED_BITS)


def bins_of(salience: Float[Array, " c"]) -> Int[Array, " c"]:
    """The bin of each salience, none of them negative: monotone, for the bits of positive floats
    are in their order, and so is rounding to float32."""
    with np.errstate(over="ignore"):  # what float32 cannot hold shares the last bin
        return (salience.astype(np.float32).view(np.uint32) >> DROPPED_BITS).astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Histogram:
    """How many saliences lie in each bin that has any, by ascending bin."""

    bins: Int[Array, " b"]
    counts: Int[Array, " b"]

    @staticmethod
    def of(parts: Iterable[Float[Array, " _"]]) -> "Histogram":
        """Of saliences, one part at a time."""
        counts = np.zeros(NUM_BINS, np.int64)
        for part in parts:
            if len(part):
                bins = bins_of(part)
                low = bins.min()
                found = np.bincount(bins - low)
                counts[low : low + len(found)] += found
        return _of_counts(counts)

    @staticmethod
    def merged(parts: Iterable["Histogram"]) -> "Histogram":
        """The sum of histograms: of integers, so in any order and grouping the same."""
        counts = np.zeros(NUM_BINS, np.int64)
        for part in parts:
            counts[part.bins] += part.counts
        return _of_counts(counts)

    def cut(self, k: int) -> tuple[int, int]:
        """The bin in which the k-th largest lies, or the lowest if there are fewer in all, and how
        many lie in bins above it."""
        if len(self.bins) == 0:
            return 0, 0
        from_above = np.cumsum(self.counts[::-1])
        at = min(int(np.searchsorted(from_above, k)), len(self.bins) - 1)
        return int(self.bins[::-1][at]), int(from_above[at] - self.counts[::-1][at])


def _of_counts(counts: Int[Array, " b"]) -> Histogram:
    bins = np.flatnonzero(counts)
    return Histogram(bins=bins, counts=counts[bins])
