"""Is the change that adversarial fine-tuning makes of low rank? How good is a clustered start?

    python -m baselines.tecoa --model tiny --dataset caltech101 --out runs/full
    python results/lowrank.py runs/full/tecoa-caltech101-tiny-16shot-seed1
    python results/lowrank.py --write    # put the tables into RESULTS.md

For every matrix of the image tower's blocks (q, k and v apart): the singular values of W - W_0, W
after full adversarial fine-tuning; the rank that holds 90 % of their energy; and
|B_0 A_0 - W_0|_F / |W_0|_F at rank 8, for clusters (aligned, and by membership alone), for the SVD,
which is the optimum, and for aligned noise. Then the seconds that clustering and alignment take for
the shapes of ViT-B/32, which need no trained weights. It prints the table, and writes to
results/lowrank/, or --out, <dataset>.json and <dataset>.png.
"""

import io
import json
import pathlib
import statistics
import sys
import time

import torch

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import sweep

import advlora
import common

PAGE = HERE / "RESULTS.md"
# the matrices of a block -> what they are called here; in_proj is three
BLOCKS = {
    "attn.in_proj_weight": ["q", "k", "v"],
    "attn.out_proj.weight": ["out"],
    "mlp.c_fc.weight": ["fc"],
    "mlp.c_proj.weight": ["proj"],
}
# Okabe and Ito's, which colour-blind people tell apart
COLOURS = {
    "q": "#0072B2",
    "k": "#E69F00",
    "v": "#009E73",
    "out": "#CC79A7",
    "fc": "#D55E00",
    "proj": "#000000",
}
STARTS = {"svd": "SVD", "cluster": "clusters", "membership": "membership", "kaiming": "noise"}
# ViT-B/32: shape of each matrix of a block, and how many matrices it is
VIT_B_32 = [((2304, 768), 3), ((768, 768), 1), ((3072, 768), 1), ((768, 3072), 1)]


def singular_values(change):
    """change (m, n) -> its singular values; the least rank that holds 90 % of their squares."""
    values = torch.linalg.svdvals(change)
    energy = values.square().cumsum(0) / values.square().sum()
    return values, int((energy < 0.9).sum()) + 1


def residuals(W_0, rank):
    """W_0 (m, n) -> {start: |B_0 A_0 - W_0|_F / |W_0|_F} for every kind of start."""
    shares = {}
    for init in ("cluster", "svd", "kaiming"):
        start = advlora.ClusterLoRA(W_0, rank, init=init)
        product = (start.B_0 @ start.A_0)[0]
        shares[init] = ((product - W_0).norm() / W_0.norm()).item()
    # B one-hot: every row of W_0 is replaced by its centre
    centres, labels = advlora.kmeans(W_0, rank)
    shares["membership"] = ((centres[labels] - W_0).norm() / W_0.norm()).item()
    return shares


def look_at(clip, tensors, rank):
    """A CLIP as it was, and its image tower's weights after the training -> a row a matrix."""
    rows = []
    for name, before in clip.visual.named_parameters(prefix="visual"):
        if not name.startswith("visual.transformer.resblocks."):
            continue
        layer, _, kind = name.removeprefix("visual.transformer.resblocks.").partition(".")
        if kind not in BLOCKS:
            continue
        blocks = BLOCKS[kind]
        befores = before.detach().float().chunk(len(blocks))
        afters = tensors[name].float().chunk(len(blocks))
        for block, W_0, W in zip(blocks, befores, afters):
            values, rank_90 = singular_values(W - W_0)
            row = {
                "layer": int(layer),
                "block": block,
                "rank_90": rank_90,
                "full_rank": len(values),
                "change": ((W - W_0).norm() / W_0.norm()).item(),
                "residual": residuals(W_0, rank),
                "singular_values": values.tolist(),
            }
            rows.append(sweep.shorten(row))
    return rows


def seconds_for_vit_b_32():
    """{start: seconds to make it at rank 8 for random matrices of all 12 blocks' shapes}."""
    seconds = {}
    for init in ("cluster", "svd"):
        began = time.time()
        for _ in range(12):
            for shape, blocks in VIT_B_32:
                advlora.ClusterLoRA(torch.randn(shape), 8, blocks, init)
        seconds[init] = round(time.time() - began, 1)
    return seconds


def table(facts):
    """Markdown, a line a layer: the rank for 90 % of the change of each matrix, and means over its
    matrices: |W - W_0|_F / |W_0|_F, and the residuals. Last, that rank of Gaussian matrices."""
    rows = facts["rows"]
    full_ranks = {row["block"]: row["full_rank"] for row in rows}
    names = ["layer"]
    names += [f"{block}, of {full}" for block, full in full_ranks.items()]
    names += ["change", *STARTS.values()]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for layer in sorted({row["layer"] for row in rows}):
        own = [row for row in rows if row["layer"] == layer]
        cells = [str(layer)]
        cells += [str(row["rank_90"]) for row in own]
        cells.append(f"{statistics.mean(row['change'] for row in own):.3f}")
        for start in STARTS:
            cells.append(f"{statistics.mean(row['residual'][start] for row in own):.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    torch.manual_seed(0)
    cells = ["Gaussian"]
    for block, full in full_ranks.items():
        wide = 4 if block in ("fc", "proj") else 1
        _, rank_90 = singular_values(torch.randn(full, wide * full))
        cells.append(str(rank_90))
    lines.append(f"| {' | '.join(cells)} |" + "  |" * 5)
    return "\n".join(lines)


def picture(rows, title):
    """Energy of the change over the rank, a line a matrix -> a PNG, bytes."""
    from matplotlib.figure import Figure  # tests/requirements.txt has it

    figure = Figure((5, 3.2), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for row in rows:
        values = torch.tensor(row["singular_values"])
        energy = 100 * values.square().cumsum(0) / values.square().sum()
        label = row["block"] if row["layer"] == 0 else None
        ranks = range(1, len(energy) + 1)
        axes.plot(ranks, energy, color=COLOURS[row["block"]], linewidth=1, label=label)
    axes.axhline(90, color="black", linewidth=0.7, linestyle=":")
    axes.set(xscale="log", xlabel=f"rank (of {len(values)})", ylim=(0, 101), title=title)
    axes.set_ylabel("energy of W - W_0 held [%]")
    axes.legend(title="weight")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=80)
    return file.getvalue()


def fill(text):
    """A page with the tables in their places."""
    for file in sorted((HERE / "lowrank").glob("*.json")):
        text = sweep.put(text, f"<!-- lowrank {file.stem} -->", table(json.loads(file.read_text())))
    return text


def arguments():
    """The program's argument parser."""
    parser = common.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("run", nargs="?", type=pathlib.Path, help="folder of a run of baselines/tecoa.py")
    add("--write", action="store_true", help="put the tables that are there into RESULTS.md")
    add("--rank", type=common.at_least(1), default=8, help="of the starts that are compared")
    out = "folder of the results"
    add("--out", type=pathlib.Path, default=HERE / "lowrank", help=out)
    return parser


def main():
    args = arguments().parse_args()
    if args.write:
        common.write(PAGE, fill(PAGE.read_text(encoding="utf-8")).encode())
        return
    if args.run is None:
        raise common.Fault("expected the folder of a run of baselines/tecoa.py, or --write")
    needs = ["dataset", "eps", "seed", "commit"]
    tensors, told = common.load_adapter(args.run, "tecoa", needs)
    clip, _ = common.load_clip(told["model"], told["pretrained"])
    try:
        rows = look_at(clip, tensors, args.rank)
    except (KeyError, ValueError, RuntimeError) as fault:
        raise common.Fault(f"{args.run} does not fit its model, or --rank {args.rank} ({fault})")
    seconds = seconds_for_vit_b_32()
    facts = {key: told[key] for key in needs}
    facts |= {"rank": args.rank, "vit_b_32_seconds": seconds, "rows": rows}

    print(table(facts))
    median = statistics.median(row["rank_90"] for row in rows)
    print(f"\nmedian rank for 90 %: {median}; seconds for ViT-B/32's shapes at rank 8: ", end="")
    print(f"clusters {seconds['cluster']}, SVD {seconds['svd']}")
    model = "small CLIP" if told["model"] == "tiny" else told["model"]
    name = told["dataset"]
    if told["model"] != "tiny":
        name += f"-{sweep.file_name(told['model'])}"
    common.write(args.out / f"{name}.json", (json.dumps(facts) + "\n").encode())
    common.write(args.out / f"{name}.png", picture(rows, f"{model}, {name}"))


if __name__ == "__main__":
    common.guard(main)
