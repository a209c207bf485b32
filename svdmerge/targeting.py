"""Which sources help a target, and the merge that its few examples ask for."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from svdmerge.core.evidence import bootstrap_interval, standard_error, surely_better
from svdmerge.core.gate import Mix, gate
from svdmerge.core.params import Action
from svdmerge.engine.decompose import load_source
from svdmerge.engine.inventory import Inventory, take_inventory
from svdmerge.engine.plan import Plan
from svdmerge.engine.runtime import Runtime
from svdmerge.engine.select import choose_components, picks
from svdmerge.engine.winners import share_above_noise
from svdmerge.progress import Progress
from svdmerge.recipe import TuneConfig
from svdmerge.storage.filesystem import Folder
from svdmerge.training.blend import Blend, Ingredient
from svdmerge.training.judge import Judged, JudgeUnit, judge, judged_examples
from svdmerge.training.overlap import DUPLICATE, OverlapUnit, overlaps

ADAPTATION = "adaptation.json"
# Of a source's matrices, the share with a component above the noise below which it is noise itself:
# a few of hundreds end above the edge by chance, while of models measured all do.
QUIET = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRank:
    """A source's help: how much lower the held-out loss is than the base's, in nats."""

    name: str
    revision: str
    loss: float
    gain: float
    low: float
    high: float
    """The gain's 95 % bootstrap interval, of this source alone."""
    sure: bool
    """Whether it helps for sure, the claims on all sources together being right in 95 %."""
    seconds: float
    noise: bool
    """Whether nothing of its change stands above noise: such a source is merged only where it
    helps for sure, for one of many is always lucky."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Sources by their help for a target, best first."""

    base_loss: float
    sources: tuple[SourceRank, ...]
    near_duplicates: tuple[tuple[str, str, float], ...]
    """Pairs of sources, and the mean squared cosine of their principal angles."""
    num_examples: int
    verdict: str

    def to_json(self) -> str:
        """The ranking as JSON."""
        return json.dumps(asdict(self), indent=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Considered:
    """A merge that was considered, by revisions of its sources, and its held-out loss in nats."""

    mix: Mix
    loss: float
    error: float | None
    """Standard error of the paired difference to the chosen one's; None of a single example."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptation:
    """What the examples ask for: the chosen merge, and all that were considered."""

    chosen: Mix
    considered: tuple[Considered, ...]
    verdict: str

    def to_json(self) -> str:
        """The adaptation as JSON."""
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str | bytes) -> "Adaptation":
        """What `to_json` wrote."""
        raw: dict[str, Any] = json.loads(text)
        return Adaptation(
            chosen=_mix(raw["chosen"]),
            considered=tuple(
                Considered(mix=_mix(c["mix"]), loss=c["loss"], error=c["error"])
                for c in raw["considered"]
            ),
            verdict=raw["verdict"],
        )


def _mix(raw: dict[str, Any]) -> Mix:
    return Mix(shares=tuple((s, float(x)) for s, x in raw["shares"]), total=float(raw["total"]))


class Targeting:
    """A plan's sources and merges, judged by one target's examples.

    Judging is one task per source or merge; its losses are kept in the store, so the same question
    again costs nothing.
    """

    def __init__(
        self, plan: Plan, config: TuneConfig, *, runtime: Runtime, progress: Progress
    ) -> None:
        self._plan, self._config = plan, config
        self._runtime, self._progress = runtime, progress
        examples = judged_examples(config, base=plan.base)
        self._digest, self.num_examples = examples.digest(), len(examples)
        self._base: Tensor | None = None
        self._sources: dict[str, Tensor] = {}
        self._noise = noise_only(plan)
        self._inventory = take_inventory(plan, runtime=runtime, progress=progress)

    def rank(self) -> Ranking:
        """Sources by their help.

        Raises:
            TrainingError: the examples or the backbone cannot be used.
            StoreError: a source is not decomposed.
        """
        plan = self._plan
        blends: list[tuple[str, Blend]] = [("base", self._blend({}))]
        blends += [(s.reference, self._alone(s.revision)) for s in plan.sources]
        found = self._judge(blends, strengths=[(1.0,)] * len(blends), stage="rank")
        base, *losses = [torch.tensor(j.losses[0], dtype=torch.float64) for j in found]
        self._base = base
        ranks: list[SourceRank] = []
        sure = surely_better(torch.stack([base - loss for loss in losses]))
        for source, loss, judged, is_sure in zip(
            plan.sources, losses, found[1:], sure, strict=True
        ):
            self._sources[source.revision] = loss
            low, high = bootstrap_interval(base - loss)
            ranks.append(
                SourceRank(
                    name=source.reference, revision=source.revision, loss=float(loss.mean()),
                    gain=float((base - loss).mean()), low=low, high=high, sure=is_sure,
                    seconds=judged.seconds, noise=source.revision in self._noise,
                )
            )  # fmt: skip
        ranks.sort(key=lambda r: (r.loss, r.revision))
        return Ranking(
            base_loss=float(base.mean()),
            sources=tuple(ranks),
            near_duplicates=tuple(self._near_duplicates()),
            num_examples=self.num_examples,
            verdict=_verdict(ranks),
        )

    def adapt(self) -> Adaptation:
        """The merge that the examples ask for: nothing, one source, or several at a strength.

        Sources must be ranked before.
        """
        assert self._base is not None
        chosen, losses = gate(
            self._sources, base=self._base, judge=self._judge_mixes, doubted=self._noise
        )
        return Adaptation(
            chosen=chosen,
            considered=tuple(
                Considered(mix=m, loss=float(x.mean()), error=_error(x - losses[chosen]))
                for m, x in losses.items()
            ),
            verdict=self._told(chosen, gains=self._base - losses[chosen]),
        )

    def _told(self, chosen: Mix, *, gains: Tensor) -> str:
        if not chosen.shares:
            return "No source helps this target: the base model is kept as it is."
        names = {s.revision: s.reference for s in self._plan.sources}
        parts = ", ".join(f"{names[r]} {w:.3g}" for r, w in chosen.weights.items())
        return (
            f"{len(chosen.shares)} of {len(names)} sources, strength {chosen.total:.3g} in all: "
            f"held-out loss {float(gains.mean()):.4f} below the base's, standard error "
            f"{_error(gains) or 0.0:.4f} ({parts})."
        )

    def _judge_mixes(self, mixes: Sequence[Mix]) -> list[Tensor]:
        """Losses of mixes; one task for all strengths of the same shares."""
        groups: dict[tuple[tuple[str, float], ...], list[Mix]] = {}
        for mix in mixes:
            groups.setdefault(mix.shares, []).append(mix)
        blends = [(f"merge of {len(shares)}", self._merged(dict(shares))) for shares in groups]
        strengths = [tuple(mix.total for mix in group) for group in groups.values()]
        found = self._judge(blends, strengths=strengths, stage="adapt")
        losses = {
            mix: torch.tensor(values, dtype=torch.float64)
            for group, judged in zip(groups.values(), found, strict=True)
            for mix, values in zip(group, judged.losses, strict=True)
        }
        return [losses[mix] for mix in mixes]

    def _judge(
        self, blends: Sequence[tuple[str, Blend]], *, strengths: Sequence[tuple[float, ...]],
        stage: str,
    ) -> list[Judged]:  # fmt: skip
        plan = self._plan
        numel = sum(ref.numel for ref in plan.base.tensors.values())
        units = [
            JudgeUnit(
                name=f"{stage} {name}",
                # The module, its own weights again, the difference, and one more for activations.
                memory_bytes=16 * numel,
                threads=plan.recipe.resources.threads,
                config=self._config,
                base=plan.base,
                blend=blend,
                strengths=values,
                examples=self._digest,
                cache=plan.store.child(f"rank/{plan.base_key}"),
            )
            for (name, blend), values in zip(blends, strengths, strict=True)
        ]
        return self._runtime.map(judge, units, stage=stage, progress=self._progress)

    def _blend(self, ingredients: Mapping[str, tuple[Ingredient, ...]]) -> Blend:
        return Blend(
            store=self._plan.store,
            base_key=self._plan.base_key,
            parameters=self._plan.parameters,
            ingredients=ingredients,
        )

    def _alone(self, revision: str) -> Blend:
        """A source by itself, as deep as merging it alone would take it."""
        weight = next(s.weight for s in self._plan.sources if s.revision == revision)
        return self._blend(
            {
                p.id: (Ingredient(revision=revision, weight=weight, count=self._plan.budget(p)),)
                for p in self._plan.parameters
                if p.action is not Action.EQUAL
            }
        )

    def _merged(self, shares: Mapping[str, float]) -> Blend:
        return blend_of(
            gated(self._plan, shares, total=1.0), self._inventory, runtime=self._runtime,
            progress=self._progress,
        )  # fmt: skip

    def _near_duplicates(self) -> list[tuple[str, str, float]]:
        plan = self._plan
        matrices = [p for p in plan.parameters if p.action is Action.DECOMPOSE]
        if len(plan.sources) < 2 or not matrices:
            return []
        units = [
            OverlapUnit(
                name=f"overlap [{number + 1}/{len(plan.groups)}]",
                memory_bytes=64 << 20,
                threads=plan.recipe.resources.threads,
                store=plan.store,
                base_key=plan.base_key,
                revisions=tuple(s.revision for s in plan.sources),
                parameters=group,
            )
            for number, group in enumerate(plan.groups)
        ]
        parts = self._runtime.map(overlaps, units, stage="overlap", progress=self._progress)
        sums, counts = torch.tensor(parts, dtype=torch.float64).sum(dim=0)
        mean = sums / counts.clamp(min=1.0)
        pairs = combinations(range(len(plan.sources)), 2)
        return [
            (plan.sources[i].reference, plan.sources[j].reference, float(mean[i, j]))
            for i, j in pairs
            if mean[i, j] >= DUPLICATE
        ]


def _error(differences: Tensor) -> float | None:
    return standard_error(differences) if len(differences) > 1 else None


def noise_only(plan: Plan) -> set[str]:
    """Revisions of the sources whose changes are noise alone, by their stored spectra.

    Raises: StoreError, if a source is not decomposed, or damaged."""
    shares = {s.revision: share_above_noise(load_source(plan, s).spectra()) for s in plan.sources}
    return {revision for revision, share in shares.items() if share < QUIET}


def _verdict(every: Sequence[SourceRank]) -> str:
    if all(r.low == r.gain == r.high == 0.0 for r in every):
        return (
            "The examples tell nothing: held out, every model fails on them alike. "
            "Give two or more of each class, and different ones."
        )
    if sure := [r.name for r in every if r.sure]:
        return f"{len(sure)} of {len(every)} sources help this target, most of all {sure[0]}."
    ranks = [r for r in every if not r.noise]
    if not ranks:
        return "None helps: every source's change is noise alone."
    if ranks[0].gain > 0:
        return (
            f"None helps for certain: {ranks[0].name} looks best, "
            f"yet the best of {len(every)} useless ones may do as well by luck."
        )
    return "None helps: the base model serves this target best."


def blend_of(plan: Plan, inventory: Inventory, *, runtime: Runtime, progress: Progress) -> Blend:
    """The merge of a plan's sources at strength 1, as assembling it would make it."""
    table = choose_components(plan, inventory, runtime=runtime, progress=progress)
    chosen = picks(plan, table)
    return Blend(
        store=plan.store,
        base_key=plan.base_key,
        parameters=plan.parameters,
        ingredients={
            p.id: tuple(
                Ingredient(
                    revision=pick.revision,
                    weight=pick.weight / (1 if p.is_factored else plan.averaged_over),
                    count=len(pick.indices),
                )
                for pick in chosen.get(p.source_id, ())
            )
            for p in plan.parameters
        },
    )


def gated(plan: Plan, shares: Mapping[str, float], *, total: float) -> Plan:
    """The plan with only these sources (revision -> share), at this strength together.

    Vectors are summed with the same weights: with shares that add up to 1 a sum is the mean.
    """
    sources = tuple(
        replace(s, weight=s.weight * shares[s.revision])
        for s in plan.sources
        if s.revision in shares
    )
    parameters = plan.recipe.parameters.model_copy(update={"scale": total})
    recipe = plan.recipe.model_copy(update={"parameters": parameters})
    return replace(plan, sources=sources, recipe=recipe, averaged_over=1)


def adapted(plan: Plan, adaptation: Adaptation) -> Plan:
    """The plan that merges what the adaptation chose."""
    chosen = adaptation.chosen
    return gated(plan, dict(chosen.shares), total=chosen.total or 1.0)


def warnings(adaptation: Adaptation) -> list[str]:
    """What a user must know of the choice."""
    return [] if adaptation.chosen.shares else [adaptation.verdict]


def save(folder: Folder, adaptation: Adaptation) -> None:
    """Keep the adaptation in the run's folder."""
    folder.put(ADAPTATION, adaptation.to_json().encode())


def load(folder: Folder) -> Adaptation | None:
    """The adaptation of this run, if it was made."""
    if folder.stat(ADAPTATION) is None:
        return None
    return Adaptation.from_json(folder.read(ADAPTATION))
