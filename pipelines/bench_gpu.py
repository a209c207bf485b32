"""What decomposing a 7B model's source on a GPU costs, over copying its bytes there.

    python pipelines/bench_gpu.py [--device cuda] [--scale 7b]

The first blocks of 224 matrices, of a change of low rank under bfloat16's rounding, certificates
included. `--device cpu --scale small` shows that it runs where there is no GPU.
"""

import argparse


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", choices=["7b", "small"], default="7b")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    from svdmerge.comparison.on_device import measure_scale

    cost = measure_scale(args.scale, device=args.device, repeats=args.repeats)
    print(
        "| device | matrices | GiB | copying, s | ours, s | ours / copying | found whole "
        "| above besides |"
    )
    print("|---|---|---|---|---|---|---|---|")
    print(
        f"| {cost.device} | {cost.num_matrices} | {cost.num_bytes / 2**30:.2f} "
        f"| {cost.copying:.3f} | {cost.ours:.3f} | {cost.ours / cost.copying:.1f} "
        f"| {cost.complete} | {cost.besides} |"
    )


if __name__ == "__main__":
    main()
