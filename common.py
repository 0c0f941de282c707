"""What every method here needs and none is about, in five sections that can be read apart.

Arguments; data (datasets, few-shot draws, training batches); CLIP (loading, the classifier); robust
evaluation (needs torch alone: copy it); files (adapters, results, exports).

Pixels are floats in [0, 1] before CLIP's normalisation, (b, 3, h, w); eps and steps are in the same
units. What the user did wrong raises `Fault`: `guard` makes it one sentence and exit code 2.
"""

import argparse
import atexit
import concurrent.futures
import contextlib
import datetime
import errno
import hashlib
import http.client
import json
import logging
import math
import os
import pathlib
import random
import re
import shutil
import signal
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
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import v2
from tqdm import tqdm

HERE = pathlib.Path(__file__).resolve().parent
ROOT = pathlib.Path("data")  # of the datasets, unless --data-root names another


# ------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------


class Fault(Exception):
    """A fault of the input. Its text says what was expected, what was found, and what to do."""

    def __init__(self, sentence):
        # a loader's process sends its fault as a traceback, which ends with the sentence
        super().__init__(sentence.rpartition("Fault: ")[2])


MEMORY = "out of memory; a smaller --batch-size takes less"


def guard(main):
    """Run a program: a Fault, a full disk or memory, a diverged training, an interrupt become one
    sentence, exit code 2."""
    rank = int(os.environ.get("RANK", 0))
    if rank:
        sys.stdout = open(os.devnull, "w")
    if "RANK" not in os.environ:  # torchrun ends its own processes by this signal
        # what a cluster's scheduler or `timeout` sends is an interrupt as well
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return main()
    except Fault as fault:
        sentence = str(fault)
    except FloatingPointError as fault:
        why = "the weights are broken, or the training has diverged: a lower rate may help"
        sentence = f"{fault}; {why}"
    except OSError as fault:
        what = "the disk is full" if fault.errno == errno.ENOSPC else fault.strerror or fault
        sentence = f"{what}: {fault.filename or 'while writing'}; nothing half-written was left"
    except (MemoryError, torch.OutOfMemoryError):
        sentence = MEMORY
    except RuntimeError as fault:
        # torch has no classes for these three
        if "can't allocate memory" in str(fault):
            sentence = MEMORY
        elif "DataLoader worker" in str(fault):
            sentence = f"a process that decodes images has died; {MEMORY}; Docker needs --shm-size"
        elif "Connection closed by peer" in str(fault):
            sentence = "another process of torchrun has ended; it says why"
        else:
            raise
    except KeyboardInterrupt:
        sentence = "interrupted; no half-written file was left"
    if rank or sentence.startswith("another process"):
        time.sleep(3)  # torchrun ends the others meanwhile: a sentence is printed once
    print(f"error: {' '.join(sentence.split())}", file=sys.stderr)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are Faults: one sentence, no usage block."""

    def error(self, message):
        raise Fault(f"{message} (--help lists the arguments)")

    def add_argument(self, *names, **options):
        default = options.get("default")
        if default and names[0] != "-h" and "default" not in options["help"]:
            options["help"] += " (default: %(default)s)"
        return super().add_argument(*names, **options)


def fraction(text):
    """'1/255' or '0.004' -> float >= 0."""
    above, _, below = text.partition("/")
    try:
        value = float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not 0 <= value < math.inf:
        wanted = "a finite number of at least 0, such as 1/255 or 0.004"
        raise argparse.ArgumentTypeError(f"expected {wanted}, found {text!r}")
    return value


def at_least(low, kind=int):
    """An argparse type: a number of at least `low`, below 2^31; for int a whole one."""

    def parse_number(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value < 2**31:
            wanted = f"a {'whole ' if kind is int else ''}number of at least {low}, below 2^31"
            raise argparse.ArgumentTypeError(f"expected {wanted}, found {text!r}")
        return value

    return parse_number


def add_arguments(parser):
    """The arguments that every program shares."""
    add = parser.add_argument
    names = ["embedded", "folder", *DATASETS]
    add("--dataset", default="embedded", choices=names, help="embedded: tiny/; folder: your images")
    add("--data-root", type=pathlib.Path, default=ROOT, help="folder of the data")
    add("--shots", type=at_least(1), default=16, help="training images per class")
    add("--classes", default="all", choices=["all", "base", "new"], help="CoOp's halves, or all")
    targets = ["new", "embedded", *DATASETS]
    transfer = "evaluate on these, too; `new` with --classes base gives H"
    add("--transfer", nargs="+", default=[], choices=targets, metavar="NAME", help=transfer)
    model = "tiny, an open_clip name, or local-dir:DIR; default tiny for embedded data, else"
    add("--model", help=f"{model} ViT-B-32-quickgelu")
    weights = "of a name: open_clip's tag, a checkpoint file, or none for random weights"
    add("--pretrained", default="openai", help=weights)
    eps = f"l_inf radius in pixels; default 1/255, and {round(255 * TINY_EPS)}/255 for tiny"
    add("--eps", type=fraction, help=f"{eps} (our choice)")
    add("--test-steps", type=at_least(1), default=100, help="PGD steps of the test attack")
    add("--test-limit", type=at_least(1), help="test on so many images, a fixed random choice")
    add("--split", default="test", choices=["test", "val"], help="val: for choosing arguments")
    add("--seed", type=at_least(0), default=1, help="of the few-shot draw and of the training")
    batch = "images of a training step; evaluation takes four times as many at once"
    add("--batch-size", type=at_least(1), default=32, help=batch)
    augment = "crop: RandomResizedCrop(0.5, 1) and flip (our choice: R-AMT's)"
    add("--augment", default="crop", choices=["crop", "none"], help=augment)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    dtype = "auto: bfloat16 where it is the faster, else float32"
    add("--dtype", default="auto", choices=dtypes, help=dtype)
    add("--out", type=pathlib.Path, default=pathlib.Path("runs"), help="folder of the results")
    add("--load", type=pathlib.Path, metavar="RUN", help="evaluate this run's adapter, no training")
    add("--export", type=pathlib.Path, metavar="DIR", help="write the merged model for open_clip")


def parse(parser, argv=None):
    """Parse, fill the defaults that depend on others, set seed and attention kernel.

    args.left_out names the arguments without a fixed default that were not given. Under torchrun it
    joins the process group as well. Raises Fault.
    """
    args = parser.parse_args(argv)
    args.left_out = [key for key, value in vars(args).items() if value is None]
    if args.model is None:
        args.model = "tiny" if args.dataset == "embedded" else "ViT-B-32-quickgelu"
    if args.eps is None:
        args.eps = TINY_EPS if args.model == "tiny" else 1 / 255
    if args.eps > 0.5:
        meant = f"did you mean {args.eps:g}/255?"
        raise Fault(f"--eps {args.eps:g} is more than half the range of a pixel, 0 to 1; {meant}")
    if "new" in args.transfer and args.classes != "base":
        raise Fault("--transfer new needs --classes base: train on one half, test on the other")
    sets = [args.dataset, *args.transfer]
    if len(set(sets)) < len(sets):
        named = f"--transfer {' '.join(args.transfer)}"
        raise Fault(f"{named} names a dataset twice, or --dataset {args.dataset}; name each once")
    if args.dataset == "folder":
        # every folder in --data-root is a class: nothing else may be put there
        for name in args.transfer:
            if name in DATASETS:
                raise Fault(f"--transfer {name} would need a --data-root of its own; leave it out")
        out = args.out.resolve()
        if args.data_root.resolve() in (out, *out.parents):
            wanted = "where every folder is a class; choose another"
            raise Fault(f"--out {args.out} lies in --data-root {args.data_root}, {wanted}")
    if args.dtype == "float16":
        raise Fault(f"--dtype float16 is refused: {HALF}")
    if "LOCAL_RANK" in os.environ and args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        kind = torch.device(args.device).type
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as fault:
        why = str(fault).splitlines()[0][:200]
        raise Fault(f"device {args.device!r} cannot be used ({why}); try --device cpu")
    if args.dtype == "auto":
        args.dtype = "bfloat16" if computes_in_bfloat16(kind) else "float32"
    # the flash kernel is slow backwards on short sequences on CPU; this switch governs it there too
    torch.backends.cuda.enable_flash_sdp(kind != "cpu")
    torch.manual_seed(args.seed)
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        if kind == "cuda":
            torch.cuda.set_device(args.device)
        backend = "nccl" if kind == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=datetime.timedelta(days=1))
    return args


def computes_in_bfloat16(kind):
    """Is a device of this kind, such as cpu, faster in bfloat16 than in float32?"""
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # AMX on x86, BF16 on ARM: as Linux lists them. With AVX-512's alone float32 is faster
    listed = pathlib.Path("/proc/cpuinfo")
    flags = listed.read_text().split() if kind == "cpu" and listed.exists() else []
    return not {"amx_bf16", "bf16"}.isdisjoint(flags)


# ------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------


class Item(NamedTuple):
    """One image: a path or a uint8 array, its label, its class name."""

    image: object
    label: int
    name: str


class Data(NamedTuple):
    """A dataset: class names by label, the prompt's template, three lists of Item."""

    classes: list
    template: str
    train: list
    val: list
    test: list


class Source(NamedTuple):
    """Where a published dataset lives.

    Its folder under the data root, the image folder in it, the file of the split, the md5 of the
    split's parsed content (empty: not checked), the prompt, and where the images come from: a class
    of torchvision that downloads them, or an address, files and their size.
    """

    folder: str
    images: str
    split: str
    md5: str
    template: str
    origin: str


# The splits of CoOp; public copies differ by a trailing newline, so their content is compared
SPLITS = (
    "https://raw.githubusercontent.com/linzhiqiu/cross_modal_adaptation/"
    "c7e7e68ae4eeadfab98e7886b2d6c9cf48a7ceb5/splits/"
)
PHOTO = "a photo of a {}."
DATASETS = {
    "caltech101": Source(
        folder="caltech-101",
        images="101_ObjectCategories",
        split="split_zhou_Caltech101.json",
        md5="06f9c268c38af55e10957bae4bcf47d8",
        template=PHOTO,
        origin="Caltech101",
    ),
    "dtd": Source(
        folder="dtd",
        images="images",
        split="split_zhou_DescribableTextures.json",
        md5="c2b3f429a5c72f41ba7dbe2c6fb8d9a9",
        template="{} texture.",
        origin="DTD",
    ),
    "eurosat": Source(
        folder="eurosat",
        images="2750",
        split="split_zhou_EuroSAT.json",
        md5="c3e7c2c2b11e4d6afe26aa9a5b3735be",
        template="a centered satellite photo of {}.",
        origin="EuroSAT",
    ),
    "fgvc_aircraft": Source(
        folder="fgvc_aircraft",
        images="images",
        split="images_variant_train.txt",
        md5="",
        template="a photo of a {}, a type of aircraft.",
        origin="FGVCAircraft",
    ),
    "food101": Source(
        folder="food-101",
        images="images",
        split="split_zhou_Food101.json",
        md5="",
        template="a photo of {}, a type of food.",
        origin="Food101",
    ),
    "imagenet": Source(
        folder="imagenet",
        images="images",
        split="classnames.txt",
        md5="",
        template=PHOTO,
        origin="https://image-net.org (ILSVRC2012, train and val as folders of wnids, 145 GB; "
        "for classnames.txt see CoOp's DATASETS.md)",
    ),
    "oxford_flowers": Source(
        folder="oxford_flowers",
        images="jpg",
        split="split_zhou_OxfordFlowers.json",
        md5="395a052b213500e75f4b8d0c5a85a465",
        template="a photo of a {}, a type of flower.",
        origin="Flowers102",
    ),
    "oxford_pets": Source(
        folder="oxford_pets",
        images="images",
        split="split_zhou_OxfordPets.json",
        md5="7cb3ea48a02575b316c5187147752e2f",
        template="a photo of a {}, a type of pet.",
        origin="OxfordIIITPet",
    ),
    "stanford_cars": Source(
        folder="stanford_cars",
        images="",
        split="split_zhou_StanfordCars.json",
        md5="8f798c281df9ff2ba29b1fbcff7d1d5b",
        template=PHOTO,
        origin="http://ai.stanford.edu/~jkrause/car196/ (cars_train.tgz and cars_test.tgz, "
        "16,185 images, 1.8 GB; often unreachable)",
    ),
    "sun397": Source(
        folder="sun397",
        images="SUN397",
        split="split_zhou_SUN397.json",
        md5="",
        template=PHOTO,
        origin="http://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz "
        "(108,754 images, 37 GB; often unreachable)",
    ),
    "tiny_imagenet": Source(
        folder="tiny-imagenet-200",
        images="",
        split="words.txt",
        md5="",
        template=PHOTO,
        origin="http://cs231n.stanford.edu/tiny-imagenet-200.zip (240 MB)",
    ),
    "ucf101": Source(
        folder="ucf101",
        images="UCF-101-midframes",
        split="split_zhou_UCF101.json",
        md5="bd5e8d4073fee6f8d2235aafaf4903a9",
        template="a photo of a person doing {}.",
        origin="UCF-101-midframes.zip, linked in CoOp's DATASETS.md, "
        "https://github.com/KaiyangZhou/CoOp (13,320 images)",
    ),
}
WNIDS = "imagenet", "tiny_imagenet"  # folders are named by WordNet
IMAGE_SUFFIXES = {
    ".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm",
}  # fmt: skip
PARTS = "train", "val", "test"
BICUBIC = v2.InterpolationMode.BICUBIC


def load_dataset(name, root):
    """The dataset `name` under `root`, downloaded where that is possible -> Data. Raises Fault."""
    if name == "embedded":
        return load_embedded()
    if name == "folder":
        return load_folder(root)
    return load_published(name, root)


def load_embedded():
    """tiny/fashion.npz: 16 train, 4 val, 20 test images a class of Fashion-MNIST, 28 x 28 grey."""
    arrays = np.load(HERE / "tiny" / "fashion.npz")
    names = [str(name) for name in arrays["classes"]]
    lists = []
    for part in PARTS:
        labels = arrays[f"{part}_y"].tolist()
        lists.append([Item(x, y, names[y]) for x, y in zip(arrays[f"{part}_x"], labels)])
    return Data(names, PHOTO, *lists)


def load_folder(root):
    """A sub-folder of images per class -> Data. Raises Fault.

    Names come from classnames.txt (a line per folder, in sorted order) or from the folders. Split
    like CoOp's random splits: per class, shuffled once with a fixed seed, 50 % train, 20 % val,
    30 % test, at least one of each.
    """
    if not root.is_dir():
        wanted = "expected one with a sub-folder of images per class"
        raise Fault(f"--data-root {root} is not a folder; {wanted}")
    folders = [p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")]
    folders.sort()
    if len(folders) < 2:
        raise Fault(f"{root} has {len(folders)} sub-folders; expected at least 2, one per class")
    parts = {"train", "training", "val", "valid", "validation", "test", "testing"}
    if parts.issuperset(folder.name.lower() for folder in folders):
        wanted = "expected one folder per class; give one of them as --data-root"
        raise Fault(f"{root} has the folders of a split, {folders[0].name} and so on; {wanted}")
    names = [folder.name.replace("_", " ") for folder in folders]
    listed = root / "classnames.txt"
    if listed.exists():
        names = [line.strip() for line in read_text(listed).split("\n") if line.strip()]
        if len(names) != len(folders):
            wanted = f"expected one line for each of the {len(folders)} sub-folders"
            raise Fault(f"{listed} names {len(names)} classes, {wanted}")
    train, val, test = [], [], []
    for label, folder in enumerate(folders):
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if len(files) < 3:
            wanted = "expected at least 3, for train, val and test"
            raise Fault(f"{folder} has too few images, {len(files)}; {wanted}")
        random.Random(0).shuffle(files)
        items = [Item(file, label, names[label]) for file in files]
        n_val = max(1, round(0.2 * len(files)))
        n_test = max(1, round(0.3 * len(files)))
        val += items[:n_val]
        test += items[n_val : n_val + n_test]
        train += items[n_val + n_test :]
    return Data(names, PHOTO, train, val, test)


def read_text(path):
    """The text of a file in UTF-8. Raises Fault where it is not."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as fault:
        raise Fault(f"{path} is not text in UTF-8 ({fault.reason}); save it as UTF-8")


def load_published(name, root):
    """A dataset in CoOp's layout, with its published split, whose content is checked -> Data."""
    source = DATASETS[name]
    folder = root / source.folder
    images = folder / source.images
    if not any(path.suffix not in (".json", ".txt") for path in images.glob("*")):
        download_images(source, root)
    split = folder / source.split
    if split.suffix == ".json" and not split.exists():
        fetch(SPLITS + source.split, split)
    try:
        if name == "fgvc_aircraft":
            parsed = read_aircraft(folder)
        elif name in WNIDS:
            parsed = read_wnids(images, split)
        else:
            # CoOp's file: {"train": [[path, label, class name], ...], "val": ..., "test": ...}
            parsed = json.loads(split.read_text())
        lists = []
        for part in PARTS:
            lists.append([Item(images / path, label, word) for path, label, word in parsed[part]])
    except (OSError, ValueError, KeyError, TypeError) as fault:
        kind = "is not JSON" if isinstance(fault, json.JSONDecodeError) else "cannot be read"
        why = f"{type(fault).__name__}: {fault}"
        todo = "delete it, and the next run fetches it again"
        if split.suffix != ".json":
            todo = f"it comes from {source.origin}"
        raise Fault(f"{split} {kind} ({why}); {todo}")
    if not all(lists):
        raise Fault(f"{images} lacks images of train, val or test; they come from {source.origin}")
    md5 = hashlib.md5(json.dumps(parsed, sort_keys=True).encode()).hexdigest()
    if source.md5 and md5 != source.md5:
        found = f"content {md5}, expected {source.md5}"
        raise Fault(f"{split} is not the published split ({found}); delete it: it is fetched again")
    names = {item.label: item.name for item in lists[0]}
    labels = {item.label for items in lists for item in items}
    if labels != set(names) or labels != set(range(len(names))):
        raise Fault(f"{images} lacks training images of a class; they come from {source.origin}")
    classes = [names[label].replace("_", " ") for label in sorted(names)]
    return Data(classes, source.template, *lists)


def read_aircraft(folder):
    """FGVC-Aircraft's own lists: a line is `<image> <variant>`; labels are variants.txt's lines."""
    names = (folder / "variants.txt").read_text().split("\n")
    parsed = {}
    for part in PARTS:
        parsed[part] = []
        for line in (folder / f"images_variant_{part}.txt").read_text().strip().split("\n"):
            image, name = line.split(" ", 1)
            parsed[part].append([f"{image}.jpg", names.index(name), name])
    return parsed


def read_wnids(images, words):
    """ImageNet and Tiny ImageNet: train/<wnid>/..., labels are the sorted wnids.

    The published test set is val, which is both here, as in CoOp.
    """
    names = {}
    for line in words.read_text().strip().split("\n"):
        wnid, name = line.replace("\t", " ").split(" ", 1)
        names[wnid] = name.split(",")[0]
    wnids = sorted(path.name for path in (images / "train").iterdir() if path.is_dir())
    train, val = [], []
    for label, wnid in enumerate(wnids):
        for path in sorted((images / "train" / wnid).rglob("*.JPEG")):
            train.append([str(path.relative_to(images)), label, names[wnid]])
        for path in sorted((images / "val" / wnid).glob("*.JPEG")):
            val.append([str(path.relative_to(images)), label, names[wnid]])
    notes = images / "val" / "val_annotations.txt"
    if notes.exists():  # Tiny ImageNet keeps all images of val in one folder
        for line in notes.read_text().strip().split("\n"):
            file, wnid = line.split("\t")[:2]
            if wnid not in wnids:
                raise Fault(f"{images / 'train' / wnid} is missing; is the dataset complete?")
            val.append([f"val/images/{file}", wnids.index(wnid), names[wnid]])
    return {"train": train, "val": val, "test": val}


def fetch(url, path):
    """Download a small file, whole or not at all. Raises Fault: the address, the file to put."""
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            content = answer.read()
    except (OSError, http.client.HTTPException) as fault:
        raise Fault(f"could not download {url} ({fault}); put the file at {path} by hand")
    write(path, content)


def download_images(source, root):
    """Let torchvision download and unpack into a temporary folder, then move to CoOp's place."""
    target = root / source.folder / source.images
    by_hand = "put the images there by hand, or set --data-root"
    if not source.origin.isalnum():
        raise Fault(f"{target} is missing; get {source.origin}, and {by_hand}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix="download-") as scratch:
        try:
            with contextlib.suppress(ImportError):  # Flowers102 wants scipy, for unused labels
                getattr(torchvision.datasets, source.origin)(scratch, download=True)
        except (OSError, http.client.HTTPException, RuntimeError, ValueError, EOFError) as fault:
            if getattr(fault, "errno", None) == errno.ENOSPC:
                raise
            origin = f"torchvision.datasets.{source.origin}"
            raise Fault(f"{target} is missing, and {origin} failed ({fault}); {by_hand}")
        found = [p for p in sorted(pathlib.Path(scratch).rglob(source.images)) if p.is_dir()]
        if not found:
            raise Fault(f"torchvision's download holds no folder {source.images}; {by_hand}")
        for path in (*found[0].parent.glob("*.txt"), found[0]):
            os.replace(path, target.parent / path.name)


def few_shot(train, val, k, seed):
    """CoOp's k-shot draw -> (k items a class of train, min(k, 4) a class of val).

    Equal to the published index files, order included: one generator, classes in order of first
    appearance, train before val. A class with fewer items gives all it has.
    """
    generator = random.Random(seed)
    drawn = []
    for items, n in ((train, k), (val, min(k, 4))):
        groups = {}
        for item in items:
            groups.setdefault(item[1], []).append(item)
        chosen = []
        for group in groups.values():
            chosen += generator.sample(group, n) if len(group) >= n else group
        drawn.append(chosen)
    return drawn[0], drawn[1]


def half(data, part):
    """CoOp's base (the first ceil(n/2) labels) or new classes, relabelled from 0; all: `data`."""
    if part == "all":
        return data
    n = len(data.classes)
    middle = math.ceil(n / 2)
    keep = range(middle) if part == "base" else range(middle, n)
    lists = []
    for items in (data.train, data.val, data.test):
        mine = [item for item in items if item.label in keep]
        lists.append([item._replace(label=item.label - keep.start) for item in mine])
    return Data([data.classes[label] for label in keep], data.template, *lists)


def read_image(item):
    """-> a PIL image in RGB. Raises Fault where it is missing or broken."""
    try:
        if isinstance(item.image, np.ndarray):
            return Image.fromarray(item.image).convert("RGB")
        picture = Image.open(item.image)
        if picture.mode.startswith(("I", "F")):  # PIL would make nearly all of it white
            raise ValueError("it has more than 8 bits a channel")
        return picture.convert("RGB")
    except FileNotFoundError:
        raise Fault(f"image {item.image} is missing, but listed; is the dataset complete?")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as fault:
        raise Fault(f"image {item.image} cannot be read ({fault}); replace or remove it")


def test_view(size):
    """CLIP's view of a test image: the short side to `size`, the square in the middle; uint8."""
    shrink = v2.Resize(size, BICUBIC)
    return v2.Compose([shrink, v2.CenterCrop(size), v2.PILToTensor()])


class TestImages(Dataset):
    """CLIP's test view of items, decoded when asked for: ((3, size, size) uint8, label)."""

    __test__ = False  # not pytest's

    def __init__(self, items, size):
        self.items = items
        self.view = test_view(size)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.view(read_image(self.items[i])), self.items[i].label


def decode(items, size, augment="crop"):
    """Decode training images once -> [((3, h, w) uint8, label), ...].

    augment: crop leaves the short side a quarter longer than `size`, room for random crops; none
    takes CLIP's test view.
    """
    shrink = test_view(size)
    if augment == "crop":
        longer = v2.Resize(round(1.25 * size), BICUBIC)
        shrink = v2.Compose([longer, v2.PILToTensor()])
    with concurrent.futures.ThreadPoolExecutor() as pool:
        pictures = list(pool.map(lambda item: shrink(read_image(item)), items))
    return list(zip(pictures, [item.label for item in items]))


def batches(images, size, batch_size, steps, augment="crop", device="cpu"):
    """Training batches of [((3, h, w) uint8, label), ...], reshuffled every epoch.

    Yields `steps` times x (b, 3, size, size) in [0, 1], y (b,). augment: crop, that is
    RandomResizedCrop(0.5, 1) and flip, or none; as the images were decoded.
    """
    view = v2.Identity()
    if augment == "crop":
        crop = v2.RandomResizedCrop(size, (0.5, 1.0), interpolation=BICUBIC)
        view = v2.Compose([crop, v2.RandomHorizontalFlip()])
    batch_size = min(batch_size, len(images))
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(images))])
        picks, order = order[:batch_size], order[batch_size:]
        x = torch.stack([view(images[i][0]) for i in picks]) / 255
        y = torch.tensor([images[i][1] for i in picks])
        yield x.to(device), y.to(device)


# ------------------------------------------------------------------------------------------------
# CLIP
# ------------------------------------------------------------------------------------------------

# zero-shot PGD accuracy of the small CLIP falls below 10 % on both its test sets (our choice)
TINY_EPS = 3 / 255


def load_clip(model, pretrained="openai", device="cpu"):
    """-> an open_clip model in eval mode, frozen; its configuration. Raises Fault.

    The configuration holds model_cfg and preprocess_cfg, as an exported folder does.
    """
    if model == "tiny":
        clip, config = load_tiny()
    else:
        clip, config = load_open_clip(model, pretrained)
    text = config["model_cfg"]["text_cfg"]
    own_words = "hf_tokenizer_name" in text or text.get("vocab_size", 49408) != 49408
    if not hasattr(clip.visual, "transformer") or own_words:
        wanted = "expected a ViT such as ViT-B-32-quickgelu"
        raise Fault(f"{model} has no vision transformer, or not CLIP's tokenizer; {wanted}")
    if (config["preprocess_cfg"].get("resize_mode") or "shortest") != "shortest":
        raise Fault(f"{model} squashes images into a square; expected one that cuts its square out")
    return clip.eval().requires_grad_(False).to(device), config


def load_tiny():
    """The small CLIP in tiny/. Token embeddings that its training never used are zero."""
    config = json.loads((HERE / "tiny" / "open_clip_config.json").read_text())
    clip = open_clip.CLIP(**config["model_cfg"])
    state = safetensors.torch.load_file(HERE / "tiny" / "weights.safetensors")
    rows = state.pop("token_embedding.rows").long()
    used = state.pop("token_embedding.weight").float()
    state["token_embedding.weight"] = torch.zeros_like(clip.token_embedding.weight)
    state["token_embedding.weight"][rows] = used
    clip.load_state_dict(state)
    size = config["model_cfg"]["vision_cfg"]["image_size"]
    open_clip.model.set_model_preprocess_cfg(clip, {"size": size, **config["preprocess_cfg"]})
    return clip, config


def load_open_clip(model, pretrained):
    """A model of open_clip, by name or from a folder -> model, configuration. Raises Fault."""
    known = open_clip.list_models()
    local = model.startswith("local-dir:")
    if model not in known and not local:
        wanted = "tiny, local-dir:DIR or one of open_clip's, such as ViT-B-32-quickgelu"
        raise Fault(f"unknown model {model!r}; expected {wanted}")
    if pretrained == "openai" and f"{model}-quickgelu" in known:
        better = f"use --model {model}-quickgelu"
        raise Fault(f"{model} would run OpenAI's weights with another activation; {better}")
    tag = None if pretrained == "none" or local else pretrained
    logging.disable(logging.CRITICAL)  # open_clip logs what it raises as well
    try:
        needed = pretrained != "none"  # else random weights, which open_clip only logs
        clip = open_clip.create_model(model, pretrained=tag, require_pretrained=needed)
    except Exception as fault:  # open_clip raises whatever its downloaders raise
        why = f"{type(fault).__name__}: {str(fault)[:200]}"
        instead = "without a network, give --pretrained a checkpoint file, or use --model tiny"
        if local:
            instead = "expected a folder that --export wrote"
        raise Fault(f"could not load {model} with weights {tag!r} ({why}); {instead}")
    finally:
        logging.disable(logging.NOTSET)
    preprocess = open_clip.model.get_model_preprocess_cfg(clip)
    return clip, {"model_cfg": open_clip.get_model_config(model), "preprocess_cfg": preprocess}


class PatchEmbedding(nn.Module):
    """A convolution whose kernel is its stride, as a matrix product in float32.

    pixels (b, 3, h, w) -> (b, d, h/p, w/p); `weight` (d, 3, p, p) is the convolution's own. Under
    autocast a convolution would round the pixels to bfloat16, by about as much as an attack moves
    them: 5 points of false robustness at 1/255. Backwards, the product is several times as fast.
    """

    def __init__(self, convolution):
        super().__init__()
        if convolution.kernel_size != convolution.stride or convolution.bias is not None:
            raise ValueError("expected a convolution without a bias whose kernel is its stride")
        self.weight = convolution.weight

    def forward(self, x):
        b, channels, h, w = x.shape
        d, _, p, _ = self.weight.shape
        with torch.autocast(x.device.type, enabled=False):
            patches = x.float().reshape(b, channels, h // p, p, w // p, p)
            patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, channels * p * p)
            z = patches @ self.weight.flatten(1).T  # (b, patches, d)
            return z.transpose(1, 2).reshape(b, d, h // p, w // p)


class Classifier(nn.Module):
    """Zero-shot CLIP as a plain network: pixels (b, 3, h, w) in [0, 1] -> logits (b, classes).

    f(x) = s <z/|z|, t_c/|t_c|>, s the logit scale. Text features are computed once, by set_classes.
    With dtype bfloat16 the image tower runs under autocast, except the patch embedding. Raises
    ValueError for float16.
    """

    def __init__(self, clip, config, classes, template=PHOTO, dtype="float32"):
        super().__init__()
        if dtype == "float16":
            raise ValueError(HALF)
        self.clip = clip
        self.config = config
        self.dtype = getattr(torch, dtype)
        self.scale = clip.logit_scale.exp().item()
        preprocess = clip.visual.preprocess_cfg
        self.size = int(np.max(preprocess["size"]))  # a number, or the same number twice
        for key in ("mean", "std"):
            values = torch.tensor(preprocess[key], device=clip.logit_scale.device)
            self.register_buffer(key, values[:, None, None])
        if not isinstance(clip.visual.conv1, PatchEmbedding):
            clip.visual.conv1 = PatchEmbedding(clip.visual.conv1)
        tokens_first(clip.visual.transformer)
        self.eval()
        self.set_classes(classes, template)

    def set_classes(self, classes, template):
        """Classify among these from now on."""
        self.classes = list(classes)
        self.template = template
        tokens = tokenizer_of(self.config)([template.format(name) for name in classes])
        self.register_buffer("tokens", tokens.to(self.mean.device))
        with torch.no_grad():
            self.register_buffer("text", self.encode_classes())

    def encode_classes(self):
        """t_c / |t_c| of every class's prompt   (classes, d)"""
        return torch.cat([encode_text(self.clip, part) for part in self.tokens.split(256)])

    def forward(self, x):
        low = torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32)
        # cached: attention asks for its weight several times; a parametrised one is computed once
        with low, parametrize.cached():
            z = self.clip.encode_image((x - self.mean) / self.std)  # (b, d)
        return self.scale * F.normalize(z.float(), dim=-1) @ self.text.T


def encode_text(clip, tokens):
    """tokens (m, context_length) -> t / |t| of every text   (m, d)

    The text tower is causal: what stands behind the longest text's end changes nothing, so it is
    left out: for Caltech101's classes 67 of 77 tokens.
    """
    if getattr(clip, "attn_mask", None) is None:  # not open_clip.CLIP itself
        return clip.encode_text(tokens, normalize=True)
    n = int(tokens.argmax(1).max()) + 1  # the end token has the highest number
    shorter = {
        "positional_embedding": clip.positional_embedding[:n],
        "attn_mask": clip.attn_mask[:n, :n],
    }
    return torch.func.functional_call(clip, shorter, kwargs={"text": tokens[:, :n]})[1]


def tokens_first(transformer):
    """Run (tokens, b, d) through the blocks: open_clip's (b, tokens, d) is slow on CPUs."""
    if isinstance(transformer.resblocks[0].attn, nn.MultiheadAttention):
        transformer.batch_first = False
        for block in transformer.resblocks:
            block.attn.batch_first = False


def tokenizer_of(config):
    """The tokenizer of a CLIP's configuration; its context_length is how many tokens are read."""
    length = config["model_cfg"]["text_cfg"].get("context_length", 77)
    return open_clip.tokenizer.SimpleTokenizer(context_length=length)


def check_names(classes, template, config):
    """Print a warning where two classes share a name, or a prompt does not fit the text tower."""
    tokenizer = tokenizer_of(config)
    length = tokenizer.context_length
    seen = set()
    for name in classes:
        if name in seen:
            print(f"WARNING: two classes are called {name!r}: they cannot be told apart")
        seen.add(name)
        needed = len(tokenizer.encode(template.format(name))) + 2  # start and end token
        if needed > length:
            print(f"WARNING: of the {needed} tokens of {name!r}'s prompt only {length} are read")


def prepare(args):
    """Load what the arguments name -> classifier, training images, test sets.

    The training images are as `decode` gives them. The test sets are {name: (Data, TestImages)}:
    that of --dataset first, then those that --transfer adds.
    """
    rank, world = processes()
    if rank:  # process 0 loads first, and downloads
        torch.distributed.barrier()
    whole = load_dataset(args.dataset, args.data_root)
    if args.dataset == "embedded" and not args.transfer and args.data_root != ROOT:
        own = "for images of your own add --dataset folder"
        print(f"note: the embedded data need no --data-root; {own}")
    # drawn on all classes, then halved, as in CoOp
    shots, _ = few_shot(whole.train, whole.val, args.shots, args.seed)
    chosen = {args.dataset: half(whole._replace(train=shots), args.classes)}
    for name in args.transfer:
        chosen[name] = half(whole, "new") if name == "new" else load_dataset(name, args.data_root)
    for data in chosen.values():
        if len(data.classes) < 2:
            wanted = "expected at least 4, so that each half has 2 to tell apart"
            raise Fault(f"{args.dataset} has {len(whole.classes)} classes, too few; {wanted}")
    clip, config = load_clip(args.model, args.pretrained, args.device)
    data = chosen[args.dataset]
    classifier = Classifier(clip, config, data.classes, data.template, args.dtype)
    if world > 1 and not rank:
        torch.distributed.barrier()
    if args.split == "val" and args.dataset in WNIDS:
        print(f"WARNING: val is the test set of {args.dataset}: choose no argument by it")
    # with --load nothing is trained
    train = decode([] if args.load else data.train, classifier.size, args.augment)
    tests = {}
    for name, data in chosen.items():
        check_names(data.classes, data.template, config)
        tests[name] = data, test_images(data, args, classifier.size)
    print(
        f"{args.model} on {args.dataset}: {len(classifier.classes)} classes, {len(train)} training "
        f"images, {classifier.size} px, eps {255 * args.eps:g}/255, {args.dtype} on {args.device}"
    )
    for name, (data, images) in tests.items():
        print(f"{args.split} set {name}: {len(data.classes)} classes, {len(images)} images")
    return classifier, train, tests


def test_images(data, args, size):
    """The images that --split and --test-limit choose, as TestImages."""
    items = data.test if args.split == "test" else data.val
    if args.test_limit:
        items = random.Random(0).sample(items, min(args.test_limit, len(items)))
    return TestImages(items, size)


def measure(classifier, tests, args):
    """Evaluate the classifier on every test set of `prepare` -> the result on the first.

    Those of the others are under its key "transfer", by name; with the base classes' and `new`
    there is "H" = 4 / (1/bc + 1/ba + 1/nc + 1/na) as well, 0 if one of the four is.
    """
    results = {}
    for name, (data, images) in reversed(tests.items()):  # the training classes come last, and stay
        # anew, as training may have changed the text tower
        classifier.set_classes(data.classes, data.template)
        workers = min(max(1, (os.cpu_count() or 1) // 2), len(images) // 500)
        quiet = True if processes()[0] else None  # None: where stderr is no terminal
        with tqdm(total=len(images), desc=name, unit="image", disable=quiet, leave=False) as bar:

            def progress(done, robust):
                bar.set_postfix_str(f"PGD-{args.test_steps} {100 * robust / done:.1f} %")
                bar.update(done - bar.n)

            results[name] = evaluate(
                classifier,
                images,
                args.eps,
                args.test_steps,
                batch_size=4 * args.batch_size,
                workers=workers,
                progress=progress,
            )
    result = results[args.dataset]
    others = {name: results[name] for name in tests if name != args.dataset}
    if others:
        result["transfer"] = others
    if "new" in others:
        new = results["new"]
        four = [result["clean"], result["pgd"], new["clean"], new["pgd"]]
        result["H"] = statistics.harmonic_mean(four)
    return result


# ------------------------------------------------------------------------------------------------
# Robust evaluation: needs torch alone
# ------------------------------------------------------------------------------------------------

HALF = "small gradients become zero in float16, and the attack looks weak; use float32 or bfloat16"


def evaluate(
    classifier, images, eps, steps=100, step=1 / 255, batch_size=128, workers=0, progress=None
):
    """Clean accuracy and accuracy under PGD at the best iterate: lost once any iterate breaks it.

    classifier: a module in eval mode from pixels to logits, with weights. images: a Dataset of
    (pixels (3, h, w), uint8 or float in [0, 1], label), decoded by `workers` processes while the
    attack runs. eps and step in pixels. progress(done, robust) is called after every batch. Where
    torch.distributed runs, every process attacks its share of the images with process 0's weights.
    Raises ValueError for float16 weights and for pixels outside [0, 1], FloatingPointError for a
    gradient that is not finite.

    -> dict: clean, noise (the attack's random start alone) and pgd in %; intervals (95 %, of each);
    zero_gradient (share of the attacked images whose first gradient is 0); flags (sentences, each a
    reason not to believe these numbers); outcomes (a digit per image: 0 wrong, 1 right until it is
    attacked, 2 right under attack too).
    """
    if any(p.dtype == torch.float16 for p in classifier.parameters()):
        raise ValueError(f"the classifier has float16 weights: {HALF}")
    rank, world = processes()
    if world > 1:
        for tensor in [*classifier.parameters(), *classifier.buffers()]:
            torch.distributed.broadcast(tensor.data, 0)
    device = next(classifier.parameters()).device
    mine = range(rank, len(images), world)
    # a generator of its own: the loader must not advance the global one, which the training uses
    own = torch.Generator()
    loader = DataLoader(Subset(images, mine), batch_size, num_workers=workers, generator=own)

    rows = [torch.zeros(0, 6)]
    done, robust_so_far = 0, 0
    for pixels, y in loader:
        x, y = as_float(pixels).to(device), y.to(device)
        if x.min() < 0 or x.max() > 1:
            raise ValueError(f"pixels range from {x.min():.2f} to {x.max():.2f}, expected 0 to 1")
        start = random_start(x, mine[done : done + len(y)], eps)
        with torch.no_grad():
            clean = classifier(x).argmax(1) == y
            noise = classifier(x + start).argmax(1) == y
        # an image that is wrong already is broken: only the others are attacked
        left = clean & noise
        outcome = attack(classifier, x[left], y[left], start[left], eps, step, steps)
        row = torch.zeros(len(y), 6, device=device)
        row[:, 0], row[:, 1] = clean, noise
        row[left, 2:] = torch.stack([part.float() for part in outcome], 1)
        rows.append(row.cpu())
        done += len(y)
        robust_so_far += int(row[:, 2].sum())
        if progress:
            progress(done, robust_so_far)

    clean, noise, robust, zero, early, late = gather(torch.cat(rows), len(images)).T
    accuracies = {"clean": clean, "noise": noise, "pgd": robust}
    by_noise = int((clean * (1 - noise)).sum())
    attacked = int((clean * noise).sum())
    by_attack = attacked - int(robust.sum())
    flags = []
    if any(module.training for module in classifier.modules()):
        flags.append("the model is in train mode")
    if zero.sum() > 0.01 * attacked:
        share = 100 * zero.sum() / attacked
        flags.append(f"the first gradient is zero on {share:.1f} % of the images: it may be masked")
    if by_noise > by_attack + 0.01 * len(images):
        flags.append(f"random noise breaks {by_noise} images, the attack only {by_attack} more")
    if (late * robust).sum() < 0.8 * (early * robust).sum():
        flags.append("more steps of the attack help the defender: the loss falls again")
    flags += sanity(classifier, images, eps, robust)
    return {
        **{name: 100 * right.double().mean().item() for name, right in accuracies.items()},
        "intervals": {name: interval(right) for name, right in accuracies.items()},
        "zero_gradient": (zero.sum() / max(1, attacked)).item(),
        "flags": flags,
        "outcomes": "".join(str(int(c + r)) for c, r in zip(clean, robust)),
    }


def attack(net, x, y, start, eps, step, steps):
    """PGD (Madry et al. 2018) on images x (b, 3, h, w) from x + start; what breaks leaves at once.

    delta <- clip(delta + step sign(grad CE), -eps, eps), x + delta clipped to [0, 1]. -> four
    tensors (b,): right at every iterate, first gradient exactly zero, CE after a quarter of the
    steps and at the end (of the images that got so far). The gradient is towards delta alone.
    """
    b, device = len(y), x.device
    right = torch.ones(b, dtype=torch.bool, device=device)
    zero = torch.zeros(b, dtype=torch.bool, device=device)
    early, late = torch.zeros(2, b, device=device)
    left = torch.arange(b, device=device)  # the images that no iterate has broken yet
    delta = start
    for t in range(steps + 1):
        if not len(left):
            break
        logits = net(x + delta.requires_grad_())
        losses = F.cross_entropy(logits, y, reduction="none")
        # the sum, not the mean: one image's gradient must not depend on the others
        (grad,) = torch.autograd.grad(losses.sum(), delta)
        if not torch.isfinite(grad).all():
            raise FloatingPointError("the gradient of the attack is not finite")
        if t == 0:
            zero = (grad.flatten(1) == 0).all(1)
        if t == steps // 4:
            early[left] = losses.detach().float()
        if t == steps:
            late[left] = losses.detach().float()
        keep = logits.argmax(1) == y
        right[left[~keep]] = False
        left, x, y = left[keep], x[keep], y[keep]
        delta = delta.detach()[keep] + step * grad[keep].sign()
        delta = (x + delta.clamp(-eps, eps)).clamp(0, 1) - x
        if len(left):
            inside = delta.abs().max() <= eps + 1e-6
            assert inside and 0 <= (x + delta).min() and (x + delta).max() <= 1, "left the ball"
    return right, zero, early, late


def random_start(x, indices, eps):
    """delta_0 ~ U(-eps, eps), x + delta_0 in [0, 1], for images x (b, 3, h, w) of these indices.

    A start belongs to its image: outcomes depend neither on the batch nor on the processes.
    """
    noise = torch.empty(x.shape)
    for row, i in zip(noise, indices):
        row.uniform_(-eps, eps, generator=torch.Generator().manual_seed(i))
    return (x + noise.to(x)).clamp(0, 1) - x


def sanity(net, images, eps, robust, n=64):
    """Is the attack to be believed? Cheap checks on the first n images -> sentences.

    robust (images,): which of them withstood it. Those must fall in a huge ball, and must not fall
    to a few dozen random guesses; a gradient must predict the loss; a model must repeat itself.
    """
    device, n = next(net.parameters()).device, min(n, len(images))
    loader = DataLoader(Subset(images, range(n)), n, generator=torch.Generator())
    pixels, labels = next(iter(loader))
    x, y = as_float(pixels).to(device), labels.to(device)
    survived = (robust[:n] > 0).to(device)
    flags = []

    with torch.no_grad():
        first, second = net(x), net(x)
    if (first - second).abs().max() > 1e-3 * first.abs().max():
        flags.append("the model answers differently when asked twice: it is random")

    # a gradient g that is right predicts the loss: (L(x + h sign g) - L(x - h sign g)) / 2h = |g|_1
    x.requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(net(x), y, reduction="sum"), x)
    x, h = x.detach(), 0.25 / 255
    with torch.no_grad():
        up = F.cross_entropy(net(x + h * grad.sign()), y, reduction="sum")
        down = F.cross_entropy(net(x - h * grad.sign()), y, reduction="sum")
    slope, promised = ((up - down) / (2 * h)).item(), grad.abs().sum().item()
    if promised > 0 and not 0.5 < slope / promised < 2:
        flags.append(f"the gradient promises a slope of {promised:.3g}, the loss has {slope:.3g}")

    x, y = x[survived], y[survived]
    if len(y):
        huge = random_start(x, range(len(y)), 0.25)
        withstood = attack(net, x, y, huge, 0.25, 0.25 / 4, 20)[0].sum()
        if withstood > 0.05 * n:
            flags.append(f"{withstood} of {n} images withstand a ball of radius 0.25")
        guessed = (~random_search(net, x, y, eps)).sum()
        if guessed > 0.05 * n:
            flags.append(f"random guesses break {guessed} of {n} images that the attack does not")
    return flags


def random_search(net, x, y, eps, queries=50):
    """A black-box attack, after Square (Andriushchenko et al. 2020) -> right (b,) all along.

    Random squares are filled with random corners of the ball; what lowers the margin is kept.
    """
    generator = torch.Generator().manual_seed(0)
    delta = torch.zeros_like(x)
    best = torch.full((len(y),), math.inf, device=x.device)
    height, width = x.shape[-2:]
    for query in range(queries):
        parts = 1 if query < 5 else 4
        side = max(1, min(height, width) // parts)
        row = int(torch.randint(height - side + 1, (1,), generator=generator))
        column = int(torch.randint(width - side + 1, (1,), generator=generator))
        signs = 2 * torch.randint(2, (len(y), 3, 1, side), generator=generator) - 1
        tried = delta.clone()
        tried[:, :, row : row + side, column : column + side] = eps * signs.to(x)
        with torch.no_grad():
            logits = net((x + tried).clamp(0, 1))
        own = logits.gather(1, y[:, None])[:, 0]
        margin = own - logits.scatter(1, y[:, None], -math.inf).max(1).values
        delta = torch.where((margin < best)[:, None, None, None], tried, delta)
        best = torch.minimum(margin, best)
    return best > 0


def as_float(pixels):
    """uint8 or float pixels -> float in [0, 1]."""
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels


def interval(right):
    """Wilson's 95 % interval of the share of ones among right (n,), in % -> [low, high]."""
    n, p, z = len(right), right.double().mean().item(), 1.96
    middle = p + z**2 / (2 * n)
    half_width = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low = (middle - half_width) / (1 + z**2 / n)
    high = (middle + half_width) / (1 + z**2 / n)
    return [round(100 * max(0, low), 2), round(100 * min(1, high), 2)]


def processes():
    """-> which process this is, of how many: (0, 1) unless torch.distributed runs."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def gather(rows, n):
    """Rows (share, k) of every process, which has each world-th image -> rows (n, k) of all."""
    _, world = processes()
    if world == 1:
        return rows
    shares = [None] * world
    torch.distributed.all_gather_object(shares, rows)
    everything = torch.empty(n, rows.shape[1], dtype=rows.dtype)
    for rank, share in enumerate(shares):
        everything[rank::world] = share
    return everything


def print_table(rows, steps):
    """Print rows of (name, result of evaluate, or None), their 95 % intervals, and every flag."""
    results = []
    for name, result in rows:
        if result:
            results.append((name, result))
            for other, transferred in result.get("transfer", {}).items():
                results.append((f"{name} on {other}", transferred))
    width = max(12, *(len(name) for name, _ in results))
    print(f"\n{'':{width}} | {'clean':>6} (95 % interval) | {f'PGD-{steps}':>8} (95 % interval)")
    for name, result in results:
        cells = [f"{name:{width}}"]
        for key, size in (("clean", 6), ("pgd", 8)):
            low, high = result["intervals"][key]
            cells.append(f"{result[key]:{size}.2f} ({low:5.1f} to {high:5.1f})")
        print(" | ".join(cells))
    for name, result in results:
        if "H" in result:
            print(f"{name}: H {result['H']:.2f}, the harmonic mean of clean and PGD, base and new")
        for flag in result["flags"]:
            print(f"WARNING ({name}): {flag}")


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------


def write(path, content):
    """Write bytes under a temporary name beside `path`, then rename: the file is whole or absent.

    Under torchrun only process 0 writes.
    """
    if processes()[0]:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def run_folder(args, method):
    """A new folder <out>/<method>-<dataset>-<model>-<shots>shot-seed<seed>, -2, -3, ...

    What cannot be written fails now, before the training. A folder that stays empty goes at exit.
    """
    model = re.sub(r"[^\w.-]+", "-", args.model.removeprefix("local-dir:")).strip("-")
    name = f"{method}-{args.dataset}-{model}-{args.shots}shot-seed{args.seed}"
    if args.load:
        name += "-loaded"
    try:
        folder, n = args.out / name, 1
        while folder.exists():
            n += 1
            folder = args.out / f"{name}-{n}"
        if not processes()[0]:
            folder.mkdir(parents=True)
            tempfile.TemporaryFile(dir=folder).close()
            atexit.register(remove_if_empty, folder)
    except OSError as fault:
        why = fault.strerror
        raise Fault(f"cannot write to {args.out / name} ({why}); choose another folder with --out")
    check_new(args.export)  # after the folder is made, which may lie in it
    return folder


def remove_if_empty(folder):
    """Remove a folder that holds nothing; leave any other."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def describe(args, method):
    """What makes a run repeatable: arguments except this machine's folders, versions, commit."""
    facts = {"method": method}
    for key, value in vars(args).items():
        if key not in ("data_root", "out", "load", "export"):
            facts[key] = value
    facts["versions"] = {m.__name__: m.__version__ for m in (torch, torchvision, open_clip)}
    facts["commit"] = ""
    with contextlib.suppress(OSError):
        facts["commit"] = git("describe", "--always", "--abbrev=12")
        # lines of results, which finished runs add, are no change of the code
        if git("diff", "HEAD", "--name-only", "--", ".", ":!*.jsonl"):
            facts["commit"] += "-dirty"
    return facts


def git(*words):
    """What git prints about this repository; nothing where it fails. Raises OSError without git."""
    command = ["git", "-C", str(HERE), *words]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def save_adapter(folder, tensors, classifier, args, method):
    """<folder>/adapter.safetensors: the tensors, and as metadata what `describe` tells, the class
    names and the template: all that `load_adapter` and `adapted_classifier` need."""
    facts = {key: str(value) for key, value in describe(args, method).items()}
    facts["names"] = json.dumps(classifier.classes)
    facts["template"] = classifier.template
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    write(folder / "adapter.safetensors", safetensors.torch.save(tensors, facts))


def load_adapter(path, method, needs):
    """-> tensors, metadata of an adapter file, or of the one in a run's folder. Raises Fault.

    method: who must have made it, None for anyone. needs: the method's own keys that the metadata
    must have.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = path / "adapter.safetensors"
    try:
        with safetensors.safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            facts = file.metadata() or {}
    except FileNotFoundError:
        wanted = "expected an adapter.safetensors or the folder of a run"
        raise Fault(f"adapter {path} does not exist; {wanted}")
    except Exception as fault:  # safetensors has one error class for every broken header
        raise Fault(f"adapter {path} cannot be read ({fault})")
    if method and facts.get("method", method) != method:
        raise Fault(f"adapter {path} was made by {facts['method']}, but this is {method}")
    missing = {"method", "model", "pretrained", "names", "template", *needs} - set(facts)
    if missing:
        wanted = "expected a file that this program saved"
        raise Fault(f"adapter {path} does not say its {', '.join(sorted(missing))}; {wanted}")
    return tensors, facts


def check_model(facts, args):
    """Raises Fault where an adapter was made for another model than the arguments name.

    Prints a note where it was trained on another dataset. Keeps the metadata as args.adapter, so
    that result.json tells how the adapter was trained: of these arguments only the evaluation's
    are used.
    """
    for key in ("model", "pretrained"):
        if facts[key] != getattr(args, key):
            here = getattr(args, key)
            raise Fault(f"the adapter was made with {key} {facts[key]!r}, this run has {here!r}")
    if facts.get("dataset", args.dataset) != args.dataset:
        print(f"note: this adapter was trained on {facts['dataset']}; --dataset is {args.dataset}")
    args.adapter = facts


def adapted_classifier(facts, device, dtype):
    """The classifier that an adapter's metadata tells of, before the adapter is applied."""
    clip, config = load_clip(facts["model"], facts["pretrained"], device)
    return Classifier(clip, config, json.loads(facts["names"]), facts["template"], dtype)


def save_run(folder, args, method, **facts):
    """<folder>/result.json: how it was made and what it gave; results/README.md has its keys."""
    if args.device.startswith("cuda"):
        device = torch.cuda.get_device_name(args.device)
    else:
        device = f"{torch.get_num_threads()} CPU threads"
    facts = {
        **describe(args, method),
        "device_name": device,
        "processes": processes()[1],
        "peak_memory_mib": round(peak_memory(args.device)),
        **facts,
    }
    write(folder / "result.json", (json.dumps(facts, indent=1) + "\n").encode())


def sizes(clip):
    """The parameters of a CLIP, for the log."""
    vision = sum(p.numel() for p in clip.visual.parameters())
    total = sum(p.numel() for p in clip.parameters())
    return f"vision {vision:,} / total {total:,} parameters"


def print_end(folder, args, started, training):
    """The last line of a program: memory, seconds, where the files are."""
    memory = peak_memory(args.device)
    seconds = time.time() - started
    print(
        f"peak memory {memory:.0f} MiB, {seconds:.0f} s (training {training:.0f} s); see {folder}"
    )


def peak_memory(device):
    """MiB: the GPU's peak allocation, or the process's largest resident size; 0 if unknown."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(ImportError):  # Unix only
        import resource

        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return 0.0


def check_new(folder):
    """Raises Fault where --export would overwrite something, or cannot be written."""
    if folder and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Fault(f"--export {folder} exists and is not empty; choose a new folder")
    if folder and any(path.is_file() for path in folder.parents):
        raise Fault(f"--export {folder} is below a file; choose a new folder")
    if folder:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder.parent).close()
        except OSError as fault:
            raise Fault(f"cannot write to --export {folder} ({fault.strerror}); choose another")


def export(clip, config, folder):
    """Write the model as an open_clip folder, whole or not at all.

    open_clip.create_model_and_transforms("local-dir:FOLDER") gives the same logits. Raises Fault
    where the folder has files. Under torchrun only process 0 writes.
    """
    if processes()[0]:
        return
    check_new(folder)
    scratch = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        keys = ("mean", "std", "interpolation", "resize_mode")
        preprocess = {k: v for k, v in config["preprocess_cfg"].items() if k in keys}
        facts = {"model_cfg": config["model_cfg"], "preprocess_cfg": preprocess}
        (scratch / "open_clip_config.json").write_text(json.dumps(facts, indent=1))
        weights = {name: value.contiguous().cpu() for name, value in clip.state_dict().items()}
        content = safetensors.torch.save(weights)
        (scratch / "open_clip_model.safetensors").write_bytes(content)
        scratch.chmod(0o755)
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
