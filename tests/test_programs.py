"""The programs end to end: what they write and print, that a seed fixes every bit, and what broken
input, a full disk and a kill leave behind."""

import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import safetensors
import safetensors.torch
import torch
from conftest import assert_fault, result_in
from PIL import Image

import common

HERE = pathlib.Path(__file__).resolve().parent.parent
PROGRAMS = {"advmask": "AdvMask", "advlora": "AdvLoRA", "baselines.tecoa": "TeCoA"}
METHODS = {name: name.rpartition(".")[2] for name in PROGRAMS}  # as files and adapters name them
SIZES = {"advmask": "masked", "advlora": "trained", "baselines.tecoa": "trained"}
LIMIT = 16
SHORT = ("--steps", 4, "--batch-size", 6, "--test-steps", 3, "--test-limit", LIMIT)
TINIEST = ("--steps", 1, "--batch-size", 2, "--test-steps", 1, "--test-limit", 2)


# ------------------------------------------------------------------------------------------------
# What the tests of the protocols use, too
# ------------------------------------------------------------------------------------------------


def adapter_in(folder):
    """The one adapter file under this folder."""
    (path,) = folder.rglob("adapter.safetensors")
    return path


def same_tensors(first, second):
    """Do two adapter files hold the same bits under the same names?"""
    one, other = safetensors.torch.load_file(first), safetensors.torch.load_file(second)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def unflagged(evaluation):
    """An evaluation without the flags of the sanity checks, which some runs here leave out."""
    return {key: value for key, value in evaluation.items() if key != "flags"}


def measured_again(exported, data, result):
    """The evaluation of an exported small CLIP, built by open_clip, on a run's test images."""
    clip, _, _ = open_clip.create_model_and_transforms(f"local-dir:{exported}")
    _, config = common.load_clip("tiny")
    clip = clip.eval().requires_grad_(False)
    net = common.Classifier(clip, config, data.classes, data.template, result["dtype"])
    items = random.Random(0).sample(data.test, result["test_limit"])
    images = common.TestImages(items, net.size)
    return unflagged(common.evaluate(net, images, result["eps"], result["test_steps"]))


# ------------------------------------------------------------------------------------------------
# Ways to run
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def unevaluated(monkeypatch):
    """It is a failure if anything is evaluated or trained."""

    def too_late(*_, **__):
        pytest.fail("a fault of the input is known before anything is evaluated or trained")

    monkeypatch.setattr(common, "evaluate", too_late)
    monkeypatch.setattr(common, "batches", too_late)


def shell(name, *arguments, cwd):
    """`python NAME.py arguments`, or `python -m NAME arguments`, started in a process."""
    program = ["-m", name] if "." in name else [HERE / f"{name}.py"]
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


# ------------------------------------------------------------------------------------------------
# A run, its files, its table
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """finished(name) -> folder of a short run in a process of its own, and what it printed."""
    done = {}

    def run_once(name):
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            arguments = *SHORT, "--export", folder / "exported" / "x"
            if "." in name:  # a baseline runs from the root of the repository
                process = shell(name, *arguments, "--out", folder / "runs", cwd=HERE)
            else:
                process = shell(name, *arguments, cwd=folder)
            out, err = process.communicate()
            assert process.returncode == 0, err
            done[name] = folder, out
        return done[name]

    return run_once


@pytest.fixture(params=PROGRAMS)
def run(request, finished):
    """The same, for every program -> program, folder, what it printed."""
    return request.param, *finished(request.param)


def test_a_run_leaves_its_files(run, files_in):
    name, folder, out = run
    place = f"runs/{METHODS[name]}-embedded-tiny-16shot-seed1"
    assert files_in(folder) == [
        "exported/x/open_clip_config.json",
        "exported/x/open_clip_model.safetensors",
        f"{place}/adapter.safetensors",
        f"{place}/result.json",
    ]
    assert out.splitlines()[-1].endswith(place)


def test_the_table_that_is_printed_is_the_result(run):
    name, folder, out = run
    result = result_in(folder)
    for key, label in (("before", "zero-shot"), ("after", PROGRAMS[name])):
        evaluation = result[key]
        (row,) = [line for line in out.splitlines() if line.startswith(label) and "|" in line]
        printed = row.replace("(", "|").replace(")", "|").replace("to", "|").split("|")[1:]
        printed = [float(text) for text in printed if text.strip()]
        clean, pgd = evaluation["intervals"]["clean"], evaluation["intervals"]["pgd"]
        expected = [evaluation["clean"], *clean, evaluation["pgd"], *pgd]
        assert printed == pytest.approx(expected, abs=0.051)
        # and both are what the images gave
        outcomes = evaluation["outcomes"]
        assert len(outcomes) == LIMIT
        assert evaluation["clean"] == pytest.approx(100 - 100 * outcomes.count("0") / LIMIT)
        assert evaluation["pgd"] == pytest.approx(100 * outcomes.count("2") / LIMIT)
    assert result["before"]["outcomes"] != result["after"]["outcomes"]
    before = result["before"]
    assert f"zero-shot: clean {before['clean']:.2f}, PGD-3 {before['pgd']:.2f}" in out


def test_the_result_tells_how_it_was_made(run):
    name, folder, out = run
    result = result_in(folder)
    assert (result["method"], result["model"], result["dataset"]) == (
        METHODS[name],
        "tiny",
        "embedded",
    )
    assert (result["shots"], result["seed"], result["eps"]) == (16, 1, common.TINY_EPS)
    assert (result["steps"], result["test_steps"], result["test_limit"]) == (4, 3, LIMIT)
    assert result["versions"]["torch"] == torch.__version__
    assert result["peak_memory_mib"] > 100
    assert 0 < result["training_seconds"] < result["seconds"]
    sizes = {"advmask": 884_736, "advlora": 6 * (18 * 8 * 192 + 6), "baselines.tecoa": 2_768_640}
    assert result[SIZES[name]] == sizes[name]
    assert f"{sizes[name]:,}" in out
    assert "vision 2,768,640 / total 9,922,049 parameters" in out
    assert "step 4/4" in out and "160 training images, 64 px, eps 3/255" in out
    if name == "advmask":
        assert 0 < result["off"] < 1
    if name == "advlora":
        # in_proj counts as three matrices
        assert sorted(len(shares) for shares in result["residual"].values()) == 18 * [1] + 6 * [3]


def test_the_adapter_tells_how_it_was_made(run, embedded):
    name, folder, _ = run
    with safetensors.safe_open(adapter_in(folder), "pt") as file:
        facts = file.metadata()
    expected = {"method": METHODS[name], "model": "tiny", "seed": "1", "shots": "16", "steps": "4"}
    assert {key: facts[key] for key in expected} == expected
    assert json.loads(facts["names"]) == embedded.classes


def test_load_gives_the_same_accuracies_and_nothing_before(run, program, unchecked, tmp_path):
    name, folder, _ = run
    answer = program(name, *SHORT, "--load", adapter_in(folder), "--out", tmp_path)
    assert answer.code == 0, answer.err
    first, loaded = result_in(folder), result_in(tmp_path)
    assert unflagged(loaded["after"]) == unflagged(first["after"])
    assert loaded["before"] is None and "zero-shot" not in answer.out
    assert [line for line in answer.out.splitlines() if line.startswith(PROGRAMS[name])]
    for key in (SIZES[name], "off"):
        assert loaded.get(key) == first.get(key)


def test_the_export_is_the_model_that_was_measured(run, unchecked, embedded):
    _, folder, _ = run
    result = result_in(folder)
    again = measured_again(folder / "exported" / "x", embedded, result)
    assert again == unflagged(result["after"])
    assert again != unflagged(result["before"])


def test_the_same_seed_gives_the_same_bits_and_another_does_not(run, program, unchecked, tmp_path):
    name, folder, _ = run
    for seed in (1, 2):
        answer = program(name, *SHORT, "--seed", seed, "--out", tmp_path / str(seed))
        assert answer.code == 0, answer.err
    first = adapter_in(folder)
    assert same_tensors(first, adapter_in(tmp_path / "1"))
    assert unflagged(result_in(tmp_path / "1")["after"]) == unflagged(result_in(folder)["after"])
    assert not same_tensors(first, adapter_in(tmp_path / "2"))


RIVALS = {
    "baselines.tgazsr": (),
    "baselines.advvp": (),
    "baselines.prompts": ("--method", "fap"),
}


@pytest.mark.parametrize("augment", ["crop", "none"])
@pytest.mark.parametrize("name", [*PROGRAMS, *RIVALS])
def test_the_batches_are_those_of_the_arguments(program, monkeypatch, tmp_path, name, augment):
    asked = []

    def batches(images, size, *rest):
        asked.append((len(images), images[0][0].shape[1], size, *rest))
        raise common.Fault("that is enough")

    monkeypatch.setattr(common, "batches", batches)
    monkeypatch.setattr(common, "measure", lambda *_: {"clean": 0, "pgd": 0})
    few = ("--steps", 3, "--batch-size", 6, "--augment", augment, "--device", "cpu")
    program(name, *RIVALS.get(name, ()), *few, "--out", tmp_path)
    height = {"crop": 80, "none": 64}[augment]
    assert asked == [(160, height, 64, 6, 3, augment, "cpu")]


# ------------------------------------------------------------------------------------------------
# Variants
# ------------------------------------------------------------------------------------------------

BOTH = 6 * (18 * 4 * 192 + 6) + 4 * (18 * 4 * 128 + 6)
VARIANTS = {
    "MLP": ("advmask", ("--weights", "mlp", "--loss", "kl", "--budget", 3), 6 * 8 * 192**2),
    "both towers": ("advlora", ("--towers", "both", "--rank", 4, "--lr", 1e-2), BOTH),
    "plain LoRA": (
        "advlora",
        ("--init", "kaiming", "--no-align", "--no-adaptive", "--lr", 1e-2),
        6 * 18 * 8 * 192,
    ),
    "published": ("baselines.tecoa", ("--published", "--lr", 1e-2), 2_768_640),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_loads_and_exports_what_it_measured(
    program, unchecked, tmp_path, embedded, variant
):
    name, arguments, size = VARIANTS[variant]
    exported = tmp_path / "x"
    answer = program(name, *SHORT, *arguments, "--out", tmp_path / "run", "--export", exported)
    assert answer.code == 0, answer.err
    result = result_in(tmp_path / "run")
    assert result[SIZES[name]] == size
    assert result["after"] != result["before"]
    assert measured_again(exported, embedded, result) == unflagged(result["after"])
    loaded = ["--load", tmp_path / "run" / adapter_in(tmp_path / "run").parent.name]
    if name == "advlora":
        loaded += ["--rank", 1000]  # not used: the file brings its own
    answer = program(
        name, *SHORT, *loaded, "--out", tmp_path / "loaded", "--export", tmp_path / "y"
    )
    assert answer.code == 0, answer.err
    assert "classes, 0 training images" in answer.out  # none is decoded
    first, second = (path / "open_clip_model.safetensors" for path in (exported, tmp_path / "y"))
    assert first.read_bytes() == second.read_bytes()
    again = result_in(tmp_path / "loaded")
    for key in ("after", SIZES[name], "weights", "towers", "rank", "no_adaptive"):
        assert again.get(key) == result.get(key)
    for key in ("steps", "init", "seed", "commit"):
        assert again["adapter"].get(key, "None") == str(result.get(key))
    assert "adapter" not in result


# A short training of the small CLIP on the embedded data, measured on the first test images:
# points of accuracy under PGD-5 that it wins at least
TRAINING = ("--steps", 14, "--batch-size", 12, "--test-steps", 5, "--test-limit", 32)
FAST = {"advmask": ("--budget", 3), "advlora": ("--lr", 2e-3), "baselines.tecoa": ()}
ROBUST_GAIN = 5


@pytest.mark.numbers
@pytest.mark.parametrize("name", PROGRAMS)
def test_training_wins_robust_accuracy(program, tmp_path, name):
    answer = program(name, *TRAINING, *FAST[name], "--out", tmp_path)
    assert answer.code == 0, answer.err
    result = result_in(tmp_path)
    assert result["after"]["pgd"] >= result["before"]["pgd"] + ROBUST_GAIN
    assert result["after"]["clean"] > result["after"]["pgd"]
    assert result["after"]["flags"] == []


def test_a_run_in_which_nothing_is_switched_off_says_so(program, unchecked, tmp_path):
    answer = program("advmask", *TINIEST, "--budget", 0, "--out", tmp_path)
    assert answer.code == 0, answer.err
    result = result_in(tmp_path)
    assert result["off"] == 0
    (warning,) = [line for line in answer.out.splitlines() if line.startswith("WARNING")]
    assert "plain CLIP" in warning
    assert result["after"] == result["before"]


# ------------------------------------------------------------------------------------------------
# Faults of the input
# ------------------------------------------------------------------------------------------------

CALTECH = "--model", "tiny", "--dataset", "caltech101", "--data-root"
FOLDER = "--model", "tiny", "--dataset", "folder", "--data-root"


def corrupt_image(path, make):
    image = make(path / "d") / "cat" / "1.png"
    image.write_bytes(image.read_bytes()[:100])
    return *FOLDER, path / "d"


def three_names_for_two(path, make):
    (make(path / "d") / "classnames.txt").write_text("cat\ndog\nemu\n")
    return *FOLDER, path / "d"


def folders_of_a_split(path, make):
    for part in ("train", "val", "test"):
        make(path / "d" / part)
    return *FOLDER, path / "d"


def deep_image(path, make):
    deep = np.full((40, 40), 30_000, np.uint16)
    Image.fromarray(deep).save(make(path / "d") / "cat" / "1.png")
    return *FOLDER, path / "d"


def results_among_the_classes(path, make):
    return *FOLDER, make(path / "d"), "--out", path / "d" / "runs"


def results_as_classes(path, make):
    return *FOLDER, make(path / "d"), "--out", path / "d"


def another_set_beside_a_folder(path, make):
    return *FOLDER, make(path / "d"), "--transfer", "eurosat"


def names_in_latin_1(path, make):
    (make(path / "d") / "classnames.txt").write_bytes("cat\nchâteau\n".encode("latin-1"))
    return *FOLDER, path / "d"


def below_a_file(path, make):
    (path / "file").write_text("")
    return "--out", path / "file" / "runs"


def data_below_a_file(path, make):
    (path / "file").write_text("")
    return *CALTECH, path / "file" / "data"


def export_below_a_file(path, make):
    (path / "file").write_text("")
    return "--export", path / "file" / "x"


def export_where_the_results_are(path, make):
    return "--out", path / "r", "--export", path / "r"


def export_where_nothing_can_be_written(path, make):
    return "--export", "/proc/nowhere/x"


def no_weights(path, make):
    (path / "m").mkdir()
    config = HERE / "tiny" / "open_clip_config.json"
    (path / "m" / "open_clip_config.json").write_text(config.read_text())
    return "--model", f"local-dir:{path / 'm'}"


def full_export(path, make):
    (path / "x").mkdir()
    (path / "x" / "mine").write_text("")
    return "--export", path / "x"


def one_sub_folder(path, make):
    return *FOLDER, make(path / "d", ("cat",))


def two_images(path, make):
    return *FOLDER, make(path / "d", n=2)


def no_data(path, make):
    return *CALTECH, path / "d"


def garbage(path, make):
    (path / "a.safetensors").write_bytes(b"\xff" * 100)
    return "--load", path / "a.safetensors"


def no_text_transformer(path, make):
    _, config = common.load_clip("tiny")
    clip = open_clip.CustomTextCLIP(**config["model_cfg"])  # keeps its text tower elsewhere
    config["model_cfg"]["custom_text"] = True
    common.export(clip, config, path / "custom")
    return "--model", f"local-dir:{path / 'custom'}"


def text_tower_elsewhere(path, make):
    return *no_text_transformer(path, make), "--towers", "both"


def prompts_without_text_transformer(path, make):
    return *no_text_transformer(path, make), "--method", "fap"


def pooled_by_attention(path, make):
    _, config = common.load_clip("tiny")
    config["model_cfg"]["vision_cfg"]["attentional_pool"] = True
    common.export(open_clip.CLIP(**config["model_cfg"]), config, path / "pooled")
    return "--model", f"local-dir:{path / 'pooled'}"


# what is wrong -> arguments, or a function that makes them, and words of the sentence
FAULTS = {
    "no data": (no_data, ["d/caltech-101/101_ObjectCategories", "--data-root"]),
    "data below a file": (data_below_a_file, ["file/data"]),
    "no folder": ((*FOLDER, "/nonexistent/data"), ["/nonexistent/data", "sub-folder"]),
    "one sub-folder": (one_sub_folder, ["1 sub-folders", "at least 2"]),
    "two images": (two_images, ["cat has too few images, 2;", "at least 3"]),
    "corrupt image": (corrupt_image, ["1.png", "cannot be read"]),
    "folders of a split": (folders_of_a_split, ["split, test", "one folder per class"]),
    "image of 16 bits": (deep_image, ["1.png", "more than 8 bits"]),
    "results among the classes": (results_among_the_classes, ["--out", "d/runs lies in", "/d,"]),
    "results as classes": (results_as_classes, ["--out", "/d lies in", "choose another"]),
    "another set beside a folder": (another_set_beside_a_folder, ["--transfer eurosat"]),
    "three names for two": (three_names_for_two, ["classnames.txt names 3", "2 sub-folders"]),
    "names not in UTF-8": (names_in_latin_1, ["classnames.txt", "UTF-8"]),
    "unknown dataset": (("--dataset", "mnist"), ["--dataset", "'mnist'", "caltech101"]),
    "unknown model": (("--model", "ViT-Z-99"), ["ViT-Z-99", "ViT-B-32-quickgelu"]),
    "no transformer": (("--model", "RN50-quickgelu", "--pretrained", "none"), ["RN50", "ViT"]),
    "no such model folder": (("--model", "local-dir:/nonexistent"), ["/nonexistent", "--export"]),
    "other activation": (("--model", "ViT-B-32"), ["--model ViT-B-32-quickgelu"]),
    "no shots": (("--shots", "0"), ["--shots", "at least 1", "'0'"]),
    "many shots": (("--shots", "many"), ["--shots", "'many'"]),
    "no steps": (("--steps", "0"), ["--steps", "at least 1", "'0'"]),
    "no test steps": (("--test-steps", "0"), ["--test-steps", "at least 1", "'0'"]),
    "eps -1": (("--eps", "-1"), ["--eps", "'-1'"]),
    "eps nan": (("--eps", "nan"), ["--eps", "'nan'"]),
    "eps 1/0": (("--eps", "1/0"), ["--eps", "'1/0'"]),
    "eps 8": (("--eps", "8"), ["--eps 8", "8/255"]),
    "float16": (("--dtype", "float16"), ["float16", "bfloat16"]),
    "unknown argument": (("--epsilon", "1"), ["--epsilon", "--help"]),
    "no such device": (("--device", "nonsense"), ["'nonsense'", "--device cpu"]),
    "device without data": (("--device", "meta"), ["'meta'", "--device cpu"]),
    "seed too large": (("--seed", str(2**70)), ["--seed", str(2**70)]),
    "out below a file": (below_a_file, ["file/runs", "--out"]),
    "export below a file": (export_below_a_file, ["--export", "below a file"]),
    "no weights": (no_weights, ["local-dir:", "could not"]),
    "export in the results": (export_where_the_results_are, ["--export", "not empty"]),
    "export in /proc": (export_where_nothing_can_be_written, ["cannot write", "/proc/nowhere/x"]),
    "full export": (full_export, ["--export", "not empty"]),
    "no adapter": (("--load", "/nonexistent/a"), ["/nonexistent/a", "does not exist"]),
    "garbage adapter": (garbage, ["a.safetensors", "cannot be read"]),
}
OWN_FAULTS = {
    ("advmask", "lam inf"): (("--lam", "inf"), ["--lam", "'inf'"]),
    ("advmask", "budget nan"): (("--budget", "nan"), ["--budget", "'nan'"]),
    ("advmask", "unknown loss"): (("--loss", "mse"), ["--loss", "lafa"]),
    ("advlora", "rank 0"): (("--rank", "0"), ["--rank", "at least 1", "'0'"]),
    ("advlora", "rank 1000"): (("--rank", "1000"), ["--rank 1000", "192"]),
    ("advlora", "rank 150 of text"): (("--rank", "150", "--towers", "both"), ["150", "128"]),
    ("advlora", "no text transformer"): (text_tower_elsewhere, ["--towers vision"]),
    ("baselines.prompts", "no text transformer"): (
        prompts_without_text_transformer,
        ["no text transformer", "--model"],
    ),
    ("baselines.tgazsr", "pooled by attention"): (
        pooled_by_attention,
        ["pools", "by attention", "--model"],
    ),
    ("advlora", "unknown start"): (("--init", "gaussian"), ["--init", "kaiming"]),
    ("advlora", "clean weight -1"): (("--clean-weight", "-1"), ["--clean-weight", "'-1'"]),
    ("baselines.tecoa", "lr nan"): (("--lr", "nan"), ["--lr", "'nan'"]),
}
ALL_FAULTS = dict(OWN_FAULTS)
for program_name in PROGRAMS:
    for fault in FAULTS:
        ALL_FAULTS[program_name, fault] = FAULTS[fault]


@pytest.mark.parametrize("name, fault", ALL_FAULTS)
def test_a_faulty_input_is_one_sentence_and_no_file(
    program, unevaluated, picture_folder, monkeypatch, tmp_path, files_in, name, fault
):
    arguments, words = ALL_FAULTS[name, fault]
    if fault == "other activation":
        told = "it must refuse before it loads, or downloads"
        load = "create_model"
        monkeypatch.setattr(open_clip, load, lambda *_, **__: pytest.fail(told))
    if callable(arguments):
        arguments = arguments(tmp_path, picture_folder)
    answer = program(name, *TINIEST, "--out", tmp_path / "out", *arguments)
    assert_fault(answer, *words)
    assert files_in(tmp_path / "out") == []


def test_a_missing_checkpoint_is_one_sentence_in_a_process_of_its_own(tmp_path, files_in):
    # here, because open_clip logs to stderr as well
    checkpoint = "--model", "ViT-B-32-quickgelu", "--pretrained", "/nonexistent/model.pt"
    process = shell("advmask", *TINIEST, *checkpoint, cwd=tmp_path)
    _, err = process.communicate()
    assert process.returncode == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and "/nonexistent/model.pt" in err
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("name", ["advlora", "baselines.tecoa"])
def test_a_training_that_diverges_is_one_sentence_and_no_file(
    program, unchecked, tmp_path, files_in, name
):
    far = ("--steps", 6, "--lr", 1e9)
    answer = program(name, *TINIEST, *far, "--out", tmp_path / "out")
    assert_fault(answer, "diverged", "a lower rate")
    assert files_in(tmp_path) == []


# ------------------------------------------------------------------------------------------------
# Adapters that are not this program's, or not whole
# ------------------------------------------------------------------------------------------------


def tampered(source, target, change):
    """Write an adapter file again, after change(tensors, metadata)."""
    tensors = safetensors.torch.load_file(source)
    with safetensors.safe_open(source, "pt") as file:
        facts = file.metadata()
    change(tensors, facts)
    safetensors.torch.save_file(tensors, target, facts or None)


def of_another_model(tensors, facts):
    facts["model"] = "ViT-B-32-quickgelu"


def of_other_weights(tensors, facts):
    facts["pretrained"] = "laion2b"


def without_template(tensors, facts):
    del facts["template"]


def without_metadata(tensors, facts):
    facts.clear()


def without_a_tensor(tensors, facts):
    del tensors[min(tensors)]


def with_one_too_many(tensors, facts):
    tensors["more"] = torch.zeros(3)


def with_a_short_tensor(tensors, facts):
    key = min(tensors)
    tensors[key] = tensors[key][:-1].clone()


def of_unknown_weights(tensors, facts):
    facts["weights"] = "all"


TAMPERED = {
    of_another_model: ["'ViT-B-32-quickgelu'", "'tiny'"],
    of_other_weights: ["'laion2b'", "'openai'"],
    without_template: ["template"],
    without_metadata: ["method", "model", "template"],
    without_a_tensor: ["does not fit", "--model"],
    with_one_too_many: ["does not fit", "--model"],
    with_a_short_tensor: ["does not fit", "--model"],
    of_unknown_weights: ["does not fit", "all"],
}
# metadata that only some of the programs have
OWN = {of_unknown_weights: ["advmask", "advlora"]}
PAIRS = []
for change in TAMPERED:
    for program_name in OWN.get(change, PROGRAMS):
        PAIRS.append((program_name, change))


@pytest.mark.parametrize("name, change", PAIRS, ids=lambda x: getattr(x, "__name__", x))
def test_an_adapter_that_does_not_fit_is_refused_before_anything_is_evaluated(
    finished, program, unevaluated, tmp_path, files_in, name, change
):
    folder, _ = finished(name)
    tampered(adapter_in(folder), tmp_path / "a.safetensors", change)
    loaded = ("--load", tmp_path / "a.safetensors")
    answer = program(name, *TINIEST, *loaded, "--out", tmp_path / "out")
    assert_fault(answer, *TAMPERED[change])
    assert files_in(tmp_path / "out") == []


def test_an_adapter_cut_short_is_refused_before_anything_is_evaluated(
    run, program, unevaluated, tmp_path, files_in
):
    name, folder, _ = run
    content = adapter_in(folder).read_bytes()
    for length in (0, 50, len(content) - 1):
        (tmp_path / "a.safetensors").write_bytes(content[:length])
        loaded = ("--load", tmp_path / "a.safetensors")
        answer = program(name, *TINIEST, *loaded, "--out", tmp_path / "out")
        assert_fault(answer, "a.safetensors", "cannot be read")
    assert files_in(tmp_path / "out") == []


def test_another_programs_adapter_is_refused_before_anything_is_evaluated(
    run, program, unevaluated, tmp_path, files_in
):
    name, folder, _ = run
    for other in PROGRAMS.keys() - {name}:
        loaded = ("--load", adapter_in(folder))
        answer = program(other, *TINIEST, *loaded, "--out", tmp_path / "out")
        assert_fault(answer, f"made by {METHODS[name]}", f"this is {METHODS[other]}")
    assert files_in(tmp_path / "out") == []


# ------------------------------------------------------------------------------------------------
# Full disks, killed processes
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limit, left",
    [(20_000, []), (300_000, ["adapter.safetensors", "result.json"])],
    ids=["adapter", "export"],
)
def test_a_file_that_cannot_be_written_whole_is_not_written(
    program, unchecked, tmp_path, files_in, limit, left
):
    # a limit on the size of a file stops a write half-way, as a full disk does
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        exported = tmp_path / "x" / "y"
        answer = program("advmask", *TINIEST, "--out", tmp_path / "out", "--export", exported)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_fault(answer, "nothing half-written was left")
    assert [pathlib.Path(file).name for file in files_in(tmp_path / "out")] == left
    assert files_in(tmp_path / "x") == []


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_leaves_no_file(tmp_path, files_in, kill):
    endless = ("--steps", 10**6, "--batch-size", 2, "--test-steps", 1, "--test-limit", 2)
    process = shell("advmask", *endless, "--out", tmp_path / "out", cwd=tmp_path)
    for line in process.stdout:
        if "steps, loss lafa" in line:  # the training starts
            break
    process.send_signal(kill)
    _, err = process.communicate()
    assert files_in(tmp_path) == []
    if kill == signal.SIGTERM:  # a scheduler's: the run's folder goes as well
        assert process.returncode == 2 and err.startswith("error: interrupted;")
        assert not any((tmp_path / "out").iterdir())
    else:
        assert process.returncode == -kill
