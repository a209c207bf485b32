"""Causal language modelling: how likely a model finds each next token of a text."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from svdmerge.errors import TrainingError
from svdmerge.training.backbone import Backbone, Inputs
from svdmerge.training.data import Examples
from svdmerge.training.features import finite, to_device

# Texts at once without gradients: logits hold a number per token of the vocabulary.
BATCH = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Predicted:
    """Per text: the mean over its predicted tokens of what each cost, and of which were right."""

    nll: Tensor
    """(b,), nats per token."""
    accuracy: Tensor
    """(b,), share of tokens that were the likeliest."""


def predict(backbone: Backbone, inputs: Inputs) -> Predicted:
    """How well each next token is foretold; the first token of a text, and padding, are not.

    Every text counts alike, whatever its length, in training as in measuring.
    """
    if isinstance(inputs, Tensor):
        raise TrainingError("a language model got no tokens", "", "Set `task: causal_lm`.")
    logits = backbone.logits(inputs)[:, :-1].float()
    labels, mask = inputs["input_ids"][:, 1:], inputs["attention_mask"][:, 1:].float()
    nll = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    right = (logits.argmax(dim=2) == labels).float()
    count = mask.sum(dim=1)
    return Predicted(nll=(nll * mask).sum(dim=1) / count, accuracy=(right * mask).sum(1) / count)


@torch.no_grad()
def predictions(backbone: Backbone, examples: Examples, *, device: torch.device) -> Tensor:
    """(b, 2), on the CPU, in the order of the examples: nats per token, share of tokens right."""
    order = examples.by_length()
    found = torch.empty(len(order), 2)
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        predicted = predict(backbone, to_device(examples.batch(rows), device))
        found[rows] = torch.stack([predicted.nll, predicted.accuracy], dim=1).cpu()
    return finite(found, what="likelihoods")


def nll_per_example(backbone: Backbone, examples: Examples, *, device: torch.device) -> Tensor:
    """Negative log-likelihood of each text (b,), on the CPU: mean nats per predicted token."""
    return predictions(backbone, examples, device=device)[:, 0]
