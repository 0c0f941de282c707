"""The published protocols: base-to-new, transfer, several processes, other models, how much memory, and the scripts that run and show it all."""
import itertools
import json
import os
import pathlib
import random
import re
import shlex
import shutil
import statistics
import subprocess
import sys

import open_clip
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize

import advmask
import common
import robustness

HERE = pathlib.Path(__file__).resolve().parent.parent
PROGRAMS = {"advmask": "AdvMask", "advlora": "AdvLoRA"}
SHORT = ("--steps", 2, "--batch-size", 8, "--test-steps", 2, "--test-limit", 20, "--dtype", "float32")


def result_in(folder):
    path, = folder.rglob("result.json")
    return json.loads(path.read_text())


def adapter_in(folder):
    path, = folder.rglob("adapter.safetensors")
    return path


@pytest.fixture
def unchecked(monkeypatch):
    """Evaluation without its sanity checks, which take longest."""
    monkeypatch.setattr(robustness, "sanity", lambda *_: [])


# ----------------------------------------------------------------------------------------------------------- base-to-new and transfer
TRAINED = {"advmask": ("--budget", 3), "advlora": ("--towers", "both", "--rank", 2, "--lr", 1e-2)}    # enough to change outcomes


def measured(export, data, result):
    """The accuracies of an export, built by open_clip, among the classes of `data`."""
    clip, _, _ = open_clip.create_model_and_transforms(f"local-dir:{export}")
    net = common.Classifier(clip.eval().requires_grad_(False), common.load_clip("tiny")[1], data.classes, data.template, result["dtype"])
    return common.evaluate(net, *common.test_set(random.Random(0).sample(data.test, 20), net.size), result["eps"], result["step"], 2)


@pytest.mark.parametrize("name", PROGRAMS)
def test_base_to_new_measures_the_trained_model_on_both_halves(program, unchecked, embedded, tmp_path, name):
    answer = program(name, *SHORT, *TRAINED[name], "--protocol", "base-to-new", "--out", tmp_path / "run", "--export", tmp_path / "x")
    result = result_in(tmp_path / "run")
    assert answer.code == 0 and result["classes"] == "base" and "5 classes, 80 training and 20 test images" in answer.out
    for label, part in (("zero-shot", result["before"]), (PROGRAMS[name], result["after"])):
        new = part["transfer"]["new"]
        four = [part["clean"], part["pgd"], new["clean"], new["pgd"]]
        assert part["H"] == pytest.approx(4 / sum(1 / v for v in four) if all(four) else 0)
        sentence, = re.findall(rf"^{label}: H (.*)$", answer.out, re.MULTILINE)
        assert [float(v) for v in re.findall(r"\d+\.\d+", sentence)] == [round(v, 2) for v in (part["H"], *four)]
    after = {k: v for k, v in result["after"].items() if k not in ("transfer", "H")}
    assert after == measured(tmp_path / "x", common.half(embedded, "base"), result)
    assert result["after"]["transfer"]["new"] == measured(tmp_path / "x", common.half(embedded, "new"), result)
    assert result["after"]["transfer"]["new"] != result["before"]["transfer"]["new"]


@pytest.mark.parametrize("base_pgd, h", [(20.0, 4 / (1 / 60 + 1 / 20 + 1 / 50 + 1 / 10)), (0.0, 0)])
def test_h_is_the_harmonic_mean_of_clean_and_final_iterate(monkeypatch, base_pgd, h):
    results = iter([{"clean": 50.0, "pgd": 10.0, "pgd_best": 7.0}, {"clean": 60.0, "pgd": base_pgd, "pgd_best": 7.0}])    # new, then base
    monkeypatch.setattr(common, "examine", lambda *_: next(results))
    _, _, measure = common.prepare(common.parse(advmask.parser, ["--protocol", "base-to-new", "--test-limit", "2"]))
    after = measure()
    assert after["H"] == pytest.approx(h) and after["clean"] == 60 and after["transfer"]["new"]["clean"] == 50


@pytest.mark.parametrize("name", PROGRAMS)
def test_transfer_measures_other_classes_and_leaves_the_training_alone(program, unchecked, embedded, picture_folder, tmp_path, name):
    mine = ("--model", "tiny", "--dataset", "folder", "--data-root", picture_folder(tmp_path / "d", n=8), *SHORT, *TRAINED[name])
    answer = program(name, *mine, "--transfer", "embedded", "--out", tmp_path / "run", "--export", tmp_path / "x")
    assert answer.code == 0 and f"{PROGRAMS[name]} on embedded" in answer.out and "embedded: 10 classes, 20 images" in answer.out
    result = result_in(tmp_path / "run")
    assert result["after"]["transfer"] == {"embedded": measured(tmp_path / "x", embedded, result)} and "H" not in result["after"]
    assert result["after"]["transfer"] != result["before"]["transfer"]
    # the other classes were evaluated before the training, too: it must not have seen them
    assert program(name, *mine, "--after-only", "--out", tmp_path / "alone").code == 0
    one, other = (safetensors.torch.load_file(adapter_in(tmp_path / folder)) for folder in ("run", "alone"))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    # and an adapter that is loaded is evaluated in the same way
    loaded = program(name, *mine, "--load", adapter_in(tmp_path / "run"), "--transfer", "embedded", "--after-only", "--out", tmp_path / "load")
    assert loaded.code == 0
    assert result_in(tmp_path / "load")["after"] == result["after"] and result_in(tmp_path / "load")["before"] is None


@pytest.mark.parametrize("part", ["base", "new"])
def test_shots_are_drawn_on_all_classes_and_then_halved(part, embedded):
    arguments = ["--classes", part, "--shots", "3", "--seed", "2", "--test-limit", "2"]
    _, train, _ = common.prepare(common.parse(advmask.parser, arguments))
    drawn, _ = common.few_shot(embedded.train, embedded.val, 3, 2)
    expected = [item for item in drawn if (item.label < 5) == (part == "base")]
    assert [item.image.tobytes() for item in train] == [item.image.tobytes() for item in expected]
    assert [item.label for item in train] == [item.label % 5 for item in expected]


FAULTS = {
    "unknown": (("--transfer", "nope"), ["--transfer", "'nope'", "caltech101"]),
    "twice": (("--transfer", "caltech101", "caltech101"), ["--transfer caltech101 caltech101", "twice"]),
    "itself": (("--transfer", "embedded"), ["--transfer embedded", "--dataset embedded"]),
    "no such data": (("--transfer", "caltech101", "--no-download", "--data-root", "empty"), ["empty/caltech-101/101_ObjectCategories"]),
    "classes as well": (("--protocol", "base-to-new", "--classes", "all"), ["--protocol base-to-new", "--classes"]),
    "two classes": (("--protocol", "base-to-new", "--model", "tiny", "--dataset", "folder", "--data-root", "d"), ["2 classes", "at least 4"]),
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_protocol_is_one_sentence_before_the_training(program, picture_folder, monkeypatch, tmp_path, files_in, name, fault):
    arguments, words = FAULTS[fault]
    picture_folder(tmp_path / "d")
    monkeypatch.setattr(common, "batches", lambda *_: pytest.fail("it trains"))
    answer = program(name, *SHORT, *arguments, "--out", tmp_path / "out")
    assert answer.code == 2 and answer.err.startswith("error: ") and answer.err.count("\n") == 1 and all(word in answer.err for word in words)
    assert files_in(tmp_path / "out") == []


# ---------------------------------------------------------------------------------------------------------------------- several processes
def torchrun(name, *arguments, cwd):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", HERE / f"{name}.py", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, text=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("name, arguments", [("advmask", ()), ("advlora", ("--clean-weight", 0.5, "--after-only", "--lr", 1e-2))], ids=PROGRAMS)
def test_two_processes_give_what_one_gives(program, tmp_path, files_in, name, arguments):
    # shares of 4 and 3 training images, of 16 and 15 test images
    short = ("--steps", 3, "--batch-size", 7, "--test-steps", 3, "--test-limit", 31, "--restarts", 2, "--dtype", "float32", *arguments)
    answer = torchrun(name, *short, "--out", tmp_path / "two", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("step 3/3") == 1
    assert [pathlib.Path(p).name for p in files_in(tmp_path / "two")] == ["adapter.safetensors", "result.json"]
    alone = program(name, *short, "--out", tmp_path / "one")
    assert alone.code == 0
    one, two = (safetensors.torch.load_file(adapter_in(tmp_path / folder)) for folder in ("one", "two"))
    first, second = result_in(tmp_path / "one"), result_in(tmp_path / "two")
    assert one.keys() == two.keys() and (first["processes"], second["processes"]) == (1, 2)
    if name == "advmask":    # bit by bit
        assert first["flipped"] > 0.05 and all(torch.equal(one[k], two[k]) for k in one)
    else:                    # sums in another order differ in the last bits
        assert all(torch.allclose(one[k], two[k], rtol=1e-4, atol=1e-4) for k in one)
    assert all(first[part] == second[part] for part in ("before", "after")) and len(set(first["after"]["outcomes"])) > 1
    # what is printed of the batch is the whole batch's
    log = [re.search(r"step 3/3 (.*?) %", text)[1] for text in (alone.out, answer.stdout)]
    assert log[0] == log[1]


def test_a_fault_under_torchrun_is_one_sentence(tmp_path, files_in):
    answer = torchrun("advmask", "--batch-size", 1, "--out", tmp_path / "out", cwd=tmp_path)
    assert answer.returncode and answer.stderr.count("error: ") == 1 and "2 processes cannot share a batch of 1" in answer.stderr
    assert "exitcode  : 2" in answer.stderr and "advmask.py\", line" not in answer.stderr and files_in(tmp_path) == []


# ----------------------------------------------------------------------------------------------------------------- other models, and memory
@pytest.mark.parametrize("model, masked", [("ViT-B-16-quickgelu", 28_311_552), ("ViT-L-14-quickgelu", 100_663_296)])
def test_larger_models_run_by_name(program, unchecked, picture_folder, tmp_path, model, masked):
    answer = program("advmask", "--dataset", "folder", "--data-root", picture_folder(tmp_path / "d", n=3), "--model", model, "--pretrained", "none",
                     "--shots", 1, "--steps", 1, "--batch-size", 2, "--train-attack-steps", 1, "--test-steps", 1,
                     "--after-only", "--out", tmp_path / "out")
    assert answer.code == 0, answer.err
    result = result_in(tmp_path / "out")
    assert result["masked"] == masked and result["model"] == model and len(result["after"]["outcomes"]) == 2 and "224 px, eps 1/255" in answer.out
    assert masked / 8 <= adapter_in(tmp_path / "out").stat().st_size <= masked / 8 + 20_000


@pytest.fixture
def results(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / "results"))


@pytest.fixture
def attention():
    """Choose the CPU's attention kernel: fused, which keeps no n x n matrix, as a GPU's; or plain, which --attention auto takes."""
    yield lambda kind: torch.backends.cuda.enable_flash_sdp(kind == "fused")
    torch.backends.cuda.enable_flash_sdp(False)


def a_step(model, layers, batch):
    """-> classifier, masks, and a function that does a step of training on random pixels, and keeps what it must."""
    torch.manual_seed(0)
    net = common.Classifier(*common.load_clip(model, "none"), ["cat", "dog"])
    masks, x, y = advmask.attach(net.clip, layers), torch.rand(batch, 3, net.size, net.size), torch.arange(batch) % 2
    M = [mask.M for mask in masks.values()]
    optimizer = torch.optim.SGD(M, 1e-3, momentum=0.9, dampening=0.9)

    def step():
        with parametrize.cached():
            x_adv = advmask.pgd(net, x, y, 1 / 255, 1 / 255, 1)
            with torch.no_grad():
                z_clean, logits_clean = advmask.features(net, x)
            z_adv, logits_adv = advmask.features(net, x_adv)
            term = advmask.consistency("lafa", logits_clean, logits_adv, z_clean, z_adv, y, 1e-6)
            optimizer.zero_grad()
            (F.cross_entropy(logits_adv, y) + term).backward()
        optimizer.step()
    return net, masks, x, y, step


@pytest.mark.parametrize("model, layers, kind", [*itertools.product(["tiny"], ["mhsa", "mlp", "both", None], ["fused", "plain"]),
                                                 ("ViT-B-32-quickgelu", "mhsa", "plain")])
def test_the_formula_counts_what_autograd_keeps(results, attention, model, layers, kind):
    import memory
    attention(kind)
    batch = 3 if model == "tiny" else 1
    net, masks, x, y, _ = a_step(model, layers or "mhsa", batch)
    if layers is None:    # evaluation: nothing is trained
        advmask.merge(net.clip, masks)
    kept = {}
    with parametrize.cached():
        for name in masks:    # theta' is counted as a weight
            net.clip.get_parameter(name) if layers is None else getattr(net.clip.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
        weights = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers(), *parametrize._cache.values())}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t,
                                                      lambda t: t):
            loss = F.cross_entropy(net(x.requires_grad_()), y)
    expected = memory.memory(model, layers or "mhsa", kind)["evaluation" if layers is None else "training"]
    assert sum(size for storage, size in kept.items() if storage not in weights) / batch == pytest.approx(expected, rel=0.01) and loss > 0


@pytest.mark.parametrize("model, batch, kind", [("tiny", 16, "fused"), ("tiny", 16, "plain"), ("ViT-B-32-quickgelu", 2, "fused")])
def test_the_formula_is_within_15_percent_of_the_peak_of_training(results, attention, model, batch, kind):
    import memory
    attention(kind)
    *_, step = a_step(model, "mhsa", batch)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
        step()    # now with gradients and momentum from the first
    now = peak = 0
    for event in sorted((e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    formula = memory.memory(model, "mhsa", kind)
    assert formula["masked"] == 4 * {"tiny": 884_736, "ViT-B-32-quickgelu": 28_311_552}[model]
    # weights and M were there before
    assert peak == pytest.approx(3 * formula["masked"] + batch * formula["training"], rel=0.15)


def test_the_weights_in_the_formula_are_the_models(results):
    import memory
    assert [memory.memory(model)["weights"] for model in memory.MODELS] == [4 * n for n in (9_922_049, 151_277_313, 149_620_737, 427_616_513)]


# ----------------------------------------------------------------------------------------------------------------------------- the sweep
@pytest.fixture
def sweep(tmp_path):
    """A folder with the scripts, stubs of the programs that write their arguments as a result, and no results -> sweep(*arguments)."""
    (tmp_path / "results").mkdir()
    for script in ("sweep.py", "experiments.py", "pictures.py"):
        shutil.copy(HERE / "results" / script, tmp_path / "results")
    for name in PROGRAMS:
        (tmp_path / f"{name}.py").write_text(
            "import json, pathlib, sys\nout = pathlib.Path(sys.argv[-1]) / 'x'\nout.mkdir(parents=True, exist_ok=True)\n"
            "assert '--shots 2' not in ' '.join(sys.argv) or 'FAIL' not in open('mode').read()\n"
            "(out / 'result.json').write_text(json.dumps({'argv': sys.argv}))\n")
    (tmp_path / "mode").write_text("")

    def run(*arguments, script="sweep.py"):
        return subprocess.run([sys.executable, tmp_path / "results" / script, *arguments], cwd=tmp_path, text=True, capture_output=True)
    return run


def plant(folder, file, outcomes, **facts):
    """A result as a program writes it: arguments, then versions, then what was measured."""
    facts = {"dataset": "caltech101", "classes": "all", "test_limit": None, "lam": 150, "split": "test", "test_steps": 100, **facts}
    transfer = facts.pop("transfer", {})
    after = {"outcomes": outcomes, **({"transfer": {k: {"outcomes": v} for k, v in transfer.items()}} if transfer else {})}
    after |= {"H": facts.pop("H")} if "H" in facts else {}
    (folder / "results" / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / "results" / file).write_text(json.dumps({
        **facts, "versions": {}, "after": after, "masked": 884736, "flipped": 0.02, "training_seconds": 10, "peak_memory_mib": 1000}))


def rows(answer):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in answer.stdout.splitlines() if line.startswith("| ")]


def test_the_table_is_mean_and_deviation_beside_the_published_number(sweep, tmp_path):
    for seed, wrong, lam in ((1, 4, 150), (2, 8, 150.0)):
        plant(tmp_path, f"modules/embedded~MLP~{seed}.json", "7" * (20 - wrong) + "1" * wrong, dataset="embedded", seed=seed, lam=lam)
    answer = sweep("modules", "--table")
    robust = f"70.0 ± {statistics.stdev([80, 60]):.1f}"
    assert rows(answer) == [
        ["images", "run, small CLIP", "seeds", "clean", "PGD", "best iterate", "trained", "seconds", "MiB",
         "published, ViT-B/32, mean of 5 datasets"],
        ["embedded, 20 test, PGD-100", "MLP", "2", "100.0 ± 0.0", robust, robust, "884,736 bits, 2.0 % off", "10", "1000", "65.73 / 45.95"]]


def test_a_run_on_all_images_counts_on_the_images_of_its_table(sweep, tmp_path):
    chosen = set(random.Random(0).sample(range(2465), 500))    # what --test-limit 500 picks of Caltech101
    outcomes = "".join("7" if i in chosen else "0" for i in range(2465))
    plant(tmp_path, "main/caltech101~AdvMask~1.json", outcomes)
    plant(tmp_path, "shots/caltech101~AdvMask-1-shots~1.json", "1" * 500, test_limit=500)
    tables = {name: rows(sweep(name, "--table"))[1:] for name in ("main", "shots", "loss")}
    assert [row[:4] for row in tables["main"]] == [["caltech101, 2465 test, PGD-100", "AdvMask", "1", "20.3"]]
    assert [row[:5] for row in tables["shots"]] == [["caltech101, 500 test, PGD-100", "AdvMask, 1 shots", "1", "100.0", "0.0"],
                                                    ["caltech101, 500 test, PGD-100", "AdvMask, 16 shots", "1", "100.0", "100.0"]]
    assert [(row[1], row[-1]) for row in tables["loss"]] == [("CE + LAFA", "67.3 / 47.1"), ("CE + LAFA, 1 shot", "46.6 / 18.4")]
    # and it is not run again
    listed = sweep("shots", "--list").stdout
    assert "shots 16" not in listed and listed.count("advmask.py --shots 4 ") == 6 and "main/caltech101~AdvMask~1" not in listed


def test_the_tables_of_several_test_sets_have_a_column_for_each(sweep, tmp_path):
    plant(tmp_path, "base-to-new/embedded~AdvMask~1.json", "7755", dataset="embedded", classes="base", transfer={"new": "7111"}, H=43.2)
    plant(tmp_path, "transfer/tiny_imagenet~AdvMask~1.json", "0000", dataset="tiny_imagenet", transfer={"caltech101": "7755", "embedded": "7111"})
    header, row = rows(sweep("base-to-new", "--table"))
    assert header[3:8] == ["base clean", "base PGD", "new clean", "new PGD", "H"] and row[3:8] == ["100.0", "50.0", "100.0", "25.0", "43.2"]
    header, row = rows(sweep("transfer", "--table"))
    assert header[5:9] == ["caltech101 clean", "caltech101 PGD", "embedded clean", "embedded PGD"] and row[5:9] == ["100.0", "50.0", "100.0", "25.0"]


@pytest.mark.parametrize("differ, refused", [
    ({"lam": (50, 150)}, "lam"), ({"epochs": (4, 6)}, "epochs"), ({"epochs": (4, 6), "steps": (None, None)}, "epochs"),
    ({"epochs": (4, 6), "steps": (100, 200)}, "steps"), ({"epochs": (4, 6), "steps": (100, 100)}, "")])
def test_runs_of_different_arguments_have_no_mean(sweep, tmp_path, differ, refused):
    for i in (0, 1):
        plant(tmp_path, f"main/embedded~AdvMask~{i + 1}.json", "7777", seed=i + 1, **{key: values[i] for key, values in differ.items()})
    answer = sweep("main", "--table")
    assert answer.returncode == (2 if refused else 0)
    assert not refused or answer.stderr.count("\n") == 1 and f"differ in {refused};" in answer.stderr and "embedded~AdvMask" in answer.stderr


def test_an_unknown_table_is_one_sentence(sweep):
    answer = sweep("nope")
    assert answer.returncode == 2 and answer.stderr.startswith("error: ") and answer.stderr.count("\n") == 1 and "nope" in answer.stderr


def test_other_models_run_with_their_own_eps_and_lambda_on_all_images(sweep, tmp_path):
    chosen = ("--model", "ViT-B-16-quickgelu", "--datasets", "dtd", "food101", "--more=--no-download --pretrained 'my file'", "--data-root", "d")
    listed = [shlex.split(line)[1:] for line in sweep("shots", "loss", "transfer", *chosen, "--list").stdout.splitlines()]
    shared = ["--no-download", "--pretrained", "my file", "--data-root", f"{tmp_path}/d", "--out"]
    assert all(words[-7:-1] == shared and "--test-limit" not in words and "3/255" not in words for words in listed)
    texts = {pathlib.Path(words[-1]).relative_to(tmp_path / "runs" / "sweep"): " ".join(words[:-7]) for words in listed}
    told = "--after-only --model ViT-B-16-quickgelu --dataset {} --seed 1"
    expected = {"zero-shot/dtd~eps-1-255~1": "advmask.py --steps 1 --lr 0 --eps 1/255", "loss/food101~CE-KL~1": "advmask.py --loss kl --lam 4",
                "shots/dtd~AdvLoRA-8-shots~1": "advlora.py --shots 8",
                "transfer/tiny_imagenet~AdvMask~1": "advmask.py --transfer dtd food101"}
    for name, text in expected.items():
        dataset = name.split("/")[1].split("~")[0]
        assert texts[pathlib.Path("ViT-B-16-quickgelu") / name] == f"{tmp_path / text} {told.format(dataset)}"
    # all images of a run of another model count in every table
    plant(tmp_path, "ViT-B-16-quickgelu/main/dtd~AdvMask~1.json", "7" * 700 + "0" * 700, dataset="dtd")
    row, = rows(sweep("modules", "--table", *chosen))[1:]
    assert row[:4] == ["dtd, 1400 test, PGD-100", "MHSA", "1", "50.0"]


def test_a_broken_sweep_goes_on_where_it_stopped(sweep, tmp_path):
    (tmp_path / "mode").write_text("FAIL")
    assert sweep("shots").returncode != 0
    done = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "results" / "shots").glob("*.json")}
    assert "embedded~AdvMask-1-shots~3.json" in done and len(done) == 3
    (tmp_path / "mode").write_text("")
    answer = sweep("shots", "--data-root", "photos")
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "results" / "shots").glob("*.json")}
    assert answer.returncode == 0 and len(after) == 2 * 2 * 4 * 3 and done.items() <= after.items()
    argv = json.loads((tmp_path / "results" / "shots" / "caltech101~AdvLoRA-4-shots~2.json").read_text())["argv"]
    fixed = f"--model tiny --dataset caltech101 --seed 2 --data-root {tmp_path}/photos"
    assert " ".join(argv[1:]).startswith(f"--shots 4 --test-limit 500 --after-only {fixed}")
    assert sweep("shots", "--list").stdout == ""
    answer = sweep("shots", "--slurm", "none.sh")
    assert (answer.returncode, answer.stdout) == (2, "") and answer.stderr.count("\n") == 1 and not (tmp_path / "none.sh").exists()


def test_the_job_array_runs_one_command_a_task_and_none_twice(sweep, tmp_path):
    assert sweep("transfer", "--slurm", "jobs.sh").returncode == 0
    script = (tmp_path / "jobs.sh").read_text()
    assert "#SBATCH --array=0-6\n" in script    # zero-shot once, two methods for three seeds
    file = tmp_path / "results" / "transfer" / "tiny_imagenet~zero-shot~1.json"
    for _ in range(2):
        subprocess.run(["bash", "jobs.sh"], cwd=tmp_path, env={**os.environ, "SLURM_ARRAY_TASK_ID": "0"}, check=True)
        assert [p.name for p in file.parent.iterdir()] == [file.name]
        (tmp_path / "advmask.py").unlink(missing_ok=True)    # a second time there is nothing to run
    assert "--transfer caltech101 embedded" in " ".join(json.loads(file.read_text())["argv"])
    assert sweep("transfer", "--slurm", "jobs.sh").returncode == 0 and "zero-shot" not in (tmp_path / "jobs.sh").read_text()


def test_the_picture_is_the_table(sweep, tmp_path, monkeypatch):
    for seed, right in ((1, 100), (2, 140)):
        plant(tmp_path, f"shots/embedded~AdvMask-2-shots~{seed}.json", "7" * right + "1" * (200 - right), dataset="embedded", seed=seed, shots=2)
    plant(tmp_path, "zero-shot/embedded~eps-3-255~1.json", "1" * 150 + "0" * 50, dataset="embedded")
    answer = sweep(script="pictures.py")
    assert answer.returncode == 0, answer.stderr
    assert (tmp_path / "results" / "shots.png").read_bytes().startswith(b"\x89PNG")
    points = subprocess.run([sys.executable, "-c", "import pictures; print(pictures.curves('embedded'))"], cwd=tmp_path / "results", text=True,
                            capture_output=True, check=True).stdout
    assert eval(points) == {("zero-shot", "clean"): [(0, 75.0, 0)], ("zero-shot", "PGD"): [(0, 0.0, 0)],
                            ("AdvMask", "clean"): [(2, 100.0, 0.0)], ("AdvMask", "PGD"): [(2, 60.0, pytest.approx(statistics.stdev([50, 70])))]}
