"""One target with its models: features and held-out losses under any weights, kept on disk."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

from svdmerge.core.components import RankOneComponents, none
from svdmerge.core.discriminant import DiscriminantFit, discriminant
from svdmerge.core.params import Action, Parameter
from svdmerge.engine.inventory import take_inventory
from svdmerge.engine.plan import Plan
from svdmerge.engine.runtime import InProcess
from svdmerge.progress import SILENT
from svdmerge.recipe import TuneConfig
from svdmerge.storage.checkpoint import FLOATING
from svdmerge.targeting import blend_of, gated, noise_only
from svdmerge.training.backbone import Inputs, build_backbone, lacking, load_weights
from svdmerge.training.blend import committed, differences
from svdmerge.training.data import Examples, draw, load_target
from svdmerge.training.features import extract
from svdmerge.training.head import fitted_head

Weights = Mapping[str, Tensor]
CPU = torch.device("cpu")
# Of the full-data regime: draws then differ in the rows, and a table takes hours, not days.
MAX_DRAWN = 3000


class _Pooled(nn.Module):
    """The backbone with its pooling as one module, so that weights can be given to a call."""

    def __init__(self, module: nn.Module, features: Callable[[Inputs], Tensor]) -> None:
        super().__init__()
        self.module = module
        self._features = features

    def forward(self, inputs: Inputs) -> Tensor:
        """Features (b, d)."""
        return self._features(inputs)


class Problem:
    """A target's examples and the sources it may use, all in memory.

    `plan` must be decomposed to its full rank; features are kept below `cache`, by model and row.
    `max_steps` takes the place of the trained entrants' own. `alter` damages the examples, for
    tests of robustness.
    """

    def __init__(
        self,
        name: str,
        plan: Plan,
        config: TuneConfig,
        *,
        cache: Path,
        max_test: int,
        threads: int,
        max_steps: int | None = None,
        alter: Callable[[Examples], Examples] = lambda examples: examples,
    ) -> None:
        torch.set_num_threads(threads)
        self.name, self.plan, self.cache = name, plan, cache
        self.max_steps = max_steps
        target = load_target(config, base=plan.base)
        self.num_classes = target.num_classes
        self.train = alter(target.train)
        self.test = alter(_first(target.test, num=max_test))
        self.sources = {Path(s.reference).name: s for s in plan.sources}
        self.noise = noise_only(plan)
        self._backbone = build_backbone(config, base=plan.base)
        load_weights(self._backbone, checkpoint=plan.base, base=plan.base)
        state = self._backbone.module.state_dict()
        self.base = {n: t.clone() for n, t in state.items() if t.is_floating_point()}
        self._module = _Pooled(self._backbone.module, self._backbone.features)
        self._digests = {
            "train": self.train.digest()[:12],
            "test": self.test.digest()[:12],
        }

    @property
    def parameters(self) -> dict[str, Parameter]:
        """What is merged and features depend on, by name in the module."""
        named = {self._backbone.module_name(p.id): p for p in self.plan.parameters}
        return {n: p for n, p in named.items() if n in self.base and not n.startswith("pooler.")}

    @property
    def matrices(self) -> list[str]:
        """Names in the module of the matrices that are decomposed and that features depend on."""
        return [n for n, p in self.parameters.items() if p.action is Action.DECOMPOSE]

    def drawn(self, *, per_class: int | None, seed: int) -> list[int]:
        """Rows of a few-shot draw; without `per_class` all, or `MAX_DRAWN` by hash."""
        rows = draw(self.train.labels.numpy(), per_class=per_class, seed=seed)
        if per_class is not None:
            return rows
        ranked = sorted(rows, key=lambda row: hashlib.sha256(f"all {seed} {row}".encode()).digest())
        return sorted(ranked[:MAX_DRAWN])

    def features(
        self, key: str, weights: Callable[[], Weights], *, part: str, rows: Sequence[int]
    ) -> Tensor:
        """Features (rows, d) of the model `key`, whose changed weights are made only if needed."""
        digest = hashlib.sha256(f"{self.plan.base.revision}{key}".encode()).hexdigest()[:24]
        path = self.cache / f"{self.name}-{part}-{self._digests[part]}-{digest}.safetensors"
        held = load_file(path) if path.exists() else {"rows": torch.zeros(0, dtype=torch.int64)}
        known = set(held["rows"].tolist())
        if missing := [row for row in rows if row not in known]:
            found = self.extracted(weights(), part=part, rows=missing)
            values = torch.cat([held["values"], found]) if known else found
            held = {"rows": torch.cat([held["rows"], torch.tensor(missing)]), "values": values}
            save_file(held, path)
        place = {row: i for i, row in enumerate(held["rows"].tolist())}
        return held["values"][[place[row] for row in rows]]

    def fit(self, key: str, weights: Callable[[], Weights], rows: Sequence[int]) -> DiscriminantFit:
        """The head on a model's features of the drawn rows, with its held-out losses."""
        values = self.features(key, weights, part="train", rows=rows)
        return self.head(values, rows)

    def head(self, values: Tensor, rows: Sequence[int]) -> DiscriminantFit:
        """The head in closed form on features of the drawn rows."""
        return discriminant(values, labels=self.labels(rows), num_classes=self.num_classes)

    def labels(self, rows: Sequence[int]) -> Tensor:
        """Of drawn rows."""
        return self.train.labels[list(rows)]

    def hits(self, key: str, weights: Callable[[], Weights], rows: Sequence[int]) -> Tensor:
        """Whether each test example is classified rightly (bool)."""
        train = self.features(key, weights, part="train", rows=rows)
        test = self.features(key, weights, part="test", rows=range(len(self.test)))
        return self.hits_of(train, test, rows)

    def fitted_hits(self, weights: Weights, rows: Sequence[int]) -> Tensor:
        """The same of changed weights; nothing is kept."""
        train = self.extracted(weights, part="train", rows=rows)
        test = self.extracted(weights, part="test", rows=range(len(self.test)))
        return self.hits_of(train, test, rows)

    def hits_of(self, train: Tensor, test: Tensor, rows: Sequence[int]) -> Tensor:
        """The same of features, by the head that svdmerge would give them."""
        head = fitted_head(train, labels=self.labels(rows), closed=self.head(train, rows))
        return head.scores(test).argmax(dim=1) == self.test.labels

    def extracted(self, weights: Weights, *, part: str, rows: Sequence[int]) -> Tensor:
        """Features (rows, d) under changed weights, not kept."""
        examples = self.train if part == "train" else self.test
        with self._holding(weights):
            return extract(self._backbone, examples.take(rows), device=CPU)

    def features_under(self, weights: Weights, rows: list[int], *, train: Sequence[int]) -> Tensor:
        """Differentiable features of some of the drawn rows `train` under changed weights."""
        named = {f"module.{n}": w for n, w in weights.items()}
        inputs = self.train.batch([train[row] for row in rows])
        return functional_call(self._module, named, (inputs,))

    def source_weights(self, name: str) -> Weights:
        """A whole source's weights."""
        return {n: self.base[n] + d for n, d in self.source_difference(name).items()}

    @lru_cache(maxsize=64)  # noqa: B019  a problem lives as long as its process
    def source_difference(self, name: str) -> dict[str, Tensor]:
        """A whole source's differences, by name in the module."""
        checkpoint = self.sources[name].checkpoint
        absent = set(lacking(checkpoint, base=self.plan.base))
        found: dict[str, Tensor] = {}
        for tensor, ref in self.plan.base.tensors.items():
            own = self._backbone.module_name(tensor)
            if own in self.base and tensor not in absent and ref.dtype in FLOATING:
                value = checkpoint.tensors[tensor].read().float() - self.base[own]
                if bool(value.any()):
                    found[own] = value
        return found

    def components(self, source: str, matrix: str, *, stop: int | None = None) -> RankOneComponents:
        """A source's stored components of a matrix, the leading `stop` or all; none where it does
        not differ."""
        parameter = self.parameters[matrix]
        stored = committed(self.plan.store, self.plan.base_key, self.sources[source].revision)
        held = stored.held(parameter.id)
        count = held if stop is None else min(stop, held)
        return stored.read(parameter.id, range(count)) if count else none(parameter.m, parameter.n)

    def mixed(self, weights: Mapping[str, float]) -> Weights:
        """Base plus weighted whole differences."""
        found: dict[str, Tensor] = {}
        for source, weight in weights.items():
            for name, d in self.source_difference(source).items():
                found[name] = (found[name] if name in found else self.base[name]) + weight * d
        return found

    def pooled(self, shares: Mapping[str, float], *, total: float) -> Weights:
        """Base plus `total` times the pooled components of weighted sources, as a run with
        `salience: target` assembles them, at full rank."""
        return self._changed(self._pooled(tuple(shares.items())), strength=total)

    @lru_cache(maxsize=2)  # noqa: B019  shares are asked for at all strengths, then the next
    def _pooled(self, shares: tuple[tuple[str, float], ...]) -> dict[str, Tensor]:
        revisions = {self.sources[name].revision: share for name, share in shares}
        return self._merged(gated(self.plan, revisions, total=1.0))

    def axis(self, *, k: float, strength: float = 1.0) -> Weights:
        """Base plus AXIS of all sources; at strength 1 as published."""
        return self._changed(self._axis(k), strength=strength)

    @lru_cache(maxsize=2)  # noqa: B019  asked for at all strengths, then the next
    def _axis(self, k: float) -> dict[str, Tensor]:
        parameters = self.plan.recipe.parameters.model_copy(update={"k": k})
        recipe = self.plan.recipe.model_copy(update={"parameters": parameters})
        return self._merged(replace(self.plan, recipe=recipe))

    def _merged(self, plan: Plan) -> dict[str, Tensor]:
        inventory = take_inventory(plan, runtime=InProcess(), progress=SILENT)
        blend = blend_of(plan, inventory, runtime=InProcess(), progress=SILENT)
        changes = differences(blend, base=self.plan.base)
        named = {self._backbone.module_name(n): d for n, d in changes.items()}
        return {n: d for n, d in named.items() if n in self.base}

    def _changed(self, differences: Weights, *, strength: float) -> Weights:
        return {n: self.base[n] + strength * d for n, d in differences.items()}

    def _holding(self, weights: Weights) -> "_Held":
        return _Held(self._backbone.module, weights, base=self.base)


class _Held:
    """The module with changed weights while the block runs, the base's afterwards."""

    def __init__(self, module: nn.Module, weights: Weights, *, base: Weights) -> None:
        self._state, self._weights, self._base = module.state_dict(), weights, base

    @torch.no_grad()
    def __enter__(self) -> None:
        for name, weight in self._weights.items():
            self._state[name].copy_(weight)

    @torch.no_grad()
    def __exit__(self, *error: object) -> None:
        for name in self._weights:
            self._state[name].copy_(self._base[name])


def _first(examples: Examples, *, num: int) -> Examples:
    """At most so many examples, of all classes alike, chosen by hash."""
    if len(examples) <= num:
        return examples
    ranked = sorted(
        range(len(examples)), key=lambda row: hashlib.sha256(f"test {row}".encode()).digest()
    )
    return examples.take(sorted(ranked[:num]))
