"""Is the change that adversarial fine-tuning makes of low rank, and how close do clusters come to the best start of that rank?

    python advlora.py --full --model tiny --dataset caltech101 --out runs/full
    python results/lowrank.py runs/full/advlora-caltech101-tiny-16shot-seed1            # prints, and writes results/lowrank/<dataset>.json and .png

For every adapted weight of the image tower (q, k and v apart): the singular values of W - W_0, W after full adversarial fine-tuning; the rank that
holds 90 % of their energy; and |B_0 A_0 - W_0|_F / |W_0|_F at rank 8 for clusters (aligned, and by membership alone) against the SVD optimum.
Then the seconds that clustering and alignment take for the shapes of ViT-B/32, which need no trained weights.
"""
import json
import pathlib
import statistics
import sys
import time
from types import SimpleNamespace

import torch
from matplotlib.figure import Figure

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import advlora
import common

parser = common.Parser(description=__doc__.split("\n")[0])
parser.add_argument("adapter", type=pathlib.Path, help="folder of a run of advlora.py --full on the small CLIP")
parser.add_argument("--rank", type=common.at_least(1), default=8, help="rank of the starts that are compared")
BLOCKS = {"attn.in_proj_weight": ["q", "k", "v"], "attn.out_proj.weight": ["out"], "mlp.c_fc.weight": ["fc"], "mlp.c_proj.weight": ["proj"]}
COLOURS = {"q": "#0072B2", "k": "#E69F00", "v": "#009E73", "out": "#CC79A7", "fc": "#D55E00", "proj": "#000000"}


def singular_values(change):
    """-> singular values of change (m, n), and the smallest rank that holds 90 % of the sum of their squares."""
    values = torch.linalg.svdvals(change)
    energy = values.square().cumsum(0) / values.square().sum()
    return values, int((energy < 0.9).sum()) + 1


def picture(rows, title):
    """Cumulated energy against the rank, a line per weight."""
    axes = (figure := Figure((5, 3.2), layout="constrained")).subplots()
    for row in rows:
        values = torch.tensor(row["singular_values"])
        energy = 100 * values.square().cumsum(0) / values.square().sum()
        axes.plot(range(1, len(energy) + 1), energy, color=COLOURS[row["block"]], linewidth=1, label=row["block"] if row["layer"] == 0 else None)
    axes.axhline(90, color="black", linewidth=0.7, linestyle=":")
    axes.set(xscale="log", xlabel=f"rank (of {len(values)})", ylabel="energy of W - W_0 held [%]", ylim=(0, 101), title=title)
    axes.legend(title="weight")
    return figure


def table(facts):
    """Markdown, a line per layer: rank for 90 % of the change of each weight; means over its weights: |W - W_0|_F / |W_0|_F, and residuals.
    Last, for comparison, that rank of Gaussian matrices of the weights' shapes."""
    rows, starts = facts["rows"], ("svd", "cluster", "membership", "gaussian")
    blocks = {r["block"]: r["full_rank"] for r in rows}
    names = ["layer", *(f"{block}, of {full}" for block, full in blocks.items()), "change", "SVD", "clusters", "membership", "noise"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for layer in sorted({r["layer"] for r in rows}):
        own = [r for r in rows if r["layer"] == layer]
        means = [statistics.mean(r["residual"][k] for r in own) for k in starts]
        lines.append(f"| {layer} | {' | '.join(str(r['rank_90']) for r in own)} | {statistics.mean(r['change'] for r in own):.3f} | "
                     + " | ".join(f"{m:.3f}" for m in means) + " |")
    torch.manual_seed(0)
    ranks = [singular_values(torch.randn(full, full * (4 if block in ("fc", "proj") else 1)))[1] for block, full in blocks.items()]
    lines.append(f"| Gaussian | {' | '.join(map(str, ranks))} |" + "  |" * 5)
    return "\n".join(lines)


def main():
    args = parser.parse_args()
    tiny = SimpleNamespace(model="tiny", pretrained="openai")
    tensors, metadata = common.load_adapter(args.adapter, "advlora", tiny, ["full"])
    if metadata["full"] != "True":
        raise common.Fault(f"{args.adapter} is not a run of advlora.py --full")
    clip, _ = common.load_clip("tiny")
    rows = []
    for name, before in clip.visual.named_parameters(prefix="visual"):
        if (blocks := BLOCKS.get(name.split(".", 4)[-1])) is None:
            continue
        for block, W_0, W in zip(blocks, before.detach().chunk(len(blocks)), tensors[name].chunk(len(blocks))):
            values, rank = singular_values(W - W_0)
            centres, labels = advlora.kmeans(W_0, args.rank)
            residual = {init: advlora.ClusterLoRA(W_0, args.rank, init=init).residual.item() for init in ("cluster", "svd", "gaussian")}
            residual["membership"] = ((centres[labels] - W_0).norm() / W_0.norm()).item()
            rows.append({"layer": int(name.split(".")[3]), "block": block, "rank_90": rank, "full_rank": len(values),
                         "change": ((W - W_0).norm() / W_0.norm()).item(), "residual": residual,
                         "singular_values": [round(v, 5) for v in values.tolist()]})
    seconds = {}
    for init in ("cluster", "svd"):
        start = time.time()
        for _ in range(12):
            for rows_columns, blocks in (((3 * 768, 768), 3), ((768, 768), 1), ((4 * 768, 768), 1), ((768, 4 * 768), 1)):
                advlora.ClusterLoRA(torch.randn(rows_columns), 8, blocks, init)
        seconds[init] = round(time.time() - start, 1)
    facts = {**{k: metadata[k] for k in ("dataset", "eps", "seed")}, "rank": args.rank, "vit_b_32_seconds": seconds, "rows": rows}
    print(table(facts))
    print(f"\nmedian rank for 90 %: {statistics.median(r['rank_90'] for r in rows)}; seconds for ViT-B/32's shapes at rank 8: clusters "
          f"{seconds['cluster']}, SVD {seconds['svd']}")
    common.write(HERE / "lowrank" / f"{metadata['dataset']}.json", (json.dumps(facts) + "\n").encode())
    picture(rows, f"small CLIP, {metadata['dataset']}").savefig(HERE / "lowrank" / f"{metadata['dataset']}.png", dpi=80)


if __name__ == "__main__":
    common.guard(main)
