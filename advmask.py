"""AdvMask: learn binary masks that uncover a robust sub-network inside frozen CLIP.

Paper: "Identifying Robust Neural Pathways: Few-Shot Adversarial Mask Tuning for Vision-Language
Models", ICLR 2026, https://openreview.net/forum?id=kzGkXpW4FT. This is an independent
implementation. What the paper does not state is marked "(our choice)".

    python advmask.py                                      # small CLIP, embedded data, 2 minutes
    python advmask.py --model tiny --dataset caltech101    # small CLIP, real photographs
    python advmask.py --dataset caltech101 --shots 16      # OpenAI ViT-B/32, eps 1/255, a GPU

The idea. theta are CLIP's weights, M a real mask of the same shape, alpha a threshold. The network
runs on theta' = theta * 1[M > alpha]. theta stays frozen; only M is trained, on adversarial images,
through a straight-through gradient. One bit per masked weight is the whole adapter.

    min over M  E[ CE(f_theta'(x~), y) + lambda * L_LAFA ]
    x~ = x + argmax over |delta|_inf <= eps of CE(f_theta'(x + delta), y)

Evidence. EVIDENCE
"""

import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import common

# ------------------------------------------------------------------------------------------------
# The method: pieces that work anywhere, with torch alone
# ------------------------------------------------------------------------------------------------


class BinaryMask(nn.Module):
    """Parametrisation of a frozen weight: theta -> theta * 1[M > alpha].

    M has the weight's shape and starts at `init`: every weight is kept. Start and threshold are
    R-AMT's (our choice); only the way between them matters, and the flip budget is in its units.
    M and theta' are float32 where the weight is. Raises ValueError unless init > alpha.
    """

    def __init__(self, weight, init=1e-2, alpha=5e-3):
        super().__init__()
        if not math.inf > init > alpha > -math.inf:
            raise ValueError(f"init {init} must lie above alpha {alpha}: a mask starts with all on")
        self.init = init
        self.alpha = alpha
        self.M = nn.Parameter(torch.full_like(weight, init, requires_grad=True))

    def forward(self, theta):
        # M_bin = 1[M > alpha]; the added zero makes its gradient that of M: straight-through
        M_bin = (self.M > self.alpha).to(theta.dtype) + (self.M - self.M.detach())
        # theta' = theta * M_bin, so dL/dM_bin = theta * dL/dtheta'
        return theta * M_bin

    def kept(self):
        """1[M > alpha] as bool, of the weight's shape."""
        return self.M.detach() > self.alpha


def vision_weights(clip, weights="attn"):
    """Names of the weights that are masked in every vision block of an open_clip ViT.

    attn: in_proj (3d, d) and out_proj (d, d); mlp: c_fc (4d, d) and c_proj (d, 4d); or both. No
    biases. attn is the paper's default.
    """
    attn = ("attn.in_proj_weight", "attn.out_proj.weight")
    mlp = ("mlp.c_fc.weight", "mlp.c_proj.weight")
    endings = {"attn": attn, "mlp": mlp, "both": attn + mlp}[weights]
    names = []
    for name, _ in clip.named_parameters():
        if name.startswith("visual.transformer.resblocks.") and name.endswith(endings):
            names.append(name)
    return names


def attach(model, names, init=1e-2, alpha=5e-3):
    """Freeze the named weights of any model and mask them -> {name: BinaryMask}.

    Fresh masks keep every weight, so the model computes what it did. Raises AttributeError where
    a name is unknown.
    """
    masks = {}
    for name in names:
        path, _, weight = name.rpartition(".")
        module = model.get_submodule(path)
        theta = getattr(module, weight).requires_grad_(False)
        masks[name] = BinaryMask(theta, init, alpha)
        parametrize.register_parametrization(module, weight, masks[name])
    return masks


def merge(model, masks):
    """Write theta' into the weights and drop the masks: an ordinary model, with the same logits."""
    for name in masks:
        path, _, weight = name.rpartition(".")
        parametrize.remove_parametrizations(model.get_submodule(path), weight)


def pgd(classifier, x, y, eps, step, steps):
    """The inner maximisation: x (b, 3, h, w) in [0, 1], y (b,) -> x~.

    Madry et al. 2018: delta_0 ~ U(-eps, eps), delta <- clip(delta + step sign(grad CE), -eps, eps),
    x + delta clipped to [0, 1]. eps and step in pixels. Raises ValueError in train mode,
    FloatingPointError where the gradient is not finite.
    """
    if classifier.training:
        raise ValueError("attack the network that is deployed: eval mode")
    delta = torch.empty_like(x).uniform_(-eps, eps)
    delta = (x + delta).clamp(0, 1) - x
    for _ in range(steps):
        delta.requires_grad_()
        # the sum, not the mean: one image's gradient must not depend on the batch size
        loss = F.cross_entropy(classifier(x + delta), y, reduction="sum")
        # towards delta alone: no gradients of weights or masks are computed
        (grad,) = torch.autograd.grad(loss, delta)
        if not torch.isfinite(grad).all():
            raise FloatingPointError("the gradient of the attack is not finite")
        delta = (delta.detach() + step * grad.sign()).clamp(-eps, eps)
        delta = (x + delta).clamp(0, 1) - x
    assert delta.abs().max() <= eps + 1e-6, "the attack left the ball"
    return x + delta


def features(classifier, x):
    """-> z (layers, b, d), the CLS token after every vision block; logits (b, classes).

    z has unit length. `classifier.clip.visual.transformer` is open_clip's. That it is the CLS token
    and of unit length is our choice.
    """
    transformer = classifier.clip.visual.transformer
    z = []

    def keep(block, inputs, output):
        # output: (b, tokens, d), or (tokens, b, d) where the blocks run tokens first
        cls = output[:, 0] if transformer.batch_first else output[0]
        z.append(F.normalize(cls.float(), dim=-1))

    hooks = [block.register_forward_hook(keep) for block in transformer.resblocks]
    try:
        logits = classifier(x)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(z), logits


def lafa(z_clean, z_adv, p_true, eps_w=1e-6):
    """L_LAFA, layer-wise adaptive feature alignment (AdvMask) -> scalar.

    z_clean, z_adv (layers, b, d); p_true (b,), the model's own p(y|x) of the true class on the
    clean image, a constant. eps_w only keeps the division finite (our choice).

    L = 1/(|Layers||B|) sum_l sum_x  p(y|x) / (E_B[p(y'|x')] + eps_w) * |z_clean^l - z_adv^l|_2^2
    """
    p_true = p_true.detach()
    weight = p_true / (p_true.mean() + eps_w)  # (b,), mean 1
    distance = (z_clean - z_adv).square().sum(-1)  # (layers, b)
    return (weight * distance).mean()


def consistency(kind, z_clean, z_adv, logits_clean, logits_adv, y):
    """The second term of L_mask -> scalar: lafa, or one of the paper's ablations.

    align: LAFA without the weight. kl and js: between the outputs. ce: nothing.
    """
    log_p = F.log_softmax(logits_clean, -1)  # (b, classes)
    log_q = F.log_softmax(logits_adv, -1)
    if kind == "lafa":
        p_true = log_p.exp()[range(len(y)), y]  # (b,)
        return lafa(z_clean, z_adv, p_true)
    if kind == "align":
        return (z_clean - z_adv).square().sum(-1).mean()
    if kind == "kl":
        # KL(P_clean || P_adv)
        return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    if kind == "js":
        # (KL(P || R) + KL(Q || R)) / 2,  R = (P + Q) / 2
        log_r = torch.logaddexp(log_p, log_q) - math.log(2)
        p_to_r = F.kl_div(log_r, log_p, log_target=True, reduction="batchmean")
        q_to_r = F.kl_div(log_r, log_q, log_target=True, reduction="batchmean")
        return (p_to_r + q_to_r) / 2
    return torch.zeros((), device=y.device)


# ------------------------------------------------------------------------------------------------
# The loop
# ------------------------------------------------------------------------------------------------


def train(classifier, masks, batches, steps, eps, loss="lafa", lam=50, budget=1.5):
    """Train the masks {name: BinaryMask} in place, on `steps` batches (x, y).

    classifier: pixels in [0, 1] -> logits, in eval mode, with the masks in it. The optimiser is our
    choice: the published M <- M - gamma dL/dM_bin, with gradients of one size, a running mean and a
    cosine. budget, the flip budget, sets gamma: how many times over an entry whose gradient is
    always of average size and one sign would go from init to alpha.
    """
    started = time.time()
    M = [mask.M for mask in masks.values()]
    v = [torch.zeros_like(m) for m in M]
    entries = sum(m.numel() for m in M)
    way = max(mask.init - mask.alpha for mask in masks.values())
    # gamma_t falls by a cosine from its start to 0; the sum over all steps is budget * way
    cosine = 0.5 * (1 + torch.cos(math.pi * torch.arange(steps) / steps))
    gamma = budget * way * cosine / cosine.sum()

    for t, (x, y) in enumerate(batches):
        # 1. the inner maximisation: attack the current network, two steps of size eps
        x_adv = pgd(classifier, x, y, eps, step=eps, steps=2)

        # 2. what every block sees of the clean and of the attacked image
        with torch.no_grad():  # the clean side is a constant (our choice)
            z_clean, logits_clean = features(classifier, x)
        z_adv, logits_adv = features(classifier, x_adv)

        # 3. L_mask = CE(x~, y) + lambda * L_LAFA
        ce = F.cross_entropy(logits_adv, y)
        term = consistency(loss, z_clean, z_adv, logits_clean, logits_adv, y)
        objective = ce + lam * term

        # 4. straight-through: the gradient of M is that of M_bin
        gradients = torch.autograd.grad(objective, M)

        # 5. M <- M - gamma_t v,  v <- 0.9 v + 0.1 g / rms(g), from v = 0
        rms = nn.utils.get_total_norm(gradients) / math.sqrt(entries)  # one number for all masks
        for m, v_m, g in zip(M, v, gradients):
            v_m.mul_(0.9).add_(0.1 * g / rms.clamp(min=1e-12))
            m.data -= gamma[t].item() * v_m

        if (t + 1) % 50 == 0 or t + 1 == steps:
            right = 100 * (logits_adv.argmax(1) == y).float().mean()
            print(
                f"step {t + 1}/{steps}  ce {ce:.3f}  {loss} term {term:.4f}  "
                f"adv acc of the batch {right:.0f} %  off {100 * share_off(masks):.2f} %  "
                f"{time.time() - started:.0f} s",
                flush=True,
            )


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------


def share_off(masks):
    """Share of the masked entries that are switched off."""
    kept = sum(mask.kept().sum().item() for mask in masks.values())
    return 1 - kept / sum(mask.M.numel() for mask in masks.values())


def pack(masks):
    """{name: BinaryMask} -> {name: uint8 (ceil(n / 8),)}, one bit per entry."""
    bits = {}
    for name, mask in masks.items():
        bits[name] = torch.from_numpy(np.packbits(mask.kept().cpu().numpy()))
    return bits


def unpack(masks, tensors):
    """Leave M at init (bit 1) or set it to alpha (bit 0: off). Raises ValueError on other masks."""
    found = {name: (bits.numel(), bits.dtype) for name, bits in tensors.items()}
    expected = {name: ((m.M.numel() + 7) // 8, torch.uint8) for name, m in masks.items()}
    if found != expected:
        raise ValueError("the adapter's masks are not those of these weights of this model")
    for name, mask in masks.items():
        bits = np.unpackbits(tensors[name].numpy(), count=mask.M.numel()).reshape(mask.M.shape)
        mask.M.data[torch.from_numpy(bits == 0).to(mask.M.device)] = mask.alpha


def load(folder, device="cpu", dtype="float32"):
    """The adapted classifier of a finished run: pixels (b, 3, h, w) in [0, 1] -> logits.

    `folder` holds adapter.safetensors; class names are the run's. Raises common.Fault.
    """
    tensors, facts = common.load_adapter(folder, "advmask", ["weights"])
    classifier = common.adapted_classifier(facts, device, dtype)
    restore(classifier.clip, tensors, facts)
    return classifier


def restore(clip, tensors, facts):
    """Mask a CLIP as an adapter file says, for good -> the masks. Raises common.Fault."""
    try:
        masks = attach(clip, vision_weights(clip, facts["weights"]))
        unpack(masks, tensors)
    except (KeyError, ValueError) as fault:
        raise common.Fault(f"the adapter does not fit ({fault}); use the --model it was made with")
    merge(clip, masks)
    return masks


# ------------------------------------------------------------------------------------------------
# The program
# ------------------------------------------------------------------------------------------------


def arguments():
    """The program's argument parser."""
    parser = common.Parser(description=__doc__.split("\n")[0])
    common.add_arguments(parser)
    add = parser.add_argument
    weights = "masked weights of every vision block: attention, MLP, or both"
    add("--weights", default="attn", choices=["attn", "mlp", "both"], help=weights)
    losses = ["ce", "js", "kl", "align", "lafa"]
    add(
        "--loss", default="lafa", choices=losses, help="CE alone, or CE + lambda times one of these"
    )
    lam = "lambda; default 50, as published, and 150 for the small CLIP (our choice)"
    add("--lam", type=common.at_least(0, float), help=lam)
    steps = "training steps; default 6 epochs, at least 100 (our choice)"
    add("--steps", type=common.at_least(1), help=steps)
    budget = "flip budget, sets the rate; default steps / 100, but 1.5 to 3 (our choice)"
    add("--budget", type=common.at_least(0, float), help=budget)
    return parser


def main():
    started = time.time()
    args = common.parse(arguments())
    folder = common.run_folder(args, "advmask")
    if args.load:
        tensors, facts = common.load_adapter(args.load, "advmask", ["weights"])
        common.check_model(facts, args)

    # CLIP, frozen, as a classifier; the few-shot images; the test sets
    classifier, images, tests = common.prepare(args)
    clip = classifier.clip
    if args.lam is None:
        args.lam = 150 if args.model == "tiny" else 50
    if args.steps is None:
        args.steps = max(100, 6 * math.ceil(len(images) / args.batch_size))
    if args.budget is None:
        args.budget = min(max(args.steps / 100, 1.5), 3)

    before, training = None, 0.0
    if args.load:
        masks = restore(clip, tensors, facts)
    else:
        # what CLIP can do as it is
        before = common.measure(classifier, tests, args)
        print(f"zero-shot: clean {before['clean']:.2f}, PGD-{args.test_steps} {before['pgd']:.2f}")

        # mask it, train, save, and write the masks into the weights
        masks = attach(clip, vision_weights(clip, args.weights))
        print(f"{args.steps} steps, loss {args.loss}, lambda {args.lam:g}, budget {args.budget:g}")
        batches = common.batches(
            images, classifier.size, args.batch_size, args.steps, args.augment, args.device
        )
        training = time.time()
        train(classifier, masks, batches, args.steps, args.eps, args.loss, args.lam, args.budget)
        training = time.time() - training
        common.save_adapter(folder, pack(masks), classifier, args, "advmask")
        merge(clip, masks)

    masked = sum(mask.M.numel() for mask in masks.values())
    off = share_off(masks)
    print(f"masked {masked:,} of {common.sizes(clip)}; {100 * off:.2f} % of them off")
    if off == 0:
        print("WARNING: no weight is switched off: the model is still plain CLIP; raise --budget")

    # what the masked CLIP can do
    after = common.measure(classifier, tests, args)
    common.print_table([("zero-shot", before), ("AdvMask", after)], args.test_steps)
    if args.export:
        common.export(clip, classifier.config, args.export)
    common.save_run(
        folder,
        args,
        "advmask",
        before=before,
        after=after,
        masked=masked,
        off=off,
        training_seconds=round(training, 1),
        seconds=round(time.time() - started, 1),
    )
    common.print_end(folder, args, started, training)


if __name__ == "__main__":
    common.guard(main)
