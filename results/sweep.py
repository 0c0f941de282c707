"""Run the experiments of results/experiments.py, and print the README's tables from their JSON files.

    python results/sweep.py main --jobs 2            # run what is missing of a table, two programs at a time (--data-root for photographs)
    python results/sweep.py main --list              # only print the commands; --slurm FILE: write them as a job array for a cluster
    python results/sweep.py --table                  # Markdown of every table from results/*/*.json: what the README shows

A run's result.json is kept as results/<table>/<dataset>~<row>~<seed>.json once it is complete, so a killed sweep goes on where it stopped.
All results here are the small CLIP's (tiny/), never ViT-B/32's; those of --model NAME are kept in results/NAME/.
"""
import argparse
import concurrent.futures
import os
import pathlib
import shlex
import statistics
import subprocess

from experiments import MEANS, PUBLISHED, TABLES, commands, read, refuse, runs, scores


def run(file, command, jobs):
    """One program; its result.json is moved into place when it is complete."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{file}.log", "w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": f"{max(1, (os.cpu_count() or 1) // jobs)}"})
    os.replace(next(pathlib.Path(command[-1]).glob("*/result.json")), file)
    os.remove(f"{file}.log")


def job_array(missing):
    """A script for sbatch: one command a task, none where the result is there by then."""
    tasks = [f"{i}) [ -e {shlex.quote(str(file))} ] || {{ mkdir -p {shlex.quote(str(file.parent))} && {shlex.join(command)} &&"
             f" mv {shlex.quote(command[-1])}/*/result.json {shlex.quote(str(file))}; }} ;;" for i, (file, command) in enumerate(missing.items())]
    head = ["#!/bin/bash", f"#SBATCH --array=0-{len(missing) - 1}", "#SBATCH --gres=gpu:1 --cpus-per-task=4", "case $SLURM_ARRAY_TASK_ID in"]
    return "\n".join([*head, *tasks, "esac", ""])


def table(name, model="tiny", datasets=()):
    """Markdown: one line per dataset and row, mean ± standard deviation over the seeds that are there."""
    columns, lines, published = ("clean", "PGD", "best iterate"), [], PUBLISHED.get(name)
    for dataset, row, files in runs(name, model, datasets):
        if not (found := read(name, files)):
            continue
        values, counts = zip(*map(scores, found))
        columns, r, off = tuple(values[0]), found[0], statistics.mean(100 * r.get("flipped", 0) for r in found)
        cells = [f"{statistics.mean(v):.1f}" + (f" ± {statistics.stdev(v):.1f}" if len(v) > 1 else "") for v in zip(*(v.values() for v in values))]
        cells.append(f"{r['trained']:,}" if "trained" in r else f"{r['masked']:,} bits, {off:.1f} % off" if off else "0")
        cells += [f"{statistics.mean(r[key] for r in found):.0f}" for key in ("training_seconds", "peak_memory_mib")]
        cells += [published.get(row, "")] if published else []
        lines.append([f"{dataset}, {counts[0]} {r['split']}, PGD-{r['test_steps']}", row, f"{len(found)}", *cells])
    columns = ["images", f"run, {model.replace('tiny', 'small CLIP')}" if published else "run", "seeds", *columns, "trained", "seconds", "MiB"]
    columns += [f"published, ViT-B/32, {MEANS[name]}"] if published else []
    return "\n".join(["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|", *("| " + " | ".join(line) + " |" for line in lines)])


parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("tables", nargs="*", default=list(TABLES), help=f"of {', '.join(TABLES)}; default all")
parser.add_argument("--list", action="store_true", help="print the commands of the missing runs")
parser.add_argument("--table", action="store_true", help="print the tables")
parser.add_argument("--slurm", type=pathlib.Path, metavar="FILE", help="write the missing runs as a job array, for sbatch")
parser.add_argument("--jobs", type=int, default=1, help="programs at a time; each gets its share of the cores")
parser.add_argument("--data-root", type=pathlib.Path, default=pathlib.Path("data"))
parser.add_argument("--model", default="tiny", help="--model of every run")
parser.add_argument("--datasets", nargs="+", default=[], help="in place of embedded and caltech101; the targets of the table transfer")
parser.add_argument("--more", type=shlex.split, default=[], help="more arguments for every run, in one string: --more='--pretrained FILE'")

if __name__ == "__main__":
    args = parser.parse_args()
    if unknown := [name for name in args.tables if name not in TABLES]:
        refuse(f"unknown table {', '.join(unknown)}; expected some of {', '.join(TABLES)}")
    every = [job for name in args.tables for job in commands(name, args.data_root.resolve(), args.model, args.datasets, args.more)]
    missing = {file: command for file, command in every if not file.exists() and not args.table}
    print("".join(f"{shlex.join(command)}\n" for command in missing.values()), end="", flush=True)
    if args.table:
        print("\n\n".join(f"<!-- table {name} -->\n{table(name, args.model, args.datasets)}\n<!-- end -->" for name in args.tables))
    elif args.slurm:
        args.slurm.write_text(job_array(missing)) if missing else refuse("no result is missing: there is nothing for a job array to do")
    elif not args.list:
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda job: run(*job, args.jobs), missing.items()))
