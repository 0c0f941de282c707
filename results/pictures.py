"""Draw the curve over shots, clean and PGD-100, from the results of `python results/sweep.py shots` -> results/shots.png.

    python results/pictures.py

Mean and standard deviation over the seeds that are there; the colours are Okabe and Ito's, which colour-blind people tell apart.
"""
import statistics

from matplotlib.figure import Figure

from experiments import BOTH, HERE, METHODS, read, runs, scores

COLOURS, STYLES = dict(zip(METHODS, ("#0072B2", "#D55E00"))), {"clean": "o-", "PGD": "s--"}
SHOTS = 1, 2, 4, 8, 16


def curves(dataset):
    """{(method, clean or PGD): [(shots, mean, deviation), ...]}; shots 0 are zero-shot's, of no method."""
    points = {}
    for where, row, files in runs("shots"):
        if where == dataset and (found := read("shots", files)):
            method, _, shots = row.partition(", ")
            for key in STYLES:
                values = [scores(r)[0][key] for r in found]
                deviation = statistics.stdev(values) if len(values) > 1 else 0
                points.setdefault((method, key), []).append((int(shots.split()[0]) if shots else 0, statistics.mean(values), deviation))
    return points


def main():
    panels = (figure := Figure((8, 3.6), layout="constrained")).subplots(1, len(BOTH), sharey=True)
    for axes, dataset in zip(panels, BOTH):
        for (method, key), points in curves(dataset).items():
            shots, means, deviations = zip(*sorted(points))
            if shots == (0,):
                axes.axhline(means[0], color="black", linestyle="-" if key == "clean" else "--", linewidth=0.9, label=f"zero-shot, {key}")
            else:
                axes.errorbar(shots, means, deviations, fmt=STYLES[key], color=COLOURS[method], markersize=4, capsize=2, label=f"{method}, {key}")
        axes.set_xscale("log", base=2)
        axes.set(title=f"small CLIP, {dataset}", xlabel="training images per class", xticks=SHOTS, xticklabels=SHOTS, ylim=(0, 100))
    panels[0].set_ylabel("accuracy [%] (PGD: PGD-100, eps 3/255)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(HERE / "shots.png", dpi=150)


if __name__ == "__main__":
    main()
