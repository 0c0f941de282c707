"""Draw the curve over shots, clean and PGD, from the results of `python results/sweep.py shots` -> results/shots.png, or results/<model>/shots.png.

    python results/pictures.py                                                         # --model and --datasets as sweep.py had them

Mean and standard deviation over the seeds that are there; the colours are Okabe and Ito's, which colour-blind people tell apart.
"""
import argparse
import statistics

from matplotlib.figure import Figure

from experiments import BOTH, HERE, METHODS, read, runs, scores

COLOURS, STYLES = dict(zip(METHODS, ("#0072B2", "#D55E00"))), {"clean": "o-", "PGD": "s--"}
SHOTS = 1, 2, 4, 8, 16


def curves(dataset, model="tiny"):
    """{(method, clean or PGD): [(shots, mean, deviation), ...]}; shots 0 are zero-shot's, of no method."""
    points = {}
    for _, row, files in runs("shots", model, [dataset]):
        if found := read("shots", files):
            method, _, shots = row.partition(", ")
            for key in STYLES:
                values = [scores(r)[0][key] for r in found]
                deviation = statistics.stdev(values) if len(values) > 1 else 0
                points.setdefault((method, key), []).append((int(shots.split()[0]) if shots else 0, statistics.mean(values), deviation))
    return points


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--datasets", nargs="+", default=BOTH)
    args = parser.parse_args()
    name, eps = ("small CLIP", 3) if args.model == "tiny" else (args.model, 1)
    figure = Figure((1 + 3.5 * len(args.datasets), 3.6), layout="constrained")
    panels, = figure.subplots(1, len(args.datasets), sharey=True, squeeze=False)
    for axes, dataset in zip(panels, args.datasets):
        for (method, key), points in curves(dataset, args.model).items():
            shots, means, deviations = zip(*sorted(points))
            if shots == (0,):
                axes.axhline(means[0], color="black", linestyle="-" if key == "clean" else "--", linewidth=0.9, label=f"zero-shot, {key}")
            else:
                axes.errorbar(shots, means, deviations, fmt=STYLES[key], color=COLOURS[method], markersize=4, capsize=2, label=f"{method}, {key}")
        axes.set_xscale("log", base=2)
        axes.set(title=f"{name}, {dataset}", xlabel="training images per class", xticks=SHOTS, xticklabels=SHOTS, ylim=(0, 100))
    panels[0].set_ylabel(f"accuracy [%] (PGD: PGD-100, eps {eps}/255)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(HERE / ("" if args.model == "tiny" else args.model) / "shots.png", dpi=150)


if __name__ == "__main__":
    main()
