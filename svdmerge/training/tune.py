"""Tune: train singular values of a merged model for a target, beside what it must beat."""

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor

from svdmerge.core.components import RankOneComponents
from svdmerge.core.params import budget
from svdmerge.core.transfer import LinearHead
from svdmerge.recipe import TuneConfig
from svdmerge.storage.checkpoint import Checkpoint
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.manifest import Committed
from svdmerge.training import trainee as trainees
from svdmerge.training.adapter import Adapted, Adapter, Origin, absolute, factors_digest
from svdmerge.training.backbone import Backbone, build_backbone, lacking
from svdmerge.training.checkpointing import State, save_file, untrained
from svdmerge.training.data import Target, hold_out, load_target
from svdmerge.training.eval_results import eval_results
from svdmerge.training.export import check_out, export
from svdmerge.training.features import Features, FeatureStore, cached
from svdmerge.training.fit import fit, own_device
from svdmerge.training.objective import Judge, Score, objective_of
from svdmerge.training.result import EpochPoint, Row, SourceScore, TuneResult, verdict
from svdmerge.training.trainee import Job, Trainee, build_trainee, read_directions, tunable

OnProgress = Callable[[str, int, int], None]
BASE, MERGED, TUNED, REFITTED = "base", "merged", "tuned", "tuned, head in closed form"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Probe:
    """One frozen model, judged by what it measures on the training examples."""

    model: Checkpoint
    judge: Judge
    seconds: float


def tune(
    config: TuneConfig,
    *,
    base: Checkpoint,
    merged: Checkpoint,
    sources: Sequence[Checkpoint],
    factors: Committed,
    parameters: Mapping[str, int],
    run_folder: Folder,
    out: Folder,
    threads: int,
    use_ray: bool,
    on_progress: OnProgress,
) -> TuneResult:
    """The target's accuracy by base, best single source, merged and tuned model; `out` written.

    `parameters` maps each merged matrix to the number of its stored components. The same call again
    resumes: features, epochs and the trained state are kept in the run's folder.

    Raises:
        TrainingError: the target's files, the backbone or the training itself failed.
        OutputError: `out` holds something foreign.
    """
    check_out(out)
    with _threads(threads):
        return _Tuning(
            config,
            base=base,
            merged=merged,
            factors=factors,
            parameters=parameters,
            folder=run_folder.child("tune"),
            threads=threads,
            on_progress=on_progress,
        ).run(sources, out=out, use_ray=use_ray)


class _Tuning:
    def __init__(
        self,
        config: TuneConfig,
        *,
        base: Checkpoint,
        merged: Checkpoint,
        factors: Committed,
        parameters: Mapping[str, int],
        folder: Folder,
        threads: int,
        on_progress: OnProgress,
    ) -> None:
        self.config, self.base, self.merged = config, base, merged
        self.folder, self.on_progress = folder, on_progress
        # A cluster's driver may lack the workers' GPU, or the model not fit on one; features then
        # take its CPU.
        on_gpu = config.use_gpu and not config.shard and torch.cuda.is_available()
        self.device = own_device(use_gpu=on_gpu)
        self.target: Target = load_target(config, base=base)
        self.kept, self.held = hold_out(
            self.target.train.labels.numpy(), share=config.validation_share, seed=config.seed
        )
        self.backbone: Backbone = build_backbone(config, base=base)
        self.objective = objective_of(config)
        kept, notes = tunable(self.backbone, parameters=parameters, null_space=config.null_space)
        self.notes = [*self.target.notes, *notes, *_short_of(config, base=base, parameters=kept)]
        self.features = FeatureStore(
            self.backbone, base=base, target=self.target, config=config,
            folder=folder.child("features"), device=self.device,
            measure=lambda e: self.objective.measure(self.backbone, e, device=self.device),
        )  # fmt: skip
        self.key = trainees.tuning_key(
            config, base=base, merged=merged, factors=factors, parameters=kept,
            data=self.target.train.digest(),
        )  # fmt: skip
        self.job = Job(
            config=config, base=base, merged=merged, factors=factors, parameters=kept,
            folder=folder.child(self.key[:32]), threads=threads,
        )  # fmt: skip

    def run(self, sources: Sequence[Checkpoint], *, out: Folder, use_ray: bool) -> TuneResult:
        """Probe, train, measure, export."""
        probes = self._probes([self.base, *sources, self.merged])
        base, *of_sources, merged = probes
        ranked = sorted(of_sources, key=lambda p: (p.judge.error, p.model.reference))
        state, resumed = self._fit(use_ray=use_ray)
        rows = (
            self._row(BASE, base),
            *(self._row(_source(p), p) for p in ranked[:1]),
            self._row(MERGED, merged),
        )
        tuned = self._tuned_rows(state, probe_seconds=merged.seconds)
        told = verdict(
            tuned=tuned[0], merged=rows[-1], others=rows, num_test=len(self.target.test),
            error=self._error(merged, state),
        )  # fmt: skip
        result = TuneResult(
            rows=(*rows, *tuned),
            sources=tuple(
                SourceScore(name=p.model.reference, loo_error=p.judge.error, seconds=p.seconds)
                for p in ranked
            ),
            best_source=ranked[0].model.reference if ranked else "",
            notes=(*self._notes(state), *_borrowed(sources, base=self.base)),
            verdict=told,
            resumed=resumed,
            out=out.uri,
            **self._facts(state),
        )
        self._export(result, state=state, out=out)
        return result

    def _facts(self, state: State) -> dict[str, Any]:
        """Fields of the result that the target and the training alone determine."""
        return {
            "curve": tuple(EpochPoint(**point) for point in state["curve"]),
            "num_train": len(self.target.train),
            "num_test": len(self.target.test),
            "num_classes": self.target.num_classes,
            "classes": self.target.classes,
            "seconds": state["seconds"],
            "best_epoch": state["best"]["epoch"] if state["best"] else None,
            "num_held_out": len(self.held),
            "held_out_gain": state.get("gain"),
            # JSON has no infinity.
            "held_out_error": state.get("error") if len(self.held) > 1 else None,
        }

    def _probes(self, models: Sequence[Checkpoint]) -> list[Probe]:
        probes: list[Probe] = []
        for number, model in enumerate(models):
            self.on_progress("probe", number, len(models))
            measured, start = self.features.train(model), time.perf_counter()
            judge = self.objective.judge(measured.values, self.target.train)
            seconds = measured.seconds + time.perf_counter() - start
            probes.append(Probe(model=model, judge=judge, seconds=seconds))
        self.on_progress("probe", len(models), len(models))
        return probes

    def _fit(self, *, use_ray: bool) -> tuple[State, bool]:
        # From what is trained on alone: else what is held out would judge a head that knows it.
        measured = self.features.train(self.merged).values[self.kept]
        head = self.objective.start(measured, self.target.train.take(self.kept))
        save_file(self.job.folder, trainees.HEAD, head)
        if not self.job.parameters:
            return untrained(head), False
        epochs = self.config.epochs
        state, resumed = fit(
            self.job,
            examples=self.target.train,
            use_ray=use_ray,
            on_epoch=lambda epoch: self.on_progress("tune", epoch, epochs),
        )
        if state["best"] and state["best"]["epoch"] == 0:
            # Nothing was held out for the sake of training then: the head may know all examples.
            whole = self.features.train(self.merged).values
            state = state | {"head": self.objective.start(whole, self.target.train)}
        return state, resumed

    def _row(self, name: str, probe: Probe) -> Row:
        test = self.features.test(probe.model)
        return _row(
            name,
            probe.judge.score(test.values, self.target.test),
            head=probe.judge.head,
            seconds=probe.seconds + test.seconds,
            loo_error=probe.judge.error,
        )

    def _tuned_rows(self, state: State, *, probe_seconds: float) -> list[Row]:
        """The tuned model with the head it trained, and with one in closed form as other rows."""
        test, head = self._tuned_features(state, "test"), trained_head(state)
        num = sum(d.numel() for d in state["sigma_change"].values())
        seconds = probe_seconds + state["seconds"] + test.seconds
        if head is None:
            judge = self.objective.judge(test.values, self.target.test)
            score = judge.score(test.values, self.target.test)
            return [_row(TUNED, score, trained=num, seconds=seconds)]
        train = self._tuned_features(state, "train")
        judge = self.objective.judge(train.values, self.target.train)
        accuracy = head.accuracy(test.values, labels=self.target.test.labels)
        return [
            _row(TUNED, Score(accuracy=accuracy), head=head, trained=num, seconds=seconds),
            _row(
                REFITTED,
                judge.score(test.values, self.target.test),
                head=judge.head,
                trained=num,
                seconds=seconds + train.seconds,
                loo_error=judge.error,
            ),
        ]

    def _error(self, merged: Probe, state: State) -> float | None:
        """Standard error of the mean gain in nats per token, texts taken in pairs; else None."""
        before, after = (
            merged.judge.score(values, self.target.test).nll
            for values in (
                self.features.test(self.merged).values,
                self._tuned_features(state, "test").values,
            )
        )
        if before is None or after is None or len(before) < 2:
            return None
        return float((before - after).double().std()) / math.sqrt(len(before))

    def _tuned_features(self, state: State, part: str) -> Features:
        examples = self.target.train if part == "train" else self.target.test
        key = f"tuned-{self.key[:32]}-{examples.digest()[:16]}"

        if not state["sigma_change"]:
            return (
                self.features.train(self.merged)
                if part == "train"
                else self.features.test(self.merged)
            )

        def measure() -> Tensor:
            backbone = self._trained(state).backbone
            return self.objective.measure(backbone, examples, device=self.device)

        return cached(self.folder.child("features"), key, measure)

    def _trained(self, state: State) -> Trainee:
        built = build_trainee(
            self.job, examples=self.target.train, objective=self.objective, device=self.device
        )
        with torch.no_grad():
            for name, value in state["sigma_change"].items():
                built.layers[name].sigma_change.copy_(value)
        return built

    def _notes(self, state: State) -> Iterator[str]:
        yield from self.notes
        if names := sorted(set(self.job.parameters) - set(state["sigma_change"])):
            yield (
                f"{len(names)} matrices take no part in the features and are not trained, "
                f"first {names[0]}"
            )
        if best := state["best"]:
            kept = (
                f"epoch {best['epoch']} of {state['epoch']} is kept"
                if best["epoch"]
                else "nothing is changed, for no epoch was clearly better than none"
            )
            yield (
                f"{kept}: by {state['gain']:.4f} nats, standard error {state['error']:.4f}, "
                f"on {len(self.held)} held-out examples"
            )

    def _export(self, result: TuneResult, *, state: State, out: Folder) -> None:
        export(
            out,
            adapted=Adapted(
                base=self.base,
                merged=self.merged,
                factors=self.job.factors,
                config=self.config,
                changes=tuned_changes(self.job, state),
            ),
            adapter=Adapter(
                sigma_change=state["sigma_change"],
                factors_sha256=factors_digest(self.job.factors),
                null_space=self.config.null_space,
                seed=self.config.seed,
            ),
            origin=Origin(
                base=absolute(self.base.reference),
                merged=absolute(self.merged.reference),
                factors=self.job.factors.store.uri,
                config=self.config,
            ),
            head=trained_head(state),
            key=self.key,
            result_json=result.to_json(),
            results=eval_results(self.config, result, row=TUNED),
            scratch=self.job.folder.child("change"),
        )


def tuned_changes(job: Job, state: State) -> dict[str, RankOneComponents]:
    """The trained changes as components: the directions, with `s` the change of each value."""
    found: dict[str, RankOneComponents] = {}
    for name, change in state["sigma_change"].items():
        directions = read_directions(job, name)
        found[name] = RankOneComponents(u=directions.u, s=change, vh=directions.vh)
    return found


def trained_head(state: State) -> LinearHead | None:
    """The head as trained; None where there is none."""
    if not state["head"]:
        return None
    return LinearHead(weight=state["head"]["weight"], bias=state["head"]["bias"])


def _borrowed(sources: Sequence[Checkpoint], *, base: Checkpoint) -> Iterator[str]:
    for source in sources:
        if names := lacking(source, base=base):
            yield f"{source.reference}: {len(names)} tensors are the base's, first {names[0]}"


def _source(probe: Probe) -> str:
    return f"best source: {PurePath(probe.model.reference).name}"


def _row(
    name: str,
    score: Score,
    *,
    seconds: float,
    head: LinearHead | None = None,
    trained: int = 0,
    loo_error: float | None = None,
) -> Row:
    nll = None if score.nll is None else float(score.nll.double().mean())
    of_head = 0 if head is None else head.weight.numel() + head.bias.numel()
    return Row(
        name=name,
        accuracy=score.accuracy,
        trained=trained,
        trained_with_head=trained + of_head,
        seconds=seconds,
        loo_error=loo_error,
        nll=nll,
        # Past what a float holds, the perplexity is infinite in all but name; JSON has no infinity.
        perplexity=None if nll is None or nll > 700 else math.exp(nll),
    )


def _short_of(
    config: TuneConfig, *, base: Checkpoint, parameters: Mapping[str, int]
) -> Iterator[str]:
    """A note where fewer values train than were asked for."""
    wanted = {p: budget(config.num_values, rank=min(base.tensors[p].shape)) for p in parameters}
    short = [p for p, n in wanted.items() if parameters[p] < n]
    if short and not config.null_space:
        p = min(short, key=lambda x: (parameters[x] - wanted[x], x))
        yield (
            f"trains {parameters[p]} of {wanted[p]} values per matrix: merged factors have "
            f"{parameters[p]} components ({len(short)} of {len(parameters)} matrices so; "
            "`null_space: true` trains the rest on random directions)"
        )


@contextmanager
def _threads(num: int) -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)
