"""What every method here needs and none is about: arguments, datasets and few-shot draws, loading CLIP, the classifier, robust evaluation, files.

Pixels are float in [0, 1] before CLIP's normalisation, NCHW; eps and step are in the same units. Faults of the user's making raise `Fault`,
which `guard` turns into one sentence on stderr and exit code 2.
"""
import argparse
import concurrent.futures
import contextlib
import datetime
import errno
import hashlib
import http.client
import importlib.util
import json
import logging
import math
import os
import pathlib
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from typing import NamedTuple

import numpy as np
import open_clip
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from robustness import TORCHATTACKS, Float32Conv2d, batch_mean, draw_curves, evaluate, examine, table, total    # noqa: F401

HERE = pathlib.Path(__file__).resolve().parent
# torchrun starts WORLD processes of a program: each draws all that is random for all, and computes its share; process 0 prints and writes
RANK, WORLD = (int(os.environ[key]) if torch.distributed.is_torchelastic_launched() else start for key, start in (("RANK", 0), ("WORLD_SIZE", 1)))


# ---------------------------------------------------------------------------------------------------------------- faults and arguments
class Fault(Exception):
    """A fault of the input; its text says what was expected, what was found, and what to do."""


def guard(main):
    """Run a program: a Fault, a full disk or a broken download becomes one sentence on stderr and exit code 2."""
    sys.stdout = open(os.devnull, "w") if RANK else sys.stdout
    try:
        return main()
    except Fault as fault:
        sentence = str(fault)
    except OSError as fault:
        full = fault.errno == errno.ENOSPC
        sentence = f"{'the disk is full' if full else fault.strerror or fault}: {fault.filename or 'while writing'}; nothing half-written was left"
    except RuntimeError as fault:
        if "Connection closed by peer" not in str(fault):
            raise
        sentence = "another process of torchrun has ended; it says why"
    except KeyboardInterrupt:
        sentence = "interrupted; no half-written file was left"
    time.sleep(3 if RANK or "another process" in sentence else 0)    # torchrun ends the others meanwhile: a sentence is printed once
    print(f"error: {' '.join(sentence.split())}", file=sys.stderr)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are Faults: one sentence, no usage block."""

    def error(self, message):
        raise Fault(f"{message} (--help lists the arguments)")

    def add_argument(self, *names, **keywords):
        shown = keywords.get("default") and names[0] != "-h" and "default" not in keywords["help"]
        return super().add_argument(*names, **keywords | ({"help": keywords["help"] + " (default: %(default)s)"} if shown else {}))


def fraction(text):
    """'1/255' or '0.004' -> float >= 0."""
    above, _, below = text.partition("/")
    with contextlib.suppress(ValueError, ZeroDivisionError):
        if 0 <= (value := float(above) / float(below or 1)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"expected a finite number of at least 0, such as 1/255 or 0.004, found {text!r}")


def at_least(low, kind=int):
    """An argparse type: a number of at least `low`, below 2^63."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) < 2**63:
                return value
        raise argparse.ArgumentTypeError(f"expected a number of at least {low}, found {text!r}")
    return parse


def add_arguments(parser):
    """The arguments that every program shares."""
    add = parser.add_argument
    add("--dataset", default="embedded", choices=["embedded", "folder", *DATASETS], help="embedded: tiny/fashion.npz; folder: your own images")
    add("--data-root", type=pathlib.Path, default=pathlib.Path("data"), help="folder of the datasets (CoOp's layout), or of your classes")
    add("--download", action=argparse.BooleanOptionalAction, default=True, help="download missing images and splits, or say where they are to be had")
    add("--shots", type=at_least(1), default=16, help="training images per class")
    add("--classes", choices=["all", "base", "new"], help="all classes (default), or CoOp's first or second half")
    add("--protocol", choices=["base-to-new"], help="base-to-new: train on the first half of the classes, evaluate on each half")
    add("--transfer", nargs="+", default=[], choices=["embedded", *DATASETS], metavar="NAME", help="evaluate on these datasets as well, untrained")
    add("--model", help="tiny, an open_clip name, or local-dir:DIR; default: tiny for the embedded data, else ViT-B-32-quickgelu")
    add("--pretrained", default="openai", help="open_clip tag, none for random weights, or a checkpoint file (OpenAI's wants a -quickgelu model)")
    add("--eps", type=fraction, help=f"l_inf radius, of pixels in [0, 1]; default 1/255, {round(255 * TINY_EPS)}/255 for the small CLIP (our choice)")
    add("--step", type=fraction, help="step of the test attack; default 1/255, and 2.5 radii over all steps in an l2 ball")
    add("--test-steps", type=at_least(1), default=100, help="steps of the test attack, PGD-N")
    add("--settle", type=at_least(0), default=5, help="an image broken so many iterates in a row is broken and leaves (our choice); 0: none leaves")
    add("--norm", default="linf", choices=["linf", "l2"], help="the ball of the test attack; training is always l_inf")
    add("--test-eps", type=fraction, help="radius of the test attack; default --eps; for l2, a norm over all pixels, to be given")
    add("--restarts", type=at_least(1), default=1, help="restarts of the test attack, for the best iterate")
    add("--autoattack", type=at_least(1), metavar="N", help="attack N fixed test images with AutoAttack as well; needs torchattacks")
    add("--eps-curve", action="store_true", help="robust accuracy under PGD-20 over eps as well, from 0 to where it is 0; needs matplotlib")
    add("--seed", type=at_least(0), default=1, help="few-shot draw and training; the test attack's starts are the image's own")
    add("--batch-size", type=at_least(1), default=32, help="training batch, of all processes together")
    add("--augment", default="crop", choices=["crop", "none"], help="crop: RandomResizedCrop(0.5, 1) and flip (our choice: R-AMT's)")
    add("--logit-scale", type=at_least(1e-3, float), help="s in the classifier; default the model's own, 100 for OpenAI's CLIP")
    add("--test-batch-size", type=at_least(1), default=128, help="evaluation batch")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="auto: bfloat16 on a CPU that has it, else float32")
    add("--attention", default="auto", choices=["auto", "torch"], help="auto: the attention kernel that is fast here; torch: its own choice")
    add("--out", type=pathlib.Path, default=pathlib.Path("runs"), help="folder of the result files")
    add("--load", type=pathlib.Path, help="evaluate this adapter.safetensors (or its folder) instead of training")
    add("--export", type=pathlib.Path, help="write the merged model as an open_clip folder")
    add("--test-limit", type=at_least(1), help="evaluate N of the images, a random choice that is always the same")
    add("--after-only", action="store_true", help="do not evaluate zero-shot first: it is the same for every run on the same images")
    add("--split", default="test", choices=["test", "val"], help="evaluate on test, or on the whole val set: for choosing arguments")


def parse(parser, argv=None):
    """Parse, fill the defaults that depend on others, set the seed and the CPU's fast attention path. Raises Fault."""
    args = parser.parse_args(argv)
    args.model = args.model or ("tiny" if args.dataset == "embedded" else "ViT-B-32-quickgelu")
    args.eps = args.eps if args.eps is not None else TINY_EPS if args.model == "tiny" else 1 / 255
    if args.test_eps is None and args.norm == "l2":
        raise Fault("--norm l2 needs --test-eps, an l2 radius over all pixels, such as 0.5")
    args.test_eps = args.eps if args.test_eps is None else args.test_eps
    args.step = args.step if args.step is not None else 1 / 255 if args.norm == "linf" else 2.5 * args.test_eps / args.test_steps
    if args.protocol and args.classes:
        raise Fault("--protocol base-to-new trains on base and evaluates base and new; leave out --classes")
    if len({args.dataset, *args.transfer}) <= len(args.transfer):
        raise Fault(f"--transfer {' '.join(args.transfer)} names a dataset twice, or --dataset {args.dataset} itself; name each once")
    args.classes = args.classes or ("base" if args.protocol else "all")
    if args.dtype == "float16":
        raise Fault("--dtype float16 is refused: small gradients become zero in it, and the attack looks weak; use float32 or bfloat16")
    if args.autoattack and not importlib.util.find_spec("torchattacks"):
        raise Fault(TORCHATTACKS)
    if args.eps_curve and not importlib.util.find_spec("matplotlib"):
        raise Fault("--eps-curve draws with matplotlib; install it with: pip install matplotlib")
    args.device = f"cuda:{os.environ['LOCAL_RANK']}" if WORLD > 1 and args.device == "cuda" else args.device
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as fault:
        raise Fault(f"device {args.device!r} cannot be used ({str(fault).splitlines()[0]}); try --device cpu")
    if args.dtype == "auto":
        flags = pathlib.Path("/proc/cpuinfo").read_text() if args.device == "cpu" and os.path.exists("/proc/cpuinfo") else ""
        args.dtype = "bfloat16" if "amx_bf16" in flags or "avx512_bf16" in flags else "float32"
    # torch's flash kernel is slow backwards on short sequences on CPU; this switch governs the CPU kernel as well
    torch.backends.cuda.enable_flash_sdp(args.device != "cpu" or args.attention == "torch")
    torch.manual_seed(args.seed)
    if WORLD > 1:
        args.export = None if RANK else args.export
        if args.device != "cpu":
            torch.cuda.set_device(args.device)
        torch.distributed.init_process_group("gloo" if args.device == "cpu" else "nccl", timeout=datetime.timedelta(days=1))
    return args


# --------------------------------------------------------------------------------------------------------------------------- datasets
Item = NamedTuple("Item", [("image", object), ("label", int), ("name", str)])    # a path or a uint8 array, its label, its class name
# class names by label, the prompt template, and three lists of Item
Data = NamedTuple("Data", [("classes", list), ("template", str), ("train", list), ("val", list), ("test", list)])
# one line per dataset: folder under the data root, image folder in it, file of the split, md5 of its parsed content (empty: not checked),
# prompt, and where the images come from: a class of torchvision that downloads them, or an address, files and their size
Source = NamedTuple("Source", [(key, str) for key in ("folder", "images", "split", "md5", "template", "origin")])

SPLITS = "https://raw.githubusercontent.com/linzhiqiu/cross_modal_adaptation/c7e7e68ae4eeadfab98e7886b2d6c9cf48a7ceb5/splits/"
PHOTO = "a photo of a {}."
DATASETS = {
    "caltech101": Source("caltech-101", "101_ObjectCategories", "split_zhou_Caltech101.json", "06f9c268c38af55e10957bae4bcf47d8",
                         PHOTO, "Caltech101"),
    "dtd": Source("dtd", "images", "split_zhou_DescribableTextures.json", "c2b3f429a5c72f41ba7dbe2c6fb8d9a9", "{} texture.", "DTD"),
    "eurosat": Source("eurosat", "2750", "split_zhou_EuroSAT.json", "c3e7c2c2b11e4d6afe26aa9a5b3735be",
                      "a centered satellite photo of {}.", "EuroSAT"),
    "fgvc_aircraft": Source("fgvc_aircraft", "images", "images_variant_train.txt", "", "a photo of a {}, a type of aircraft.", "FGVCAircraft"),
    "food101": Source("food-101", "images", "split_zhou_Food101.json", "", "a photo of {}, a type of food.", "Food101"),
    "imagenet": Source("imagenet", "images", "classnames.txt", "", PHOTO,
                       "https://image-net.org (ILSVRC2012, train and val as folders of wnids, 145 GB; for classnames.txt see CoOp's DATASETS.md)"),
    "oxford_flowers": Source("oxford_flowers", "jpg", "split_zhou_OxfordFlowers.json", "395a052b213500e75f4b8d0c5a85a465",
                             "a photo of a {}, a type of flower.", "Flowers102"),
    "oxford_pets": Source("oxford_pets", "images", "split_zhou_OxfordPets.json", "7cb3ea48a02575b316c5187147752e2f",
                          "a photo of a {}, a type of pet.", "OxfordIIITPet"),
    "stanford_cars": Source("stanford_cars", "", "split_zhou_StanfordCars.json", "8f798c281df9ff2ba29b1fbcff7d1d5b", PHOTO,
                            "http://ai.stanford.edu/~jkrause/car196/ (cars_train.tgz and cars_test.tgz, 16,185 images, 1.8 GB; often unreachable)"),
    "sun397": Source("sun397", "SUN397", "split_zhou_SUN397.json", "", PHOTO,
                     "http://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz (108,754 images, 37 GB; often unreachable)"),
    "tiny_imagenet": Source("tiny-imagenet-200", "", "words.txt", "", PHOTO, "http://cs231n.stanford.edu/tiny-imagenet-200.zip (240 MB)"),
    "ucf101": Source("ucf101", "UCF-101-midframes", "split_zhou_UCF101.json", "bd5e8d4073fee6f8d2235aafaf4903a9", "a photo of a person doing {}.",
                     "UCF-101-midframes.zip, linked in CoOp's DATASETS.md, https://github.com/KaiyangZhou/CoOp (13,320 images)"),
}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


def load_dataset(name, root, download=True):
    """The dataset `name` under `root`, downloaded where that is possible -> Data. Raises Fault."""
    if name != "embedded":
        return load_folder(root) if name == "folder" else load_published(name, root, download)
    # 16 train, 4 val and 20 test images per class of Fashion-MNIST, 28 x 28 grey
    arrays = np.load(HERE / "tiny" / "fashion.npz")
    names = [str(n) for n in arrays["classes"]]
    return Data(names, PHOTO, *([Item(x, int(y), names[y]) for x, y in zip(arrays[f"{s}_x"], arrays[f"{s}_y"])] for s in ("train", "val", "test")))


def load_folder(root):
    """One sub-folder per class; names from classnames.txt (a line per folder, in sorted order) or from the folders. Split like CoOp's random splits:
    per class, shuffled once with a fixed seed, 50 % train, 20 % val, 30 % test, at least one of each."""
    if not root.is_dir():
        raise Fault(f"--data-root {root} is not a folder; expected one with a sub-folder of images per class")
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(folders) < 2:
        raise Fault(f"{root} has {len(folders)} sub-folders; expected at least 2, one per class")
    names = [p.name.replace("_", " ") for p in folders]
    if (root / "classnames.txt").exists():
        names = [line.strip() for line in (root / "classnames.txt").read_text().split("\n") if line.strip()]
        if len(names) != len(folders):
            raise Fault(f"{root / 'classnames.txt'} names {len(names)} classes, expected one line for each of the {len(folders)} sub-folders")
    parts = [[], [], []]
    for label, folder in enumerate(folders):
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if len(files) < 3:
            raise Fault(f"{folder} has {len(files)} images; expected at least 3, for train, val and test")
        random.Random(0).shuffle(files)
        n_val, n_test = max(1, round(0.2 * len(files))), max(1, round(0.3 * len(files)))
        for part, some in zip(parts, (files[n_val + n_test:], files[:n_val], files[n_val:n_val + n_test])):
            part += [Item(p, label, names[label]) for p in some]
    return Data(names, PHOTO, *parts)


def load_published(name, root, download=True):
    """A dataset in CoOp's layout: <root>/<folder>/<images>/... and the published split, whose parsed content is checked -> Data. Raises Fault."""
    source = DATASETS[name]
    folder, images = root / source.folder, root / source.folder / source.images
    if not any(path.suffix not in (".json", ".txt") for path in images.glob("*")):
        download_images(source, root, download)
    if source.split.endswith(".json") and not (folder / source.split).exists():
        fetch(SPLITS + source.split, folder / source.split, download)
    try:
        reader = {"fgvc_aircraft": read_aircraft, "imagenet": read_wnids, "tiny_imagenet": read_wnids}.get(name)
        # CoOp's split file: {"train": [[path, label, class name], ...], "val": ..., "test": ...}
        parsed = reader(folder, source) if reader else json.loads((folder / source.split).read_text())
    except (OSError, ValueError, KeyError) as fault:
        kind = "is not JSON" if isinstance(fault, json.JSONDecodeError) else "cannot be read"
        raise Fault(f"{folder / source.split} {kind} ({type(fault).__name__}: {fault}); delete it, and the next run fetches it again")
    md5 = hashlib.md5(json.dumps(parsed, sort_keys=True).encode()).hexdigest()
    if source.md5 and md5 != source.md5:
        raise Fault(f"{folder / source.split} is not the published split (content {md5}, expected {source.md5}); delete it: the next run fetches it")
    parts = [[Item(images / path, label, label_name) for path, label, label_name in parsed[s]] for s in ("train", "val", "test")]
    names = {item.label: item.name for item in parts[0]}
    return Data([names[label].replace("_", " ") for label in sorted(names)], source.template, *parts)


def read_aircraft(folder, source):
    """FGVC-Aircraft's own lists: a line is `<image> <variant>`; labels are the lines of variants.txt."""
    names, parsed = (folder / "variants.txt").read_text().split("\n"), {}
    for part in ("train", "val", "test"):
        lines = (folder / source.split.replace("train", part)).read_text().strip().split("\n")
        parsed[part] = [[f"{image}.jpg", names.index(name), name] for image, name in (line.split(" ", 1) for line in lines)]
    return parsed


def read_wnids(folder, source):
    """ImageNet and Tiny ImageNet: train/<wnid>/..., labels are the sorted wnids; the published test set is val, which is both here, as in CoOp."""
    images, lines = folder / source.images, (folder / source.split).read_text().strip().split("\n")
    names = {wnid: name.split(",")[0] for wnid, name in (line.replace("\t", " ").split(" ", 1) for line in lines)}
    labels = {path.name: label for label, path in enumerate(sorted(p for p in (images / "train").iterdir() if p.is_dir()))}
    train = [(path, wnid) for wnid in labels for path in sorted((images / "train" / wnid).rglob("*.JPEG"))]
    notes = images / "val" / "val_annotations.txt"
    val = ([(images / "val" / "images" / line.split("\t")[0], line.split("\t")[1]) for line in notes.read_text().strip().split("\n")]
           if notes.exists() else [(path, wnid) for wnid in labels for path in sorted((images / "val" / wnid).glob("*.JPEG"))])
    train, val = ([[str(path.relative_to(images)), labels[wnid], names[wnid]] for path, wnid in part] for part in (train, val))
    return {"train": train, "val": val, "test": val}


def fetch(url, path, download=True):
    """Download a small file under a temporary name, then rename. Raises Fault with the address, the folder and the file."""
    try:
        if not download:
            raise OSError("--no-download")
        with urllib.request.urlopen(url, timeout=60) as answer:
            content = answer.read()
    except (OSError, http.client.HTTPException) as fault:
        raise Fault(f"could not download {url} ({fault}); put the file at {path} by hand")
    write(path, content)


def download_images(source, root, download=True):
    """Let torchvision download and unpack into a temporary folder, then move the images, and text files beside them, to CoOp's place."""
    target = root / source.folder / source.images
    if not download or not source.origin.isalnum():
        origin = f"torchvision.datasets.{source.origin}" if source.origin.isalnum() else source.origin
        raise Fault(f"{target} is missing; get {origin}, and put the images there by hand, or set --data-root")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix="download-") as scratch:
        try:
            with contextlib.suppress(ImportError):    # Flowers102 wants scipy for labels that are not used here
                getattr(torchvision.datasets, source.origin)(scratch, download=True)
        except (OSError, http.client.HTTPException, RuntimeError, ValueError, EOFError) as fault:
            if getattr(fault, "errno", None) == errno.ENOSPC:
                raise
            raise Fault(f"{target} is missing, and torchvision's download failed ({fault}); put the images there by hand, or set --data-root")
        found = next((p for p in sorted(pathlib.Path(scratch).rglob(source.images)) if p.is_dir()), None)
        if found is None:
            raise Fault(f"torchvision's download holds no folder {source.images}; put the images at {target} by hand")
        for path in (*found.parent.glob("*.txt"), found):
            os.replace(path, target.parent / path.name)


def few_shot(train, val, k, seed):
    """CoOp's k-shot draw -> (k items per class of train, min(k, 4) per class of val); a class with fewer gives all it has.
    Equal to the published index files, order included: one generator, classes in order of first appearance, train before val.
    """
    generator, drawn = random.Random(seed), []
    for items, n in ((train, k), (val, min(k, 4))):
        groups = {}
        for item in items:
            groups.setdefault(item[1], []).append(item)
        drawn.append([item for group in groups.values() for item in (generator.sample(group, n) if len(group) >= n else group)])
    return drawn[0], drawn[1]


def half(data, part):
    """CoOp's base or new classes: labels sorted, the first ceil(n/2) are base, the rest new, relabelled from 0. `all`: unchanged."""
    if part == "all":
        return data
    n = len(data.classes)
    keep = range(math.ceil(n / 2)) if part == "base" else range(math.ceil(n / 2), n)
    parts = ([item._replace(label=item.label - keep.start) for item in items if item.label in keep] for items in data[2:])
    return Data([data.classes[label] for label in keep], data.template, *parts)


def decode(items, size, crop):
    """Decode once -> list of uint8 (3, h, w). crop: CLIP's test view, `size` square; else the short side is 1.25 size, for random crops."""
    side = size if crop else round(1.25 * size)
    shrink = v2.Compose([v2.Resize(side, v2.InterpolationMode.BICUBIC), v2.CenterCrop(size) if crop else v2.Identity(), v2.PILToTensor()])

    def one(item):
        try:
            picture = Image.fromarray(item.image) if isinstance(item.image, np.ndarray) else Image.open(item.image)
            return shrink(picture.convert("RGB"))
        except FileNotFoundError:
            raise Fault(f"image {item.image} is missing; the split names it: is the dataset complete?")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as fault:
            raise Fault(f"image {item.image} cannot be read ({fault}); replace or remove it")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(one, items))


def test_set(items, size):
    """CLIP's test view of items -> x (n, 3, size, size) uint8, y (n,)."""
    return torch.stack(decode(items, size, crop=True)), torch.tensor([item.label for item in items])


def test_split(data, args, size):
    """The images that --split and --test-limit choose, as test_set gives them."""
    items = data.test if args.split == "test" else data.val
    items = random.Random(0).sample(items, min(args.test_limit, len(items))) if args.test_limit else items
    return test_set(items, size)


def batches(items, size, args, steps):
    """`steps` training batches: x (b, 3, size, size) float in [0, 1], y (b,). RandomResizedCrop(0.5, 1) and flip; epochs reshuffled."""
    pictures, labels = decode(items, size, crop=args.augment == "none"), torch.tensor([item.label for item in items])
    view = v2.Compose([v2.RandomResizedCrop(size, (0.5, 1.0), interpolation=v2.InterpolationMode.BICUBIC), v2.RandomHorizontalFlip()])
    view = v2.Identity() if args.augment == "none" else view
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(order) < min(args.batch_size, len(items)):
            order = torch.cat([order, torch.randperm(len(items))])
        picks, order = order[:args.batch_size], order[args.batch_size:]
        yield (torch.stack([view(pictures[i]) for i in picks]) / 255).to(args.device), labels[picks].to(args.device)


# ------------------------------------------------------------------------------------------------------------------------------- CLIP
TINY_EPS = 3 / 255    # zero-shot PGD accuracy of the small CLIP falls below 10 % on both its test sets: README


def load_clip(model, pretrained="openai", device="cpu"):
    """-> an open_clip model in eval mode, frozen, and its configuration (model_cfg, preprocess_cfg). Raises Fault.

    `tiny` is the small CLIP in tiny/: rows of the token embedding that its training never touched are not stored, and are zero here.
    """
    if model == "tiny":
        config = json.loads((HERE / "tiny" / "open_clip_config.json").read_text())
        state = {k: v.float() for k, v in safetensors.torch.load_file(HERE / "tiny" / "weights.safetensors").items()}
        rows, clip = state.pop("token_embedding.rows").long(), open_clip.CLIP(**config["model_cfg"])
        state["token_embedding.weight"] = torch.zeros_like(clip.token_embedding.weight).index_copy(0, rows, state["token_embedding.weight"])
        clip.load_state_dict(state)
        open_clip.model.set_model_preprocess_cfg(clip, {"size": config["model_cfg"]["vision_cfg"]["image_size"], **config["preprocess_cfg"]})
    else:
        if model not in open_clip.list_models() and not model.startswith("local-dir:"):
            raise Fault(f"unknown model {model!r}; expected tiny, local-dir:DIR or one of open_clip's, such as ViT-B-32-quickgelu")
        if pretrained == "openai" and f"{model}-quickgelu" in open_clip.list_models():
            raise Fault(f"{model} would run OpenAI's weights with another activation; use --model {model}-quickgelu")
        tag = None if pretrained == "none" or model.startswith("local-dir:") else pretrained
        try:
            logging.disable(logging.CRITICAL)    # open_clip logs what it raises as well
            clip, _, _ = open_clip.create_model_and_transforms(model, pretrained=tag)
        except Exception as fault:    # open_clip raises whatever its downloaders raise
            raise Fault(f"could not load {model} with weights {tag!r} ({type(fault).__name__}: {str(fault)[:200]}); without a network, give "
                        "--pretrained a checkpoint file, or none for random weights")
        finally:
            logging.disable(logging.NOTSET)
        config = {"model_cfg": open_clip.get_model_config(model), "preprocess_cfg": open_clip.model.get_model_preprocess_cfg(clip)}
    text = config["model_cfg"]["text_cfg"]
    if not hasattr(clip.visual, "transformer") or "hf_tokenizer_name" in text or text.get("vocab_size", 49408) != 49408:
        raise Fault(f"{model} has no vision transformer, or not CLIP's tokenizer; expected a ViT such as ViT-B-32-quickgelu")
    return clip.eval().requires_grad_(False).to(device), config


class Classifier(nn.Module):
    """Zero-shot CLIP as a plain network: pixels (b, 3, h, w) in [0, 1] -> logits (b, classes), f(x) = s <z/|z|, t_c/|t_c|>.

    Text features are computed once, by set_classes. With dtype bfloat16 the image tower runs under autocast, except the patch embedding: in bfloat16
    it would round the pixels by about as much as an attack moves them, a hidden defence worth 5 points at 1/255 (results/precision.py).
    """

    def __init__(self, clip, config, classes, template="a photo of a {}.", dtype="float32", scale=None):
        super().__init__()
        self.scale = clip.logit_scale.exp().item() if scale is None else scale
        self.clip, self.config, self.dtype = clip, config, getattr(torch, dtype)
        self.size = int(np.max(clip.visual.preprocess_cfg["size"]))    # a number, or the same number twice
        clip.visual.conv1.__class__ = Float32Conv2d
        tower = clip.visual.transformer    # tokens first: attention would transpose (b, tokens, d), which is slow on CPUs: tests/benchmarks/layout.py
        for part in [tower, *(block.attn for block in tower.resblocks)] if isinstance(tower.resblocks[0].attn, nn.MultiheadAttention) else []:
            part.batch_first = False
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(clip.visual.preprocess_cfg[key], device=clip.logit_scale.device)[:, None, None])
        self.eval().set_classes(classes, template)

    def set_classes(self, classes, template):
        """Classify among these from now on."""
        tokenizer = open_clip.tokenizer.SimpleTokenizer(context_length=self.config["model_cfg"]["text_cfg"].get("context_length", 77))
        self.register_buffer("tokens", tokenizer([template.format(name) for name in classes]).to(self.mean.device))
        with torch.no_grad():
            self.register_buffer("text", self.encode_classes())

    def encode_classes(self):
        """t_c / |t_c| of every class's prompt   (classes, d)"""
        return torch.cat([self.clip.encode_text(t, normalize=True) for t in self.tokens.split(256)])

    def forward(self, x):
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            z = self.clip.encode_image((x - self.mean) / self.std)                     # (b, d)
        return self.scale * F.normalize(z.float(), dim=-1) @ self.text.T


def prepare(args):
    """Load what the arguments name -> classifier, the few-shot training items, and a function that evaluates what the classifier has become: on the
    classes that are trained, and on those that --protocol and --transfer add, the result's "transfer": {name: result}."""
    if RANK:    # process 0 loads first, and downloads
        torch.distributed.barrier()
    data = load_dataset(args.dataset, args.data_root, args.download)
    data = data._replace(train=few_shot(data.train, data.val, args.shots, args.seed)[0])    # drawn on all classes, then halved, as in CoOp
    targets = {args.dataset: half(data, args.classes), **({"new": half(data, "new")} if args.protocol else {}),
               **{name: load_dataset(name, args.data_root, args.download) for name in args.transfer}}
    if min(len(target.classes) for target in targets.values()) < 2:
        raise Fault(f"{args.dataset} has {len(data.classes)} classes, too few to halve; expected at least 4, so that each half has 2 to tell apart")
    data = targets[args.dataset]
    classifier = Classifier(*load_clip(args.model, args.pretrained, args.device), data.classes, data.template, args.dtype, args.logit_scale)
    if min(args.batch_size, len(data.train)) < WORLD:
        raise Fault(f"{WORLD} processes cannot share a batch of {min(args.batch_size, len(data.train))} images; start fewer")
    if WORLD > 1 and not RANK:
        torch.distributed.barrier()
    images = {name: test_split(target, args, classifier.size) for name, target in targets.items()}
    print(f"{args.model} on {args.dataset}: {len(data.classes)} classes, {len(data.train)} training and {len(images[args.dataset][1])} {args.split} "
          f"images, {classifier.size} px, eps {255 * args.eps:g}/255, {args.dtype} on {args.device}, logit scale {classifier.scale:.1f}",
          *(f"; {name}: {len(targets[name].classes)} classes, {len(images[name][1])} images" for name in list(targets)[1:]), sep="")

    def measure():
        results = {}
        for name in reversed(targets):    # the training classes come last, and stay
            classifier.set_classes(targets[name].classes, targets[name].template)    # again, as training may have changed the text tower
            results = {name: examine(classifier, *images[name], args), **results}
        result = results.pop(args.dataset)
        # H = 4 / (1/bc + 1/ba + 1/nc + 1/na), 0 if one of them is
        h = {"H": statistics.harmonic_mean(r[key] for r in (result, results["new"]) for key in ("clean", "pgd"))} if args.protocol else {}
        return result | ({"transfer": results} if results else {}) | h
    return classifier, data.train, measure


# ------------------------------------------------------------------------------------------------------------------------------ files
def write(path, content):
    """Write bytes under a temporary name beside `path`, then rename: the file is whole or absent."""
    if RANK:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def run_folder(args, method):
    """<out>/<method>-<dataset>-<model>-<shots>shot-seed<seed>, with -2, -3, ... after earlier runs; created now, to fail before the training."""
    model = args.model.replace("local-dir:", "").strip("/").replace("/", "-")
    check_new(args.export)
    name = f"{method}-{args.dataset}-{model}-{args.shots}shot-seed{args.seed}{'-loaded' if args.load else ''}"
    try:
        folder = next(f for n in range(1, 10**6) if not any((f := args.out / (name if n == 1 else f"{name}-{n}")).glob("*")))
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as fault:
        raise Fault(f"cannot write to {args.out / name} ({fault.strerror}); choose another folder with --out")
    return folder


def save_adapter(path, tensors, metadata):
    """safetensors file with string metadata, whole or absent."""
    write(path, safetensors.torch.save({k: v.contiguous().cpu() for k, v in tensors.items()}, {k: str(v) for k, v in metadata.items()}))


def load_adapter(path, method, args, needs=()):
    """-> tensors, metadata (with the keys `needs`) of an adapter file, or of the one in a run's folder. Raises Fault."""
    path = path / "adapter.safetensors" if path.is_dir() else path
    try:
        with safetensors.safe_open(path, "pt") as file:
            tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}
    except FileNotFoundError:
        raise Fault(f"adapter {path} does not exist; expected an adapter.safetensors or the folder of a run")
    except Exception as fault:    # safetensors has one error class for every broken header
        raise Fault(f"adapter {path} cannot be read ({fault})")
    if missing := {"method", "model", "pretrained", *(needs if metadata.get("method") == method else ())} - set(metadata):
        raise Fault(f"adapter {path} does not say its {', '.join(sorted(missing))}; expected a file that this program saved")
    for key, expected in (("method", method), ("model", args.model), ("pretrained", args.pretrained)):
        if metadata.get(key) != expected:
            raise Fault(f"adapter {path} was made with {key} {metadata.get(key)!r}, but this run has {expected!r}")
    print(f"adapter {path}: trained with", ", ".join(f"{k} {metadata.get(k)}" for k in ("dataset", "classes", "shots", "seed", "eps", *needs)))
    return tensors, metadata


def describe(args, method):
    """Facts that make a run repeatable: every argument but the folders of this machine, versions, commit."""
    git, commit = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=12"], ""
    with contextlib.suppress(OSError):
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    plain = {k: v for k, v in vars(args).items() if k not in ("data_root", "out", "load", "export")}
    return {"method": method, **plain, "versions": {m.__name__: m.__version__ for m in (torch, torchvision, open_clip)}, "commit": commit}


def save_result(folder, args, method, **facts):
    """<folder>/result.json (its keys: results/README.md): how it was made, and what the program gives; with --eps-curve, eps_curve.png as well."""
    device = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    facts = {**describe(args, method), "device_name": device, "peak_memory_mib": round(peak_memory(args.device)), "processes": WORLD, **facts}
    write(folder / "result.json", (json.dumps(facts, indent=1) + "\n").encode())
    if args.eps_curve:
        write(folder / "eps_curve.png", draw_curves({k: facts[k]["eps_curve"] for k in ("before", "after") if facts[k]}, args.norm))


def peak_memory(device):
    """MiB: the GPU's peak allocation, or the process's largest resident size; 0 where the system has no such count."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(ImportError):    # Unix only
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return 0.0


def check_new(folder):
    """Raises Fault where --export would overwrite something."""
    if folder and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Fault(f"--export {folder} exists and is not empty; choose a new folder")


def export(clip, config, folder):
    """Write the model as an open_clip folder: open_clip.create_model_and_transforms('local-dir:FOLDER') gives the same logits."""
    check_new(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        preprocess = {k: v for k, v in config["preprocess_cfg"].items() if k in ("mean", "std", "interpolation", "resize_mode")}
        (scratch / "open_clip_config.json").write_text(json.dumps({"model_cfg": config["model_cfg"], "preprocess_cfg": preprocess}, indent=1))
        weights = safetensors.torch.save({k: v.contiguous().cpu() for k, v in clip.state_dict().items()})
        (scratch / "open_clip_model.safetensors").write_bytes(weights)
        scratch.chmod(0o755)
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
