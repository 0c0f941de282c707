"""How fast are training, evaluation and the attack? Ratios within one run.

    OMP_NUM_THREADS=1 python tests/benchmarks/speed.py                        # everything
    python tests/benchmarks/speed.py training --model ViT-B-32-quickgelu      # random weights
    python tests/benchmarks/speed.py evaluation --run runs/advmask-embedded-tiny-16shot-seed1
    python tests/benchmarks/speed.py attack layout precision

training: a step of every method over one forward pass. evaluation: common.evaluate against
torchattacks' PGD on the same images. attack: a step of the attack on ViT-B/32 with and without
common.PatchEmbedding, and its share of what the machine makes of a large matrix product. layout:
tokens first, as common.Classifier runs CLIP, against images first, as open_clip does. precision: a
step of the attack in float32 and in bfloat16.

Things that are compared take turns for --rounds rounds, and the least time of each counts.
"""

import contextlib
import copy
import io
import pathlib
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
import advlora
import advmask
import common
from baselines import advvp, prompts, tecoa, tgazsr

PARTS = ["training", "evaluation", "attack", "layout", "precision"]
VIT = "ViT-B-32-quickgelu"


def now(device):
    """The time, once the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def least_seconds(calls, args):
    """{name: function} -> {name: least seconds}, after a call of each that does not count."""
    seconds = {name: float("inf") for name in calls}
    for call in calls.values():
        call()
    for _ in range(args.rounds):
        for name, call in calls.items():
            began = now(args.device)
            call()
            seconds[name] = min(seconds[name], now(args.device) - began)
    return seconds


def random_clip(model, args):
    """A classifier between two classes: the small CLIP, or a larger one with random weights."""
    clip, config = common.load_clip(model, "none", args.device)
    return common.Classifier(clip, config, ["cat", "dog"], dtype=args.dtype)


def random_batch(net, n, args):
    """n images of noise -> x (n, 3, h, w), y (n,)."""
    x = torch.rand(n, 3, net.size, net.size, device=args.device)
    return x, torch.zeros(n, dtype=torch.long, device=args.device)


def attack_step(net, x, y):
    """One step of an attack: forward, and backward to the pixels alone."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(net(x), y, reduction="sum"), x)


# ------------------------------------------------------------------------------------------------
# A training step over one forward pass
# ------------------------------------------------------------------------------------------------


def train_advmask(net, batches, steps):
    masks = advmask.attach(net.clip, advmask.vision_weights(net.clip))
    advmask.train(net, masks, batches, steps, common.TINY_EPS)


def train_advlora(net, batches, steps):
    # the start does not change what a step costs, and this one needs no clustering
    loras = advlora.attach(net.clip, advlora.clip_weights(net.clip), init="kaiming")
    advlora.train(net, loras, batches, steps, common.TINY_EPS)


def train_tecoa(net, batches, steps):
    tecoa.train(net, tecoa.attach(net.clip), batches, steps, common.TINY_EPS)


def train_tgazsr(net, batches, steps):
    original = copy.deepcopy(net)
    tgazsr.train(net, tgazsr.attach(net.clip), batches, steps, common.TINY_EPS, original)


def train_advvp(net, batches, steps):
    width = net.clip.visual.transformer.width
    prompt = advvp.VisualPrompt(net.size, round(net.size * 30 / 224), 5, width)
    advvp.attach(net.clip, prompt.to(net.clip.logit_scale.device))
    advvp.train(net, prompt, batches, steps, common.TINY_EPS)


def train_prompts(method):
    """The training of AdvVLP, AdvMaPLe or FAP, with two tokens in at most nine blocks."""

    def train(net, batches, steps):
        vision, text = net.clip.visual.transformer, net.clip.transformer
        words = net.clip.token_embedding(net.tokens[0, 1:3])
        depth = min(9, len(vision.resblocks), len(text.resblocks))
        learned = prompts.Prompts(method, words, vision.width, depth)
        prompts.attach(net.clip, learned)
        prompts.train(net, learned, batches, steps, common.TINY_EPS, method)

    return train


METHODS = {
    "AdvMask": train_advmask,
    "AdvLoRA": train_advlora,
    "TeCoA": train_tecoa,
    "TGA-ZSR": train_tgazsr,
    "AdvVP": train_advvp,
    "AdvVLP": train_prompts("advvlp"),
    "AdvMaPLe": train_prompts("advmaple"),
    "FAP": train_prompts("fap"),
}


def time_training(train, plain, args):
    """-> seconds of a step of `train`, seconds of a forward pass of plain CLIP, the least of both.

    Between two steps there are eight forward passes, about as long as a step.
    """
    x, y = random_batch(plain, args.batch, args)
    passes, steps = [], []

    def turns():
        for _ in range(args.rounds + 1):
            began = now(args.device)
            with torch.no_grad():
                for _ in range(8):
                    plain(x)
            passes.append((now(args.device) - began) / 8)
            # a step takes as long as train is away from here
            began = now(args.device)
            yield x, y
            steps.append(now(args.device) - began)

    with contextlib.redirect_stdout(io.StringIO()):
        train(random_clip(args.model, args), turns(), args.rounds + 1)
    return min(steps[1:]), min(passes[1:])  # the first ones warm up


def training(args):
    """Print what a training step of every method costs, in forward passes of plain CLIP."""
    plain = random_clip(args.model, args)
    print(f"training {args.model}, {args.batch} images a step")
    for name, train in METHODS.items():
        step, forward = time_training(train, plain, args)
        shown = f"{1000 * step:.0f} ms, a forward pass {1000 * forward:.0f} ms"
        print(f"a step of {name} {shown}: {step / forward:.2f} to 1", flush=True)


# ------------------------------------------------------------------------------------------------
# The evaluation against torchattacks
# ------------------------------------------------------------------------------------------------


def trained_classifier(args):
    """--run's classifier, or one that is trained here for 100 steps."""
    if args.run:
        return advmask.load(args.run, args.device, args.dtype)
    data = common.load_dataset("embedded", None)
    clip, config = common.load_clip("tiny", device=args.device)
    net = common.Classifier(clip, config, data.classes, data.template, args.dtype)
    masks = advmask.attach(clip, advmask.vision_weights(clip))
    images = common.decode(data.train, net.size)
    batches = common.batches(images, net.size, 32, 100, device=args.device)
    advmask.train(net, masks, batches, 100, common.TINY_EPS, lam=150)
    advmask.merge(clip, masks)
    return net


def evaluation(args):
    """Print how many times as fast as torchattacks' PGD common.evaluate is, on embedded images."""
    try:
        import torchattacks
    except ImportError:
        print("evaluation: left out, as torchattacks is not installed")
        return
    data = common.load_dataset("embedded", None)
    clip, config = common.load_clip("tiny", device=args.device)
    zero_shot = common.Classifier(clip, config, data.classes, data.template, args.dtype)
    images = list(common.TestImages(data.test, zero_shot.size))
    x = torch.stack([pixels for pixels, _ in images]).to(args.device) / 255
    y = torch.tensor([label for _, label in images], device=args.device)
    eps, steps = common.TINY_EPS, args.test_steps

    for name, net in (("zero-shot", zero_shot), ("trained", trained_classifier(args))):
        robust = {}

        def ours():
            robust["common.evaluate"] = common.evaluate(net, images, eps, steps)["pgd"]

        def theirs():
            right = 0
            adversary = torchattacks.PGD(net, eps, 1 / 255, steps)
            for some, labels in zip(x.split(128), y.split(128)):
                found = adversary(some, labels)
                with torch.no_grad():
                    right += (net(found).argmax(1) == labels).sum().item()
            robust["torchattacks"] = 100 * right / len(y)

        seconds = {"common.evaluate": [], "torchattacks": []}
        for _ in range(args.rounds):
            for who, call in (("common.evaluate", ours), ("torchattacks", theirs)):
                began = now(args.device)
                call()
                seconds[who].append(now(args.device) - began)
        ratio = min(seconds["torchattacks"]) / min(seconds["common.evaluate"])
        shown = [f"{who} {min(seconds[who]):.1f} s, {robust[who]:.1f} % left" for who in seconds]
        print(
            f"PGD-{steps}, {name}, {len(y)} images: {'; '.join(shown)}: {ratio:.1f} to 1",
            flush=True,
        )


# ------------------------------------------------------------------------------------------------
# A step of the attack, and what the machine can do
# ------------------------------------------------------------------------------------------------


def plain_convolution(embedding):
    """common.PatchEmbedding as the convolution that it was, with the same weight."""
    d, channels, p, _ = embedding.weight.shape
    convolution = nn.Conv2d(channels, d, p, p, bias=False)
    convolution.weight = embedding.weight
    return convolution


def attack_flops(clip):
    """Operations of an attack step on one image: forward, and backward to the pixels.

    Matrix products alone, 2 operations for a multiplication with its addition. Backward, every
    product with a weight costs as much again, as weights have no gradient, and attention's two
    products twice as much.
    """
    vision = clip.visual
    blocks = len(vision.transformer.resblocks)
    d, channels, p, _ = vision.conv1.weight.shape
    n, _ = vision.positional_embedding.shape  # tokens
    ratio = vision.transformer.resblocks[0].mlp.c_fc.weight.shape[0] / d
    # q, k, v and out; the MLP's two
    weights = blocks * (4 + 2 * ratio) * n * d * d
    weights += (n - 1) * channels * p * p * d  # patches
    weights += vision.proj.numel()  # of the class token
    attention = blocks * 2 * n * n * d  # q k^T, and its product with v
    return 2 * (2 * weights + 3 * attention)


def attack(args):
    """Print what PatchEmbedding saves, and the share of the machine's rate that a step reaches."""
    net = random_clip(VIT, args)
    clip = net.clip
    x, y = random_batch(net, args.batch, args)
    embedding = clip.visual.conv1
    convolution = plain_convolution(embedding).to(args.device)
    dtype = getattr(torch, args.dtype)
    a, b = torch.rand(2, 2048, 2048, device=args.device).to(dtype)

    def step_with(layer):
        clip.visual.conv1 = layer
        attack_step(net, x, y)

    calls = {
        "product": lambda: a @ b,
        "embedding": lambda: step_with(embedding),
        "convolution": lambda: step_with(convolution),
    }
    seconds = least_seconds(calls, args)
    ratio = seconds["convolution"] / seconds["embedding"]
    print(f"attack step on {VIT}, batch {args.batch}: {1000 * seconds['embedding']:.0f} ms")
    print(f"with a plain convolution: {1000 * seconds['convolution']:.0f} ms, {ratio:.2f} to 1")
    rate = 2 * 2048**3 / seconds["product"]
    reached = args.batch * attack_flops(clip) / seconds["embedding"]
    print(
        f"{reached / 1e9:.0f} of the {rate / 1e9:.0f} GFLOP/s of a matrix product of 2048 rows "
        f"and columns: {100 * reached / rate:.0f} %",
        flush=True,
    )


# ------------------------------------------------------------------------------------------------
# Tokens first
# ------------------------------------------------------------------------------------------------


def run_layout(net, batch_first, x, y):
    """A step of the attack with images first, or tokens first."""
    transformer = net.clip.visual.transformer
    transformer.batch_first = batch_first
    for block in transformer.resblocks:
        block.attn.batch_first = batch_first
    attack_step(net, x, y)


def layout(args):
    """Print how many times as fast an attack step is with tokens first."""
    for model, sizes in (("tiny", (8, 32, 128)), (VIT, (2, 8, 32))):
        net = random_clip(model, args)
        for n in sizes:
            x, y = random_batch(net, n, args)
            calls = {
                "images": lambda: run_layout(net, True, x, y),
                "tokens": lambda: run_layout(net, False, x, y),
            }
            seconds = least_seconds(calls, args)
            ratio = seconds["images"] / seconds["tokens"]
            shown = f"images first {1000 * seconds['images']:.0f} ms, tokens first"
            print(
                f"{model}, batch {n}: {shown} {1000 * seconds['tokens']:.0f} ms: {ratio:.2f} to 1"
            )


# ------------------------------------------------------------------------------------------------
# Precision
# ------------------------------------------------------------------------------------------------


def precision(args):
    """Print how long an attack step takes in bfloat16, by its time in float32."""
    for model, n in (("tiny", 32), (VIT, 8)):
        net = random_clip(model, args)
        x, y = random_batch(net, n, args)

        def step_in(dtype):
            net.dtype = dtype
            attack_step(net, x, y)

        calls = {
            "float32": lambda: step_in(torch.float32),
            "bfloat16": lambda: step_in(torch.bfloat16),
        }
        seconds = least_seconds(calls, args)
        shown = [f"{name} {1000 * least:.0f} ms" for name, least in seconds.items()]
        ratio = seconds["bfloat16"] / seconds["float32"]
        print(f"{model}, batch {n}: {', '.join(shown)}: {ratio:.2f} to 1", flush=True)


def arguments():
    """The script's argument parser."""
    parser = common.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default all")
    add("--model", default="tiny", help="of the part training")
    run = "an AdvMask run, for the part evaluation; default a training of 100 steps here"
    add("--run", type=pathlib.Path, help=run)
    add("--test-steps", type=common.at_least(1), default=100, help="of the part evaluation")
    add("--batch", type=common.at_least(1), default=32, help="images of the parts training, attack")
    add("--rounds", type=common.at_least(1), default=3, help="the least time of so many counts")
    dtypes = ["auto", "float32", "bfloat16"]
    dtype = "auto: bfloat16 where it is the faster, else float32"
    add("--dtype", default="auto", choices=dtypes, help=dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="torch device")
    return parser


def main():
    args = arguments().parse_args()
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        raise common.Fault(f"unknown part {unknown[0]}; expected some of {', '.join(PARTS)}")
    if args.dtype == "auto":
        args.dtype = (
            "bfloat16" if common.computes_in_bfloat16(torch.device(args.device).type) else "float32"
        )
    torch.backends.cuda.enable_flash_sdp(args.device != "cpu")  # as common.parse
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} threads, {args.dtype} on {args.device}")
    measure = dict(zip(PARTS, (training, evaluation, attack, layout, precision)))
    for part in args.parts or PARTS:
        measure[part](args)


if __name__ == "__main__":
    common.guard(main)
