"""Does it matter that an image broken in k iterates in a row counts as broken at the final one (--settle k)? Counted image by image.

    python advmask.py --model tiny --dataset caltech101 --steps 150 --out runs/settle --export runs/settle/export
    python results/settle.py --model local-dir:runs/settle/export --dataset caltech101 --eps 3/255 --test-limit 200
"""
import pathlib
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import common
import robustness

parser = common.Parser(description=__doc__.split("\n")[0])
common.add_arguments(parser)


def main():
    args = common.parse(parser)
    data = common.load_dataset(args.dataset, args.data_root)
    net = common.Classifier(*common.load_clip(args.model, args.pretrained, args.device), data.classes, data.template, args.dtype)
    x, y = common.test_split(data, args, net.size)
    everything, published = torch.arange(len(y)), None
    for settle in (0, 10, 5, 3, 1):
        start = time.time()
        right, _ = robustness.attack(net, x, y, args.eps, args.step, args.test_steps, everything, everything, settle=settle)
        published = right[2] if published is None else published
        final, best = (100 * kind.double().mean().item() for kind in right[2:])
        print(f"--settle {settle:2}  final iterate {final:5.1f} %  best {best:5.1f} %  {time.time() - start:5.0f} s  "
              f"images that differ from --settle 0 at the final iterate: {(right[2] != published).sum()} of {len(y)}", flush=True)


if __name__ == "__main__":
    common.guard(main)
