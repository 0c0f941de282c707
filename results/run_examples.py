"""Run the programs of examples/, keep a line a run in examples.jsonl, and print their tables.

    python results/run_examples.py --data-root DATA          # run what is missing, three seeds
    python results/run_examples.py --data-root DATA --list   # only print the missing commands
    python results/run_examples.py --take runs/backdoor-*    # keep runs that were made by hand
    python results/run_examples.py --write                   # put the tables into RESULTS.md

A line is a run's result.json; `example` says which of EXAMPLES it is. All are the small CLIP's.
"""

import argparse
import pathlib
import shlex

import sweep

import common

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
FILE = HERE / "examples.jsonl"
PAGE = HERE / "RESULTS.md"
SEEDS = 1, 2, 3
# example -> its program's words
EXAMPLES = {
    "retrieval": "examples/retrieval.py",
    "backdoor, embedded": "examples/backdoor.py",
    "backdoor, caltech101": "examples/backdoor.py --dataset caltech101",
    "poisoned shots, embedded": "examples/backdoor.py --poisoned-shots",
    "poisoned shots, caltech101": "examples/backdoor.py --poisoned-shots --dataset caltech101",
}


def name_of(result):
    """Which example a result is of. Raises common.Fault for a result of another program."""
    if result["method"] == "retrieval":
        return "retrieval"
    if result["method"] != "backdoor":
        raise common.Fault(f"a run of {result['method']} is no example's")
    question = "poisoned shots" if result["poisoned_shots"] else "backdoor"
    return f"{question}, {result['dataset']}"


def read():
    """The lines -> [dict]."""
    return sweep.read_lines(FILE)


def identity(line):
    """What there is one line of."""
    return line["example"], line["seed"]


def keep(folder):
    """Keep the result of a run's folder, in place of the line of this example and seed -> line."""
    file = folder / "result.json"
    if not file.exists():
        raise common.Fault(f"{folder} has no result.json; expected the folder of a finished run")
    result = sweep.parse_json(file.read_text(), file)
    line = {"example": name_of(result), **sweep.shorten(result)}
    _, asked = sweep.parse(tuple(EXAMPLES[line["example"]].split()))
    for key, value in {**asked, "model": "tiny", "eps": common.TINY_EPS}.items():
        own = key in ("seed", "data_root", "out", "device", "dtype") or value is None
        if not own and line.get(key, value) != sweep.shorten(value):
            raise common.Fault(f"{folder}: {key} is {line[key]}, expected {value}")
    lines = [other for other in read() if identity(other) != identity(line)]
    sweep.write_lines(FILE, [*lines, line], identity)
    return line


def missing(data_root):
    """{(example, seed): the words of its command}, where there is no line yet."""
    have = {identity(line) for line in read()}
    commands = {}
    for name, program in EXAMPLES.items():
        for seed in SEEDS:
            if (name, seed) in have:
                continue
            folder = ROOT / "runs" / "examples" / f"{sweep.file_name(name)}-{seed}"
            own = ["--seed", str(seed), "--data-root", str(data_root), "--out", str(folder)]
            commands[name, seed] = ["python", *program.split(), *own]
    return commands


# ------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------


def mean(lines, *path):
    """Over the lines, the mean and deviation of what the keys lead to, "61.5 ± 1.8"."""
    values = []
    for line in lines:
        value = line["rows"]
        for key in path:
            value = value[key]
        values.append(value)
    return sweep.mean(values)


def retrieval_table(lines):
    """Both directions of every method, clean and attacked, as Markdown."""
    head = ["method", "numbers trained", "attack"]
    head += [f"image to text R@{k}" for k in (1, 5, 10)]
    head += [f"text to image R@{k}" for k in (1, 5, 10)]
    body = []
    for method, row in lines[0]["rows"].items():
        settings = {"none": ("clean",)}
        for steps in row["pgd"]:
            settings[f"PGD-{steps}"] = "pgd", steps
        for attack, path in settings.items():
            cells = [method, f"{row['trained']:,}", attack]
            for direction in ("image_to_text", "text_to_image"):
                for k in (1, 5, 10):
                    cells.append(mean(lines, method, *path, direction, f"R@{k}"))
            body.append(cells)
    return sweep.markdown(head, body)


def backdoor_table(lines):
    """Success, clean and robust accuracy of every adaptation, as Markdown."""
    head = ["method", "success", "without the patch", "clean", f"PGD-{lines[0]['test_steps']}"]
    body = []
    for method in lines[0]["rows"]:
        cells = [mean(lines, method, key) for key in ("success", "no_patch", "clean", "pgd")]
        body.append([method, *cells])
    return sweep.markdown(head, body)


def tables():
    """{example: its table as Markdown} of the examples that have runs."""
    found = {}
    for name in EXAMPLES:
        lines = [line for line in read() if line["example"] == name]
        if lines:
            draw = retrieval_table if name == "retrieval" else backdoor_table
            found[name] = f"{draw(lines)}\n\nSeeds: {len(lines)}."
    return found


def fill(text):
    """A page with the tables between their markers, as the lines have them now."""
    for name, content in tables().items():
        text = sweep.put(text, f"<!-- example {name} -->", content)
    return text


# ------------------------------------------------------------------------------------------------
# The program
# ------------------------------------------------------------------------------------------------


def arguments():
    """The program's argument parser."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--list", action="store_true", help="print the commands of the missing runs")
    add("--take", type=pathlib.Path, nargs="+", metavar="RUN", help="keep these finished runs")
    add("--write", action="store_true", help="put the tables into RESULTS.md")
    add("--data-root", type=pathlib.Path, default=pathlib.Path("data"), help="folder of the data")
    return parser


def main():
    args = arguments().parse_args()
    if args.take:
        for folder in args.take:
            line = keep(folder)
            print(f"{folder}: {line['example']}, seed {line['seed']}")
        return
    if args.write:
        common.write(PAGE, fill(PAGE.read_text(encoding="utf-8")).encode())
        return
    for (name, seed), words in missing(args.data_root.resolve()).items():
        print(shlex.join(words), flush=True)
        if args.list:
            continue
        sweep.run_here(words, f"{name}, seed {seed},")
        # of several results in the folder the newest
        found = pathlib.Path(words[-1]).glob("*/result.json")
        keep(max(found, key=lambda file: file.stat().st_mtime).parent)


if __name__ == "__main__":
    common.guard(main)
