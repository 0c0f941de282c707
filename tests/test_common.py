"""common.py against the published index files, closed forms, and open_clip's own code."""
import errno
import json
import os
import pathlib
import signal
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torchvision
from PIL import Image

import common


# ---------------------------------------------------------------------------------------------------------------------------- few shots
@pytest.mark.parametrize("name, split", [("caltech101", "caltech-101/split_zhou_Caltech101.json"),
                                         ("oxford_pets", "splits/split_zhou_OxfordPets.json")])
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("k", [1, 2, 4, 8, 16])
def test_few_shot_is_the_published_draw(data_root, name, split, k, seed):
    parsed = json.loads((data_root / split).read_text())
    train, val = common.few_shot(parsed["train"], parsed["val"], k, seed)
    published = json.loads((data_root / "fewshot_indices" / name / f"shot_{k}-seed_{seed}.json").read_text())
    for mine, part in ((train, "train"), (val, "val")):
        theirs = published[part]["data"]
        assert len(mine) == len(theirs)
        for (path, label, class_name), item in zip(mine, theirs):
            assert item["impath"].endswith("/" + path) and (item["label"], item["classname"]) == (label, class_name)


def items_of(counts):
    return [common.Item(f"{label}-{i}", label, f"c{label}") for label, n in enumerate(counts) for i in range(n)]


def test_few_shot_gives_all_of_a_small_class():
    train, val = common.few_shot(items_of([5, 2, 4]), items_of([1, 9, 9]), 4, seed=1)
    assert [sum(i.label == c for i in train) for c in range(3)] == [4, 2, 4]
    assert [sum(i.label == c for i in val) for c in range(3)] == [1, 4, 4]
    assert len(set(train)) == len(train)


@pytest.mark.parametrize("n, base", [(2, 1), (5, 3), (10, 5), (101, 51)])
def test_half_is_coops_base_and_new(n, base):
    items = items_of([2] * n)
    data = common.Data([f"c{i}" for i in range(n)], "a {}.", items, items[::2], items)
    parts = {part: common.half(data, part) for part in ("all", "base", "new")}
    assert parts["all"] == data
    assert parts["base"].classes == data.classes[:base] and parts["new"].classes == data.classes[base:]
    for half in (parts["base"], parts["new"]):
        for some in half[2:]:
            assert sorted({i.label for i in some}) == list(range(len(half.classes)))
            assert all(half.classes[i.label] == i.name for i in some)
    seen = [{i.image for i in parts[p].test} for p in ("base", "new")]
    assert not seen[0] & seen[1] and seen[0] | seen[1] == {i.image for i in items}


# ----------------------------------------------------------------------------------------------------------------------------- datasets
def test_caltech101_is_the_published_split(data_root):
    data = common.load_dataset("caltech101", data_root)
    assert [len(part) for part in data[2:]] == [4128, 1649, 2465] and len(data.classes) == 100
    assert data.classes[0] == "face" and not any("_" in name for name in data.classes)
    assert all(item.image.is_file() for item in data.test)


# the protocol's counts of train, val and test images and classes, and prompts for a class `x_y`
PUBLISHED = {
    "caltech101": ((4128, 1649, 2465, 100), "a photo of a x y."),
    "dtd": ((2820, 1128, 1692, 47), "x y texture."),
    "eurosat": ((13500, 5400, 8100, 10), "a centered satellite photo of x y."),
    "oxford_flowers": ((4093, 1633, 2463, 102), "a photo of a x y, a type of flower."),
    "oxford_pets": ((2944, 736, 3669, 37), "a photo of a x y, a type of pet."),
    "stanford_cars": ((6509, 1635, 8041, 196), "a photo of a x y."),
    "ucf101": ((7639, 1898, 3783, 101), "a photo of a person doing x y."),
}
PROMPTS = {**{name: prompt for name, (_, prompt) in PUBLISHED.items()}, "fgvc_aircraft": "a photo of a x y, a type of aircraft.",
           "food101": "a photo of x y, a type of food.", "imagenet": "a photo of a x y.", "sun397": "a photo of a x y.",
           "tiny_imagenet": "a photo of a x y."}


def test_the_prompts_are_the_published_ones():
    assert {name: source.template.format("x y") for name, source in common.DATASETS.items()} == PROMPTS


@pytest.fixture
def layout(data_root, tmp_path):
    """layout(name): CoOp's folder of a dataset with the published split and no image -> root."""
    def make(name):
        source = common.DATASETS[name]
        (tmp_path / source.folder / source.images / "some").mkdir(parents=True)
        there = [p for p in (data_root / "splits" / source.split, data_root / source.folder / source.split) if p.exists()]
        (tmp_path / source.folder / source.split).write_bytes(there[0].read_bytes())
        return tmp_path
    return make


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_splits(layout, name):
    data, source = common.load_dataset(name, root := layout(name)), common.DATASETS[name]
    assert (*map(len, data[2:]), len(data.classes)) == PUBLISHED[name][0]
    assert not any("_" in c for c in data.classes) and sorted({i.label for i in data.train}) == list(range(len(data.classes)))
    assert all(i.image.is_relative_to(root / source.folder / source.images) and data.classes[i.label] == i.name.replace("_", " ") for i in data.test)
    train, val = common.few_shot(data.train, data.val, 16, 1)
    counts = [np.bincount([i.label for i in part], minlength=len(data.classes)) for part in (train, val)]
    assert counts[0].max() == 16 and counts[1].max() == 4 and len(set(train)) == len(train)
    parsed = json.loads((root / source.folder / source.split).read_text())
    parsed["test"][0][0] = "another.jpg"
    (root / source.folder / source.split).write_text(json.dumps(parsed))
    with pytest.raises(common.Fault, match="not the published split"):
        common.load_dataset(name, root)


def test_aircraft_is_read_from_its_own_lists(tmp_path):
    folder = tmp_path / "fgvc_aircraft"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "1.jpg").write_bytes(b"")
    (folder / "variants.txt").write_text("707-320\nF/A-18\n")
    for part, lines in (("train", "0001 F/A-18\n0002 707-320\n"), ("val", "0003 707-320\n"), ("test", "0004 F/A-18\n0005 707-320\n")):
        (folder / f"images_variant_{part}.txt").write_text(lines)
    data = common.load_dataset("fgvc_aircraft", tmp_path)
    assert data.classes == ["707-320", "F/A-18"] and [[i.label for i in part] for part in data[2:]] == [[1, 0], [0], [1, 0]]
    assert data.test[0].image == folder / "images" / "0004.jpg"
    (folder / "variants.txt").unlink()
    with pytest.raises(common.Fault, match="cannot be read"):
        common.load_dataset("fgvc_aircraft", tmp_path)


def test_imagenet_is_read_from_its_folders(tmp_path):
    folder = tmp_path / "imagenet"
    for part, n in (("train", 3), ("val", 2)):
        for wnid in ("n02", "n01"):
            (folder / "images" / part / wnid).mkdir(parents=True)
            for i in range(n):
                (folder / "images" / part / wnid / f"{wnid}_{i}.JPEG").write_bytes(b"")
    (folder / "classnames.txt").write_text("n01 great white shark\nn02 tench\n")
    data = common.load_dataset("imagenet", tmp_path)
    assert data.classes == ["great white shark", "tench"] and [len(part) for part in data[2:]] == [6, 4, 4]
    assert data.train[0].image == folder / "images" / "train" / "n01" / "n01_0.JPEG" and data.val == data.test


def test_tiny_imagenet_is_the_published_one(data_root):
    data = common.load_dataset("tiny_imagenet", data_root)
    assert len(data.classes) == 200 and len(data.test) == 10_000 and data.classes[0] == "goldfish"
    assert all(i.image.is_file() for i in data.test[::500]) and np.bincount([i.label for i in data.test]).tolist() == [50] * 200


@pytest.mark.parametrize("name", [name for name in common.DATASETS if name != "caltech101"])
def test_where_the_images_are_not_the_sentence_says_where_to_get_them(tmp_path, name):
    source = common.DATASETS[name]
    with pytest.raises(common.Fault, match="is missing") as fault:
        common.load_dataset(name, tmp_path, download=False)
    assert str(tmp_path / source.folder / source.images) in str(fault.value) and source.origin in str(fault.value)
    if not source.origin.isalnum():    # torchvision cannot: never tried
        with pytest.raises(common.Fault, match="http|DATASETS.md"):
            common.load_dataset(name, tmp_path)
    else:
        assert hasattr(torchvision.datasets, source.origin)


def test_embedded_is_balanced(embedded):
    for part, each in zip(embedded[2:], (16, 4, 20)):
        assert np.bincount([i.label for i in part]).tolist() == [each] * 10


def test_folder_splits_every_class(tmp_path, picture_folder):
    data = common.load_folder(picture_folder(tmp_path / "d", ("b_x", "a"), 10))
    assert data.classes == ["a", "b x"]
    for label, folder in enumerate(("a", "b_x")):
        parts = [{i.image for i in part if i.label == label} for part in data[2:]]
        assert [len(p) for p in parts] == [5, 2, 3]
        assert set.union(*parts) == set((tmp_path / "d" / folder).iterdir())
    assert common.load_folder(tmp_path / "d") == data, "the split must not change between runs"


def test_folder_takes_names_from_classnames_txt(tmp_path, picture_folder):
    picture_folder(tmp_path / "d", ("n02", "n01"))
    (tmp_path / "d" / "classnames.txt").write_text("tabby cat\n\nsled dog\n")
    data = common.load_folder(tmp_path / "d")
    assert data.classes == ["tabby cat", "sled dog"]
    assert {i.name for i in data.test if "n01" in str(i.image)} == {"tabby cat"}


def test_test_view_is_open_clips(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 131, 3), dtype=np.uint8))
    picture.save(tmp_path / "p.png")
    x, y = common.test_set([common.Item(tmp_path / "p.png", 3, "c")], 64)
    theirs = open_clip.image_transform(64, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))(picture)
    assert x.dtype == torch.uint8 and y.tolist() == [3]
    torch.testing.assert_close(x[0] / 255, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("augment", ["crop", "none"])
def test_batches_cover_every_epoch(embedded, augment):
    items = [item._replace(label=i) for i, item in enumerate(embedded.train[:12])]
    args = SimpleNamespace(batch_size=4, device="cpu", augment=augment)
    torch.manual_seed(0)
    drawn = list(common.batches(items, 64, args, steps=6))
    assert len(drawn) == 6 and all(x.shape == (4, 3, 64, 64) and x.min() >= 0 and 0.5 < x.max() <= 1 for x, _ in drawn)
    epochs = [torch.cat([y for _, y in drawn[i:i + 3]]).tolist() for i in (0, 3)]
    assert [sorted(e) for e in epochs] == [list(range(12))] * 2 and epochs[0] != epochs[1]
    views, _ = common.test_set(items, 64)
    for x, y in drawn:
        assert torch.equal(x, views[y] / 255) == (augment == "none")
    args.batch_size = 32
    assert [len(y) for _, y in common.batches(items, 64, args, steps=2)] == [12, 12]


def test_limit_is_a_fixed_subset(embedded):
    args = SimpleNamespace(split="val", test_limit=7)
    x, y = common.test_split(embedded, args, 64)
    again, _ = common.test_split(embedded, args, 64)
    full, _ = common.test_set(embedded.val, 64)
    assert len(y) == 7 and torch.equal(x, again)
    assert all((full == picture).flatten(1).all(1).any() for picture in x)


# ----------------------------------------------------------------------------------------------------------------------- the classifier
def test_classifier_is_scaled_cosine_of_normalised_pixels(tiny, embedded, images):
    clip, config = tiny
    x, _ = images
    net = common.Classifier(clip, config, embedded.classes, "a photo of a {}.")
    cfg = config["preprocess_cfg"]
    mean, std = (torch.tensor(cfg[k]).reshape(1, 3, 1, 1) for k in ("mean", "std"))
    tokenizer = open_clip.SimpleTokenizer(context_length=config["model_cfg"]["text_cfg"]["context_length"])
    tokens = tokenizer([f"a photo of a {c}." for c in embedded.classes])
    untouched, _ = common.load_clip("tiny")    # batch first, as open_clip made it
    z, t = untouched.encode_image((x - mean) / std), untouched.encode_text(tokens)
    expected = clip.logit_scale.exp() * torch.cosine_similarity(z[:, None], t[None], dim=-1)
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)
    assert untouched.visual.transformer.batch_first and not any(getattr(part, "batch_first", False) for part in clip.visual.modules())
    scaled = common.Classifier(clip, config, embedded.classes, "a photo of a {}.", scale=100.0)(x)
    torch.testing.assert_close(scaled, 100 * expected / clip.logit_scale.exp(), rtol=1e-4, atol=1e-3)
    assert not net.training and not any(p.requires_grad for p in net.parameters())


def test_bfloat16_gives_float32_logits_close_to_float32(tiny, embedded, images):
    low, full = (common.Classifier(*tiny, embedded.classes, embedded.template, dtype)(images[0]) for dtype in ("bfloat16", "float32"))
    assert low.dtype == torch.float32 and 0 < (low - full).abs().max() < 0.05 * tiny[0].logit_scale.exp()


@pytest.mark.parametrize("attention, flash", [("auto", False), ("torch", True)])
def test_the_fast_attention_on_cpu_is_chosen_and_can_be_switched_off(attention, flash):
    parser = common.Parser()
    common.add_arguments(parser)
    try:
        common.parse(parser, ["--device", "cpu", "--attention", attention])
        assert torch.backends.cuda.flash_sdp_enabled() == flash
    finally:
        torch.backends.cuda.enable_flash_sdp(False)


# -------------------------------------------------------------------------------------------------------------------------------- files
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
def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch, files_in, where, old):
    path = tmp_path / "b.json"
    if old:
        path.write_bytes(old)
    if where == "rename":
        monkeypatch.setattr(os, "replace", full_disk)
    else:
        whole = pathlib.Path.write_bytes
        monkeypatch.setattr(pathlib.Path, "write_bytes", lambda self, content: whole(self, content[:2]) and full_disk())
    with pytest.raises(OSError):
        common.write(path, b"new")
    monkeypatch.undo()
    assert files_in(tmp_path) == (["b.json"] if old else []) and (not old or path.read_bytes() == old)


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
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL and path.read_bytes() == b"old"


@pytest.mark.parametrize("fault, words", [
    (common.Fault("two\nlines"), "two lines"), (OSError(errno.ENOSPC, "No space left on device"), "disk is full"),
    (PermissionError(errno.EACCES, "Permission denied", "/x/y"), "/x/y"), (KeyboardInterrupt(), "interrupted")])
def test_guard_says_one_sentence_and_exits_2(capsys, fault, words):
    def main():
        raise fault
    with pytest.raises(SystemExit) as stop:
        common.guard(main)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_guard_lets_bugs_through():
    with pytest.raises(ZeroDivisionError):
        common.guard(lambda: 1 / 0)


def test_describe_needs_no_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    facts = common.describe(SimpleNamespace(out=tmp_path, eps=0.5), "m")
    assert (facts["method"], facts["eps"]) == ("m", 0.5) and facts["versions"]["torch"] == torch.__version__
    assert str(tmp_path) not in str(facts), "a result file names no folder of the machine that made it"


def test_an_adapter_carries_its_metadata(tmp_path):
    tensors = {"a": torch.arange(5, dtype=torch.uint8)}
    common.save_adapter(tmp_path / "adapter.safetensors", tensors, {"method": "m", "model": "tiny", "pretrained": "openai", "shots": 4})
    for path in (tmp_path, tmp_path / "adapter.safetensors"):
        back, metadata = common.load_adapter(path, "m", SimpleNamespace(model="tiny", pretrained="openai"))
        assert torch.equal(back["a"], tensors["a"]) and metadata["shots"] == "4"
    for method, model, pretrained in (("other", "tiny", "openai"), ("m", "ViT-B-32", "openai"), ("m", "tiny", "none")):
        with pytest.raises(common.Fault, match="was made with"):
            common.load_adapter(tmp_path, method, SimpleNamespace(model=model, pretrained=pretrained))


# ------------------------------------------------------------------------------------------------------------------------------- export
def test_an_exported_folder_gives_the_same_logits(tiny, classifier, images, embedded, tmp_path):
    clip, config = tiny
    common.export(clip, config, tmp_path / "x")
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o755 and [p.name for p in tmp_path.iterdir()] == ["x"]
    written, stored = (json.loads((folder / "open_clip_config.json").read_text()) for folder in (tmp_path / "x", common.HERE / "tiny"))
    assert written == stored
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'x'}")
    assert set(theirs.state_dict()) == set(clip.state_dict())
    logits = common.Classifier(theirs.eval(), config, embedded.classes, embedded.template)(images[0])
    torch.testing.assert_close(logits, classifier(images[0]), rtol=1e-5, atol=1e-5)
    # and through this house's own loader, to be exported again
    clip, config = common.load_clip(f"local-dir:{tmp_path / 'x'}")
    common.export(clip, config, tmp_path / "y")
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes()


def test_export_refuses_a_folder_with_files(tiny, tmp_path, files_in):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").write_text("")
    with pytest.raises(common.Fault, match="not empty"):
        common.export(*tiny, tmp_path / "x")
    assert files_in(tmp_path) == ["x/mine"]
