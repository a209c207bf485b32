"""Linear layers whose merged weight is frozen and whose singular values train.

W' = W + U diag(d) Vh with W = W_0 + U_all diag(s) Vh_all merged already: `d` is the change of the
leading singular values, starts at zero, and is all that trains.

Letters besides the package's: t rows (tokens) of a step; k directions trained.
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from svdmerge.core.components import RankOneComponents
from svdmerge.errors import TrainingError


def rebuild_is_cheaper(*, num_rows: int, m: int, n: int) -> bool:
    """Whether rebuilding W' once costs fewer flops than the low-rank form, for t rows of a step.

    Beyond the frozen layer's 2 t m n forward and 2 t m n for its input's gradient, with k columns:

    low-rank  x Vh^T and its spread by U forward, gy U and its spread by Vh backward: 4 t k (m + n)
    rebuilt   W + (U d) Vh once, 2 m n k; then x Vh^T and gy U for grad d:   2 m n k + 2 t k (m + n)

    The difference is 2 k (t (m + n) - m n): the choice does not depend on k, and it is the same
    without gradients, where only 2 t k (m + n) and 2 m n k remain.
    """
    return num_rows * (m + n) > m * n


def trained_directions(
    components: RankOneComponents, *, num_values: int, null_space: bool, seed: int
) -> RankOneComponents:
    """The directions whose singular values train: the leading min(num_values, k) of the matrix.

    With `null_space`, further directions complete them to `num_values`, as in the published
    method, which trains zeros wherever N exceeds the merged difference's rank (arXiv 2508.19353).
    """
    if null_space and num_values > len(components):
        return complete(components, num_values=num_values, seed=seed)
    return components.slice(0, num_values)


def complete(components: RankOneComponents, *, num_values: int, seed: int) -> RankOneComponents:
    """The components and seeded null-space directions behind them, singular value zero, in all
    `num_values`. The new ones are orthonormal, and orthogonal to the given ones.

    Raises:
        TrainingError: more are asked for than the matrix has.
    """
    m, n = components.u.shape[0], components.vh.shape[1]
    if num_values > min(m, n):
        raise TrainingError(
            f"{num_values} singular values of a {m} x {n} matrix",
            f"It has {min(m, n)}.",
            "Lower `num_values`.",
        )
    generator = torch.Generator().manual_seed(seed)
    missing = num_values - len(components)
    u = _complement(components.u, num_columns=missing, generator=generator)
    v = _complement(components.vh.T, num_columns=missing, generator=generator)
    dtype = components.s.dtype
    return RankOneComponents(
        u=torch.cat([components.u, u.to(dtype)], dim=1),
        s=torch.cat([components.s, torch.zeros(missing, dtype=dtype)]),
        vh=torch.cat([components.vh, v.T.to(dtype)]),
    )


def _complement(
    columns: Float[Tensor, "m k"], *, num_columns: int, generator: torch.Generator
) -> Float[Tensor, "m j"]:
    """Random orthonormal columns, orthogonal to those given."""
    # In float64: what QR leaves along the given columns then vanishes in float32.
    given = columns.to(torch.float64)
    random = torch.randn(given.shape[0], num_columns, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(torch.cat([given, random], dim=1)).Q[:, given.shape[1] :]


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


class FactoredLinear(nn.Module):
    """`linear` with W' = W + U diag(sigma_change) Vh in place of W; only `sigma_change` trains."""

    # What the module's registration holds, for the type checker.
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, *, directions: RankOneComponents) -> None:
        super().__init__()
        weight = linear.weight.detach()
        # Parameters, though frozen: what shards a model over processes passes buffers by.
        self.weight = _frozen(weight)
        self.register_parameter("bias", None if linear.bias is None else _frozen(linear.bias))  # pyright: ignore[reportUnnecessaryComparison]
        # Contiguous in the layout the products read: a transposed view costs a copy each step.
        self.u = _frozen(directions.u.to(weight).contiguous())
        self.vh = _frozen(directions.vh.to(weight).contiguous())
        self.sigma_change = nn.Parameter(torch.zeros_like(self.u[0]))

    def forward(self, x: Tensor) -> Tensor:
        """x W'^T + bias for x of shape (..., n), by the cheaper form for the number of rows."""
        m, n = self.weight.shape
        if rebuild_is_cheaper(num_rows=x.numel() // max(n, 1), m=m, n=n):
            return self.rebuilt(x)
        return self.low_rank(x)

    def low_rank(self, x: Tensor) -> Tensor:
        """W x + U (d * (Vh x)): W' is never formed, and autograd keeps Vh x instead of x."""
        y = F.linear(x, self.weight, self.bias)
        return y + F.linear(F.linear(x, self.vh) * self.sigma_change, self.u)

    def rebuilt(self, x: Tensor) -> Tensor:
        """W' x with W' formed once and a backward that never forms its gradient."""
        y: Tensor = _Rebuilt.apply(x, self.weight, self.bias, self.u, self.sigma_change, self.vh)  # pyright: ignore[reportAssignmentType]
        return y

    @torch.no_grad()
    def adapted_weight(self) -> Float[Tensor, "m n"]:
        """W', summed in float64, in the weight's dtype."""
        change = (self.u.double() * self.sigma_change.double()) @ self.vh.double()
        return (self.weight.double() + change).to(self.weight.dtype)


class _Rebuilt(torch.autograd.Function):
    """y = x (W + U diag(d) Vh)^T + b.

    grad x = gy W', and grad d_i = u_i^T (gy^T x) vh_i = sum over rows of (gy U)_i (x Vh^T)_i, so
    the (m, n) gradient of W' is never formed. U, Vh, W and b are frozen and get none.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor, d: Tensor, vh: Tensor
    ) -> Tensor:
        """The adapted layer's output. Keeps x Vh^T (t, k) for grad d, not x (t, n)."""
        adapted = torch.addmm(weight, u * d, vh)
        along = F.linear(x, vh) if ctx.needs_input_grad[4] else None
        # Under autocast the products are in its type, and backward runs outside it.
        along_u = u if along is None else u.to(along.dtype)
        ctx.save_for_backward(adapted if ctx.needs_input_grad[0] else None, along_u, along)
        ctx.dtype = d.dtype
        return F.linear(x, adapted, bias)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  torch's stub is looser
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x and d; None for what is frozen."""
        gy, (adapted, u, along) = grad_outputs[0], ctx.saved_tensors
        grad_x = gy @ adapted if adapted is not None else None
        grad_d = None
        if along is not None:
            grad_d = ((gy @ u) * along).reshape(-1, u.shape[1]).sum(dim=0, dtype=ctx.dtype)
        return grad_x, None, None, None, grad_d, None


def install(
    model: nn.Module, *, directions: Mapping[str, RankOneComponents]
) -> dict[str, FactoredLinear]:
    """The factored layers now in the model, by weight name; everything else in it is frozen.

    `directions` maps a weight's name, as `encoder.layer.0.output.dense.weight`, to what trains.

    Raises:
        TrainingError: a name is no weight of an `nn.Linear`, or the directions do not fit it.
    """
    layers: dict[str, FactoredLinear] = {}
    for name, components in directions.items():
        linear = linear_of(model, name)
        if linear is None:
            raise TrainingError(
                f"{name}: is not the weight of a linear layer of the backbone",
                "Only matrices of nn.Linear modules can be tuned.",
                "Leave it out of what is tuned.",
            )
        if is_transposed(model, name):
            components = RankOneComponents(u=components.vh.T, s=components.s, vh=components.u.T)
        shape = (components.u.shape[0], components.vh.shape[1])
        if shape != tuple(linear.weight.shape):
            raise TrainingError(
                f"{name}: its factors are of a {shape[0]} x {shape[1]} matrix",
                f"The backbone's is {linear.weight.shape[0]} x {linear.weight.shape[1]}.",
                "Use the factors of a merge of this very base.",
            )
        layers[name] = FactoredLinear(linear, directions=components)
    model.requires_grad_(False)
    for name, layer in layers.items():
        parent, _, child = name.removesuffix(".weight").rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return layers


def linear_of(model: nn.Module, name: str) -> nn.Linear | None:
    """The `nn.Linear` whose weight has this name, or one equal to a GPT-2 layer; else None."""
    module = _module_of(model, name)
    if not _is_transposed(module):
        return module if isinstance(module, nn.Linear) else None
    weight, bias = module.get_parameter("weight"), module.get_parameter("bias")
    turned = nn.Linear(weight.shape[0], weight.shape[1], device="meta")
    turned.weight = nn.Parameter(weight.detach().T.contiguous(), requires_grad=False)
    turned.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return turned


def is_transposed(model: nn.Module, name: str) -> bool:
    """Whether the weight of this name is stored as (in, out), so that its layer is x W + b."""
    return _is_transposed(_module_of(model, name))


def _module_of(model: nn.Module, name: str) -> nn.Module | None:
    path = name.removesuffix(".weight")
    if path == name:
        return None
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _is_transposed(module: nn.Module | None) -> TypeGuard[nn.Module]:
    # By name, for transformers stays out of here: the linear layer of GPT and GPT-2.
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.dim() == 2


def num_trained(layers: Iterable[FactoredLinear]) -> int:
    """Singular values that train, all layers together."""
    return sum(layer.sigma_change.numel() for layer in layers)
