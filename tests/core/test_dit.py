"""The diffusion transformer's parts against formulas, and what its start promises."""

import math

import pytest
import torch
from torch import Tensor, nn

from svdmerge.core.dit import Block, DiT, DiTConfig
from svdmerge.core.kind.gate import disjoint, gated
from svdmerge.core.kind.replace import Spec, decomposable
from svdmerge.errors import TrainingError


def config(**changes: int) -> DiTConfig:
    sizes = {
        "image_size": 8, "channels": 2, "patch": 2, "width": 16, "depth": 2, "heads": 2,
        "num_classes": 3,
    }  # fmt: skip
    return DiTConfig(**(sizes | changes))


def filled(model: nn.Module) -> nn.Module:
    """The model with nothing left at zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def batch(num: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(num, 2, 8, 8, generator=generator)
    return images, torch.rand(num, generator=generator), torch.arange(num) % 3


def test_a_new_model_predicts_zero_and_its_blocks_are_the_identity() -> None:
    model = DiT(config())
    assert not model(*batch()).any()
    x = torch.randn(2, 5, 16)
    assert torch.equal(Block(config())(x, condition=torch.randn(2, 16)), x)


def test_a_patch_is_seen_with_half_of_its_neighbours_and_put_in_its_place() -> None:
    model = filled(DiT(config(depth=1)))
    with torch.no_grad():  # blocks off, every patch to itself: only the cutting is left
        model.blocks[0].modulation.weight.zero_()
        model.blocks[0].modulation.bias.zero_()
    images, times, classes = batch(1)
    before = model(images, times, classes)
    images[0, :, 4, 7] += 1.0  # the first row of the last patch of the third row of patches
    changed = (model(images, times, classes) != before).any(dim=1)[0]
    wanted = torch.zeros(8, 8, dtype=torch.bool)
    wanted[2:6, 6:8] = True  # that patch, and the one above, whose half it is
    assert torch.equal(changed, wanted)


def test_a_block_is_the_formula_of_adaln_zero() -> None:
    block = filled(Block(config()))
    x, c = torch.randn(2, 5, 16), torch.randn(2, 16)
    parts = (nn.functional.silu(c) @ block.modulation.weight.T + block.modulation.bias).view(
        2, 6, 16
    )
    shift1, scale1, gate1, shift2, scale2, gate2 = (parts[:, [i]] for i in range(6))

    def norm(y: Tensor) -> Tensor:
        centred = y - y.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    y, at = norm(x) * (1 + scale1) + shift1, block.attention
    heads: list[Tensor] = []
    for h in range(2):
        part = slice(8 * h, 8 * h + 8)
        q, k, v = (layer(y)[..., part] for layer in (at.q, at.k, at.v))
        heads.append(torch.softmax(q @ k.transpose(1, 2) / math.sqrt(8), dim=-1) @ v)
    x1 = x + gate1 * at.o(torch.cat(heads, dim=-1))
    z = norm(x1) * (1 + scale2) + shift2
    hidden = nn.functional.gelu(block.mlp.up(z), approximate="tanh")
    torch.testing.assert_close(block(x, condition=c), x1 + gate2 * block.mlp.down(hidden))


def test_time_class_and_place_all_matter() -> None:
    model = filled(DiT(config()))
    images, times, classes = batch()
    out = model(images, times, classes)
    assert not torch.allclose(model(images, times + 0.01, classes), out)
    assert not torch.allclose(model(images, times, (classes + 1) % 3), out)
    alike = model(torch.ones_like(images), times, classes)[0]
    assert not torch.allclose(alike[:, :2, :2], alike[:, 4:6, 2:4])


def test_its_projections_are_found_by_name_and_modulation_stays_dense() -> None:
    model = DiT(config())
    spec = Spec(gate=disjoint(["a", "b", "c"]), num_learngenes=4, num_tailors=6)
    layers = decomposable(model, spec)
    names = ("attention.q", "attention.k", "attention.v", "attention.o", "mlp.up", "mlp.down")
    assert list(layers) == [f"blocks.{i}.{name}" for i in range(2) for name in names]
    filled(model)
    images, times, classes = batch()
    with gated(model, classes):
        own = model(images, times, classes)
    with gated(model, (classes + 1) % 3):
        assert not torch.allclose(model(images, times, classes), own)


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"patch": 3}, "patch: 3 for images of 8"), ({"heads": 3}, "no multiple of 4 and of 3")],
)
def test_sizes_that_do_not_fit_are_an_error(changes: dict[str, int], told: str) -> None:
    with pytest.raises(TrainingError, match=told):
        config(**changes)


def test_a_random_start_has_the_scale_of_the_projections_it_replaces() -> None:
    model = DiT(config(width=64, heads=2))
    wanted = model.blocks[0].mlp.up.weight.square().mean().item()
    spec = Spec(gate=disjoint(["a", "b", "c"]), num_learngenes=20, num_tailors=30)
    layers = decomposable(model, spec)
    found: list[float] = []
    for group in (1, 2, 3):
        layer = layers["blocks.0.mlp.up"]
        own = (layer.group == 0) | (layer.group == group)
        found.append(float(((layer.u * layer.s * own) @ layer.vh).square().mean()))
    assert sum(found) / 3 == pytest.approx(wanted, rel=0.15)
