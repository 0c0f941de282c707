"""What results/run_examples.py, autoattack.py, cost.py and lowrank.py keep, and their tables."""

import importlib
import json
import math
import os
import pathlib
import re
import shlex
import statistics
import sys

import pytest
import torch

import common

HERE = pathlib.Path(__file__).resolve().parent.parent
RESULTS = HERE / "results"
PAGE = (RESULTS / "RESULTS.md").read_text()
BACKDOOR, RETRIEVAL = "examples/backdoor.py", "examples/retrieval.py"


@pytest.fixture(params=["run_examples", "autoattack"])
def script(request, monkeypatch):
    monkeypatch.syspath_prepend(RESULTS)
    return importlib.import_module(request.param)


@pytest.fixture
def cost(monkeypatch):
    """The module results/cost.py."""
    monkeypatch.syspath_prepend(RESULTS)
    return importlib.import_module("cost")


@pytest.fixture
def lowrank(monkeypatch):
    """The module results/lowrank.py."""
    monkeypatch.syspath_prepend(RESULTS)
    return importlib.import_module("lowrank")


@pytest.fixture
def examples(monkeypatch, tmp_path):
    """The module results/run_examples.py, with no lines yet."""
    monkeypatch.syspath_prepend(RESULTS)
    module = importlib.import_module("run_examples")
    monkeypatch.setattr(module, "FILE", tmp_path / "examples.jsonl")
    return module


@pytest.fixture
def autoattack(monkeypatch, tmp_path):
    """The module results/autoattack.py, with no lines and no runs yet."""
    monkeypatch.syspath_prepend(RESULTS)
    module = importlib.import_module("autoattack")
    monkeypatch.setattr(module, "FILE", tmp_path / "autoattack.jsonl")
    monkeypatch.setattr(module.sweep, "ROOT", tmp_path)
    return module


def test_the_page_shows_the_tables_that_the_lines_give(script):
    assert PAGE == script.fill(PAGE), f"run python results/{script.__name__}.py --write"
    if script.__name__ == "autoattack":
        assert script.MARKER in PAGE
    else:
        shown = set(re.findall("<!-- example (.*) -->", PAGE))
        assert shown == set(script.tables()), "every example that has runs has its place"


def test_every_key_of_a_line_is_explained(script):
    explained = set(re.findall(r"`(\w+)`", (RESULTS / "README.md").read_text()))
    lines = script.read()
    for line in lines.values() if isinstance(lines, dict) else lines:
        assert set(line) <= explained, set(line) - explained


def test_the_page_shows_the_costs_that_were_measured(cost):
    assert cost.MARKER in PAGE and PAGE == cost.fill(PAGE), "run python results/cost.py --write"
    lines = cost.sweep.read_lines(cost.FILE)
    rows = [(line["model"], line["row"]) for line in lines]
    assert rows == [(model, row) for model in cost.SETTINGS for row in cost.RUNS]
    explained = set(re.findall(r"`(\w+)`", (RESULTS / "README.md").read_text()))
    for line in lines:
        assert set(line) <= explained, set(line) - explained
    shares = {}
    for line in lines:
        first = lines[rows.index((line["model"], "TeCoA"))]
        shares[line["model"], line["row"]] = 100 * line["milliseconds"] / first["milliseconds"]
    text = " ".join(PAGE.split())
    small, large = (shares[model, "AdvLoRA"] for model in cost.SETTINGS)
    assert f"takes {small:.0f} % of TeCoA's time on the small CLIP, and {large:.0f} % on" in text
    notebook = (RESULTS.parent / "notebooks" / "4_advlora.ipynb").read_text()
    assert f"a step takes AdvLoRA {small:.0f} % of full fine-tuning's time" in notebook


def test_a_cost_is_the_least_of_its_rounds(cost, monkeypatch, tmp_path):
    counts = iter(range(1, 1000))

    def run(words):
        n = next(counts)
        facts = {"model": words[words.index("--model") + 1], "commit": "c" * 12, "dtype": "float32"}
        facts |= {"batch_size": 32, "steps": 20, "device_name": "1 CPU threads"}
        return facts | {"training_seconds": n, "peak_memory_mib": 1000 - n}

    monkeypatch.setattr(cost, "run", run)
    monkeypatch.setattr(cost, "FILE", tmp_path / "cost.jsonl")
    cost.measure(2)
    first, *_ = cost.sweep.read_lines(cost.FILE)
    n = len(cost.RUNS)
    assert (first["row"], first["milliseconds"]) == ("TeCoA", 1000 / 20), "of 1 and 1 + n seconds"
    assert first["peak_memory_mib"] == 1000 - (1 + n)
    assert "| small CLIP, batches of 32 | TeCoA | 50 | 100 % |" in cost.table()
    assert len(cost.table().splitlines()) == 2 + 2 * n
    # killed on the second model, it has kept the first, and the second of before
    before = cost.sweep.read_lines(cost.FILE)
    counts = iter([2] * n)
    with pytest.raises(StopIteration):
        cost.measure(1)
    after = cost.sweep.read_lines(cost.FILE)
    assert [line["milliseconds"] for line in after[:n]] == [100] * n
    assert after[n:] == before[n:]


def test_the_page_shows_the_ranks_that_were_measured(lowrank):
    assert "<!-- lowrank caltech101 -->" in PAGE
    assert PAGE == lowrank.fill(PAGE), "run python results/lowrank.py --write"
    text = " ".join(PAGE.split())
    ranks, took = {}, {"cluster": [], "svd": []}
    for dataset in ("caltech101", "embedded"):
        facts = json.loads((RESULTS / "lowrank" / f"{dataset}.json").read_text())
        assert re.fullmatch("[0-9a-f]{12}", facts["commit"]), "no commit, or a changed one"
        assert len(facts["rows"]) == 36
        own = [row["rank_90"] for row in facts["rows"]]
        ranks[dataset] = f"{min(own)} to {max(own)}"
        assert min(own) > 8, "always more than AdvLoRA's rank"
        for start, seconds in facts["vit_b_32_seconds"].items():
            took[start].append(seconds)
    for start, words in (("cluster", "took {} to {} s on one"), ("svd", "SVD {} to {} s.")):
        least, most = math.floor(min(took[start])), math.ceil(max(took[start]))
        assert words.format(least, most) in text
    assert f"{ranks['caltech101']} of 192 directions hold the change" in text
    assert f"[the embedded data](lowrank/embedded.json) {ranks['embedded']} do" in text
    facts = json.loads((RESULTS / "lowrank" / "caltech101.json").read_text())
    gaussian = lowrank.table(facts).splitlines()[-1].split("|")[2:8]
    least, most = min(map(int, gaussian)), max(map(int, gaussian))
    assert f"Gaussian noise needs {least} to {most}" in text
    left, removed = [], []
    for layer in range(6):
        means = {}
        for start in lowrank.STARTS:
            own = [row["residual"][start] for row in facts["rows"] if row["layer"] == layer]
            means[start] = statistics.mean(own)
        left.append(means["svd"])
        removed.append((1 - means["cluster"]) / (1 - means["svd"]))
    assert min(left) > 0.86 and "the SVD's rank 8 leaves 86 % or more of the norm" in text
    assert all(0.70 < share < 0.75 for share in removed), "a little under three quarters"


def test_the_rank_of_a_change_is_that_of_its_singular_values(lowrank):
    change = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5]))
    values, rank = lowrank.singular_values(change)
    torch.testing.assert_close(values, torch.tensor([3.0, 2.0, 1.0, 0.5]))
    # 9 of 14.25 are 63 %, 13 are 91 %
    assert rank == 2


def of_seeds(lines, example):
    """{row: [what a run measured, ...]} of an example."""
    rows = {}
    for line in lines:
        if line["example"] == example:
            for name, row in line["rows"].items():
                rows.setdefault(name, []).append(row)
    return rows


def mean(runs, key):
    return statistics.mean(run[key] for run in runs)


@pytest.fixture
def lines(monkeypatch):
    """What the examples measured."""
    monkeypatch.syspath_prepend(RESULTS)
    return importlib.import_module("run_examples").read()


def words(file):
    """The text of a file, without its line breaks."""
    return " ".join((HERE / file).read_text().split())


def seconds(lines, example):
    """How long its second seed took, which ran alone."""
    (line,) = [line for line in lines if (line["example"], line["seed"]) == (example, 2)]
    return f"{line['seconds']:.0f} s"


def test_the_pages_state_what_the_backdoors_leave(lines):
    page, readme, program = words("results/RESULTS.md"), words("README.md"), words(BACKDOOR)
    left = {}
    fallen = []
    for dataset, where in (("embedded", "on the embedded data"), ("caltech101", "on Caltech101")):
        rows = of_seeds(lines, f"backdoor, {dataset}")
        left[dataset] = {name: round(mean(runs, "success")) for name, runs in rows.items()}
        found = [left[dataset][name] for name in ("backdoored", "AdvLoRA", "AdvMask")]
        fallen.append("from {} to {} and {} % {}".format(*found, where))
        names = ("backdoored", "AdvMask", "AdvLoRA", "full adversarial", "full clean", "plain LoRA")
        numbers = re.findall(r"falls from .*? leaves \d+", program)[dataset == "caltech101"]
        assert re.findall(r"\d+", numbers) == [str(left[dataset][name]) for name in names]
        assert max(mean(runs, "no_patch") for runs in rows.values()) < 3.5
        for name in ("AdvLoRA", "AdvMask", "full adversarial"):
            for a, b in zip(rows["plain LoRA"], rows[name], strict=True):
                assert b["intervals"]["success"][1] < a["intervals"]["success"][0]
        clean = [f"{run['success']:.0f}" for run in rows["full clean"]]
        assert "{}, {} and {}".format(*clean) in page
        # what AdvMask leaves beyond the mistakes that its network makes without the patch
        beyond = [run["success"] - run["no_patch"] for run in rows["AdvMask"]]
        assert sum(points < 2 for points in beyond) == (dataset == "caltech101")
    assert f"The success falls {', and '.join(fallen)}." in page
    plain, full = [
        [left[dataset][name] for dataset in ("embedded", "caltech101")]
        for name in ("plain LoRA", "full adversarial")
    ]
    assert "without an attack, leaves {} and {} %.".format(*plain) in page
    assert "does as well**, and leaves {} and {} %.".format(*full) in page
    found = [left["embedded"][name] for name in ("backdoored", "AdvMask", "AdvLoRA")]
    text = "success falls from {} to {} % with AdvMask**, to {} with AdvLoRA (embedded data)"
    assert text.format(*found) in readme
    by_seed = [run["success"] for run in of_seeds(lines, "backdoor, caltech101")["AdvMask"]]
    assert "it is {:.0f}, {:.0f} and {:.0f} % by seed".format(*by_seed) in page
    first, second = [seconds(lines, f"backdoor, {name}") for name in ("embedded", "caltech101")]
    assert f"the first took {first}, the second {second}" in program


def test_the_page_states_what_poisoned_shots_teach(lines):
    page = words("results/RESULTS.md")
    added, without, clean = {}, {}, {}
    for dataset in ("embedded", "caltech101"):
        for name, runs in of_seeds(lines, f"poisoned shots, {dataset}").items():
            added[dataset, name] = [run["success"] - run["no_patch"] for run in runs]
            without[dataset, name] = mean(runs, "no_patch")
            clean[dataset, name] = mean(runs, "clean")
    average = {key: statistics.mean(points) for key, points in added.items()}
    assert max(map(abs, added["embedded", "AdvMask"])) < 1.2
    assert max(map(abs, added["caltech101", "AdvMask"])) < 1
    assert f"adds {average['embedded', 'AdvMask']:.0f} point on the embedded data" in page
    both = [average["caltech101", name] for name in ("AdvLoRA", "full adversarial")]
    assert "the patch adds {:.0f} and {:.0f} points".format(*both) in page
    for name in ("AdvLoRA", "full adversarial"):
        learned = [run["success"] for run in of_seeds(lines, "poisoned shots, embedded")[name]]
        assert learned.count(100) == 2, "two seeds of three"
    for dataset in ("embedded", "caltech101"):
        assert min(added[dataset, "full clean"]) > 70
    assert min(added["embedded", "plain LoRA"]) > 90 and max(added["caltech101", "plain LoRA"]) < 3
    taken = [without["embedded", "AdvMask"]]
    taken += [without["caltech101", name] for name in ("AdvLoRA", "full adversarial")]
    text = "{:.0f} % with AdvMask on the embedded data, {:.0f} and {:.0f} % with the other two"
    assert text.format(*taken) in page
    assert f"falls to {clean['embedded', 'AdvMask']:.1f} with AdvMask" in page
    names = "AdvMask", "AdvLoRA", "full adversarial"
    assert max(clean["caltech101", name] for name in names) < 41


def test_the_pages_state_what_retrieval_finds(lines):
    page, program = words("results/RESULTS.md"), words(RETRIEVAL)
    rows = of_seeds(lines, "retrieval")
    attacked, clean, found, back = {}, {}, {}, {}
    for name, runs in rows.items():
        attacked[name] = [run["pgd"]["100"] for run in runs]
        clean[name] = mean([run["clean"]["image_to_text"] for run in runs], "R@10")
        found[name] = mean([run["image_to_text"] for run in attacked[name]], "R@10")
        back[name] = mean([run["text_to_image"] for run in attacked[name]], "R@10")
    lora, full = found["AdvLoRA"], found["full fine-tuning"]
    assert f"is {lora:.1f} with AdvLoRA and {full:.1f} with full fine-tuning" in page
    assert f"AdvMask those of {found['AdvMask']:.1f} %" in page
    assert f"falls from {clean['zero-shot']:.1f} to {clean['AdvMask']:.1f}." in page
    some = [back[name] for name in ("full fine-tuning", "AdvLoRA", "AdvMask")]
    assert "R@10 is {:.1f}, with AdvLoRA {:.1f}, with AdvMask {:.1f}.".format(*some) in page
    text = "R@10 is {:.1f} zero-shot, {:.1f} with AdvMask, {:.1f} with AdvLoRA, and {:.1f} with"
    assert text.format(*found.values()) in program
    assert "Clean it is {:.1f}, {:.1f}, {:.1f} and {:.1f}.".format(*clean.values()) in program
    for run, other in zip(attacked["full fine-tuning"], attacked["AdvLoRA"], strict=True):
        low, high = run["interval"]
        assert low <= other["image_to_text"]["R@10"] <= high, "within noise"
        assert other["text_to_image"]["R@10"] < run["text_to_image"]["R@10"], "with every seed"
    trained = [rows[name][0]["trained"] for name in ("AdvLoRA", "full fine-tuning")]
    assert f"with {100 * trained[0] / trained[1]:.0f} % as many numbers" in page
    assert f"It took {seconds(lines, 'retrieval')} on two CPU cores" in program


# ------------------------------------------------------------------------------------------------
# The examples
# ------------------------------------------------------------------------------------------------


def backdoor(folder, success, seed=1, dataset="embedded", poisoned_shots=False, eps=3 / 255):
    """The folder of a finished run of examples/backdoor.py."""
    row = {"success": success, "no_patch": 1.0, "clean": 60.0, "pgd": 20.0}
    facts = {"method": "backdoor", "dataset": dataset, "poisoned_shots": poisoned_shots}
    facts |= {"seed": seed, "eps": eps, "test_steps": 100, "rows": {"zero-shot": row}}
    folder.mkdir(exist_ok=True)
    (folder / "result.json").write_text(json.dumps(facts))
    return folder


def retrieval(folder):
    """The folder of a finished run of examples/retrieval.py."""
    recalls = {"R@1": 10.0, "R@5": 20.0, "R@10": 30.0}
    under_attack = {"R@1": 1.0, "R@5": 2.0, "R@10": 3.0}
    row = {"clean": {"image_to_text": recalls, "text_to_image": recalls}, "trained": 1234}
    row["pgd"] = {"20": {"image_to_text": under_attack, "text_to_image": recalls}}
    folder.mkdir(exist_ok=True)
    facts = {"method": "retrieval", "seed": 1, "eps": 3 / 255, "rows": {"AdvLoRA": row}}
    (folder / "result.json").write_text(json.dumps(facts))
    return folder


def test_the_table_has_mean_and_deviation_over_seeds(examples, tmp_path):
    for seed, success in ((1, 10.0), (2, 30.0)):
        examples.keep(backdoor(tmp_path / "run", success, seed))
    examples.keep(backdoor(tmp_path / "run", 50.0, dataset="caltech101", poisoned_shots=True))
    found = examples.tables()
    assert list(found) == ["backdoor, embedded", "poisoned shots, caltech101"]
    assert "| zero-shot | 20.0 ± 14.1 | 1.0 ± 0.0 | 60.0 ± 0.0 |" in found["backdoor, embedded"]
    assert "Seeds: 2." in found["backdoor, embedded"]
    assert "| zero-shot | 50.0 |" in found["poisoned shots, caltech101"]


def test_a_table_is_written_between_its_own_markers(examples, autoattack, tmp_path):
    examples.keep(backdoor(tmp_path / "run", 10.0))
    rest = "text\n<!-- example other -->\nkept\n<!-- end -->\n"
    page = f"before\n<!-- example backdoor, embedded -->\n<!-- end -->\n{rest}"
    filled = examples.fill(page)
    assert filled.startswith("before\n") and filled.endswith(f"\n<!-- end -->\n{rest}")
    assert "| zero-shot | 10.0 |" in filled and examples.fill(filled) == filled
    page = f"before\n{autoattack.MARKER}\n<!-- end -->\n{rest}"
    filled = autoattack.fill(page)
    assert filled.endswith(f"\n<!-- end -->\n{rest}") and autoattack.fill(filled) == filled


def test_the_table_of_retrieval_has_both_directions_under_every_attack(examples, tmp_path):
    examples.keep(retrieval(tmp_path / "run"))
    table = examples.tables()["retrieval"]
    assert "| AdvLoRA | 1,234 | none | 10.0 | 20.0 | 30.0 | 10.0 | 20.0 | 30.0 |" in table
    assert "| AdvLoRA | 1,234 | PGD-20 | 1.0 | 2.0 | 3.0 | 10.0 | 20.0 | 30.0 |" in table


def test_a_run_takes_the_place_of_its_line_and_of_no_other(examples, tmp_path):
    examples.keep(backdoor(tmp_path / "run", 10.0))
    examples.keep(backdoor(tmp_path / "run", 20.0, seed=2))
    examples.keep(backdoor(tmp_path / "run", 40.0, dataset="caltech101"))
    examples.keep(backdoor(tmp_path / "run", 30.0))
    kept = [
        (*examples.identity(line), line["rows"]["zero-shot"]["success"]) for line in examples.read()
    ]
    embedded = "backdoor, embedded"
    assert kept == [("backdoor, caltech101", 1, 40.0), (embedded, 1, 30.0), (embedded, 2, 20.0)]


def test_what_is_no_run_of_an_example_is_refused(examples, tmp_path):
    with pytest.raises(common.Fault, match="no result.json"):
        examples.keep(tmp_path)
    (tmp_path / "result.json").write_text('{"method": "advmask"}')
    with pytest.raises(common.Fault, match="advmask is no example's"):
        examples.keep(tmp_path)
    (tmp_path / "result.json").write_text("{half")
    with pytest.raises(common.Fault, match="result.json holds what is not JSON"):
        examples.keep(tmp_path)
    with pytest.raises(common.Fault, match="eps is 0.0313725, expected 0.01176"):
        examples.keep(backdoor(tmp_path / "run", 10.0, eps=8 / 255))


def test_every_missing_run_is_a_command_that_its_program_takes(examples, tmp_path):
    examples.keep(backdoor(tmp_path / "run", 10.0))
    commands = examples.missing("photos")
    assert len(commands) == 3 * len(examples.EXAMPLES) - 1
    folders = set()
    for (name, seed), (python, program, *words) in commands.items():
        module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
        args = common.parse(module.arguments(), words)
        result = {"method": module.__name__.rpartition(".")[2], **vars(args)}
        assert (examples.name_of(result), args.seed, python) == (name, seed, "python")
        folders.add(args.out)
    assert len(folders) == len(commands)


# ------------------------------------------------------------------------------------------------
# AutoAttack
# ------------------------------------------------------------------------------------------------


def answer(file, robust, dataset="embedded"):
    """What second_opinion.py --autoattack leaves."""
    attacks = {"APGD-CE": robust + 3, "APGD-T": robust + 2, "FAB-T": robust + 1, "Square": robust}
    pgd = [{"final": robust + 5, "best": robust + 4}]
    result = {"dataset": dataset, "clean": 80.0, "pgd": pgd, "autoattack": attacks}
    file.write_text(json.dumps(result))
    return file


def test_the_table_has_a_row_for_every_answer_in_the_order_of_the_rivals(autoattack, tmp_path):
    file = tmp_path / "second_opinion.json"
    autoattack.keep("zero-shot", answer(file, 2.0, "caltech101"))
    autoattack.keep("FAP", answer(file, 1.0))
    autoattack.keep("zero-shot", answer(file, 0.0))
    autoattack.keep("FAP", answer(file, 10.0))
    first, second, third = autoattack.table().splitlines()[2:]
    assert first.startswith("| embedded | zero-shot | 80.0 |")
    assert second == "| embedded | FAP | 80.0 | 15.0 | 14.0 | 13.0 | 12.0 | 11.0 | 10.0 |"
    assert third.endswith("| 3.0 | 2.0 |") and third.startswith("| caltech101 | zero-shot |")
    others = {"AdvMask", "AdvLoRA", "TeCoA", "TGA-ZSR", "AdvVP", "AdvVLP", "AdvMaPLe"}
    others.add("AdvVLP, published recipe")
    missing = autoattack.missing()
    assert {row for dataset, row in missing if dataset == "embedded"} == others
    assert {row for dataset, row in missing if dataset == "caltech101"} == others | {"FAP"}


def test_the_page_states_what_autoattack_takes(monkeypatch):
    monkeypatch.syspath_prepend(RESULTS)
    lines = importlib.import_module("autoattack").read()
    page = " ".join(PAGE.split())
    taken = {}
    for (dataset, row), line in lines.items():
        (pgd,) = line["pgd"]
        found = line["autoattack"]
        taken[dataset, row] = pgd["best"] - found["Square"]
        assert found["APGD-T"] == found["FAB-T"] == found["Square"]
    prompts = [pair for pair in taken if pair[1] in ("AdvVLP", "AdvMaPLe", "FAP")]
    moved = [pair for pair in taken if pair[1] in ("AdvMask", "AdvLoRA", "TeCoA", "TGA-ZSR")]
    assert (len(moved), len(prompts)) == (8, 6)
    for pairs, words in (
        (moved, "AutoAttack takes {:.1f} to {:.1f} points, or {:.0f} to {:.0f} %"),
        (prompts, "lose {:.1f} to {:.1f} points, or {:.0f} to {:.0f} % of what PGD-100"),
    ):
        points = [taken[pair] for pair in pairs]
        shares = [100 * taken[pair] / lines[pair]["pgd"][0]["best"] for pair in pairs]
        assert words.format(min(points), max(points), min(shares), max(shares)) in page
    ahead = []
    for dataset in ("embedded", "caltech101"):
        for method in ("TeCoA", "TGA-ZSR"):
            left = [lines[dataset, row]["autoattack"]["Square"] for row in (method, "AdvMask")]
            ahead.append(left[0] - left[1])
    assert f"is {min(ahead)} to {max(ahead)} points ahead of AdvMask" in page
    mask = lines["embedded", "AdvMask"]["autoattack"]["Square"]
    rows = "AdvVP", "AdvVLP", "AdvVLP, published recipe", "AdvMaPLe", "FAP"
    left = {row: lines["embedded", row]["autoattack"]["Square"] for row in rows}
    best = left["AdvVLP, published recipe"]
    assert best == max(left.values())
    told = "where AdvVLP's published recipe, the best of the prompts, keeps {:.1f} %"
    assert f"AdvMask keeps {mask:.1f} %" in page and told.format(best) in page
    zero_shot = lines["caltech101", "zero-shot"]["autoattack"]["Square"]
    recipe = "AdvVLP, published recipe"
    for method in ("AdvVP", "AdvVLP", "AdvMaPLe", "FAP", recipe):
        assert lines["caltech101", method]["autoattack"]["Square"] <= zero_shot
    points = [taken[dataset, recipe] for dataset in ("embedded", "caltech101")]
    assert "AdvVLP's published recipe loses {:.1f} and {:.1f} points".format(*points) in page
    assert f"no prompt keeps more than the {zero_shot:.1f} % of zero-shot" in page


def test_a_run_without_an_adapter_is_refused_with_the_command_that_makes_it(autoattack, tmp_path):
    with pytest.raises(common.Fault, match="python advmask.py .* --seed 1"):
        autoattack.adapter("embedded", "AdvMask")
    for row, folder in (("AdvMask", "main/embedded~AdvMask~1"), ("FAP", "rivals/embedded~FAP~1")):
        run = tmp_path / "runs" / "sweep" / "tiny" / folder / "run"
        run.mkdir(parents=True)
        (run / "adapter.safetensors").write_bytes(b"")
        assert autoattack.adapter("embedded", row) == str(run)
        # another one of the same row, from a run that was killed while it was evaluated
        run.with_name("an earlier").mkdir()
        (run.with_name("an earlier") / "adapter.safetensors").write_bytes(b"")
        os.utime(run.with_name("an earlier") / "adapter.safetensors", (0, 0))
        assert autoattack.adapter("embedded", row) == str(run)
        with pytest.raises(common.Fault, match="--dataset caltech101"):
            autoattack.adapter("caltech101", row)
    assert autoattack.adapter("caltech101", "zero-shot") == "tiny"


def test_zero_shot_is_attacked_on_its_dataset(autoattack, monkeypatch, capsys):
    monkeypatch.setattr(autoattack, "missing", lambda: [("caltech101", "zero-shot")])
    monkeypatch.setattr(sys, "argv", ["autoattack.py", "--list"])
    autoattack.main()
    words = shlex.split(capsys.readouterr().out)
    assert words[1:5] == ["results/second_opinion.py", "tiny", "--dataset", "caltech101"]


def test_the_missing_runs_of_the_examples_are_listed(examples, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run_examples.py", "--list"])
    examples.main()
    listed = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert listed == list(examples.missing(pathlib.Path("data").resolve()).values())
