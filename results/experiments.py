"""What results/sweep.py runs: the rows of every table, and what the papers published beside them.

A row is a program with its arguments; sweep.py adds model, dataset, seed and folders. Some rows are
not run: `Same` is another table's row, `ZeroShot` the evaluation that every run makes before its
training.
"""

import re
from typing import NamedTuple


class Table(NamedTuple):
    """The runs of a table: every row on every dataset with every seed.

    limit: --test-limit of its runs. Another table's runs are counted on the same images here.
    """

    datasets: tuple
    seeds: tuple
    rows: dict
    limit: int | None = None


class Same(NamedTuple):
    """The runs of another table's row."""

    table: str
    row: str


class ZeroShot(NamedTuple):
    """What the runs of a row measured before their training."""

    table: str
    row: str


BOTH = ("embedded", "caltech101")
SEEDS = (1, 2, 3)
FEW = 500  # test images of most tables: a fixed random choice
ADVMASK = "advmask.py"
ADVLORA = "advlora.py"
TECOA = "-m baselines.tecoa"
TGAZSR = "-m baselines.tgazsr"
ADVVP = "-m baselines.advvp"
ADVVLP = "-m baselines.prompts --method advvlp"
ADVMAPLE = "-m baselines.prompts --method advmaple"
FAP = "-m baselines.prompts --method fap"
ALTERNATIVES = "results/alternatives.py"
METHODS = {
    "AdvMask": ADVMASK,
    "AdvLoRA": ADVLORA,
    "TeCoA": TECOA,
    "TGA-ZSR": TGAZSR,
    "AdvVP": ADVVP,
    "AdvVLP": ADVVLP,
    "AdvMaPLe": ADVMAPLE,
    "FAP": FAP,
}
PLAIN = "--init kaiming --no-align --no-adaptive"  # plain LoRA


def main():
    rows = {
        "zero-shot": ZeroShot("main", "AdvMask"),
        "AdvMask": ADVMASK,
        "AdvLoRA": ADVLORA,
        "TeCoA": TECOA,
    }
    return Table(BOTH, SEEDS, rows)


def zero_shot():
    rows = {}
    for k in (1, 2, 3):
        rows[f"eps {k}/255"] = f"{ADVMASK} --steps 1 --budget 0 --eps {k}/255"
    return Table(BOTH, (1,), rows)


def steps():
    rows = {
        "AdvMask, 300 steps, budget 3": Same("main", "AdvMask"),
        "AdvMask, 200 steps, budget 1.5": f"{ADVMASK} --steps 200 --budget 1.5",
    }
    return Table(("caltech101",), SEEDS, rows, FEW)


def controls():
    rows = {
        "zero-shot": ZeroShot("main", "AdvMask"),
        "TeCoA": Same("main", "TeCoA"),
        "AdvLoRA": Same("main", "AdvLoRA"),
        "plain LoRA": f"{ADVLORA} {PLAIN}",
        "AdvLoRA, SVD start": f"{ADVLORA} --init svd",
        "AdvLoRA, not aligned": f"{ADVLORA} --no-align",
        "AdvLoRA, not adaptive": f"{ADVLORA} --no-adaptive",
    }
    return Table(BOTH, SEEDS, rows, FEW)


def shots():
    rows = {"zero-shot": ZeroShot("main", "AdvMask")}
    for method in ("AdvMask", "AdvLoRA", "FAP"):
        program = METHODS[method]
        rows[f"{method}, 1 shot"] = f"{program} --shots 1"
        for k in (2, 4, 8):
            rows[f"{method}, {k} shots"] = f"{program} --shots {k}"
        rows[f"{method}, 16 shots"] = Same("rivals" if method == "FAP" else "main", method)
    return Table(BOTH, SEEDS, rows, FEW)


def modules():
    rows = {
        "attention": Same("main", "AdvMask"),
        "MLP": f"{ADVMASK} --weights mlp",
        "both": f"{ADVMASK} --weights both",
        "AdvLoRA, attention": f"{ADVLORA} --weights attn",
        "AdvLoRA, MLP": f"{ADVLORA} --weights mlp",
        "AdvLoRA, both": Same("main", "AdvLoRA"),
    }
    return Table(BOTH, SEEDS, rows, FEW)


def losses():
    # the weight of KL pulls as strongly as the default lambda, 150 or 50, of LAFA: notebook 3
    texts = {
        "CE": "--loss ce",
        "CE + JS": "--loss js",
        "CE + KL": "--loss kl --lam {kl}",
        "CE + LAFA unweighted": "--loss align",
    }
    rows = {}
    for row, text in texts.items():
        rows[row] = f"{ADVMASK} {text}"
    rows["CE + LAFA"] = Same("main", "AdvMask")
    for row, text in texts.items():
        rows[f"{row}, 1 shot"] = f"{ADVMASK} {text} --shots 1"
    rows["CE + LAFA, 1 shot"] = Same("shots", "AdvMask, 1 shot")
    rows["AdvLoRA, CE"] = Same("main", "AdvLoRA")
    rows["AdvLoRA, CE + CE of clean images / 2"] = f"{ADVLORA} --clean-weight 0.5"
    return Table(BOTH, SEEDS, rows, FEW)


def base_to_new():
    rows = {"zero-shot": ZeroShot("base-to-new", "AdvMask")}
    for method, program in METHODS.items():
        rows[method] = f"{program} --classes base --transfer new"
    return Table(BOTH, SEEDS, rows, FEW)


def transfer():
    rows = {"zero-shot": ZeroShot("transfer", "AdvMask")}
    for method in ("AdvMask", "AdvLoRA", "TeCoA", "TGA-ZSR", "FAP"):
        rows[method] = f"{METHODS[method]} --transfer {{targets}}"
    return Table(("tiny_imagenet",), SEEDS, rows, FEW)


def on_val(program, own, arguments):
    """Rows of one program on validation images under PGD-20, named by their arguments.

    own: those that all of them share, which name the first row.
    """
    shared = f"{program} --split val --test-steps 20 {own}".strip()
    rows = {own or "defaults": shared}
    for text in arguments:
        rows[text] = f"{shared} {text}"
    return rows


def otherwise(shared, choices):
    """The same of results/alternatives.py, its rows named by the choice."""
    rows = {}
    for text in choices:
        rows[text] = f"{ALTERNATIVES} {text} --split val --test-steps 20 {shared}".strip()
    return rows


# what AdvMask's program cannot be told
OTHERWISE = ("tokens", "raw --lam 0.5", "attached", "undivided", "adam --budget 3")


def choices():
    arguments = (
        "--lam 0",
        "--lam 50",
        "--lam 500",
        "--budget 0.75",
        "--budget 3",
        "--steps 300 --budget 3",
        "--steps 600 --budget 3",
        "--batch-size 64",
    )
    rows = on_val(ADVMASK, "--steps 150", arguments)
    scaled = [f"scale --lam {lam}" for lam in (0, 50, 150, 500, 1500)]
    rows.update(otherwise("--steps 150", ["unchanged", "adam", *OTHERWISE, *scaled]))
    return Table(("caltech101",), SEEDS, rows, 200)


def choices_embedded():
    arguments = (
        "--lam 0",
        "--lam 50",
        "--lam 500",
        "--budget 0.75",
        "--budget 3",
        "--steps 300 --budget 3",
    )
    rows = on_val(ADVMASK, "", arguments) | otherwise("", OTHERWISE)
    rows["defaults"] = Same("attempts", "AdvMask defaults")  # all 40 images there, too
    return Table(("embedded",), SEEDS, rows)


def lora():
    arguments = (
        "--lr 3e-3",
        "--rank 4",
        "--rank 16 --lr 2e-3",
        "--weights attn",
        "--weights attn --rank 16",
        "--weights mlp",
        "--steps 300",
        "--towers both",
        "--clean-weight 0.5",
    )
    rows = on_val(ADVLORA, "--steps 150", arguments)
    full = on_val(TECOA, "--steps 150", ("--lr 3e-5", "--lr 1e-4", "--lr 1e-3"))
    for row, text in full.items():
        rows["TeCoA " + row.replace("--steps 150", "--lr 3e-4")] = text
    rows.update(otherwise("--steps 150", ["unbalanced"]))
    return Table(("caltech101",), (1,), rows, 200)


def attempts():
    """What might cost AdvMask less clean accuracy, and no augmentation for others alike."""
    rows = {}
    for row, text in on_val(ADVMASK, "", ("--augment none",)).items():
        rows[f"AdvMask {row}"] = text
    for choice, text in otherwise("", ("matrix", "late")).items():
        rows[f"AdvMask {choice}"] = text
    for method, program in (("AdvLoRA", ADVLORA), ("TeCoA", TECOA)):
        for row, text in on_val(program, "", ("--augment none",)).items():
            rows[f"{method} {row}"] = text
    return Table(BOTH, SEEDS, rows, FEW)


def rivals():
    # FAP's study trains in batches of 4, without augmentation
    study = "--published --batch-size 4 --augment none"
    rows = {
        "zero-shot": ZeroShot("main", "AdvMask"),
        "AdvMask": Same("main", "AdvMask"),
        "AdvLoRA": Same("main", "AdvLoRA"),
        "TeCoA": Same("main", "TeCoA"),
        "TeCoA, published recipe": f"{TECOA} --published",
        "TGA-ZSR": TGAZSR,
        "TGA-ZSR, published recipe": f"{TGAZSR} --published",
        "AdvVP": ADVVP,
        "AdvVP, published recipe": f"{ADVVP} {study}",
        "AdvVLP": ADVVLP,
        "AdvVLP, published recipe": f"{ADVVLP} {study}",
        "AdvMaPLe": ADVMAPLE,
        "AdvMaPLe, published recipe": f"{ADVMAPLE} {study}",
        "FAP": FAP,
        "FAP, published recipe": f"{FAP} {study}",
    }
    return Table(BOTH, SEEDS, rows, FEW)


def rivals_val():
    """Rates of the rivals, with the programs' own number of steps."""
    rates = {
        "TGA-ZSR": (TGAZSR, ("1e-4", "3e-4", "1e-3")),
        "AdvVP": (ADVVP, ("3e-3", "1e-2", "3e-2", "1e-1")),
        "AdvVLP": (ADVVLP, ("1e-3", "3e-3", "1e-2")),
        "AdvMaPLe": (ADVMAPLE, ("1e-3", "3e-3", "1e-2")),
        "FAP": (FAP, ("1e-3", "3e-3", "1e-2", "3e-2")),
    }
    rows = {}
    for method, (program, some) in rates.items():
        for rate in some:
            text = f"{program} --split val --test-steps 20 --lr {rate}"
            rows[f"{method} --lr {rate}"] = text
    study = "--published --batch-size 4 --augment none"
    rows[f"AdvVP {study}"] = f"{ADVVP} --split val --test-steps 20 {study}"
    return Table(BOTH, (1,), rows, 200)


def rivals_steps():
    """Prompts trained as long as AdvMask on Caltech101."""
    rows = {}
    for method, text in (("AdvVLP", f"{ADVVLP} --lr 3e-3"), ("FAP", f"{FAP} --lr 1e-2")):
        rows[f"{method} --steps 300"] = f"{text} --steps 300 --split val --test-steps 20"
    return Table(("caltech101",), (1,), rows, 200)


WIDTHS = 96, 192, 288, 384
# arguments that set how far a method goes, its own first: three rates, and half as many steps more
SCALE = {
    "AdvMask": (ADVMASK, ("", "--budget 1.5", "--budget 6", "--steps 450")),
    "AdvLoRA": (ADVLORA, ("", "--lr 3e-4", "--lr 3e-3", "--steps 300")),
    "TeCoA": (TECOA, ("", "--lr 1e-4", "--lr 1e-3", "--steps 300")),
}
# the best of each on val, in clean accuracy and PGD-20 together: table scale-val
CHOSEN = {}
for width in WIDTHS:
    for method in ("AdvLoRA", "TeCoA"):
        CHOSEN[width, method] = "--steps 300"
    CHOSEN[width, "AdvMask"] = "--steps 450"
CHOSEN[384, "AdvMask"] = "--budget 1.5"


def of_width(width, method, text=""):
    """The words of a method on the CLIP that `tiny/pretrain.py --width` made."""
    own = f"--model local-dir:tiny/work/width-{width} --eps 3/255"
    if method == "AdvMask":
        own += " --lam 150"  # as for the small CLIP
    return f"{SCALE[method][0]} {own} {text}".strip()


def scale_val():
    """What a method's rate and steps should be at every width, on validation images."""
    rows = {}
    for width in WIDTHS:
        for method, (_, texts) in SCALE.items():
            for text in texts:
                words = of_width(width, method, text)
                row = f"width {width}, {method} {text or 'defaults'}"
                rows[row] = f"{words} --split val --test-steps 20"
    return Table(("caltech101",), (1,), rows, FEW)


def scale():
    """The methods on CLIPs of other widths, each with the rate and steps that val chose."""
    rows = {}
    for width in WIDTHS:
        rows[f"width {width}, zero-shot"] = ZeroShot("scale", f"width {width}, AdvMask")
        for method in SCALE:
            rows[f"width {width}, {method}"] = of_width(width, method, CHOSEN[width, method])
    return Table(("caltech101",), SEEDS, rows, FEW)


TABLES = {
    "main": main(),
    "zero-shot": zero_shot(),
    "steps": steps(),
    "controls": controls(),
    "shots": shots(),
    "modules": modules(),
    "loss": losses(),
    "base-to-new": base_to_new(),
    "transfer": transfer(),
    "choices": choices(),
    "choices-embedded": choices_embedded(),
    "lora": lora(),
    "attempts": attempts(),
    "rivals": rivals(),
    "rivals-val": rivals_val(),
    "rivals-steps": rivals_steps(),
    "scale-val": scale_val(),
    "scale": scale(),
}

# The papers of AdvMask and FAP, ViT-B/32, eps 1/255: table -> (a mean of what, {row: clean / PGD})
PUBLISHED = {
    "rivals": (
        "mean of 11 datasets",
        {
            "zero-shot": "61.91 / 4.26",
            "AdvMask": "- / 41.99",
            "FAP, published recipe": "65.32 / 34.61",
        },
    ),
    "shots": (
        "mean of 5 datasets",
        {"AdvMask, 1 shot": "46.6 / 18.4", "AdvMask, 16 shots": "67.3 / 47.1"},
    ),
    "modules": (
        "mean of 5 datasets",
        {"attention": "67.34 / 47.13", "MLP": "65.73 / 45.95", "both": "66.01 / 47.20"},
    ),
    "loss": (
        "mean of 5 datasets",
        {
            "CE": "65.8 / 46.4",
            "CE + JS": "65.9 / 46.5",
            "CE + KL": "60.7 / 43.6",
            "CE + LAFA unweighted": "66.9 / 46.8",
            "CE + LAFA": "67.3 / 47.1",
            "CE, 1 shot": "40.3 / 15.6",
            "CE + JS, 1 shot": "42.9 / 17.3",
            "CE + KL, 1 shot": "31.8 / 13.8",
            "CE + LAFA unweighted, 1 shot": "44.5 / 17.8",
            "CE + LAFA, 1 shot": "46.6 / 18.4",
        },
    ),
    "base-to-new": (
        "mean of 11 datasets",
        {
            "zero-shot": "base 66.9 / 3.4, new 71.5 / 3.8, H 6.9",
            "AdvMask": "base 69.5 / 43.6, new 50.2 / 26.1, H 41.9",
            "AdvVP": "base 31.7 / 14.4, new 30.4 / 13.4, H 19.2",
            "AdvVLP": "base 59.0 / 32.4, new 46.9 / 21.6, H 34.6",
            "AdvMaPLe": "base 60.4 / 30.7, new 46.2 / 20.3, H 33.3",
            "FAP": "base 70.5 / 38.0, new 49.6 / 21.9, H 37.6",
        },
    ),
    "transfer": (
        "mean of 11 unseen",
        {
            "zero-shot": "61.9 / 2.7",
            "AdvMask": "42.0 / 19.4",
            "TGA-ZSR": "41.3 / 13.0",
            "FAP": "36.0 / 16.8",
        },
    ),
}


def command(table, row, model="tiny", datasets=()):
    """The words of a row's command, from the program on; None where it is not run.

    Models other than the small CLIP take every test image of the tables that count FEW.
    """
    spec = TABLES[table]
    text = spec.rows[row]
    if not isinstance(text, str):
        return None
    if spec.limit and (model == "tiny" or spec.limit != FEW):
        text += f" --test-limit {spec.limit}"
    targets = " ".join(datasets or ("caltech101", "embedded"))
    return text.format(targets=targets, kl=12 if model == "tiny" else 4).split()


def file_name(text):
    """A name without blanks or slashes."""
    return re.sub("[^a-zA-Z0-9.]+", "-", text).strip("-")
