"""A model recombined for two classes beside a dense one of its size that saw only those."""

import copy
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from svdmerge.comparison.kind.study import Study, num_parameters
from svdmerge.core.components import RankOneComponents
from svdmerge.core.kind.gate import GateRows, gate_rows
from svdmerge.core.kind.recombine import Stored, assembled, recombine, salience
from svdmerge.core.kind.replace import GATE, layers_of, put
from svdmerge.training.kind.denoising import samples
from svdmerge.training.labelled_images import LabelledImages

AS_SEEN = "dense, each image as often"


def recombined(model: nn.Module, classes: Sequence[str]) -> nn.Module:
    """A copy with only the components that these classes use; embeddings keep their numbering."""
    layers, gate = layers_of(model), gate_rows(model).gate
    stored = {
        path: Stored(
            m=layer.out_features, n=layer.in_features, sizes=layer.sizes,
            salience=salience(layer.components()),
        )
        for path, layer in layers.items()
    }  # fmt: skip
    found = recombine(stored, gate=gate, classes=classes, budget=None)
    smaller = copy.deepcopy(model)
    for path, chosen in found.layers.items():
        c, rows = layers[path].components(), list(chosen.indices)
        part = RankOneComponents(u=c.u[:, rows], s=c.s[rows], vh=c.vh[rows])
        put(smaller, path, assembled(chosen, part, bias=layers[path].bias))
    smaller.add_module(GATE, GateRows(found.gate))
    return smaller.requires_grad_(False)


def pair_losses(study: Study, seed: int) -> dict[str, Tensor]:
    """Losses of a pair's test images by the recombined model, by the gated one as it is, and by a
    dense one of the recombined one's size; `sizes` are the three models' parameters."""

    def work() -> dict[str, Tensor]:
        pair, whole = study.pairs[seed], study.gated(seed)
        smaller = recombined(whole, [study.names[c] for c in pair])
        size = num_parameters(smaller) - (len(study.old) - len(pair)) * study.width
        dense = study.dense_pair(seed, width=width_of(study, size))
        images = study.tested.of_classes(pair)
        # The gated model numbers the pair among all old classes, its recombination's gate anew.
        numbered = LabelledImages(
            pixels=images.pixels,
            labels=torch.tensor([study.old.index(c) for c in pair])[images.labels],
        )
        return {
            "recombined": study.losses(smaller, numbered, gates=images.labels),
            "gated": study.losses(whole, numbered),
            "dense": study.losses(dense, images),
            "labels": images.labels,
            "sizes": torch.tensor([size, num_parameters(whole), num_parameters(dense)]),
        }

    return study.measured(f"pair-{seed}", work)


def seen_losses(study: Study, seed: int) -> dict[str, Tensor]:
    """`pair_losses`, and the dense model's that saw each image as often as the gated one did."""
    found = pair_losses(study, seed)

    def work() -> dict[str, Tensor]:
        width = width_of(study, int(found["sizes"][0]))
        model = study.dense_pair(seed, width=width, as_seen=True)
        images = study.tested.of_classes(study.pairs[seed])
        return {AS_SEEN: study.losses(model, images)}

    return found | study.measured(f"pair-as-seen-{seed}", work)


def width_of(study: Study, size: int) -> int:
    """The width of a dense two-class model whose parameters are nearest to `size`."""
    step = 4 * study.heads
    widths = range(step, study.width + 1, 4)
    fits = [w for w in widths if w % study.heads == 0]

    def gap(width: int) -> int:
        network = study.objective((0, 1), spec=None, seed=0, width=width).model()
        return abs(num_parameters(network) - size)

    return min(fits, key=gap)


def sampling_seconds(models: Sequence[nn.Module], *, shape: tuple[int, ...]) -> list[float]:
    """Processor seconds of each model to sample 16 images in 10 steps: the least of five turns, in
    which models take their turns one after another, so that a busy machine slows all alike."""
    best = [float("inf")] * len(models)
    for _ in range(5):
        for i, model in enumerate(models):
            start = time.process_time()
            samples(model, [0] * 16, shape=shape, num_steps=10, seed=0)
            best[i] = min(best[i], time.process_time() - start)
    return best
