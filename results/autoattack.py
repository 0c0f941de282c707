"""AutoAttack on every method of the table rivals, a line a run in autoattack.jsonl, and its table.

    python results/autoattack.py --data-root DATA           # what is missing: a long wait
    python results/autoattack.py --data-root DATA --list    # only print the missing commands
    python results/autoattack.py --write                    # put the table into RESULTS.md

It takes the adapters that `python results/sweep.py main rivals` left in runs/sweep, of the first
seed, and lets results/second_opinion.py attack 200 images with PGD-100 to its end and with
AutoAttack. A line is that program's answer. All are the small CLIP's. Of the published recipes it
takes one, AdvVLP's.
"""

import argparse
import json
import pathlib
import shlex

import sweep
from experiments import BOTH, TABLES, Same

import common

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
FILE = HERE / "autoattack.jsonl"
PAGE = HERE / "RESULTS.md"
SEED, IMAGES = 1, 200
# the published recipe that is attacked, too: the most robust one of prompts
PUBLISHED = "AdvVLP, published recipe"
ATTACKS = "APGD-CE", "APGD-T", "FAB-T", "Square"
MARKER = "<!-- autoattack -->"


def read():
    """The lines -> {(dataset, row of the table rivals): line}."""
    return {(line["dataset"], line["row"]): line for line in sweep.read_lines(FILE)}


def order(line):
    """Sorts lines as the table rivals has them."""
    return BOTH.index(line["dataset"]), list(TABLES["rivals"].rows).index(line["row"])


def keep(row, file):
    """Keep an answer of second_opinion.py as the line of this row, on the answer's dataset."""
    lines = read()
    line = {"row": row, **sweep.shorten(json.loads(file.read_text()))}
    lines[line["dataset"], row] = line
    sweep.write_lines(FILE, list(lines.values()), order)


def adapter(dataset, row):
    """What second_opinion.py is to attack. Raises common.Fault where a run left no adapter."""
    if row == "zero-shot":
        return "tiny"
    source = TABLES["rivals"].rows[row]
    table, name = source if isinstance(source, Same) else ("rivals", row)
    for run in sweep.runs([table]):
        if (run.row, run.dataset, run.seed) == (name, dataset, SEED):
            if run.adapter():
                return str(run.adapter().parent)
            command = shlex.join(sweep.full_command(run, "DATA", "python"))
            raise common.Fault(f"{row} has no adapter in {run.folder}; make it with: {command}")


def missing():
    """[(dataset, row)] that have no line yet: every method by its defaults, and PUBLISHED."""
    have = read()
    pairs = []
    for dataset in BOTH:
        for row in TABLES["rivals"].rows:
            asked = row == PUBLISHED or not row.endswith(", published recipe")
            if asked and (dataset, row) not in have:
                pairs.append((dataset, row))
    return pairs


def table():
    """The table as Markdown: % of the 200 images that are right."""
    head = ["images", "run", "clean", "PGD-100, final", "PGD-100, best", *ATTACKS]
    body = []
    for (dataset, row), line in read().items():
        answer = line["autoattack"]
        (pgd,) = line["pgd"]
        values = [line["clean"], pgd["final"], pgd["best"], *(answer[name] for name in ATTACKS)]
        body.append([dataset, row, *(f"{value:.1f}" for value in values)])
    return sweep.markdown(head, body)


def fill(text):
    """The page with the table between its markers."""
    return sweep.put(text, MARKER, table())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--list", action="store_true", help="print the commands of what is missing")
    add("--write", action="store_true", help="put the table into RESULTS.md")
    add("--data-root", type=pathlib.Path, default=pathlib.Path("data"), help="folder of the data")
    args = parser.parse_args()
    if args.write:
        common.write(PAGE, fill(PAGE.read_text(encoding="utf-8")).encode())
        return
    for dataset, row in missing():
        out = ROOT / "runs" / "autoattack" / f"{dataset}-{sweep.file_name(row)}"
        words = ["python", "results/second_opinion.py", adapter(dataset, row)]
        words += ["--dataset", dataset]
        words += ["--test-limit", str(IMAGES), "--autoattack", str(IMAGES)]
        words += ["--data-root", str(args.data_root.resolve()), "--out", str(out)]
        print(shlex.join(words), flush=True)
        if args.list:
            continue
        sweep.run_here(words, row)
        # of several answers in the folder the newest
        keep(row, max(out.glob("second_opinion*.json"), key=lambda file: file.stat().st_mtime))


if __name__ == "__main__":
    common.guard(main)
