"""A model recombined for two classes beside a dense one of its size that saw only those."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svdmerge.comparison.kind.study import Study, num_parameters
from svdmerge.core.kind.blueprint import shape_of
from svdmerge.core.kind.gate import GateRows, gate_rows
from svdmerge.core.kind.recombine import Stored, assembled, recombine, salience
from svdmerge.core.kind.replace import GATE, layers_of, put
from svdmerge.training.kind.denoising import held_out_losses
