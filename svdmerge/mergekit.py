"""mergekit's recipes as ours: what is equal is taken over, what is not is said.

Reference: mergekit's configuration as its documentation describes it (merge methods and their
parameters; https://github.com/arcee-ai/mergekit).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from svdmerge.errors import RecipeError
from svdmerge.recipe import parse_recipe

# Theirs to ours.
METHODS = {
    "linear": "average",
    "task_arithmetic": "task_arithmetic",
    "ties": "ties",
    "dare_linear": "dare",
}
_OF_METHOD = {
    "linear": {"weight", "normalize"},
    "task_arithmetic": {"weight", "normalize", "lambda"},
    "ties": {"weight", "normalize", "lambda", "density"},
    "dare_linear": {"weight", "normalize", "lambda", "density", "rescale"},
}
_OF_SOURCE = {"weight", "density"}
_NUMBERS = {"weight", "density", "lambda"}
# Settings of how mergekit computes, which change no result of ours.
_SILENT = {"int8_mask", "name", "parameters", "models", "merge_method", "base_model", "out_dtype"}
_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """A recipe of ours, and what of theirs it does not say, a line each."""

    recipe: Mapping[str, Any]
    unexpressed: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return {"recipe": dict(self.recipe), "unexpressed": list(self.unexpressed)}

    def to_yaml(self) -> str:
        """The recipe, with what it does not say as comments."""
        # A key of theirs may hold line ends.
        notes = "".join(f"# not expressed: {' '.join(x.split())}\n" for x in self.unexpressed)
        return notes + yaml.safe_dump(dict(self.recipe), sort_keys=False)


def import_mergekit(path: str | Path, *, base: str | None = None) -> Imported:
    """The recipe in a mergekit file. `base` is for methods that name none there, such as linear.

    Raises:
        RecipeError: it is no mergekit recipe, or its result cannot be had from ours at all.
    """
    given = _load(path)
    method, base = given["merge_method"], base or given.get("base_model")
    if not isinstance(base, str):
        raise RecipeError(
            f"{path}: names no base_model",
            "svdmerge merges differences to a base; a linear merge is the same for any.",
            "Give --base.",
        )
    models = _models(str(path), given, base=base)
    shared = _parameters(str(path), "parameters", given.get("parameters"))
    notes = list(_unexpressed(given, method, models, shared))
    recipe: dict[str, Any] = {"merge_method": METHODS[method], "base_model": base}
    recipe["models"] = [
        {"model": name, "weight": w} if w != 1.0 else name
        for name, w in _weights(str(path), method, models, shared, base=base).items()
    ]
    parameters: dict[str, Any] = {}
    if "density" in _OF_METHOD[method]:
        parameters["density"] = _density(str(path), models, shared)
    if (strength := shared.get("lambda", 1.0)) != 1.0:
        parameters["scale"] = float(strength)
    if parameters:
        recipe["parameters"] = parameters
    dtype = given.get("out_dtype") or given.get("dtype")
    if dtype in _DTYPES:
        recipe["out_dtype"] = dtype
    parse_recipe(recipe, origin=str(path))  # a weight of zero or less, for one, is refused here
    return Imported(recipe=recipe, unexpressed=tuple(notes))


def _load(path: str | Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: cannot be read", str(error), "Check the path.") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("merge_method"), str):
        raise RecipeError(f"{path}: names no merge_method", "A mergekit recipe has one.")
    given = cast(dict[str, Any], raw)
    if given["merge_method"] not in METHODS:
        raise RecipeError(
            f"{path}: {given['merge_method']} cannot be expressed",
            f"Of mergekit's methods svdmerge has {', '.join(METHODS)}.",
            "Write a recipe for one of svdmerge's own methods, such as axis.",
        )
    if "slices" in given or not isinstance(given.get("models"), list):
        raise RecipeError(
            f"{path}: merges slices of layers",
            "svdmerge merges whole models of one base.",
            "List `models`.",
        )
    return given


def _models(place: str, given: Mapping[str, Any], *, base: str) -> dict[str, dict[str, Any]]:
    """Each source's own parameters; the base among them has no difference to merge."""
    found: dict[str, dict[str, Any]] = {}
    for item in given["models"]:
        entry = cast(dict[str, Any], item) if isinstance(item, dict) else {"model": item}
        name = entry.get("model")
        if not isinstance(name, str):
            raise RecipeError(f"{place}: models: {item!r} names no model")
        if name in found:
            raise RecipeError(
                f"{place}: models: lists {name} twice",
                "A source has one weight in svdmerge.",
                "List it once; in a sum, with both weights together.",
            )
        found[name] = _parameters(place, name, entry.get("parameters"))
    if not set(found) - {base}:
        raise RecipeError(f"{place}: models: lists no source besides the base")
    return found


def _parameters(place: str, name: str, value: object) -> dict[str, Any]:
    """Parameters of a source, or of all. Raises: RecipeError, where a number is none."""
    found = cast(dict[str, Any], value) if isinstance(value, dict) else {}
    for key, given in found.items():
        if isinstance(given, list | dict):
            raise RecipeError(
                f"{place}: {name}: {key} differs by layer",
                "A source has one weight and one density in svdmerge.",
                "Give a number.",
            )
        if key in _NUMBERS and (isinstance(given, bool) or not isinstance(given, int | float)):
            raise RecipeError(f"{place}: {name}: {key} is {given!r}", "", "Give a number.")
    return found


def _weights(
    place: str,
    method: str,
    models: Mapping[str, Mapping[str, Any]],
    shared: Mapping[str, Any],
    *,
    base: str,
) -> dict[str, float]:
    """Ours, source by source.

    A linear merge and TIES divide by the sum of weights, ours by the number of sources: of TIES,
    those that agree. The base, of no difference, still counts in a linear merge's sum.

    Raises:
        RecipeError: a linear merge of weights that do not add up to one, or add up to nothing.
    """
    given = {n: float(p.get("weight", shared.get("weight", 1.0))) for n, p in models.items()}
    sources = {n: w for n, w in given.items() if n != base}
    normalize = shared.get("normalize", True)
    if method not in ("linear", "ties") or (method == "ties" and not normalize):
        return sources
    total = sum(given.values() if method == "linear" else sources.values())
    if not normalize and not math.isclose(total, 1.0):
        raise RecipeError(
            f"{place}: weights add up to {total:g}, and normalize is off",
            "That scales the base too; svdmerge adds differences to it as it is.",
            "Leave `normalize` out, or let weights add up to 1.",
        )
    if not total:
        raise RecipeError(
            f"{place}: weights add up to 0", f"{method} divides by their sum.", "Correct them."
        )
    return {n: w * len(sources) / total for n, w in sources.items()}


def _density(
    place: str, models: Mapping[str, Mapping[str, Any]], shared: Mapping[str, Any]
) -> float:
    found = {float(p.get("density", shared.get("density", 1.0))) for p in models.values()}
    if len(found) > 1:
        raise RecipeError(
            f"{place}: sources have densities of {', '.join(map(str, sorted(found)))}",
            "svdmerge keeps the same share of every source's entries.",
            "Give one density.",
        )
    return found.pop()


def _unexpressed(
    given: Mapping[str, Any],
    method: str,
    models: Mapping[str, Mapping[str, Any]],
    shared: Mapping[str, Any],
) -> Iterator[str]:
    known = _OF_METHOD[method]
    for name, parameters in [("parameters", shared), *models.items()]:
        for key in parameters:
            if key not in (known if parameters is shared else known & _OF_SOURCE) | _SILENT:
                yield f"{name}: {key}"
    if method in ("task_arithmetic", "dare_linear") and shared.get("normalize"):
        yield "parameters: normalize: sums are not divided by the weights' sum"
    if method == "dare_linear" and not shared.get("rescale", True):
        yield "parameters: rescale: entries that are kept are rescaled"
    weights = {float(p.get("weight", shared.get("weight", 1.0))) for p in models.values()}
    if method == "ties" and (len(weights) > 1 or not shared.get("normalize", True)):
        yield "weights of ties: means are over the sources that agree, each counting one"
    yield "embeddings and heads: stay the base's; give them a policy to merge them too"
    if given.get("tokenizer_source", "base") != "base" or "tokenizer" in given:
        yield "tokenizer_source: the base's tokenizer and embeddings are kept"
    if given.get("dtype") is not None:
        yield "dtype: computed in float32 or better, whatever it says; taken as out_dtype"
    dtype = given.get("out_dtype") or given.get("dtype")
    if dtype is not None and dtype not in _DTYPES:
        yield f"out_dtype: {dtype} is none of {', '.join(_DTYPES)}; the base's is kept"
    for key in given:
        if key not in _SILENT | {"dtype", "tokenizer_source", "tokenizer"}:
            yield key
