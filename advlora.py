"""AdvLoRA: adversarial low-rank adaptation of CLIP from clustered, aligned factors with an adaptive scale.

Paper: "Adversarial Low-Rank Adaptation of Vision-Language Models" (AdvLoRA), arXiv 2404.13425. Published: LoRA's factors start from a clustering
of the pre-trained weight (parameter clustering; the rank is the number of centres), their product is aligned with it (parameter alignment), and an
adaptive update parameter alpha scales them; training is adversarial, with PGD. The paper does not say, and so these are our choices: k-means on the
rows, centres as A, least squares as B, the subtraction of the start so that nothing changes at first, alpha learnable, and every default here.

    python advlora.py                                                # small CLIP, embedded data: no download, about 2 minutes on 2 CPU cores
    python advlora.py --model tiny --dataset caltech101              # small CLIP, real photographs
    python advlora.py --dataset caltech101 --shots 16                # OpenAI ViT-B/32, eps 1/255, PGD-100

The idea. W_0 (d_out, d_in) is a frozen weight, A (r, d_in) and B (d_out, r) are small factors, a is a number:

    W = W_0 + (a B A - a_0 B_0 A_0),    A_0 = k-means centres of W_0's rows,    B_0 = argmin_B |B A_0 - W_0|_F,    a_0 = 1
    min over A, B, a  E[ CE(f_W(x~), y) ],   x~ = x + argmax over |delta| <= eps of CE(f_W(x + delta), y)

a, one number a part (q, k and v are parts of one matrix), is the adaptive scale ("alpha" in the code). W = W_0 at the start, and with alignment
each of A, B, a has a gradient there; --clean-weight adds a cross-entropy on clean images. Every part of every adapted matrix adds
r (d_in + d_out) + 1 numbers: with the default targets in one tower of n transformer blocks of width d, n (18 r d + 6); on ViT-B/32's image tower
with r = 8 that is 1,327,176.

Evidence (README): small CLIP, embedded data, 16 shots, eps 3/255, seeds 1-3, one CPU core, torch 2.15, open_clip 3.3: clean 82.0 -> 72.8 +- 2.8,
PGD-100 6.0 -> 39.5 +- 3.1, with 6 % of the image tower's numbers trained. ViT-B/32 with CLIP's weights has not been run here.
"""
import math
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import common

parser = common.Parser(description=__doc__.split("\n")[0])
common.add_arguments(parser)
add = parser.add_argument
add("--rank", type=common.at_least(1), default=8, help="r, the number of cluster centres (our choice)")
add("--init", default="cluster", choices=["cluster", "svd", "gaussian"], help="A's start: k-means centres, right singular vectors, Kaiming noise")
add("--no-align", action="store_true", help="B = 0 at the start instead of the least-squares alignment")
add("--no-balance", action="store_true", help="keep A at the centres' own size, instead of scaling aligned A and B to equal norms (our choice)")
add("--no-adaptive", action="store_true", help="keep a at its start; with --init gaussian --no-align this is plain LoRA, W_0 + a B A")
add("--scale", type=common.at_least(1e-6, float), default=1, help="a_0, the start of a (our choice)")
add("--targets", default="both", choices=["attn", "mlp", "both"], help="adapted weights of every block: attention, MLP, or both (our choice)")
add("--towers", default="vision", choices=["vision", "both"], help="adapt the image tower, or the text tower as well (our choice)")
add("--full", action="store_true", help="train every weight of the image tower instead: full adversarial fine-tuning, the yardstick")
add("--clean-weight", type=common.at_least(0, float), default=0, help="weight of the cross-entropy on clean images")
add("--train-attack-steps", type=common.at_least(1), default=2, help="PGD steps while training (our choice)")
add("--train-step", type=common.fraction, help="PGD step while training; default eps (our choice)")
add("--epochs", type=common.at_least(1), default=4, help="training length (our choice) ...")
add("--min-steps", type=common.at_least(1), default=100, help="... but at least so many steps, so that few shots train too (our choice)")
add("--steps", type=common.at_least(1), help="training steps; overrides --epochs and --min-steps")
add("--lr", type=common.at_least(0, float), help="AdamW's first rate, decayed by a cosine; default 1e-3, and 3e-4 with --full (our choice)")
add("--weight-decay", type=common.at_least(0, float), default=0, help="of AdamW; it pulls towards B A = 0, not towards W_0 (our choice)")


# ------------------------------------------------------------------------------------------------------------------------- the method
def kmeans(rows, k, seed=0, iterations=100):
    """k-means++ and Lloyd: rows (n, d) -> centres (k, d), labels (n,). Deterministic in the seed. Raises Fault unless 1 <= k <= n."""
    if not 1 <= k <= len(rows):
        raise common.Fault(f"cannot make {k} clusters of {len(rows)} rows; lower --rank")
    generator = torch.Generator().manual_seed(seed)
    centres = rows[torch.randint(len(rows), (1,), generator=generator)]
    while len(centres) < k:    # k-means++: the next centre is a row, drawn with probability ~ squared distance to the nearest centre so far
        nearest = torch.cdist(rows, centres).square().min(1).values.cpu()
        nearest = nearest if nearest.sum() > 0 else torch.ones_like(nearest)
        centres = torch.cat([centres, rows[torch.multinomial(nearest, 1, generator=generator)]])
    labels = None
    for _ in range(iterations):
        distance = torch.cdist(rows, centres)                                     # (n, k)
        previous, labels = labels, distance.argmin(1)
        for j in range(k):                                                        # an empty cluster takes the row farthest from its own centre
            if not (labels == j).any():
                lonely = torch.where(labels.bincount(minlength=k)[labels] > 1, distance.gather(1, labels[:, None])[:, 0], -1)
                labels[lonely.argmax()] = j
        centres = torch.stack([rows[labels == j].mean(0) for j in range(k)])
        if previous is not None and torch.equal(previous, labels):
            break
    return centres, labels


class ClusterLoRA(nn.Module):
    """Parametrisation of a frozen weight W_0 (n d_out, d_in), cut into n blocks of rows: W = W_0 + (a B A - a_0 B_0 A_0), block by block.

    Parameters A (n, r, d_in), B (n, d_out, r), alpha (n, 1, 1): a buffer unless adaptive. init: cluster, svd or gaussian, for A_0; align: B_0 is the
    least-squares fit to W_0, else 0; balance: aligned A_0 and B_0 are scaled to equal norms. W - W_0 has rank up to 2 r: that of B A and of B_0 A_0.
    Raises Fault unless 1 <= rank <= min(d_out, d_in).
    """

    def __init__(self, weight, rank, blocks=1, init="cluster", align=True, adaptive=True, scale=1.0, seed=0, balance=True):
        super().__init__()
        W = weight.detach().float().unflatten(0, (blocks, -1))                    # (n, d_out, d_in)
        if not 1 <= rank <= min(W.shape[1:]):
            raise common.Fault(f"--rank {rank} does not fit a {W.shape[1]} x {W.shape[2]} weight; expected 1 to {min(W.shape[1:])}")
        if init == "cluster":      # A_0 = centres of the rows of W_0
            A = torch.stack([kmeans(w, rank, seed)[0] for w in W])
        elif init == "svd":        # W_0 = U S V^T;  A_0 = S_r^1/2 V_r^T, and B_0 = U_r S_r^1/2 after alignment: Eckart-Young's optimum
            _, S, Vh = torch.linalg.svd(W, full_matrices=False)
            A = S[:, :rank, None].sqrt() * Vh[:, :rank]
        else:                      # LoRA's A: Kaiming uniform
            bound, generator = 1 / math.sqrt(W.shape[2]), torch.Generator().manual_seed(seed)
            A = ((2 * torch.rand(blocks, rank, W.shape[2], generator=generator) - 1) * bound).to(W.device)
        # B_0 = argmin_B |B A_0 - W_0|_F^2 = W_0 A_0^+,  A_0^+ = A_0^T (A_0 A_0^T)^+
        B = W @ torch.linalg.pinv(A) if align else torch.zeros(blocks, W.shape[1], rank, device=W.device)
        if align and balance:      # A_0 <- c A_0, B_0 <- B_0 / c: the same product from factors of equal norm, so that one rate suits both
            size_A, size_B = (part.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None] for part in (A, B))
            c = (size_B / size_A).sqrt()
            A, B = c * A, B / c
        alpha = torch.full((blocks, 1, 1), float(scale), device=W.device)
        self.A, self.B = nn.Parameter(A.contiguous()), nn.Parameter(B.contiguous())
        if adaptive:
            self.alpha = nn.Parameter(alpha)
        else:
            self.register_buffer("alpha", alpha)
        self.register_buffer("A_0", self.A.detach().clone())    # of A's strides too: else B A and B_0 A_0 may differ in their last bits
        self.register_buffer("B_0", self.B.detach().clone())
        self.register_buffer("alpha_0", alpha.clone())
        self.residual = (B @ A - W).flatten(1).norm(dim=1) / W.flatten(1).norm(dim=1)    # |B_0 A_0 - W_0|_F / |W_0|_F of every block

    def forward(self, W_0):
        with torch.autocast(W_0.device.type, enabled=False):                      # the product of the factors is a weight: never in bfloat16
            # W = W_0 + (a B A - a_0 B_0 A_0)
            change = self.alpha * (self.B @ self.A) - self.alpha_0 * (self.B_0 @ self.A_0)    # (n, d_out, d_in)
            return W_0 + change.flatten(0, 1)


WEIGHTS = {"attn": {"attn.in_proj_weight": 3, "attn.out_proj.weight": 1}, "mlp": {"mlp.c_fc.weight": 1, "mlp.c_proj.weight": 1}}    # blocks: q, k, v
WEIGHTS["both"] = WEIGHTS["attn"] | WEIGHTS["mlp"]


def attach(clip, rank, targets="both", towers="vision", seed=0, **options):
    """Adapt the named weights of every block of an open_clip ViT's image tower, or of both towers -> {parameter name: ClusterLoRA}.

    targets: attn (in_proj (3d, d) as q, k, v, and out_proj (d, d)), mlp (c_fc (4d, d) and c_proj (d, 4d)) or both; options: ClusterLoRA's; a matrix
    has a seed of its own. Raises Fault where there is no such tower.
    """
    if towers == "both" and not hasattr(clip, "transformer"):
        raise common.Fault("this model has no text transformer that --towers both could adapt; use --towers vision")
    loras, roots = {}, {"visual.transformer": clip.visual.transformer} | ({"transformer": clip.transformer} if towers == "both" else {})
    for root, transformer in roots.items():
        for i, block in enumerate(transformer.resblocks):
            for name, blocks in WEIGHTS[targets].items():
                module, _, weight = name.rpartition(".")
                module = block.get_submodule(module)
                lora = ClusterLoRA(getattr(module, weight), rank, blocks, seed=seed + len(loras), **options)
                parametrize.register_parametrization(module, weight, lora)
                loras[f"{root}.resblocks.{i}.{name}"] = lora
    return loras


def merge(clip, loras):
    """Write W into the weights and drop the factors: an ordinary open_clip model with the same logits."""
    for name in loras:
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
        # autograd.grad towards delta alone: no gradients of the factors are computed
        grad, = torch.autograd.grad(loss, delta)
        delta = (delta.detach() + step * grad.sign()).clamp(-eps, eps)
        delta = (x + delta).clamp(0, 1) - x
    assert delta.abs().max() <= eps + 1e-6 and torch.isfinite(delta).all()
    return x + delta


# --------------------------------------------------------------------------------------------------------------------- the adapter file
STORED = "A", "B", "alpha", "A_0", "B_0", "alpha_0"


def pack(loras):
    """{name: ClusterLoRA} -> {name.A, name.B, name.alpha, name.A_0, name.B_0, name.alpha_0: float32}, sharing memory with the factors."""
    return {f"{name}.{key}": getattr(lora, key).detach() for name, lora in loras.items() for key in STORED}


def unpack(state, tensors):
    """Copy a file's tensors into those of the model. Raises Fault where names or sizes differ."""
    if {k: (v.shape, v.dtype) for k, v in state.items()} != {k: (v.shape, v.dtype) for k, v in tensors.items()}:
        raise common.Fault("the adapter's weights are not those that its rank, targets and towers name here; use the --model it was made with")
    for name, value in state.items():
        value.copy_(tensors[name])


# ------------------------------------------------------------------------------------------------------------------------- the program
def main():
    args = common.parse(parser)
    start = time.time()
    args.train_step = args.eps if args.train_step is None else args.train_step
    folder, metadata = common.run_folder(args, "advlora"), None
    if args.load:
        tensors, metadata = common.load_adapter(args.load, "advlora", args, ["rank", "targets", "towers", "no_adaptive", "full"])
        args.rank, args.targets, args.towers = (metadata[k] for k in ("rank", "targets", "towers"))
        if not args.rank.isdigit() or args.targets not in WEIGHTS:
            raise common.Fault(f"adapter {args.load} has rank {args.rank!r} and targets {args.targets!r}; expected a file that this program saved")
        args.rank, args.no_adaptive, args.full = int(args.rank), metadata["no_adaptive"] == "True", metadata["full"] == "True"
    if args.full and args.towers == "both":
        raise common.Fault("--full trains the image tower; leave out --towers both")
    # classifier: CLIP, frozen, in eval mode, pixels -> logits; train: the few-shot images; measure(): accuracies of what clip has become by then
    classifier, train, measure = common.prepare(args)
    clip = classifier.clip
    if not args.full and args.rank > (width := clip.visual.transformer.width):    # before the zero-shot evaluation, not after it
        raise common.Fault(f"--rank {args.rank} does not fit weights of width {width}; expected 1 to {width}")
    before = None if args.after_only else measure()
    if before:
        print(f"zero-shot: clean {before['clean']:.2f}, PGD-{args.test_steps} {before['pgd']:.2f}  ({time.time() - start:.0f} s)", flush=True)

    vision, total = (sum(p.numel() for p in m.parameters()) for m in (clip.visual, clip))
    setup, loras = time.time(), {}
    if args.full:
        parameters = list(clip.visual.requires_grad_(True).parameters())
        state = {k: p.detach() for k, p in clip.visual.named_parameters(prefix="visual")}
    else:
        # a loaded adapter brings its own start: nothing is clustered
        how = {"init": "gaussian", "align": False} if args.load else {
            "init": args.init, "align": not args.no_align, "balance": not args.no_balance, "seed": args.seed}
        loras = attach(clip, args.rank, args.targets, args.towers, adaptive=not args.no_adaptive, scale=args.scale, **how)
        parameters = [p for lora in loras.values() for p in lora.parameters()]
        state = pack(loras)
    if args.load:
        unpack(state, tensors)
    residual = {} if args.load else {name: [round(r, 4) for r in lora.residual.tolist()] for name, lora in loras.items()}
    setup = time.time() - setup
    trained = sum(p.numel() for p in parameters)
    print(f"trained {trained:,} / vision {vision:,} / total {total:,} parameters")
    if residual:
        mean = sum(map(sum, residual.values())) / sum(map(len, residual.values()))
        print(f"start {args.init}: |B_0 A_0 - W_0| / |W_0| = {mean:.3f} on average, {setup:.1f} s; a_0 = {args.scale:g}")

    # -- training
    training = time.time()
    if not args.load:
        steps = args.steps = args.steps or max(args.min_steps, args.epochs * math.ceil(len(train) / args.batch_size))
        cosine = [0.5 * (1 + math.cos(math.pi * t / steps)) for t in range(steps)]
        lr = args.lr = args.lr if args.lr is not None else 3e-4 if args.full else 1e-3
        optimizer = torch.optim.AdamW(parameters, lr, weight_decay=args.weight_decay)
        print(f"{steps} steps of {min(args.batch_size, len(train))} images, lr {lr:.2e}, clean weight {args.clean_weight:g}")
        own = slice(common.RANK, None, common.WORLD)         # this process's images of a batch: all, unless torchrun started several
        for t, (x, y) in enumerate(common.batches(train, classifier.size, args, steps)):
            optimizer.param_groups[0]["lr"] = lr * cosine[t]
            with parametrize.cached():                       # W once a step, not once per forward pass; pgd computes it, with the factors' graph
                if args.towers == "both":                    # t_c / |t_c| through the adapted text tower   (classes, d)
                    classifier.text = classifier.encode_classes()
                x_adv = pgd(classifier, x, y, args.eps, args.train_step, args.train_attack_steps, own)
                share, x, y = len(y[own]) / len(y), x[own], y[own]
                logits_adv = classifier(x_adv)
                # CE(x~, y) + weight * CE(x, y)
                ce = F.cross_entropy(logits_adv, y)
                clean = F.cross_entropy(classifier(x), y) if args.clean_weight else torch.zeros((), device=args.device)
                optimizer.zero_grad()
                (share * (ce + args.clean_weight * clean)).backward()
            common.total(*(p.grad for p in parameters))      # sums in place over the processes, each with its share of the batch
            optimizer.step()
            if (t + 1) % 50 == 0 or t + 1 == steps:
                common.total(log := share * torch.stack([ce, clean, 100 * (logits_adv.argmax(1) == y).float().mean()]).detach())
                a = [a for lora in loras.values() for a in lora.alpha.flatten().tolist()]
                scales = f"a {min(a):.2f} to {max(a):.2f}" if loras else "all weights"
                print(f"step {t + 1}/{steps}  ce {log[0]:.3f}  clean term {log[1]:.3f}  adv acc of the batch {log[2]:.0f} %  "
                      f"{scales}  {time.time() - training:.0f} s", flush=True)
        common.save_adapter(folder / "adapter.safetensors", state, common.describe(args, "advlora"))
    training = time.time() - training

    # -- evaluation of the merged model
    merge(clip, loras)
    after = measure()
    common.table([("zero-shot", before), ("fine-tuned" if args.full else "AdvLoRA", after)], args.test_steps)
    if args.export:
        common.export(clip, classifier.config, args.export)
    common.save_result(folder, args, "advlora", adapter=metadata, before=before, after=after, trained=trained,
                       vision=vision, total=total, residual=residual, setup_seconds=round(setup, 2), training_seconds=round(training, 1),
                       seconds=round(time.time() - start, 1))
    print(f"peak memory {common.peak_memory(args.device):.0f} MiB, {time.time() - start:.0f} s (training {training:.0f} s); files in {folder}")


if __name__ == "__main__":
    common.guard(main)
