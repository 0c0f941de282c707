"""AdvMask: learn binary masks that uncover a robust sub-network inside frozen CLIP.

Paper: "Identifying Robust Neural Pathways: Few-Shot Adversarial Mask Tuning for Vision-Language
Models", ICLR 2026, https://openreview.net/forum?id=kzGkXpW4FT. This is an independent
implementation. What the paper does not state is marked "(our choice)".

    python advmask.py                                      # small CLIP, embedded data, 2-3 minutes
    python advmask.py --model tiny --dataset caltech101    # small CLIP, real photographs
    python advmask.py --dataset caltech101 --shots 16      # OpenAI ViT-B/32, eps 1/255, a GPU

The idea. theta are weights of CLIP's image tower, by default those of attention. M is a real mask
of the same shape, alpha a threshold. The network runs on theta' = theta * 1[M > alpha]. theta stays
frozen; only M is trained, on adversarial images, through a straight-through gradient. One bit per
masked weight is the whole adapter. f is the classifier: an image's feature against every class's.

    min over M  E[L_mask],  L_mask = CE(f_theta'(x~), y) + lambda * L_LAFA
    x~ = x + argmax over |delta|_inf <= eps of CE(f_theta'(x + delta), y)

L_LAFA keeps the features of x~ near those of x in every block; the function lafa has it.

Evidence, on the small CLIP in tiny/: accuracies in %, zero-shot -> AdvMask, mean and deviation of
seeds 1-3. 16 shots, eps 3/255, PGD-100, lambda 150, an NVIDIA H200, torch 2.11, open_clip 3.3.
Embedded data: clean 82.0 -> 69.3 +- 1.5, robust 6.0 -> 34.0 +- 1.3, 2.1 % of the masked weights
off. All 2,465 test images of Caltech101: clean 59.9 -> 48.5 +- 1.8, robust 2.8 -> 19.3 +- 3.1,
2.0 % off. On one CPU core the training takes 2 and 5 minutes. results/RESULTS.md has more. ViT-B/32
with CLIP's weights has not been run here.
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
# The method: pieces to copy. They need torch alone, and `features` a model of open_clip
# ------------------------------------------------------------------------------------------------


class BinaryMask(nn.Module):
    """Parametrisation of a frozen weight: theta -> theta * 1[M > alpha].

        mask = BinaryMask(layer.weight.requires_grad_(False))
        torch.nn.utils.parametrize.register_parametrization(layer, "weight", mask)

    M has the weight's shape and starts at `init`: every weight is kept. Train mask.M and nothing
    else. init and alpha are those of R-AMT, ICCV 2023 (our choice). They do not matter to `train`,
    whose rate is proportional to init - alpha. Raises ValueError unless init > alpha.
    """

    def __init__(self, weight, init=1e-2, alpha=5e-3):
        super().__init__()
        if not math.inf > init > alpha > -math.inf:
            raise ValueError(f"init {init} must lie above alpha {alpha}: a mask starts with all on")
        self.init = init
        self.alpha = alpha
        self.M = nn.Parameter(torch.full_like(weight, init))

    def forward(self, theta):
        # M_bin = 1[M > alpha]. M - M.detach() is 0, with gradient 1: straight-through, so that
        # dL/dM := dL/dM_bin
        M_bin = (self.M > self.alpha).to(theta.dtype) + (self.M - self.M.detach())
        # theta' = theta * M_bin, and so dL/dM_bin = theta * dL/dtheta'
        return theta * M_bin

    def kept(self):
        """1[M > alpha] as bool, of the weight's shape."""
        return self.M.detach() > self.alpha


def vision_weights(clip, weights="attn"):
    """Names of the weights that are masked in every vision block of an open_clip ViT.

    attn, the paper's default: in_proj (3d, d) and out_proj (d, d). mlp: c_fc (4d, d) and c_proj
    (d, 4d). Or both. No biases (our choice). Raises KeyError for another word.
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

    Fresh masks keep every weight, so the model computes what it did. Other parameters are left as
    they are. Raises AttributeError where a name is unknown.
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
    """Write theta' into the weights and take the masks off the model: same logits, no masks."""
    for name in masks:
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
        # towards delta alone: no gradients of weights or masks are computed
        (grad,) = torch.autograd.grad(loss, delta)
        if not torch.isfinite(grad).all():
            raise FloatingPointError("the gradient of the attack is not finite")
        delta = (delta.detach() + step * grad.sign()).clamp(-eps, eps)
        delta = (x + delta).clamp(0, 1) - x
    assert delta.abs().max() <= eps + 1e-6, "the attack left the ball; was x in [0, 1]?"
    return x + delta


def features(classifier, x):
    """-> z (layers, b, d), what every vision block puts out; logits (b, classes).

    classifier.clip is the open_clip model inside the classifier. z is the CLS token, scaled to unit
    length (both our choice).
    """
    transformer = classifier.clip.visual.transformer
    z = []

    def record(block, inputs, output):
        # output: (b, tokens, d), or (tokens, b, d) where the blocks run tokens first, as here
        cls = output[:, 0] if transformer.batch_first else output[0]
        z.append(F.normalize(cls.float(), dim=-1))

    hooks = [block.register_forward_hook(record) for block in transformer.resblocks]
    try:
        logits = classifier(x)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(z), logits


def lafa(z_clean, z_adv, p_true, eps_w=1e-6):
    """L_LAFA, layer-wise adaptive feature alignment (AdvMask) -> scalar.

    z_clean, z_adv (layers, b, d), as `features` gives them. p_true (b,), the network's own p(y|x)
    of the true class on the clean image: softmax(logits_clean)[range(b), y]. It is a constant, and
    eps_w only keeps the division finite (both our choice). E_B is the mean over the batch. The
    weight is the image's, the same for every layer. Raises ValueError where shapes do not fit.

    L = 1/(|Layers||B|) sum_l sum_x  p(y|x) / (E_B[p(y'|x')] + eps_w) * |z_clean^l - z_adv^l|_2^2
    """
    if not z_clean.shape == z_adv.shape == (len(z_adv), len(p_true), z_adv.shape[-1]):
        raise ValueError("expected z_clean and z_adv (layers, b, d) and p_true (b,)")
    p_true = p_true.detach()
    weight = p_true / (p_true.mean() + eps_w)  # (b,), mean 1
    distance = (z_clean - z_adv).square().sum(-1)  # (layers, b)
    return (weight * distance).mean()


def consistency(kind, z_clean, z_adv, logits_clean, logits_adv, y):
    """The second term of L_mask -> scalar: lafa, or one of the paper's ablations.

    align: LAFA without the weight. kl and js: between the outputs. ce: zero. Raises ValueError for
    another kind.
    """
    # P on the clean image, Q on the attacked one
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
    if kind == "ce":
        return torch.zeros((), device=y.device)
    raise ValueError(f"loss {kind!r} is unknown; expected lafa, align, kl, js or ce")


def share_off(masks):
    """Share of the masked entries that are switched off."""
    kept = sum(mask.kept().sum().item() for mask in masks.values())
    return 1 - kept / sum(mask.M.numel() for mask in masks.values())


# ------------------------------------------------------------------------------------------------
# The loop
# ------------------------------------------------------------------------------------------------


def train(classifier, masks, batches, steps, eps, loss="lafa", lam=50, budget=1.5):
    """Train the masks {name: BinaryMask} in place. batches yields (x, y) `steps` times.

    classifier: pixels in [0, 1] -> logits, in eval mode, with the masks in it. loss and lam: the
    second term of L_mask and its weight, lambda. The paper's step is M <- M - gamma dL/dM_bin. Our
    choices: the gradient is divided by its root mean square, a running mean of it is taken, and the
    rate gamma falls by a cosine. budget, the flip budget, says how far M can travel, not how many
    weights flip: it is the sum of all gamma, in units of init - alpha. An entry whose gradient is
    always k times the root mean square, k > 0, is off in the end if k * budget is 1 or more. It can
    come back: M moves both ways, also where it is below alpha.
    """
    started = time.time()
    M = [mask.M for mask in masks.values()]
    v = [torch.zeros_like(m) for m in M]
    entries = sum(m.numel() for m in M)
    # from the start to the threshold: the same for all masks of one `attach`
    way = max(mask.init - mask.alpha for mask in masks.values())
    # gamma_t falls by a cosine towards 0; its sum over all steps is budget * way
    decay = 0.5 * (1 + torch.cos(math.pi * torch.arange(steps) / steps))
    gamma = budget * way * decay / decay.sum()

    for t, (x, y) in enumerate(batches):
        # 1. the inner maximisation: attack the current network, two steps of size eps
        x_adv = pgd(classifier, x, y, eps, step=eps, steps=2)

        # 2. what every block makes of the clean and of the attacked image
        with torch.no_grad():  # by the masked network as it is, but a constant (our choice)
            z_clean, logits_clean = features(classifier, x)
        z_adv, logits_adv = features(classifier, x_adv)

        # 3. L_mask = CE(x~, y) + lambda * L_LAFA, or another second term
        ce = F.cross_entropy(logits_adv, y)
        term = consistency(loss, z_clean, z_adv, logits_clean, logits_adv, y)
        objective = ce + lam * term

        # 4. the gradient of M alone: that of M_bin, straight-through, by BinaryMask.forward
        gradients = torch.autograd.grad(objective, M)

        # 5. v <- 0.9 v + 0.1 g / rms(g), then M <- M - gamma_t v / (1 - 0.9^(t + 1)). As v starts
        # at 0, its weights add up to 1 - 0.9^(t + 1): so divided, as in Adam, it is a mean
        rms = nn.utils.get_total_norm(gradients) / math.sqrt(entries)  # one number for all masks
        rate = gamma[t].item() / (1 - 0.9 ** (t + 1))
        with torch.no_grad():
            for m, v_m, g in zip(M, v, gradients):
                v_m.mul_(0.9).add_(0.1 * g / rms.clamp(min=1e-12))
                m.sub_(rate * v_m)

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


def pack(masks):
    """{name: BinaryMask} -> {name: uint8 (ceil(n / 8),)}, one bit per entry."""
    bits = {}
    for name, mask in masks.items():
        bits[name] = torch.from_numpy(np.packbits(mask.kept().cpu().numpy()))
    return bits


def unpack(masks, tensors):
    """Set fresh masks as a file says: bit 1 leaves M at init, bit 0 sets it to alpha, which is off.

    Raises ValueError where the file's names or sizes are not those of these masks.
    """
    found = {name: (bits.numel(), bits.dtype) for name, bits in tensors.items()}
    expected = {name: ((m.M.numel() + 7) // 8, torch.uint8) for name, m in masks.items()}
    if found != expected:
        raise ValueError("its masks have other names or sizes than the weights of this model")
    for name, mask in masks.items():
        bits = np.unpackbits(tensors[name].numpy(), count=mask.M.numel()).reshape(mask.M.shape)
        mask.M.data[torch.from_numpy(bits == 0).to(mask.M.device)] = mask.alpha


def load(folder, device="cpu", dtype="float32"):
    """The adapted classifier of a finished run: pixels (b, 3, h, w) in [0, 1] -> logits.

    `folder` holds adapter.safetensors; the classes are those of the run, the masks are merged.
    Raises common.Fault, an exception with one sentence.
    """
    tensors, facts = common.load_adapter(folder, "advmask", ["weights"])
    classifier = common.adapted_classifier(facts, device, dtype)
    restore(classifier.clip, tensors, facts)
    return classifier


def restore(clip, tensors, facts):
    """Mask a CLIP as an adapter file says, and merge -> the masks. Raises common.Fault."""
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
    term = "second term of the loss; ce: none, CE alone"
    add("--loss", default="lafa", choices=losses, help=term)
    lam = "lambda; default 50, published for lafa, and 150 for the small CLIP (our choice)"
    add("--lam", type=common.at_least(0, float), help=lam)
    steps = "training steps; default 6 epochs, or 100 if that is more (our choice)"
    add("--steps", type=common.at_least(1), help=steps)
    budget = "how far M can travel, in units of init - alpha: the more, the more weights go off; "
    budget += "default steps / 100, at least 1.5 and at most 3 (our choice)"
    add("--budget", type=common.at_least(0, float), help=budget)
    return parser


def main():
    started = time.time()
    args = common.parse(arguments())
    folder = common.run_folder(args, "advmask")
    if args.load:
        tensors, facts = common.load_adapter(args.load, "advmask", ["weights"])
        common.check_model(facts, args)
        args.weights = facts["weights"]

    # CLIP, frozen, as a classifier; the few-shot images; the test sets
    classifier, images, tests = common.prepare(args)
    clip = classifier.clip
    if args.lam is None:
        args.lam = 150 if args.model == "tiny" else 50
    if args.steps is None:
        args.steps = max(100, 6 * math.ceil(len(images) / args.batch_size))
    if args.budget is None:
        args.budget = min(max(args.steps / 100, 1.5), 3)

    before, seconds = None, 0.0  # with --load nothing is measured before, nor trained
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
        began = time.time()
        train(classifier, masks, batches, args.steps, args.eps, args.loss, args.lam, args.budget)
        seconds = time.time() - began
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
    common.save_run(
        folder,
        args,
        "advmask",
        before=before,
        after=after,
        masked=masked,
        off=off,
        training_seconds=round(seconds, 1),
        seconds=round(time.time() - started, 1),
    )
    if args.export:
        common.export(clip, classifier.config, args.export)
    common.print_end(folder, args, started, seconds)


if __name__ == "__main__":
    common.guard(main)
