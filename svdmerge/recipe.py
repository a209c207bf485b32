"""The recipe: what to merge, how, and where to; validated whole before anything starts."""

import contextlib
import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from svdmerge.core.methods.registry import METHODS
from svdmerge.core.params import Policy
from svdmerge.errors import RecipeError

_UNITS = (
    {"": 1, "B": 1}
    | {f"{p}iB": 1 << (10 * i) for i, p in enumerate("KMGT", start=1)}
    | {f"{p}B": 10 ** (3 * i) for i, p in enumerate("KMGT", start=1)}
)


def parse_share(value: object) -> int | float:
    """`10%` -> 0.1, `0.1` -> 0.1, `38` -> 38: a share of the rank is a float, a count an int."""
    if isinstance(value, str) and (match := re.fullmatch(r"\s*([-+0-9.eE]+)\s*(%?)\s*", value)):
        text, percent = match.groups()
        with contextlib.suppress(ValueError):
            value = float(text) / 100 if percent else float(text) if "." in text else int(text)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"got {value!r}; expected a share such as 10% or a number such as 38")
    if isinstance(value, float) and not 0 < value <= 1:
        raise ValueError(f"got {value:.6g} as a share; expected more than 0 % and at most 100 %")
    if value <= 0:
        raise ValueError(f"got {value}; expected at least 1")
    return value


def parse_bytes(value: object) -> int:
    """`2GiB` -> 2147483648."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?i?B?)\s*", str(value))
    if not match or match[2] not in _UNITS or (size := int(float(match[1]) * _UNITS[match[2]])) < 1:
        raise ValueError(f"got {value!r}; expected a size such as 2GiB or 500MB")
    return size


def parse_shard_size(value: object) -> int | str:
    """`5GB` -> 5000000000, `base` as it is."""
    return "base" if value == "base" else parse_bytes(value)


def parse_density(value: object) -> float:
    """`20%` -> 0.2, `0.2` -> 0.2, `1` -> 1.0: a share, of entries."""
    share = parse_share(value)
    if share > 1:
        raise ValueError(f"got {value!r}; expected a share such as 20% or 0.2")
    return float(share)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRows:
    """Rows first..stop-1 of a tensor, all from `first` on where `stop` is None."""

    tensor: str
    first: int = 0
    stop: int | None = None


def parse_rows(text: str) -> TensorRows:
    """`a.weight[0:768]` -> those rows of a.weight; `a.weight` -> all of them."""
    found = re.fullmatch(r"(.+)\[(\d*):(\d*)\]", text)
    if not found:
        return TensorRows(tensor=text)
    name, first, stop = found.groups()
    return TensorRows(tensor=name, first=int(first or 0), stop=int(stop) if stop else None)


# What may be written, for the schema that editors read.
_Percent = Annotated[str, Field(pattern=r"^\s*[-+0-9.eE]+\s*%?\s*$")]
_Size = Annotated[str, Field(pattern=r"^\s*[0-9.]+\s*([KMGT]i?)?B?\s*$")]
Density = Annotated[float, BeforeValidator(parse_density, json_schema_input_type=float | _Percent)]
Share = Annotated[
    int | float, BeforeValidator(parse_share, json_schema_input_type=int | float | _Percent)
]
Bytes = Annotated[int, BeforeValidator(parse_bytes, json_schema_input_type=PositiveInt | _Size)]
ShardSize = Annotated[
    int | Literal["base"],
    BeforeValidator(parse_shard_size, json_schema_input_type=PositiveInt | _Size | Literal["base"]),
]


class Section(BaseModel):
    """A part of the recipe: unknown keys are errors, values are frozen."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


class HubQuery(Section):
    """Models of the hub that name a base as theirs."""

    base: str | None = None
    """The base's id there; the recipe's own by default."""
    relation: Literal["finetune", "adapter"] = "finetune"
    """How their cards say that they come from it."""
    author: str | None = None
    """Whose; anybody's by default."""
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

    tensors: dict[str, Annotated[tuple[str, ...], BeforeValidator(_listed)]] = {}
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


class Target(BaseModel):
    """One of many targets: its name, and the keys of `tune` that differ for it."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")]
    """Of its folder too."""


def _target(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


def _unique(targets: tuple[Target, ...]) -> tuple[Target, ...]:
    names = [target.name for target in targets]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{twice[0]}: two targets have this name")
    return targets


_TargetOrName = Annotated[Target, BeforeValidator(_target, json_schema_input_type=str | Target)]
_UNIQUE = AfterValidator(_unique)


class TuneConfig(Section):
    """Training of singular values for one target, or for many that share settings."""

    task: Literal["text", "image", "tensor", "causal_lm"] = "text"
    """`text`, `image`: classes told from mean features of tokens or patches; `tensor`: the same of
    columns that go in as they are; `causal_lm`: next tokens, no head, judged in nats per token."""
    model: str = "transformers:AutoModel"
    """A transformers class, or `package.module:callable` that builds a backbone from its config.

    Its module takes the inputs (pixels, a tensor, or a mapping of token columns) and returns
    features (b, d); for language it takes `input_ids` and `attention_mask` by name and returns
    scores of each next token, (b, t, vocabulary) or with a field `logits`.
    By default the headless model of the base's config, and `AutoModelForCausalLM` for language."""
    loss: str = "cross_entropy"
    """Of a classifier: cross-entropy, or `package.module:callable`, (scores, labels) -> (b,)."""
    train: str = ""
    """Training examples: parquet, JSON lines, a folder of such files, or one folder per class of
    images (in the order of their names)."""
    test: str = ""
    """Examples that the result is measured on; never trained or selected on."""
    dataset: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None = None
    """The hub's dataset that `test` is of, as org/name: the result is written to `.eval_results`
    for it. By default that of an hf://datasets URI."""
    dataset_task: str = "default"
    """Which of that dataset's tasks."""
    input: str = "text"
    """Column of the inputs. Of images: encoded bytes, {bytes, path}, or paths beside the file."""
    label: str = "label"
    """Column of the integer labels, 0 to classes - 1; language modelling needs none."""
    per_class: PositiveInt | None = None
    """Few-shot: examples drawn per class (of language: in all); all of them by default."""
    validation_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Part of the training examples, of each class alike, held out to end training early."""
    patience: PositiveInt = 5
    """Epochs without a better held-out loss before training ends; the best epoch's values stay."""
    max_length: PositiveInt = 128
    """Tokens of a text; what is longer is cut, and that is told."""
    num_values: Share = 0.1
    """Singular values trained per matrix: a share of its rank, or a count."""
    null_space: bool = False
    """Train more values than there are merged components, on seeded null-space directions."""
    epochs: PositiveInt = 10
    """Passes over the training examples, at most."""
    batch_size: PositiveInt = 32
    """Examples per step, over all workers."""
    accumulate: PositiveInt = 1
    """Parts that a worker computes its share of a step in: less memory, the same step."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the frozen model's arithmetic in training (autocast; meant for GPUs that have it).
    Trained values, head, losses and every measurement stay float32."""
    learning_rate: PositiveFloat = 0.1
    """Of the singular values (AdamW, cosine)."""
    head_learning_rate: Annotated[float, Field(ge=0)] = 0.01
    """Of the linear head; 0 freezes it where it starts, as AXIS was published with a frozen one."""
    seed: int = 0
    """Of the draw and of the order of examples."""
    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Training processes (gloo on CPU, NCCL where each gets a GPU), or [least, most]: elastic."""
    shard: bool = False
    """Share the frozen weights out over the training processes (FSDP), for a base larger than one
    device; the numbers stay. Costs two gatherings of every block a step, over the network between
    nodes. Each process still reads the whole model into its own memory once, and the driver
    measures features on its CPU."""
    use_gpu: bool = False
    """Train on a GPU of each worker."""
    checkpoint_every: PositiveInt = 1
    """Epochs between checkpoints, at least."""
    checkpoint_every_s: Annotated[float, Field(ge=0)] = 20.0
    """Seconds between checkpoints, at least; a commit of Ray Train takes about two."""
    out: str | None = None
    """Folder of the adapted model; `<out>-tuned` by default. Of many targets, a folder for each."""
    save: Annotated[tuple[Literal["adapter", "model", "peft"], ...] | None, Field(min_length=1)] = (
        None
    )
    """What is written beside head and `tune.json`: the adapter (changes of singular values), the
    full model, a PEFT LoRA adapter. Default: adapter and model; of many targets, adapters alone."""
    targets: Annotated[tuple[_TargetOrName, ...], _UNIQUE] = ()
    """Many targets that share this section: names, or mappings of a name and what differs.

    `{name}` in `train`, `test` and `out` becomes the target's name.
    """

    @model_validator(mode="after")
    def _targets_are_whole(self) -> "TuneConfig":
        if not self.targets and (missing := [k for k in ("train", "test") if not getattr(self, k)]):
            raise ValueError(f"{missing[0]}: Field required")
        for target in self.targets:
            try:
                config = self.of(target)
            except ValidationError as error:
                faults: list[Any] = [f | {"loc": ("tune", *f["loc"])} for f in error.errors()]
                told = "; ".join(_explain(fault) for fault in faults)
                raise ValueError(f"targets: {target.name}: {told}") from None
            if config.num_workers != 1:
                raise ValueError(f"targets: {target.name}: each is tuned in one process")
        return self

    @property
    def saved(self) -> tuple[str, ...]:
        """What is written, by default too."""
        return self.save or ("adapter", "model")

    def of(self, target: Target) -> "TuneConfig":
        """This section as it holds for one of its targets. Raises: ValidationError."""
        own = dict(target.model_extra or {})
        shared = self.model_dump(
            mode="json", exclude={"targets"}, exclude_unset=True, exclude_none=True
        )
        fields = {"save": ["adapter"]} | shared | own
        if "out" not in own and self.out is not None and "{name}" not in self.out:
            fields["out"] = f"{self.out.rstrip('/')}/{target.name}"
        places = {k: v for k in ("train", "test", "out") if isinstance(v := fields.get(k), str)}
        filled = {key: place.replace("{name}", target.name) for key, place in places.items()}
        return TuneConfig.model_validate(fields | filled)

    @model_validator(mode="before")
    @classmethod
    def _model_of_the_task(cls, raw: Any) -> Any:
        """The default `model` that the task needs, written out."""
        if isinstance(raw, dict) and cast(dict[str, Any], raw).get("task") == "causal_lm":
            return {"model": "transformers:AutoModelForCausalLM"} | cast(dict[str, Any], raw)
        return cast(object, raw)

    @model_validator(mode="after")
    def _fits_together(self) -> "TuneConfig":
        if isinstance(self.num_workers, tuple) and self.num_workers[0] > self.num_workers[1]:
            raise ValueError(f"num_workers: got {list(self.num_workers)}; expected [least, most]")
        most = self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]
        if self.shard and most < 2:
            raise ValueError("shard: one process has nobody to share with; raise num_workers")
        if self.loss != "cross_entropy" and self.task == "causal_lm":
            raise ValueError("loss: a language model trains on its next tokens; leave it out")
        return self


class GateConfig(Section):
    """What a merge must hold to become the current release."""

    margin: Annotated[float, Field(ge=0)] = 0.01
    """How much worse than the current release's its measure may be: a share of the examples told
    right, or nats per token."""
    examples: TuneConfig | None = None
    """What it is measured on, as in `tune`, whose examples are the default."""


def _webhook(value: str) -> str:
    # Not told: an address of this kind is a secret.
    if not re.match(r"https?://[^/]|\$\w+$", value):
        raise ValueError("expected an http(s) URL, or $NAME of an environment variable")
    return value


class TickConfig(Section):
    """Re-merging as sources appear, change and go."""

    unfit: Literal["stop", "skip"] = "stop"
    """Where a source cannot be used: no release, or one without it; it is told either way."""
    keep: Annotated[int, Field(ge=2)] = 10
    """Last releases whose models are kept."""
    releases: str | None = None
    """Folder of the release records; `releases` in the store by default."""
    webhook: Annotated[str, AfterValidator(_webhook)] | None = None
    """Where releases, refusals and failures are posted as JSON; $NAME is read from the environment.
    """


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


def load_mapping(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises: RecipeError, if it cannot be read or is none."""
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        why = error.strerror or str(error)
        raise RecipeError(f"{path}: cannot be read ({why})", "", "Check the path.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: not valid YAML", str(error), "Correct the file.") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: holds {type(raw).__name__}", "A recipe is a mapping of keys.")
    return cast(dict[str, Any], raw)


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
AnySection = TypeVar("AnySection", bound=Section)


def parse_section(
    kind: type[AnySection],
    raw: dict[str, Any],
    *,
    origin: str,
    sections: Mapping[str, type[Section]],
) -> AnySection:
    """A mapping validated; `sections` tells which keys are known below each of its own.

    Raises:
        RecipeError: every fault is named, unknown keys with the nearest known one.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        faults = [_explain(fault, kind, sections) for fault in error.errors()]
        raise RecipeError(f"{origin}: {faults[0]}", *["; ".join(faults[1:])]) from None


def _explain(
    fault: Any, kind: type[Section] = Recipe, sections: Mapping[str, type[Section]] = _SECTIONS
) -> str:
    place = ".".join(str(part) for part in fault["loc"] if not str(part).startswith("function-"))
    if fault["type"] != "extra_forbidden":
        text = fault["msg"].removeprefix("Value error, ")
        return f"{place}: {text}" if place else text
    loc, key = fault["loc"][:-1], str(fault["loc"][-1])
    named = [sections[str(part)] for part in loc if str(part) in sections]
    section = list((named[-1] if named else kind).model_fields)
    near = difflib.get_close_matches(key, section, n=1)
    known = f"the nearest is `{near[0]}`" if near else f"known keys: {', '.join(sorted(section))}"
    return f"{place}: unknown key; {known}"
