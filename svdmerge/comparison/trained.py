"""What trains: weight spaces on the drawn rows, then the same closed-form head as everyone's."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from svdmerge.comparison.problem import Problem, Weights
from svdmerge.comparison.untrained import (
    Entrant,
    K,
    Result,
    best_source,
    chosen_mix,
    gated,
    mix_model,
    whole,
)
from svdmerge.core.components import RankOneComponents
from svdmerge.core.evidence import choose
from svdmerge.core.params import budget
from svdmerge.core.svd import exact
from svdmerge.core.transfer import LinearHead
from svdmerge.peers.atlas import PUBLISHED as ATLAS
from svdmerge.peers.atlas import Atlas
from svdmerge.peers.bolt import ALPHAS, bolt, bolt_bases
from svdmerge.peers.bolt import PUBLISHED as BOLT
from svdmerge.peers.diagonal import random_factors, sigma_merged, sigma_w0, with_null_space
from svdmerge.peers.free import bitfit, full
from svdmerge.peers.lora import Lora, LoraXs, lora_cost, lora_xs_cost, ranks_within
from svdmerge.peers.objectives import Classification, ContrastivePairs
from svdmerge.peers.space import WeightSpace
from svdmerge.peers.train import Objective, TrainSettings, train
from svdmerge.recipe import HELD_OUT
from svdmerge.training.data import hold_out

# Steps of any training: with a few hundred examples the published epochs are fewer, with more
# this keeps a table of many draws within hours on two cores. The cosine ends where the steps do.
MAX_STEPS = 40
# AXIS as published: AdamW at 0.1, 10 epochs, cosine.
AXIS = TrainSettings(
    epochs=10, batch_size=32, learning_rate=0.1, head_learning_rate=1e-2, max_steps=MAX_STEPS
)
# Rates as their authors or common practice has them; not tuned per target.
LORA = replace(AXIS, learning_rate=1e-3)
FULL = replace(AXIS, learning_rate=2e-5)
BIASES = replace(AXIS, learning_rate=1e-3)
SETFIT = replace(FULL, batch_size=16, epochs=1)

Space = Callable[[Problem, list[int]], WeightSpace]


def trained(space: Space, settings: TrainSettings, *, contrastive: bool = False) -> Entrant:
    """An entrant that trains a space on the drawn rows."""

    def run(problem: Problem, rows: list[int]) -> Result:
        return fitted(problem, rows, space(problem, rows), settings, contrastive=contrastive)

    return run


def fitted(
    problem: Problem, rows: list[int], space: WeightSpace, settings: TrainSettings,
    *, contrastive: bool,
) -> Result:  # fmt: skip
    """The space trained, a head in closed form on its features."""
    if problem.max_steps is not None:
        settings = replace(settings, max_steps=problem.max_steps)
    labels = problem.labels(rows)
    objective: Objective
    if contrastive:
        objective = ContrastivePairs(labels, seed=0)
    else:
        objective = Classification(labels, head=_head(problem, rows, space))
    features = partial(problem.features_under, train=rows)
    done = train(features, space=space, objective=objective, settings=settings)
    hits = problem.fitted_hits(done.weights, rows)
    return Result(hits=hits, trained=space.num_trained, steps=len(done.losses))


def if_it_helps(problem: Problem, rows: list[int]) -> Result:
    """svdmerge's default with `tune`: trained on three quarters of the rows; the rest says which
    tenth of the training to keep, or, unless one is better by more than noise, none."""
    kept, held = hold_out(problem.labels(rows).numpy(), share=HELD_OUT, seed=0)
    own, others = [rows[i] for i in kept], [rows[i] for i in held]
    space, settings = gated_space(problem, rows), AXIS
    if problem.max_steps is not None:
        settings = replace(settings, max_steps=problem.max_steps)
    objective = Classification(problem.labels(own), head=_head(problem, own, space))
    every = -(-settings.num_steps(len(own)) // 10)
    found: list[tuple[Tensor, Weights]] = []

    @torch.no_grad()
    def look(step: int) -> None:
        if step % every == 0:
            weights = {name: weight.detach().clone() for name, weight in space.weights().items()}
            scores = objective.head().scores(problem.extracted(weights, part="train", rows=others))
            losses = F.cross_entropy(scores, problem.labels(others).long(), reduction="none")
            found.append((losses, weights))

    look(0)
    features = partial(problem.features_under, train=own)
    done = train(
        features, space=space, objective=objective, settings=settings, after_step=look
    )  # fmt: skip
    best = min(range(len(found)), key=lambda i: float(found[i][0].mean()))
    if not choose([found[0][0], found[best][0]]):
        return replace(gated(problem, rows), detail="nothing is changed")
    hits = problem.fitted_hits(found[best][1], rows)
    detail = f"tenth {best}"
    return Result(hits=hits, trained=space.num_trained, steps=len(done.losses), detail=detail)


def _head(problem: Problem, rows: list[int], space: WeightSpace) -> LinearHead:
    """The calibrated head of the space's start."""
    with torch.no_grad():
        start = {name: weight.detach() for name, weight in space.weights().items()}
    return problem.head(problem.extracted(start, part="train", rows=rows), rows).head


def num_values(problem: Problem, share: float = K) -> int:
    """Singular values a matrix trains: the share of the smallest side."""
    return budget(share, rank=min(min(problem.base[n].shape) for n in problem.matrices))


def total_values(problem: Problem) -> int:
    """What AXIS trains in all: the size that others are given."""
    return num_values(problem) * len(problem.matrices)


def factors_of(problem: Problem, weights: Weights) -> dict[str, RankOneComponents]:
    """The leading factors of every matrix's change, as deep as AXIS merges."""
    count = num_values(problem)
    return {
        n: exact(weights[n].double() - problem.base[n].double()).slice(0, count)
        for n in problem.matrices
        if n in weights
    }


def axis_space(problem: Problem, rows: list[int]) -> WeightSpace:
    """AXIS of all sources, the null space completed where factors lack."""
    del rows
    weights, factors = _axis(problem)
    return sigma_merged(weights, factors=factors, num_values=num_values(problem))


@lru_cache(maxsize=1)
def _axis(problem: Problem) -> tuple[Weights, Mapping[str, RankOneComponents]]:
    """Merged weights and their leading factors: the same for every draw."""
    weights = problem.axis(k=K)
    factors = factors_of(problem, weights)
    return weights, with_null_space(factors, num_values=num_values(problem), seed=0)


def source_space(problem: Problem, rows: list[int]) -> WeightSpace:
    """The picked source, its leading singular values trained."""
    weights = whole(problem, best_source(problem, rows))[1]()
    return sigma_merged(
        weights, factors=factors_of(problem, weights), num_values=num_values(problem)
    )


def gated_space(problem: Problem, rows: list[int]) -> WeightSpace:
    """The gate's merge, its leading singular values trained."""
    mix = chosen_mix(problem, rows)
    weights = mix_model(problem, mix)[1]() if mix.shares else dict(problem.base)
    factors = factors_of(problem, weights) if mix.shares else sigma_free(problem)
    return sigma_merged(weights, factors=factors, num_values=num_values(problem))


def sigma_free(problem: Problem) -> dict[str, RankOneComponents]:
    """The base's own leading factors: what is left to tune where nothing is merged."""
    count = num_values(problem)
    return {n: exact(problem.base[n].double()).slice(0, count) for n in problem.matrices}


def base_space(problem: Problem, rows: list[int]) -> WeightSpace:
    """Singular values of W_0."""
    del rows
    return sigma_w0(problem.base, names=problem.matrices, num_values=num_values(problem))


def random_space(problem: Problem, rows: list[int]) -> WeightSpace:
    """Random directions on the gate's merge."""
    mix = chosen_mix(problem, rows)
    start = dict(problem.base) | dict(mix_model(problem, mix)[1]() if mix.shares else {})
    return random_factors(start, names=problem.matrices, num_values=num_values(problem), seed=0)


def atlas_space(problem: Problem, rows: list[int]) -> WeightSpace:
    """One coefficient for every source and parameter."""
    del rows
    every = [problem.source_difference(n) for n in sorted(problem.sources)]
    names = sorted(set().union(*every))
    zeros = {n: torch.zeros_like(problem.base[n]) for n in names}
    return Atlas(problem.base, differences=[zeros | d for d in every])


def bolt_space(problem: Problem, rows: list[int]) -> WeightSpace:
    """BOLT from the strength that held-out examples like best."""
    bases = _bolt_bases(problem)

    def loss(alpha: float) -> float:
        weights = bolt(problem.base, bases=bases, alpha=alpha).weights()
        values = problem.extracted(
            {n: w.detach() for n, w in weights.items()}, part="train", rows=rows
        )
        return float(problem.head(values, rows).log_loss.mean())

    return bolt(problem.base, bases=bases, alpha=min(ALPHAS, key=loss))


@lru_cache(maxsize=1)
def _bolt_bases(problem: Problem) -> Mapping[str, RankOneComponents]:
    """Of every source the stored components that AXIS could take four times over."""
    stop = 4 * num_values(problem)
    return bolt_bases(
        [
            {n: problem.components(source, n, stop=stop) for n in problem.matrices}
            for source in sorted(problem.sources)
        ]
    )


def lora_space(problem: Problem, rows: list[int]) -> WeightSpace:
    """LoRA of equal size."""
    del rows
    ranks = ranks_within(
        total_values(problem), weights=problem.base, names=problem.matrices, cost=lora_cost
    )
    return Lora(problem.base, ranks=ranks, seed=0)


def lora_one_space(problem: Problem, rows: list[int]) -> WeightSpace:
    """LoRA of rank one everywhere."""
    del rows
    return Lora(problem.base, ranks=dict.fromkeys(problem.matrices, 1), seed=0)


def lora_xs_space(problem: Problem, rows: list[int]) -> WeightSpace:
    """LoRA-XS of equal size."""
    del rows
    ranks = ranks_within(
        total_values(problem), weights=problem.base, names=problem.matrices, cost=lora_xs_cost
    )
    return LoraXs(problem.base, ranks=ranks)


def bias_space(problem: Problem, rows: list[int]) -> WeightSpace:
    """All biases that features depend on."""
    del rows
    return bitfit({n: w for n, w in problem.base.items() if not n.startswith("pooler.")})


def full_space(problem: Problem, rows: list[int]) -> WeightSpace:
    """All matrices."""
    del rows
    return full(problem.base, names=problem.matrices)


TRAINED: dict[str, Entrant] = {
    "AXIS as published": trained(axis_space, AXIS),
    "best single source, sigma": trained(source_space, replace(AXIS, learning_rate=1e-2)),
    "svdmerge, tuned if it helps": if_it_helps,
    "svdmerge, sigma": trained(gated_space, replace(AXIS, learning_rate=1e-2)),
    "aTLAS": trained(atlas_space, replace(ATLAS, max_steps=MAX_STEPS)),
    "BOLT": trained(bolt_space, replace(BOLT, max_steps=MAX_STEPS)),
    "sigma of W_0": trained(base_space, replace(AXIS, learning_rate=1e-2)),
    "random directions": trained(random_space, replace(AXIS, learning_rate=1e-2)),
    "LoRA, equal size": trained(lora_space, LORA),
    "LoRA, rank 1": trained(lora_one_space, LORA),
    "LoRA-XS": trained(lora_xs_space, LORA),
    "BitFit": trained(bias_space, BIASES),
    "SetFit": trained(full_space, SETFIT, contrastive=True),
    "full fine-tuning": trained(full_space, FULL),
}
