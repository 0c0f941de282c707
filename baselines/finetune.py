"""Full adversarial fine-tuning of CLIP's image tower: the yardstick for adapters that change less.

Loss: cross-entropy on adversarial images alone, as in TeCoA ("Understanding Zero-Shot Adversarial Robustness for Large-Scale Models",
Mao et al., ICLR 2023). TeCoA trains on all of ImageNet with SGD at 1e-5; for few shots and few hundred steps the optimiser here is Adam at 1e-4
(our choice, not tuned).

    python baselines/finetune.py                                            # small CLIP, embedded data
    python baselines/finetune.py --model tiny --dataset caltech101
    python baselines/finetune.py --dataset caltech101 --optimizer sgd --lr 1e-5

    min over theta  E[ CE(f_theta(x~), y) ],   x~ = x + argmax over |delta| <= eps of CE(f_theta(x + delta), y)
"""
import math
import pathlib
import sys
import time

import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import common

parser = common.Parser(description=__doc__.split("\n")[0])
common.add_arguments(parser)
add = parser.add_argument
add("--train-attack-steps", type=common.at_least(1), default=2, help="PGD steps while training")
add("--train-step", type=common.fraction, help="PGD step while training; default eps, as published")
add("--epochs", type=common.at_least(1), default=8, help="training length (our choice) ...")
add("--min-steps", type=common.at_least(1), default=150, help="... but at least so many steps, so that few shots train too (our choice)")
add("--steps", type=common.at_least(1), help="training steps; overrides --epochs and --min-steps")
add("--optimizer", default="adam", choices=["adam", "sgd"], help="adam (our choice), or sgd with momentum 0.9, as TeCoA")
add("--lr", type=common.at_least(0, float), default=1e-4, help="first rate, decayed by a cosine (our choice)")


def pgd(classifier, x, y, eps, step, steps):
    """The inner maximisation: x (b, 3, h, w) in [0, 1], y (b,) -> x~ with |x~ - x|_inf <= eps (pixels) and x~ in [0, 1] (Madry et al. 2018)."""
    assert not classifier.training, "attack the network that is deployed: eval mode"
    delta = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1) - x
    for _ in range(steps):
        delta.requires_grad_()
        loss = F.cross_entropy(classifier(x + delta), y, reduction="sum")
        grad, = torch.autograd.grad(loss, delta)
        delta = (delta.detach() + step * grad.sign()).clamp(-eps, eps)
        delta = (x + delta).clamp(0, 1) - x
    assert delta.abs().max() <= eps + 1e-6 and torch.isfinite(delta).all()
    return x + delta


def main():
    args = common.parse(parser)
    start = time.time()
    train_step = args.eps if args.train_step is None else args.train_step
    if args.load:
        raise common.Fault("full fine-tuning has no adapter to --load; evaluate an exported model with --model local-dir:DIR of another program")
    folder = common.run_folder(args, "finetune")
    data = common.half(common.load_dataset(args.dataset, args.data_root), args.classes)
    clip, config = common.load_clip(args.model, args.pretrained, args.device)
    classifier = common.Classifier(clip, config, data.classes, data.template, args.dtype, args.logit_scale)
    train, _ = common.few_shot(data.train, data.val, args.shots, args.seed)
    test_x, test_y = common.test_split(data, args, classifier.size)
    print(f"{args.model} on {args.dataset}: {len(data.classes)} classes, {len(train)} training and {len(test_y)} {args.split} images, "
          f"{classifier.size} px, eps {255 * args.eps:g}/255, {args.dtype} on {args.device}, logit scale {classifier.scale:.1f}")

    def measure():
        return common.evaluate(classifier, test_x, test_y, args.eps, args.step, args.test_steps, batch_size=args.test_batch_size, settle=args.settle)
    before = measure()
    print(f"zero-shot: clean {before['clean']:.2f}, PGD-{args.test_steps} {before['pgd']:.2f}  ({time.time() - start:.0f} s)", flush=True)

    vision, total = (sum(p.numel() for p in m.parameters()) for m in (clip.visual, clip))
    print(f"trained {vision:,} / vision {vision:,} / total {total:,} parameters")

    # -- training
    training = time.time()
    steps = args.steps or max(args.min_steps, args.epochs * math.ceil(len(train) / args.batch_size))
    weights = list(clip.visual.requires_grad_(True).parameters())
    optimizer = torch.optim.Adam(weights, args.lr) if args.optimizer == "adam" else torch.optim.SGD(weights, args.lr, momentum=0.9)
    print(f"{steps} steps of {min(args.batch_size, len(train))} images, lr {args.lr:.2e}, {args.optimizer}")
    for t, (x, y) in enumerate(common.batches(train, classifier.size, args, steps)):
        optimizer.param_groups[0]["lr"] = args.lr * 0.5 * (1 + math.cos(math.pi * t / steps))
        x_adv = pgd(classifier, x, y, args.eps, train_step, args.train_attack_steps)
        logits_adv = classifier(x_adv)
        ce = F.cross_entropy(logits_adv, y)
        optimizer.zero_grad()
        ce.backward()
        optimizer.step()
        if (t + 1) % 50 == 0 or t + 1 == steps:
            accuracy = 100 * (logits_adv.argmax(1) == y).float().mean().item()
            print(f"step {t + 1}/{steps}  ce {ce.item():.3f}  train adv acc {accuracy:.0f} %  {time.time() - training:.0f} s", flush=True)
    training = time.time() - training

    # -- evaluation
    clip.requires_grad_(False)
    if args.export:
        common.export(clip, config, args.export)
    after = measure()
    common.table([("zero-shot", before), ("fine-tuned", after)], args.test_steps)
    common.save_result(folder, args, "finetune", before=before, after=after, trained=vision, vision=vision, total=total,
                       training_seconds=round(training, 1), seconds=round(time.time() - start, 1))
    print(f"peak memory {common.peak_memory(args.device):.0f} MiB, {time.time() - start:.0f} s (training {training:.0f} s); files in {folder}")


if __name__ == "__main__":
    common.guard(main)
