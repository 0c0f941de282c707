"""common.py's arguments, data, CLIP and files, against the published index files, closed forms and
open_clip's own code. Its robust evaluation is in test_evaluation.py."""

import argparse
import copy
import errno
import io
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.nn.utils import parametrize

import common

# ------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------


def parsed(*arguments):
    """The shared arguments of a program that was called like this."""
    parser = common.Parser()
    common.add_arguments(parser)
    return common.parse(parser, [str(argument) for argument in arguments])


@pytest.mark.parametrize("text, value", [("1/255", 1 / 255), ("0.004", 0.004), ("0", 0)])
def test_a_fraction_is_a_number_or_a_quotient(text, value):
    assert common.fraction(text) == value


@pytest.mark.parametrize("text", ["-1/255", "1/0", "nan", "inf", "1/255/2", "small", ""])
def test_what_is_no_fraction_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="such as 1/255"):
        common.fraction(text)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "nan", "many", str(2**31)])
def test_a_count_is_a_whole_number_of_at_least_1(text):
    assert common.at_least(1)("1") == 1
    with pytest.raises(argparse.ArgumentTypeError, match="a whole number of at least 1, below"):
        common.at_least(1)(text)


@pytest.mark.parametrize(
    "arguments, model, eps",
    [
        ([], "tiny", common.TINY_EPS),
        (["--dataset", "caltech101"], "ViT-B-32-quickgelu", 1 / 255),
        (["--dataset", "caltech101", "--model", "tiny"], "tiny", common.TINY_EPS),
        (["--model", "ViT-B-16"], "ViT-B-16", 1 / 255),
        (["--eps", "2/255"], "tiny", 2 / 255),
    ],
)
def test_model_and_eps_depend_on_the_data_and_the_model(arguments, model, eps):
    args = parsed(*arguments)
    assert (args.model, args.eps) == (model, eps)
    for name in ("model", "eps"):
        assert (name in args.left_out) == (f"--{name}" not in arguments)
    assert "seed" not in args.left_out


def test_transfer_to_new_and_others_is_allowed_from_base():
    args = parsed("--classes", "base", "--transfer", "new", "dtd")
    assert args.transfer == ["new", "dtd"]


@pytest.mark.parametrize(
    "flags, dtype",
    [
        ("flags : fpu avx2 amx_bf16", "bfloat16"),
        ("flags : fpu avx512_bf16 avx2", "float32"),
        ("Features : asimd bf16", "bfloat16"),
        ("flags : fpu avx2 avx512f avx512_bf16_not", "float32"),
    ],
)
def test_dtype_auto_is_bfloat16_where_the_cpu_lists_it(monkeypatch, flags, dtype):
    monkeypatch.setattr(pathlib.Path, "exists", lambda path: True)
    monkeypatch.setattr(pathlib.Path, "read_text", lambda path: f"model name : x\n{flags}\n")
    assert parsed("--device", "cpu").dtype == dtype
    assert parsed("--device", "cpu", "--dtype", "float32").dtype == "float32"


def test_dtype_auto_is_float32_where_the_cpu_tells_nothing(monkeypatch):
    monkeypatch.setattr(pathlib.Path, "exists", lambda path: False)
    assert parsed("--device", "cpu").dtype == "float32"


@pytest.mark.parametrize("computes", [True, False])
def test_on_a_gpu_dtype_auto_asks_for_hardware_not_for_emulation(monkeypatch, computes):
    def is_bf16_supported(including_emulation=True):
        return computes or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert common.computes_in_bfloat16("cuda") == computes


def test_parse_sets_the_seed_and_the_attention_kernel():
    torch.backends.cuda.enable_flash_sdp(True)
    parsed("--seed", "5", "--device", "cpu")
    first = torch.rand(3)
    assert not torch.backends.cuda.flash_sdp_enabled()
    parsed("--seed", "5", "--device", "cpu")
    assert torch.equal(torch.rand(3), first)
    parsed("--seed", "6", "--device", "cpu")
    assert not torch.equal(torch.rand(3), first)


# ------------------------------------------------------------------------------------------------
# guard
# ------------------------------------------------------------------------------------------------


def guarded(fault):
    """Run a program that raises this; -> its exit code."""

    def main():
        raise fault

    with pytest.raises(SystemExit) as stop:
        common.guard(main)
    return stop.value.code


@pytest.mark.parametrize(
    "fault, words",
    [
        (common.Fault("two\nlines"), "two lines"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), "Permission denied: /x/y"),
        (KeyboardInterrupt(), "interrupted"),
        (FloatingPointError("not finite"), "a lower rate may help"),
        (torch.OutOfMemoryError("CUDA out of memory."), "a smaller --batch-size"),
        (RuntimeError("DataLoader worker (pid 7) exited unexpectedly"), "images has died"),
    ],
)
def test_guard_says_one_sentence_and_exits_2(capsys, fault, words):
    assert guarded(fault) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err


@pytest.mark.parametrize("allocate", [torch.empty, np.empty])
def test_guard_says_that_memory_is_full(capsys, allocate):
    with pytest.raises(SystemExit):
        common.guard(lambda: allocate(2**50))
    assert capsys.readouterr().err == f"error: {common.MEMORY}\n"


@pytest.mark.parametrize("bug", [ZeroDivisionError(), RuntimeError("shapes"), AssertionError()])
def test_guard_lets_bugs_through(bug):
    def main():
        raise bug

    with pytest.raises(type(bug)):
        common.guard(main)


def test_guard_gives_what_the_program_gives():
    assert common.guard(lambda: 3) == 3


def test_a_process_whose_other_has_ended_waits_so_that_one_sentence_is_printed(monkeypatch, capsys):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    assert guarded(RuntimeError("[gloo/pair.cc] Connection closed by peer [::1]:9")) == 2
    assert slept == [3]
    assert "another process of torchrun has ended" in capsys.readouterr().err


def test_under_torchrun_only_process_0_prints(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # undone at the end
    common.guard(lambda: print("hello"))
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------------------
# Few-shot draws and halves
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, split",
    [
        ("caltech101", "caltech-101/split_zhou_Caltech101.json"),
        ("oxford_pets", "splits/split_zhou_OxfordPets.json"),
    ],
)
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("k", [1, 2, 4, 8, 16])
def test_few_shot_is_the_published_draw(data_root, name, split, k, seed):
    lists = json.loads((data_root / split).read_text())
    train, val = common.few_shot(lists["train"], lists["val"], k, seed)
    index = data_root / "fewshot_indices" / name / f"shot_{k}-seed_{seed}.json"
    published = json.loads(index.read_text())
    for mine, part in ((train, "train"), (val, "val")):
        theirs = published[part]["data"]
        assert len(mine) == len(theirs)
        for (path, label, class_name), item in zip(mine, theirs):
            assert item["impath"].endswith("/" + path)
            assert item["label"] == label
            assert item["classname"] == class_name


def items_of(counts):
    """counts[c] items of class c."""
    items = []
    for label, n in enumerate(counts):
        for i in range(n):
            items.append(common.Item(f"{label}-{i}", label, f"c{label}"))
    return items


def counted(items, classes):
    return np.bincount([item.label for item in items], minlength=classes).tolist()


def test_few_shot_draws_train_before_val_and_classes_as_they_come():
    train, val = common.few_shot(items_of([9, 9])[::-1], items_of([5, 5])[::-1], 2, seed=1)
    # by random.sample of one random.Random(1)
    generator = random.Random(1)
    expected = []
    for items, n in ((items_of([9, 9]), 2), (items_of([5, 5]), 2)):
        for label in (1, 0):
            mine = [item for item in items[::-1] if item.label == label]
            expected.append(generator.sample(mine, n))
    assert train == expected[0] + expected[1] and val == expected[2] + expected[3]


def test_few_shot_gives_all_of_a_small_class():
    train, val = common.few_shot(items_of([5, 2, 4]), items_of([1, 9, 9]), 4, seed=1)
    assert counted(train, 3) == [4, 2, 4]
    assert counted(val, 3) == [1, 4, 4]
    assert len(set(train)) == len(train)


@pytest.mark.parametrize("k, of_val", [(1, 1), (3, 3), (4, 4), (8, 4)])
def test_few_shot_draws_at_most_4_a_class_of_val(k, of_val):
    train, val = common.few_shot(items_of([9, 9]), items_of([9, 9]), k, seed=1)
    assert counted(train, 2) == [k, k]
    assert counted(val, 2) == [of_val, of_val]


@pytest.mark.parametrize("n, base", [(2, 1), (5, 3), (10, 5), (101, 51)])
def test_half_is_coops_base_and_new(n, base):
    items = items_of([2] * n)
    names = [f"c{i}" for i in range(n)]
    data = common.Data(names, "a {}.", items, items[::2], items)
    assert common.half(data, "all") == data
    first, second = common.half(data, "base"), common.half(data, "new")
    assert first.classes == names[:base]
    assert second.classes == names[base:]
    for part in (first, second):
        for some in (part.train, part.val, part.test):
            assert sorted({item.label for item in some}) == list(range(len(part.classes)))
            assert all(part.classes[item.label] == item.name for item in some)
    images = [{item.image for item in part.test} for part in (first, second)]
    assert not images[0] & images[1]
    assert images[0] | images[1] == {item.image for item in items}


# ------------------------------------------------------------------------------------------------
# Datasets
# ------------------------------------------------------------------------------------------------


def test_caltech101_is_the_published_split(data_root):
    data = common.load_dataset("caltech101", data_root)
    assert (len(data.train), len(data.val), len(data.test)) == (4128, 1649, 2465)
    assert len(data.classes) == 100
    assert data.classes[0] == "face"
    assert not any("_" in name for name in data.classes)
    assert all(item.image.is_file() for item in data.test)


# the protocol's counts of train, val and test images and of classes
PUBLISHED = {
    "caltech101": (4128, 1649, 2465, 100),
    "dtd": (2820, 1128, 1692, 47),
    "eurosat": (13500, 5400, 8100, 10),
    "oxford_flowers": (4093, 1633, 2463, 102),
    "oxford_pets": (2944, 736, 3669, 37),
    "stanford_cars": (6509, 1635, 8041, 196),
    "ucf101": (7639, 1898, 3783, 101),
}
# CoOp's prompt of a class called `x y`
PROMPTS = {
    "caltech101": "a photo of a x y.",
    "dtd": "x y texture.",
    "eurosat": "a centered satellite photo of x y.",
    "fgvc_aircraft": "a photo of a x y, a type of aircraft.",
    "food101": "a photo of x y, a type of food.",
    "imagenet": "a photo of a x y.",
    "oxford_flowers": "a photo of a x y, a type of flower.",
    "oxford_pets": "a photo of a x y, a type of pet.",
    "stanford_cars": "a photo of a x y.",
    "sun397": "a photo of a x y.",
    "tiny_imagenet": "a photo of a x y.",
    "ucf101": "a photo of a person doing x y.",
}


def test_the_prompts_are_the_published_ones():
    found = {name: source.template.format("x y") for name, source in common.DATASETS.items()}
    assert found == PROMPTS


@pytest.fixture
def layout(data_root, tmp_path):
    """layout(name): CoOp's folder of a dataset with the published split and no image -> root."""

    def make(name):
        source = common.DATASETS[name]
        folder = tmp_path / source.folder
        (folder / source.images / "some").mkdir(parents=True)
        split = data_root / "splits" / source.split
        if not split.exists():
            split = data_root / source.folder / source.split
        (folder / source.split).write_bytes(split.read_bytes())
        return tmp_path

    return make


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_splits(layout, name):
    root, source = layout(name), common.DATASETS[name]
    data = common.load_dataset(name, root)
    found = len(data.train), len(data.val), len(data.test), len(data.classes)
    assert found == PUBLISHED[name]
    assert not any("_" in word for word in data.classes)
    assert sorted({item.label for item in data.train}) == list(range(len(data.classes)))
    for item in data.test:
        assert item.image.is_relative_to(root / source.folder / source.images)
        assert data.classes[item.label] == item.name.replace("_", " ")


def test_aircraft_is_read_from_its_own_lists(tmp_path):
    folder = tmp_path / "fgvc_aircraft"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "1.jpg").write_bytes(b"")
    (folder / "variants.txt").write_text("707-320\nF/A-18\n")
    (folder / "images_variant_train.txt").write_text("0001 F/A-18\n0002 707-320\n")
    (folder / "images_variant_val.txt").write_text("0003 707-320\n")
    (folder / "images_variant_test.txt").write_text("0004 F/A-18\n0005 707-320\n")
    data = common.load_dataset("fgvc_aircraft", tmp_path)
    assert data.classes == ["707-320", "F/A-18"]
    labels = [[item.label for item in part] for part in (data.train, data.val, data.test)]
    assert labels == [[1, 0], [0], [1, 0]]
    assert data.test[0].image == folder / "images" / "0004.jpg"
    (folder / "variants.txt").unlink()
    with pytest.raises(common.Fault, match="cannot be read"):
        common.load_dataset("fgvc_aircraft", tmp_path)


@pytest.mark.parametrize("content", ['{"train": []}', "[1]", '{"train": [[1]]}'])
def test_a_split_of_another_shape_is_refused(tmp_path, content):
    (tmp_path / "food-101" / "images" / "pizza").mkdir(parents=True)
    (tmp_path / "food-101" / "split_zhou_Food101.json").write_text(content)
    with pytest.raises(common.Fault, match="split_zhou_Food101.json cannot be read"):
        common.load_dataset("food101", tmp_path)


def test_imagenet_without_its_folders_is_told_where_they_come_from(tmp_path):
    images = tmp_path / "imagenet" / "images"
    (images / "val").mkdir(parents=True)
    (images / "val" / "1.JPEG").touch()  # as in the archive, without folders
    (tmp_path / "imagenet" / "classnames.txt").write_text("n01 cat\n")
    with pytest.raises(common.Fault, match="images/train.*it comes from https://image-net.org"):
        common.load_dataset("imagenet", tmp_path)
    (images / "train" / "n01").mkdir(parents=True)
    (images / "train" / "n01" / "1.JPEG").touch()
    with pytest.raises(common.Fault, match="lacks images of train, val or test"):
        common.load_dataset("imagenet", tmp_path)


def test_imagenet_is_read_from_its_folders(tmp_path):
    folder = tmp_path / "imagenet"
    for part, n in (("train", 3), ("val", 2)):
        for wnid in ("n02", "n01"):
            (folder / "images" / part / wnid).mkdir(parents=True)
            for i in range(n):
                (folder / "images" / part / wnid / f"{wnid}_{i}.JPEG").write_bytes(b"")
    (folder / "classnames.txt").write_text("n01 great white shark\nn02 tench\n")
    data = common.load_dataset("imagenet", tmp_path)
    assert data.classes == ["great white shark", "tench"]
    assert (len(data.train), len(data.val), len(data.test)) == (6, 4, 4)
    assert data.train[0].image == folder / "images" / "train" / "n01" / "n01_0.JPEG"
    assert data.val == data.test


def test_a_class_without_training_images_is_refused_as_later_names_would_shift(tmp_path):
    folder = tmp_path / "imagenet"
    for wnid in ("n01", "n02", "n03"):
        for part in ("train", "val"):
            (folder / "images" / part / wnid).mkdir(parents=True)
            (folder / "images" / part / wnid / "1.JPEG").touch()
    (folder / "classnames.txt").write_text("n01 cat\nn02 dog\nn03 emu\n")
    assert common.load_dataset("imagenet", tmp_path).classes == ["cat", "dog", "emu"]
    for part in ("train", "val"):  # with val's images, and without
        (folder / "images" / part / "n02" / "1.JPEG").unlink()
        with pytest.raises(common.Fault, match="lacks training images of a class"):
            common.load_dataset("imagenet", tmp_path)


def test_a_class_of_tiny_imagenet_that_val_alone_has_is_named(tmp_path):
    folder = tmp_path / "tiny-imagenet-200"
    for part in ("train/n01/images", "val/images"):
        (folder / part).mkdir(parents=True)
        (folder / part / "1.JPEG").touch()
    (folder / "words.txt").write_text("n01\tcat\nn02\tdog\n")
    (folder / "val" / "val_annotations.txt").write_text("1.JPEG\tn02\t0\t0\t9\t9\n")
    with pytest.raises(common.Fault, match="train/n02 is missing"):
        common.load_dataset("tiny_imagenet", tmp_path)


def test_tiny_imagenet_is_the_published_one(data_root):
    data = common.load_dataset("tiny_imagenet", data_root)
    assert len(data.classes) == 200
    assert data.classes[0] == "goldfish"
    assert all(item.image.is_file() for item in data.test[::500])
    assert counted(data.test, 200) == [50] * 200


@pytest.mark.parametrize("name", common.DATASETS)
def test_what_torchvision_cannot_download_comes_with_an_address(tmp_path, name):
    source = common.DATASETS[name]
    if source.origin.isalnum():
        assert hasattr(torchvision.datasets, source.origin)
        return
    with pytest.raises(common.Fault, match="is missing") as fault:
        common.load_dataset(name, tmp_path)
    assert "http" in str(fault.value)
    assert source.origin in str(fault.value)
    assert str(tmp_path / source.folder / source.images) in str(fault.value)


def test_embedded_is_balanced(embedded):
    assert counted(embedded.train, 10) == [16] * 10
    assert counted(embedded.val, 10) == [4] * 10
    assert counted(embedded.test, 10) == [20] * 10


def test_folder_splits_every_class(tmp_path, picture_folder):
    root = picture_folder(tmp_path / "d", ("b_x", "a"), 10)
    data = common.load_folder(root)
    assert data.classes == ["a", "b x"]
    for label, name in enumerate(("a", "b_x")):
        parts = []
        for part in (data.train, data.val, data.test):
            parts.append({item.image for item in part if item.label == label})
        assert [len(part) for part in parts] == [5, 2, 3]
        assert set.union(*parts) == set((root / name).iterdir())
    names = [item.image.name for item in data.val]
    assert names != ["0.png", "1.png"] * 2, "shuffled first"
    assert common.load_folder(root) == data, "the split must not change between runs"


def test_folder_takes_names_from_classnames_txt(tmp_path, picture_folder):
    root = picture_folder(tmp_path / "d", ("n02", "n01"))
    (root / "classnames.txt").write_text("tabby cat\n\nsled dog\n")
    data = common.load_folder(root)
    assert data.classes == ["tabby cat", "sled dog"]
    names = {item.name for item in data.test if "n01" in str(item.image)}
    assert names == {"tabby cat"}


# ------------------------------------------------------------------------------------------------
# Images
# ------------------------------------------------------------------------------------------------


def noise_picture(height, width):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("height, width", [(90, 131), (131, 90), (40, 40)])
def test_the_test_view_is_open_clips(tmp_path, height, width):
    picture = noise_picture(height, width)
    picture.save(tmp_path / "p.png")
    images = common.TestImages([common.Item(tmp_path / "p.png", 3, "c")], 64)
    ((x, y),) = list(images)
    view = open_clip.image_transform(64, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
    assert (x.dtype, y, len(images)) == (torch.uint8, 3, 1)
    torch.testing.assert_close(x / 255, view(picture), rtol=0, atol=1e-6)


def test_test_images_are_read_when_they_are_asked_for(tmp_path):
    images = common.TestImages([common.Item(tmp_path / "later.png", 0, "c")], 8)
    noise_picture(9, 9).save(tmp_path / "later.png")
    assert images[0][0].shape == (3, 8, 8)


def test_for_crops_decode_keeps_a_quarter_more_than_the_network_sees(tmp_path):
    noise_picture(90, 180).save(tmp_path / "p.png")
    ((x, y),) = common.decode([common.Item(tmp_path / "p.png", 2, "c")], 64)
    assert (x.dtype, x.shape, y) == (torch.uint8, (3, 80, 160), 2)


def test_grey_and_transparent_pictures_become_rgb(tmp_path):
    noise_picture(9, 9).convert("L").save(tmp_path / "grey.png")
    noise_picture(9, 9).convert("RGBA").save(tmp_path / "clear.png")
    for name in ("grey.png", "clear.png"):
        assert common.read_image(common.Item(tmp_path / name, 0, "c")).mode == "RGB"


@pytest.mark.parametrize("content, words", [(None, "is missing"), (b"no image", "cannot be read")])
def test_a_missing_or_broken_image_is_a_fault_that_names_it(tmp_path, content, words):
    path = tmp_path / "p.png"
    if content:
        path.write_bytes(content)
    with pytest.raises(common.Fault, match=words) as fault:
        common.read_image(common.Item(path, 0, "c"))
    assert str(path) in str(fault.value)


def test_an_image_cut_short_is_a_fault(tmp_path):
    whole = io.BytesIO()
    noise_picture(90, 90).save(whole, "JPEG")
    (tmp_path / "p.jpg").write_bytes(whole.getvalue()[:1000])
    with pytest.raises(common.Fault, match="cannot be read"):
        common.read_image(common.Item(tmp_path / "p.jpg", 0, "c"))


def test_a_broken_image_met_by_a_loading_process_is_one_sentence(tmp_path, picture_folder, capsys):
    root = picture_folder(tmp_path / "d")
    broken = root / "dog" / "2.png"
    broken.write_bytes(b"no image")
    items = [common.Item(path, 0, "c") for path in sorted(root.rglob("*.png"))]
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).eval()

    def main():
        common.evaluate(net, common.TestImages(items, 8), 0.01, 1, batch_size=2, workers=1)

    with pytest.raises(SystemExit) as stop:
        common.guard(main)
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.startswith(f"error: image {broken} cannot be read")
    assert err.count("\n") == 1
    assert "Traceback" not in err


# ------------------------------------------------------------------------------------------------
# Training batches
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def numbered(embedded):
    """12 training items, each with a label of its own."""
    return [item._replace(label=i) for i, item in enumerate(embedded.train[:12])]


@pytest.fixture
def decoded(numbered):
    """The same, decoded for random crops."""
    return common.decode(numbered, 64)


@pytest.mark.parametrize("augment", ["crop", "none"])
def test_batches_are_pixels_of_the_networks_size(numbered, augment):
    drawn = list(common.batches(common.decode(numbered, 64, augment), 64, 4, 6, augment))
    assert len(drawn) == 6
    for x, y in drawn:
        assert x.shape == (4, 3, 64, 64)
        assert x.dtype == torch.float32
        assert x.min() >= 0
        assert 0.5 < x.max() <= 1
        assert y.shape == (4,)


def test_batches_cover_every_epoch_in_a_new_order(decoded):
    labels = torch.cat([y for _, y in common.batches(decoded, 64, 4, 6)]).tolist()
    assert sorted(labels[:12]) == list(range(12))
    assert sorted(labels[12:]) == list(range(12))
    assert labels[:12] != labels[12:]


def test_batches_that_do_not_divide_the_images_still_cover_every_epoch(decoded):
    labels = torch.cat([y for _, y in common.batches(decoded, 64, 5, 12)]).tolist()
    assert len(labels) == 60
    for start in range(0, 60, 12):
        assert sorted(labels[start : start + 12]) == list(range(12))


def test_a_batch_is_never_larger_than_the_training_set(decoded):
    assert [len(y) for _, y in common.batches(decoded, 64, 32, 2)] == [12, 12]


def test_without_augmentation_a_batch_is_the_test_view(numbered):
    views = torch.stack([x for x, _ in common.TestImages(numbered, 64)]) / 255
    for x, y in common.batches(common.decode(numbered, 64, "none"), 64, 4, 3, "none"):
        assert torch.equal(x, views[y])


def test_crops_are_at_least_half_of_the_image_and_half_of_them_are_flipped():
    ramp = torch.linspace(0, 255, 80).to(torch.uint8).expand(3, 80, 80)
    torch.manual_seed(0)
    drawn = torch.cat([x for x, _ in common.batches([(ramp, 0)], 64, 1, 300)])
    ends = drawn[:, 0, 32, [0, -1]]  # a crop's left and right end, 1 is the whole width
    flipped = (ends[:, 0] > ends[:, 1]).float().mean()
    widths = (ends[:, 0] - ends[:, 1]).abs()
    assert 0.35 < flipped < 0.65
    # half of the area, 4 / 3 as high as wide
    assert widths.min() > 0.6 and widths.max() > 0.9


def test_crops_differ_from_step_to_step_and_repeat_with_the_seed(decoded):
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(torch.cat([x for x, _ in common.batches(decoded[:1], 64, 1, 2)]))
    assert not torch.equal(drawn[0][0], drawn[0][1])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


# ------------------------------------------------------------------------------------------------
# Loading CLIP
# ------------------------------------------------------------------------------------------------


def test_a_loaded_model_is_frozen_and_in_eval_mode(tiny):
    clip, _ = tiny
    assert not any(module.training for module in clip.modules())
    assert not any(parameter.requires_grad for parameter in clip.parameters())


# ------------------------------------------------------------------------------------------------
# The patch embedding
# ------------------------------------------------------------------------------------------------


def outputs_and_gradients(net, x):
    """net(x), and the gradients of a weighted sum of it towards x and the weight."""
    x = x.clone().requires_grad_()
    z = net(x)
    weights = torch.linspace(-1, 1, z.numel()).reshape(z.shape)
    return z, *torch.autograd.grad((weights * z).sum(), [x, net.weight])


@pytest.mark.parametrize("patch, height, width", [(4, 8, 8), (8, 16, 24)])
def test_the_patch_embedding_is_the_convolution(patch, height, width):
    convolution = nn.Conv2d(3, 5, patch, patch, bias=False)
    x = torch.rand(2, 3, height, width)
    expected = outputs_and_gradients(convolution, x)
    found = outputs_and_gradients(common.PatchEmbedding(convolution), x)
    for mine, theirs in zip(found, expected):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_under_autocast_the_patch_embedding_stays_in_float32():
    convolution = nn.Conv2d(3, 5, 4, 4, bias=False)
    embedding = common.PatchEmbedding(convolution)
    x = torch.rand(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        z = embedding(x)
        rounded = convolution(x)
    assert z.dtype == torch.float32
    assert torch.equal(z, embedding(x))
    assert rounded.dtype == torch.bfloat16, "a convolution would have rounded"


def test_the_classifier_replaces_the_patch_embedding_and_keeps_every_name(classifier):
    untouched, _ = common.load_clip("tiny")
    assert isinstance(classifier.clip.visual.conv1, common.PatchEmbedding)
    state, original = classifier.clip.state_dict(), untouched.state_dict()
    assert list(state) == list(original)
    assert all(torch.equal(state[name], original[name]) for name in state)


@pytest.mark.parametrize(
    "options", [{"stride": 4, "bias": True}, {"stride": 2, "bias": False}], ids=["bias", "overlap"]
)
def test_a_convolution_that_is_no_patch_embedding_is_refused(options):
    with pytest.raises(ValueError, match="kernel is its stride"):
        common.PatchEmbedding(nn.Conv2d(3, 5, 4, **options))


# ------------------------------------------------------------------------------------------------
# The classifier
# ------------------------------------------------------------------------------------------------


def test_the_classifier_is_the_scaled_cosine_of_normalised_pixels(classifier, embedded, images):
    x, _ = images
    clip, config = common.load_clip("tiny")  # untouched: batch first, with its convolution
    mean = torch.tensor(config["preprocess_cfg"]["mean"]).reshape(1, 3, 1, 1)
    std = torch.tensor(config["preprocess_cfg"]["std"]).reshape(1, 3, 1, 1)
    length = config["model_cfg"]["text_cfg"]["context_length"]
    tokenizer = open_clip.SimpleTokenizer(context_length=length)
    tokens = tokenizer([embedded.template.format(name) for name in embedded.classes])
    z, t = clip.encode_image((x - mean) / std), clip.encode_text(tokens)
    expected = clip.logit_scale.exp() * torch.cosine_similarity(z[:, None], t[None], dim=-1)
    torch.testing.assert_close(classifier(x), expected, rtol=1e-4, atol=1e-4)


def test_the_classifier_runs_its_blocks_tokens_first(classifier):
    untouched, _ = common.load_clip("tiny")
    assert untouched.visual.transformer.batch_first
    for part in classifier.clip.visual.modules():
        assert not getattr(part, "batch_first", False)


def test_set_classes_changes_what_is_told_apart(classifier, images):
    x, _ = images
    before = classifier(x)
    classifier.set_classes(classifier.classes[::-1], classifier.template)
    torch.testing.assert_close(classifier(x), before.flip(1), rtol=1e-4, atol=1e-4)
    classifier.set_classes(["cat", "dog"], "a drawing of a {}.")
    assert classifier(x).shape == (6, 2)
    assert classifier.template == "a drawing of a {}."


@pytest.mark.parametrize("causal", [True, False])
def test_class_features_are_those_of_whole_prompts(tiny, causal):
    clip, config = tiny
    if not causal:
        clip.attn_mask = None
    names = ["cat", "a dog with a long name", "word " * 40]
    lengths = []
    clip.transformer.register_forward_pre_hook(lambda _, x: lengths.append(x[0].shape[1]))
    for some in (names[:2], names):
        net = common.Classifier(clip, config, some)
        torch.testing.assert_close(net.text, clip.encode_text(net.tokens, normalize=True))
    # "a photo of a", six words, a full stop, and a token at either end; the last fills the context
    assert lengths == ([13, 24, 24, 24] if causal else [24] * 4)


def test_bfloat16_gives_float32_logits_close_to_float32(tiny, embedded, images):
    x, _ = images
    full = common.Classifier(*tiny, embedded.classes, embedded.template)(x)
    low = common.Classifier(*tiny, embedded.classes, embedded.template, "bfloat16")(x)
    assert low.dtype == torch.float32
    assert 0 < (low - full).abs().max() < 0.05 * tiny[0].logit_scale.exp()


def test_a_classifier_in_float16_is_refused(tiny):
    with pytest.raises(ValueError, match="small gradients become zero"):
        common.Classifier(*tiny, ["cat", "dog"], dtype="float16")


class Counted(nn.Module):
    """A parametrisation that counts how often its weight is computed."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, weight):
        self.calls += 1
        return 1.0 * weight


@pytest.mark.parametrize("weight", ["in_proj_weight", "out_proj.weight"])
def test_a_parametrised_weight_is_computed_once_a_forward(classifier, images, weight):
    attention = classifier.clip.visual.transformer.resblocks[0].attn
    path, _, name = weight.rpartition(".")
    counted_weight = Counted()
    parametrize.register_parametrization(attention.get_submodule(path), name, counted_weight)
    for forwards in (1, 2):
        counted_weight.calls = 0
        for _ in range(forwards):
            classifier(images[0][:1])
        assert counted_weight.calls == forwards


# ------------------------------------------------------------------------------------------------
# Names, prepare
# ------------------------------------------------------------------------------------------------


def test_two_classes_of_one_name_and_a_prompt_cut_short_are_warned_of(tiny, capsys):
    _, config = tiny
    long = " ".join(["word"] * 80)
    common.check_names(["cat", "dog", "cat", long], "a {}.", config)
    lines = capsys.readouterr().out.strip().split("\n")
    assert len(lines) == 2
    assert lines[0] == "WARNING: two classes are called 'cat': they cannot be told apart"
    # 80 words, "a", ".", start and end
    length = config["model_cfg"]["text_cfg"]["context_length"]
    assert lines[1].startswith("WARNING: of the 84 tokens of 'word word")
    assert lines[1].endswith(f"only {length} are read")


@pytest.mark.parametrize("spare, warned", [(0, False), (-1, True)])
def test_a_prompt_that_just_fits_is_not_warned_of(tiny, capsys, spare, warned):
    _, config = tiny
    length = config["model_cfg"]["text_cfg"]["context_length"]
    name = " ".join(["word"] * (length - 2 - spare))
    common.check_names([name], "{}", config)
    assert ("WARNING" in capsys.readouterr().out) == warned


def test_prepare_warns_before_anything_is_evaluated(tmp_path, picture_folder, capsys):
    root = picture_folder(tmp_path / "d")
    (root / "classnames.txt").write_text("cat\ncat\n")
    folder = ["--dataset", "folder", "--data-root", root, "--model", "tiny", "--device", "cpu"]
    common.prepare(parsed(*folder))
    out = capsys.readouterr().out
    assert out.startswith("WARNING: two classes are called 'cat'")


@pytest.mark.parametrize("split, warned", [("val", True), ("test", False)])
def test_prepare_warns_of_a_val_that_is_the_test_set(embedded, monkeypatch, capsys, split, warned):
    monkeypatch.setattr(common, "load_dataset", lambda *_: embedded)
    words = ["--dataset", "imagenet", "--model", "tiny", "--device", "cpu", "--shots", 1]
    common.prepare(parsed(*words, "--split", split))
    assert ("WARNING: val is the test set" in capsys.readouterr().out) == warned


def test_prepare_loads_what_the_arguments_name(embedded, capsys):
    args = parsed("--shots", 2, "--seed", 3, "--device", "cpu", "--dtype", "float32")
    classifier, train, tests = common.prepare(args)
    expected, _ = common.few_shot(embedded.train, embedded.val, 2, 3)
    assert [label for _, label in train] == [item.label for item in expected]
    for (found, _), (pixels, _) in zip(train, common.decode(expected, 64)):
        assert torch.equal(found, pixels)
    assert classifier.classes == embedded.classes
    assert list(tests) == ["embedded"]
    tested = [item.image.tobytes() for item in tests["embedded"][1].items]
    assert tested == [item.image.tobytes() for item in embedded.test]
    out = capsys.readouterr().out
    assert "10 classes, 20 training images, 64 px, eps 3/255, float32 on cpu" in out
    assert "test set embedded: 10 classes, 200 images" in out


def test_a_data_root_that_is_not_used_is_told(tmp_path, capsys):
    few = ("--shots", 1, "--test-limit", 1, "--device", "cpu")
    common.prepare(parsed(*few))
    assert "note:" not in capsys.readouterr().out
    common.prepare(parsed(*few, "--data-root", tmp_path))
    assert "note: the embedded data need no --data-root" in capsys.readouterr().out


@pytest.mark.parametrize("augment, side", [("crop", 80), ("none", 64)])
def test_prepare_decodes_as_the_augmentation_needs(augment, side):
    _, train, _ = common.prepare(parsed("--shots", 1, "--augment", augment, "--device", "cpu"))
    assert {pixels.shape for pixels, _ in train} == {(3, side, side)}


def test_prepare_halves_the_classes_and_tests_both_halves(embedded):
    args = parsed("--shots", 1, "--classes", "base", "--transfer", "new", "--device", "cpu")
    classifier, train, tests = common.prepare(args)
    shots, _ = common.few_shot(embedded.train, embedded.val, 1, args.seed)
    assert [label for _, label in train] == [item.label for item in shots if item.label < 5]
    assert classifier.classes == embedded.classes[:5]
    assert list(tests) == ["embedded", "new"]
    assert tests["embedded"][0].classes == embedded.classes[:5]
    assert tests["new"][0].classes == embedded.classes[5:]
    names = {item.name for item in tests["new"][1].items}
    assert names == set(embedded.classes[5:])


@pytest.mark.parametrize("part, first", [("base", 0), ("new", 5)])
def test_shots_are_drawn_before_the_classes_are_halved(embedded, part, first):
    _, train, _ = common.prepare(parsed("--shots", 2, "--classes", part, "--device", "cpu"))
    shots, _ = common.few_shot(embedded.train, embedded.val, 2, 1)
    expected = common.decode([item for item in shots if item.label // 5 == first // 5], 64)
    assert len(train) == len(expected) == 10
    for (found, label), (pixels, old) in zip(train, expected):
        assert torch.equal(found, pixels)
        assert label == old - first


def test_test_limit_is_a_fixed_choice_of_the_split(embedded):
    args = SimpleNamespace(split="val", test_limit=7)
    chosen = common.test_images(embedded, args, 64).items
    pictures = [item.image.tobytes() for item in chosen]
    assert len(set(pictures)) == 7
    assert set(pictures) <= {item.image.tobytes() for item in embedded.val}
    assert common.test_images(embedded, args, 64).items == chosen
    args.test_limit = 1000
    assert len(common.test_images(embedded, args, 64)) == len(embedded.val)


# ------------------------------------------------------------------------------------------------
# Memory
# ------------------------------------------------------------------------------------------------

MEASURE = """
import pathlib
import resource
import sys
from torch import nn
import common

data = common.load_dataset("tiny_imagenet", pathlib.Path(sys.argv[1]))
net = nn.Sequential(nn.Conv2d(3, 4, 16, 16), nn.Flatten(), nn.Linear(144, 200)).eval()
for n in (1000, 10000):
    images = common.TestImages(data.test[:n], 96)
    common.evaluate(net, images, 1 / 255, steps=1, workers=1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_the_memory_of_an_evaluation_does_not_grow_with_the_test_set(data_root):
    pytest.importorskip("resource")
    command = [sys.executable, "-c", MEASURE, str(data_root.resolve())]
    answer = subprocess.run(command, cwd=common.HERE, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    # MiB at 1,000 and at 10,000 images, which as bytes would be 237 MiB more
    few, many = map(int, answer.stdout.split())
    assert many - few <= 200


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_write_makes_folders_and_replaces(tmp_path, files_in):
    path = tmp_path / "a" / "b.json"
    for content in (b"one", b"two"):
        common.write(path, content)
        assert path.read_bytes() == content
    assert files_in(tmp_path) == ["a/b.json"]


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("where", ["rename", "write"])
def test_a_failed_write_leaves_what_there_was(tmp_path, monkeypatch, files_in, where, old):
    path = tmp_path / "b.json"
    if old:
        path.write_bytes(old)
    write_bytes = pathlib.Path.write_bytes

    def half_of_it(self, content):
        write_bytes(self, content[:2])
        full_disk()

    if where == "rename":
        monkeypatch.setattr(os, "replace", full_disk)
    else:
        monkeypatch.setattr(pathlib.Path, "write_bytes", half_of_it)
    with pytest.raises(OSError):
        common.write(path, b"new")
    monkeypatch.undo()
    if old:
        assert path.read_bytes() == old
    assert files_in(tmp_path) == (["b.json"] if old else [])


def test_a_write_killed_before_the_rename_keeps_the_old_file(tmp_path):
    path = tmp_path / "b.json"
    path.write_bytes(b"old")
    child = os.fork()
    if child == 0:
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        try:
            common.write(path, b"new")
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert path.read_bytes() == b"old"


def run_args(tmp_path, **more):
    """The arguments of a small run, as a program would have them."""
    args = parsed("--device", "cpu", "--out", tmp_path / "runs", "--shots", 4)
    for name, value in more.items():
        setattr(args, name, value)
    return args


def test_run_folders_are_numbered_and_taken_at_once(tmp_path):
    args = run_args(tmp_path)
    name = "m-embedded-tiny-4shot-seed1"
    for expected in (name, f"{name}-2", f"{name}-3"):
        folder = tmp_path / "runs" / expected
        assert common.run_folder(args, "m") == folder
        assert folder.is_dir(), "another run, started now, must not take it as well"


def test_a_folder_that_stays_empty_goes_and_any_other_stays(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "result.json").touch()
    (tmp_path / "empty").mkdir()
    for name in ("full", "empty", "not there"):
        common.remove_if_empty(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.parametrize("model", ["local-dir:/a/b/", "local-dir:a:\\b"])
def test_run_folders_tell_a_loaded_run_and_an_exported_model(tmp_path, model):
    args = run_args(tmp_path, load=tmp_path / "some", model=model)
    folder = common.run_folder(args, "m")
    assert folder == tmp_path / "runs" / "m-embedded-a-b-4shot-seed1-loaded"


def test_describe_names_arguments_and_versions_but_no_folder(tmp_path):
    args = run_args(tmp_path, load=tmp_path, export=tmp_path, data_root=tmp_path)
    facts = common.describe(args, "m")
    assert (facts["method"], facts["eps"], facts["shots"]) == ("m", common.TINY_EPS, 4)
    assert facts["versions"]["torch"] == torch.__version__
    assert set(facts["versions"]) == {"torch", "torchvision", "open_clip"}
    assert str(tmp_path) not in str(facts), "a result names no folder of the machine that made it"


def test_describe_needs_no_git(monkeypatch, tmp_path):
    args = run_args(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert common.describe(args, "m")["commit"] == ""


def test_a_new_line_of_results_is_no_change_of_the_code(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "HERE", tmp_path)
    code, lines = tmp_path / "advmask.py", tmp_path / "main.jsonl"
    for file in (code, lines):
        file.write_text("old\n")
    common.git("init")
    common.git("add", ".")
    common.git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "a")

    def commit():
        return common.describe(run_args(tmp_path), "m")["commit"]

    first = commit()
    assert len(first) == 12
    lines.write_text("new\n")
    assert commit() == first
    code.write_text("new\n")
    assert commit() == f"{first}-dirty"


def test_save_run_writes_how_it_was_made_and_what_it_gave(tmp_path):
    args = run_args(tmp_path)
    common.save_run(tmp_path, args, "m", before=None, after={"pgd": 1.5})
    facts = json.loads((tmp_path / "result.json").read_text())
    assert facts["before"] is None
    assert facts["after"] == {"pgd": 1.5}
    assert facts["processes"] == 1
    assert facts["device_name"] == f"{torch.get_num_threads()} CPU threads"
    assert facts["peak_memory_mib"] > 100
    described = common.describe(args, "m")
    assert {key: facts[key] for key in described} == described


# ------------------------------------------------------------------------------------------------
# Adapters
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path, classifier):
    """A run's folder with an adapter of the method m, and its tensors."""
    tensors = {"a": torch.arange(5, dtype=torch.uint8), "b": torch.rand(3, 4).T}
    args = run_args(tmp_path, weights="attn")
    common.save_adapter(tmp_path / "run", tensors, classifier, args, "m")
    return tmp_path / "run", tensors


def test_an_adapter_carries_tensors_and_how_it_was_made(saved, embedded):
    folder, tensors = saved
    for path in (folder, folder / "adapter.safetensors", str(folder)):
        back, facts = common.load_adapter(path, "m", ["weights"])
        assert set(back) == set(tensors)
        assert all(torch.equal(back[name], tensors[name]) for name in tensors)
        assert facts["shots"] == "4"
        assert facts["weights"] == "attn"
        assert json.loads(facts["names"]) == embedded.classes
        assert facts["template"] == embedded.template


def test_an_adapters_metadata_are_enough_for_its_classifier(tmp_path, classifier):
    classifier.set_classes(["cat", "dog"], "a drawing of a {}.")
    common.save_adapter(tmp_path, {}, classifier, run_args(tmp_path), "m")
    _, facts = common.load_adapter(tmp_path, "m", [])
    again = common.adapted_classifier(facts, "cpu", "bfloat16")
    assert again.classes == ["cat", "dog"] and again.dtype == torch.bfloat16
    torch.testing.assert_close(again.text, classifier.text)


def test_an_adapters_model_is_loaded_with_its_own_weights(saved, tiny, monkeypatch):
    asked = []

    def load_clip(*words):
        asked.append(words)
        return tiny

    monkeypatch.setattr(common, "load_clip", load_clip)
    _, facts = common.load_adapter(saved[0], "m", [])
    common.adapted_classifier({**facts, "pretrained": "laion2b"}, "cpu", "float32")
    assert asked == [("tiny", "laion2b", "cpu")]


def test_a_model_that_squashes_images_is_refused(tiny, monkeypatch):
    clip, config = copy.deepcopy(tiny)
    config["preprocess_cfg"]["resize_mode"] = "squash"
    monkeypatch.setattr(common, "load_tiny", lambda: (clip, config))
    with pytest.raises(common.Fault, match="squashes"):
        common.load_clip("tiny")


@pytest.mark.parametrize("change", [{"vocab_size": 32000}, {"hf_tokenizer_name": "x"}])
def test_a_tokenizer_that_is_not_clips_is_refused(tiny, monkeypatch, change):
    clip, config = copy.deepcopy(tiny)
    config["model_cfg"]["text_cfg"].update(change)
    monkeypatch.setattr(common, "load_tiny", lambda: (clip, config))
    with pytest.raises(common.Fault, match="not CLIP's tokenizer"):
        common.load_clip("tiny")


@pytest.mark.parametrize("gone", ["method", "model", "pretrained", "names", "template", "weights"])
def test_an_adapter_that_lacks_a_key_is_a_fault_that_names_it(saved, gone):
    tensors, facts = common.load_adapter(saved[0], "m", [])
    del facts[gone]
    path = saved[0] / "adapter.safetensors"
    path.write_bytes(safetensors.torch.save(tensors, facts))
    with pytest.raises(common.Fault, match=f"does not say its {gone};"):
        common.load_adapter(path, "m", ["weights"])


def test_an_adapter_on_another_dataset_is_noted(saved, tmp_path, capsys):
    _, facts = common.load_adapter(saved[0], "m", [])
    common.check_model(facts, run_args(tmp_path))
    assert capsys.readouterr().out == ""
    common.check_model(facts, run_args(tmp_path, dataset="dtd"))
    assert capsys.readouterr().out == (
        "note: this adapter was trained on embedded; --dataset is dtd\n"
    )


# ------------------------------------------------------------------------------------------------
# Export
# ------------------------------------------------------------------------------------------------


def test_an_exported_folder_gives_open_clip_the_same_logits(
    classifier, embedded, images, tmp_path, files_in
):
    folder = tmp_path / "x"
    common.export(classifier.clip, classifier.config, folder)
    assert files_in(tmp_path) == ["x/open_clip_config.json", "x/open_clip_model.safetensors"]
    assert folder.stat().st_mode & 0o777 == 0o755
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    assert set(theirs.state_dict()) == set(classifier.clip.state_dict())
    again = common.Classifier(theirs.eval(), classifier.config, embedded.classes, embedded.template)
    torch.testing.assert_close(again(images[0]), classifier(images[0]), rtol=1e-5, atol=1e-5)


def test_an_exported_folder_has_the_models_own_configuration(tiny, tmp_path):
    common.export(*tiny, tmp_path / "x")
    written = json.loads((tmp_path / "x" / "open_clip_config.json").read_text())
    assert written == json.loads((common.HERE / "tiny" / "open_clip_config.json").read_text())


def test_an_exported_folder_loads_here_and_exports_to_the_same_bytes(tiny, tmp_path):
    common.export(*tiny, tmp_path / "x")
    common.export(*common.load_clip(f"local-dir:{tmp_path / 'x'}"), tmp_path / "y")
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes()


def test_export_refuses_a_folder_with_files(tiny, tmp_path, files_in):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").write_text("")
    with pytest.raises(common.Fault, match="not empty"):
        common.export(*tiny, tmp_path / "x")
    assert files_in(tmp_path) == ["x/mine"]


def test_export_fills_an_empty_folder(tiny, tmp_path, files_in):
    (tmp_path / "x").mkdir()
    common.export(*tiny, tmp_path / "x")
    assert files_in(tmp_path) == ["x/open_clip_config.json", "x/open_clip_model.safetensors"]


def test_a_failed_export_leaves_nothing(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(pathlib.Path, "write_bytes", full_disk)
    with pytest.raises(OSError):
        common.export(*tiny, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
