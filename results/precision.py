"""Does bfloat16 weaken the attack? The small CLIP zero-shot under PGD-10, in three precisions.

    python results/precision.py

prints clean and PGD accuracy on the embedded test set in float32; with everything in bfloat16, the
patch embedding too; and as common.Classifier does it, the patch embedding in float32. Pixels of up
to 1, normalised, are rounded to steps of about 1/128 in bfloat16, and an attack at 1/255 moves them
by 0.015: rounding undoes a part of it.
"""

import pathlib
import sys

import torch
from torch import nn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import common

STEPS = 10
# what is printed -> the classifier's dtype, and whether the patch embedding is autocast's too
PRECISIONS = {
    "float32": ("float32", False),
    "bfloat16, all of it": ("bfloat16", True),
    "bfloat16, patch embedding in float32": ("bfloat16", False),
}


def plain_convolution(embedding):
    """common.PatchEmbedding as the convolution that it was, with the same weight."""
    d, channels, p, _ = embedding.weight.shape
    convolution = nn.Conv2d(channels, d, p, p, bias=False)
    convolution.weight = embedding.weight
    return convolution


def main():
    torch.backends.cuda.enable_flash_sdp(False)  # as common.parse on a CPU
    data = common.load_dataset("embedded", None)
    for name, (dtype, all_of_it) in PRECISIONS.items():
        clip, config = common.load_clip("tiny")
        classifier = common.Classifier(clip, config, data.classes, data.template, dtype)
        if all_of_it:
            clip.visual.conv1 = plain_convolution(clip.visual.conv1)
        images = common.TestImages(data.test, classifier.size)
        for eps in (1, 2, 3):
            result = common.evaluate(classifier, images, eps / 255, STEPS)
            clean, robust = result["clean"], result["pgd"]
            accuracies = f"clean {clean:.1f}, PGD-{STEPS} {robust:.1f}"
            print(f"{name:36}  eps {eps}/255: {accuracies}", flush=True)


if __name__ == "__main__":
    common.guard(main)
