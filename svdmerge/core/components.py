"""The one currency: rank-one components of a matrix."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankOneComponents:
    """Components s_i * outer(u_i, vh_i) of one matrix. Nothing is assumed of order, sign or angle:

    AXIS's are sorted, orthonormal within a source and non-negative; KIND's are none of these.
    """

    u: Float[Tensor, "m k"]
    s: Float[Tensor, " k"]
    vh: Float[Tensor, "k n"]

    def __len__(self) -> int:
        return self.s.shape[0]

    def dense(self) -> Float[Tensor, "m n"]:
        """The sum of the components."""
        return (self.u * self.s) @ self.vh

    def slice(self, start: int, stop: int) -> "RankOneComponents":
        """Components start..stop-1."""
        return RankOneComponents(
            u=self.u[:, start:stop], s=self.s[start:stop], vh=self.vh[start:stop]
        )

    def scaled(self, factor: float) -> "RankOneComponents":
        """The components times a factor, in float64."""
        c = self.to(torch.float64)
        return RankOneComponents(u=c.u, s=c.s * factor, vh=c.vh)

    def to(self, dtype: torch.dtype) -> "RankOneComponents":
        """The same components in another dtype."""
        return RankOneComponents(u=self.u.to(dtype), s=self.s.to(dtype), vh=self.vh.to(dtype))

    def on(self, device: torch.device | str) -> "RankOneComponents":
        """The same components on another device."""
        return RankOneComponents(u=self.u.to(device), s=self.s.to(device), vh=self.vh.to(device))


def concatenate(parts: Sequence[RankOneComponents]) -> RankOneComponents:
    """All components of the parts, in their order: a component list of the parts' sum."""
    return RankOneComponents(
        u=torch.cat([p.u for p in parts], dim=1),
        s=torch.cat([p.s for p in parts]),
        vh=torch.cat([p.vh for p in parts]),
    )


def flat(values: Float[Tensor, "1 n"]) -> RankOneComponents:
    """A flat difference as one component with u = s = 1: exact, and the same currency."""
    one = torch.ones(1, dtype=values.dtype)
    return RankOneComponents(u=one[:, None], s=one, vh=values)


def none(m: int, n: int) -> RankOneComponents:
    """No components of an (m, n) matrix: their sum is zero."""
    return RankOneComponents(u=torch.zeros(m, 0), s=torch.zeros(0), vh=torch.zeros(0, n))
