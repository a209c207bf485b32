"""The workflow: engine, training and report joined into the commands' work."""

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from svdmerge.described import licences_of, manifest_of, pq_bytes, side_files
from svdmerge.engine import assemble, kinship, select
from svdmerge.engine.decompose import decompose, pending
from svdmerge.engine.estimate import estimate, unlike
from svdmerge.engine.inventory import Inventory, take_inventory
from svdmerge.engine.notices import notices
from svdmerge.engine.plan import Plan, make_plan
from svdmerge.engine.runtime import Runtime, open_runtime
from svdmerge.engine.tally import FLOPS, MATRICES, RETRIES, STEP_SECONDS, UNIT_SECONDS
from svdmerge.engine.tasks import Receipt
from svdmerge.errors import RecipeError, ResourceError, StoreError, SvdmergeError
from svdmerge.places import check_places
from svdmerge.progress import SILENT, Progress, Recorded
from svdmerge.recipe import Recipe, TuneConfig
from svdmerge.report.run_report import RunReport, StageProgress, StageReport
from svdmerge.storage import layout
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.hf_model import put_index
from svdmerge.storage.output import (
    UNFINISHED,
    check_ours,
    damaged_files,
    publish,
    read_manifest,
    release,
    staging,
)
from svdmerge.storage.side_files import copy_side_files

if TYPE_CHECKING:
    from svdmerge.targeting import Ranking, Targeting

logger = logging.getLogger(__name__)

DONE = "DONE"
# Seconds between reports of a run that goes on: who looks needs no more, and stores charge by the
# request.
REPORT_S = 2.0


class Run:
    """One attempt at a plan: its stages, each resuming from what is stored."""

    def __init__(
        self, recipe: Recipe, *, runtime: Runtime, progress: Progress = SILENT,
        earlier: str | None = None,
    ) -> None:  # fmt: skip
        """`earlier` is the plan hash of another run, whose factors are taken over where they are
        the same."""
        self.plan: Plan = prepare(recipe, address=runtime.address)
        self._merged = self.plan
        """The plan as the target's examples changed it: other weights, another strength."""
        self.out = Folder.at(recipe.out)
        self._earlier = self.plan.store.child(layout.run_path(earlier)) if earlier else None
        self._runtime, self._progress = runtime, Recorded(progress, tell=self._tell)
        self._reported_at = 0.0
        self._attempt = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
        self.report = RunReport(
            plan_hash=self.plan.hash, out=self.out.uri, store=self.plan.store.uri,
            unlike=dict[str, dict[str, Any]](unlike(self.plan)),
        )  # fmt: skip
        self.report.warnings += [*notices(self.plan), *_unguarded(self.plan.store)]

    def all(self) -> RunReport:
        """Every stage that is left to do; the report."""
        return self.attempt(self._all)

    def attempt(self, work: Callable[[], object]) -> RunReport:
        """The report of some stages, which is also stored, whatever happens."""
        try:
            work()
            if self.report.status == "running":
                self.report.status = "done"
            self.report.progress = None
        except BaseException as error:
            self.report.status = f"failed: {type(error).__name__}"
            self._log_status()
            with contextlib.suppress(SvdmergeError):  # the first error is the one to tell
                self._save_report()
            raise
        self._log_status()
        self._save_report()
        return self.report

    def _log_status(self) -> None:
        told = {"plan_hash": self.plan.hash, "attempt": self._attempt, "out": self.out.uri}
        logger.info("run: %s", self.report.status, extra=told | {"status": self.report.status})

    def decompose(
        self, *, whole: bool = False, judge: Callable[[Inventory], None] = lambda _: None
    ) -> None:
        """Store the components that the selection needs and are not stored yet; `whole`: all that
        each source could give by itself."""
        self.plan.run_folder.put("plan.json", _plan_json(self.plan))
        self._timed(
            "decompose",
            lambda: decompose(
                self.plan,
                runtime=self._runtime,
                progress=self._progress,
                whole=whole,
                judge=judge,
            ),
        )

    def rank(self, config: TuneConfig | None = None) -> None:
        """Rank the sources by their help for a target, the recipe's by default; the report has it.

        Raises:
            RecipeError: there are no examples.
            TrainingError: they cannot be used.
        """
        if next(pending(self.plan, self._inventory(), whole=True), None):
            self.decompose(whole=True)
        self._timed("rank", lambda: self._rank(self._targeting(config)))

    def adapt(self) -> None:
        """Choose sources and strength by the target's examples, where the recipe asks for it."""
        if not self.plan.recipe.is_targeted:
            return
        from svdmerge import targeting

        found = targeting.load(self.plan.run_folder)
        if found is None:
            judge = self._targeting(None)
            self._timed("rank", lambda: self._rank(judge))
            start = time.perf_counter()
            found = judge.adapt()
            seconds = time.perf_counter() - start
            targeting.save(self.plan.run_folder, found)
            self.report.stages.append(StageReport(name="adapt", num_units=1, seconds=seconds))
        self.report.adaptation = found
        self.report.warnings += targeting.warnings(found)
        self._merged = targeting.adapted(self.plan, found)

    def _rank(self, judge: "Targeting") -> list[Receipt]:
        self.report.ranking = judge.rank()
        return []

    def _targeting(self, config: TuneConfig | None) -> "Targeting":
        from svdmerge.targeting import Targeting

        config = config or self.plan.recipe.tune
        if config is None or not config.train or "{name}" in config.train:
            raise RecipeError(
                "ranking sources needs the target's examples",
                "",
                "Give --examples FILE, or add a `tune` section with `train`.",
            )
        return Targeting(self.plan, config, runtime=self._runtime, progress=self._progress)

    def select(self) -> pa.Table:
        """The selection.

        Raises:
            StoreError: a source is not decomposed.
            MismatchError: a source seems to come from another base.
        """
        inventory = self._inventory()
        if missing := next(pending(self.plan, inventory), None):
            raise StoreError(
                f"{missing.reference}: is not decomposed to the depth this recipe needs",
                f"First missing: {missing.name}.",
                "Run `svdmerge decompose` first.",
            )
        self._judge(inventory)
        self.adapt()
        table: list[pa.Table] = []

        def work() -> list[Receipt]:
            table.append(
                select.select(
                    self._merged, inventory, runtime=self._runtime, progress=self._progress
                )
            )
            return []

        self._timed("select", work)
        return table[0]

    def assemble(self, selection: pa.Table | None = None) -> None:
        """Merge what is selected, write the output beside its place and publish it whole.

        Raises:
            StoreError: no selection was made.
        """
        if selection is None:
            self.adapt()
            selection = select.load_selection(self.plan)
        if selection is None:
            raise StoreError(
                f"{self.plan.run_folder.uri}: holds no selection",
                "Nothing was selected for this recipe yet.",
                "Run `svdmerge select` first.",
            )
        self.report.kept = _kept(self.plan, selection)
        self._timed(
            "merge",
            lambda: assemble.merge_factors(
                self._merged, selection, attempt=self._attempt, runtime=self._runtime,
                progress=self._progress, earlier=self._earlier,
            ),
        )  # fmt: skip
        self._timed("write", lambda: self._write(selection))
        self.plan.run_folder.put(DONE, self.out.uri.encode())

    def tune(self) -> None:
        """Tune singular values for the recipe's target and report beside its comparators.

        Raises:
            StoreError: the merge was not run.
        """
        from svdmerge.training.targets import TargetsResult
        from svdmerge.tuning import tune_recipe

        manifest = read_manifest(self.out)
        if manifest is None:
            raise StoreError(
                f"{self.out.uri}: holds no merged model", "", "Run `svdmerge run` first."
            )
        if manifest.plan_hash != self.plan.hash:
            raise StoreError(
                f"{self.out.uri}: is the output of another recipe",
                f"Its plan is {manifest.plan_hash}, this recipe's {self.plan.hash}.",
                "Run `svdmerge run` first.",
            )
        start = time.perf_counter()
        self.report.tune = found = tune_recipe(
            self.plan, runtime=self._runtime, progress=self._progress
        )
        failed, num_units = tuple[str, ...](), 1
        if isinstance(found, TargetsResult):
            failed, num_units = found.failed, len(found.targets)
        if failed:
            told = f"{len(failed)} of {num_units} targets: {', '.join(failed)}"
            self.report.status = f"failed: {told}"
        seconds = time.perf_counter() - start
        self.report.stages.append(StageReport(name="tune", num_units=num_units, seconds=seconds))

    def _all(self) -> None:
        if self._is_done():
            self.report.status = "unchanged"
            self.adapt()  # what was chosen then holds, and is told again
        else:
            # After the first round, before what may be wrong is decomposed any deeper.
            self.decompose(judge=self._judge)
            self.assemble(self.select())
        if self.plan.recipe.tune is not None:
            self.tune()

    def _judge(self, inventory: Inventory) -> None:
        """Refuse sources that seem to come from another base; once is enough."""
        if not self.report.kinship:
            self.report.kinship = dict(
                kinship.stored_kinships(
                    self.plan, inventory, runtime=self._runtime, progress=self._progress
                )
            )
            self.report.warnings += kinship.judge(self.plan, self.report.kinship)

    def _inventory(self) -> Inventory:
        return take_inventory(self.plan, runtime=self._runtime, progress=self._progress)

    def _is_done(self) -> bool:
        """Whether the output is that of this plan, and whole."""
        if self.plan.run_folder.stat(DONE) is None or self.out.stat(UNFINISHED) is not None:
            return False
        manifest = read_manifest(self.out)
        if manifest is None or manifest.plan_hash != self.plan.hash:
            return False
        return assemble.has_layout(self.plan, manifest.files) and not damaged_files(
            self.out, manifest
        )

    def _timed(self, name: str, work: Callable[[], Sequence[Receipt]]) -> None:
        start, before = time.perf_counter(), self._runtime.tally.counts()
        receipts = work()
        counted = self._runtime.tally.counts().since(before)
        self.report.stages.append(
            StageReport(
                name=name,
                num_units=len(receipts),
                seconds=time.perf_counter() - start,
                num_matrices=sum(r.num_matrices for r in receipts),
                num_reused=int(counted.by("state", MATRICES).get("reused", 0)),
                bytes_read=sum(r.bytes_read for r in receipts),
                bytes_stored=sum(r.bytes_stored for r in receipts),
                peak_worker_rss_bytes=max((r.peak_rss_bytes for r in receipts), default=0),
                flops=counted.total(FLOPS),
                unit_seconds=counted.total(UNIT_SECONDS),
                step_seconds=counted.by("step", STEP_SECONDS),
                retries={cause: int(num) for cause, num in counted.by("cause", RETRIES).items()},
            )
        )

    def _write(self, selection: pa.Table) -> list[Receipt]:
        plan, staged = self.plan, staging(self.out, plan_hash=self.plan.hash)
        try:
            written = assemble.write_model(
                plan, staged, runtime=self._runtime, progress=self._progress
            )
            found = pq_bytes(select.provenance(self._merged, selection))
            licences = licences_of(plan)
            written += side_files(
                plan, staged, provenance=found, licences=licences, report=self.report
            )
            copy_side_files(plan.base, staged)
            written += put_index(staged, assemble.output_files(plan))
            publish(staged, self.out, manifest=manifest_of(plan, staged, written, licences))
        finally:
            release(staged)
        return []

    def _tell(self, name: str, done: int, total: int) -> None:
        """Note how far a step is; now and then, in the store."""
        self.report.progress = StageProgress(name=name, done=done, total=total)
        if (now := time.monotonic()) - self._reported_at >= REPORT_S:
            self._reported_at = now
            # Told is not needed: a store's hiccup here must not end the run.
            with contextlib.suppress(SvdmergeError, OSError):
                self._save_report()

    def _save_report(self) -> None:
        path = f"attempts/{self._attempt}/run.json"
        self.plan.run_folder.put(path, self.report.to_json().encode())


def run(recipe: Recipe, *, address: str = "local", progress: Progress = SILENT) -> RunReport:
    """Plan, decompose, select, assemble, and tune if the recipe asks; what was done.

    The same command again is the resume: only what is missing is computed.

    Raises:
        SvdmergeError: whatever is wrong with the recipe, the models, the store or the output.
    """
    prepare(recipe, address=address)  # its faults are told before Ray starts
    with open_runtime(address) as runtime:
        return Run(recipe, runtime=runtime, progress=progress).all()


def run_stage(
    recipe: Recipe, stage: str, *, address: str = "local", progress: Progress = SILENT
) -> RunReport:
    """One stage of a recipe by its name: `decompose`, `select`, `assemble` or `tune`.

    Raises:
        SvdmergeError: as `run`, or what the stage needs was not done yet.
    """
    prepare(recipe, address=address)
    with open_runtime(address) as runtime:
        attempt = Run(recipe, runtime=runtime, progress=progress)
        return attempt.attempt(getattr(attempt, stage))


def rank(
    recipe: Recipe,
    *,
    examples: str | None = None,
    address: str = "local",
    progress: Progress = SILENT,
) -> "Ranking":
    """Sources by their help for the target whose examples a file holds, or the recipe's own.

    With `examples`, settings of how they are read are those of the recipe's `tune` section.

    Raises:
        SvdmergeError: whatever is wrong with the recipe, the models, the store or the examples.
    """
    config = recipe.tune
    if examples is not None:
        config = (
            TuneConfig(train=examples, test=examples)
            if config is None
            else config.model_copy(update={"train": examples, "per_class": None})
        )
    prepare(recipe, address=address)  # its faults are told before Ray starts
    with open_runtime(address) as runtime:
        run = Run(recipe, runtime=runtime, progress=progress)
        run.attempt(lambda: run.rank(config))
    return run.report.ranking


def prepare(recipe: Recipe, *, address: str) -> Plan:
    """The plan of a recipe whose models, store and output can all be used.

    Raises:
        SvdmergeError: whatever headers show, and places that cannot be written.
    """
    plan, out = make_plan(recipe), Folder.at(recipe.out)
    check_places(plan)
    check_ours(out)
    _check_shared(plan, out, address=address)
    plan.store.probe_writable()
    # A local output is written beside its place and renamed at the end.
    (out.parent if out.is_local else out).probe_writable()
    return plan


def _unguarded(store: Folder) -> list[str]:
    """What is told of a store where two runs at once would not notice each other."""
    if store.enforces_put_once():
        return []
    return [
        f"{store.uri}: does not enforce put-once (If-None-Match), so the last of two writers wins: "
        "run one command at a time on it"
    ]


def _check_shared(plan: Plan, out: Folder, *, address: str) -> None:
    """Other processes do not see this one's memory filesystem."""
    folders = [plan.store, out, plan.base.folder, *(s.checkpoint.folder for s in plan.sources)]
    for folder in folders:
        if address != "none" and not folder.is_shared:
            raise ResourceError(
                f"{folder.uri}: lies in this process's memory",
                "Ray's workers are other processes.",
                "Use `--address none`, or a folder or URI that they can reach.",
            )


def _kept(plan: Plan, selection: pa.Table) -> dict[str, int]:
    """Components kept of each source; averaged tensors are no components."""
    names = {s.revision: s.reference for s in plan.sources}
    kept = Counter(dict.fromkeys(names.values(), 0))
    columns = (selection.column("parameter").to_pylist(), selection.column("source").to_pylist())
    kept.update(names[s] for p, s in zip(*columns, strict=True) if not p.endswith("#flat"))
    return dict(sorted(kept.items()))


def _plan_json(plan: Plan) -> bytes:
    import json

    fields: dict[str, Any] = estimate(plan).to_json() | {
        "recipe": plan.recipe.dump(),
        "base": plan.base.revision,
        "sources": {s.reference: s.revision for s in plan.sources},
    }
    return json.dumps(fields, indent=1).encode()
