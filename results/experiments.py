"""What results/sweep.py runs: the rows of every table, their commands, the files of their results, and what the AdvMask paper published.

Published numbers are ViT-B/32's at eps 1/255, means over MEANS: clean / PGD-100 in %.
"""
import json
import pathlib
import random
import re
import sys

HERE = pathlib.Path(__file__).resolve().parent
BOTH, SEEDS, METHODS = ("embedded", "caltech101"), (1, 2, 3), {"AdvMask": "advmask.py", "AdvLoRA": "advlora.py"}
VAL = "--split val --test-steps 20 --steps 150 --test-limit 200"    # arguments are chosen on val, with a cheaper attack
FEW = 500                                                           # test images of the tables below "logit-scale": a fixed random subset
LIMIT = f"--test-limit {FEW}"
MASKS_OF_ONES, PLAIN = "advmask.py --steps 1 --lr 0", "--init gaussian --no-align --no-adaptive"
# 12 of KL, and 130 to 180 of JS, pull as strongly as the small CLIP's default lambda, 150, of LAFA: notebook 3
LOSSES = {"CE": "--loss ce", "CE + JS": "--loss js", "CE + KL": "--loss kl --lam 12", "CE + LAFA unweighted": "--loss align"}
# table -> (datasets, seeds, {row: script and arguments}); "= TABLE: ROW" is that run, not run again; a row "zero-shot" is the same for every seed
TABLES = {
    "main": (BOTH, SEEDS, {
        "AdvMask": "advmask.py", "AdvLoRA": "advlora.py", "full fine-tuning": "advlora.py --full"}),
    "steps": (("caltech101",), SEEDS, {"AdvMask, 200 steps, budget 1.5": "advmask.py --steps 200 --budget 1.5"}),
    "controls": (BOTH, SEEDS, {
        "zero-shot": "= zero-shot: eps 3/255", "full fine-tuning": "= main: full fine-tuning", "AdvLoRA": "= main: AdvLoRA",
        "plain LoRA": f"advlora.py {PLAIN} {LIMIT}", "AdvLoRA, SVD start": f"advlora.py --init svd {LIMIT}",
        "AdvLoRA, not aligned": f"advlora.py --no-align {LIMIT}", "AdvLoRA, not adaptive": f"advlora.py --no-adaptive {LIMIT}"}),
    "zero-shot": (BOTH, (1,), {f"eps {k}/255": f"{MASKS_OF_ONES} --eps {k}/255" for k in (1, 2, 3)}),
    "choices": (("caltech101",), SEEDS, {
        row: f"advmask.py {VAL} {row.removeprefix('defaults')}" for row in (
            "defaults", "--lam 0", "--lam 50", "--lam 500", "--budget 0.75", "--budget 3", "--steps 300 --budget 3", "--steps 600 --budget 3",
            "--steps 600 --budget 6", "--optimizer adam --budget 1.5", "--layers mlp", "--layers both", "--features mean", "--raw --lam 0.5",
            "--attached", "--augment none", "--steps 300 --budget 3 --augment none", "--batch-size 64")}),
    "choices-embedded": (("embedded",), SEEDS, {
        row: f"advmask.py --split val --test-steps 20 {row.removeprefix('defaults')}" for row in (
            "defaults", "--lam 0", "--lam 50", "--lam 500", "--budget 0.75", "--budget 3", "--steps 300 --budget 3", "--layers mlp", "--layers both",
            "--features mean", "--raw --lam 0.5", "--attached", "--augment none")}),
    "lora": (("caltech101",), (1,), {
        row: f"advlora.py {VAL} {row.removeprefix('defaults')}" for row in (
            "defaults", "--lr 3e-3", "--rank 4", "--rank 16 --lr 2e-3", "--targets attn", "--targets attn --rank 16", "--targets mlp", "--no-balance",
            "--steps 300", "--towers both", "--clean-weight 0.5", "--augment none", "--full", "--full --lr 3e-5", "--full --lr 1e-4",
            "--full --lr 1e-3", "--full --augment none")}),
    "logit-scale": (("caltech101",), (1,), {
        f"s = 17, lambda {lam}": f"= choices: {'defaults' if lam == 150 else f'--lam {lam}'}" for lam in (0, 50, 150, 500)} | {
        f"s = 100, lambda {lam}": f"advmask.py {VAL} --logit-scale 100 --lam {lam}" for lam in (0, 50, 150, 500, 1500)}),
    "shots": (BOTH, SEEDS, {"zero-shot": "= zero-shot: eps 3/255"} | {
        f"{method}, {k} shots": f"{script} --shots {k} {LIMIT}" if k < 16 else f"= main: {method}"
        for method, script in METHODS.items() for k in (1, 2, 4, 8, 16)}),
    "modules": (BOTH, SEEDS, {
        "MHSA": "= main: AdvMask", "MLP": f"advmask.py --layers mlp {LIMIT}", "both": f"advmask.py --layers both {LIMIT}",
        "AdvLoRA, attention": f"advlora.py --targets attn {LIMIT}", "AdvLoRA, MLP": f"advlora.py --targets mlp {LIMIT}",
        "AdvLoRA, both": "= main: AdvLoRA"}),
    "loss": (BOTH, SEEDS, {row: f"advmask.py {text} {LIMIT}" for row, text in LOSSES.items()} | {"CE + LAFA": "= main: AdvMask"} | {
        f"{row}, 1 shot": f"advmask.py {text} --shots 1 {LIMIT}" for row, text in LOSSES.items()} | {
        "CE + LAFA, 1 shot": "= shots: AdvMask, 1 shots", "AdvLoRA, CE": "= main: AdvLoRA",
        "AdvLoRA, CE + CE of clean images / 2": f"advlora.py --clean-weight 0.5 {LIMIT}"}),
    "base-to-new": (BOTH, SEEDS, {
        row: f"{command} --protocol base-to-new {LIMIT}" for row, command in {"zero-shot": MASKS_OF_ONES, **METHODS}.items()}),
    "transfer": (("tiny_imagenet",), SEEDS, {
        row: f"{command} --transfer caltech101 embedded {LIMIT}" for row, command in {"zero-shot": MASKS_OF_ONES, **METHODS}.items()}),
}
PUBLISHED = {
    "shots": {"AdvMask, 1 shots": "46.6 / 18.4", "AdvMask, 16 shots": "67.3 / 47.1"},
    "modules": {"MHSA": "67.34 / 47.13", "MLP": "65.73 / 45.95", "both": "66.01 / 47.20"},
    "loss": {"CE": "65.8 / 46.4", "CE + JS": "65.9 / 46.5", "CE + KL": "60.7 / 43.6",
             "CE + LAFA unweighted": "66.9 / 46.8", "CE + LAFA": "67.3 / 47.1", "CE, 1 shot": "40.3 / 15.6", "CE + JS, 1 shot": "42.9 / 17.3",
             "CE + KL, 1 shot": "31.8 / 13.8", "CE + LAFA unweighted, 1 shot": "44.5 / 17.8", "CE + LAFA, 1 shot": "46.6 / 18.4"},
    "base-to-new": {"zero-shot": "base 66.9 / 3.4, new 71.5 / 3.8, H 6.9", "AdvMask": "base 69.5 / 43.6, new 50.2 / 26.1, H 41.9"},
    "transfer": {"zero-shot": "61.9 / 2.7", "AdvMask": "42.0 / 19.4"},
}
MEANS = {**dict.fromkeys(("shots", "modules", "loss"), "mean of 5 datasets"), "base-to-new": "mean of 11 datasets", "transfer": "mean of 11 unseen"}


def told(table, row, model="tiny", datasets=()):
    """A row's script and arguments. Models other than the small CLIP have eps 1/255, lambda 50 in place of 150, and all test images."""
    text = TABLES[table][2][row]
    if model != "tiny":
        text = text.replace("= zero-shot: eps 3/255", "= zero-shot: eps 1/255").replace("--lam 12", "--lam 4").replace(f" {LIMIT}", "")
    return text.replace("--transfer caltech101 embedded", f"--transfer {' '.join(datasets)}") if datasets else text


def runs(table, model="tiny", datasets=()):
    """(dataset, row, {result file: script and arguments}) of every row, a file per seed: results/<table>/<dataset>~<row>~<seed>.json.
    datasets: these in place of BOTH; the table transfer evaluates on them."""
    own, seeds, rows = TABLES[table]
    for dataset in datasets if datasets and own == BOTH else own:
        for row in rows:
            text = told(table, row, model, datasets)
            home, kept = text.removeprefix("= ").split(": ") if text.startswith("= ") else (table, row)
            folder, stem = HERE / ("" if model == "tiny" else model) / home, re.sub("[^a-zA-Z0-9.]+", "-", kept).strip("-")
            yield dataset, row, {
                folder / f"{dataset}~{stem}~{seed}.json":
                    f"{told(home, kept, model, datasets)} --after-only --model {model} --dataset {dataset} --seed {seed}"
                for seed in (seeds[:1] if row == "zero-shot" else seeds)}


def commands(table, root, model="tiny", datasets=(), more=()):
    """[(result file, command)] of a table; a program writes below runs/sweep/ first. more: arguments for every program."""
    scripts, out = HERE.parent, HERE.parent / "runs" / "sweep"
    return [(file, [sys.executable, f"{scripts / text.split()[0]}", *text.split()[1:], *more, "--data-root", f"{root}",
                    "--out", f"{out / file.relative_to(HERE).with_suffix('')}"])
            for *_, files in runs(table, model, datasets) for file, text in files.items()]


def refuse(sentence):
    """One sentence on stderr, exit code 2."""
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


def read(table, files):
    """The results that are there of one row's files: runs that differ in nothing but the seed, or else one sentence and exit code 2."""
    found = [json.loads(file.read_text()) for file in files if file.exists()]
    may_differ = ("seed", "download", "no_download"), ("epochs", "min_steps")    # the last two where they only made "steps", which is compared
    arguments = [{k: r[k] for k in list(r)[:list(r).index("versions")] if k not in may_differ[0] + (may_differ[1] if r.get("steps") else ())}
                 for r in found]
    if differ := sorted({k for a in arguments for k in a if a[k] != arguments[0].get(k, a[k])}):
        refuse(f"no mean over the seeds of {next(iter(files))}: they differ in {', '.join(differ)}; delete and run again what is out of date")
    for r in found:
        home = next(iter(files)).parent
        r["few"] = home.name != table and home.parent == HERE    # a run on the whole test set in a table of runs on FEW images
    return found


def scores(result):
    """-> {column: accuracy in %}, number of images. What ran on the whole test set counts on the images that --test-limit FEW picks, if it is in a
    table of such runs: the same images, attacked from other random starts, which are the position's."""
    after, columns = result["after"], {}
    for name, r in {result["classes"] if "H" in after else result["dataset"]: after, **after.get("transfer", {})}.items():
        digits = [int(digit) for digit in r["outcomes"]]
        if result["few"]:
            digits = random.Random(0).sample(digits, min(FEW, len(digits)))
        for key, bit in (("clean", 1), ("PGD", 2), ("best iterate", 4))[:2 if "transfer" in after else 3]:
            columns[f"{name} {key}" if "transfer" in after else key] = 100 * sum(digit & bit > 0 for digit in digits) / len(digits)
    return columns | ({"H": after["H"]} if "H" in after else {}), min(FEW, len(after["outcomes"])) if result["few"] else len(after["outcomes"])
