"""The gate: whether a merge may take the current release's place."""

import hashlib
import json
import math
from dataclasses import dataclass

from svdmerge.engine.plan import Plan
from svdmerge.engine.runtime import Runtime
from svdmerge.errors import CheckpointError, RecipeError
from svdmerge.progress import Progress
from svdmerge.recipe import GateConfig, Recipe, TuneConfig
from svdmerge.storage.checkpoint import Checkpoint, open_checkpoint
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.releases import Release

CANDIDATE, CURRENT = "this", "current"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether the gate lets a merge pass, why, and what was measured."""

    holds: bool
    why: str
    measures: dict[str, float]


def judge(
    plan: Plan, *, model: str, tuned: str | None, current: Release | None, runtime: Runtime,
    progress: Progress,
) -> Verdict:  # fmt: skip
    """The verdict on a merged model, or on the tuned one where that was written whole.

    Both it and the current release are measured now, on the same examples; what was measured before
    is kept in the store.

    Raises:
        TrainingError: the examples cannot be used, or a model overflows on them.
    """
    gate = plan.recipe.gate
    if gate is None:
        return Verdict(holds=True, why="the recipe has no gate", measures={})
    measured = {CANDIDATE: _whole(model, tuned)}
    if current is not None and (there := _still_there(current)) is not None:
        measured[CURRENT] = there
    # Ray stays outside of what imports this for its types.
    from svdmerge.training.evaluate import EvaluationUnit, evaluate
    from svdmerge.training.fit import backbone_path

    config = examples_of(plan.recipe, gate)
    units = [
        EvaluationUnit(
            name=f"evaluate {checkpoint.reference}",
            # The module, the model's weights again, and one more for activations.
            memory_bytes=12 * sum(ref.numel for ref in plan.base.tensors.values()),
            threads=plan.recipe.resources.threads, config=config, base=plan.base, model=checkpoint,
            cache=plan.store.child(f"rank/{plan.base_key}/gate"),
            search_path=backbone_path(config),
        )
        for checkpoint in measured.values()
    ]  # fmt: skip
    merits = runtime.map(evaluate, units, stage="evaluate", progress=progress)
    return compare(dict(zip(measured, merits, strict=True)), margin=gate.margin)


def compare(measures: dict[str, float], *, margin: float) -> Verdict:
    """The verdict on a merit, the more the better, beside the current release's if there is one."""
    merit, before = measures[CANDIDATE], measures.get(CURRENT)
    if not math.isfinite(merit):
        return Verdict(holds=False, why=f"it measures {merit}", measures=measures)
    if before is None:
        why = f"it measures {merit:.4f}; there is no release to compare it with"
        return Verdict(holds=True, why=why, measures=measures)
    # Not >, which a NaN would pass; a release that measures none is no bar.
    holds = merit >= before - margin or not math.isfinite(before)
    why = f"it measures {merit:.4f}, the current release {before:.4f}, at most {margin:g} worse is "
    return Verdict(holds=holds, why=why + ("allowed" if holds else "allowed: REFUSED"),
                   measures=measures)  # fmt: skip


def examples_of(recipe: Recipe, gate: GateConfig) -> TuneConfig:
    """What models are measured on. Raises: RecipeError, if that is not said."""
    if (examples := gate.examples or recipe.tune) is None:
        raise RecipeError("gate.examples: missing", "", "Name `train` and `test`.")
    return examples


def settings_digest(recipe: Recipe) -> str:
    """Digest of what the gate asks, its examples' versions included."""
    if recipe.gate is None:
        return ""
    examples = examples_of(recipe, recipe.gate)
    fields = [recipe.gate.model_dump(mode="json"), examples.model_dump(mode="json"),
              versions(examples)]  # fmt: skip
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()


def versions(examples: TuneConfig) -> list[object]:
    """Size and version of every file of a target's examples, or of many targets'."""
    every = [examples.of(t) for t in examples.targets] or [examples]
    places = (place for config in every for place in (config.train, config.test))
    return [Folder.at(place).versions() for place in places]


def _whole(model: str, tuned: str | None) -> Checkpoint:
    """The tuned model where `tune.save` had it written whole, else the merged one."""
    if tuned is not None and Folder.at(tuned).stat("config.json") is not None:
        return open_checkpoint(tuned)
    return open_checkpoint(model)


def _still_there(release: Release) -> Checkpoint | None:
    try:
        return _whole(release.model, release.tuned)
    except CheckpointError:
        return None
