"""The tune stage of a run: what the recipe and the run's folder hold, given to `tune`."""

import contextlib
from collections.abc import Sequence

from svdmerge.errors import TrainingError
from svdmerge.progress import SILENT, Progress, Stage
from svdmerge.recipe import Recipe
from svdmerge.storage.checkpoint import Checkpoint, open_checkpoint
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.hf_model import load_factors
from svdmerge.training.result import TuneResult
from svdmerge.training.targets import default_out
from svdmerge.training.tune import tune


def tune_plan(
    recipe: Recipe,
    *,
    base: Checkpoint,
    sources: Sequence[Checkpoint],
    matrices: Sequence[str],
    run_folder: Folder,
    use_ray: bool,
    progress: Progress = SILENT,
) -> TuneResult:
    """The outcome of tuning a run's merged model as its recipe says.

    Raises:
        TrainingError: the recipe has no `tune` section, or as `tune` raises.
    """
    if recipe.tune is None:
        raise TrainingError(
            "the recipe has no `tune` section", "", "Add one, with `train` and `test`."
        )
    factors = load_factors(run_folder.child("factors"))
    with _Bars(progress) as bars:
        return tune(
            recipe.tune,
            base=base,
            merged=open_checkpoint(recipe.out),
            sources=sources,
            factors=factors,
            parameters={m: factors.depth(m) for m in matrices},
            run_folder=run_folder,
            out=Folder.at(recipe.tune.out or default_out(recipe)),
            threads=recipe.resources.threads,
            use_ray=use_ray,
            on_progress=bars.show,
        )


class _Bars(contextlib.ExitStack):
    """Steps counted by (name, done, total), shown one after another."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress
        self._name, self._done = "", 0
        self._bar: Stage | None = None

    def show(self, name: str, done: int, total: int) -> None:
        """Count a step up to `done`."""
        if name != self._name or self._bar is None:
            self.close()
            self._name, self._done = name, 0
            self._bar = self.enter_context(self._progress.stage(name, total))
        self._bar.advance(done - self._done)
        self._done = done
