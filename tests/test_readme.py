"""The pages: every command and snippet runs, every link leads somewhere, numbers are the files'."""

import importlib.util
import json
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).resolve().parent.parent
PAGES = [HERE / "README.md", *sorted(HERE.glob("results/*.md")), HERE / "tiny" / "README.md"]
README = (HERE / "README.md").read_text()
RUNNING = (HERE / "results" / "RUNNING.md").read_text()

# what makes a command short, after its own arguments: the last of two counts
SHORT = ["--steps", "1", "--batch-size", "2", "--test-steps", "1", "--test-limit", "2"]


def blocks(text, language):
    """The fenced blocks of a page in a language, "" for plain ones."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands():
    """Every line of README.md and RUNNING.md that starts a program, without its comment."""
    found = []
    for block in blocks(README, "") + blocks(RUNNING, ""):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            known = words and words[0] in ("python", "torchrun", "sbatch", "pip")
            if known and words not in found:
                found.append(words)
    return found


PROGRAMS = [words for words in commands() if words[0] == "python" and "advmask.py" in words]
OPINIONS = [words for words in commands() if "results/second_opinion.py" in words]


def test_the_readme_is_one_page():
    assert len(README.splitlines()) <= 140 and len(README.split()) <= 1500


@pytest.mark.parametrize("words", PROGRAMS, ids=" ".join)
def test_a_command_runs(program, picture_folder, request, tmp_path, words):
    arguments = words[2:]
    if "folder" in arguments:
        pictures = picture_folder(tmp_path / "pictures", n=8)
        arguments = [str(pictures) if word == "PATH" else word for word in arguments]
    elif "--dataset" in arguments:
        # oxford_pets is not at hand: embedded stands in
        arguments = ["embedded" if word == "oxford_pets" else word for word in arguments]
        arguments += ["--data-root", str(request.getfixturevalue("data_root"))]
    # OpenAI's weights are not at hand: random ones stand in, and the small CLIP where it is slow
    if "--transfer" in arguments:
        arguments += ["--model", "tiny"]
    elif "--dataset" in arguments:
        arguments += ["--pretrained", "none"]
    answer = program("advmask", *arguments, *SHORT, "--shots", "1")
    assert answer.code == 0, answer.err
    assert "zero-shot" in answer.out and "AdvMask" in answer.out


def test_torchrun_is_told_as_it_is(data_root, tmp_path):
    (words,) = {tuple(words) for words in commands() if words[0] == "torchrun"}
    assert words[1].startswith("--nproc_per_node=")
    arguments = [*words[3:], "--data-root", str(data_root), "--model", "tiny", *SHORT]
    arguments += ["--shots", "1"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", words[1]]
    command = [*launch, str(HERE / words[2]), *arguments, "--out", str(tmp_path)]
    answer = subprocess.run(command, text=True, capture_output=True)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("AdvMask") == 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which the small CLIP was masked, in runs/ as the README has it."""
    folder = tmp_path_factory.mktemp("readme")
    command = [sys.executable, str(HERE / "advmask.py"), *SHORT]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return folder


@pytest.mark.parametrize("snippet", blocks(README, "python"), ids=["copy", "load"])
def test_a_snippet_runs(finished, monkeypatch, snippet):
    if "torchattacks" in snippet and not importlib.util.find_spec("torchattacks"):
        pytest.skip("torchattacks is not installed")
    monkeypatch.chdir(finished)
    names = {}
    exec(compile(snippet, "README.md", "exec"), names)
    x_adv = names["x_adv"].detach()
    assert x_adv.shape == names["x"].shape and 0 < (x_adv - names["x"]).abs().max() < 0.02


@pytest.mark.parametrize("words", OPINIONS, ids=" ".join)
def test_a_second_opinion_runs(finished, words):
    if "--autoattack" in words and not importlib.util.find_spec("torchattacks"):
        pytest.skip("torchattacks is not installed")
    few = ["--test-limit", "4", "--test-steps", "2"]
    if "--autoattack" in words:
        few += ["--autoattack", "1"]
    command = [sys.executable, str(HERE / words[1]), *words[2:], *few]
    answer = subprocess.run(command, cwd=finished, text=True, capture_output=True)
    assert answer.returncode == 0, answer.stderr


def test_the_sweep_is_told_as_it_is(tmp_path):
    (words,) = [words for words in commands() if "results/sweep.py" in words]
    where = words.index("--slurm")
    listed = words[1:where] + words[where + 2 :] + ["--list"]
    listed[0] = str(HERE / listed[0])
    answer = subprocess.run([sys.executable, *listed], text=True, capture_output=True)
    assert answer.returncode == 0, answer.stderr
    assert "--model ViT-B-32-quickgelu --dataset dtd" in answer.stdout


def test_what_is_to_be_installed_is_there():
    for words in commands():
        for flag, file in zip(words, words[1:]):
            if flag == "-r":
                assert (HERE / file).is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.name}")
def test_every_link_leads_somewhere(page):
    text = page.read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    missing = []
    for target in targets:
        path = target.partition("#")[0]
        if path and "://" not in path and not (page.parent / path).exists():
            missing.append(target)
    assert missing == []


def test_the_output_in_the_readme_is_that_of_a_run():
    lines = (HERE / "results" / "main.jsonl").read_text().splitlines()
    runs = [json.loads(line) for line in lines]
    (run,) = [
        run
        for run in runs
        if (run["dataset"], run["row"], run["seed"]) == ("embedded", "AdvMask", 1)
    ]
    for name, result in (("zero-shot", run["before"]), ("AdvMask", run["after"])):
        (line,) = re.findall(rf"^{name} +\|(.*)$", README, re.MULTILINE)
        expected = []
        for key in ("clean", "pgd"):
            expected += [result[key], *result["intervals"][key]]
        shown = [float(number) for number in re.findall(r"\d+\.\d+", line)]
        assert shown == pytest.approx(expected, abs=0.06)


def test_what_was_found_is_what_the_table_shows():
    def numbers(method):
        (row,) = re.findall(rf"^\| {method} \|(.*)\|$", README, re.MULTILINE)
        return [float(cell.split()[0]) for cell in row.split("|")[1:3]]

    text = " ".join(README.split())
    _, robust = numbers("AdvMask")
    page = (HERE / "results" / "RESULTS.md").read_text()

    def cells_of(row, images="caltech101, 500"):
        return rf"^\| {images} test, PGD-100 \| {row} \| 3 \| \S+ ± \S+ \| (\S+) ±"

    def robust_of(row, images="caltech101, 500"):
        return float(re.search(cells_of(row, images), page, re.MULTILINE)[1])

    ahead = []
    for images in ("embedded, 200", "caltech101, 500"):
        prompts = {}
        for method in ("AdvVP", "AdvVLP", "AdvMaPLe", "FAP"):
            for row in (method, f"{method}, published recipe"):
                prompts[row] = robust_of(row, images)
        best = max(prompts, key=prompts.get)
        assert best == "AdvVLP, published recipe"
        ahead.append(robust_of("AdvMask", images) - prompts[best])
    told = "{:.0f} points above AdvVLP's published recipe, the best of them, on the embedded data, "
    assert (told + "and {:.0f} on Caltech101").format(*ahead) in text
    mask = robust_of("AdvMask")
    shares = []
    for model in ("small CLIP", "ViT-B/32"):
        cells = rf"^\| {model}[^|]* \| AdvLoRA \| \d+ \| (\d+) % \|"
        shares.append(re.search(cells, page, re.MULTILINE)[1])
    assert "takes {} % of its time, on ViT-B/32 {} %".format(*shares) in text
    _, robust_tecoa = numbers("TeCoA")
    behind = [robust_tecoa - numbers("AdvLoRA")[1]]
    behind.append(float(re.search(cells_of("TeCoA"), page, re.MULTILINE)[1]))
    behind[1] -= float(re.search(cells_of("AdvLoRA"), page, re.MULTILINE)[1])
    assert f"is {behind[0]:.0f} and {behind[1]:.0f} points behind full fine-tuning" in text
    for better, worse, words in (
        ("AdvLoRA", "AdvLoRA, not aligned", "start helps on Caltech101**, by {:.0f} points"),
        (r"CE \+ LAFA", "CE", "LAFA helps on Caltech101**, by {:.0f} points"),
    ):
        first, second = (re.search(cells_of(row), page, re.MULTILINE) for row in (better, worse))
        assert words.format(float(first[1]) - float(second[1])) in text
    tecoa = float(re.search(cells_of("TeCoA"), page, re.MULTILINE)[1])
    ahead = f"TeCoA is {robust_tecoa - robust:.0f} and {tecoa - mask:.0f} above AdvMask"
    assert ahead in text


def test_the_table_of_memory_is_what_the_command_prints():
    command = [sys.executable, str(HERE / "results" / "memory.py")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert f"<!-- memory -->\n{printed}<!-- end -->" in RUNNING
