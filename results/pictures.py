"""Draw the results: curves over shots and over widths, clean against robust accuracy.

    python results/pictures.py    # --model and --datasets as sweep.py had them

Writes shots.png, methods.png and rivals.png in results/, or in results/<model>/; of the small CLIP
scale.png as well. Mean and standard deviation over the seeds that are there; the colours are Okabe
and Ito's and two more, which colour-blind people tell apart.
"""

import argparse
import io
import statistics

import sweep
from experiments import BOTH, TABLES, WIDTHS
from matplotlib.figure import Figure

import common

COLOURS = {
    "zero-shot": "#000000",
    "AdvMask": "#0072B2",
    "AdvLoRA": "#D55E00",
    "TeCoA": "#009E73",
    "TGA-ZSR": "#E69F00",
    "AdvVP": "#56B4E9",
    "AdvVLP": "#CC79A7",
    "AdvMaPLe": "#999999",
    "FAP": "#8B4513",
}
MARKS = {
    "zero-shot": "X",
    "AdvMask": "o",
    "AdvLoRA": "s",
    "TeCoA": "D",
    "TGA-ZSR": "d",
    "AdvVP": "P",
    "AdvVLP": "v",
    "AdvMaPLe": "^",
    "FAP": "*",
}
STYLES = {"clean": "o-", "PGD": "s--"}
SHOTS = (1, 2, 4, 8, 16)


def spread(values):
    """-> mean, standard deviation (0 of a single value)."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0
    return statistics.mean(values), deviation


def curves(dataset, model="tiny"):
    """{(method, clean or PGD): [(shots, mean, deviation), ...]}; zero-shot has 0 shots."""
    points = {}
    for name in TABLES["shots"].rows:
        row = sweep.find("shots", name, dataset, model)
        if row is None:
            continue
        method, _, shots = name.partition(", ")
        number = int(shots.split()[0]) if shots else 0
        for key in STYLES:
            curve = points.setdefault((method, key), [])
            curve.append((number, *spread(row.values[key])))
    return points


def marks(table, dataset, model="tiny"):
    """{row: ((mean, deviation) of clean, (mean, deviation) of PGD)} of a table."""
    found = {}
    for name in TABLES[table].rows:
        row = sweep.find(table, name, dataset, model)
        if row is not None:
            found[name] = spread(row.values["clean"]), spread(row.values["PGD"])
    return found


def panels(datasets, model, width):
    """A white figure with a panel for every dataset, and their titles."""
    figure = Figure((1 + width * len(datasets), 3.6), layout="constrained", facecolor="white")
    axes = figure.subplots(1, len(datasets), sharex=True, sharey=True, squeeze=False)[0]
    for panel, dataset in zip(axes, datasets):
        panel.set_title(f"{'small CLIP' if model == 'tiny' else model}, {dataset}")
    return figure, axes


def draw_legend(figure, axes):
    """Each name once: a row may have runs on one dataset alone."""
    named = {}
    for panel in axes:
        handles, labels = panel.get_legend_handles_labels()
        named.update(zip(labels, handles))
    figure.legend(named.values(), named.keys(), loc="outside right upper", fontsize="small")


def draw_shots(datasets, model, eps):
    """Accuracy over shots, clean and under PGD."""
    figure, axes = panels(datasets, model, 3.5)
    for panel, dataset in zip(axes, datasets):
        for (method, key), points in curves(dataset, model).items():
            shots, means, deviations = zip(*sorted(points))
            label = f"{method}, {key}"

            colour = COLOURS[method]
            if method == "zero-shot":
                line = STYLES[key][1:]
                panel.axhline(means[0], color=colour, linestyle=line, linewidth=0.9, label=label)
                continue
            if len(shots) == 1:  # no curve yet
                continue
            options = {"color": colour, "markersize": 4, "capsize": 2, "label": label}
            panel.errorbar(shots, means, deviations, fmt=STYLES[key], **options)
        panel.set_xscale("log", base=2)
        panel.set(xlabel="training images per class", xticks=SHOTS, xticklabels=SHOTS)
        panel.set_ylim(0, 100)
    axes[0].set_ylabel(f"accuracy [%] (PGD: PGD-100, eps {eps}/255)")
    draw_legend(figure, axes)
    return figure


def draw_marks(table, datasets, model, eps):
    """Robust against clean accuracy: a mark a row, its deviation over seeds as a cross.

    The mark of a published recipe is hollow.
    """
    figure, axes = panels(datasets, model, 3.2)
    for panel, dataset in zip(axes, datasets):
        for name, (clean, robust) in marks(table, dataset, model).items():
            method, _, published = name.partition(", ")
            options = {"fmt": MARKS[method], "color": COLOURS[method], "capsize": 2}
            if published:
                options["markerfacecolor"] = "white"
            panel.errorbar(clean[0], robust[0], robust[1], clean[1], label=name, **options)
        panel.set_xlabel("clean accuracy [%]")
        panel.margins(0.15)
        panel.set_ylim(bottom=0)
        panel.grid(color="#dddddd", linewidth=0.6)
    axes[0].set_ylabel(f"accuracy under PGD-100 [%], eps {eps}/255")
    draw_legend(figure, axes)
    return figure


def over_widths(key):
    """{method: [(width, mean, deviation), ...]} of the table scale; key: clean or PGD."""
    curves = {}
    for width in WIDTHS:
        for method in ("zero-shot", "AdvMask", "AdvLoRA", "TeCoA"):
            row = sweep.find("scale", f"width {width}, {method}", "caltech101")
            if row is not None:
                curves.setdefault(method, []).append((width, *spread(row.values[key])))
    return curves


def draw_scale():
    """Accuracy over the width of the image tower, a panel of clean images and one under PGD."""
    figure = Figure((8, 3.6), layout="constrained", facecolor="white")
    axes = figure.subplots(1, 2)
    titles = {"clean": "caltech101, clean", "PGD": "caltech101, PGD-100, eps 3/255"}
    for panel, (key, title) in zip(axes, titles.items()):
        for method, points in over_widths(key).items():
            widths, means, deviations = zip(*points)
            options = {"fmt": f"{MARKS[method]}-", "color": COLOURS[method], "capsize": 2}
            panel.errorbar(widths, means, deviations, label=method, **options)
        panel.set_title(title)
        panel.set(xlabel="width of the small CLIP's image tower", xticks=WIDTHS)
        panel.set_ylim(bottom=0)
        panel.grid(color="#dddddd", linewidth=0.6)
    axes[0].set_ylabel("accuracy [%]")
    draw_legend(figure, axes)
    return figure


def save(figure, path):
    """Write a figure as a PNG, whole or not at all."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    common.write(path, png.getvalue())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny", help="--model of the runs")
    parser.add_argument("--datasets", nargs="+", default=BOTH, help="a panel for each")
    args = parser.parse_args()
    eps = 3 if args.model == "tiny" else 1
    folder = sweep.file_of("main", args.model).parent
    if not folder.is_dir():
        raise common.Fault(f"{folder} is missing: there are no results of {args.model} yet")
    save(draw_shots(args.datasets, args.model, eps), folder / "shots.png")
    for table, file in (("main", "methods.png"), ("rivals", "rivals.png")):
        save(draw_marks(table, args.datasets, args.model, eps), folder / file)
    if args.model == "tiny":
        save(draw_scale(), folder / "scale.png")


if __name__ == "__main__":
    common.guard(main)
