"""Tune: train singular values of a merged model for a target, beside what it must beat."""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from svdmerge.core.components import RankOneComponents
from svdmerge.core.params import budget
from svdmerge.core.transfer import LinearHead, RidgeFit, ridge, sharpness
from svdmerge.recipe import TuneConfig
from svdmerge.storage.checkpoint import Checkpoint
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.manifest import Committed
from svdmerge.training import trainee as trainees
from svdmerge.training.adapter import Adapted, Adapter, Origin, absolute, factors_digest
from svdmerge.training.backbone import Backbone, build_backbone, lacking
from svdmerge.training.checkpointing import State, save_file
from svdmerge.training.data import Target, load_target
from svdmerge.training.export import check_out, export
from svdmerge.training.features import Features, FeatureStore, cached, extract
from svdmerge.training.fit import fit, own_device
from svdmerge.training.result import EpochPoint, Row, SourceScore, TuneResult, verdict
from svdmerge.training.trainee import Job, Trainee, build_trainee, read_directions, tunable

OnProgress = Callable[[str, int, int], None]
BASE, MERGED, TUNED, REFITTED = "base", "merged", "tuned", "tuned, ridge head"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Probe:
    """A ridge head on one model's frozen features of the training examples."""

    model: Checkpoint
    fit: RidgeFit
    seconds: float

    @property
    def loo_error(self) -> float:
        """Mean over examples of the leave-one-out error."""
        return float(self.fit.loo_error.mean())


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
        # A cluster's driver may lack the workers' GPU; features then take its CPU.
        self.device = own_device(use_gpu=config.use_gpu and torch.cuda.is_available())
        self.target: Target = load_target(config, base=base)
        self.backbone: Backbone = build_backbone(config, base=base)
        kept, notes = tunable(self.backbone, parameters=parameters, null_space=config.null_space)
        self.notes = [*self.target.notes, *notes, *_short_of(config, base=base, parameters=kept)]
        self.features = FeatureStore(
            self.backbone, base=base, target=self.target, config=config,
            folder=folder.child("features"), device=self.device,
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
        ranked = sorted(of_sources, key=lambda p: (p.loo_error, p.model.reference))
        start = merged.fit.head.sharpened(
            sharpness(merged.fit.left_out, labels=self.target.train.labels)
        )
        save_file(self.job.folder, trainees.HEAD, {"weight": start.weight, "bias": start.bias})
        epochs = self.config.epochs
        state, resumed = fit(
            self.job,
            examples=self.target.train,
            use_ray=use_ray,
            on_epoch=lambda epoch: self.on_progress("tune", epoch, epochs),
        )
        rows = [self._row(BASE, base), *(self._row(_source(p), p) for p in ranked[:1])]
        rows.append(self._row(MERGED, merged))
        tuned, refitted = self._tuned_rows(state, probe_seconds=merged.seconds)
        told = verdict(
            tuned=tuned, merged=rows[-1], others=tuple(rows), num_test=len(self.target.test)
        )
        result = TuneResult(
            rows=(*rows, tuned, refitted),
            sources=tuple(
                SourceScore(name=p.model.reference, loo_error=p.loo_error, seconds=p.seconds)
                for p in ranked
            ),
            best_source=ranked[0].model.reference if ranked else "",
            curve=tuple(EpochPoint(loss=x, accuracy=y) for x, y in state["curve"]),
            notes=(*self.notes, *_borrowed(sources, base=self.base), *self._unreached(state)),
            verdict=told,
            resumed=resumed,
            out=out.uri,
            num_train=len(self.target.train),
            num_test=len(self.target.test),
            num_classes=self.target.num_classes,
        )
        self._export(result, state=state, out=out)
        return result

    def _probes(self, models: Sequence[Checkpoint]) -> list[Probe]:
        probes: list[Probe] = []
        for number, model in enumerate(models):
            self.on_progress("probe", number, len(models))
            probes.append(self._probe(model, self.features.train(model)))
        self.on_progress("probe", len(models), len(models))
        return probes

    def _probe(self, model: Checkpoint, features: Features) -> Probe:
        start = time.perf_counter()
        found = self._ridge(features.values)
        return Probe(model=model, fit=found, seconds=features.seconds + time.perf_counter() - start)

    def _ridge(self, features: Tensor) -> RidgeFit:
        train = self.target.train
        return ridge(features, labels=train.labels, num_classes=self.target.num_classes)

    def _row(self, name: str, probe: Probe) -> Row:
        test = self.features.test(probe.model)
        return Row(
            name=name,
            accuracy=probe.fit.head.accuracy(test.values, labels=self.target.test.labels),
            trained=0,
            trained_with_head=_head_values(probe.fit.head),
            seconds=probe.seconds + test.seconds,
            loo_error=probe.loo_error,
        )

    def _tuned_rows(self, state: State, *, probe_seconds: float) -> tuple[Row, Row]:
        """The tuned model with the head it trained, and with a ridge head like the other rows'."""
        train, test = (self._tuned_features(state, part) for part in ("train", "test"))
        head, found = trained_head(state), self._ridge(train.values)
        labels = self.target.test.labels
        trained = sum(d.numel() for d in state["sigma_change"].values())
        seconds = probe_seconds + state["seconds"] + test.seconds

        def row(name: str, head: LinearHead, *, seconds: float, loo_error: float | None) -> Row:
            return Row(
                name=name,
                accuracy=head.accuracy(test.values, labels=labels),
                trained=trained,
                trained_with_head=trained + _head_values(head),
                seconds=seconds,
                loo_error=loo_error,
            )

        return row(TUNED, head, seconds=seconds, loo_error=None), row(
            REFITTED,
            found.head,
            seconds=seconds + train.seconds,
            loo_error=float(found.loo_error.mean()),
        )

    def _tuned_features(self, state: State, part: str) -> Features:
        examples = self.target.train if part == "train" else self.target.test
        key = f"tuned-{self.key[:32]}-{examples.digest()[:16]}"
        return cached(
            self.folder.child("features"),
            key,
            lambda: extract(self._trained(state).backbone, examples, device=self.device),
        )

    def _trained(self, state: State) -> Trainee:
        built = build_trainee(self.job, examples=self.target.train, device=self.device)
        with torch.no_grad():
            for name, value in state["sigma_change"].items():
                built.layers[name].sigma_change.copy_(value)
        return built

    def _unreached(self, state: State) -> Iterator[str]:
        if names := sorted(set(self.job.parameters) - set(state["sigma_change"])):
            yield (
                f"{len(names)} matrices take no part in the features and are not trained, "
                f"first {names[0]}"
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
            scratch=self.job.folder.child("change"),
        )


def tuned_changes(job: Job, state: State) -> dict[str, RankOneComponents]:
    """The trained changes as components: the directions, with `s` the change of each value."""
    found: dict[str, RankOneComponents] = {}
    for name, change in state["sigma_change"].items():
        directions = read_directions(job, name)
        found[name] = RankOneComponents(u=directions.u, s=change, vh=directions.vh)
    return found


def trained_head(state: State) -> LinearHead:
    """The head as trained."""
    return LinearHead(weight=state["head"]["weight"], bias=state["head"]["bias"])


def _borrowed(sources: Sequence[Checkpoint], *, base: Checkpoint) -> Iterator[str]:
    for source in sources:
        if names := lacking(source, base=base):
            yield f"{source.reference}: {len(names)} tensors are the base's, first {names[0]}"


def _source(probe: Probe) -> str:
    return f"best source: {probe.model.folder.name}"


def _head_values(head: LinearHead) -> int:
    return head.weight.numel() + head.bias.numel()


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
