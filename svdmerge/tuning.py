"""Tuning joined to a run: one target under Ray Train, many as the engine's units of work."""

from typing import Any

from svdmerge.engine.plan import Plan
from svdmerge.engine.runtime import Runtime
from svdmerge.progress import Progress
from svdmerge.training.result import TuneResult
from svdmerge.training.stage import tune_plan
from svdmerge.training.targets import (
    SUMMARY,
    TargetsResult,
    failed_target,
    summary_out,
    target_units,
    tune_target,
)


def tune_recipe(plan: Plan, *, runtime: Runtime, progress: Progress) -> TuneResult | TargetsResult:
    """The outcome of tuning a plan's merged model for its recipe's target, or for each of many.

    Raises:
        SvdmergeError: a single target's tuning failed, or targets' folders cannot be used.
    """
    parts: dict[str, Any] = {
        "base": plan.base,
        "sources": [s.checkpoint for s in plan.sources],
        "matrices": [p.id for p in plan.parameters if p.is_factored],
        "run_folder": plan.run_folder,
    }
    config = plan.recipe.tune
    if config is None or not config.targets:
        use_ray = runtime.address != "none"
        return tune_plan(plan.recipe, **parts, use_ray=use_ray, progress=progress)
    units = target_units(plan.recipe, **parts)
    outcomes = runtime.map(
        tune_target,
        units,
        stage="tune",
        progress=progress,
        failed=failed_target,
        num_gpus=int(any(unit.config.use_gpu for unit in units)),
    )
    result = TargetsResult(targets=tuple(outcomes))
    summary_out(plan.recipe).put(SUMMARY, result.to_json().encode())
    return result
