"""What comparators minimise: cross-entropy with a head, or the cosine loss of SetFit's pairs."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from svdmerge.core.transfer import LinearHead
from svdmerge.errors import TrainingError
from svdmerge.peers.train import Objective

# Pairs of each kind drawn for each example: R in SetFit.
ROUNDS = 20


class Classification(Objective):
    """Cross-entropy of a linear head that trains along, from a given start; items are examples."""

    def __init__(self, labels: Int[Tensor, " b"], *, head: LinearHead) -> None:
        self._labels = labels.long()
        # float32, as features are; the closed-form head it starts from is float64.
        self._weight = nn.Parameter(head.weight.detach().to(labels.device, torch.float32))
        self._bias = nn.Parameter(head.bias.detach().to(labels.device, torch.float32))

    @property
    def num_items(self) -> int:
        """One for each example."""
        return len(self._labels)

    def values(self) -> list[nn.Parameter]:
        """The head."""
        return [self._weight, self._bias]

    def loss(self, features: Callable[[list[int]], Tensor], *, items: list[int]) -> Tensor:
        """The mean cross-entropy."""
        scores = F.linear(features(items), self._weight, self._bias)
        return F.cross_entropy(scores, self._labels[items])

    def head(self) -> LinearHead:
        """The head as it is now."""
        return LinearHead(weight=self._weight.detach().clone(), bias=self._bias.detach().clone())


class ContrastivePairs(Objective):
    """Squared error of the cosine of pairs to 1 within a class and 0 across; items are pairs.

    For each example and round, one seeded positive and one negative partner: 2 R b pairs. The head
    follows afterwards, on the frozen features. One epoch of batches of 16 is its authors' training;
    their library's rate for the body, all weights free, is 2e-5.

    Deviations: an example is never its own partner (theirs may be, which trains nothing), so the
    only example of a class has no positive pairs; `max_steps` of the training may cut the epoch.

    Reference: SetFit, arXiv 2209.11055.
    """

    def __init__(self, labels: Int[Tensor, " b"], *, seed: int, rounds: int = ROUNDS) -> None:
        rows = labels.tolist()
        if len(set(rows)) < 2:
            raise TrainingError(
                f"{len(rows)} examples of {len(set(rows))} class",
                "Contrastive pairs need examples of two classes.",
                "Give examples of another class.",
            )
        generator = torch.Generator().manual_seed(seed)
        labels = labels.cpu()
        self._pairs: list[tuple[int, int, float]] = []
        for row in range(len(rows)):
            same = (labels == labels[row]).nonzero()[:, 0]
            for pool, target in (
                (same[same != row], 1.0),
                ((labels != labels[row]).nonzero()[:, 0], 0.0),
            ):
                if len(pool):
                    drawn = pool[torch.randint(len(pool), (rounds,), generator=generator)]
                    self._pairs += [(row, other, target) for other in drawn.tolist()]

    @property
    def num_items(self) -> int:
        """2 R for each example that has company in its class, else R."""
        return len(self._pairs)

    def values(self) -> list[nn.Parameter]:
        """Nothing: cosines need no head."""
        return []

    def loss(self, features: Callable[[list[int]], Tensor], *, items: list[int]) -> Tensor:
        """The mean squared error of the cosines."""
        pairs = [self._pairs[item] for item in items]
        # Each distinct example passes through the model once a step.
        rows = sorted({row for pair in pairs for row in pair[:2]})
        place = {row: i for i, row in enumerate(rows)}
        found = features(rows)
        first = found[[place[a] for a, _, _ in pairs]]
        second = found[[place[b] for _, b, _ in pairs]]
        target = torch.tensor([t for _, _, t in pairs], device=found.device)
        return F.mse_loss(F.cosine_similarity(first, second), target)
