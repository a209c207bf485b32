"""The global top-k: the most salient components of one matrix across all sources."""

import numpy as np
from jaxtyping import Float, Int

Array = np.ndarray


def top_k(
    salience: Float[Array, " c"], *, tie: Int[Array, " c"], index: Int[Array, " c"], k: int
) -> Int[Array, " kept"]:
    """Positions of the k most salient candidates, best first; never one of salience zero.

    The order is total: (salience descending, tie, index), where `tie` ranks a candidate's source by
    the content of its tensor. So the outcome depends on neither arrival nor the number of workers.
    """
    # Not >=: the null space of a rank-deficient or untouched matrix must not fill slots.
    live = np.flatnonzero(salience > 0)
    if len(live) > k > 0:
        # Partition first: sorting is then over k candidates and ties at the cut, not over all.
        cut = np.partition(salience[live], len(live) - k)[len(live) - k]
        live = live[salience[live] >= cut]
    order = np.lexsort((index[live], tie[live], -salience[live]))
    return live[order[:k]]
