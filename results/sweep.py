"""Run the experiments of results/experiments.py, keep a line a run, and print the tables.

    python results/sweep.py main --data-root DATA --jobs 2    # run what is missing of a table
    python results/sweep.py main --list                       # only print the missing commands
    python results/sweep.py main --slurm jobs.sh              # write them as a job array
    python results/sweep.py main --take runs/advmask-*        # keep runs that were made by hand
    python results/sweep.py --table                           # print the tables as Markdown
    python results/sweep.py --write                           # put them between the pages' markers

A finished run is a line of results/<table>.jsonl; results/README.md explains its keys. A killed
sweep goes on where it was. All results here are the small CLIP's, in tiny/, never ViT-B/32's; those
of --model NAME are kept in results/NAME/. Let one sweep at a time write a table.
"""

import argparse
import concurrent.futures
import functools
import importlib
import json
import os
import pathlib
import random
import shlex
import statistics
import subprocess
import sys
import threading
from typing import NamedTuple

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
from experiments import BOTH, PUBLISHED, TABLES, Same, ZeroShot, command, file_name

import common

PAGES = (ROOT / "README.md", HERE / "RESULTS.md", HERE / "CHOICES.md")
# what a line tells besides the arguments of its run
FACTS = {
    "table", "row", "versions", "commit", "device", "device_name", "processes", "peak_memory_mib",
    "left_out",
    "before", "after", "masked", "off", "trained", "residual", "training_seconds", "seconds",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Lines
# ------------------------------------------------------------------------------------------------


def file_of(table, model="tiny"):
    """The file that holds a table's lines."""
    folder = HERE if model == "tiny" else HERE / file_name(model)
    return folder / f"{table}.jsonl"


def read_lines(file):
    """The lines of a file -> [dict]; none where there is no file yet."""
    if not file.exists():
        return []
    return [parse_json(line, file) for line in file.read_text().splitlines()]


def parse_json(text, file):
    """What the text, of this file, holds. Raises common.Fault where it is not JSON."""
    try:
        return json.loads(text)
    except ValueError as fault:
        raise common.Fault(f"{file} holds what is not JSON ({fault}); delete that, and go on")


def read(table, model="tiny"):
    """The lines of a table -> [dict]."""
    return read_lines(file_of(table, model))


def identity(line):
    """What there is one line of in a table."""
    return line["dataset"], line["row"], line["seed"]


writing = threading.Lock()


def keep(table, row, result, model="tiny"):
    """Add a run's result.json to its table, in place of the line of this dataset, row and seed."""
    line = {"table": table, "row": row, **shorten(result)}
    if result.get("residual"):
        # the mean over all blocks of all weights
        line["residual"] = shorten(statistics.mean(sum(result["residual"].values(), [])))
    with writing:
        lines = [other for other in read(table, model) if identity(other) != identity(line)]
        lines.append(line)
        write_lines(file_of(table, model), lines)


def write_lines(file, lines, order=identity):
    """Write a file of lines in their order, whole or not at all."""
    lines.sort(key=order)
    common.write(file, "".join(json.dumps(line) + "\n" for line in lines).encode())


def shorten(value):
    """The same with floats of six digits."""
    if isinstance(value, dict):
        return {key: shorten(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shorten(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return value


# ------------------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """One run of a table. words: its command, without the folders; folder: where it writes."""

    table: str
    row: str
    dataset: str
    seed: int
    words: list
    folder: pathlib.Path

    def result(self):
        """Its result.json, or None before it has ended."""
        return next(self.folder.glob("*/result.json"), None)

    def adapter(self):
        """Its adapter, of several the newest, which is the finished run's, or None."""
        found = self.folder.glob("*/adapter.safetensors")
        return max(found, key=lambda file: file.stat().st_mtime, default=None)


def runs(tables, model="tiny", datasets=(), more=()):
    """Every run of these tables -> [Run]."""
    everything = []
    for table in tables:
        spec = TABLES[table]
        for dataset in datasets_of(table, datasets):
            for row in spec.rows:
                words = command(table, row, model, datasets)
                if words is None or ("--model" in words and model != "tiny"):
                    continue
                for word in more:
                    word = word.partition("=")[0]
                    if word.startswith("--") and word in words:
                        raise common.Fault(
                            f"--more {word} would change the row {row!r}; leave it out"
                        )
                for seed in spec.seeds:
                    own = [] if "--model" in words else ["--model", model]
                    own += ["--dataset", dataset, "--seed", str(seed), *more]
                    folder = ROOT / "runs" / "sweep" / file_name(model) / table
                    folder /= f"{dataset}~{file_name(row)}~{seed}"
                    everything.append(Run(table, row, dataset, seed, words + own, folder))
    return everything


def datasets_of(table, datasets=()):
    """The datasets of a table, where --datasets names others."""
    own = TABLES[table].datasets
    return datasets if datasets and own == BOTH else own


def missing(everything, model):
    """The runs that have no line yet."""
    have = {}
    for table in {run.table for run in everything}:
        for line in read(table, model):
            have[table, *identity(line)] = line.get("transfer", [])
    left = []
    for run in everything:
        # the targets of a transfer are those of --datasets: others are another run
        if have.get((run.table, run.dataset, run.row, run.seed)) != targets(run.words):
            left.append(run)
    return left


def targets(words):
    """The values of --transfer in a command's words."""
    if "--transfer" not in words:
        return []
    values = words[words.index("--transfer") + 1 :]
    ends = [i for i, word in enumerate(values) if word.startswith("--")]
    return values[: ends[0]]


def full_command(run, data_root, python=sys.executable):
    """The words of a run's command, for a shell in the repository's root."""
    return [python, *run.words, "--data-root", str(data_root), "--out", str(run.folder)]


def collect(everything, model):
    """Keep the runs of a sweep, or of its job array, that have ended, but have no line yet."""
    for run in missing(everything, model):
        if run.result():
            keep(run.table, run.row, parse_json(run.result().read_text(), run.result()), model)
            run.result().unlink()  # its adapter stays


def execute(run, data_root, jobs, model):
    """Run one program, and keep its result. Raises common.Fault where it fails."""
    print(shlex.join(full_command(run, data_root, "python")), flush=True)
    run.folder.mkdir(parents=True, exist_ok=True)
    log = run.folder / "log.txt"
    threads = max(1, (os.cpu_count() or 1) // jobs)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(log, "w") as file:
        words = full_command(run, data_root)
        ended = subprocess.run(words, cwd=ROOT, stdout=file, stderr=file, env=environment)
    if ended.returncode or not run.result():
        last = log.read_text().strip().rpartition("\n")[2]
        raise common.Fault(
            f"{run.row!r} on {run.dataset}, seed {run.seed}, failed: {last}; see {log}"
        )
    collect([run], model)


def sweep(everything, data_root, jobs, model):
    """Run what is missing, `jobs` programs at a time."""
    collect(everything, model)
    stop = threading.Event()

    def work(run):
        if not stop.is_set():
            try:
                execute(run, data_root, jobs, model)
            except common.Fault:
                stop.set()  # what runs already may end, nothing else is started
                raise

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        try:
            list(pool.map(work, missing(everything, model)))
        finally:
            stop.set()


def job_array(unfinished, data_root):
    """A script for sbatch: a run a task; none where it has ended by then."""
    lines = [
        "#!/bin/bash",
        f"#SBATCH --array=0-{len(unfinished) - 1}",
        "#SBATCH --gres=gpu:1 --cpus-per-task=4",
        f"cd {shlex.quote(str(ROOT))}",
        "case $SLURM_ARRAY_TASK_ID in",
    ]
    for i, run in enumerate(unfinished):
        there = shlex.quote(f"{run.folder}/*/result.json")
        words = shlex.join(full_command(run, data_root))
        lines.append(f"{i}) compgen -G {there} > /dev/null || {words} ;;")
    return "\n".join([*lines, "esac", ""])


def take(folder, everything, model):
    """Keep a finished run that was made by hand, in the row that has its arguments -> Run."""
    file = folder / "result.json"
    if not file.exists():
        raise common.Fault(f"{folder} has no result.json; expected the folder of a finished run")
    result = parse_json(file.read_text(), file)
    if result.get("before", "measured") is None:
        raise common.Fault(
            f"{folder} is a run with --load, or of an earlier commit: it did not train"
        )
    # of rows that fit, the one that says most: an argument left out fits what the program chose
    fitting = [run for run in everything if fits(run, result)]
    if not fitting:
        tables = ", ".join(dict.fromkeys(run.table for run in everything))
        raise common.Fault(f"{folder}: no row of {tables} has the arguments of this run")
    run = max(fitting, key=lambda run: len(run.words))
    keep(run.table, run.row, result, model)
    return run


def fits(run, result):
    """Has this result been made with the arguments of this run?"""
    if (run.dataset, run.seed) != (result["dataset"], result["seed"]):
        return False
    method, asked = parse(tuple(run.words))
    if (method, asked.get("choice")) != (result["method"], result.get("choice")):
        return False
    for key, value in asked.items():
        # what a row leaves out the program chose; earlier commits did not say what was left out
        left_out = value is None and key in result.get("left_out", [key]) and key != "test_limit"
        of_machine = key in ("data_root", "out", "load", "export", "device", "dtype")
        if not left_out and not of_machine and shorten(result.get(key)) != shorten(value):
            return False
    return True


@functools.cache
def parse(words):
    """The words of a command -> its method, {argument: value} as its program parses them."""
    program, *given = [word for word in words if word != "-m"]
    module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
    asked = vars(module.arguments().parse_args(given))
    method = module.__name__.rpartition(".")[2]
    if method == "alternatives":  # another program runs, but for some lines
        method = module.ALTERNATIVES[asked["choice"]].program
    return method, asked


# ------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """What a table shows of one row on one dataset."""

    lines: list  # the runs, one a seed
    images: str  # which, and how many
    values: dict  # column -> an accuracy in % of every seed
    zero_shot: bool  # measured before the training


def find(table, row, dataset, model="tiny"):
    """A row's runs, wherever they are kept -> Row, or None. Raises common.Fault if they differ."""
    spec = TABLES[table]
    source = spec.rows[row]
    zero_shot = isinstance(source, ZeroShot)
    part = "before" if zero_shot else "after"
    home, kept = table, row
    if isinstance(source, Same | ZeroShot):
        home, kept = source
    lines = []
    for line in read(home, model):
        if (line["dataset"], line["row"]) == (dataset, kept) and line[part]:
            lines.append(line)
    if zero_shot:
        lines = lines[:1]  # before the training all seeds are alike
    if not lines:
        return None
    compare(lines)

    limit = spec.limit if model == "tiny" else None
    values = {}
    for line in lines:
        for column, accuracy in scores(line, part, limit).items():
            values.setdefault(column, []).append(accuracy)
    line = lines[0]
    n = len(counted(line[part], limit))
    images = f"{dataset}, {n} {line['split']}, PGD-{line['test_steps']}"
    return Row(lines, images, values, zero_shot)


def compare(lines):
    """Raises common.Fault where runs of one row differ in more than the seed: they have no mean."""
    first = lines[0]
    for line in lines[1:]:
        differ = []
        for key in sorted({*first, *line} - FACTS - {"seed"}):
            if first.get(key) != line.get(key):
                differ.append(key)
        if differ:
            row = f"{first['table']}: {first['row']} on {first['dataset']}"
            what = f"differ in {', '.join(differ)}"
            todo = "they have no mean; delete the older lines, and run again"
            raise common.Fault(f"the runs of {row} {what}: {todo}")


def counted(evaluation, limit):
    """The digits of the images that count: what --test-limit would have picked of them."""
    digits = evaluation["outcomes"]
    if limit and limit < len(digits):
        return random.Random(0).sample(digits, limit)
    return digits


def scores(line, part, limit):
    """{column: accuracy in %} of one run."""
    evaluation = line[part]
    others = evaluation.get("transfer", {})
    own = line["dataset"] if line["classes"] == "all" else line["classes"]
    columns = {}
    for name, shown in {own: evaluation, **others}.items():
        digits = counted(shown, limit)
        prefix = f"{name} " if others else ""
        clean = sum(digit != "0" for digit in digits)
        robust = sum(digit == "2" for digit in digits)
        columns[f"{prefix}clean"] = 100 * clean / len(digits)
        columns[f"{prefix}PGD"] = 100 * robust / len(digits)
    if "H" in evaluation:
        columns["H"] = evaluation["H"]
    return columns


def mean(values):
    """'61.5 ± 1.8', or '61.5' of a single one."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def trained(row):
    """How many numbers the training changed."""
    line = row.lines[0]
    if row.zero_shot or line.get("off") == 0:
        return "0"
    return f"{line['trained']:,}" if "trained" in line else f"{line['masked']:,} bits"


def share_off(row):
    """', 2.6 % off' of masks, else nothing."""
    if row.zero_shot or not row.lines[0].get("off"):
        return ""
    return f", {statistics.mean(100 * line['off'] for line in row.lines):.1f} % off"


def table(name, model="tiny", datasets=()):
    """A table as Markdown: a line for every dataset and row that has runs."""
    heading, published = PUBLISHED.get(name, ("", {}))
    columns = {}
    body = []
    for dataset in datasets_of(name, datasets):
        for row_name in TABLES[name].rows:
            row = find(name, row_name, dataset, model)
            if row is None:
                continue
            columns = row.values
            cells = [row.images, row_name, str(len(row.lines))]
            for values in row.values.values():
                cells.append(mean(values))
            cells.append(trained(row) + share_off(row))
            if published:
                cells.append(published.get(row_name, ""))
            body.append(cells)
    subject = "run, small CLIP" if published and model == "tiny" else "run"
    head = ["images", subject, "seeds", *columns, "trained"]
    if published:
        head.append(f"published, ViT-B/32, {heading}")
    return markdown(head, body)


def short_table():
    """The table of the README: each method by its defaults, a pair of columns for each dataset."""
    head = ["method", "numbers trained"]
    for dataset in BOTH:
        head += [f"{dataset}: clean", "PGD-100"]
    body = []
    for method in TABLES["rivals"].rows:
        if method.endswith(", published recipe"):
            continue
        cells = [method, ""]
        for dataset in BOTH:
            row = find("rivals", method, dataset)
            if row is None:
                cells += ["", ""]
                continue
            cells[1] = trained(row)
            cells += [mean(row.values["clean"]), mean(row.values["PGD"])]
        body.append(cells)
    return markdown(head, body)


def markdown(head, body):
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def fill(text):
    """A page with the tables between its markers, as the lines have them now."""
    for name in ("readme", *TABLES):
        marker = f"<!-- table {name} -->"
        if marker in text:
            content = short_table() if name == "readme" else table(name)
            text = put(text, marker, content)
    return text


# ------------------------------------------------------------------------------------------------
# The program
# ------------------------------------------------------------------------------------------------


def arguments():
    """The program's argument parser."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}; default all")
    add("--list", action="store_true", help="print the commands of the missing runs")
    slurm = "write the missing runs as a job array, for sbatch"
    add("--slurm", type=pathlib.Path, metavar="FILE", help=slurm)
    taken = "keep these finished runs; without a folder: those that a job array has finished"
    add("--take", type=pathlib.Path, nargs="*", metavar="RUN", help=taken)
    add("--table", action="store_true", help="print the tables")
    add("--write", action="store_true", help="put the small CLIP's tables into the pages")
    add("--jobs", type=int, default=1, help="programs at a time; they share the cores")
    add("--data-root", type=pathlib.Path, default=pathlib.Path("data"), help="folder of the data")
    add("--model", default="tiny", help="--model of every run")
    datasets = "in place of embedded and caltech101; the targets of the table transfer"
    add("--datasets", nargs="+", default=[], metavar="NAME", help=datasets)
    more = "more arguments for every run, in one string: --more='--pretrained FILE'"
    add("--more", type=shlex.split, default=[], help=more)
    return parser


def main():
    args = arguments().parse_args()
    tables = args.tables or list(TABLES)
    unknown = [name for name in tables if name not in TABLES]
    if unknown:
        raise common.Fault(
            f"unknown table {', '.join(unknown)}; expected some of {', '.join(TABLES)}"
        )
    if args.jobs < 1:
        raise common.Fault(f"--jobs {args.jobs} runs nothing; expected at least 1")
    data_root = args.data_root.resolve()
    everything = runs(tables, args.model, args.datasets, args.more)
    unfinished = [run for run in missing(everything, args.model) if not run.result()]

    if args.list:
        for run in unfinished:
            print(shlex.join(full_command(run, data_root, "python")))
    elif args.slurm:
        if not unfinished:
            raise common.Fault("no result is missing: there is nothing for a job array to do")
        common.write(args.slurm, job_array(unfinished, data_root).encode())
    elif args.take:
        for folder in args.take:
            run = take(folder, everything, args.model)
            print(f"{folder}: {run.table}, {run.row} on {run.dataset}, seed {run.seed}")
    elif args.take is not None:
        collect(everything, args.model)
    elif args.table:
        for name in tables:
            content = table(name, args.model, args.datasets)
            print(f"<!-- table {name} -->\n{content}\n<!-- end -->\n")
    elif args.write:
        for page in PAGES:
            if page.exists():
                common.write(page, fill(page.read_text(encoding="utf-8")).encode())
    else:
        sweep(everything, data_root, args.jobs, args.model)


def run_here(words, name):
    """Run a command of this repository, in its root. Raises common.Fault where it fails."""
    ended = subprocess.run([sys.executable, *words[1:]], cwd=ROOT)
    if ended.returncode:
        raise common.Fault(f"{name} failed: see above")


def put(text, marker, content):
    """A page with the content between a marker and the next end; without the marker as it is."""
    before, start, rest = text.partition(f"{marker}\n")
    if not start:
        return text
    _, end, after = rest.partition("<!-- end -->")
    return f"{before}{start}{content}\n{end}{after}"


if __name__ == "__main__":
    common.guard(main)
