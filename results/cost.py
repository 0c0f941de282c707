"""What do a training step and its memory cost beside full adversarial fine-tuning?

    python results/cost.py --rounds 1    # measure, on one core; on ViT-B/32 with random weights
    python results/cost.py --write       # put the table into RESULTS.md

Every program trains some steps on the embedded data in a process of its own, in turns for --rounds
rounds; the least counts. Unlike tests/benchmarks/speed.py this counts all of a training:
augmentation, and the memory of the process. Lines are kept in results/cost.jsonl.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import sweep
from experiments import METHODS, PLAIN

import common

FILE = sweep.HERE / "cost.jsonl"
PAGE = sweep.HERE / "RESULTS.md"
MARKER = "<!-- cost -->"
RUNS = {"TeCoA": METHODS["TeCoA"], **METHODS, "plain LoRA": f"{METHODS['AdvLoRA']} {PLAIN}"}
SHORT = "--test-steps 1 --test-limit 1".split()
# what is measured: a model, and how its runs differ
SETTINGS = {
    "tiny": "--model tiny --steps 20",
    "ViT-B-32-quickgelu": "--model ViT-B-32-quickgelu --pretrained none --steps 3 --batch-size 8",
}
NAMES = {"tiny": "small CLIP", "ViT-B-32-quickgelu": "ViT-B/32, random weights"}


def run(words):
    """Run a program on one core -> its result.json."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, *words, *SHORT, "--device", "cpu", "--out", out]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(command, cwd=sweep.ROOT, stdout=subprocess.DEVNULL, env=environment)
        if ended.returncode:
            raise common.Fault(f"{' '.join(words)} failed: see above")
        (file,) = pathlib.Path(out).glob("*/result.json")
        return json.loads(file.read_text())


def measure(rounds):
    """Run every program `rounds` times on every model; keep a line of each when a model is done."""
    for model, setting in SETTINGS.items():
        milliseconds = {name: [] for name in RUNS}
        memory = {name: [] for name in RUNS}
        for _ in range(rounds):
            for name, program in RUNS.items():
                result = run([*program.split(), *setting.split()])
                milliseconds[name].append(1000 * result["training_seconds"] / result["steps"])
                memory[name].append(result["peak_memory_mib"])
                print(f"{model}, {name}: {milliseconds[name][-1]:.0f} ms a step", flush=True)
        lines = [line for line in sweep.read_lines(FILE) if line["model"] != model]
        for name in RUNS:
            line = {"row": name, "milliseconds": min(milliseconds[name])}
            line |= {"peak_memory_mib": min(memory[name]), "rounds": rounds}
            for key in ("model", "batch_size", "steps", "device_name", "dtype", "commit"):
                line[key] = result[key]
            lines.append(sweep.shorten(line))
        # by model; the rows of a model stay in their order
        sweep.write_lines(FILE, lines, lambda line: list(SETTINGS).index(line["model"]))


def table():
    """The measurements as Markdown."""
    body = []
    for line in sweep.read_lines(FILE):
        if line["row"] == "TeCoA":  # the first of its model
            full = line["milliseconds"]
        cells = [f"{NAMES[line['model']]}, batches of {line['batch_size']}", line["row"]]
        cells.append(f"{line['milliseconds']:.0f}")
        cells.append(f"{100 * line['milliseconds'] / full:.0f} %")
        cells.append(str(line["peak_memory_mib"]))
        body.append(cells)
    return sweep.markdown(["model", "run", "ms a step", "of TeCoA", "MiB of the process"], body)


def fill(text):
    """A page with the table in its place."""
    return sweep.put(text, MARKER, table())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="the least of so many counts")
    parser.add_argument("--write", action="store_true", help="put the table into the page")
    args = parser.parse_args()
    if args.write:
        common.write(PAGE, fill(PAGE.read_text(encoding="utf-8")).encode())
    else:
        if args.rounds < 1:
            raise common.Fault(f"--rounds {args.rounds} measures nothing; expected at least 1")
        measure(args.rounds)
        print(table())


if __name__ == "__main__":
    common.guard(main)
