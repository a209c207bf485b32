"""A backbone whose frozen weights are shared out over the training processes, block by block."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed import get_world_size
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from svdmerge.core.factored import FactoredLinear


def shard(model: nn.Module, *, device: torch.device) -> None:
    """Leave each process its part of every frozen weight; what trains stays whole on all.

    A block's weights are gathered when it runs, forward and again backward, and given up after it.
    What is outside the blocks (embeddings, an output layer) is gathered for a whole pass: it is
    small in a model that needs this, and some models read it without calling its module. Needs
    `torch.distributed`, and every process to run the same passes.

    Reference: Zhao et al. 2023, arXiv 2304.11277 (FSDP); this is torch's second version of it.
    """
    # Scalars cannot be cut; trained values are a few thousand, averaged by the loop itself.
    whole = {p for p in model.parameters() if p.requires_grad or p.dim() == 0}
    mesh = init_device_mesh(device.type, (get_world_size(),))
    for layer in model.modules():
        if isinstance(layer, FactoredLinear):
            # The other form keeps an adapted weight of its own, whole, until its backward pass.
            layer.forward = layer.low_rank
    for module in [*blocks(model), model]:
        # Given up even where it is needed again at once: memory is what this is for.
        fully_shard(module, mesh=mesh, ignored_params=whole, reshard_after_forward=True)
    model.to(device)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists of modules, as a transformer's layers."""
    listed = isinstance(model, (nn.ModuleList, nn.Sequential))
    for child in model.children():
        # A list of lists is nothing that could be called.
        if listed and not isinstance(child, nn.ModuleList):
            yield from [child] if any(True for _ in child.parameters()) else []
        else:
            yield from blocks(child)


def held_bytes(model: nn.Module) -> int:
    """Bytes of the frozen weights that this process holds between passes."""
    own = (_own(p) for p in model.parameters() if not p.requires_grad)
    return sum(p.numel() * p.element_size() for p in own)


def _own(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
