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
VAL = "--split val --test-steps 20 --steps 150 --test-limit 200 --after-only"    # arguments are chosen on val, with a cheaper attack
PLAIN = "--init gaussian --no-align --no-adaptive"
# table -> (datasets, seeds, {row: command}); "zero-shot" is AdvMask with masks of ones
TABLES = {
    "main": (BOTH, SEEDS, {
        "AdvMask": "advmask.py --after-only", "AdvMask, lambda 50": "advmask.py --lam 50 --after-only",
        "AdvLoRA": "advlora.py --after-only", "full fine-tuning": "advlora.py --full --after-only",
        "plain LoRA": f"advlora.py {PLAIN} --after-only", "AdvLoRA, SVD start": "advlora.py --init svd --after-only",
        "AdvLoRA, not aligned": "advlora.py --no-align --after-only", "AdvLoRA, not adaptive": "advlora.py --no-adaptive --after-only"}),
    "zero-shot": (BOTH, (1,), {f"eps {k}/255": f"advmask.py --steps 1 --lr 0 --eps {k}/255 --after-only" for k in (1, 2, 3)}),
    "choices": (("caltech101",), (1,), {
        row: f"advmask.py {VAL} {row.removeprefix('defaults')}" for row in (
            "defaults", "--lam 0", "--lam 50", "--lam 500", "--budget 0.75", "--budget 3", "--steps 300 --budget 3", "--optimizer adam --budget 1.5",
            "--layers mlp", "--layers both", "--features mean", "--raw --lam 0.5", "--attached", "--augment none")}),
    "lora": (("caltech101",), (1,), {
        row: f"advlora.py {VAL} {row.removeprefix('defaults')}" for row in (
            "defaults", "--lr 5e-4", "--lr 5e-3", "--rank 4", "--rank 16", "--targets both", "--towers both", f"{PLAIN}", f"{PLAIN} --lr 5e-3",
            "--clean-weight 0.5", "--full", "--full --lr 3e-5", "--full --lr 1e-4", "--full --lr 1e-3")}),
    "logit-scale": (("caltech101",), (1,), {
        f"s = {s}, lambda {lam}": f"advmask.py {VAL} --logit-scale {s} --lam {lam}" for s in (17, 100) for lam in (0, 10, 50, 250)}),
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
    lines = ["| images | run | seeds | clean | PGD | best iterate | trained | seconds | MiB |", "|---|---|---|---|---|---|---|---|---|"]
    for dataset in datasets:
        for row in rows:
            found = [json.loads(f.read_text()) for seed in seeds if (f := result(name, dataset, row, seed)).exists()]
            if not found:
                continue
            cells = []
            for key in ("clean", "pgd", "pgd_best"):
                values = [r["after"][key] for r in found]
                cells.append(f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""))
            off = statistics.mean(100 * r.get("flipped", 0) for r in found)
            cells.append(f"{found[0]['trained']:,}" if "trained" in found[0] else f"{found[0]['masked']:,} bits, {off:.1f} % off" if off else "0")
            cells += [f"{statistics.mean(r[key] for r in found):.0f}" for key in ("training_seconds", "peak_memory_mib")]
            images = f"{dataset}, {len(found[0]['after']['outcomes'])} {found[0]['split']}, PGD-{found[0]['test_steps']}"
            lines.append(f"| {images} | {row} | {len(found)} | {' | '.join(cells)} |")
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
