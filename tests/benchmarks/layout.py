"""What a step of the attack costs with tokens first, as Classifier runs CLIP, and with images first, as open_clip does: images a second.

    OMP_NUM_THREADS=1 python tests/benchmarks/layout.py

Frozen random weights, one step (forward, and backward to the pixels), the best of three, the two layouts in turns. Results are the same to rounding.
"""
import pathlib
import sys
import time

import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
import common

torch.backends.cuda.enable_flash_sdp(False)    # as common.parse on a CPU
print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\nmodel               dtype     batch  images first  tokens first  ratio")
for model, batches in (("tiny", (8, 32, 128)), ("ViT-B-32-quickgelu", (2, 8))):
    for dtype in ("bfloat16", "float32"):
        net = common.Classifier(*common.load_clip(model, "none"), ["cat", "dog"], dtype=dtype)
        tower = net.clip.visual.transformer
        for n in batches:
            x, y = torch.rand(n, 3, net.size, net.size, requires_grad=True), torch.zeros(n, dtype=torch.long)
            rates = {True: 0.0, False: 0.0}
            for _ in range(3):
                for batch_first in rates:
                    for part in (tower, *(block.attn for block in tower.resblocks)):
                        part.batch_first = batch_first
                    start = time.time()
                    torch.autograd.grad(F.cross_entropy(net(x), y, reduction="sum"), x)
                    rates[batch_first] = max(rates[batch_first], n / (time.time() - start))
            print(f"{model:19} {dtype:9} {n:5}  {rates[True]:12.1f}  {rates[False]:12.1f}  {rates[False] / rates[True]:5.2f}", flush=True)
