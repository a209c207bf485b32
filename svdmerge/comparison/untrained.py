"""What needs no training: a head in closed form on features of a model that is only put together.

Every entrant takes a problem and drawn rows and gives a `Result`; the choice of source, weight or
strength uses held-out losses of the drawn rows alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svdmerge.comparison.problem import Problem, Weights
from svdmerge.core.discriminant import DiscriminantFit
from svdmerge.core.gate import Mix, gate
from svdmerge.core.params import budget
from svdmerge.core.svd import exact
from svdmerge.core.transfer import ridge
from svdmerge.peers.loo import loo_weights
from svdmerge.training.judge import judged_rows

# Of AXIS: the paper's share of the rank.
K = 0.1
# Of task arithmetic: the best on a held-out target when the zoo was made, not tuned per target.
STRENGTH = 0.3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Result:
    """An entrant's outcome on one draw."""

    hits: Tensor
    """Whether each test example is classified rightly."""
    trained: int = 0
    """Values trained, without head."""
    sources: tuple[str, ...] = ()
    """Whose weights were used."""
    detail: str = ""
    steps: int = 0


Entrant = Callable[[Problem, list[int]], Result]


def base_weights() -> Weights:
    """Nothing changed."""
    return {}


def model(
    problem: Problem, rows: list[int], key: str, weights: Callable[[], Weights],
    *, sources: Sequence[str], detail: str = "",
) -> Result:  # fmt: skip
    """A model with the head that svdmerge would give it."""
    hits = problem.hits(key, weights, rows)
    return Result(hits=hits, sources=tuple(sources), detail=detail)


def probe(problem: Problem, rows: list[int]) -> Result:
    """The head on the base."""
    return model(problem, rows, "base", base_weights, sources=())


def ridge_probe(problem: Problem, rows: list[int]) -> Result:
    """Ridge regression on the base's features, its penalty by leave-one-out."""
    train = problem.features("base", base_weights, part="train", rows=rows)
    test = problem.features("base", base_weights, part="test", rows=range(len(problem.test)))
    fit = ridge(train, labels=problem.labels(rows), num_classes=problem.num_classes)
    return Result(hits=fit.head.scores(test).argmax(dim=1) == problem.test.labels)


def linear_probe(problem: Problem, rows: list[int]) -> Result:
    """Logistic regression on the base's features, its penalty by cross-validation (3 folds)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train = problem.features("base", base_weights, part="train", rows=rows)
    test = problem.features("base", base_weights, part="test", rows=range(len(problem.test)))
    head = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=200)),
        {"logisticregression__C": [1e-3, 1e-2, 1e-1, 1.0]},
        cv=3,
    )
    head.fit(train.numpy(), problem.labels(rows).numpy())
    predicted = torch.from_numpy(head.predict(test.numpy()))
    return Result(hits=predicted == problem.test.labels)


def single(name: str) -> Entrant:
    """A given whole source."""

    def run(problem: Problem, rows: list[int]) -> Result:
        key, weights = whole(problem, name)
        return model(problem, rows, key, weights, sources=(name,))

    return run


def pick(problem: Problem, rows: list[int]) -> Result:
    """The whole source of least held-out loss."""
    name = best_source(problem, rows)
    key, weights = whole(problem, name)
    return model(problem, rows, key, weights, sources=(name,), detail=name)


def pick_at_k(problem: Problem, rows: list[int]) -> Result:
    """The same source by its leading components: what the rest adds, noise or use, is gone."""
    name = best_source(problem, rows)
    revision = problem.sources[name].revision
    return model(
        problem, rows, f"truncated {K:g}: {revision}", lambda: truncated(problem, name),
        sources=(name,),
    )  # fmt: skip


def truncated(problem: Problem, name: str) -> Weights:
    """A source's matrices at rank k, its vectors whole."""
    found: dict[str, Tensor] = {}
    for n, d in problem.source_difference(name).items():
        if d.dim() == 2:
            d = exact(d).slice(0, budget(K, rank=min(d.shape))).dense().to(d)
        found[n] = problem.base[n] + d
    return found


def axis(problem: Problem, rows: list[int]) -> Result:
    """AXIS of all sources as published, untuned."""
    return model(problem, rows, *axis_model(problem), sources=sorted(problem.sources))


def average(problem: Problem, rows: list[int]) -> Result:
    """The mean of all differences."""
    names = sorted(problem.sources)
    return model(
        problem, rows, *mixed(problem, dict.fromkeys(names, 1 / len(names))), sources=names
    )


def task_arithmetic(problem: Problem, rows: list[int]) -> Result:
    """A fixed share of the sum of all differences."""
    names = sorted(problem.sources)
    return model(problem, rows, *mixed(problem, dict.fromkeys(names, STRENGTH)), sources=names)


def loo_weighted(problem: Problem, rows: list[int]) -> Result:
    """Task arithmetic weighted by held-out errors."""
    names = sorted(problem.sources)
    press = torch.tensor([_press(problem, n, rows) for n in names])
    weights = loo_weights(press, num_examples=len(rows), num_classes=problem.num_classes)
    kept = {n: round(float(w), 3) for n, w in zip(names, weights, strict=True) if w > 5e-4}
    return model(problem, rows, *mixed(problem, kept), sources=tuple(kept))


def _press(problem: Problem, name: str, rows: list[int]) -> float:
    """A source's mean squared leave-one-out error by ridge regression."""
    train = problem.features(*whole(problem, name), part="train", rows=rows)
    fit = ridge(train, labels=problem.labels(rows), num_classes=problem.num_classes)
    return float(fit.loo_error.mean())


def stacking(problem: Problem, rows: list[int]) -> Result:
    """The head on the features of the base and all sources side by side: many models' cost."""
    models = [("base", base_weights), *(whole(problem, n) for n in sorted(problem.sources))]
    tests = range(len(problem.test))
    train = [problem.features(k, w, part="train", rows=rows) for k, w in models]
    test = [problem.features(k, w, part="test", rows=tests) for k, w in models]
    hits = problem.hits_of(torch.cat(train, dim=1), torch.cat(test, dim=1), rows)
    return Result(hits=hits, sources=tuple(problem.sources))


def gated(problem: Problem, rows: list[int]) -> Result:
    """svdmerge's default: sources and strength by held-out losses, pooled components, ridge."""
    mix = chosen_mix(problem, rows)
    parts = sorted(mix.weights.items(), key=lambda part: -part[1])
    return model(
        problem, rows, *mix_model(problem, mix), sources=list(mix.weights),
        detail=f"total {mix.total:.3g}: " + ", ".join(f"{n} {w:.2f}" for n, w in parts),
    )  # fmt: skip


def chosen_mix(problem: Problem, rows: list[int]) -> Mix:
    """What the gate takes."""
    few = judged(problem, rows)
    losses = {n: source_fit(problem, n, few).log_loss for n in sorted(problem.sources)}
    doubted = {n for n, s in problem.sources.items() if s.revision in problem.noise}
    base = problem.fit("base", base_weights, few).log_loss

    def judge(mixes: Sequence[Mix]) -> list[Tensor]:
        return [problem.fit(*mix_model(problem, m), few).log_loss for m in mixes]

    return gate(losses, base=base, judge=judge, doubted=doubted)[0]


def judged(problem: Problem, rows: list[int]) -> list[int]:
    """The drawn rows that svdmerge judges merges by."""
    return [rows[place] for place in judged_rows(problem.labels(rows), seed=0)]


def best_source(problem: Problem, rows: list[int]) -> str:
    """The source of least held-out loss."""
    means = {n: float(source_fit(problem, n, rows).log_loss.mean()) for n in problem.sources}
    return min(sorted(means), key=lambda n: means[n])


def source_fit(problem: Problem, name: str, rows: Sequence[int]) -> DiscriminantFit:
    """A whole source's head."""
    return problem.fit(*whole(problem, name), rows)


def whole(problem: Problem, name: str) -> tuple[str, Callable[[], Weights]]:
    """A whole source."""
    revision = problem.sources[name].revision
    return f"source {revision}", lambda: problem.source_weights(name)


def mixed(problem: Problem, weights: Mapping[str, float]) -> tuple[str, Callable[[], Weights]]:
    """Weighted whole differences."""
    key = ", ".join(f"{problem.sources[n].revision} {w:.6g}" for n, w in sorted(weights.items()))
    return f"mixed {key}", lambda: problem.mixed(weights)


def axis_model(
    problem: Problem, *, k: float = K, strength: float = 1.0
) -> tuple[str, Callable[[], Weights]]:
    """AXIS of all sources at a share of the rank."""
    key = ", ".join(sorted(s.revision for s in problem.sources.values()))
    return f"axis {k:g} at {strength:g}: {key}", lambda: problem.axis(k=k, strength=strength)


def mix_model(problem: Problem, mix: Mix) -> tuple[str, Callable[[], Weights]]:
    """What the gate considers, at full rank; a source as it is counts as the whole source."""
    if not mix.shares:
        return "base", base_weights
    if len(mix.shares) == 1 and mix.total == 1.0:
        return whole(problem, mix.shares[0][0])
    shares = sorted((problem.sources[n].revision, share) for n, share in mix.shares)
    key = ", ".join(f"{revision} {share:.9g}" for revision, share in shares)
    return (
        f"pooled at {mix.total:.9g}: {key}",
        lambda: problem.pooled(dict(mix.shares), total=mix.total),
    )


UNTRAINED: dict[str, Entrant] = {
    "probe": probe,
    "ridge probe": ridge_probe,
    "linear probe": linear_probe,
    "best single source": pick,
    "best single source at k": pick_at_k,
    "AXIS untuned": axis,
    "average": average,
    "task arithmetic": task_arithmetic,
    "leave-one-out weights": loo_weighted,
    "stacking": stacking,
    "svdmerge": gated,
}
