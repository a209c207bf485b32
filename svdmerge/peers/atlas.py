"""aTLAS: one learned scalar for every source and parameter."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from svdmerge.peers.space import Weights, WeightSpace, shared_names, taken
from svdmerge.peers.train import TrainSettings

# As the authors' few-shot script: AdamW at 0.1, decay 0.1, 10 epochs, batches of 128, a cosine
# without warm-up. The head's rate is ours: theirs is frozen.
PUBLISHED = TrainSettings(
    epochs=10, batch_size=128, learning_rate=0.1, head_learning_rate=1e-3, weight_decay=0.1
)


class Atlas(WeightSpace):
    """W = W_0 + sum over sources i of c_ib D_ib for every parameter b; c trains, from zero.

    All differences of all sources stay in memory and are summed at every step, so both grow with
    the sources: that is the method. The sum is one product of c and the stacked differences.

    Deviations: no clipping of the gradient's norm at 1, no best epoch picked on validation data,
    few examples are not repeated to fill ten batches an epoch, and the head trains along.

    Reference: aTLAS, arXiv 2407.02880; the start and the settings as in the authors' code.
    """

    def __init__(self, base: Weights, *, differences: Sequence[Weights]) -> None:
        names = shared_names(differences, fix="Give zeros where a source leaves a parameter alone.")
        self._start = taken(names, weights=base, what="differences")
        self._differences = {
            name: torch.stack([d[name].detach().to(start) for d in differences])
            for name, start in self._start.items()
        }
        device = next(iter(self._start.values())).device
        self._coefficients = nn.Parameter(torch.zeros(len(differences), len(names), device=device))

    def values(self) -> list[nn.Parameter]:
        """The coefficients (sources, parameters)."""
        return [self._coefficients]

    def weights(self) -> dict[str, Tensor]:
        """W_0 and the scaled differences."""
        columns = self._coefficients.unbind(dim=1)
        return {
            name: start + torch.tensordot(c, self._differences[name], dims=1)
            for c, (name, start) in zip(columns, self._start.items(), strict=True)
        }

    def frozen(self) -> Iterable[Tensor]:
        """W_0 and every source's differences."""
        yield from self._start.values()
        yield from self._differences.values()
