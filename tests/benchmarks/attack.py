"""What does letting broken images leave the batch save, and does our PGD agree with torchattacks'?

    python tests/benchmarks/attack.py --dataset caltech101 --data-root data     # the small CLIP, zero-shot, PGD-100; --test-limit for a shorter run

Times are ratios within one run. The comparison with torchattacks is left out where it is not installed.
"""
import importlib.util
import pathlib
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent.parent))
import common
import robustness

parser = common.Parser(description=__doc__.split("\n")[0])
common.add_arguments(parser)
parser.set_defaults(model="tiny")


def main():
    args = common.parse(parser)
    data = common.load_dataset(args.dataset, args.data_root)
    net = common.Classifier(*common.load_clip(args.model, args.pretrained, args.device), data.classes, data.template, args.dtype)
    x, y = common.test_split(data, args, net.size)
    everything, seconds = torch.arange(len(y)), {}
    for name, settle in (("broken images leave", 1), ("all images stay", 0)):
        start = time.time()
        with torch.no_grad():
            clean = torch.cat([net(robustness.pixels(x, rows, args.device)).argmax(1).cpu() == y[rows] for rows in everything.split(128)])
        rows = clean.nonzero()[:, 0] if settle else everything
        right, _ = robustness.attack(net, x, y, args.eps, args.step, args.test_steps, rows, everything, "linf", 0, args.test_batch_size, settle)
        best = (right[3] & clean[rows]).sum().item()
        seconds[name] = time.time() - start
        print(f"{name:20} PGD-{args.test_steps} best iterate {100 * best / len(y):6.2f} % of {len(y)} images  {seconds[name]:7.1f} s", flush=True)
    print(f"time ratio: 1 to {seconds['all images stay'] / seconds['broken images leave']:.1f}")
    if importlib.util.find_spec("torchattacks"):
        import torchattacks
        start, left, n = time.time(), 0, min(len(y), 200)
        for rows in everything[:n].split(args.test_batch_size):
            pixels, label = robustness.pixels(x, rows, args.device), y[rows].to(args.device)
            adversarial = torchattacks.PGD(net, eps=args.eps, alpha=args.step, steps=args.test_steps)(pixels, label)
            left += (net(adversarial).argmax(1) == label).sum().item()
        ours, ratio = right[2][:n].sum().item(), (time.time() - start) / n / (seconds["all images stay"] / len(y))
        print(f"final iterate: ours {ours}, torchattacks {left} of {n} images; time of an image 1 to {ratio:.2f}")


if __name__ == "__main__":
    common.guard(main)
