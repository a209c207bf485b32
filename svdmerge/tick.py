"""Tick: merge again if a source changed, and release what the gate lets pass.

Releases are models in folders of their own below `out`, named by content and epoch, and records of
them in the store (`storage.releases` says why two ticks at once cannot get in each other's way).
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from svdmerge import gate
from svdmerge.engine.plan import Plan, make_plan
from svdmerge.engine.runtime import Runtime, open_runtime
from svdmerge.errors import (
    ContentError,
    OutputError,
    RecipeError,
    SolverError,
    StoreError,
    SvdmergeError,
)
from svdmerge.notify import post
from svdmerge.places import check_places
from svdmerge.progress import SILENT, Progress
from svdmerge.recipe import Recipe
from svdmerge.report.run_report import RunReport
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.layout import MANIFEST
from svdmerge.storage.releases import (
    Release,
    Releases,
    changes_between,
    kept_models,
    now,
    told_of,
)

# Of a folder's name: enough that two contents of one recipe never share it.
CONTENT_DIGITS = 12
# Settings of `tune` that no number depends on.
HOW_OFTEN = {"use_gpu", "checkpoint_every", "checkpoint_every_s"}


@dataclass(slots=True, kw_only=True)
class TickResult:
    """What a tick found and did."""

    status: str
    """`unchanged`; `released`; `refused`: not released, for `why`; `held`: these sources' release
    was rolled back."""
    why: str
    release: Release | None
    """The current one, after the tick."""
    skipped: dict[str, str] = field(default_factory=dict[str, str])
    """Sources that cannot be used, and why."""
    warnings: list[str] = field(default_factory=list[str])
    run: RunReport | None = None
    """Of the merge, if one was made."""
    is_news: bool = False
    """Whether no tick before has found it."""

    def to_json(self) -> dict[str, Any]:
        """The result as plain values."""
        plain = {n: getattr(self, n) for n in ("status", "why", "skipped", "warnings")}
        return plain | {
            "release": asdict(self.release) if self.release else None,
            "run": json.loads(self.run.to_json()) if self.run else None,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What the recipe stands for now."""

    plan: Plan
    content: str
    skipped: dict[str, str]


def tick(recipe: Recipe, *, address: str = "local", progress: Progress = SILENT) -> TickResult:
    """Look at the sources; merge, judge and release what is new.

    The same call again is the resume.

    Raises:
        SvdmergeError: whatever is wrong with the recipe, the store, or the machines.
    """
    try:
        result = _Tick(recipe, address=address, progress=progress).run()
    except SvdmergeError as error:
        _notify(recipe, {"status": "failed", "why": str(error)})
        raise
    if result.is_news:
        tell(recipe, result)
    return result


def releases_of(recipe: Recipe) -> Releases:
    """The recipe's releases.

    Raises:
        RecipeError: they are another recipe's.
    """
    place = recipe.tick.releases or f"{recipe.store.rstrip('/')}/releases"
    releases, out = Releases(folder=Folder.at(place)), Folder.at(recipe.out)
    current = releases.current()
    if current is not None and current.out != out.uri:
        raise RecipeError(
            f"{place}: holds the releases of another `out`, {current.out}",
            "Each would take the other's place.",
            "Give `tick: {releases: ...}`, a folder for this recipe's.",
        )
    return releases


class _Tick:
    def __init__(self, recipe: Recipe, *, address: str, progress: Progress) -> None:
        self.recipe, self.address, self.progress = recipe, address, progress
        self.out = Folder.at(recipe.out)
        _check_out(recipe, self.out)
        self.releases = releases_of(recipe)
        self.gate = gate.settings_digest(recipe)

    def run(self) -> TickResult:
        """What was found and done."""
        if (known := self._known(self._look(), self.releases.current())) is not None:
            return known
        # Before the sources are looked at: whoever has a later one knows no older sources.
        epoch = self.releases.take_epoch()
        seen, current = self._look(), self.releases.current()
        if (known := self._known(seen, current)) is not None:
            return known
        with open_runtime(self.address) as runtime:
            return self._merge(seen, epoch, current, runtime)

    def _look(self) -> _Seen:
        skipped: dict[str, str] = {}

        def refused(name: str, error: SvdmergeError) -> None:
            skipped[name] = " ".join(str(error).split())

        plan = make_plan(self.recipe, refused=refused)
        check_places(plan)
        return _Seen(plan=plan, content=_content(plan), skipped=skipped)

    def _known(self, seen: _Seen, current: Release | None) -> TickResult | None:
        """The result where nothing is to be done."""
        if seen.skipped and self.recipe.tick.unfit == "stop":
            return self._stopped(seen, current)
        if current is not None and current.content == seen.content and _is_there(current):
            return self._result("unchanged", f"release {current.n} holds", seen, current)
        note = self.releases.refusal(seen.content)
        if note is None or note["given"] not in (None, self._given(current)):
            return None
        return self._result(note["status"], note["why"], seen, current)

    def _stopped(self, seen: _Seen, current: Release | None) -> TickResult:
        """The result where sources cannot be used, and none may be left out."""
        name, why = next(iter(seen.skipped.items()))
        told = f"{len(seen.skipped)} sources cannot be used, first {name}: {why}"
        found = self._result("refused", told, seen, current)
        key = _digest(sorted(seen.skipped.items()))
        found.is_news = self.releases.refusal(key) is None
        if found.is_news:
            self.releases.refuse(key, status="refused", why=told)
        return found

    def _given(self, current: Release | None) -> list[str]:
        """What a refusal by the gate depends on besides the content."""
        return [self.gate, current.content if current else ""]

    def _merge(
        self, seen: _Seen, epoch: int, current: Release | None, runtime: Runtime
    ) -> TickResult:
        from svdmerge.workflow import Run  # a tick with nothing new waits for neither torch nor Ray

        label = f"{seen.content[:CONTENT_DIGITS]}-{epoch}"
        model = self._made_before(seen, current) or self.out.child(label).uri
        tuned = self.out.child(f"{label}-tuned").uri
        run = Run(
            _placed(seen.plan.recipe, model=model, tuned=tuned), runtime=runtime,
            progress=self.progress, earlier=current.plan_hash if current else None,
        )  # fmt: skip
        if run.plan.hash != seen.plan.hash:
            raise StoreError("sources change just now", "", "Run the same command again.")
        try:
            run.all()
        except (ContentError, SolverError) as error:
            why = " ".join(str(error).split())
            self.releases.refuse(seen.content, status="refused", why=why)
            return self._result("refused", why, seen, current, run.report)
        if run.report.status.startswith("failed"):
            raise OutputError(f"tuning {run.report.status}", "", "Run the same command again.")
        draft = Release(
            n=0, epoch=epoch, content=seen.content, plan_hash=seen.plan.hash, out=self.out.uri,
            model=model, tuned=tuned if seen.plan.recipe.tune else None,
            base=seen.plan.base.reference, skipped=seen.skipped,
            sources={s.reference: s.revision for s in seen.plan.sources},
        )  # fmt: skip
        return self._release(draft, seen, run.report, runtime)

    def _release(
        self, draft: Release, seen: _Seen, report: RunReport, runtime: Runtime
    ) -> TickResult:
        """Judge a merge by the current release and put its record, again while others come
        between."""
        while True:
            current = self.releases.current()
            if current is not None and current.content == draft.content and _is_there(current):
                why = f"release {current.n} came between, of the same content"
                self._drop(draft, but=current)
                return self._result("unchanged", why, seen, current, report)
            verdict = gate.judge(
                seen.plan, model=draft.model, tuned=draft.tuned, current=current, runtime=runtime,
                progress=self.progress,
            )  # fmt: skip
            changes = changes_between(current.sources if current else {}, draft.sources)
            told = f"{told_of(changes, current)}; {verdict.why}"
            if not verdict.holds:
                given = self._given(current)
                self.releases.refuse(draft.content, status="refused", why=told, given=given)
                self._drop(draft)
                return self._result("refused", told, seen, current, report)
            release = replace(
                draft, n=current.n + 1 if current else 1, why=told, measures=verdict.measures,
                released_at=now(), **changes,
            )  # fmt: skip
            if not _is_there(release):
                raise OutputError(f"{release.model}: is gone", "", "Run the same command again.")
            if self.releases.publish(release):
                self._clear(release)
                return self._result("released", told, seen, release, report)

    def _result(
        self, status: str, why: str, seen: _Seen, current: Release | None,
        report: RunReport | None = None,
    ) -> TickResult:  # fmt: skip
        warnings: list[str] = []
        if report is not None and not self.releases.folder.enforces_put_once():
            warnings.append(
                f"{self.releases.folder.uri}: does not enforce put-once; let one tick run at a time"
            )
        return TickResult(
            status=status, why=why, release=current, skipped=seen.skipped, warnings=warnings,
            run=report, is_news=report is not None and status != "unchanged",
        )  # fmt: skip

    def _drop(self, draft: Release, *, but: Release | None = None) -> None:
        """Remove the models of what is not released: refused ones would fill the disk."""
        for place in kept_models([draft], keep=1) - (kept_models([but], keep=1) if but else set()):
            Folder.at(place).remove()

    def _made_before(self, seen: _Seen, current: Release | None) -> str | None:
        """A whole model of this content that an attempt since the current release left, so that
        what follows resumes."""
        for name in self.out.names():
            epoch = _epoch_of(name, content=seen.content[:CONTENT_DIGITS])
            if epoch is None or name.endswith("-tuned") or (current and epoch < current.epoch):
                continue
            if _is_whole(self.out.child(name)):
                return self.out.child(name).uri
        return None

    def _clear(self, release: Release) -> None:
        """Remove the models of old releases and of attempts before this one, which cannot be
        released any more."""
        last = [self.releases.read(n) for n in self.releases.numbers()[-self.recipe.tick.keep :]]
        kept = {Folder.at(place).name for place in kept_models(last, keep=len(last))}
        for name in self.out.names():
            epoch = _epoch_of(name)
            if epoch is not None and epoch < release.epoch and name not in kept:
                self.out.child(name).remove()


def _epoch_of(name: str, *, content: str = "[0-9a-f]{12}") -> int | None:
    """The epoch in the name of a model's folder; None if it is named otherwise."""
    match = re.fullmatch(rf"{content}-(\d+)(-tuned)?", name)
    return int(match[1]) if match else None


def _check_out(recipe: Recipe, out: Folder) -> None:
    if _is_whole(out):
        raise RecipeError(
            f"out: {out.uri} is the output of a run",
            "Releases lie in folders below `out`, and the next run would replace them.",
            "Give `tick` another `out`.",
        )
    tune = recipe.tune
    if tune is not None and any([tune.out, *(tune.of(t).out for t in tune.targets)]):
        raise RecipeError(
            "tune.out: a tick writes every release's tuned model beside its merged one", "",
            "Leave it out.",
        )  # fmt: skip


def _placed(recipe: Recipe, *, model: str, tuned: str) -> Recipe:
    """The recipe with the places of one release."""
    tune = recipe.tune and recipe.tune.model_copy(update={"out": tuned})
    return recipe.model_copy(update={"out": model, "tune": tune})


def _content(plan: Plan) -> str:
    """Digest of all that a release depends on: the plan, and what tuning adds to it."""
    fields: list[Any] = [plan.hash]
    if (tune := plan.recipe.tune) is not None:
        fields += [tune.model_dump(mode="json", exclude=HOW_OFTEN), gate.versions(tune)]
    return _digest(fields)


def _digest(fields: list[Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:32]


def _is_there(release: Release) -> bool:
    return _is_whole(Folder.at(release.model))


def _is_whole(model: Folder) -> bool:
    return model.stat(MANIFEST) is not None


def tell(recipe: Recipe, result: TickResult) -> None:
    """Tell the recipe's webhook; if it is not taken, that is a warning of the result."""
    plain = {key: value for key, value in result.to_json().items() if key != "run"}
    if (failed := _notify(recipe, plain)) is not None:
        result.warnings.append(failed)


def _notify(recipe: Recipe, message: dict[str, Any]) -> str | None:
    address = recipe.tick.webhook
    return None if address is None else post(address, message)
