"""How far did a run move the weights of the image tower? A line of JSON for every run.

    python results/movement.py runs/advmask-embedded-tiny-16shot-seed1 ...

movement is |theta' - theta| / |theta|, with the norm over all entries: of the attention matrices,
which AdvMask masks by default, and of the whole image tower. off is the share of the attention's
entries that became zero, and size their mean |theta|, as a share of the mean of all.
"""

import argparse
import importlib
import json
import pathlib
import sys

import safetensors
import torch

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import common

PROGRAMS = {
    "advmask": "advmask",
    "advlora": "advlora",
    "tecoa": "baselines.tecoa",
    "tgazsr": "baselines.tgazsr",
}


def weights(clip):
    """{name: theta} of the image tower."""
    return {name: p.detach().float() for name, p in clip.visual.named_parameters()}


def movement(before, after, names):
    """|theta' - theta| / |theta| over these weights."""
    moved = sum((after[name] - before[name]).square().sum().item() for name in names)
    length = sum(before[name].square().sum().item() for name in names)
    return (moved / length) ** 0.5


def measure(folder):
    """What a run did to the weights -> dict. Raises common.Fault where it is no run of PROGRAMS."""
    facts = read_facts(folder)
    clip, _ = common.load_clip(facts["model"], facts["pretrained"])
    before = weights(clip)
    program = importlib.import_module(PROGRAMS[facts["method"]])
    after = weights(program.load(folder).clip)
    attention = [name for name in before if name.endswith(("in_proj_weight", "out_proj.weight"))]

    sizes, gone = [], []
    for name in attention:
        off = (after[name] == 0) & (before[name] != 0)
        sizes.append(before[name].abs().flatten())
        gone.append(off.flatten())
    sizes, gone = torch.cat(sizes), torch.cat(gone)
    return {
        "run": folder.name,
        "method": facts["method"],
        "model": facts["model"],
        "attention": movement(before, after, attention),
        "tower": movement(before, after, before),
        "off": gone.float().mean().item(),
        "size": (sizes[gone].mean() / sizes.mean()).item() if gone.any() else 0.0,
    }


def read_facts(folder):
    """The metadata of a run's adapter. Raises common.Fault where no program of PROGRAMS made it."""
    file = folder / "adapter.safetensors"
    if not file.exists():
        raise common.Fault(f"{folder} has no adapter.safetensors; expected the folder of a run")
    with safetensors.safe_open(file, "pt") as adapter:
        facts = adapter.metadata()
    if facts["method"] not in PROGRAMS:
        wanted = f"expected a run of {', '.join(PROGRAMS)}"
        raise common.Fault(f"{folder} is a run of {facts['method']}; {wanted}")
    return facts


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=pathlib.Path, metavar="RUN")
    for folder in parser.parse_args().runs:
        print(json.dumps(measure(folder)), flush=True)


if __name__ == "__main__":
    common.guard(main)
