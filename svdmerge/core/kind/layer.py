"""A linear layer whose weight is a sum of rank-one components, chosen by each sample's class."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from svdmerge.core.components import RankOneComponents
from svdmerge.errors import RecipeError, TrainingError


class DecomposableLinear(nn.Module):
    """y = ((x Vh^T) * (s * mask)) U^T + bias, the mask by each sample's class: see `gated`.

    Where there is a `base`, x base^T is added: what every class uses, in dense form.

    The factors are free parameters: unsorted, signed, not orthogonal (arXiv 2408.07337), and
    nothing ever sorts or decomposes them again. No weight matrix is formed, for no class.
    """

    # What the module's registrations hold, for the type checker.
    group: Tensor

    def __init__(
        self,
        components: RankOneComponents,
        *,
        group: Sequence[int],
        bias: Float[Tensor, " m"] | None,
        base: Float[Tensor, "m n"] | None = None,
    ) -> None:
        """`group` tells of each component 0 for a learngene, 1 + g for a tailor of group g.

        Raises:
            RecipeError: `group` does not fit, or learngenes are not first, groups not in order.
        """
        super().__init__()
        if len(group) != len(components) or list(group) != sorted(group):
            raise RecipeError(
                f"{len(components)} components with groups {list(group)[:8]}...",
                "Expected one group for each, learngenes (0) first and then group by group.",
                "Order the components by group.",
            )
        self.u = nn.Parameter(components.u.detach().clone(memory_format=torch.contiguous_format))
        self.s = nn.Parameter(components.s.detach().clone())
        self.vh = nn.Parameter(components.vh.detach().clone(memory_format=torch.contiguous_format))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.base = None if base is None else nn.Parameter(base.detach().clone())
        self.register_buffer(
            "group", torch.tensor(list(group), dtype=torch.int64), persistent=False
        )
        self.sizes = tuple(group.count(g) for g in range(max(group, default=0) + 1))
        """Components of each group, the learngenes' number first."""
        self.mask: Tensor | None = None
        """0 or 1 for each component, (r,) or (b, r); set by `gated`."""

    @property
    def in_features(self) -> int:
        """n."""
        return self.vh.shape[1]

    @property
    def out_features(self) -> int:
        """m."""
        return self.u.shape[0]

    @property
    def weight(self) -> Tensor:
        """Shape and type of the weight, without values: some models look at those (T5)."""
        return torch.empty(self.out_features, self.in_features, dtype=self.s.dtype, device="meta")

    def components(self) -> RankOneComponents:
        """Copies of all components, in their order."""
        return RankOneComponents(
            u=self.u.detach().clone(), s=self.s.detach().clone(), vh=self.vh.detach().clone()
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., m) of x (..., n), whose first axis numbers samples.

        Raises:
            TrainingError: no class is given, or as many as x has samples are not.
        """
        along = F.linear(x, self.vh) * self._scales(x)
        if self.base is None:
            return F.linear(along, self.u, self.bias)
        return F.linear(x, self.base, self.bias) + F.linear(along, self.u)

    def _scales(self, x: Tensor) -> Tensor:
        if self.mask is None:
            if len(self.sizes) == 1:  # learngenes alone: the same for every class
                return self.s
            raise TrainingError(
                "a decomposable layer ran without a class",
                "Which tailors a sample uses follows from its class.",
                "Run the model inside `with gated(model, classes):`.",
            )
        # A gate is of float32; a product with it would make a half-precision layer's input that.
        scales = self.s * self.mask.to(self.s.dtype)
        if scales.dim() == 1:
            return scales
        if scales.shape[0] != x.shape[0]:
            raise TrainingError(
                f"{scales.shape[0]} classes for {x.shape[0]} samples",
                "A decomposable layer needs the class of every sample.",
                "Give `gated` one class for each row of the batch.",
            )
        return scales.view(scales.shape[0], *[1] * (x.dim() - 2), scales.shape[1])
