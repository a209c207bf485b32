"""The recipe's `tune` section: adaptation to a target, or to many."""

from typing import Annotated, Any, Literal, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from svdmerge.recipe.sections import Section, explain
from svdmerge.recipe.values import Share


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
                told = "; ".join(explain(fault, TuneConfig, {}) for fault in faults)
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
