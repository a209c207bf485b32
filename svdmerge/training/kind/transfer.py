"""Learngenes carried over to a new decomposable model, with fresh tailors beside them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from svdmerge.core.kind.layer import DecomposableLinear
from svdmerge.core.kind.replace import layers_of
from svdmerge.errors import RecipeError

FACTORS = ("u", "s", "vh")


@torch.no_grad()
def carry(
    model: nn.Module, *, state: Mapping[str, Tensor], learngenes: Mapping[str, int]
) -> list[str]:
    """Names of the tensors taken over whole, the model's values being theirs now.

    `learngenes` counts those of each layer in `state`, from which they are taken; tailors stay as
    they started. Of other tensors those that both have in one shape are taken over.

    Raises:
        RecipeError: a layer is missing, or has another shape or number of learngenes.
    """
    layers = layers_of(model)
    for path, layer in layers.items():
        _carry_layer(path, layer, state=state, num_learngenes=learngenes.get(path))
    own = model.state_dict()
    factors = {f"{path}.{name}" for path in layers for name in FACTORS}
    carried = [
        name
        for name, value in state.items()
        if name in own and name not in factors and own[name].shape == value.shape
    ]
    for name in carried:
        own[name].copy_(state[name])
    return carried


def _carry_layer(
    path: str,
    layer: DecomposableLinear,
    *,
    state: Mapping[str, Tensor],
    num_learngenes: int | None,
) -> None:
    here = (layer.sizes[0], layer.out_features, layer.in_features)
    if num_learngenes is None:
        raise RecipeError(
            f"{path}: the model to transfer from has no such layer",
            "Learngenes are carried over layer by layer.",
            "Transfer to the same architecture.",
        )
    u, s, vh = (state[f"{path}.{name}"] for name in FACTORS)
    there = (num_learngenes, u.shape[0], vh.shape[1])
    if here != there:
        raise RecipeError(
            f"{path}: {here[0]} learngenes of a {here[1]} x {here[2]} layer",
            f"The model to transfer from has {there[0]} of a {there[1]} x {there[2]} layer.",
            "Give `learngenes` and an architecture as it was trained with.",
        )
    layer.u[:, :num_learngenes] = u[:, :num_learngenes]
    layer.s[:num_learngenes] = s[:num_learngenes]
    layer.vh[:num_learngenes] = vh[:num_learngenes]


def freeze(model: nn.Module, *, carried: list[str]) -> None:
    """Keep learngenes, and matrices that were carried over, as they are; tailors, vectors (biases,
    norms) and what is new train.

    Learngenes share their parameters with tailors, so it is their gradient that is stopped: a
    component without one is neither moved nor decayed by `GatedAdamW`.
    """
    for name, parameter in model.named_parameters():
        if name in carried and parameter.dim() >= 2:
            parameter.requires_grad_(False)
    for layer in layers_of(model).values():
        for parameter, axis in ((layer.u, 1), (layer.s, 0), (layer.vh, 0)):
            parameter.register_hook(_stopping(layer.sizes[0], axis=axis))


def _stopping(count: int, *, axis: int):
    def stop(grad: Tensor) -> Tensor:
        stopped = grad.clone()
        stopped.narrow(axis, 0, count).zero_()
        return stopped

    return stop


def num_trainable(model: nn.Module, *, frozen_learngenes: bool) -> int:
    """Values that training moves."""
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not frozen_learngenes:
        return total
    layers = layers_of(model).values()
    return total - sum(x.sizes[0] * (x.in_features + x.out_features + 1) for x in layers)
