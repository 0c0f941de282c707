"""How much memory do training and evaluation take on a GPU? A formula, and the README's table of it.

    python results/memory.py [--batch-size 32] [--test-batch-size 128]

float32, in bytes = 4 x numbers. CLIP's weights; for AdvMask M, its gradient, its momentum and theta' (cached during a step), each of the masked
weights' size; and what autograd keeps of a forward pass. That is, of every image and block, in units of n d (n tokens of width d, h heads, MLP r d):

    ln_1's input 1 + (in_proj's input 1) + q, k, v 3 + attention's output 1 + (out_proj's input 1) + ln_2's input 1 + (c_fc's input 1)
    + the GELU's input r, QuickGELU's sigmoid r + (c_proj's input r),            what is in brackets: only where that weight is trained;

a fused attention kernel (the GPU's, and --attention torch on a CPU) keeps no n x n matrix, but a number for each of its rows: h n. The path that
--attention auto takes on a CPU is the plain one: scaled q and k, 2 n d, and the matrix, h n^2, and the output only as out_proj's input. Layer norms
keep 2 n each; outside the blocks, the image and the inputs of the two outer norms. On a CPU the fused kernel's output is out_proj's input; on a GPU
in float32 it is laid out again for it (from torch's source; no GPU was at hand). tests/test_protocols.py compares the sum with measured peaks.
"""
import argparse
import json
import pathlib

import open_clip
import torch

HERE = pathlib.Path(__file__).resolve().parent
MODELS = "tiny", "ViT-B-32-quickgelu", "ViT-B-16-quickgelu", "ViT-L-14-quickgelu"


def memory(model, layers="mhsa", attention="gpu"):
    """-> dict of bytes: weights (all of CLIP), masked (the weights that --layers masks, once), training and evaluation (activations of an image).

    layers: mhsa, mlp or both; attention: gpu, fused (a CPU's kernel) or plain.
    """
    tiny = HERE.parent / "tiny" / "open_clip_config.json"
    config = json.loads(tiny.read_text())["model_cfg"] if model == "tiny" else open_clip.get_model_config(model)
    with torch.device("meta"):
        weights = sum(p.numel() for p in open_clip.CLIP(**config).parameters())
    vision = config["vision_cfg"]
    d, blocks, r, size = vision["width"], vision["layers"], vision.get("mlp_ratio", 4), vision["image_size"]
    n, h = (size // vision["patch_size"])**2 + 1, d // vision.get("head_width", 64)

    def activations(mhsa, mlp):
        kept = 1 + mhsa + 3 + 1 + r * (2 if config.get("quick_gelu") else 1) + mlp * (1 + r)               # in n d
        kept += {"gpu": 1 + mhsa, "fused": 1, "plain": mhsa + 2 + h * n / d}[attention]
        rows = 4 * n + (0 if attention == "plain" else h * n)
        return 4 * (blocks * (kept * n * d + rows) + 3 * size**2 + 2 * (n * d + 2 * n))
    mhsa, mlp = layers != "mlp", layers != "mhsa"
    return {"weights": 4 * weights, "masked": 4 * blocks * d * d * (4 * mhsa + 2 * r * mlp), "training": activations(mhsa, mlp),
            "evaluation": activations(False, False)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch-size", type=int, default=32, help="training batch")
    parser.add_argument("--test-batch-size", type=int, default=128, help="evaluation batch")
    args = parser.parse_args()
    print(f"| model | weights | M, gradient, momentum, theta' | activations of an image: training, evaluation | training, batch {args.batch_size} |"
          f" evaluation, batch {args.test_batch_size} |\n|---|---|---|---|---|---|")
    for model in MODELS:
        m = memory(model)
        training = m["weights"] + 4 * m["masked"] + args.batch_size * m["training"]
        # M, its gradient and its momentum still exist
        evaluation = m["weights"] + 3 * m["masked"] + args.test_batch_size * m["evaluation"]
        print(f"| {model} | {m['weights'] / 2**20:.0f} MiB | {4 * m['masked'] / 2**20:.0f} MiB | {m['training'] / 2**20:.1f}, "
              f"{m['evaluation'] / 2**20:.1f} MiB | {training / 2**30:.1f} GiB | {evaluation / 2**30:.1f} GiB |")


if __name__ == "__main__":
    main()
