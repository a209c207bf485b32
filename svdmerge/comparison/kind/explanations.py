"""Would learngenes carry further if models were pre-trained otherwise? One change at a time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from svdmerge.comparison.kind.entrants import Entrant, entrants
from svdmerge.comparison.kind.study import Study
from svdmerge.comparison.kind.transfer import chosen_rate, transferred

LORA = "LoRA of equal size"


@dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """A way to pre-train, and what came of it, by seed."""

    name: str
    old: Sequence[Mapping[str, Tensor]]
    """Losses of gated and dense models on the old classes."""
    learngenes: Sequence[Mapping[str, Tensor]]
    """Transfer of frozen learngenes with fresh tailors."""
    lora: Sequence[Mapping[str, Tensor]]
    """Of the dense model, with LoRA of equal size."""


def variants(study: Study) -> Iterator[tuple[str, Study]]:
    """Ways to pre-train, each kept in a folder of its own; the study as it is comes first."""
    yield "as it is", study
    fixed, rank = study.num_new * len(study.novel), study.num_learngenes + study.num_tailors
    for each in (1, 3):
        num = each * len(study.old)
        if num == study.num_tailors or num >= rank:
            continue
        changed = replace(
            study, num_tailors=num, num_learngenes=rank - num, new_tailors=fixed,
            out=study.out / f"split-{each}",
        )  # fmt: skip
        yield f"rank split {rank - num} + {num}", changed
    for sharing, name in (("pairs", "two classes a tailor group"), ("next", "overlapping groups")):
        # As many tailors in all, or one more that two by two need.
        yield name, replace(study, sharing=sharing, out=study.out / sharing)
    longer = replace(study, steps=3 * study.steps, out=study.out / "longer")
    yield "three times the steps", longer


def explained(study: Study, seeds: Sequence[int]) -> Iterator[Explained]:
    """Every variant, measured."""
    by_name = {entrant.name: entrant for entrant in entrants()}
    first, lora = entrants()[0], by_name[LORA]
    for name, changed in variants(study):
        # Dense models know neither split nor groups: theirs are the study's own.
        plain = changed if changed.steps != study.steps else study
        yield Explained(
            name=name,
            old=[_old(changed, plain, seed) for seed in seeds],
            learngenes=[_carried(changed, first, seed, like=study) for seed in seeds],
            lora=[_carried(plain, lora, seed, like=study) for seed in seeds],
        )


def _old(changed: Study, plain: Study, seed: int) -> dict[str, Tensor]:
    images = plain.tested.of_classes(plain.old)

    def losses(model: nn.Module) -> dict[str, Tensor]:
        return {"losses": plain.losses(model, images)}

    return {
        "gated": changed.measured(f"old-gated-{seed}", lambda: losses(changed.gated(seed)))[
            "losses"
        ],
        "dense": plain.measured(f"old-dense-{seed}", lambda: losses(plain.dense(seed)))["losses"],
    }


def _carried(study: Study, entrant: Entrant, seed: int, *, like: Study) -> Mapping[str, Tensor]:
    """With the learning rate that is best for the study as it is."""
    return transferred(
        study, entrant, seed, steps=like.transfer_steps, learning_rate=chosen_rate(like, entrant)
    )
