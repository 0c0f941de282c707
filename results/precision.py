"""Does bfloat16 weaken the attack? Zero-shot small CLIP on the embedded test set under PGD-10, in three precisions.

    python results/precision.py

prints clean and PGD accuracy in float32; with everything in bfloat16, the patch embedding too; and as `Classifier` does it, the patch embedding in
float32. Pixels of up to 1, normalised, are rounded to steps of about 1/128 in bfloat16, and an attack at 1/255 moves them by 0.015: rounding undoes a
part of it.
"""
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import common

if __name__ == "__main__":
    torch.backends.cuda.enable_flash_sdp(False)
    data = common.load_dataset("embedded", None)
    x, y = common.test_set(data.test, 64)
    for name in ("float32", "bfloat16, all of it", "bfloat16, patch embedding in float32"):
        classifier = common.Classifier(*common.load_clip("tiny"), data.classes, data.template, name.split(",")[0])
        if name.endswith("all of it"):
            classifier.clip.visual.conv1.__class__ = torch.nn.Conv2d
        for eps in (1, 2, 3):
            r = common.evaluate(classifier, x, y, eps / 255, steps=10)
            print(f"{name:38} eps {eps}/255: clean {r['clean']:.1f}, PGD-10 {r['pgd']:.1f}, best iterate {r['pgd_best']:.1f}")
