"""A diffusion transformer: noisy images, times and classes in, a prediction like images out.

Letters: b images of e channels, h x w; t patches ("tokens"); d the width; a heads.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from svdmerge.errors import TrainingError

# Times are 0 to 1 where the sinusoids expect steps 0 to 1000 (DiT's own code).
_STEPS = 1000.0
_NUM_FREQUENCIES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class DiTConfig:
    """Sizes of a diffusion transformer."""

    image_size: int
    """Pixels of a side."""
    channels: int
    patch: int
    """Pixels of a patch's side."""
    width: int
    depth: int
    """Blocks."""
    heads: int
    num_classes: int
    mlp_ratio: int = 4
    """Hidden units of an MLP over the width."""

    def __post_init__(self) -> None:
        if self.image_size % self.patch or self.patch % 2:
            raise TrainingError(
                f"patch: {self.patch} for images of {self.image_size} pixels",
                "Patches tile the image, and each is seen with half of its neighbours.",
                "Choose an even divisor.",
            )
        # Positions are two sinusoid halves, one for rows and one for columns.
        if self.width % self.heads or self.width % 4:
            raise TrainingError(
                f"width: {self.width} is no multiple of 4 and of {self.heads} heads",
                "Heads, and sines and cosines of both coordinates, share it evenly.",
                "Choose a common multiple.",
            )


class Attention(nn.Module):
    """Self-attention with four separate projections, so that each can be decomposed."""

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)
        self.v, self.o = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """Each token's mixture of all."""
        q, k, v = (self._split(part(x)) for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.o(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b a t c"]:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class Mlp(nn.Module):
    """Two projections with a GELU between."""

    def __init__(self, width: int, *, ratio: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, ratio * width), nn.Linear(ratio * width, width)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """Each token by itself."""
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """A transformer block whose norms and residual branches the condition modulates (adaLN-zero).

    Branches start switched off, so that a new block is the identity.

    Reference: arXiv 2212.09748, section 3.2.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.attention = Attention(config.width, heads=config.heads)
        self.mlp = Mlp(config.width, ratio=config.mlp_ratio)
        self.modulation = _zero(nn.Linear(config.width, 6 * config.width))

    def forward(
        self, x: Float[Tensor, "b t d"], *, condition: Float[Tensor, "b d"]
    ) -> Float[Tensor, "b t d"]:
        """The tokens after attention and MLP."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            self.modulation(F.silu(condition))[:, None].chunk(6, dim=-1)
        )  # fmt: skip
        x = x + gate1 * self.attention(_modulated(x, shift=shift1, scale=scale1))
        return x + gate2 * self.mlp(_modulated(x, shift=shift2, scale=scale2))


class DiT(nn.Module):
    """A small DiT over pixels; the last layer starts at zero, so the first prediction is zero."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        pixels = config.channels * config.patch**2
        # Each patch is seen with half of its neighbours: a deviation from DiT, whose cut is sharp.
        # With few steps of training, attention alone is slow to learn that neighbours match.
        self.patch_embed = nn.Conv2d(
            config.channels, config.width, 2 * config.patch, config.patch, config.patch // 2
        )
        side = config.image_size // config.patch
        self.register_buffer("positions", _grid_positions(side, width=config.width), False)
        self.time_embed = nn.Sequential(
            nn.Linear(2 * _NUM_FREQUENCIES, config.width),
            nn.SiLU(),
            nn.Linear(config.width, config.width),
        )
        self.class_embed = nn.Embedding(config.num_classes, config.width)
        nn.init.normal_(self.class_embed.weight, std=0.02)  # as DiT's own code
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_modulation = _zero(nn.Linear(config.width, 2 * config.width))
        self.final = _zero(nn.Linear(config.width, pixels))
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear) and module.weight.count_nonzero():
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(
        self,
        images: Float[Tensor, "b e h w"],
        times: Float[Tensor, " b"],
        classes: Int[Tensor, " b"],
    ) -> Float[Tensor, "b e h w"]:
        """The prediction for noisy images at times 0 (clean) to 1 (noise)."""
        x = self.patch_embed(images).flatten(2).transpose(1, 2) + self.positions
        condition = self.time_embed(_sinusoids(times * _STEPS)) + self.class_embed(classes)
        for block in self.blocks:
            x = block(x, condition=condition)
        shift, scale = self.final_modulation(F.silu(condition))[:, None].chunk(2, dim=-1)
        x = self.final(_modulated(x, shift=shift, scale=scale))
        return _image(x, channels=self.config.channels, patch=self.config.patch)


def _zero(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _modulated(
    x: Float[Tensor, "b t d"], *, shift: Float[Tensor, "b 1 d"], scale: Float[Tensor, "b 1 d"]
) -> Float[Tensor, "b t d"]:
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1.0 + scale)


def _image(
    tokens: Float[Tensor, "b t p"], *, channels: int, patch: int
) -> Float[Tensor, "b e h w"]:
    side = math.isqrt(tokens.shape[1])
    grid = tokens.transpose(1, 2).unflatten(2, (side, side))
    assert grid.shape[1] == channels * patch**2
    return F.pixel_shuffle(grid, patch)


def _sinusoids(
    values: Float[Tensor, " b"], *, num: int = _NUM_FREQUENCIES, slowest: float = 10_000.0
) -> Float[Tensor, "b f"]:
    """Cosines, then sines, of each value at `num` wavelengths from 2 pi to `slowest` times that.

    Reference: arXiv 1706.03762, section 3.5.
    """
    powers = torch.arange(num, dtype=torch.float32, device=values.device) / num
    angles = values[:, None] * slowest**-powers
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _grid_positions(side: int, *, width: int) -> Float[Tensor, "t d"]:
    """Fixed positions of a square's patches: half of the width for the row, half for the column.

    The slowest wave turns once over 2 pi squares' sides; slower ones, as DiT's, are constants here.
    """
    places = torch.arange(side, dtype=torch.float32)
    axis = _sinusoids(places, num=width // 4, slowest=float(side))
    rows, columns = axis.repeat_interleave(side, dim=0), axis.repeat(side, 1)
    return torch.cat([rows, columns], dim=1)


def build(config: dict[str, int]) -> DiT:
    """The DiT of a configuration's plain values."""
    return DiT(DiTConfig(**config))
