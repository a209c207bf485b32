"""What AXIS's parts are worth: each entrant changes one thing of it, the rest stays as published.

Reference: AXIS, arXiv 2508.19353. A few examples stand for its full target sets where the draw is
few-shot; all training rows are its own protocol.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch

from svdmerge.comparison.problem import Problem, Weights
from svdmerge.comparison.trained import AXIS, Space, trained
from svdmerge.comparison.untrained import STRENGTH, Entrant, K, Result, axis_model, judged, model
from svdmerge.core.components import RankOneComponents, concatenate, flat
from svdmerge.core.merge import recompress
from svdmerge.core.methods.merging import Merging, Part
from svdmerge.core.methods.registry import METHODS
from svdmerge.core.params import Action, budget
from svdmerge.core.svd import seed_of
from svdmerge.core.topk import top_k
from svdmerge.peers.diagonal import DiagonalSpace, sigma_merged, with_null_space
from svdmerge.peers.space import WeightSpace

# Of the rank: the published one is 10 %.
KS = (0.05, 0.1, 0.2, 0.5)
# Of each matrix's singular values, as published.
NS = (0.1, 0.2, 0.4)
# Of the pooled sum, tried on held-out losses. 1 is published; overlap of sources asks for less.
STRENGTHS = (0.1, 0.2, 0.35, 0.5, 0.7, 1.0)

Choice = Callable[[np.ndarray, int, int], np.ndarray]
"""(a source's singular values, how many of them, a seed) -> which."""
Factors = Mapping[str, RankOneComponents]


def leading(s: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The largest: AXIS as published."""
    del seed
    return np.argsort(-s, kind="stable")[:count]


def arbitrary(s: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Seeded ones of those that are not zero."""
    return np.sort(np.random.default_rng(seed).permutation(np.flatnonzero(s > 0))[:count])


def bottom(s: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The smallest of those that are not zero."""
    del seed
    live = np.flatnonzero(s > 0)
    return live[np.argsort(s[live], kind="stable")[:count]]


def kept(
    parts: Sequence[RankOneComponents], *, k: int, choice: Choice, seed: int
) -> RankOneComponents:
    """k components of one matrix, all sources' pooled.

    Each source gives as many as it has among the top k of all; `choice` says which of its own. So
    choices differ in nothing but the place in the source's spectrum.
    """
    spectra = [p.s.double().numpy() for p in parts]
    owner = np.repeat(np.arange(len(parts)), [len(s) for s in spectra])
    index = np.concatenate([np.arange(len(s)) for s in spectra])
    best = top_k(np.concatenate(spectra), tie=owner, index=index, k=k)
    counts = np.bincount(owner[best], minlength=len(parts))
    chosen = [
        choice(s, int(count), seed + i)
        for i, (s, count) in enumerate(zip(spectra, counts, strict=True))
    ]
    return concatenate(
        [
            RankOneComponents(u=p.u[:, c], s=p.s[c], vh=p.vh[c])
            for p, c in zip(parts, map(torch.from_numpy, chosen), strict=True)
        ]
    )


@lru_cache(maxsize=4)
def kept_of(problem: Problem, choice: Choice) -> Factors:
    """The components of every matrix, as deep as AXIS merges; no rows are looked at."""
    found: dict[str, RankOneComponents] = {}
    for name in problem.matrices:
        m, n = problem.base[name].shape
        parts = [problem.components(source, name) for source in sorted(problem.sources)]
        seed = seed_of(name, m=m, n=n, block=0) >> 8
        found[name] = kept(parts, k=budget(K, rank=min(m, n)), choice=choice, seed=seed)
    return found


def untuned(k: float) -> Entrant:
    """AXIS merged at another K, not tuned."""

    def run(problem: Problem, rows: list[int]) -> Result:
        names = sorted(problem.sources)
        return model(problem, rows, *axis_model(problem, k=k), sources=names)

    return run


def at_best_strength(k: float) -> Entrant:
    """The same at the strength of least held-out log loss."""

    def run(problem: Problem, rows: list[int]) -> Result:
        names, few = sorted(problem.sources), judged(problem, rows)
        models = {x: axis_model(problem, k=k, strength=x) for x in STRENGTHS}
        losses = {x: float(problem.fit(*m, few).log_loss.mean()) for x, m in models.items()}
        best = min(STRENGTHS, key=lambda x: losses[x])
        return model(problem, rows, *models[best], sources=names, detail=f"strength {best:g}")

    return run


def tuned_values(share: float) -> Space:
    """AXIS that trains another N; beyond K the null space's zeros train too, as published."""
    return lambda problem, rows: second_stage(
        problem, _moved(problem, kept_of(problem, leading)), share=share
    )


def chosen_components(choice: Choice) -> Space:
    """AXIS of other components than the top ones."""
    return lambda problem, rows: second_stage(problem, _moved(problem, kept_of(problem, choice)))


def not_recompressed(problem: Problem, rows: list[int]) -> WeightSpace:
    """The pooled components' own singular values train, of vectors that are not orthogonal."""
    del rows
    parts = kept_of(problem, leading)
    merged, _ = _moved(problem, parts)
    return DiagonalSpace(merged, directions={n: c for n, c in parts.items() if len(c)})


def merged_by(method: str, *, scale: float = 1.0) -> Space:
    """Another merge method, then AXIS's second stage: its density and depth are the published."""
    return lambda problem, rows: second_stage(problem, _merged(problem, method, scale))


def second_stage(
    problem: Problem, merged: tuple[Weights, Factors], *, share: float = K
) -> WeightSpace:
    """The leading singular values of the merged difference train, zeros beyond its rank."""
    weights, factors = merged
    count = budget(share, rank=min(min(c.u.shape[0], c.vh.shape[1]) for c in factors.values()))
    filled = with_null_space(factors, num_values=count, seed=0)
    return sigma_merged(weights, factors=filled, num_values=count)


def _moved(problem: Problem, parts: Factors) -> tuple[Weights, Factors]:
    """Base plus components and averaged vectors, and the second SVD of the components."""
    weights = dict(problem.axis(k=K))
    for name, c in parts.items():
        weights[name] = problem.base[name] + c.dense().to(problem.base[name])
    return weights, {name: recompress(c) for name, c in parts.items()}


@lru_cache(maxsize=1)
def _merged(problem: Problem, method: str, scale: float) -> tuple[Weights, Factors]:
    """Weights and factors by a method of `core.methods`; every source counts alike."""
    how = METHODS[method]
    names = sorted(problem.sources)
    merging = Merging(
        method=method, num_sources=len(names), scale=scale, density=how.density or 1.0
    )
    weights: dict[str, torch.Tensor] = {}
    factors: dict[str, RankOneComponents] = {}
    for name, given in problem.parameters.items():
        matrix = given.action is Action.DECOMPOSE
        parameter = replace(given, action=how.matrices if matrix else how.vectors)
        depth = how.of_each(budget(how.k, rank=given.rank), num_sources=len(names))
        found = merging.merge(
            parameter,
            [
                part
                for source in names
                if (part := _part(problem, source, name, parameter.action, depth)) is not None
            ],
        )
        base = problem.base[name]
        weights[name] = base + found.dense().reshape(base.shape).to(base)
        if matrix:
            factors[name] = found
    return weights, factors


def _part(problem: Problem, source: str, name: str, action: Action, depth: int) -> Part | None:
    difference = problem.source_difference(source).get(name)
    if difference is None:
        return None
    content = f"{problem.sources[source].revision} {name}"
    if action is Action.DECOMPOSE:
        return Part(
            weight=1.0,
            content=content,
            read=lambda: problem.components(source, name, stop=depth),
        )
    return Part(weight=1.0, content=content, read=lambda: flat(difference.reshape(1, -1)))


ABLATIONS: dict[str, Entrant] = (
    {f"AXIS untuned, K {k:.0%}": untuned(k) for k in KS}
    | {f"AXIS untuned, K {k:.0%}, best strength": at_best_strength(k) for k in KS}
    | {f"AXIS, N {n:.0%}": trained(tuned_values(n), AXIS) for n in NS}
    | {
        "AXIS, no second SVD": trained(not_recompressed, AXIS),
        "AXIS, arbitrary components": trained(chosen_components(arbitrary), AXIS),
        "AXIS, bottom components": trained(chosen_components(bottom), AXIS),
        "average, second stage": trained(merged_by("average"), AXIS),
        "TIES, second stage": trained(merged_by("ties"), AXIS),
        # A sum: at strength 1 that of many sources leaves the base far behind.
        "DARE, second stage": trained(merged_by("dare", scale=STRENGTH), AXIS),
        "TSV-M, second stage": trained(merged_by("tsv_m"), AXIS),
    }
)
