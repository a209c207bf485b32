"""The components of a difference that is given in factors, such as a LoRA's: never formed dense."""

import torch
from jaxtyping import Float
from torch import Tensor

from svdmerge.core import svd
from svdmerge.core.blocks import FACTORED
from svdmerge.core.certified import Block
from svdmerge.core.components import RankOneComponents
from svdmerge.core.merge import recompress


def factored_block(up: Float[Tensor, "m q"], down: Float[Tensor, "q n"]) -> Block:
    """All components of up @ down: QR of both, and the SVD of a q x q core, in float64.

    q above a side is no harm: the core is then as small as that side.
    """
    ones = torch.ones(up.shape[1], dtype=torch.float64)
    found = recompress(RankOneComponents(u=up.double(), s=ones, vh=down.double()))
    return Block(components=svd.fix_signs(found), bound=0.0, solver=FACTORED)
