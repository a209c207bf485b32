"""Which sources help a target, and the merge that its few examples ask for."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from svdmerge.core.evidence import bootstrap_interval, choose
from svdmerge.core.params import Action
from svdmerge.engine.plan import Plan
from svdmerge.engine.runtime import Runtime
from svdmerge.engine.select import choose_components, picks
from svdmerge.progress import Progress
from svdmerge.recipe import TuneConfig
from svdmerge.storage.filesystem import Folder
from svdmerge.training.blend import Blend, Ingredient
from svdmerge.training.judge import Judged, JudgeUnit, judge, judged_examples
from svdmerge.training.overlap import DUPLICATE, OverlapUnit, overlaps

# Numbers of sources merged, best first. Nested sets, roughly doubling: each is one more look at
# the same few examples, and the best of many looks is luck.
SET_SIZES = (2, 3, 5, 10, 20, 50, 100)
# Sum of the merged sources' weights. 1 is the plain average; sources that share directions are
# over-counted by their number, while those that do not are worth their full strength each.
TOTALS = (0.5, 1.0, 1.5, 2.0, 3.0)
# Of the best source alone: as it is, or part of the way from the base (as WiSE-FT, 2109.01903).
ALONE = (1.0, 0.75, 0.5)
ADAPTATION = "adaptation.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRank:
    """A source's help: how much lower the held-out loss is than the base's, in nats."""

    name: str
    revision: str
    loss: float
    gain: float
    low: float
    high: float
    """The gain's 95 % bootstrap interval."""
    seconds: float


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
class Candidate:
    """A merge that was considered: its sources, equally weighted, and their weights' sum."""

    revisions: tuple[str, ...]
    total: float
    loss: float

    @property
    def weight(self) -> float:
        """Of each source."""
        return self.total / len(self.revisions) if self.revisions else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptation:
    """What the examples ask for: the chosen merge, and all that were considered."""

    chosen: Candidate
    considered: tuple[Candidate, ...]
    verdict: str

    def to_json(self) -> str:
        """The adaptation as JSON."""
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str | bytes) -> "Adaptation":
        """What `to_json` wrote."""
        raw: dict[str, Any] = json.loads(text)
        return Adaptation(
            chosen=_candidate(raw["chosen"]),
            considered=tuple(_candidate(c) for c in raw["considered"]),
            verdict=raw["verdict"],
        )


def _candidate(raw: dict[str, Any]) -> Candidate:
    return Candidate(
        revisions=tuple(raw["revisions"]), total=float(raw["total"]), loss=float(raw["loss"])
    )


class Targeting:
    """A plan's sources and merges, judged by one target's examples.

    Judging is one task per source or merge; its losses are kept in the store, so the same question
    again costs nothing.
    """

    def __init__(
        self, plan: Plan, config: TuneConfig, *, runtime: Runtime, progress: Progress, attempt: str
    ) -> None:
        self._plan, self._config = plan, config
        self._runtime, self._progress, self._attempt = runtime, progress, attempt
        examples = judged_examples(config, base=plan.base)
        self._digest, self.num_examples = examples.digest(), len(examples)
        self._losses: dict[tuple[tuple[str, ...], float], Tensor] = {}

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
        self._losses[(), 0.0] = base
        ranks: list[SourceRank] = []
        for source, loss, judged in zip(plan.sources, losses, found[1:], strict=True):
            self._losses[(source.revision,), 1.0] = loss
            low, high = bootstrap_interval(base - loss)
            ranks.append(
                SourceRank(
                    name=source.reference, revision=source.revision, loss=float(loss.mean()),
                    gain=float((base - loss).mean()), low=low, high=high, seconds=judged.seconds,
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

    def adapt(self, ranking: Ranking) -> Adaptation:
        """The merge that the examples ask for: nothing, one source, or several at a strength.

        Sets are nested: the best m of the sources that lower the loss. The best single model, the
        base included, is left for a merge only if that is better by more than noise.
        """
        best = ranking.sources[0].revision
        helping = tuple(s.revision for s in ranking.sources if s.gain > 0)
        sets = [helping[:m] for m in SET_SIZES if m <= len(helping)]
        plans: list[tuple[tuple[str, ...], tuple[float, ...]]] = [((best,), ALONE[1:])]
        plans += [(members, TOTALS) for members in sets]
        self._judge_sets(plans)
        base, alone = ((), 0.0), ((best,), 1.0)
        single = min((base, alone), key=lambda c: float(self._losses[c].mean()))
        rest = sorted(
            (c for members, totals in plans for c in ((members, t) for t in totals)),
            key=lambda c: (len(c[0]), c[1]),
        )
        order = [single, *rest]
        taken = order[choose([self._losses[c] for c in order])]
        considered = [self._candidate(c) for c in (base, alone, *rest)]
        chosen = self._candidate(taken)
        return Adaptation(
            chosen=chosen, considered=tuple(considered), verdict=self._told(chosen, considered[0])
        )

    def _candidate(self, key: tuple[tuple[str, ...], float]) -> Candidate:
        return Candidate(revisions=key[0], total=key[1], loss=float(self._losses[key].mean()))

    def _told(self, chosen: Candidate, base: Candidate) -> str:
        if not chosen.revisions:
            return "No source helps this target: the base model is kept as it is."
        names = {s.revision: s.reference for s in self._plan.sources}
        who = ", ".join(names[r] for r in chosen.revisions)
        return (
            f"{len(chosen.revisions)} of {len(names)} sources, each at strength "
            f"{chosen.weight:.3g}: held-out loss {chosen.loss:.4f}, base {base.loss:.4f} ({who})."
        )

    def _judge_sets(self, plans: Sequence[tuple[tuple[str, ...], tuple[float, ...]]]) -> None:
        """Losses of merges at their totals; one task for all totals of a set."""
        blends = [(f"merge of {len(members)}", self._merge(members)) for members, _ in plans]
        strengths = [tuple(t / len(members) for t in totals) for members, totals in plans]
        found = self._judge(blends, strengths=strengths, stage="adapt")
        for (members, totals), judged in zip(plans, found, strict=True):
            for total, losses in zip(totals, judged.losses, strict=True):
                self._losses[members, total] = torch.tensor(losses, dtype=torch.float64)

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

    def _merge(self, members: tuple[str, ...]) -> Blend:
        """The pooled components of some sources, at strength 1 each."""
        part = gated(self._plan, dict.fromkeys(members, 1.0), scale=1.0)
        table = choose_components(
            part, attempt=self._attempt, runtime=self._runtime, progress=self._progress
        )
        chosen = picks(part, table)
        return self._blend(
            {
                parameter: tuple(
                    Ingredient(revision=p.revision, weight=p.weight, count=len(p.indices))
                    for p in found
                )
                for parameter, found in chosen.items()
            }
        )

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
        mean = torch.tensor(parts, dtype=torch.float64).sum(dim=0) / len(matrices)
        pairs = combinations(range(len(plan.sources)), 2)
        return [
            (plan.sources[i].reference, plan.sources[j].reference, float(mean[i, j]))
            for i, j in pairs
            if mean[i, j] >= DUPLICATE
        ]


def _verdict(ranks: Sequence[SourceRank]) -> str:
    sure = [r.name for r in ranks if r.low > 0]
    if sure:
        return f"{len(sure)} of {len(ranks)} sources help this target, most of all {ranks[0].name}."
    if ranks[0].gain > 0:
        return (
            f"None helps for certain: {ranks[0].name} looks best, "
            "yet its interval includes no gain."
        )
    return "None helps: the base model serves this target best."


def gated(plan: Plan, weights: Mapping[str, float], *, scale: float) -> Plan:
    """The plan with only these sources (revision -> weight), merged at this strength."""
    sources = tuple(
        replace(s, weight=s.weight * weights[s.revision])
        for s in plan.sources
        if s.revision in weights
    )
    parameters = plan.recipe.parameters.model_copy(update={"scale": scale})
    return replace(
        plan, sources=sources, recipe=plan.recipe.model_copy(update={"parameters": parameters})
    )


def adapted(plan: Plan, adaptation: Adaptation) -> Plan:
    """The plan that merges what the adaptation chose."""
    chosen = adaptation.chosen
    return gated(plan, dict.fromkeys(chosen.revisions, 1.0), scale=chosen.weight or 1.0)


def warnings(adaptation: Adaptation) -> list[str]:
    """What a user must know of the choice."""
    return [] if adaptation.chosen.revisions else [adaptation.verdict]


def save(folder: Folder, adaptation: Adaptation) -> None:
    """Keep the adaptation in the run's folder."""
    folder.put(ADAPTATION, adaptation.to_json().encode())


def load(folder: Folder) -> Adaptation | None:
    """The adaptation of this run, if it was made."""
    if folder.stat(ADAPTATION) is None:
        return None
    return Adaptation.from_json(folder.read(ADAPTATION))
