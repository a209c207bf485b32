"""The configuration of `svdmerge kind`; validated whole before anything starts."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from svdmerge.recipe import Section, Share, load_mapping, parse_section

# Of a hierarchy of groups: YAML can make one that has no end.
MOST_LEVELS = 16


def parse_count(value: object) -> object:
    """`2M` -> 2000000, `500k` -> 500000, `1G` -> 1000000000."""
    units = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
    if isinstance(value, str) and value[-1:] in units:
        count = float(value[:-1]) * units[value[-1]]
        if not math.isfinite(count):
            raise ValueError(f"got {value!r}; expected a count such as 2M")
        return int(count)
    return value


def check_groups(value: object, *, place: str = "") -> object:
    """The value, if it is a hierarchy: mappings by name, and lists of labels below them."""
    if place.count("/") > MOST_LEVELS:
        raise ValueError(f"groups: more than {MOST_LEVELS} levels, or one that holds itself")
    if isinstance(value, dict):
        for name, below in cast(dict[object, object], value).items():
            # Levels are joined by /: {a/b: ...} and {a: {b: ...}} would be one group.
            if not isinstance(name, str) or not name or "/" in name:
                raise ValueError(
                    f"{place}: got {name!r} as a group's name; expected text without /"
                )
            check_groups(below, place=f"{place}/{name}")
    elif not isinstance(value, list) or not all(
        isinstance(label, int | str) for label in cast(list[object], value)
    ):
        raise ValueError(f"{place}: got {value!r}; expected a list of labels, or groups below it")
    return cast(object, value)


Groups = Annotated[dict[str, Any], AfterValidator(check_groups), Field(min_length=1)]
Count = Annotated[PositiveInt, BeforeValidator(parse_count)]


class Pace(Section):
    """How a decomposable model is split, and how long and fast it trains."""

    learngenes: Share = 0.5
    """Components that every class uses: a share of each layer's rank, or a count."""
    tailors: Share = 0.5
    """Components of all tailor groups together, split evenly."""
    steps: PositiveInt = 1000
    batch_size: PositiveInt = 32
    learning_rate: PositiveFloat = 1e-3
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    measure_every: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    use_gpu: bool = False
    threads: PositiveInt = 1
    checkpoint_every_s: Annotated[float, Field(ge=0)] = 20.0


class Training(Pace):
    """How a decomposable model is trained, or trained on from its learngenes."""

    task: Literal["text", "image", "tensor"] = "text"
    """What is classified; the superclass of each example has to be known at inference too."""
    base_model: str = Field(min_length=1)
    """The architecture, and the weights of all that is no projection: a folder or fsspec URI."""
    backbone: str = "transformers:AutoModel"
    """A transformers class, or `package.module:callable` that builds a backbone from its config."""
    train: str = Field(min_length=1)
    test: str = Field(min_length=1)
    input: str = "text"
    label: str = "label"
    per_class: PositiveInt | None = None
    max_length: PositiveInt = 128
    start: Literal["random", "svd"] = "random"
    """Where factors start: at random, or the SVD of the base's projections."""
    groups: Groups
    """Tailor group -> its labels, or -> further groups: a hierarchy. A label may be in several."""


class Drawing(Pace):
    """A diffusion transformer that learns to draw images of some classes."""

    train: str = Field(min_length=1)
    """A table of images of one size, in columns `image` (encoded) and `label` (integers)."""
    test: str = ""
    """A table like it whose denoising loss is measured, if there is one."""
    classes: Annotated[dict[str, int], Field(min_length=1)]
    """Name -> label, of those that are learnt."""
    groups: Groups | None = None
    """Tailor group -> its classes, or -> further groups; by default a group for each class."""
    learngenes_of: str | None = None
    """Folder of a trained model whose learngenes are carried over, and stand still."""
    image_size: PositiveInt = 32
    """Pixels of a side."""
    channels: Literal[1, 3] = 3
    patch: PositiveInt = 4
    width: PositiveInt = 64
    depth: PositiveInt = 3
    heads: PositiveInt = 2
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.99
    pictures: str = ""
    """Folder for grids of samples, written every `measure_every` steps; empty writes none."""


class Transfer(Training):
    """New classes or a new domain: learngenes of `model`, fresh tailors."""

    freeze: Literal["carried", "nothing"] = "carried"
    """`carried`: learngenes and all other matrices taken over stand still; tailors, vectors and
    what is new, such as the head, train."""
    out: str = "./kind-transferred"


class Budget(Section):
    """An upper bound, in one unit."""

    parameters: Count | None = None
    """Of the whole model."""
    bytes: Count | None = None
    """Of the whole model's tensors."""
    flops: Count | None = None
    """Of the decomposed layers' products, for each token."""

    @model_validator(mode="after")
    def _one_unit(self) -> "Budget":
        if sum(value is not None for _, value in self) != 1:
            raise ValueError("budget: expected one of parameters, bytes, flops")
        return self


class Recombine(Section):
    """A smaller model for some classes."""

    classes: Annotated[tuple[str, ...], Field(min_length=1)]
    """Classes, or sources of a library, that it is for."""
    budget: Budget | None = None
    """All that the classes need, by default."""
    together: bool = False
    """Of a library: all the sources' tailors at once, averaged, instead of gated by source."""
    out: str = "./kind-recombined"


class KindRecipe(Section):
    """A decomposable model, and what is made of it."""

    model: str = "./kind-model"
    """Folder of the trained model: `train` writes it, the others read it."""
    library: str | None = None
    """A merge recipe: the sources of a library stand in for a trained model."""
    store: str = "./svdmerge-store"
    train: Training | None = None
    draw: Drawing | None = None
    """Trained by `train` into `model`, if there is no `train` section."""
    recombine: Recombine | None = None
    transfer: Transfer | None = None


def load_kind_recipe(path: str | Path) -> KindRecipe:
    """The configuration in a YAML file; a merge recipe stands for the library of its sources.

    Raises:
        RecipeError: as `load_recipe`.
    """
    raw = load_mapping(path)
    if "models" in raw:
        raw = {"library": str(path), "store": raw.get("store", "./svdmerge-store")}
    return parse_kind_recipe(raw, origin=str(path))


def parse_kind_recipe(raw: Mapping[str, Any], *, origin: str = "recipe") -> KindRecipe:
    """The configuration in a mapping. Raises: RecipeError, as `load_kind_recipe`."""
    return parse_section(
        KindRecipe,
        dict(raw),
        origin=origin,
        sections={
            "train": Training,
            "draw": Drawing,
            "transfer": Transfer,
            "recombine": Recombine,
        },
    )
