"""The recipe: what to merge, how, and where to; validated whole before anything starts."""

import hashlib
import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from svdmerge.core.methods.registry import METHODS
from svdmerge.core.params import Policy
from svdmerge.recipe.release import GateConfig, TickConfig
from svdmerge.recipe.sections import Section, load_mapping, parse_section
from svdmerge.recipe.tune import TuneConfig
from svdmerge.recipe.values import Bytes, Density, ShardSize, Share


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


class HubQuery(Section):
    """Models of the hub that name a base as theirs."""

    base: str | None = None
    """The base's id there; the recipe's own by default."""
    relation: Literal["finetune", "adapter"] = "finetune"
    """What they say that they are of it."""
    author: str | None = None
    """User or organisation; all by default."""
    tags: tuple[str, ...] = ()
    """Of each, all of these."""


class SourceModel(Section):
    """A source: where it lies and how much it counts. Or many, by a pattern or a query."""

    model: str = ""
    """A folder, an fsspec URI or a hub id; [@revision]; [+adapter[@revision]]. Or a pattern (`*`,
    `?`, `[...]`) of paths or URIs: the folders and safetensors files that match now."""
    hub: HubQuery | None = None
    """In place of `model`: what the hub lists now."""
    weight: PositiveFloat = 1.0
    """Scales this source's singular values and its share of the averages alike."""
    quota: Density = 1.0
    """Share of each matrix's slots that it may take: floor(quota * budget + 1e-9), at least 1."""
    admit: bool = False
    """Merge it even if it lies so far from the base that it seems to come from another one."""

    tensors: dict[str, Annotated[tuple[str, ...], BeforeValidator(_listed)]] = Field(default={})
    """Of the base's tensors, where the source cuts or names them otherwise, what to put together
    of the source's, one below the other: names, or rows of them as `name[0:768]`. A star stands
    for the same on both sides."""

    @model_validator(mode="after")
    def _stars_agree(self) -> "SourceModel":
        for name, given in self.tensors.items():
            for text in given:
                if text.count("*") != name.count("*"):
                    raise ValueError(f"tensors: {name}: got {text!r}; expected as many stars")
            if not given:
                raise ValueError(f"tensors: {name}: got nothing; expected tensors of the source")
        return self

    @model_validator(mode="after")
    def _names_something(self) -> "SourceModel":
        if bool(self.model) == (self.hub is not None):
            raise ValueError("model: expected a reference or a pattern, or `hub` in its place")
        return self


def _source(value: object) -> object:
    return {"model": value} if isinstance(value, str) else value


_SourceOrName = Annotated[
    SourceModel, BeforeValidator(_source, json_schema_input_type=str | SourceModel)
]


class Parameters(Section):
    """How components are chosen and combined."""

    k: Share = 0.1
    """Components kept per matrix: a share of its rank, or a count."""
    salience: Literal["sigma", "relative", "denoised", "target"] = "sigma"
    """What ranks components: the singular value, or that over the matrix's Frobenius norm, or the
    singular value in those sources alone that the target's examples ask for."""
    scope: Literal["layer", "global"] = "layer"
    """Where components compete: within each matrix, or for one budget (the sum of all matrices')
    over all of them, of which a matrix takes from none to its rank."""
    scale: PositiveFloat | Literal["auto"] = 1.0
    """Strength of the whole merged difference: lambda of task arithmetic, alpha of Iso-C;
    `auto`: what the target's examples ask for."""
    density: Density | None = None
    """Share of entries that ties, knots, core_space and dare keep; the method's own by default."""
    svd: Literal["adaptive", "exact"] = "adaptive"
    """Solver: a full SVD, or a randomized one of just the needed depth."""


class PolicyRule(Section):
    """What happens to the tensors whose name matches a glob; the first rule that says it counts."""

    match: str
    """A glob of tensor names."""
    policy: Literal["base", "average", "decompose", "error"] | None = None
    """What the merge makes of it: keep the base's, average, decompose, or refuse."""
    missing: Literal["error", "base"] | None = None
    """Where a full source lacks it; `base`: it has no difference there. By default an error."""
    mismatch: Literal["error", "base", "tokens"] | None = None
    """Where a source has it in another shape; `tokens`: rows, along the first axis, are those of
    tokens and matched by them, whatever their numbers. By default an error."""
    extra: Literal["ignore", "error"] | None = None
    """Where only a source has it. By default it is left out."""

    @model_validator(mode="after")
    def _says_something(self) -> "PolicyRule":
        if not (self.policy or self.missing or self.mismatch or self.extra):
            raise ValueError("expected `policy`, `missing`, `mismatch` or `extra`")
        return self

    @model_serializer(mode="wrap")
    def _what_it_says(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value is not None}


class Resources(Section):
    """Threads, device and memory of one task."""

    threads: PositiveInt = 1
    """Of one task. Numbers depend on it in their last bits."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where differences are decomposed: `cuda` takes a GPU of each worker that does."""
    memory: Bytes = 2 << 30
    """Of one task, as 2GiB: what needs more is refused before anything starts."""
    max_matrix: Bytes = 128 << 20
    """Of a difference in float64 that one task may hold: larger matrices are decomposed in blocks
    of rows by several. The default, 4096 x 4096, fits the default memory with its full SVD."""


# Of the examples, where they choose everything: a quarter tells a clear gain from none, and what is
# left still trains.
HELD_OUT = 0.25


class Recipe(Section):
    """A merge, whole."""

    merge_method: Literal[
        "axis", "average", "task_arithmetic", "ties", "dare", "tsv_m", "iso_c", "svc",
        "knots", "core_space",
    ] = "axis"  # fmt: skip
    """How the sources' differences to the base become one."""
    base_model: str = Field(min_length=1)
    """What all sources were fine-tuned from: a folder, an fsspec URI or a hub id; [@revision]."""
    models: Annotated[tuple[_SourceOrName, ...], Field(min_length=1)]
    """The sources: names, or mappings of a name, its weight and its quota."""
    parameters: Parameters = Parameters()
    """How components are chosen and combined; those that the method uses."""
    policies: tuple[PolicyRule, ...] = ()
    """What happens to tensors by name; the first rule that matches wins, before the defaults."""
    store: str = "./svdmerge-store"
    """A folder or fsspec URI of components, selections and run reports."""
    out: str = "./merged"
    """A folder or fsspec URI of the merged model."""
    out_dtype: Literal["base", "float32", "float16", "bfloat16"] = "base"
    """Of the merged model's floating-point tensors."""
    max_shard_size: ShardSize = "base"
    """Of the output's weights files; `base`: as the base's tensors lie together in files."""
    resources: Resources = Resources()
    """What one task may use."""
    tune: TuneConfig | None = None
    """Adapt to a target by training singular values."""
    gate: GateConfig | None = None
    """What a release must not be worse in."""
    tick: TickConfig = TickConfig()
    """How `svdmerge tick` releases."""

    @model_validator(mode="before")
    @classmethod
    def _published_defaults(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """What the method uses and the recipe does not set is as its paper has it."""
        method = METHODS.get(str(raw.get("merge_method", "axis")))
        given = raw.get("parameters", {})
        if method is None or not isinstance(given, dict):
            return raw  # refused in the fields' own words
        published = {"k": method.k, "density": method.density}
        own = {name: published[name] for name in published.keys() & method.parameters}
        return raw | {"parameters": own | given}

    @model_validator(mode="before")
    @classmethod
    def _evidence_chooses_capacity(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """Where the examples choose the merge they also choose whether to tune: a part is held out,
        and training keeps its best epoch, the zeroth included."""
        given, tune = raw.get("parameters"), raw.get("tune")
        if not isinstance(given, dict) or not isinstance(tune, dict):
            return raw
        if given.get("salience") != "target" and given.get("scale") != "auto":
            return raw
        return raw | {"tune": {"validation_share": HELD_OUT} | tune}

    @model_validator(mode="after")
    def _parameters_are_the_methods(self) -> "Recipe":
        used = METHODS[self.merge_method].parameters
        if unused := sorted(self.parameters.model_fields_set - used):
            raise ValueError(
                f"parameters.{unused[0]}: {self.merge_method} does not use it; "
                f"it takes {', '.join(sorted(used))}"
            )
        if "salience" not in used and any(m.quota < 1 for m in self.models):
            raise ValueError(
                f"models: {self.merge_method} takes as much of each source; leave `quota` out"
            )
        if "density" in used and self.parameters.density is None:
            raise ValueError("parameters.density: got nothing; expected a share such as 20%")
        return self

    @model_validator(mode="after")
    def _targets_need_examples(self) -> "Recipe":
        if self.is_targeted and self.tune is None:
            raise ValueError(
                "parameters: `salience: target` and `scale: auto` need the target's examples; "
                "add a `tune` section"
            )
        if self.is_targeted and self.tune is not None and self.tune.targets:
            raise ValueError(
                "parameters: `salience: target` and `scale: auto` merge for one target; "
                "give each a recipe, or leave `tune.targets` out"
            )
        if self.is_targeted and self.merge_method != "axis":
            raise ValueError(
                f"parameters: {self.merge_method} takes no `salience: target` or `scale: auto`; "
                "use axis"
            )
        if self.is_targeted and self.parameters.scope == "global":
            raise ValueError(
                "parameters: `salience: target` and `scale: auto` weigh sources matrix by matrix; "
                "leave `scope: global` out"
            )
        return self

    @model_validator(mode="after")
    def _gate_has_examples(self) -> "Recipe":
        if self.gate is not None:
            examples = self.gate.examples or self.tune
            if examples is None or examples.targets:
                raise ValueError("gate.examples: Field required without `tune` of one target")
        return self

    @property
    def is_targeted(self) -> bool:
        """Whether the merge depends on the target's examples."""
        return self.parameters.salience == "target" or self.parameters.scale == "auto"

    @property
    def rules(self) -> tuple[Policy, ...]:
        """The policies as the core takes them."""
        return tuple(Policy(match=p.match, policy=p.policy) for p in self.policies if p.policy)

    def ruling(self, what: Literal["missing", "mismatch", "extra"], name: str) -> str | None:
        """What the first policy that says so has a tensor be where it is missing, and so on."""
        rules = (p for p in self.policies if getattr(p, what) and fnmatchcase(name, p.match))
        return next((str(getattr(p, what)) for p in rules), None)

    def numeric_digest(self) -> str:
        """sha256 of what the numbers depend on besides the models: not order, places, or layout."""
        skip = {
            "out", "store", "max_shard_size", "tune", "gate", "tick", "models", "base_model",
            "resources",
        }  # fmt: skip
        fields = self.model_dump(mode="json", exclude=skip)
        fields |= {"threads": self.resources.threads, "max_matrix": self.resources.max_matrix}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    def dump(self) -> dict[str, Any]:
        """The recipe as plain values, with every default that its method uses; no secret."""
        unused = Parameters.model_fields.keys() - METHODS[self.merge_method].parameters
        skip: Any = {"parameters": unused, "tick": {"webhook"}}
        if not any(m.hub for m in self.models):
            skip["models"] = {"__all__": {"hub"}}
        return self.model_dump(mode="json", exclude=skip)

    def dump_yaml(self) -> str:
        """The recipe with every default written out."""
        return yaml.safe_dump(self.dump(), sort_keys=False)


def load_recipe(path: str | Path, **given: str) -> Recipe:
    """The recipe in a YAML file; what is given stands for its own.

    Raises:
        RecipeError: the file is missing or no YAML mapping, or a key or value is wrong; every fault
            is named, unknown keys with the nearest known one.
    """
    return parse_recipe(load_mapping(path) | given, origin=str(path))


def parse_recipe(raw: dict[str, Any], *, origin: str = "recipe") -> Recipe:
    """The recipe in a mapping. Raises: RecipeError, as `load_recipe`."""
    return parse_section(Recipe, raw, origin=origin, sections=_SECTIONS)


_SECTIONS: dict[str, type[Section]] = {
    "parameters": Parameters,
    "policies": PolicyRule,
    "models": SourceModel,
    "resources": Resources,
    "tune": TuneConfig,
    "gate": GateConfig,
    "tick": TickConfig,
    "hub": HubQuery,
    "examples": TuneConfig,
}
