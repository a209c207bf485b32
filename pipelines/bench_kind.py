"""Decomposable image models: is knowledge diverted by class, and what is it worth?

    python pipelines/bench_kind.py TRAIN TEST OUT [--seeds 0,1,2] [--steps 900] [--width 64]
    python pipelines/bench_kind.py digits digits OUT [--seeds 0,1,2]

TRAIN and TEST are tables of encoded 32 x 32 images and labels 0 to 9 (CIFAR-10's order), or both
`digits`: scikit-learn's, 8 x 8. Models learn classes 0 to 6; 7 to 9 are novel. Everything is kept
in OUT, so the same command resumes, and after the last seed prints all tables again. One thread;
with --jobs as many processes, all on one GPU with --device cuda, make what tables read beforehand.
"""

import argparse
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from svdmerge.comparison.kind.ahead import fill, with_best_rates
from svdmerge.comparison.kind.diversion import matrices, old_losses, random_losses
from svdmerge.comparison.kind.entrants import entrants
from svdmerge.comparison.kind.explanations import explained
from svdmerge.comparison.kind.likeness import likeness
from svdmerge.comparison.kind.pairs import recombined, sampling_seconds, seen_losses
from svdmerge.comparison.kind.plots import draw_curves, draw_matrices
from svdmerge.comparison.kind.quality import classifier, nearest_old, quality, real_quality
from svdmerge.comparison.kind.report import (
    distance_table,
    diversion_table,
    explanation_table,
    likeness_table,
    matrix_table,
    pair_table,
    pretrained_table,
    quality_table,
    transfer_table,
)
from svdmerge.comparison.kind.study import Study, one_thread
from svdmerge.comparison.kind.transfer import chosen_rate, transferred
from svdmerge.kind.digits import write_digits

CIFAR_10 = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
DIGITS = tuple("0123456789")


def sized(study: Study, seeds: list[int]) -> None:
    """The whole and the recombined model beside dense ones of their sizes."""
    old = [old_losses(study, seed) for seed in seeds]
    show("Pre-trained, seven classes", pretrained_table(old))
    show("Recombined for two classes", pair_table([seen_losses(study, seed) for seed in seeds]))


def diverted(study: Study, seeds: list[int]) -> None:
    """Loss matrices, beside those of both controls."""
    names = [study.names[c] for c in study.old]
    random = [random_losses(study, seed) for seed in seeds]
    show("Beside a random gate", pretrained_table(random))
    found = [matrices(study, seed) for seed in seeds]
    show("Diversion", diversion_table(found))
    show("Loss by class and tailors, % above the diagonal, seed 0", matrix_table(found[0], names))
    draw_matrices(found, names, study.out / "kind-matrices.png")


def carried(study: Study, seeds: list[int]) -> None:
    """Transfer curves."""
    results = {
        entrant.name: [
            transferred(
                study, entrant, seed,
                steps=study.transfer_steps, learning_rate=chosen_rate(study, entrant),
            )
            for seed in seeds
        ]
        for entrant in entrants()
    }  # fmt: skip
    show("Novel classes", transfer_table(results, first=entrants()[0].name))
    show(
        "Novel classes by distance, first entrant minus the others, end",
        distance_table(
            results, first=entrants()[0].name, names=[study.names[c] for c in study.novel],
            nearest=nearest_old(study),
        ),
    )  # fmt: skip
    draw_curves(results, study.out / "kind-transfer.png")


def drawn(study: Study, seeds: list[int]) -> None:
    """Quality of samples, and what sampling costs."""
    _, right = classifier(study)
    print(f"\nThe classifier is right on {100 * right:.1f} % of the test images.")
    found = {
        "training images": [real_quality(study, study.old)],
        "gated": [
            quality(study, f"gated-{s}", study.gated(s), classes=study.old, seed=s) for s in seeds
        ],
        "dense": [
            quality(study, f"dense-{s}", study.dense(s), classes=study.old, seed=s) for s in seeds
        ],
    }
    show("Samples", quality_table(found))
    for width in (study.width, 4 * study.width):
        # The split in proportion to the width, as for every model here.
        times = width // study.width
        sampled(
            replace(
                study, width=width, num_learngenes=study.num_learngenes * times,
                num_tailors=study.num_tailors * times,
            )
        )  # fmt: skip


def sampled(study: Study) -> None:
    """What sampling costs; nothing is trained for it."""
    spec = study.spec(study.old, seed=0)
    whole = study.objective(study.old, spec=spec, seed=0).model()
    smaller = recombined(whole, [study.names[c] for c in study.pairs[0]])
    full_s, less_s = sampling_seconds(
        (whole, smaller), shape=(study.channels, study.size, study.size)
    )
    print(
        f"\nSampling, width {study.width}: full {full_s:.3f} s, recombined {less_s:.3f} s "
        f"({full_s / less_s:.2f}x)."
    )


def show(title: str, lines: Iterable[str]) -> None:
    """Print a table."""
    print(f"\n### {title}\n\n" + "\n".join(lines), flush=True)


def main() -> None:
    """Parse, measure seed by seed, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--transfer-steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--learngenes", type=int, default=21)
    parser.add_argument("--tailors", type=int, default=21)
    parser.add_argument("--rate", type=float, default=6e-3)
    parser.add_argument("--dense-rate", type=float, default=6e-3)
    parser.add_argument("--rates", default="", help="learning rates to choose both from instead")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--parts", default="sizes,diversion,transfer,samples,explanations,likeness")
    args = parser.parse_args()
    study = Study(
        train=args.train, test=args.test, out=args.out, names=CIFAR_10, width=args.width,
        depth=args.depth, steps=args.steps, transfer_steps=args.transfer_steps,
        num_learngenes=args.learngenes, num_tailors=args.tailors, learning_rate=args.rate,
        dense_rate=args.dense_rate, batch_size=args.batch, heads=args.heads, device=args.device,
    )  # fmt: skip
    if args.train == "digits":
        train, test = write_digits(study.folder, num_train=1200)
        study = replace(
            study, train=train, test=test, names=DIGITS, size=8, channels=1, patch=2,
            mirrored=False, classifier_epochs=12,
        )  # fmt: skip
    parts = args.parts.split(",")
    seeds = [int(seed) for seed in args.seeds.split(",")]
    one_thread()
    if args.rates:
        study = with_best_rates(study, [*map(float, args.rates.split(","))], num_jobs=args.jobs)
        print(f"Learning rates: gated {study.learning_rate}, dense {study.dense_rate}.")
    if args.jobs > 1:
        fill(study, seeds, parts=parts, num_jobs=args.jobs)
    # Seed by seed, so that what is there early is whole.
    for so_far in (seeds[: i + 1] for i in range(len(seeds))):
        if "sizes" in parts:
            sized(study, so_far)
        if "diversion" in parts:
            diverted(study, so_far)
        if "transfer" in parts:
            carried(study, so_far)
        if "samples" in parts:
            drawn(study, so_far)
    if "explanations" in parts:
        show("Pre-trained otherwise", explanation_table(explained(study, seeds)))
    if "likeness" in parts:
        show("Likeness of models of disjoint classes", likeness_table(likeness(study)))


if __name__ == "__main__":
    main()
