"""How robust is a classifier? Every number of this repository passes through `evaluate`.

For any torch module from pixels in [0, 1], NCHW, to logits; eps and step are in pixels. This file needs torch alone and nothing else of the house:
copy it. `attack` is PGD whose batches shrink as images break; `evaluate` adds accuracies, intervals and sanity flags; `autoattack` is a second
opinion; `eps_curve` shows how accuracy falls as the ball grows.
"""
import functools
import io
import math

import torch
import torch.nn.functional as F


def share():
    """-> which of how many processes this is: (0, 1) unless torch.distributed was initialised, as under torchrun."""
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    return (0, 1) if alone else (torch.distributed.get_rank(), torch.distributed.get_world_size())


def total(*tensors):
    """Sum every tensor over the processes, in place."""
    for tensor in tensors:
        if share()[1] > 1:
            torch.distributed.all_reduce(tensor)


def batch_mean(values):
    """The mean of values (b,) over the images of all processes: a number without a gradient if there are several."""
    if share()[1] == 1:
        return values.mean()
    total(both := torch.stack([values.detach().sum(), values.new_tensor(len(values))]))
    return both[0] / both[1]


def project(delta, eps, norm):
    """The nearest point of the ball |delta| <= eps, image by image."""
    if norm == "linf":
        return delta.clamp(-eps, eps)
    return delta * (eps / delta.flatten(1).norm(dim=1).clamp(min=1e-12)).clamp(max=1)[:, None, None, None]


def attack(net, x, y, eps, step, steps, rows, index, norm="linf", seed=0, batch_size=128, settle=1):
    """PGD with a random start on the images `rows` of x -> right (4, len(rows)): at the start, a quarter of the way, at the end, at every iterate;
    and the number of images whose first gradient is 0.

    delta_0 uniform in the ball, from seed and image index alone; delta <- project(delta + step sign(grad)), with grad / |grad|_2 for l2; x + delta
    clipped to [0, 1] (Madry et al. 2018). The loss is cross-entropy summed over the batch. An image broken in `settle` iterates in a row leaves
    the batch, counts as broken at the end, and makes room for the next; settle 0 keeps all to the end.
    """
    device = next(net.parameters()).device
    right, zero, waiting = torch.tensor([[0], [0], [0], [1]], dtype=torch.bool).repeat(1, len(rows)), 0, torch.arange(len(rows))
    state = None    # of the images in the batch: place in rows, pixels, label, delta, iterate, broken iterates in a row
    while len(waiting) or state and len(state[0]):
        new, waiting = waiting.split([room := min(batch_size - (len(state[0]) if state else 0), len(waiting)), len(waiting) - room])
        if len(new):
            clean = pixels(x, rows[new], device)
            noise = torch.stack([torch.empty(clean.shape[1:]).uniform_(-1, 1, generator=torch.Generator().manual_seed(seed * 1_000_003 + i))
                                 for i in index[rows[new]].tolist()]).to(device)
            if norm == "l2":    # a direction that is as good as uniform; in so many dimensions nearly all of the ball is near its surface
                noise = noise / noise.flatten(1).norm(dim=1)[:, None, None, None]
            zeros = torch.zeros(len(new), dtype=torch.long, device=device)
            fresh = new.to(device), clean, y[rows[new]].to(device), (clean + eps * noise).clamp(0, 1) - clean, zeros, zeros
            state = [torch.cat(pair) for pair in zip(state, fresh)] if state else fresh
        place, clean, label, delta, t, streak = state
        logits = net(clean + delta.requires_grad_())
        grad, = torch.autograd.grad(F.cross_entropy(logits, label, reduction="sum"), delta)
        assert torch.isfinite(grad).all(), "the attack's gradient is not finite"
        hit, zero = logits.argmax(1) == label, zero + int(((grad.flatten(1) == 0).all(1) & (t == 0)).sum())
        for kind, now in enumerate((t == 0, t == steps // 4, t == steps)):
            right[kind, place[now].cpu()] = hit[now].cpu()
        right[3, place.cpu()] &= hit.cpu()
        streak = torch.where(hit, 0, streak + 1)
        move = grad.sign() if norm == "linf" else grad / grad.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None, None]
        delta = (clean + project(delta.detach() + step * move, eps, norm)).clamp(0, 1) - clean
        size = delta.abs().max() if norm == "linf" else delta.flatten(1).norm(dim=1).max()
        assert size <= eps * (1 + 1e-5) + 1e-6 and (clean + delta).min() >= 0 and (clean + delta).max() <= 1, "the attack left the ball"
        keep = (t < steps) & (streak < settle if settle else True)
        state = [part[keep] for part in (place, clean, label, delta, t + 1, streak)]
    return right, zero


class Float32Conv2d(torch.nn.Conv2d):
    """A convolution that autocast leaves in float32: bfloat16 would round the pixels, which hides the gradient."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


def random_search(net, clean, label, eps, norm, queries=50):
    """A black-box attack, after Square (Andriushchenko et al. 2020): fill random squares, keep what lowers the margin -> right (b,) all along."""
    def margin(delta):
        logits = net((clean + delta).clamp(0, 1))
        own = logits.gather(1, label[:, None])[:, 0]
        return own - logits.scatter(1, label[:, None], -math.inf).max(1).values
    generator, delta, best = torch.Generator().manual_seed(0), torch.zeros_like(clean), torch.full((len(label),), math.inf, device=clean.device)
    for query in range(queries):
        side = max(1, min(clean.shape[-2:]) // (1 if query < 5 else 4))
        i, j = (int(torch.randint(size - side + 1, (1,), generator=generator)) for size in clean.shape[-2:])
        tried = delta.clone()
        tried[:, :, i:i + side, j:j + side] = eps * (2 * torch.randint(2, (len(label), 3, 1, side), generator=generator) - 1).to(clean)
        tried = project(tried, eps, norm)
        found = margin(tried)
        delta, best = torch.where((found < best)[:, None, None, None], tried, delta), torch.minimum(found, best)
    return best > 0


def pixels(x, rows, device):
    """Images `rows` of x, uint8 or float -> float in [0, 1] on the device."""
    return (x[rows].float() / 255 if x.dtype == torch.uint8 else x[rows]).to(device)


def interval(right):
    """Wilson's 95 % interval of the share of True, in %."""
    n, p, z = len(right), right.double().mean().item(), 1.96
    middle, half_width = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return [round(max(0, 100 * (middle + sign * half_width) / (1 + z**2 / n)), 2) for sign in (-1, 1)]


def sanity(net, x, y, eps, norm, survived, run):
    """Is the attack to be believed? Cheap checks on the images x (n, 3, h, w), y (n,), of which it left those that survived -> sentences.

    run(eps, step, steps, rows) attacks: what survives must fall in a huge ball, and must not fall to a few dozen random guesses.
    """
    device, n, h = next(net.parameters()).device, len(y), 0.25 / 255
    clean, label, rows = pixels(x, slice(n), device), y.to(device), survived.nonzero()[:, 0]
    loss = F.cross_entropy(net(clean.requires_grad_()), label, reduction="sum")
    grad, = torch.autograd.grad(loss, clean)
    clean = clean.detach()
    with torch.no_grad():
        # a gradient that is right predicts the loss: (L(x + h sign g) - L(x - h sign g)) / 2h = |g|_1
        up, down = (net(clean + sign * h * grad.sign()) for sign in (1, -1))
        slope = (F.cross_entropy(up, label, reduction="sum") - F.cross_entropy(down, label, reduction="sum")).item() / (2 * h)
        first, second = net(clean), net(clean)
        random = (first - second).abs().max() > 1e-3 * first.abs().max()
        guessed = ~random_search(net, clean[rows], label[rows], eps, norm) if len(rows) else survived[:0]
    predicted, huge = grad.abs().sum().item(), 0.25 if norm == "linf" else 0.25 * math.sqrt(x[0].numel())
    left = int(run(huge, huge / 4, 20, rows)[0][3].sum()) if len(rows) else 0
    return [sentence for wrong, sentence in (
        (random, "the model answers differently when asked twice: it is random, and an attack needs averaged gradients"),
        (predicted > 0 and not 0.5 < slope / predicted < 2, f"the gradient promises a slope of {predicted:.3g}, the loss has {slope:.3g}"),
        (left > 0.05 * n, f"{left} of {n} images withstand a ball of radius {huge:g}"),
        (guessed.sum() > 0.05 * n, f"random guesses break {int(guessed.sum())} of {n} images that the attack does not"),
    ) if wrong]


def evaluate(classifier, x, y, eps, step=None, steps=100, seed=0, batch_size=128, settle=5, restarts=1, norm="linf", index=None, checks=64):
    """Clean accuracy, and accuracy under PGD with a random start (`attack`): at the final iterate, and at the best of all iterates of all restarts.

    classifier: any module with weights, from pixels to logits; x (n, 3, h, w) uint8 or float in [0, 1], y (n,); eps in pixels; step: by default 1/255
    for linf, 2.5 eps / steps for l2; index (n,): names of the images, for their starts; `sanity` is checked on the first `checks` images. Raises
    ValueError for float16 weights.
    -> dict: clean, noise (the random start alone), pgd, pgd_best in %, intervals (95 %), zero_gradient (share of images whose first gradient is 0),
    flags (sentences), outcomes (a digit per image: 1 if right on the clean image, + 2 at the final iterate, + 4 at all iterates and restarts).
    """
    if any(p.dtype == torch.float16 for p in classifier.parameters()):
        raise ValueError("the classifier has float16 weights, in which small gradients become zero: the attack looks weak; use float32")
    step = step if step is not None else 1 / 255 if norm == "linf" else 2.5 * eps / steps
    x, y, device, n, everything, (rank, world) = x.cpu(), y.cpu(), next(classifier.parameters()).device, len(y), torch.arange(len(y)), share()
    mine = everything[rank::world]    # every process attacks its share
    run = functools.partial(attack, classifier, x, y, index=everything if index is None else index, norm=norm, batch_size=batch_size)
    with torch.no_grad():
        clean = torch.cat([classifier(pixels(x, rows, device)).argmax(1).cpu() == y[rows] for rows in mine.split(batch_size)])
    (noise, quarter, final, best), zero = run(eps, step, steps, mine, seed=seed, settle=settle)
    best &= clean
    for r in range(1, restarts):
        rows = best.nonzero()[:, 0]
        best[rows] = run(eps, step, steps, mine[rows], seed=seed + r)[0][3]
    if world > 1:
        right, parts = torch.empty(5, n, dtype=torch.bool), [None] * world
        torch.distributed.all_gather_object(parts, (torch.stack([clean, noise, quarter, final, best]), zero))
        for r, (part, _) in enumerate(parts):
            right[:, r::world] = part
        (clean, noise, quarter, final, best), zero = right, sum(part[1] for part in parts)
    won = {"clean": clean, "noise": noise, "pgd": final, "pgd_best": best}
    low, high = x.min().item(), x.max().item()
    flags = [sentence for wrong, sentence in (
        (any(module.training for module in classifier.modules()), "the model is in train mode"),
        (x.dtype != torch.uint8 and (low < 0 or high > 1), f"pixels range from {low:.2f} to {high:.2f}, not within [0, 1]: eps is in another space"),
        (norm == "linf" and eps > 0.5, f"eps {eps:g} is more than half the range of a pixel: is it in units of 1/255?"),
        (zero > 0.01 * n, f"the first gradient is zero on {100 * zero / n:.1f} % of the images: gradients may be masked"),
        (eps > 0 and noise.sum() < final.sum(), "random noise of the same size hurts more than the attack"),
        (final.sum() > quarter.sum() + 0.02 * n, "more steps of the attack help the defender"),
    ) if wrong]
    flags += sanity(classifier, x[:checks], y[:checks], eps, norm, best[:checks], run) if checks else []
    return {**{key: 100 * value.double().mean().item() for key, value in won.items()}, "intervals": {k: interval(v) for k, v in won.items()},
            "zero_gradient": zero / n, "flags": flags, "outcomes": "".join(map(str, (clean.int() + 2 * final.int() + 4 * best.int()).tolist()))}


TORCHATTACKS = "AutoAttack needs torchattacks; install it with: pip install scipy && pip install --no-deps torchattacks"


def autoattack(classifier, x, y, eps, norm, n, batch_size):
    """AutoAttack's four attacks (Croce & Hein 2020) by torchattacks, one after the other on n fixed images, each on what the last one left.

    -> dict: images (their indices), clean, and what is left in % after 100 steps of APGD-CE, targeted APGD and FAB, and 5,000 Square queries.
    """
    try:
        import torchattacks
    except ImportError:
        raise ModuleNotFoundError(TORCHATTACKS)
    device, rows = next(classifier.parameters()).device, torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:n].sort().values
    with torch.no_grad():
        right = torch.cat([classifier(pixels(x, some, device)).argmax(1).cpu() == y[some] for some in rows.split(batch_size)])
        classes = classifier(pixels(x, rows[:1], device)).shape[1]
    result, names = {"images": rows.tolist(), "clean": 100 * right.double().mean().item()}, {"norm": {"linf": "Linf", "l2": "L2"}[norm], "eps": eps}
    for name, make in (("apgd_ce", lambda: torchattacks.APGD(classifier, steps=100, **names)),
                       ("apgd_t", lambda: torchattacks.APGDT(classifier, steps=100, n_classes=min(10, classes), **names)),
                       ("fab_t", lambda: torchattacks.FAB(classifier, steps=100, multi_targeted=True, n_classes=min(10, classes), **names)),
                       ("square", lambda: torchattacks.Square(classifier, n_queries=5000, **names))):
        if right.any() and (name != "apgd_t" or classes > 3):    # the targeted loss compares four logits
            for some in right.nonzero()[:, 0].split(batch_size):
                clean, label = pixels(x, rows[some], device), y[rows[some]].to(device)
                with torch.random.fork_rng():    # its attacks seed torch's global generator
                    delta = project(make()(clean, label).detach() - clean, eps, norm)
                with torch.no_grad():
                    right[some] &= (classifier((clean + delta).clamp(0, 1)).argmax(1) == label).cpu()
        result[name] = 100 * right.double().mean().item()
    return result


def eps_curve(classifier, x, y, eps, norm, steps, batch_size):
    """Robust accuracy (best iterate) at 0, eps/2, eps, ... until it is 0, or the ball holds every image -> [[eps, %], ...]. What a ball breaks,
    a larger one breaks too."""
    rows, index, curve, radius = torch.arange(len(y)), torch.arange(len(y)), [], 0.0
    everything = 1 if norm == "linf" else math.sqrt(x[0].numel())    # a ball of this radius holds every image
    while True:
        # the start is at the centre for eps = 0, so this is clean accuracy; steps reach the surface 2.5 times over
        right, _ = attack(classifier, x, y, radius, 2.5 * radius / steps, steps if radius else 0, rows, index, norm, batch_size=batch_size)
        rows = rows[right[3]]
        curve.append([radius, 100 * len(rows) / len(y)])
        if not len(rows) or radius > everything or not eps:
            return curve
        radius += eps / 2


def examine(classifier, x, y, args):
    """`evaluate`, and what else the arguments of a program ask for -> its dict, with "autoattack" and "eps_curve"."""
    eps, norm, size = args.test_eps, args.norm, args.test_batch_size
    result = evaluate(classifier, x, y, eps, args.step, args.test_steps, 0, size, args.settle, args.restarts, norm)
    if args.autoattack:
        result["autoattack"] = autoattack(classifier, x, y, eps, norm, args.autoattack, size)
    if args.eps_curve:
        result["eps_curve"] = eps_curve(classifier, x, y, eps, norm, 20, size)
    return result


def draw_curves(curves, norm):
    """{"before": eps_curve, "after": eps_curve} -> a PNG, bytes. Needs matplotlib."""
    from matplotlib.figure import Figure
    axes, picture = (figure := Figure((5, 3), layout="constrained")).subplots(), io.BytesIO()
    for (name, curve), style in zip(curves.items(), ("o--", "s-")):
        radius, accuracy = zip(*curve)
        axes.plot([255 * r for r in radius] if norm == "linf" else radius, accuracy, style, label=f"{name} training", markersize=4)
    axes.set(xlabel="eps in 1/255" if norm == "linf" else "eps (l2 norm over all pixels)", ylabel="accuracy under PGD-20 [%]", ylim=(-2, 102))
    axes.legend()
    figure.savefig(picture, format="png", dpi=100)
    return picture.getvalue()


def table(rows, steps):
    """Print rows of (name, result of evaluate, or None): clean | PGD final iterate | PGD best iterate, 95 % intervals, and every sanity flag."""
    rows = [(name + on, r) for name, result in rows if result
            for on, r in {"": result, **{f" on {k}": r for k, r in result.get("transfer", {}).items()}}.items()]
    width = max(12, *(len(name) for name, _ in rows))
    print(f"\n{'':{width}} | {'clean':>6} | {f'PGD-{steps}':>8} | {'best iterate':>12}")
    for name, r in rows:
        print(f"{name:{width}} | {r['clean']:6.2f} | {r['pgd']:8.2f} | {r['pgd_best']:12.2f}")
    for name, r in rows:
        print(f"{name}: 95 % intervals {', '.join(f'{key} {low:.1f} to {high:.1f}' for key, (low, high) in r['intervals'].items())}")
        if "autoattack" in r:
            left = ", ".join(f"{key} {value:.2f}" for key, value in r["autoattack"].items() if key != "images")
            print(f"{name}: AutoAttack on {len(r['autoattack']['images'])} images: {left}")
        if "H" in r:
            accuracies = ", ".join(f"{key} {e['clean']:.2f} and {e['pgd']:.2f}" for key, e in (("base", r), ("new", r["transfer"]["new"])))
            print(f"{name}: H {r['H']:.2f}, the harmonic mean of clean and PGD-{steps}: {accuracies}")
        for flag in r["flags"]:
            print(f"WARNING ({name}): {flag}")
