"""A merge without tuning, as what an adapter is exported from."""

import yaml

from svdmerge.errors import OutputError
from svdmerge.recipe import Recipe, TuneConfig, parse_recipe
from svdmerge.storage import layout
from svdmerge.storage.checkpoint import Checkpoint, open_checkpoint
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.hf_model import RECIPE, load_factors
from svdmerge.storage.output import Manifest
from svdmerge.training.adapter import Adapted


def open_merged(
    out: Folder,
    manifest: Manifest,
    *,
    model: str | None = None,
    base: str | None = None,
    factors: str | None = None,
) -> Adapted:
    """A run's output with nothing tuned: its base, and the merged factors in its store.

    `model` names the class whose modules the adapter is for, as `tune.model` does.

    Raises:
        SvdmergeError: something is missing, or the base is no longer the one that was merged.
    """
    recipe = read_recipe(out)
    start = open_checkpoint(base or recipe.base_model)
    if base is None and start.revision != manifest.base_revision:
        raise OutputError(
            f"{recipe.base_model}: is not the base that was merged",
            f"Its revision is {start.revision}, that of the merge {manifest.base_revision}.",
            "Run the merge again, or say where that base is with `--base`.",
        )
    run = layout.run_path(manifest.plan_hash)
    place = Folder.at(factors) if factors else Folder.at(recipe.store).child(f"{run}/factors")
    if not place.names():
        raise OutputError(
            f"{place.uri}: holds no merged factors",
            "The adapter is made of them.",
            "Run the merge again, or say where they are with `--factors`.",
        )
    return Adapted(
        base=start,
        merged=open_checkpoint(out.uri),
        factors=load_factors(place),
        config=_config(model or _model_of(recipe, start)),
        changes={},
    )


def read_recipe(out: Folder) -> Recipe:
    """The recipe that an output was made by. Raises: OutputError, if it cannot be read."""
    try:
        raw = yaml.safe_load(out.read(RECIPE))
    except (FileNotFoundError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OutputError(f"{RECIPE} cannot be read ({type(error).__name__})") from None
    return parse_recipe(raw, origin=f"{out.uri}/{RECIPE}")


def _model_of(recipe: Recipe, base: Checkpoint) -> str:
    """The class of the recipe's target, or that the base's configuration names."""
    if recipe.tune is not None:
        return recipe.tune.model
    named: object = base.config.get("architectures")
    if isinstance(named, list) and named and isinstance(named[0], str):
        return f"transformers:{named[0]}"
    return "transformers:AutoModel"


def _config(model: str) -> TuneConfig:
    task = "causal_lm" if model.endswith(("CausalLM", "LMHeadModel")) else "text"
    return TuneConfig(train="-", test="-", model=model, task=task)
