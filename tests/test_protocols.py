"""The published protocols: base-to-new, transfer, several processes, larger models, and how much
memory they take."""

import gc
import importlib
import itertools
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_fault, result_in
from test_programs import (
    HERE,
    PROGRAMS,
    adapter_in,
    measured_again,
    same_tensors,
    unflagged,
)

import advmask
import common

LIMIT = 16
SHORT = ("--steps", 2, "--batch-size", 8, "--test-steps", 2, "--test-limit", LIMIT)
# what makes two steps change outcomes, and both towers where that is possible
TRAINED = {
    "advmask": ("--budget", 3),
    "advlora": ("--towers", "both", "--rank", 2, "--lr", 1e-2),
    "baselines.tecoa": ("--lr", 1e-3),
}


# ------------------------------------------------------------------------------------------------
# Base to new, and transfer
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROGRAMS)
def test_base_to_new_measures_the_trained_model_on_both_halves(
    program, unchecked, embedded, tmp_path, name
):
    halves = ("--classes", "base", "--transfer", "new")
    where = ("--out", tmp_path / "run", "--export", tmp_path / "x")
    answer = program(name, *SHORT, *TRAINED[name], *halves, *where)
    assert answer.code == 0, answer.err
    assert "5 classes, 80 training images" in answer.out
    result = result_in(tmp_path / "run")
    base = {key: value for key, value in result["after"].items() if key not in ("transfer", "H")}
    new = result["after"]["transfer"]["new"]
    assert base == {
        **measured_again(tmp_path / "x", common.half(embedded, "base"), result),
        "flags": [],
    }
    assert new == {
        **measured_again(tmp_path / "x", common.half(embedded, "new"), result),
        "flags": [],
    }
    assert new != result["before"]["transfer"]["new"], "it is the trained model"
    assert f"\n{PROGRAMS[name]} on new " in answer.out


def harmonic_mean(evaluation):
    """Of clean and PGD, on base and new classes, by its definition."""
    new = evaluation["transfer"]["new"]
    four = [evaluation["clean"], evaluation["pgd"], new["clean"], new["pgd"]]
    if 0 in four:
        return 0
    return 4 / sum(1 / accuracy for accuracy in four)


@pytest.mark.parametrize("name", PROGRAMS)
def test_transfer_measures_other_classes_and_leaves_the_training_alone(
    program, unchecked, embedded, picture_folder, tmp_path, name
):
    pictures = picture_folder(tmp_path / "d", n=8)
    mine = ("--model", "tiny", "--dataset", "folder", "--data-root", pictures)
    mine += (*SHORT, *TRAINED[name])
    other = ("--transfer", "embedded")
    answer = program(name, *mine, *other, "--out", tmp_path / "run", "--export", tmp_path / "x")
    assert answer.code == 0, answer.err
    assert f"\n{PROGRAMS[name]} on embedded " in answer.out
    assert f"test set embedded: 10 classes, {LIMIT} images" in answer.out
    result = result_in(tmp_path / "run")
    transferred = result["after"]["transfer"]
    again = measured_again(tmp_path / "x", embedded, result)
    assert transferred == {"embedded": {**again, "flags": []}}
    assert transferred != result["before"]["transfer"]
    assert "H" not in result["after"]

    # other classes were evaluated before the training, too: it must not have seen them
    answer = program(name, *mine, "--out", tmp_path / "alone")
    assert answer.code == 0, answer.err
    assert same_tensors(adapter_in(tmp_path / "run"), adapter_in(tmp_path / "alone"))

    # and an adapter that is loaded is evaluated in the same way
    loaded = ("--load", adapter_in(tmp_path / "run"))
    answer = program(name, *mine, *loaded, *other, "--out", tmp_path / "loaded")
    assert answer.code == 0, answer.err
    assert result_in(tmp_path / "loaded")["after"] == result["after"]


BASE_TO_NEW = "--classes", "base", "--transfer", "new"
TWO_CLASSES = "--model", "tiny", "--dataset", "folder", "--data-root", "d"
CALTECH = "--transfer", "caltech101"
FAULTS = {
    "unknown": (("--transfer", "nope"), ["--transfer", "'nope'", "caltech101"]),
    "twice": ((*CALTECH, "caltech101"), ["--transfer caltech101 caltech101", "twice"]),
    "itself": (("--transfer", "embedded"), ["--transfer embedded", "--dataset embedded"]),
    "new without base": (("--transfer", "new"), ["--transfer new", "--classes base"]),
    "new of new": (("--classes", "new", "--transfer", "new"), ["--classes base"]),
    "no data": ((*CALTECH, "--data-root", "d"), ["d/caltech-101/101_ObjectCategories"]),
    "two classes": ((*TWO_CLASSES, *BASE_TO_NEW), ["2 classes", "at least 4"]),
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_protocol_is_one_sentence_before_anything_is_evaluated(
    program, picture_folder, monkeypatch, tmp_path, files_in, name, fault
):
    arguments, words = FAULTS[fault]
    picture_folder(tmp_path / "d")
    monkeypatch.setattr(common, "evaluate", lambda *_, **__: pytest.fail("it evaluates"))
    answer = program(name, *SHORT, *arguments, "--out", tmp_path / "out")
    assert_fault(answer, *words)
    assert files_in(tmp_path / "out") == []


# ------------------------------------------------------------------------------------------------
# Several processes
# ------------------------------------------------------------------------------------------------


def torchrun(script, *arguments, cwd):
    """`torchrun --nproc_per_node=2 script arguments`, one thread each -> the finished process."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [*launch, script, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
    )


# both methods one after the other, but that process 1 has other weights after the training
UNEQUAL = """
import os, sys
sys.path.insert(0, {here!r})
import torch, advlora, advmask, common

def unequal(method, change):
    train = method.train
    def train_unequally(classifier, adapters, *rest):
        train(classifier, adapters, *rest)
        if os.environ["RANK"] == "1":
            for adapter in adapters.values():
                change(adapter)
    method.train = train_unequally

common.sanity = lambda *_: []
unequal(advmask, lambda mask: mask.M.data.zero_())
unequal(advlora, lambda lora: lora.B.data.neg_())
for method, arguments in ((advmask, {advmask!r}), (advlora, {advlora!r})):
    sys.argv = [method.__name__, *arguments]
    common.guard(method.main)
    torch.distributed.init_process_group = lambda *_, **__: None  # the second joins the same group
"""


def test_two_processes_give_what_one_gives(program, unchecked, tmp_path, files_in, request):
    threads = torch.get_num_threads()
    # 6 and 5 test images
    short = ("--steps", 2, "--batch-size", 6, "--test-steps", 2, "--test-limit", 11)
    short += ("--dtype", "float32")
    arguments = {}
    for name in ("advmask", "advlora"):
        out = ("--out", tmp_path / "two" / name)
        arguments[name] = [str(word) for word in (*short, *TRAINED[name], *out)]
    script = tmp_path / "unequal.py"
    script.write_text(UNEQUAL.format(here=str(HERE), **arguments))
    answer = torchrun(script, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr

    # sums in another order differ in the last bit: one thread here too
    torch.set_num_threads(1)
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    for name in ("advmask", "advlora"):
        alone = program(name, *short, *TRAINED[name], "--out", tmp_path / "one" / name)
        assert alone.code == 0, alone.err
        one, two = result_in(tmp_path / "one" / name), result_in(tmp_path / "two" / name)
        assert (one["processes"], two["processes"]) == (1, 2)
        assert unflagged(two["before"]) == unflagged(one["before"])
        assert unflagged(two["after"]) == unflagged(one["after"])
        assert one["after"]["outcomes"] != one["before"]["outcomes"]
        first, second = adapter_in(tmp_path / "one" / name), adapter_in(tmp_path / "two" / name)
        assert same_tensors(first, second)
        # one table is printed, and files are written once
        assert len(re.findall(rf"^{PROGRAMS[name]} +\|", answer.stdout, re.MULTILINE)) == 1
        written = [file.rpartition("/")[2] for file in files_in(tmp_path / "two" / name)]
        assert written == ["adapter.safetensors", "result.json"]
    assert answer.stdout.count("step 2/2") == 2


def test_a_fault_under_torchrun_is_one_sentence(tmp_path, files_in):
    # process 0 finds it while process 1 waits
    nowhere = ("--dataset", "folder", "--data-root", tmp_path / "nowhere")
    answer = torchrun(HERE / "advmask.py", *nowhere, "--out", tmp_path / "out", cwd=tmp_path)
    assert answer.returncode != 0
    assert answer.stderr.count("error: ") == 1
    assert f"{tmp_path / 'nowhere'} is not a folder" in answer.stderr
    assert 'advmask.py", line' not in answer.stderr, "no traceback"
    assert files_in(tmp_path) == []


# ------------------------------------------------------------------------------------------------
# Larger models
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, masked",
    [
        ("ViT-B-32-quickgelu", 28_311_552),
        ("ViT-B-16-quickgelu", 28_311_552),
        ("ViT-L-14-quickgelu", 100_663_296),
    ],
)
def test_larger_models_run_by_name(program, unchecked, picture_folder, tmp_path, model, masked):
    pictures = picture_folder(tmp_path / "d", n=3)
    mine = ("--dataset", "folder", "--data-root", pictures, "--model", model)
    few = ("--shots", 1, "--steps", 1, "--batch-size", 1, "--test-steps", 1, "--test-limit", 1)
    out = ("--out", tmp_path / "out")
    answer = program("advmask", *mine, "--pretrained", "none", *few, *out)
    assert answer.code == 0, answer.err
    assert "224 px, eps 1/255" in answer.out and f"{masked:,}" in answer.out
    result = result_in(tmp_path / "out")
    assert (result["masked"], result["model"], result["lam"]) == (masked, model, 50)
    assert len(result["after"]["outcomes"]) == 1
    size = adapter_in(tmp_path / "out").stat().st_size
    assert masked / 8 <= size <= masked / 8 + 20_000, "a bit a weight"


# ------------------------------------------------------------------------------------------------
# Memory
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def memory(monkeypatch):
    """The module results/memory.py."""
    monkeypatch.syspath_prepend(str(HERE / "results"))
    return importlib.import_module("memory")


@pytest.fixture
def attention():
    """attention(kind) chooses the CPU's kernel: fused, or plain as in the programs."""
    yield lambda kind: torch.backends.cuda.enable_flash_sdp(kind == "fused")
    torch.backends.cuda.enable_flash_sdp(False)


def random_classifier(model, batch):
    """-> a classifier with random weights, random pixels x, and y, what it says of them."""
    net = common.Classifier(*common.load_clip(model, "none"), ["cat", "dog"])
    x = torch.rand(batch, 3, net.size, net.size)
    with torch.no_grad():
        y = net(x).argmax(1)
    return net, x, y


KEPT = [*itertools.product(["tiny"], ["attn", "mlp", "both", ""], ["fused", "plain"])]
KEPT += [("ViT-B-32-quickgelu", "attn", "plain")]


@pytest.mark.parametrize("model, weights, kind", KEPT)
def test_the_formula_counts_what_autograd_keeps(memory, attention, model, weights, kind):
    attention(kind)
    batch = 3 if model == "tiny" else 1
    net, x, y = random_classifier(model, batch)
    if weights:
        advmask.attach(net.clip, advmask.vision_weights(net.clip, weights))
    own = {tensor.untyped_storage().data_ptr() for tensor in (*net.parameters(), *net.buffers())}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = F.cross_entropy(net(x.requires_grad_()), y)
    assert loss.requires_grad
    expected = batch * memory.activations(memory.configuration(model), weights, kind)
    if weights:
        expected += memory.memory(model, weights)["masked"]  # theta'
    assert sum(kept.values()) == pytest.approx(expected, rel=0.002)


def allocated(work):
    """-> how far the tensors' memory rises while work() runs, and by how much it has risen then."""
    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
        gc.collect()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, now


@pytest.mark.parametrize(
    "model, batch, kind",
    [("tiny", 16, "fused"), ("tiny", 16, "plain"), ("ViT-B-32-quickgelu", 4, "fused")],
)
def test_the_formula_is_within_10_percent_of_the_peak_of_training(
    memory, attention, model, batch, kind
):
    attention(kind)
    net, x, y = random_classifier(model, batch)
    masks = {}

    def attach():
        masks.update(advmask.attach(net.clip, advmask.vision_weights(net.clip)))

    formula = memory.memory(model, "attn", kind)
    _, left = allocated(attach)
    assert left == formula["masked"], "M"
    peak, left = allocated(lambda: advmask.train(net, masks, [(x, y), (x, y)], 2, 1e-6))
    # the weights and M were there before; v, gradients and theta' come, and go
    assert peak == pytest.approx(3 * formula["masked"] + batch * formula["training"], rel=0.1)
    assert left == 0


@pytest.mark.parametrize("kind", ["fused", "plain"])
def test_the_formula_is_within_10_percent_of_the_peak_of_evaluation(
    memory, attention, unchecked, kind
):
    attention(kind)
    net, x, y = random_classifier("tiny", 16)
    images = list(zip(x, y.tolist()))
    formula = memory.memory("tiny", "attn", kind)
    # so small a radius that no image is broken, and all are attacked to the end
    peak, _ = allocated(lambda: common.evaluate(net, images, 1e-6, 2, 1e-9, batch_size=16))
    assert peak == pytest.approx(16 * formula["evaluation"], rel=0.1)


def test_without_a_gpu_nothing_is_measured(memory, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["memory.py", "--measure"])
    with pytest.raises(SystemExit) as stop:
        common.guard(memory.main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: --measure needs a GPU, and torch finds none here\n"


def test_the_weights_in_the_formula_are_the_models(memory):
    counts = [9_922_049, 151_277_313, 149_620_737, 427_616_513]
    assert [memory.memory(model)["weights"] for model in memory.MODELS] == [4 * n for n in counts]


def test_the_table_adds_up_what_training_and_evaluation_hold(memory, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["memory.py", "--batch-size", "8"])
    memory.main()
    rows = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines()]
    assert "batch 8" in rows[0][4] and "batch 32" in rows[0][5]
    assert [row[0].strip() for row in rows[2:]] == list(memory.MODELS)
    for row in rows[2:]:
        weights, masked, training, evaluation = re.findall(r"[\d.]+", " ".join(row[1:4]))
        train = float(weights) + float(masked) + 8 * float(training)
        test = float(weights) + float(masked) / 4 + 32 * float(evaluation)
        shown = [float(re.search(r"[\d.]+", cell)[0]) for cell in row[4:6]]
        assert shown == pytest.approx([train / 1024, test / 1024], abs=0.06)
