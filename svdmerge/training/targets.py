"""Many targets on one merged base: one unit of work each, its outcome, and the table of all."""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from svdmerge.errors import OutputError, SvdmergeError, TrainingError
from svdmerge.recipe import Recipe, TuneConfig
from svdmerge.storage.checkpoint import Checkpoint, open_checkpoint
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.hf_model import load_factors
from svdmerge.training.adapter import ADAPTER, TUNE, factors_digest
from svdmerge.training.export import check_out
from svdmerge.training.fit import backbone_path
from svdmerge.training.result import TuneResult
from svdmerge.training.tune import tune

SUMMARY = "targets.json"
_FINISHED = "finished"
# Settings that no number or file depends on.
_HOW_OFTEN = {"use_gpu", "checkpoint_every", "checkpoint_every_s"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetUnit:
    """One target to tune, in one task: places and headers, no weights."""

    name: str
    threads: int
    memory_bytes: int
    config: TuneConfig
    base: Checkpoint
    merged: Checkpoint
    sources: tuple[Checkpoint, ...]
    matrices: tuple[str, ...]
    factors: str
    folder: str
    """Where this target's tuning keeps its state."""
    out: str
    search_path: str
    """Where the backbone's package lies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetOutcome:
    """What became of one target."""

    name: str
    result: TuneResult | None
    """None where tuning failed."""
    error: str
    adapter_bytes: int
    skipped: bool
    """Whether an earlier attempt had finished it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetsResult:
    """All targets' outcomes, in the recipe's order."""

    targets: tuple[TargetOutcome, ...]

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of those that failed."""
        return tuple(t.name for t in self.targets if t.result is None)

    def to_json(self) -> str:
        """The outcomes as JSON."""
        return json.dumps(asdict(self), indent=1)


def target_units(
    recipe: Recipe,
    *,
    base: Checkpoint,
    sources: Sequence[Checkpoint],
    matrices: Sequence[str],
    run_folder: Folder,
) -> list[TargetUnit]:
    """A unit for each target of the recipe.

    Raises:
        OutputError: a target's folder holds something foreign, or two share one.
        TrainingError: the recipe has no targets.
    """
    config = recipe.tune
    if config is None or not config.targets:
        raise TrainingError("the recipe has no `tune.targets`", "", "List them, or use `train`.")
    summary_out(recipe)
    merged = open_checkpoint(recipe.out)
    units: list[TargetUnit] = []
    for target in config.targets:
        own = config.of(target)
        out = Folder.at(own.out or f"{default_out(recipe)}/{target.name}")
        check_out(out)
        units.append(
            TargetUnit(
                name=target.name,
                threads=recipe.resources.threads,
                memory_bytes=recipe.resources.memory,
                config=own,
                base=base,
                merged=merged,
                sources=tuple(sources),
                matrices=tuple(matrices),
                factors=run_folder.child("factors").uri,
                folder=run_folder.child(f"targets/{target.name}").uri,
                out=out.uri,
                search_path=backbone_path(own),
            )
        )
    _check_apart(units)
    return units


def default_out(recipe: Recipe) -> str:
    """Where tuning writes if the recipe does not say."""
    return f"{recipe.out.rstrip('/')}-tuned"


def summary_out(recipe: Recipe) -> Folder:
    """Where the summary of all targets goes: the folder that holds theirs, unless each has its own.

    Raises:
        OutputError: that is a tuned model, which a later tuning would replace whole.
    """
    given = recipe.tune.out if recipe.tune is not None else None
    out = Folder.at(given if given and "{name}" not in given else default_out(recipe))
    if out.stat(TUNE) is not None:
        raise OutputError(
            f"{out.uri}: holds the tuned model of one target",
            "The folders of many targets would lie in it.",
            "Give another `out` in `tune`, or delete that folder.",
        )
    return out


def _check_apart(units: Sequence[TargetUnit]) -> None:
    """Each replaces its own folder whole."""
    taken: dict[str, str] = {}
    for unit in units:
        if unit.out in taken:
            raise OutputError(
                f"{unit.out}: is the folder of two targets, {taken[unit.out]} and {unit.name}",
                "",
                "Leave `out` of targets away, or write `{name}` in it.",
            )
        taken[unit.out] = unit.name


def tune_target(unit: TargetUnit) -> TargetOutcome:
    """A target's outcome: tuned in this process, or as an earlier attempt left it.

    Raises:
        SvdmergeError: tuning failed.
    """
    out = Folder.at(unit.out)
    try:
        if unit.search_path not in sys.path:
            sys.path.append(unit.search_path)
        key = _key(unit)
        result = _finished(out, key)
        skipped = result is not None
        if result is None:
            result = _tune(unit, out)
            out.put(_FINISHED, key.encode())
    except SvdmergeError:
        raise
    except Exception as error:
        raise TrainingError(
            f"target {unit.name}: {type(error).__name__}", str(error), "See `--verbose`."
        ) from error
    stat = out.stat(ADAPTER)
    size = 0 if stat is None else stat.size
    return TargetOutcome(
        name=unit.name, result=result, error="", adapter_bytes=size, skipped=skipped
    )


def failed_target(unit: TargetUnit, error: SvdmergeError) -> TargetOutcome:
    """The outcome of a target that cannot be tuned."""
    return TargetOutcome(
        name=unit.name, result=None, error=str(error), adapter_bytes=0, skipped=False
    )


def _tune(unit: TargetUnit, out: Folder) -> TuneResult:
    factors = load_factors(Folder.at(unit.factors))
    return tune(
        unit.config,
        base=unit.base,
        merged=unit.merged,
        sources=unit.sources,
        factors=factors,
        parameters={m: factors.depth(m) for m in unit.matrices},
        run_folder=Folder.at(unit.folder),
        out=out,
        threads=unit.threads,
        use_ray=False,
        on_progress=_quiet,
    )


def _quiet(name: str, done: int, total: int) -> None:
    """Many targets at once show one bar, of targets."""
    del name, done, total


def _key(unit: TargetUnit) -> str:
    """sha256 of what a target's files depend on: settings, models, and the data files' versions."""
    fields = [
        unit.config.model_dump(
            mode="json", exclude={"use_gpu", "checkpoint_every", "checkpoint_every_s"}
        ),
        unit.base.revision,
        unit.merged.revision,
        [s.revision for s in unit.sources],
        factors_digest(load_factors(Folder.at(unit.factors))),
        unit.threads,
        *(Folder.at(path).versions() for path in (unit.config.train, unit.config.test)),
    ]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _finished(out: Folder, key: str) -> TuneResult | None:
    """What an earlier attempt found with these very inputs, if all it wrote is still there."""
    if out.stat(_FINISHED) is None or out.read(_FINISHED) != key.encode():
        return None
    held = json.loads(out.read(TUNE))
    sizes = out.find()
    if any(sizes.get(name) != claim["size"] for name, claim in held["files"].items()):
        return None
    own = {k: v for k, v in held.items() if k not in ("metadata", "origin", "files")}
    return TuneResult.from_json(json.dumps(own))
