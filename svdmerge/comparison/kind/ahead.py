"""What a study's tables are made of, by several processes at once: kept, so tables only read it."""

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from multiprocessing import get_context

from svdmerge.comparison.kind.diversion import matrices, old_losses, random_losses
from svdmerge.comparison.kind.entrants import entrants
from svdmerge.comparison.kind.pairs import seen_losses
from svdmerge.comparison.kind.quality import classifier, quality
from svdmerge.comparison.kind.study import Study, one_thread
from svdmerge.comparison.kind.transfer import RATES, chosen_rate, transferred

Work = Callable[[], object]
# Of the steps of pre-training, those of a trial of a learning rate.
TRIAL = 1 / 5


def with_best_rates(study: Study, rates: Sequence[float], *, num_jobs: int) -> Study:
    """The study with the learning rates, of gated and of dense models, of least training loss over
    the second half of a short run: no held-out image takes part in the choice."""
    _run([partial(_tried, study, g, r) for g in (True, False) for r in rates], num_jobs=num_jobs)
    gated, dense = (min(rates, key=partial(_tried, study, g)) for g in (True, False))
    return replace(study, learning_rate=gated, dense_rate=dense)


def fill(study: Study, seeds: Sequence[int], *, parts: Collection[str], num_jobs: int) -> None:
    """Make all that the tables of some parts read."""
    for stage in _stages(study, seeds, parts):
        _run(stage, num_jobs=num_jobs)


def _run(stage: Sequence[Work], *, num_jobs: int) -> None:
    if num_jobs == 1:
        for work in stage:
            work()
        return
    # Spawned: a forked process cannot use a GPU that its parent used.
    context = get_context("spawn")
    with ProcessPoolExecutor(num_jobs, mp_context=context, initializer=one_thread) as pool:
        for done in as_completed([pool.submit(_kept, work) for work in stage]):
            done.result()


def _kept(work: Work) -> None:
    """Only what is kept counts: a model would be sent back for nothing."""
    work()


def _stages(study: Study, seeds: Sequence[int], parts: Collection[str]) -> Iterator[list[Work]]:
    """Work that is independent of each other, and reads what the stages before made."""
    models = [study.gated, study.dense]
    if {"diversion", "transfer"} & set(parts):
        models.append(study.random_gate)
    yield [partial(classifier, study), *(partial(train, s) for train in models for s in seeds)]
    # By how long it takes, longest first.
    second: list[Work] = []
    if "sizes" in parts:
        second += [partial(seen_losses, study, seed) for seed in seeds]
    if "transfer" in parts:
        second += [partial(_carried_at, study, e, r) for e in range(len(entrants())) for r in RATES]
    if "diversion" in parts:
        second += [partial(f, study, s) for s in seeds for f in (random_losses, matrices)]
    elif "sizes" in parts:
        second += [partial(old_losses, study, seed) for seed in seeds]
    if "samples" in parts:
        second += [partial(_drawn, study, s, gated) for s in seeds for gated in (True, False)]
    yield second
    if "transfer" in parts:
        yield [partial(_carried, study, e, s) for s in seeds for e in range(len(entrants()))]


def _tried(study: Study, gated: bool, rate: float) -> float:
    """The mean training loss over the second half of a trial."""
    tried = replace(
        study, steps=int(TRIAL * study.steps), learning_rate=rate, dense_rate=rate,
        out=study.out / f"rate-{rate}",
    )  # fmt: skip
    name, train = ("gated", tried.gated) if gated else ("dense", tried.dense)
    train(0)
    return tried.late_loss(name, seed=0)


def _carried_at(study: Study, number: int, rate: float) -> None:
    steps = study.transfer_steps // 3
    transferred(study, entrants()[number], 0, steps=steps, learning_rate=rate)


def _carried(study: Study, number: int, seed: int) -> None:
    entrant = entrants()[number]
    rate = chosen_rate(study, entrant)
    transferred(study, entrant, seed, steps=study.transfer_steps, learning_rate=rate)


def _drawn(study: Study, seed: int, gated: bool) -> None:
    name, model = ("gated", study.gated(seed)) if gated else ("dense", study.dense(seed))
    quality(study, f"{name}-{seed}", model, classes=study.old, seed=seed)
