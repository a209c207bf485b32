"""Experts as PEFT adapts them: all matrices of a module's parameter in one layer.

Its A is (experts * rank, n), its B (m, rank * experts) with the experts counted first, so one rank
serves all: where an expert has fewer components, the rest are zero. Gate and up lie in one
parameter, one below the other; their components are side by side.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svdmerge.core.components import RankOneComponents
from svdmerge.storage.architecture import ClassTensor
from svdmerge.training.backbone import Backbone


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertLayer:
    """PEFT's layer for a parameter of experts."""

    parameter: str
    """The module's name of it, as `target_parameters` has it."""
    path: str
    """The layer's own."""
    a: Tensor
    """(experts * rank, n)."""
    b: Tensor
    """(m, rank * experts)."""
    rank: int


def expert_layers(
    differences: Mapping[str, RankOneComponents], backbone: Backbone
) -> Iterator[ExpertLayer]:
    """The layers that carry differences of the checkpoint's tensors that are parts of stacks."""
    stacks = {
        name: stack
        for name, stack in backbone.stacks.items()
        if any(part.tensor in differences for part in stack.parts)
    }
    for name, stack in stacks.items():
        a, b = _factors(stack, differences)
        yield ExpertLayer(
            parameter=name,
            path=_path(name, stacks, backbone.module),
            a=a.reshape(-1, a.shape[2]).to(torch.float32).contiguous(),
            b=b.permute(1, 2, 0).reshape(b.shape[1], -1).to(torch.float32).contiguous(),
            rank=a.shape[1],
        )


def _factors(
    stack: ClassTensor, differences: Mapping[str, RankOneComponents]
) -> tuple[Tensor, Tensor]:
    """A (experts, rank, n) and B (experts, m, rank)."""
    experts, m, n = stack.shape
    parts = [(part, differences[part.tensor]) for part in stack.parts if part.tensor in differences]
    ranks = [0] * experts
    for part, components in parts:
        ranks[part.expert or 0] += len(components)
    a = torch.zeros(experts, max(ranks), n, dtype=torch.float64)
    b = torch.zeros(experts, m, max(ranks), dtype=torch.float64)
    filled = [0] * experts
    for part, components in parts:
        c, expert = components.to(torch.float64), part.expert or 0
        columns = slice(filled[expert], filled[expert] + len(c))
        root = c.s.abs().sqrt()
        a[expert, columns] = root[:, None] * c.vh
        b[expert, part.first : part.first + part.rows, columns] = c.u * (c.s.sign() * root)
        filled[expert] += len(c)
    return a, b


def _path(name: str, adapted: Mapping[str, ClassTensor], model: nn.Module) -> str:
    """PEFT wraps a module once for each parameter that it adapts, in the module's order."""
    owner, _, leaf = name.rpartition(".")
    leaves = [n for n, _ in model.get_submodule(owner).named_parameters(recurse=False)]
    around = [n for n in leaves[leaves.index(leaf) + 1 :] if f"{owner}.{n}" in adapted]
    return owner + ".base_layer" * len(around)
