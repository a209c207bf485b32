"""AdamW that leaves alone the components that no sample of the batch used."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from svdmerge.core.kind.layer import DecomposableLinear


class GatedAdamW(torch.optim.Optimizer):
    """AdamW over a model; momentum, decay and step count of a component stand still with it.

    Plain AdamW moves a tailor by momentum and decay in steps whose batch did not use it. A
    component counts as used where its gradient is not exactly zero, which gated layers make of all
    others: so it holds for accumulated and for all-reduced gradients as it does for one batch.
    Its own step count corrects the bias of its moments, as if steps without it had not been.

    Reference: Loshchilov, Hutter, arXiv 1711.05101, algorithm 2, for each component.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        # Scales, biases and norms are not decayed: none of them makes a model more complex.
        groups = [
            {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]
        self._layers = [m for m in model.modules() if isinstance(m, DecomposableLinear)]
        super().__init__([g for g in groups if g["params"]], {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step on the gradients that are there."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        parts = {id(p): part for layer in self._layers for p, part in _parts(layer)}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group, part=parts.get(id(p)))
        return loss

    def _update(self, p: Tensor, group: dict[str, Any], *, part: "_Part | None") -> None:
        """One parameter's step; of a layer's factor, of the components used, the others' memory
        untouched."""
        state = self.state[p]
        by_column = part is not None and part.by_column
        if not state:
            length = 1 if part is None else p.shape[-1] if by_column else p.shape[0]
            state["step"] = torch.zeros(length, dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        tensors = [p, p.grad, state["exp_avg"], state["exp_avg_sq"]]
        views = [t.T if by_column else t for t in tensors if t is not None]
        step: Tensor = state["step"]
        if part is None or part.used is None:
            _adamw(*views, step=step, group=group)
            return
        rows, own = [v[part.used] for v in views], step[part.used]
        _adamw(*rows, step=own, group=group)
        step[part.used] = own
        for view, row in zip((views[0], *views[2:]), (rows[0], *rows[2:]), strict=True):
            view[part.used] = row


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Part:
    """Which components of a factor a step moves."""

    used: Int[Tensor, " k"] | None
    """Their numbers; None where all are."""
    by_column: bool


def _parts(layer: DecomposableLinear) -> Iterator[tuple[Tensor, _Part]]:
    reached = _used(layer)
    if reached is not None:
        used = None if bool(reached.all()) else reached.nonzero()[:, 0]
        for factor in (layer.u, layer.s, layer.vh):
            yield factor, _Part(used=used, by_column=factor is layer.u)


def _used(layer: DecomposableLinear) -> Bool[Tensor, " r"] | None:
    """Which components a gradient reached; None where the factors have none at all."""
    reached = [
        grad != 0 if grad.dim() == 1 else (grad != 0).any(dim=dim)
        for grad, dim in ((layer.u.grad, 0), (layer.s.grad, 0), (layer.vh.grad, 1))
        if grad is not None
    ]
    return torch.stack(reached).any(dim=0) if reached else None


def _adamw(
    p: Tensor, grad: Tensor, mean: Tensor, square: Tensor, *, step: Tensor, group: dict[str, Any]
) -> None:
    """AdamW in place; `step` counts those of each row, or of all (length 1)."""
    lr, (beta1, beta2), eps = group["lr"], group["betas"], group["eps"]
    step += 1
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    # Powers in float64: 1 - 0.999^1 loses four digits in float32.
    corrections = [1 - beta ** step.double() for beta in (beta1, beta2)]
    shape = (-1, *[1] * (p.dim() - 1))
    first, second = (c.to(p.dtype).view(shape) for c in corrections)
    p.mul_(1 - lr * group["weight_decay"])
    p.sub_(lr * (mean / first) / ((square / second).sqrt() + eps))
