"""Run the experiments behind the README's tables, and print the tables from their JSON files.

    python results/sweep.py main --jobs 2            # run what is missing of a table, two programs at a time (--data-root for photographs)
    python results/sweep.py main --list              # only print the commands
    python results/sweep.py --table                  # Markdown of every table from results/*/*.json: what the README shows

A run's result.json is kept as results/<table>/<dataset>~<row>~<seed>.json once it is complete, so a killed sweep goes on where it stopped.
All results here are the small CLIP's (tiny/), never ViT-B/32's.
"""
import argparse
import concurrent.futures
import json
import os
import pathlib
import re
import shlex
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
BOTH, SEEDS = ("embedded", "caltech101"), (1, 2, 3)
VAL = "advmask.py --split val --test-steps 20 --steps 150 --test-limit 200"    # arguments are chosen on val, with a cheaper attack
FINETUNE = VAL.replace("advmask", "baselines/finetune")
NOTHING = "advmask.py --steps 1 --lr 0 --test-limit 400"                        # masks of ones: zero-shot
# table -> (datasets, seeds, {row: command})
TABLES = {
    "main": (BOTH, SEEDS, {"AdvMask": "advmask.py", "full fine-tuning": "baselines/finetune.py"}),
    "eps": (BOTH, (1,), {f"zero-shot, eps {k}/255": f"{NOTHING} --eps {k}/255" for k in (2, 3)}),
    "choices": (("caltech101",), (1,), {
        "defaults": VAL,
        **{row: f"{VAL} {row}" for row in (
            "--lam 0", "--lam 10", "--lam 150", "--lam 500", "--budget 1", "--budget 10", "--optimizer adam --budget 3",
            "--optimizer adam --budget 12", "--layers mlp", "--layers both", "--features mean", "--raw --lam 0.5", "--attached", "--augment none",
            "--loss align", "--loss js", "--loss kl", "--steps 400")},
        **{f"full fine-tuning {more}": f"{FINETUNE} {more}" for more in ("--lr 3e-5", "--lr 1e-4", "--lr 3e-4")},
    }),
    "logit-scale": (("caltech101",), (1,), {
        f"s = {s}, lambda {lam}": f"{VAL} --logit-scale {s} --lam {lam}" for s in (17, 100) for lam in (0, 10, 50, 250)}),
}


def result(name, dataset, row, seed):
    """results/<table>/<dataset>~<row>~<seed>.json"""
    return HERE / name / f"{dataset}~{re.sub('[^a-zA-Z0-9.]+', '-', row).strip('-')}~{seed}.json"


def commands(name, root):
    """[(result file, command)] of a table."""
    datasets, seeds, rows = TABLES[name]
    for dataset in datasets:
        for row, command in rows.items():
            script, *rest = command.split()
            for seed in seeds:
                fixed = ["--model", "tiny", "--dataset", dataset, "--seed", str(seed), "--data-root", str(root)]
                yield result(name, dataset, row, seed), [sys.executable, str(HERE.parent / script), *rest, *fixed]


def run(file, command, jobs):
    """One program; its result.json is moved into place when it is complete."""
    out = HERE.parent / "runs" / "sweep" / file.parent.name / file.stem
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    with open(f"{file}.log", "w") as log:
        subprocess.run([*command, "--out", str(out)], check=True, stdout=log, stderr=log, env={**os.environ, **threads})
    os.replace(next(out.glob("*/result.json")), file)
    os.remove(f"{file}.log")


def table(name):
    """Markdown: one line per dataset and row, mean ± standard deviation over the seeds that are there."""
    datasets, seeds, rows = TABLES[name]
    lines = ["| images | run | seeds | clean | PGD | PGD best iterate | off | seconds |", "|---|---|---|---|---|---|---|---|"]
    for dataset in datasets:
        files = {row: [result(name, dataset, row, seed) for seed in seeds] for row in rows}
        found = [(row, [json.loads(f.read_text()) for f in some if f.exists()]) for row, some in files.items() if any(f.exists() for f in some)]
        for row, results in ([("zero-shot", found[0][1][:1])] if found else []) + found:
            scores = [r["before" if row == "zero-shot" else "after"] for r in results]
            cells = []
            for key in ("clean", "pgd", "pgd_best"):
                values = [s[key] for s in scores]
                cells.append(f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""))
            off = [100 * r["flipped"] for r in results if "flipped" in r] if row != "zero-shot" else []
            seconds = f"{statistics.mean(r['training_seconds'] for r in results):.0f}" if row != "zero-shot" else ""
            first = results[0]
            images = f"{dataset}, {len(scores[0]['outcomes'])} {first['split']}, PGD-{first['test_steps']}"
            lines.append(f"| {images} | {row} | {len(scores) if row != 'zero-shot' else ''} | {' | '.join(cells)} | "
                         f"{f'{statistics.mean(off):.1f} %' if off else ''} | {seconds} |")
    return "\n".join(lines)


parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("tables", nargs="*", help=f"of {', '.join(TABLES)}; default all")
parser.add_argument("--list", action="store_true", help="print the commands of the missing runs")
parser.add_argument("--table", action="store_true", help="print the tables")
parser.add_argument("--jobs", type=int, default=1, help="programs at a time; each gets its share of the cores")
parser.add_argument("--data-root", type=pathlib.Path, default=pathlib.Path("data"))

if __name__ == "__main__":
    args = parser.parse_args()
    names = args.tables or list(TABLES)
    if args.table:
        print("\n\n".join(f"<!-- table {name} -->\n{table(name)}\n<!-- end -->" for name in names))
    else:
        missing = [(file, command) for name in names for file, command in commands(name, args.data_root) if not file.exists()]
        for _, command in missing:
            print(shlex.join(command), flush=True)
        if not args.list:
            for file, _ in missing:
                file.parent.mkdir(exist_ok=True)
            with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
                list(pool.map(lambda job: run(*job, args.jobs), missing))
