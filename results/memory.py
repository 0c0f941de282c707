"""How much GPU memory do AdvMask's training and evaluation take? A formula, and a table of it.

    python results/memory.py [--batch-size 32]
    python results/memory.py --measure      # on a GPU: what it really takes, and how long

In bytes, float32, as multiples of these sizes: the weights of CLIP; the masked weights; an image;
and, of one image in one block, n d numbers (n tokens of width d, h heads, an MLP of width r d).

While it trains:   weights + M + v + gradients + theta' + batch size * an image's share
While it evaluates: weights + M + 4 * batch size * an image's share

M, v, the gradients and theta' have the size of the masked weights. theta' is computed anew in every
forward pass, but autograd keeps it until the backward pass is done; the gradients of a step are
kept until the next step's are there. When the training returns, v and gradients are gone; M stays.

An image's share is what autograd keeps of it in every block,

    ln_1's input 1, q, k and v 3, attention's output 1, ln_2's input 1, the GELU's input r,
    QuickGELU's sigmoid r; and the input of a weight only where that weight is masked: in_proj's 1,
    out_proj's 1, c_fc's 1, c_proj's r                                        (in units of n d)

then 2 n numbers of every layer norm; the inputs of the outer norms, ln_pre and ln_post; 2 r n d of
workspace in the last block; and copies of the image: 4 in training, 8 in evaluation (the image and
its start, both again for those under attack, delta, its gradient, the sum, the normalised sum).

A fused attention kernel keeps no n x n matrix, but a number for each of its rows: h n. On a CPU its
output is out_proj's input; on a GPU in float32 that is another copy. The plain path, which the
programs take on a CPU, keeps scaled q and k, 2 n d, and the matrix, h n^2; its output only where
out_proj is masked.
"""

import argparse
import contextlib
import io
import json
import pathlib
import sys
import time

import open_clip
import torch

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import advmask
import common

MODELS = "tiny", "ViT-B-32-quickgelu", "ViT-B-16-quickgelu", "ViT-L-14-quickgelu"


def configuration(model):
    """open_clip's model_cfg of a model by name."""
    if model == "tiny":
        text = (HERE.parent / "tiny" / "open_clip_config.json").read_text()
        return json.loads(text)["model_cfg"]
    return open_clip.get_model_config(model)


def shape(config):
    """n, d, h and r of the image tower."""
    vision = config["vision_cfg"]
    n = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
    d = vision["width"]
    h = d // vision.get("head_width", 64)
    return n, d, h, vision.get("mlp_ratio", 4)


def activations(config, weights="", attention="gpu"):
    """Bytes that autograd keeps of one image in a forward pass.

    weights: attn, mlp or both are masked, or none. attention: gpu, fused (a CPU's kernel) or plain.
    """
    n, d, h, r = shape(config)
    attn = weights in ("attn", "both")
    mlp = weights in ("mlp", "both")

    units = 1 + 3 + 1  # both norms' inputs; q, k, v
    units += r  # the GELU's input
    if config.get("quick_gelu"):
        units += r
    if attn:
        units += 1  # in_proj's input
    if mlp:
        units += 1 + r  # c_fc's and c_proj's inputs
    rows = 4 * n  # two norms
    if attention == "plain":
        units += 2 + attn
        rows += h * n**2
    else:
        units += 1
        rows += h * n
        if attention == "gpu":
            units += attn
    outer = 2 * (n * d + 2 * n)
    return 4 * (config["vision_cfg"]["layers"] * (units * n * d + rows) + outer)


def memory(model, weights="attn", attention="gpu"):
    """-> dict of bytes.

    weights: all of CLIP. masked: the masked weights, once. training, evaluation: an image's share.
    """
    config = configuration(model)
    vision = config["vision_cfg"]
    n, d, _, r = shape(config)
    with torch.device("meta"):
        total = sum(p.numel() for p in open_clip.CLIP(**config).parameters())
    matrices = {"attn": 4, "mlp": 2 * r, "both": 4 + 2 * r}[weights]  # of d x d, in every block
    image = 4 * 3 * vision["image_size"] ** 2
    workspace = 4 * 2 * r * n * d
    return {
        "weights": 4 * total,
        "masked": 4 * vision["layers"] * matrices * d**2,
        "training": activations(config, weights, attention) + workspace + 4 * image,
        "evaluation": activations(config, "", attention) + workspace + 8 * image,
    }


def measure(model, batch, dtype, steps=5):
    """One model with random weights on a GPU -> bytes of training, of evaluation; seconds a step.

    The bytes are the peak of what torch allocated. A step of training takes `batch` images, a step
    of the attack four times as many.
    """
    pretrained = "openai" if model == "tiny" else "none"
    clip, config = common.load_clip(model, pretrained, "cuda")
    names = [f"class {k}" for k in range(100)]
    classifier = common.Classifier(clip, config, names, dtype=dtype)
    masks = advmask.attach(clip, advmask.vision_weights(clip, "attn"))
    x = torch.rand(4 * batch, 3, classifier.size, classifier.size, device="cuda")
    with torch.no_grad():
        y = classifier(x).argmax(1)

    def training():
        advmask.train(classifier, masks, [(x[:batch], y[:batch])] * steps, steps, eps=1 / 255)

    def evaluation():
        # in a ball of radius 0 no image breaks, and all stay under attack
        zero = torch.zeros_like(x)
        common.attack(classifier, x, y, zero, eps=0.0, step=1 / 255, steps=steps - 1)

    found = []
    for work in (training, evaluation):
        with contextlib.redirect_stdout(io.StringIO()):  # the log of the training
            work()  # warms up
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            work()
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - started) / steps
        found.append((torch.cuda.max_memory_allocated(), seconds))
        if work is training:
            advmask.merge(clip, masks)
    (trained, train_step), (evaluated, attack_step) = found
    return trained, evaluated, train_step, attack_step


def print_measured(models, batch):
    """The table of `measure`, for these models in both precisions."""
    if not torch.cuda.is_available():
        raise common.Fault("--measure needs a GPU, and torch finds none here")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print(
        f"| model | precision | training, batch {batch} | a step "
        f"| evaluation, batch {4 * batch} | a step of the attack |\n|---|---|---|---|---|---|"
    )
    for model in models:
        for dtype in ("float32", "bfloat16"):
            trained, evaluated, train_step, attack_step = measure(model, batch, dtype)
            print(
                f"| {model} | {dtype} | {trained / 2**30:.1f} GiB | {1000 * train_step:.0f} ms "
                f"| {evaluated / 2**30:.1f} GiB | {1000 * attack_step:.0f} ms |",
                flush=True,
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch-size", type=int, default=32, help="training batch (default: 32)")
    parser.add_argument("--measure", action="store_true", help="measure it on this GPU")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS, help="default all")
    args = parser.parse_args()
    batch = args.batch_size
    if args.measure:
        print_measured(args.models, batch)
        return
    print(
        f"| model | weights | M, v, gradients, theta' | an image's share: training, evaluation "
        f"| training, batch {batch} | evaluation, batch {4 * batch} |\n|---|---|---|---|---|---|"
    )
    for model in args.models:
        m = memory(model)
        training = m["weights"] + 4 * m["masked"] + batch * m["training"]
        evaluation = m["weights"] + m["masked"] + 4 * batch * m["evaluation"]
        print(
            f"| {model} | {m['weights'] / 2**20:.0f} MiB | {4 * m['masked'] / 2**20:.0f} MiB "
            f"| {m['training'] / 2**20:.1f}, {m['evaluation'] / 2**20:.1f} MiB "
            f"| {training / 2**30:.1f} GiB | {evaluation / 2**30:.1f} GiB |"
        )


if __name__ == "__main__":
    common.guard(main)
