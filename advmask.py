"""AdvMask: learn binary masks that uncover a robust sub-network inside frozen CLIP.

Paper: "Identifying Robust Neural Pathways: Few-Shot Adversarial Mask Tuning for Vision-Language Models", ICLR 2026,
https://openreview.net/forum?id=kzGkXpW4FT. This is an independent implementation; what the paper does not state is an argument marked
"(our choice)"; what has been measured of it stands in the README, "Where the papers are silent".

    python advmask.py                                                # small CLIP, embedded data: no download, about 2 minutes on 2 CPU cores
    python advmask.py --model tiny --dataset caltech101              # small CLIP, real photographs
    python advmask.py --dataset caltech101 --shots 16                # OpenAI ViT-B/32, the published attack: eps 1/255, PGD-100

The idea. theta are CLIP's weights, M a real mask of the same shape, alpha a threshold. The network runs on theta' = theta * 1[M > alpha]; theta
stays frozen, only M is trained, on adversarial images, through a straight-through gradient. One bit per masked weight is the whole adapter.

    min over M  E[ CE(f_theta'(x~), y) + lambda * L_LAFA ],   x~ = x + argmax over |delta|_inf <= eps of CE(f_theta'(x + delta), y)

Evidence (README): small CLIP, 16 shots, eps 3/255, seeds 1-3, one CPU core, torch 2.15, open_clip 3.3. Embedded data: clean 82.0 -> 61.5 +- 1.8,
PGD-100 6.0 -> 34.5 +- 1.8, 2.6 % of the masked weights switched off. Caltech101: clean 59.8 -> 48.3 +- 0.6, PGD-100 2.8 -> 19.6 +- 0.9, 2.2 %.
ViT-B/32 with CLIP's weights has not been run here.
"""
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import common

parser = common.Parser(description=__doc__.split("\n")[0])
common.add_arguments(parser)
add = parser.add_argument
add("--layers", default="mhsa", choices=["mhsa", "mlp", "both"], help="masked weights of every vision block: attention, MLP, or both")
add("--init", type=float, default=1e-2, help="start of every entry of M (our choice: that of R-AMT, ICCV 2023)")
add("--threshold", type=float, default=5e-3, help="alpha: an entry of at most alpha switches its weight off (our choice: R-AMT's)")
add("--loss", default="lafa", choices=["ce", "js", "kl", "align", "lafa"], help="CE alone, or CE + lambda times JS, KL, alignment, LAFA")
add("--lam", type=common.at_least(0, float), help="lambda; default 50, as published, and 150 for the small CLIP (our choice)")
add("--eps-w", type=common.at_least(0, float), default=1e-6, help="epsilon_w in LAFA's weight (our choice)")
add("--features", default="cls", choices=["cls", "mean"], help="a block's feature: CLS token, or mean over tokens (our choice: cls)")
add("--raw", action="store_true", help="do not scale features to unit length before comparing them (our choice: unit length)")
add("--attached", action="store_true", help="let gradients flow through the clean features as well (our choice: detached)")
add("--train-attack-steps", type=common.at_least(1), default=2, help="PGD steps while training")
add("--train-step", type=common.fraction, help="PGD step while training; default eps, as published")
add("--epochs", type=common.at_least(1), default=6, help="training length (our choice) ...")
add("--min-steps", type=common.at_least(1), default=100, help="... but at least so many steps, so that few shots train too (our choice)")
add("--steps", type=common.at_least(1), help="training steps; overrides --epochs and --min-steps")
add("--optimizer", default="sgd", choices=["sgd", "adam"], help="sgd: gradients divided by their root mean square over all"
    " masks, momentum 0.9 (our choice)")
add("--budget", type=common.at_least(0, float), help="flip budget, which sets the rate: how many times over an entry whose gradient is always"
    " of average size and one sign would go from init to alpha; default steps / 100, but 1.5 to 3 (our choice)")
add("--lr", type=common.at_least(0, float), help="first rate, decayed by a cosine; overrides --budget")


# ------------------------------------------------------------------------------------------------------------------------- the method
class Above(torch.autograd.Function):
    """1[M > alpha], with the straight-through gradient: dL/dM := dL/dM_bin."""

    @staticmethod
    def forward(ctx, M, alpha):
        return (M > alpha).to(M.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class BinaryMask(nn.Module):
    """Parametrisation of a frozen weight: theta -> theta * 1[M > alpha], M of the weight's shape, starting at `init`, so that every weight is kept.

    Straight-through (AdvMask): M <- M - gamma dL/dM_bin with dL/dM_bin = theta * dL/dtheta': what is off can come back. M and theta are float32, only
    activations may be bfloat16. Raises Fault unless init > threshold.
    """

    def __init__(self, weight, init=1e-2, threshold=5e-3):
        super().__init__()
        if not math.inf > init > threshold > -math.inf:
            raise common.Fault(f"--init {init} must be finite and lie above --threshold {threshold}: a mask starts with every weight kept")
        self.threshold = threshold
        self.M = nn.Parameter(torch.full_like(weight, init, requires_grad=True))

    def forward(self, theta):
        # theta' = theta * 1[M > alpha]
        return theta * Above.apply(self.M, self.threshold)

    @property
    def kept(self):
        """1[M > alpha] as bool, of the weight's shape."""
        return self.M.detach() > self.threshold


WEIGHTS = {"mhsa": ["attn.in_proj_weight", "attn.out_proj.weight"], "mlp": ["mlp.c_fc.weight", "mlp.c_proj.weight"]}
WEIGHTS["both"] = WEIGHTS["mhsa"] + WEIGHTS["mlp"]


def attach(clip, layers="mhsa", init=1e-2, threshold=5e-3):
    """Mask the named weights of every vision block of an open_clip ViT -> {parameter name: BinaryMask}; biases are never masked.

    `layers`: mhsa (in_proj (3d, d) and out_proj (d, d)), mlp (c_fc (4d, d) and c_proj (d, 4d)) or both.
    """
    masks = {}
    for i, block in enumerate(clip.visual.transformer.resblocks):
        for name in WEIGHTS[layers]:
            module, _, weight = name.rpartition(".")
            module = block.get_submodule(module)
            mask = BinaryMask(getattr(module, weight), init, threshold)
            parametrize.register_parametrization(module, weight, mask)
            masks[f"visual.transformer.resblocks.{i}.{name}"] = mask
    return masks


def merge(clip, masks):
    """Write theta' into the weights and drop the masks: an ordinary open_clip model with the same logits."""
    for name in masks:
        module, _, weight = name.rpartition(".")
        parametrize.remove_parametrizations(clip.get_submodule(module), weight, leave_parametrized=True)
    return clip.requires_grad_(False)


def pgd(classifier, x, y, eps, step, steps, own=slice(None)):
    """The inner maximisation: x (b, 3, h, w) in [0, 1], y (b,) -> x~ of its images `own`, with |x~ - x|_inf <= eps (pixels) and x~ in [0, 1].

    Madry et al. 2018: delta_0 ~ U(-eps, eps), delta <- clip(delta + step sign(grad CE), -eps, eps), x + delta clipped to [0, 1].
    """
    assert not classifier.training, "attack the network that is deployed: eval mode"
    delta = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1) - x
    x, y, delta = x[own], y[own], delta[own]    # torchrun's processes share a seed: each draws the noise of the whole batch and keeps its own images
    for _ in range(steps):
        delta.requires_grad_()
        # sum, not mean: the gradient of one image must not depend on the batch size
        loss = F.cross_entropy(classifier(x + delta), y, reduction="sum")
        # autograd.grad towards delta alone: no weight or mask gradients are computed
        grad, = torch.autograd.grad(loss, delta)
        delta = (delta.detach() + step * grad.sign()).clamp(-eps, eps)
        delta = (x + delta).clamp(0, 1) - x
    assert delta.abs().max() <= eps + 1e-6 and torch.isfinite(delta).all()
    return x + delta


def features(classifier, x, kind="cls", raw=False):
    """-> z (layers, b, d): the output of every vision block (CLS token, or mean over tokens), of unit length unless raw; logits (b, classes)."""
    z, transformer = [], classifier.clip.visual.transformer

    def keep(block, inputs, output):                                              # output: (b, tokens, d)
        output = output if transformer.batch_first else output.transpose(0, 1)
        z.append((output[:, 0] if kind == "cls" else output.mean(1)).float())
    hooks = [block.register_forward_hook(keep) for block in transformer.resblocks]
    try:
        logits = classifier(x)
    finally:
        for hook in hooks:
            hook.remove()
    z = torch.stack(z)
    return (z if raw else F.normalize(z, dim=-1)), logits


def lafa(z_clean, z_adv, p_true, eps_w=1e-6, p_mean=None):
    """L_LAFA (AdvMask): layer-wise adaptive feature alignment. z (layers, b, d); p_true (b,), the model's p(y|x) on the clean image -> scalar.
    p_mean: E_B[p(y'|x')], where the images here are only a part of the batch B.

    L = 1/(|Layers||B|) sum_l sum_x  p(y|x) / (E_B[p(y'|x')] + eps_w) * |z_clean^(l) - z_adv^(l)|_2^2
    """
    weight = p_true / ((p_true.mean() if p_mean is None else p_mean) + eps_w)     # (b,), mean 1 over the batch
    return (weight * (z_clean - z_adv).square().sum(-1)).mean()                   # mean over (layers, b)


def consistency(kind, logits_clean, logits_adv, z_clean, z_adv, y, eps_w):
    """The second term of L_mask: lafa, or the paper's ablations align (no weight), js and kl (output space), ce (none) -> scalar."""
    log_p, log_q = F.log_softmax(logits_clean, -1), F.log_softmax(logits_adv, -1)    # (b, classes)
    if kind == "lafa":
        p_true = log_p.exp().gather(1, y[:, None])[:, 0].detach()
        return lafa(z_clean, z_adv, p_true, eps_w, common.batch_mean(p_true))
    if kind == "align":
        return (z_clean - z_adv).square().sum(-1).mean()
    if kind == "kl":                                                              # KL(P_clean || P_adv)
        return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    if kind == "js":                                                              # (KL(P || R) + KL(Q || R)) / 2, R = (P + Q) / 2
        log_r = torch.logaddexp(log_p, log_q) - math.log(2)
        return (F.kl_div(log_r, log_p, log_target=True, reduction="batchmean") + F.kl_div(log_r, log_q, log_target=True, reduction="batchmean")) / 2
    return torch.zeros((), device=y.device)


# --------------------------------------------------------------------------------------------------------------------- the adapter file
def flipped(masks):
    """Share of masked entries that are switched off."""
    return 1 - sum(m.kept.sum().item() for m in masks.values()) / sum(m.M.numel() for m in masks.values())


def pack(masks):
    """{name: BinaryMask} -> {name: uint8 (ceil(n / 8),)}, one bit per entry."""
    return {name: torch.from_numpy(np.packbits(mask.kept.cpu().numpy())) for name, mask in masks.items()}


def unpack(masks, tensors):
    """Leave M at init (bit 1) or set it to alpha (bit 0: off). Raises Fault where names or sizes differ."""
    expected = {k: ((m.M.numel() + 7) // 8, torch.uint8) for k, m in masks.items()}
    if expected != {k: (v.numel(), v.dtype) for k, v in tensors.items()}:
        raise common.Fault("the adapter's weights are not those that --layers masks in this model; use the --model and --layers it was made with")
    for name, mask in masks.items():
        bits = np.unpackbits(tensors[name].numpy(), count=mask.M.numel()).reshape(mask.M.shape)
        mask.M.data[torch.from_numpy(bits == 0).to(mask.M.device)] = mask.threshold


# ------------------------------------------------------------------------------------------------------------------------- the program
def main():
    args = common.parse(parser)
    start = time.time()
    args.train_step = args.eps if args.train_step is None else args.train_step
    if args.lam is None:
        args.lam = 150 if args.model == "tiny" else 50
    folder, metadata = common.run_folder(args, "advmask"), None
    if args.load:
        tensors, metadata = common.load_adapter(args.load, "advmask", args, ["layers"])
        args.layers = metadata["layers"]
        if args.layers not in WEIGHTS:
            raise common.Fault(f"adapter {args.load} has layers {args.layers!r}; expected a file that this program saved")
    # classifier: CLIP, frozen, in eval mode, pixels -> logits; train: the few-shot images; measure(): accuracies of what clip has become by then
    classifier, train, measure = common.prepare(args)
    clip = classifier.clip
    before = None if args.after_only else measure()
    if before:
        print(f"zero-shot: clean {before['clean']:.2f}, PGD-{args.test_steps} {before['pgd']:.2f}  ({time.time() - start:.0f} s)", flush=True)

    vision, total = (sum(p.numel() for p in m.parameters()) for m in (clip.visual, clip))
    masks = attach(clip, args.layers, args.init, args.threshold)
    if args.load:
        unpack(masks, tensors)
    masked = sum(mask.M.numel() for mask in masks.values())
    print(f"masked {masked:,} / vision {vision:,} / total {total:,} parameters")

    # -- training
    training = time.time()
    if not args.load:
        steps = args.steps = args.steps or max(args.min_steps, args.epochs * math.ceil(len(train) / args.batch_size))
        cosine = [0.5 * (1 + math.cos(math.pi * t / steps)) for t in range(steps)]
        args.budget = min(max(steps / 100, 1.5), 3) if args.budget is None else args.budget
        # a step moves an average entry by at most lr, so sum_t lr_t / (init - alpha) is how many times over it could cross the threshold
        lr = args.lr = args.lr if args.lr is not None else args.budget * (args.init - args.threshold) / sum(cosine)
        M = [mask.M for mask in masks.values()]
        # dampening makes momentum an average of gradients: it smooths the way and does not lengthen it
        optimizer = torch.optim.SGD(M, lr, momentum=0.9, dampening=0.9) if args.optimizer == "sgd" else torch.optim.Adam(M, lr)
        print(f"{steps} steps of {min(args.batch_size, len(train))} images, lr {lr:.2e}, loss {args.loss}, lambda {args.lam:g}")
        own = slice(common.RANK, None, common.WORLD)         # this process's images of a batch: all, unless torchrun started several
        for t, (x, y) in enumerate(common.batches(train, classifier.size, args, steps)):
            optimizer.param_groups[0]["lr"] = lr * cosine[t]
            with parametrize.cached():                       # theta' once a step, by pgd's first pass; with M's graph, which pgd leaves whole
                x_adv = pgd(classifier, x, y, args.eps, args.train_step, args.train_attack_steps, own)
                share, x, y = len(y[own]) / len(y), x[own], y[own]
                with torch.set_grad_enabled(args.attached):  # not the first pass of the step: theta' would be kept without M's graph
                    z_clean, logits_clean = features(classifier, x, args.features, args.raw)
                z_adv, logits_adv = features(classifier, x_adv, args.features, args.raw)
                # L_mask = CE(x~, y) + lambda * L_LAFA
                ce = F.cross_entropy(logits_adv, y)
                term = consistency(args.loss, logits_clean, logits_adv, z_clean, z_adv, y, args.eps_w)
                optimizer.zero_grad()
                (share * (ce + args.lam * term)).backward()
            common.total(*(m.grad for m in M))               # sums in place over the processes, each with its share of the batch
            if args.optimizer == "sgd":                      # M <- M - gamma dL/dM_bin, the gradient divided by one root mean square over all masks
                rms = (sum(m.grad.square().sum() for m in M) / masked).sqrt()
                for m in M:
                    m.grad /= rms.clamp(min=1e-12)
            optimizer.step()
            if (t + 1) % 50 == 0 or t + 1 == steps:
                common.total(log := share * torch.stack([ce, term, 100 * (logits_adv.argmax(1) == y).float().mean()]).detach())
                print(f"step {t + 1}/{steps}  ce {log[0]:.3f}  {args.loss} term {log[1]:.4f}  adv acc of the batch {log[2]:.0f} %  "
                      f"flipped {100 * flipped(masks):.2f} %  {time.time() - training:.0f} s", flush=True)
        common.save_adapter(folder / "adapter.safetensors", pack(masks), common.describe(args, "advmask"))
    share = flipped(masks)
    if share == 0:
        print("WARNING: no entry of the masks is switched off: the model is still plain CLIP; raise --steps, --budget or --lr")
    training = time.time() - training

    # -- evaluation of the merged model
    merge(clip, masks)
    after = measure()
    common.table([("zero-shot", before), ("AdvMask", after)], args.test_steps)
    if args.export:
        common.export(clip, classifier.config, args.export)
    common.save_result(folder, args, "advmask", adapter=metadata, before=before, after=after, masked=masked,
                       vision=vision, total=total, flipped=share, training_seconds=round(training, 1), seconds=round(time.time() - start, 1))
    print(f"peak memory {common.peak_memory(args.device):.0f} MiB, {time.time() - start:.0f} s (training {training:.0f} s); files in {folder}")


if __name__ == "__main__":
    common.guard(main)
