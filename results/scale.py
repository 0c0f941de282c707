"""Method or scale? What the table scale does not show: paired differences, and movement of weights.

    python tiny/pretrain.py --data-root DATA --width 96         # and 192, 288, 384
    python results/sweep.py scale scale-val --data-root DATA    # the runs
    python results/scale.py                                     # keep the CLIPs, measure adapters
    python results/scale.py --write                             # put the tables into RESULTS.md

The difference of two rows is counted image by image, and its 95 % interval is over the images: with
d_i the mean over seeds of (right in the first) - (right in the second), mean(d) +- 1.96 sd(d) /
sqrt(n). A line of clips.jsonl is a CLIP, as tiny/pretrain.py measured it. A line of movement.jsonl
is a run's adapter:

attention and tower are |theta' - theta| / |theta|, with the norm over all entries of the attention
matrices, which AdvMask masks, and over all of the image tower. off is the share of the attention's
entries that became zero, and size their mean |theta|, as a share of the mean |theta| of all.
"""

import argparse
import importlib
import json
import os
import pathlib
import statistics
import sys

import torch

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
import sweep
from experiments import WIDTHS

import common

FILE = HERE / "movement.jsonl"
CLIPS_FILE = HERE / "clips.jsonl"
PAGE = HERE / "RESULTS.md"
CLIPS = "<!-- clips -->"
DIFFERENCES = "<!-- differences -->"
MOVEMENT = "<!-- movement -->"
OTHERS = "TeCoA", "AdvLoRA"  # what AdvMask is compared with
PROGRAMS = {"advmask": "advmask", "advlora": "advlora", "tecoa": "baselines.tecoa"}


# ------------------------------------------------------------------------------------------------
# The CLIPs
# ------------------------------------------------------------------------------------------------


def keep_clips():
    """Keep what pre-training said of the CLIPs that are in tiny/work."""
    kept = {line["width"]: line for line in sweep.read_lines(CLIPS_FILE)}
    for width in WIDTHS:
        card = ROOT / "tiny" / "work" / f"width-{width}" / "pretrain.json"
        if card.exists():
            kept[width] = json.loads(card.read_text())
    sweep.write_lines(CLIPS_FILE, list(kept.values()), lambda line: line["width"])


def clips():
    """The CLIPs as Markdown: zero-shot accuracy on all test images."""
    head = ["width", "image tower", "zero-shot, caltech101", "zero-shot, embedded", "logit scale"]
    body = []
    for line in sweep.read_lines(CLIPS_FILE):
        accuracies = line["zero_shot_caltech101_test"], line["zero_shot_embedded_test"]
        cells = [str(line["width"]), f"{line['image_tower_parameters']:,}"]
        body.append([*cells, *(f"{value:.1f}" for value in (*accuracies, line["logit_scale"]))])
    return sweep.markdown(head, body)


# ------------------------------------------------------------------------------------------------
# Differences
# ------------------------------------------------------------------------------------------------


def paired(first, second, right):
    """Outcomes of two methods (seeds, images) -> the mean difference in points, its interval.

    right: the digits that count as right, "12" of a clean image, "2" of an attacked one. Every
    seed of `first` has its partner in `second`.
    """
    seeds = []
    for a, b in zip(first, second, strict=True):
        pairs = zip(a, b, strict=True)
        seeds.append([(x in right) - (y in right) for x, y in pairs])
    d = 100 * torch.tensor(seeds, dtype=torch.float64).mean(0)
    half = 1.96 * d.std().item() / len(d) ** 0.5
    return d.mean().item(), d.mean().item() - half, d.mean().item() + half


def outcomes(row):
    """{seed: outcomes} of a row of the table scale."""
    lines = sweep.find("scale", row, "caltech101")
    if lines is None:
        return {}
    return {line["seed"]: line["after"]["outcomes"] for line in lines.lines}


def differences():
    """AdvMask minus another method, at every width, as Markdown."""
    head = ["width", "AdvMask minus", "seeds", "clean", "PGD-100"]
    body = []
    for width in WIDTHS:
        mine = outcomes(f"width {width}, AdvMask")
        for other in OTHERS:
            theirs = outcomes(f"width {width}, {other}")
            seeds = sorted(set(mine) & set(theirs))
            if not seeds:
                continue
            cells = [str(width), other, str(len(seeds))]
            for right in ("12", "2"):
                mean, low, high = paired(
                    [mine[k] for k in seeds], [theirs[k] for k in seeds], right
                )
                cells.append(f"{mean:+.1f} ({low:+.1f} to {high:+.1f})")
            body.append(cells)
    return sweep.markdown(head, body)


# ------------------------------------------------------------------------------------------------
# Movement
# ------------------------------------------------------------------------------------------------


def weights(clip):
    """{name: theta} of the image tower."""
    return {name: p.detach().float() for name, p in clip.visual.named_parameters()}


def movement(before, after, names):
    """|theta' - theta| / |theta| over these weights."""
    moved = sum((after[name] - before[name]).square().sum().item() for name in names)
    length = sum(before[name].square().sum().item() for name in names)
    return (moved / length) ** 0.5


def switched_off(before, after, names):
    """-> the share of the entries that became zero; the mean |theta| of these by that of all."""
    theta = torch.cat([before[name].flatten() for name in names])
    off = (torch.cat([after[name].flatten() for name in names]) == 0) & (theta != 0)
    if not off.any():
        return 0.0, None
    return off.float().mean().item(), (theta[off].abs().mean() / theta.abs().mean()).item()


def measure(folder):
    """What the run that left this folder did to the weights -> dict."""
    _, facts = common.load_adapter(folder, None, ["commit"])
    clip, _ = common.load_clip(facts["model"], facts["pretrained"])
    before = weights(clip)
    program = importlib.import_module(PROGRAMS[facts["method"]])
    after = weights(program.load(folder).clip)
    attention = [name for name in before if name.endswith(("in_proj_weight", "out_proj.weight"))]
    off, size = switched_off(before, after, attention)
    return {
        "method": facts["method"],
        "model": facts["model"],
        "commit": facts["commit"],
        "attention": movement(before, after, attention),
        "tower": movement(before, after, list(before)),
        "off": off,
        "size": size,
    }


def identity(line):
    """What there is one line of."""
    return line["row"], line["seed"]


def collect():
    """Measure the adapters of the table scale that have no line yet."""
    have = {identity(line) for line in sweep.read_lines(FILE)}
    for run in sweep.runs(["scale"]):
        if run.adapter() and (run.row, run.seed) not in have:
            moved = measure(run.adapter().parent)
            line = {"row": run.row, "seed": run.seed, **sweep.shorten(moved)}
            sweep.write_lines(FILE, [*sweep.read_lines(FILE), line], identity)
            print(json.dumps(line), flush=True)


def movements():
    """The lines as Markdown, in the order of the table scale."""
    head = ["run", "seeds", "attention moved", "image tower moved", "attention off", "their size"]
    body = []
    for row in sweep.TABLES["scale"].rows:
        lines = [line for line in sweep.read_lines(FILE) if line["row"] == row]
        if not lines:
            continue
        cells = [row, str(len(lines))]
        for key in ("attention", "tower"):
            cells.append(f"{100 * statistics.mean(line[key] for line in lines):.1f} %")
        off, size = "", ""
        if lines[0]["off"]:
            off = f"{100 * statistics.mean(line['off'] for line in lines):.1f} %"
            size = f"{statistics.mean(line['size'] for line in lines):.2f}"
        body.append([*cells, off, size])
    return sweep.markdown(head, body)


# ------------------------------------------------------------------------------------------------
# The program
# ------------------------------------------------------------------------------------------------


def fill(text):
    """The page with the tables between their markers."""
    text = sweep.put(text, CLIPS, clips())
    text = sweep.put(text, DIFFERENCES, differences())
    return sweep.put(text, MOVEMENT, movements())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the tables into RESULTS.md")
    if parser.parse_args().write:
        common.write(PAGE, fill(PAGE.read_text(encoding="utf-8")).encode())
        return
    os.chdir(sweep.ROOT)  # as the runs were: their models are in tiny/work
    keep_clips()
    collect()


if __name__ == "__main__":
    common.guard(main)
