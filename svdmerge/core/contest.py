"""The last slots of a budget that many matrices share: who gets them among nearly equal rivals."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int

Array = np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rivals:
    """Components for which slots are left, in no order.

    `keys` are sorted texts, of which `key` tells each rival's: "sha256 parameter". What shares one
    is of one matrix and the same content, and which of those come first is that matrix's affair.
    """

    salience: Float[Array, " c"]
    key: Int[Array, " c"]
    keys: tuple[str, ...]

    @staticmethod
    def of(parts: Iterable[tuple[Float[Array, " _"], str]]) -> "Rivals":
        """Rivals from the saliences of each key; one may come in several parts."""
        found = [(salience, key) for salience, key in parts if len(salience)]
        keys = tuple(sorted({key for _, key in found}))
        place = {key: i for i, key in enumerate(keys)}
        return Rivals(
            salience=np.concatenate([np.zeros(0), *(salience for salience, _ in found)]),
            key=np.repeat(
                np.array([place[key] for _, key in found], np.int64),
                np.array([len(salience) for salience, _ in found], np.int64),
            ),
            keys=keys,
        )

    def __len__(self) -> int:
        return len(self.key)

    def first(self, k: int) -> "Rivals":
        """The first k of them by (salience descending, key)."""
        if len(self) <= k:
            return self
        # Partition first, as in `top_k`: only what ties with the last one is sorted.
        last = np.partition(self.salience, len(self) - k)[len(self) - k]
        sure = np.flatnonzero(self.salience > last)
        tied = np.flatnonzero(self.salience == last)
        tied = tied[np.argsort(self.key[tied], kind="stable")]
        kept = np.concatenate([sure, tied[: k - len(sure)]])
        used, key = np.unique(self.key[kept], return_inverse=True)
        return Rivals(salience=self.salience[kept], key=key, keys=tuple(self.keys[i] for i in used))

    def by_key(self) -> Iterator[tuple[Float[Array, " _"], str]]:
        """The saliences of each key."""
        order = np.argsort(self.key, kind="stable")
        starts = np.searchsorted(self.key[order], np.arange(len(self.keys) + 1))
        for key, (start, stop) in zip(self.keys, pairwise(starts), strict=True):
            yield self.salience[order[start:stop]], key

    def by_parameter(self) -> Counter[str]:
        """How many there are of each parameter."""
        counts: Counter[str] = Counter()
        for salience, key in self.by_key():
            counts[key.partition(" ")[2]] += len(salience)
        return counts


def merged(parts: Iterable[Rivals], *, k: int) -> Rivals:
    """The first k of all parts; of parts that were cut to their own first k the same."""
    return Rivals.of(pair for part in parts for pair in part.by_key()).first(k)
