"""Weights of sources from their leave-one-out errors, for task arithmetic."""

import torch
from jaxtyping import Float
from torch import Tensor

from svdmerge.errors import TrainingError


def loo_weights(
    press: Float[Tensor, " i"], *, num_examples: int, num_classes: int
) -> Float[Tensor, " i"]:
    """exp(-(b y / 8) press_i / press_min), made to sum to 1: which sources to add, how much.

    `press` is each source's left-out squared error, as the mean of `ridge`'s `loo_error`; its unit
    cancels. b y / 8 grows with what the error was averaged over: with few examples near-ties share
    the weight, with many the best source takes it all. As measured for this project, not published.

    Raises:
        TrainingError: an error is negative or not finite.
    """
    if not bool(((press >= 0) & torch.isfinite(press)).all()) or not len(press):
        raise TrainingError(
            f"leave-one-out errors {press.tolist()}",
            "Expected finite numbers that are not negative, one for each source.",
            "Check the sources' features.",
        )
    least = press.min()
    if least == 0:
        # The limit of the formula: whatever predicts perfectly shares all of it.
        perfect = (press == 0).to(press.dtype)
        return perfect / perfect.sum()
    return torch.softmax(-(num_examples * num_classes / 8) * press / least, dim=0)
