"""The plan: what happens to every tensor, from headers alone. No weight is read."""

import hashlib
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version

from svdmerge.core.methods.registry import METHODS, Method, Takes
from svdmerge.core.params import Action, Parameter, action_of, budget, matrices
from svdmerge.engine.fitting import Unlike, fit
from svdmerge.engine.memory import by_rows_bytes
from svdmerge.engine.resolve import resolved
from svdmerge.errors import (
    MismatchError,
    RecipeError,
    ResourceError,
    RetryableError,
    SvdmergeError,
)
from svdmerge.recipe import Recipe, SourceModel, TuneConfig
from svdmerge.storage import layout
from svdmerge.storage.checkpoint import (
    FLOATING,
    ITEM_BYTES,
    TILE,
    TORCH_NAMES,
    Checkpoint,
    TensorRef,
    open_checkpoint,
)
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.layout import BLOCK
from svdmerge.storage.quantised import FP8

# Source bytes of one unit of work: a few seconds of SVD, and small matrices travel together.
UNIT_BYTES = 32 << 20
# On a GPU: matrices of one shape are decomposed together there, few and large products.
GPU_UNIT_BYTES = 512 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A source model of the plan."""

    reference: str
    weight: float
    quota: float
    """Share of each matrix's slots that it may take."""
    admit: bool
    """Whether it is merged however far from the base it lies."""
    checkpoint: Checkpoint
    unlike: Mapping[str, Unlike]
    """Tensors that are not just the base's with other values."""

    def reads_weights(self, parameter: Parameter) -> bool:
        """Whether its difference is that of stored weights; else there is none, or its factors
        are all that is known of it."""
        decomposed = parameter.action is Action.DECOMPOSE
        return not decomposed or parameter.tensor in self.checkpoint.tensors

    @property
    def revision(self) -> str:
        """Digest of the immutable revision: the source's name in the store."""
        return self.checkpoint.revision


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A merge, resolved to revisions and matrices. Sources are in order of revision."""

    recipe: Recipe
    base: Checkpoint
    sources: tuple[Source, ...]
    actions: Mapping[str, Action]
    parameters: tuple[Parameter, ...]
    """Every matrix that is read from sources."""
    groups: tuple[tuple[Parameter, ...], ...]
    """The matrices again, as they travel together."""
    hash: str
    averaged_over: int
    """Sources that an average is taken over: all, but 1 where weights add up to 1 already."""

    @property
    def store(self) -> Folder:
        """The component store."""
        return Folder.at(self.recipe.store)

    @property
    def run_folder(self) -> Folder:
        """Where this run's selection, factors and reports lie in the store."""
        return self.store.child(layout.run_path(self.hash))

    @property
    def base_key(self) -> str:
        """The base's revision with the settings that stored numbers depend on."""
        return layout.base_key(self.base.revision, solver=self.recipe.parameters.svd)

    @property
    def scale(self) -> float:
        """Strength of the merged difference; 1 until the examples have chosen it."""
        scale = self.recipe.parameters.scale
        return 1.0 if scale == "auto" else scale

    @property
    def salience(self) -> str:
        """What ranks components: a target's examples weigh whole sources, by weight."""
        salience = self.recipe.parameters.salience
        return "sigma" if salience == "target" else salience

    @property
    def method(self) -> Method:
        """What the recipe's merge method takes of its sources."""
        return METHODS[self.recipe.merge_method]

    def budget(self, parameter: Parameter) -> int:
        """Components of a matrix that the recipe's k stands for."""
        return budget(self.recipe.parameters.k, rank=parameter.rank)

    def of_each(self, parameter: Parameter) -> int:
        """The most components that one source can give."""
        return self.method.of_each(self.budget(parameter), num_sources=len(self.sources))

    def depth(self, parameter: Parameter) -> int:
        """The most components stored of each source: what it can give, in whole blocks."""
        return in_blocks(self.of_each(parameter), parameter)

    def depth_for(self, parameter: Parameter, wanted: int) -> int:
        """The same where so many are wanted: more only where matrices compete."""
        return max(self.depth(parameter), in_blocks(wanted, parameter))

    def deepest(self, parameter: Parameter) -> int:
        """The most components that can ever be stored of a source for this recipe."""
        return parameter.rank if self.is_global else self.depth(parameter)

    @property
    def is_global(self) -> bool:
        """Whether all matrices compete for one budget: one keeps anything from 0 to its rank."""
        return self.recipe.parameters.scope == "global"

    def block_rows(self, parameter: Parameter) -> int | None:
        """Rows of a block, where a matrix is decomposed in blocks of rows because no task may hold
        it; by its shape alone. The exact solver has to hold it."""
        entries = self.recipe.resources.max_matrix // 8
        held = parameter.action is not Action.DECOMPOSE or parameter.numel <= entries
        if held or self.recipe.parameters.svd == "exact":
            return None
        num_blocks = -(-parameter.m // max(1, entries // parameter.n))
        return -(-parameter.m // num_blocks)  # all about as high, for the last one is waited for

    @property
    def is_shared(self) -> bool:
        """Whether sources compete for a budget, so that few of each may do."""
        return self.method.takes is Takes.POOLED and not self.recipe.is_targeted

    def num_given(self, parameter: Parameter) -> int:
        """The most components that all sources together give."""
        if self.is_global:
            return parameter.rank
        pooled = self.method.takes is Takes.POOLED
        return self.of_each(parameter) * (1 if pooled else len(self.sources))

    def merged_depth(self, parameter: Parameter) -> int:
        """The most components that the merged difference can have."""
        if parameter.action is Action.DECOMPOSE:
            return min(self.num_given(parameter), parameter.rank)
        return min(parameter.m, parameter.n) if parameter.is_factored else 1


def in_blocks(depth: int, parameter: Parameter) -> int:
    """So many components of a matrix, in whole blocks."""
    return min(parameter.rank, -(-depth // BLOCK) * BLOCK)


Refused = Callable[[str, SvdmergeError], None]


def make_plan(recipe: Recipe, *, refused: Refused | None = None) -> Plan:
    """The plan of a recipe, its patterns and queries resolved to what they stand for now.

    With `refused`, sources that cannot be used are given to it, with the error, and left out; but
    not all of them.

    Raises:
        RecipeError: a model is listed twice, or a policy refuses a tensor.
        CheckpointError: a model's files or headers are wrong.
        MismatchError: a source lacks a tensor of the base, or has it in another shape, and no
            policy allows that.
        ResourceError: a matrix needs more memory than the recipe gives a task.
    """
    recipe = resolved(recipe)
    base = open_checkpoint(recipe.base_model)
    actions = {name: _action(recipe, base, ref) for name, ref in base.tensors.items()}
    found = _sources(recipe, base=base, actions=actions, refused=refused)
    recipe = recipe.model_copy(update={"models": tuple(model for model, _ in found.values())})
    sources = tuple(found[revision][1] for revision in sorted(found))
    parameters = tuple(
        p
        for name, ref in base.tensors.items()
        if actions[name] is not Action.BASE
        for p in matrices(name, shape=ref.shape, action=actions[name])
    )
    _refuse_same_ids(parameters)
    plan = Plan(
        recipe=recipe,
        base=base,
        sources=sources,
        actions=actions,
        parameters=parameters,
        groups=(),
        hash=_hash(recipe, base=base, sources=sources, actions=actions),
        averaged_over=len(sources),
    )
    plan = replace(plan, groups=tuple(_grouped(plan)))
    _check_memory(plan)
    return plan


def decompose_bytes(parameter: Parameter, *, depth: int) -> int:
    """Peak memory of decomposing one matrix, in bytes.

    Base and source as read and decoded, their difference, what is left of it without known
    components, before and after, and LAPACK's copy of that (float64), both sets of vectors and
    again as they are sorted, divide and conquer's workspace of about 4 r^2, and what is stored.
    """
    m, n = parameter.m, parameter.n
    read = 32 * m * n
    if parameter.action is not Action.DECOMPOSE:
        return read + 8 * m * n
    sorting = 8 * parameter.rank * (m + n)
    return read + 24 * m * n + _svd_bytes(m, n) + sorting + stored_bytes(parameter, depth=depth)


def _svd_bytes(m: int, n: int) -> int:
    r = min(m, n)
    return 8 * r * (m + n) + 32 * r * r


def stored_bytes(parameter: Parameter, *, depth: int) -> int:
    """Bytes of a matrix's stored components (float32), or of its whole difference."""
    if parameter.action is not Action.DECOMPOSE:
        return 4 * (parameter.numel + 2)
    return 4 * depth * (parameter.m + parameter.n + 1)


def merge_bytes(plan: Plan, parameters: Sequence[Parameter]) -> int:
    """Peak memory of merging matrices in one unit: one beside what the others have become, then all
    of them and what is stored, encoded twice on its way."""
    merged = {p.id: 8 * plan.merged_depth(p) * (p.m + p.n) for p in parameters}
    total = sum(merged.values())
    return max(2 * total, *(_merge_bytes(plan, p) + total - merged[p.id] for p in parameters))


def _merge_bytes(plan: Plan, parameter: Parameter) -> int:
    m, n = parameter.m, parameter.n
    if parameter.action is not Action.DECOMPOSE:
        # A difference as read, in float64, its magnitudes sorted and trimmed, signs, sum, counts.
        return 96 * m * n + (_svd_bytes(m, n) if parameter.is_factored else 0)
    # Factors in float32 and float64, their Q, and the core, or the sources in a common basis.
    k, shared = plan.num_given(parameter), plan.method.takes is Takes.EACH
    core = plan.merged_depth(parameter) * (max(k, m + n) if shared else k)
    return 32 * k * (m + n) + 64 * core


def unit_bytes(plan: Plan, parameters: Sequence[Parameter]) -> int:
    """Peak memory of a unit: its largest matrix, and twice what it stores (once encoded)."""
    if (rows := plan.block_rows(parameters[0])) is not None:
        return by_rows_bytes(parameters[0], depth=plan.deepest(parameters[0]), block_rows=rows)
    stored = sum(stored_bytes(p, depth=plan.deepest(p)) for p in parameters)
    peak = max(decompose_bytes(p, depth=plan.deepest(p)) for p in parameters)
    if plan.recipe.resources.device != "cpu":
        # Read together: both tensors as they are, and decoded.
        peak += 4 * sum(_base_bytes(plan, p) for p in parameters)
    return peak + 2 * stored


def peak_bytes(plan: Plan, parameters: Sequence[Parameter]) -> int:
    """Peak memory of decomposing or merging matrices that travel together."""
    return max(unit_bytes(plan, parameters), merge_bytes(plan, parameters))


def write_bytes(plan: Plan) -> dict[str, int]:
    """Peak memory of writing each tensor of the output, by name.

    What is copied is only read. Else a tile's entries are held as read, decoded and in float64,
    then cast (24 bytes at most), with their part of the difference in float64, and one matrix's
    factors as stored, put together and in float64.
    """
    factors: dict[str, int] = {}
    for p in plan.parameters:
        if p.action is not Action.EQUAL:
            need = 16 * plan.merged_depth(p) * (p.m + p.n)
            factors[p.tensor] = max(need, factors.get(p.tensor, 0))
    return {
        name: 32 * min(ref.numel, TILE) + factors[name]
        if name in factors
        else (24 if _is_cast(ref, plan.recipe.out_dtype) else ITEM_BYTES[ref.dtype])
        * min(ref.numel, TILE)
        for name, ref in plan.base.tensors.items()
    }


def _is_cast(ref: TensorRef, out_dtype: str) -> bool:
    same = ref.dtype not in FP8 and out_dtype in ("base", TORCH_NAMES[ref.dtype])
    return ref.dtype in FLOATING and not same


def _action(recipe: Recipe, base: Checkpoint, ref: TensorRef) -> Action:
    return action_of(
        ref.name,
        shape=ref.shape,
        floating=ref.dtype in FLOATING,
        policies=recipe.rules,
        vocab_size=base.vocab_size,
        matrix_action=METHODS[recipe.merge_method].matrices,
        vector_action=METHODS[recipe.merge_method].vectors,
    )


def _source(
    model: SourceModel, *, recipe: Recipe, base: Checkpoint, actions: Mapping[str, Action]
) -> Source:
    fitted = fit(model, recipe=recipe, base=base, actions=actions)
    return Source(
        reference=model.model, weight=model.weight, quota=model.quota, admit=model.admit,
        checkpoint=fitted.checkpoint, unlike=fitted.unlike,
    )  # fmt: skip


def _sources(
    recipe: Recipe, *, base: Checkpoint, actions: Mapping[str, Action], refused: Refused | None
) -> dict[str, tuple[SourceModel, Source]]:  # fmt: skip
    """Models and what they are, by revision, in the recipe's order."""
    found: dict[str, tuple[SourceModel, Source]] = {}
    last: SvdmergeError | None = None
    for model in recipe.models:
        try:
            source = _source(model, recipe=recipe, base=base, actions=actions)
            if source.revision in found:
                raise _twins(source, found[source.revision][1])
        except RetryableError:
            raise  # that says nothing of the source
        except SvdmergeError as error:
            if refused is None:
                raise
            refused(model.model, error)
            last = error
        else:
            found[source.revision] = (model, source)
    if last is not None and not found:
        raise last
    return found


def _twins(one: Source, other: Source) -> RecipeError:
    both = f"{other.reference} and {one.reference}"
    return RecipeError(
        f"models: {one.reference if one.reference == other.reference else both}: "
        "the same model is listed twice",
        "It would take two sources' share of the merge.",
        "List it once, with a `weight` if it should count more.",
    )


def _refuse_same_ids(parameters: Sequence[Parameter]) -> None:
    """Slices are called `name[i]`: a tensor may not be called what another's slice is."""
    seen: dict[str, str] = {}
    for p in parameters:
        if (other := seen.setdefault(p.id, p.tensor)) != p.tensor:
            raise MismatchError(
                f"{p.tensor} and {other}: both have a matrix called {p.id}",
                "Components are stored by that name.",
                "Give one of them `policy: base`.",
            )


def _grouped(plan: Plan) -> Iterator[tuple[Parameter, ...]]:
    """Parameters in runs of about so many of the base's bytes; what no task may hold, alone."""
    most = UNIT_BYTES if plan.recipe.resources.device == "cpu" else GPU_UNIT_BYTES
    group: list[Parameter] = []
    size = 0
    for parameter in plan.parameters:
        alone = plan.block_rows(parameter) is not None
        if group and (alone or size >= most):
            yield tuple(group)
            group, size = [], 0
        size += most if alone else _base_bytes(plan, parameter)
        group.append(parameter)
    if group:
        yield tuple(group)


def _base_bytes(plan: Plan, parameter: Parameter) -> int:
    ref = plan.base.tensors[parameter.tensor]
    return parameter.numel * (ref.nbytes // max(1, ref.numel))


def _check_memory(plan: Plan) -> None:
    limit = plan.recipe.resources.memory
    # The largest of all, so that the limit it names is enough for every other.
    need, name = max(((n, name) for name, n in write_bytes(plan).items()), default=(0, ""))
    told = f"{name} {list(plan.base.tensors[name].shape)}: writing" if name else ""
    group = max(plan.groups, key=lambda g: peak_bytes(plan, g), default=())
    if group and peak_bytes(plan, group) >= need:
        need = peak_bytes(plan, group)
        worst = max(group, key=lambda p: peak_bytes(plan, [p]))
        work = "decomposing" if need == unit_bytes(plan, group) else "merging"
        told = f"{worst.id} ({worst.m} x {worst.n}): {work}"
    if need > limit:
        raise ResourceError(
            f"{told} it needs {need / 2**20:.1f} MiB",
            f"The recipe gives a task {limit / 2**20:.1f} MiB (resources.memory).",
            f"Set `resources: {{memory: {-(-need >> 20)}MiB}}` or more.",
        )


def numerics_class(device: str, threads: int) -> str:
    """What bits may depend on, as far as headers tell: device kind, machine, torch, threads."""
    return f"{device}/{platform.machine()}/torch-{version('torch')}/threads-{threads}"


def _hash(
    recipe: Recipe, *, base: Checkpoint, sources: Sequence[Source], actions: Mapping[str, Action]
) -> str:
    fields: dict[str, object] = {
        "base": base.revision,
        # Copied to the output, and no part of the weights' revision.
        "config": base.config,
        "actions": actions,
        "sources": [(s.revision, s.weight, s.quota) for s in sources],
        "recipe": recipe.numeric_digest(),
        "numerics": numerics_class(recipe.resources.device, recipe.resources.threads),
        "schema": layout.SCHEMA_VERSION,
    }
    if recipe.is_targeted and recipe.tune is not None:
        fields["target"] = _target(recipe.tune)
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:32]


# Settings of `tune` that the target's examples, and what is made of them, depend on.
_EXAMPLES = {"task", "model", "input", "label", "per_class", "max_length", "seed"}


def _target(tune: TuneConfig) -> list[object]:
    """What a merge for a target depends on besides the models."""
    return [
        tune.train,
        Folder.at(tune.train).versions(),
        tune.model_dump(mode="json", include=_EXAMPLES),
    ]
