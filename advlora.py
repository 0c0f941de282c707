"""AdvLoRA: adversarial low-rank adaptation of CLIP from clustered, aligned factors.

Paper: "Adversarial Low-Rank Adaptation of Vision-Language Models", arXiv 2404.13425. Published:
LoRA's factors start from a clustering of the pre-trained weight (the rank is the number of
centres), their product is aligned with it, an adaptive parameter scales the update, and training is
adversarial, with PGD. The paper does not say how. So all of this is our choice: k-means on the
rows, centres as A, least squares as B, the subtraction of the start so that nothing changes at
first, a learnable scale, and every default here.

    python advlora.py                                      # small CLIP, embedded data, 2-3 minutes
    python advlora.py --model tiny --dataset caltech101    # small CLIP, real photographs
    python advlora.py --dataset caltech101 --shots 16      # OpenAI ViT-B/32, eps 1/255, a GPU

The idea. W_0 (d_out, d_in) is a frozen weight, A (r, d_in) and B (d_out, r) are small factors, a is
one number:

    W = W_0 + (a B A - a_0 B_0 A_0)
    A_0 = c * (k-means centres of W_0's rows),  B_0 = argmin_B |B A_0 - W_0|_F,  a_0 = 1
    min over A, B, a  E[ CE(f_W(x~), y) ]
    x~ = x + argmax over |delta|_inf <= eps of CE(f_W(x + delta), y)

c gives A_0 and B_0 equal norms. W = W_0 at the start, and A, B and a all have a gradient there.
Every matrix adds r (d_in + d_out) + 1 numbers; in_proj counts as three matrices, q, k and v. On
ViT-B/32's image tower with r = 8 that is 1,327,176 numbers.

Evidence, on the small CLIP: 16 shots, eps 3/255, PGD-100, seeds 1-3, an NVIDIA H200, torch 2.11,
open_clip 3.3. Embedded data: clean 82.0 -> 72.2 +- 0.8, robust 6.0 -> 37.8 +- 1.3. All 2,465 test
images of Caltech101: clean 59.9 -> 52.6 +- 1.0, robust 2.8 -> 21.7 +- 1.1. On one CPU core the
training takes 2 and 3 minutes. results/RESULTS.md has more. ViT-B/32 with CLIP's weights has not
been run here.
"""

import math
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import common

# ------------------------------------------------------------------------------------------------
# The method: pieces to copy. They need torch alone
# ------------------------------------------------------------------------------------------------


def kmeans(rows, k, seed=0, iterations=100):
    """k-means++ and Lloyd: rows (n, d) -> centres (k, d), labels (n,).

    Deterministic in the seed. Raises ValueError unless 1 <= k <= n.
    """
    n = len(rows)
    if not 1 <= k <= n:
        raise ValueError(f"cannot make {k} clusters of {n} rows")
    generator = torch.Generator().manual_seed(seed)

    # k-means++: a row is the next centre with probability ~ its squared distance to the nearest one
    centres = rows[torch.randint(n, (1,), generator=generator)]
    while len(centres) < k:
        nearest = torch.cdist(rows, centres).square().min(1).values.cpu()
        if nearest.sum() == 0:  # fewer distinct rows than centres
            nearest = torch.ones(n)
        pick = torch.multinomial(nearest, 1, generator=generator)
        centres = torch.cat([centres, rows[pick]])

    # Lloyd: label rows by the nearest centre, move centres to the means, until no label changes
    labels = None
    for _ in range(iterations):
        distance = torch.cdist(rows, centres)  # (n, k)
        previous, labels = labels, distance.argmin(1)
        for j in range(k):
            if not (labels == j).any():
                # an empty cluster takes the row farthest from its centre, but no cluster's only one
                own = distance.gather(1, labels[:, None])[:, 0]
                alone = labels.bincount(minlength=k)[labels] == 1
                labels[own.masked_fill(alone, -1).argmax()] = j
        centres = torch.stack([rows[labels == j].mean(0) for j in range(k)])
        if previous is not None and torch.equal(previous, labels):
            break
    return centres, labels


class ClusterLoRA(nn.Module):
    """Parametrisation of a frozen weight W_0 (n d_out, d_in), cut into n blocks of rows.

    Block by block W = W_0 + (a B A - a_0 B_0 A_0); W - W_0 has rank up to 2 r. Parameters A
    (n, r, d_in), B (n, d_out, r), and a (n, 1, 1) if adaptive, else a buffer. init: cluster, svd or
    kaiming, for A_0. align: B_0 is the least-squares fit to W_0, else 0. kaiming, not aligned, not
    adaptive is plain LoRA. Raises ValueError unless 1 <= rank <= min(d_out, d_in).
    """

    def __init__(
        self, weight, rank, blocks=1, init="cluster", align=True, adaptive=True, scale=1.0, seed=0
    ):
        super().__init__()
        W_0 = weight.detach().float().unflatten(0, (blocks, -1))  # (n, d_out, d_in)
        n, d_out, d_in = W_0.shape
        if not 1 <= rank <= min(d_out, d_in):
            most = min(d_out, d_in)
            raise ValueError(f"rank {rank} does not fit {d_out} x {d_in}; expected 1 to {most}")
        if init == "cluster":
            # parameter clustering: A_0 = centres of the rows of W_0
            A = torch.stack([kmeans(block, rank, seed)[0] for block in W_0])
        elif init == "svd":
            # W_0 = U S V^T, A_0 = S_r^1/2 V_r^T; aligned, B_0 A_0 is the best of this rank
            _, S, Vh = torch.linalg.svd(W_0, full_matrices=False)
            A = S[:, :rank, None].sqrt() * Vh[:, :rank]
        elif init == "kaiming":
            # LoRA's A: Kaiming uniform with a = sqrt 5
            bound = 1 / math.sqrt(d_in)
            generator = torch.Generator().manual_seed(seed)
            A = (2 * torch.rand(n, rank, d_in, generator=generator) - 1) * bound
        else:
            raise ValueError(f"init {init!r} is unknown; expected cluster, svd or kaiming")
        A = A.to(W_0.device)
        B = torch.zeros(n, d_out, rank, device=W_0.device)
        if align:
            # parameter alignment: B_0 = argmin_B |B A_0 - W_0|_F^2 = W_0 A_0^T (A_0 A_0^T)^+
            B = W_0 @ torch.linalg.pinv(A)
            # the same product from factors of equal norm, so that one rate suits both (our choice)
            norm_A = A.flatten(1).norm(dim=1).clamp(min=1e-12)
            norm_B = B.flatten(1).norm(dim=1).clamp(min=1e-12)
            c = (norm_B / norm_A).sqrt()[:, None, None]
            A, B = c * A, B / c
        a = torch.full((n, 1, 1), float(scale), device=W_0.device)
        self.A = nn.Parameter(A.contiguous())
        self.B = nn.Parameter(B.contiguous())
        if adaptive:
            self.a = nn.Parameter(a)
        else:
            self.register_buffer("a", a)
        self.register_buffer("A_0", self.A.detach().clone())
        self.register_buffer("B_0", self.B.detach().clone())
        self.register_buffer("a_0", a.clone())

    def forward(self, W_0):
        with torch.autocast(W_0.device.type, enabled=False):  # a weight is never in bfloat16
            # W = W_0 + (a B A - a_0 B_0 A_0)
            start = self.a_0 * (self.B_0 @ self.A_0)  # (n, d_out, d_in)
            change = self.a * (self.B @ self.A) - start
            return W_0 + change.flatten(0, 1)


def clip_weights(clip, weights="both", towers="vision"):
    """Names of the weights that are adapted in every block of an open_clip ViT.

    attn: in_proj (3d, d) and out_proj (d, d); mlp: c_fc (4d, d) and c_proj (d, 4d); or both. No
    biases. towers: vision, or both, the text tower as well. Raises KeyError for another word.
    """
    attn = ("attn.in_proj_weight", "attn.out_proj.weight")
    mlp = ("mlp.c_fc.weight", "mlp.c_proj.weight")
    endings = {"attn": attn, "mlp": mlp, "both": attn + mlp}[weights]
    vision, text = "visual.transformer.resblocks.", "transformer.resblocks."
    starts = {"vision": (vision,), "both": (vision, text)}[towers]
    names = []
    for name, _ in clip.named_parameters():
        if name.startswith(starts) and name.endswith(endings):
            names.append(name)
    return names


def attach(model, names, rank=8, seed=0, **options):
    """Freeze the named weights of any model and adapt them -> {name: ClusterLoRA}.

    The weights are float32 matrices. A fused in_proj_weight counts as three blocks, q, k and v.
    options: ClusterLoRA's; every weight has a seed of its own, which its blocks share. At first the
    model computes what it did. Raises ValueError where the rank does not fit, AttributeError where
    a name is unknown.
    """
    loras = {}
    for name in names:
        path, _, weight = name.rpartition(".")
        module = model.get_submodule(path)
        W_0 = getattr(module, weight).requires_grad_(False)
        blocks = 3 if weight == "in_proj_weight" else 1
        loras[name] = ClusterLoRA(W_0, rank, blocks, seed=seed + len(loras), **options)
        parametrize.register_parametrization(module, weight, loras[name])
    return loras


def merge(model, loras):
    """Write W into the weights and take the factors off the model: same logits, no factors."""
    for name in loras:
        path, _, weight = name.rpartition(".")
        parametrize.remove_parametrizations(model.get_submodule(path), weight)


def pgd(classifier, x, y, eps, step, steps):
    """The inner maximisation: x (b, 3, h, w) in [0, 1], y (b,) -> x~.

    Madry et al. 2018: delta_0 ~ U(-eps, eps), delta <- clip(delta + step sign(grad CE), -eps, eps),
    x + delta clipped to [0, 1]. eps and step are in units of x: 1/255, not 1. Raises ValueError in
    train mode, FloatingPointError where the gradient is not finite.
    """
    if classifier.training:
        raise ValueError("attack the network that is deployed: eval mode")
    delta = torch.empty_like(x).uniform_(-eps, eps)
    delta = (x + delta).clamp(0, 1) - x
    for _ in range(steps):
        delta.requires_grad_()
        # the sum, not the mean: one image's gradient must not depend on the batch size
        loss = F.cross_entropy(classifier(x + delta), y, reduction="sum")
        # towards delta alone: no gradients of weights or factors are computed
        (grad,) = torch.autograd.grad(loss, delta)
        if not torch.isfinite(grad).all():
            raise FloatingPointError("the gradient of the attack is not finite")
        delta = (delta.detach() + step * grad.sign()).clamp(-eps, eps)
        delta = (x + delta).clamp(0, 1) - x
    assert delta.abs().max() <= eps + 1e-6, "the attack left the ball; was x in [0, 1]?"
    return x + delta


# ------------------------------------------------------------------------------------------------
# The loop
# ------------------------------------------------------------------------------------------------


def train(classifier, loras, batches, steps, eps, lr=1e-3, clean_weight=0, text=False):
    """Train the factors {name: ClusterLoRA} in place. batches yields (x, y) `steps` times.

    classifier: pixels in [0, 1] -> logits, in eval mode, with the factors in it. AdamW without
    weight decay, which would pull towards B A = 0, not towards W_0 (our choice). text: the text
    tower is adapted too, and so the class features are computed anew in every step.
    """
    started = time.time()
    factors = [p for lora in loras.values() for p in lora.parameters()]
    optimizer = torch.optim.AdamW(factors, lr, weight_decay=0)
    # the rate falls by a cosine from lr towards 0
    decay = 0.5 * (1 + torch.cos(math.pi * torch.arange(steps) / steps))

    for t, (x, y) in enumerate(batches):
        # 1. the class features, by the text tower as it is now: t_c / |t_c|
        if text:
            classifier.text = classifier.encode_classes()  # (classes, d)

        # 2. the inner maximisation: attack the current network, two steps of size eps (our choice)
        x_adv = pgd(classifier, x, y, eps, step=eps, steps=2)

        # 3. L = CE(x~, y) + clean_weight * CE(x, y); the paper's loss is the first term
        logits_adv = classifier(x_adv)
        ce = F.cross_entropy(logits_adv, y)
        clean = torch.zeros((), device=x.device)
        if clean_weight:
            clean = F.cross_entropy(classifier(x), y)
        objective = ce + clean_weight * clean

        # 4. gradients of A, B and a alone
        gradients = torch.autograd.grad(objective, factors)

        # 5. a step of AdamW at the rate of the cosine
        for p, gradient in zip(factors, gradients):
            p.grad = gradient
        optimizer.param_groups[0]["lr"] = lr * decay[t].item()
        optimizer.step()

        if (t + 1) % 50 == 0 or t + 1 == steps:
            right = 100 * (logits_adv.argmax(1) == y).float().mean()
            scales = torch.cat([lora.a.detach().flatten() for lora in loras.values()])
            print(
                f"step {t + 1}/{steps}  ce {ce:.3f}  clean term {clean:.3f}  "
                f"adv acc of the batch {right:.0f} %  a {scales.min():.2f} to {scales.max():.2f}  "
                f"{time.time() - started:.0f} s",
                flush=True,
            )

    # the text features of the factors as they are in the end, a constant again
    if text:
        with torch.no_grad():
            classifier.text = classifier.encode_classes()


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------


def residuals(loras, model):
    """|B_0 A_0 - W_0|_F / |W_0|_F of every block: {name: [number, ...]}."""
    shares = {}
    for name, lora in loras.items():
        path, _, weight = name.rpartition(".")
        W_0 = model.get_submodule(path).parametrizations[weight].original
        W_0 = W_0.float().unflatten(0, (len(lora.a), -1))
        left = (lora.B_0 @ lora.A_0 - W_0).flatten(1).norm(dim=1) / W_0.flatten(1).norm(dim=1)
        shares[name] = [round(share, 4) for share in left.tolist()]
    return shares


def pack(loras):
    """{name: ClusterLoRA} -> {name.A, .B, .a, .A_0, .B_0, .a_0: float32}, sharing memory."""
    tensors = {}
    for name, lora in loras.items():
        for key, value in lora.state_dict().items():
            tensors[f"{name}.{key}"] = value
    return tensors


def unpack(loras, tensors):
    """Copy a file's tensors into the factors. Raises ValueError on other factors."""
    mine = pack(loras)
    found = {name: (value.shape, value.dtype) for name, value in tensors.items()}
    if found != {name: (value.shape, value.dtype) for name, value in mine.items()}:
        raise ValueError("its factors are not those of these weights of this model")
    for name, value in mine.items():
        value.copy_(tensors[name])  # into the factors' own memory


NEEDS = "weights", "towers", "rank", "no_adaptive"


def load(folder, device="cpu", dtype="float32"):
    """The adapted classifier of a finished run: pixels (b, 3, h, w) in [0, 1] -> logits.

    `folder` holds adapter.safetensors; the classes are those of the run. Raises common.Fault, an
    exception with one sentence.
    """
    tensors, facts = common.load_adapter(folder, "advlora", NEEDS)
    classifier = common.adapted_classifier(facts, device, dtype)
    restore(classifier.clip, tensors, facts)
    classifier.set_classes(classifier.classes, classifier.template)  # by the adapted text tower
    return classifier


def restore(clip, tensors, facts):
    """Adapt a CLIP as an adapter file says, and merge -> the factors. Raises common.Fault."""
    try:
        names = clip_weights(clip, facts["weights"], facts["towers"])
        adaptive = facts["no_adaptive"] == "False"
        # a file brings its own start: nothing is clustered or aligned
        plain = {"init": "kaiming", "align": False, "adaptive": adaptive}
        loras = attach(clip, names, int(facts["rank"]), **plain)
        unpack(loras, tensors)
    except (KeyError, ValueError) as fault:
        raise common.Fault(f"the adapter does not fit ({fault}); use the --model it was made with")
    merge(clip, loras)
    return loras


# ------------------------------------------------------------------------------------------------
# The program
# ------------------------------------------------------------------------------------------------


def arguments():
    """The program's argument parser."""
    parser = common.Parser(description=__doc__.split("\n")[0])
    common.add_arguments(parser)
    add = parser.add_argument
    weights = "adapted weights of every block: attention, MLP, or both (our choice)"
    add("--weights", default="both", choices=["attn", "mlp", "both"], help=weights)
    towers = "adapt the image tower, or the text tower as well (our choice)"
    add("--towers", default="vision", choices=["vision", "both"], help=towers)
    add("--rank", type=common.at_least(1), default=8, help="r, the number of centres (our choice)")
    init = "A's start: k-means centres, right singular vectors, or LoRA's noise"
    add("--init", default="cluster", choices=["cluster", "svd", "kaiming"], help=init)
    align = "B = 0 at the start instead of the least-squares alignment"
    add("--no-align", action="store_true", help=align)
    adaptive = "keep a at 1; with --init kaiming --no-align this is plain LoRA, W_0 + B A"
    add("--no-adaptive", action="store_true", help=adaptive)
    clean = "weight of the cross-entropy on clean images (our choice: 0)"
    add("--clean-weight", type=common.at_least(0, float), default=0, help=clean)
    steps = "training steps; default 4 epochs, at least 100 (our choice)"
    add("--steps", type=common.at_least(1), help=steps)
    lr = "AdamW's first rate (our choice)"
    add("--lr", type=common.at_least(0, float), default=1e-3, help=lr)
    return parser


def main():
    started = time.time()
    args = common.parse(arguments())
    folder = common.run_folder(args, "advlora")
    if args.load:
        tensors, facts = common.load_adapter(args.load, "advlora", NEEDS)
        common.check_model(facts, args)
        args.weights, args.towers = facts["weights"], facts["towers"]
        args.no_adaptive = facts["no_adaptive"] == "True"

    # CLIP, frozen, as a classifier; the few-shot images; the test sets
    classifier, images, tests = common.prepare(args)
    clip = classifier.clip
    if args.steps is None:
        args.steps = max(100, 4 * math.ceil(len(images) / args.batch_size))
    if args.towers == "both" and not hasattr(clip, "transformer"):
        raise common.Fault("this model has no text transformer to adapt; use --towers vision")
    width = clip.visual.transformer.width
    if args.towers == "both":
        width = min(width, clip.transformer.width)
    if args.rank > width and not args.load:  # a file brings its own rank
        raise common.Fault(f"--rank {args.rank} does not fit weights of width {width}")

    before, seconds, start = None, 0.0, {}  # with --load nothing is measured before, nor trained
    if args.load:
        loras = restore(clip, tensors, facts)
        args.rank = int(facts["rank"])
    else:
        # what CLIP can do as it is
        before = common.measure(classifier, tests, args)
        print(f"zero-shot: clean {before['clean']:.2f}, PGD-{args.test_steps} {before['pgd']:.2f}")

        # cluster and align, train, save, and write the change into the weights
        loras = attach(
            clip,
            clip_weights(clip, args.weights, args.towers),
            args.rank,
            args.seed,
            init=args.init,
            align=not args.no_align,
            adaptive=not args.no_adaptive,
        )
        start = residuals(loras, clip)
        mean = torch.tensor(sum(start.values(), [])).mean()
        print(f"start {args.init}: |B_0 A_0 - W_0| / |W_0| = {mean:.3f} on average, a_0 = 1")
        print(f"{args.steps} steps, lr {args.lr:g}, clean weight {args.clean_weight:g}")
        batches = common.batches(
            images, classifier.size, args.batch_size, args.steps, args.augment, args.device
        )
        text = args.towers == "both"
        began = time.time()
        train(classifier, loras, batches, args.steps, args.eps, args.lr, args.clean_weight, text)
        seconds = time.time() - began
        common.save_adapter(folder, pack(loras), classifier, args, "advlora")
        merge(clip, loras)

    trained = sum(p.numel() for lora in loras.values() for p in lora.parameters())
    print(f"trained {trained:,} numbers beside {common.sizes(clip)}")

    # what the adapted CLIP can do
    after = common.measure(classifier, tests, args)
    common.print_table([("zero-shot", before), ("AdvLoRA", after)], args.test_steps)
    common.save_run(
        folder,
        args,
        "advlora",
        before=before,
        after=after,
        trained=trained,
        residual=start,
        training_seconds=round(seconds, 1),
        seconds=round(time.time() - started, 1),
    )
    if args.export:
        common.export(clip, classifier.config, args.export)
    common.print_end(folder, args, started, seconds)


if __name__ == "__main__":
    common.guard(main)
