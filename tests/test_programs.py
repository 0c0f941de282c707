"""The programs end to end: what they write and print, that a seed fixes every bit, and what broken input, a full disk and a kill leave behind."""
import itertools
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from types import SimpleNamespace

import open_clip
import pytest
import safetensors.torch
import torch

import common

HERE = pathlib.Path(__file__).resolve().parent.parent
SHORT = ("--steps", 4, "--batch-size", 8, "--test-steps", 3, "--test-limit", 30)
TINIEST = ("--steps", 1, "--batch-size", 2, "--test-steps", 1, "--test-limit", 2)

# A short training of the small CLIP on the embedded data, measured with PGD on the first test images: points of robust accuracy won
TRAINING = ("--steps", 40, "--test-steps", 10, "--test-limit", 60)
ROBUST_GAIN = 5
PROGRAMS = {"advmask": "AdvMask", "advlora": "AdvLoRA"}    # module -> its name in the table
SIZE = {"advmask": "masked", "advlora": "trained"}          # module -> what it counts


def shell(name, *arguments, **options):
    """`python NAME.py arguments` -> a started process."""
    command, pipe = [sys.executable, HERE / f"{name}.py", *map(str, arguments)], subprocess.PIPE
    return subprocess.Popen(command, text=True, stdout=pipe, stderr=pipe, env={**os.environ, "PYTHONUNBUFFERED": "1"}, **options)


def result_in(folder):
    path, = folder.rglob("result.json")
    return json.loads(path.read_text())


def measured_again(export, result, embedded):
    """The accuracies of an export, built by open_clip."""
    clip, _, _ = open_clip.create_model_and_transforms(f"local-dir:{export}")
    _, config = common.load_clip("tiny")
    net = common.Classifier(clip.eval().requires_grad_(False), config, embedded.classes, embedded.template, result["dtype"])
    x, y = common.test_split(embedded, SimpleNamespace(split="test", test_limit=30), net.size)
    return common.evaluate(net, x, y, result["eps"], result["step"], 3)


def adapter_in(folder):
    path, = folder.rglob("adapter.safetensors")
    return path


def faulty(answer, *words):
    """One sentence on stderr that holds the words, exit code 2."""
    assert answer.code == 2 and answer.err.startswith("error: ") and answer.err.count("\n") == 1 and answer.err.endswith("\n"), answer.err
    assert all(word in answer.err for word in words), answer.err
    return True


# --------------------------------------------------------------------------------------------------------------------------- end to end
@pytest.fixture(scope="module", params=PROGRAMS)
def run(request, tmp_path_factory):
    """One short run of the program in a process of its own, from an empty folder -> name, folder, what it printed."""
    folder = tmp_path_factory.mktemp(request.param)
    process = shell(request.param, *SHORT, "--out", "runs", "--export", "exported/x", cwd=folder)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return request.param, folder, out


def test_a_run_leaves_its_files_and_prints_its_table(run, files_in):
    name, folder, out = run
    method = f"runs/{name}-embedded-tiny-16shot-seed1"
    assert files_in(folder) == sorted([f"{method}/adapter.safetensors", f"{method}/result.json",
                                       "exported/x/open_clip_config.json", "exported/x/open_clip_model.safetensors"])
    result = result_in(folder)
    for key, label in (("before", "zero-shot"), ("after", PROGRAMS[name])):
        r = result[key]
        assert 0 <= r["pgd_best"] <= min(r["pgd"], r["clean"]) <= 100 and len(r["outcomes"]) == 30
        row = [line for line in out.splitlines() if line.startswith(label) and "|" in line]
        assert len(row) == 1 and [float(v) for v in row[0].split("|")[1:]] == [round(r[k], 2) for k in ("clean", "pgd", "pgd_best")]
    assert (result["method"], result["shots"], result["eps"], result["test_steps"], result["seed"]) == (name, 16, common.TINY_EPS, 3, 1)
    assert result["versions"]["torch"] == torch.__version__ and result["peak_memory_mib"] > 100
    assert all(f"{result[key]:,}" in out for key in (SIZE[name], "vision", "total")) and "step 4/4" in out and "PGD-3" in out
    if name == "advmask":
        assert 0 < result["flipped"] < 1
    else:
        assert result["trained"] == 6 * (18 * 8 * 192 + 6) and 0 < result["setup_seconds"] < result["seconds"]
        residual = result["residual"]
        assert len(residual) == 24 and {len(v) for v in residual.values()} == {1, 3} and all(0 < r < 1 for v in residual.values() for r in v)
    with safetensors.safe_open(adapter_in(folder), "pt") as file:
        assert {"method": name, "model": "tiny", "seed": "1", "shots": "16"}.items() <= file.metadata().items()


def test_load_gives_the_same_accuracies(run, program, tmp_path):
    name, folder, _ = run
    for i, path in enumerate((adapter_in(folder), adapter_in(folder).parent)):
        answer = program(name, *SHORT, "--load", path, "--out", tmp_path / str(i))
        assert answer.code == 0 and result_in(tmp_path / str(i))["after"] == result_in(folder)["after"]
        assert all(result_in(tmp_path / str(i)).get(key) == result_in(folder).get(key) for key in (SIZE[name], "flipped"))


def test_the_same_seed_gives_the_same_bits_and_another_does_not(run, program, tmp_path):
    name, folder, _ = run
    adapters = [safetensors.torch.load_file(adapter_in(folder))]
    for seed in (1, 2):
        assert program(name, *SHORT, "--seed", seed, "--out", tmp_path / str(seed)).code == 0
        adapters.append(safetensors.torch.load_file(adapter_in(tmp_path / str(seed))))
    first, same, other = adapters
    assert first.keys() == same.keys() and all(torch.equal(first[k], same[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)
    assert result_in(tmp_path / "1")["after"] == result_in(folder)["after"]


def test_the_export_is_the_model_that_was_measured(run, embedded):
    _, folder, _ = run
    result = result_in(folder)
    assert measured_again(folder / "exported" / "x", result, embedded) == result["after"] != result["before"]


@pytest.mark.parametrize("arguments, trained", [
    (("--full", "--lr", 1e-3), 2_768_640),
    (("--towers", "both", "--rank", 4, "--lr", 1e-2), 6 * (18 * 4 * 192 + 6) + 4 * (18 * 4 * 128 + 6)),
    (("--init", "gaussian", "--no-align", "--no-adaptive", "--lr", 1e-2), 6 * (18 * 8 * 192)),
], ids=["full", "both towers", "plain LoRA"])
def test_advloras_variants_load_and_export_what_they_measured(program, tmp_path, embedded, arguments, trained):
    assert program("advlora", *SHORT, *arguments, "--out", tmp_path / "run", "--export", tmp_path / "x").code == 0
    result = result_in(tmp_path / "run")
    assert result["trained"] == trained and result["after"] != result["before"]
    assert program("advlora", *SHORT, "--load", adapter_in(tmp_path / "run"), "--out", tmp_path / "loaded").code == 0
    assert result_in(tmp_path / "loaded")["after"] == result["after"] == measured_again(tmp_path / "x", result, embedded)


@pytest.mark.numbers
@pytest.mark.parametrize("name", PROGRAMS)
def test_training_wins_robust_accuracy(program, tmp_path, name):
    assert program(name, *TRAINING, "--out", tmp_path).code == 0
    result = result_in(tmp_path)
    assert result["after"]["pgd"] >= result["before"]["pgd"] + ROBUST_GAIN
    assert result["after"]["clean"] > result["after"]["pgd"] and result["after"]["flags"] == []


def test_vit_b_32_on_own_images(program, picture_folder, tmp_path):
    picture_folder(tmp_path / "mine", n=3)
    answer = program("advmask", "--dataset", "folder", "--data-root", tmp_path / "mine", "--pretrained", "none", "--shots", 1, "--steps", 2,
                     "--batch-size", 2, "--test-steps", 1, "--train-attack-steps", 1, "--out", tmp_path / "out")
    assert answer.code == 0 and "28,311,552" in answer.out and "224 px, eps 1/255" in answer.out
    result = result_in(tmp_path)
    assert result["masked"] == 28_311_552 and result["model"] == "ViT-B-32-quickgelu"
    assert 28_311_552 / 8 <= adapter_in(tmp_path).stat().st_size <= 28_311_552 / 8 + 10_000


@pytest.mark.parametrize("classes, count", [("base", 5), ("new", 5)])
def test_halves_are_trained_alone(program, tmp_path, classes, count):
    answer = program("advmask", *TINIEST, "--classes", classes, "--split", "val", "--out", tmp_path)
    assert answer.code == 0 and f"{count} classes, {16 * count} training and 2 val images" in answer.out


def test_a_run_in_which_nothing_flips_says_so(program, tmp_path):
    answer = program("advmask", *TINIEST, "--lr", 0, "--out", tmp_path)
    result = result_in(tmp_path)
    assert answer.code == 0 and result["flipped"] == 0
    assert [line for line in answer.out.splitlines() if line.startswith("WARNING") and "plain CLIP" in line]
    assert result["after"]["outcomes"] == result["before"]["outcomes"]


@pytest.mark.parametrize("arguments, steps, budget", [((), 100, 1.5), (("--batch-size", 5), 192, 1.92), (("--steps", 150), 150, 1.5),
                                                     (("--steps", 600), 600, 3), (("--steps", 300, "--budget", 1), 300, 1)])
def test_length_and_flip_budget_set_the_rate(program, monkeypatch, tmp_path, arguments, steps, budget):
    monkeypatch.setattr(common, "batches", lambda *_: iter(()))     # the rate is fixed before the first of the batches
    assert program("advmask", *TINIEST[4:], *arguments, "--after-only", "--out", tmp_path).code == 0
    result = result_in(tmp_path)
    way = result["lr"] * (steps + 1) / 2                            # of an entry that moves by the rate in each step of the cosine
    assert (result["steps"], result["budget"], way) == (steps, pytest.approx(budget), pytest.approx(budget * 5e-3))


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_explains_every_argument(program, name):
    answer = program(name, "--help")
    options = [line.split(",")[0].split()[0] for line in answer.out.splitlines() if line.startswith("  --")]
    assert answer.code == 0 and {"--dataset", "--eps", "--load", "--export", "--out"} <= set(options)
    parser = sys.modules[name].parser
    assert [a.dest for a in parser._actions if not a.help] == []
    assert [a.dest for a in parser._actions if a.default and a.dest != "help" and "default" not in a.help] == []


# ---------------------------------------------------------------------------------------------------------------------- faults of the input
CALTECH = "--model", "tiny", "--dataset", "caltech101", "--data-root"
FOLDER = "--model", "tiny", "--dataset", "folder", "--data-root"


def no_network(*_, **__):
    raise urllib.error.URLError("no network")


def corrupt_image(path, make):
    make(path / "d")
    (path / "d" / "cat" / "1.png").write_bytes((path / "d" / "cat" / "1.png").read_bytes()[:100])
    return *FOLDER, path / "d"


def wrong_names(path, make):
    make(path / "d")
    (path / "d" / "classnames.txt").write_text("cat\ndog\nemu\n")
    return *FOLDER, path / "d"


def below_a_file(path, make):
    (path / "file").write_text("")
    return "--out", path / "file" / "runs"


def garbage(path, make):
    (path / "a.safetensors").write_bytes(b"\xff" * 100)
    return "--load", path / "a.safetensors"


def no_layers(path, make):
    common.save_adapter(path / "a.safetensors", {"x": torch.zeros(1, dtype=torch.uint8)}, {"method": "advmask", "model": "tiny"})
    return "--load", path / "a.safetensors"


def full_export(path, make):
    (path / "x").mkdir()
    (path / "x" / "mine").write_text("")
    return "--export", path / "x"


FAULTS = {    # what is wrong -> arguments (or a function that makes them), words of the sentence
    "no data": (lambda path, make: (*CALTECH, path / "d"), ["d/caltech-101/101_ObjectCategories", "--data-root"]),
    "data below a file": (lambda path, make: (*CALTECH, below_a_file(path, make)[1]), ["file/runs"]),
    "no folder": ((*FOLDER, "/nonexistent/data"), ["/nonexistent/data", "sub-folder"]),
    "one sub-folder": (lambda path, make: (*FOLDER, make(path / "d", ("cat",))), ["1 sub-folders", "at least 2"]),
    "too few images": (lambda path, make: (*FOLDER, make(path / "d", n=2)), ["cat has 2 images", "at least 3"]),
    "corrupt image": (corrupt_image, ["1.png", "cannot be read"]),
    "wrong classnames.txt": (wrong_names, ["classnames.txt names 3", "2 sub-folders"]),
    "unknown model": (("--model", "ViT-Z-99"), ["ViT-Z-99", "ViT-B-32-quickgelu"]),
    "no vision transformer": (("--model", "RN50-quickgelu", "--pretrained", "none"), ["RN50", "ViT"]),
    "no such export": (("--model", "local-dir:/nonexistent"), ["/nonexistent"]),
    "other activation": (("--model", "ViT-B-32"), ["--model ViT-B-32-quickgelu"]),
    "shots 0": (("--shots", "0"), ["--shots", "at least 1", "'0'"]),
    "shots many": (("--shots", "many"), ["--shots", "'many'"]),
    "eps -1": (("--eps", "-1"), ["--eps", "'-1'"]),
    "eps nan": (("--eps", "nan"), ["--eps", "'nan'"]),
    "eps 1/0": (("--eps", "1/0"), ["--eps", "'1/0'"]),
    "lam inf": (("--lam", "inf"), ["--lam", "'inf'"]),
    "unknown argument": (("--epsilon", "1"), ["--epsilon", "--help"]),
    "unknown loss": (("--loss", "mse"), ["--loss", "lafa"]),
    "init below threshold": (("--init", "1e-3"), ["--init 0.001", "--threshold 0.005"]),
    "init inf": (("--init", "inf"), ["--init"]),
    "no adapter": (("--load", "/nonexistent/a.safetensors"), ["/nonexistent/a.safetensors", "does not exist"]),
    "garbage adapter": (garbage, ["a.safetensors", "cannot be read"]),
    "adapter without layers": (no_layers, ["a.safetensors"]),
    "full export": (full_export, ["--export", "not empty"]),
    "no such device": (("--device", "nonsense"), ["'nonsense'", "--device cpu"]),
    "device without data": (("--device", "meta"), ["'meta'", "--device cpu"]),
    "seed too large": (("--seed", str(2**70)), ["seed"]),
    "out below a file": (below_a_file, ["file/runs", "--out"]),
}


LORA_FAULTS = {
    "rank 0": (("--rank", "0"), ["--rank", "at least 1", "'0'"]),
    "rank 1000": (("--rank", "1000"), ["--rank 1000", "1 to 192"]),
    "full and both towers": (("--full", "--towers", "both"), ["--full", "--towers both"]),
    "clean weight -1": (("--clean-weight", "-1"), ["--clean-weight", "'-1'"]),
}
ALL_FAULTS = {("advmask", fault): v for fault, v in FAULTS.items()} | {("advlora", fault): v for fault, v in LORA_FAULTS.items()}


@pytest.mark.parametrize("name, fault", ALL_FAULTS)
def test_a_faulty_input_is_one_sentence_and_no_file(program, picture_folder, monkeypatch, tmp_path, files_in, name, fault):
    arguments, words = ALL_FAULTS[name, fault]
    # no test leaves this machine: a download meets an address that does not answer
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    if fault == "other activation":
        monkeypatch.setattr(open_clip, "create_model_and_transforms", lambda *_, **__: pytest.fail("it must refuse before it loads, or downloads"))
    trained, batches = [], common.batches
    monkeypatch.setattr(common, "batches", lambda *a: (trained.append(1) or batch for batch in batches(*a)))
    arguments = arguments(tmp_path, picture_folder) if callable(arguments) else arguments
    out = () if "--out" in arguments else ("--out", tmp_path / "out")
    assert faulty(program(name, *TINIEST, *out, *arguments), *words)
    assert files_in(tmp_path / "out") == [] and not trained, "a fault of the input is known before the training"


@pytest.mark.parametrize("flag, asked", [((), True), (("--download",), True), (("--no-download",), False)])
def test_images_are_downloaded_unless_that_is_refused(program, monkeypatch, tmp_path, flag, asked):
    calls = []
    monkeypatch.setattr(common.torchvision.datasets, "Caltech101", lambda *_, **keywords: calls.append(keywords))
    (tmp_path / "data").mkdir()
    assert faulty(program("advmask", "--dataset", "caltech101", "--model", "tiny", *flag), "101_ObjectCategories")
    assert calls == asked * [{"download": True}]


def test_another_programs_adapter_is_refused(run, program, tmp_path, files_in):
    name, folder, _ = run
    for other in PROGRAMS.keys() - {name}:
        answer = program(other, *TINIEST, "--load", adapter_in(folder), "--out", tmp_path / "out")
        assert faulty(answer, str(adapter_in(folder)), f"{name!r}, but this run has {other!r}")
    assert files_in(tmp_path / "out") == []


def test_a_missing_checkpoint_is_one_sentence_in_a_process_of_its_own(tmp_path):
    # here, because open_clip logs to stderr as well
    process = shell("advmask", *TINIEST, "--model", "ViT-B-32-quickgelu", "--pretrained", "/nonexistent/model.pt", cwd=tmp_path)
    _, err = process.communicate()
    assert process.returncode == 2 and "Traceback" not in err
    assert err.startswith("error: ") and err.count("\n") == 1 and "/nonexistent/model.pt" in err


# -------------------------------------------------------------------------------------------------------- full disks, killed processes
@pytest.mark.parametrize("limit, export, left", [(20_000, False, []), (300_000, True, ["adapter.safetensors"])], ids=["adapter", "export"])
def test_a_file_that_cannot_be_written_whole_is_not_written(program, tmp_path, files_in, limit, export, left):
    # a limit on the size of a file stops a write half-way, as a full disk does
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        answer = program("advmask", *TINIEST, "--out", tmp_path / "out", *(("--export", tmp_path / "x" / "y") if export else ()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert faulty(answer)
    assert {pathlib.Path(p).name for p in files_in(tmp_path / "out")} - {"result.json"} == set(left) and files_in(tmp_path / "x") == []


def test_a_killed_run_leaves_no_file(tmp_path, files_in):
    process = shell("advmask", "--steps", 10**6, "--batch-size", 2, "--test-steps", 1, "--test-limit", 2, "--out", tmp_path / "out", cwd=tmp_path)
    seen = list(itertools.takewhile(lambda line: not line.startswith("step 50/"), process.stdout))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert any("lambda" in line for line in seen) and process.returncode == -signal.SIGKILL
    assert files_in(tmp_path) == []
