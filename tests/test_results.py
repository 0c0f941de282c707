"""The results: their lines, the commands that made them, the tables and pictures drawn from them,
and what the pages say of them."""

import importlib
import json
import math
import os
import pathlib
import random
import re
import shlex
import shutil
import statistics
import subprocess
import sys

import pytest
import torch

import common

HERE = pathlib.Path(__file__).resolve().parent.parent
RESULTS = HERE / "results"
PAGES = HERE / "README.md", RESULTS / "RESULTS.md", RESULTS / "CHOICES.md"
# those of other scripts than sweep.py: test_records.py
OTHERS = "autoattack", "clips", "cost", "examples", "movement"
FILES = [file for file in sorted(RESULTS.glob("*.jsonl")) if file.stem not in OTHERS]
MARKERS = re.compile(r"<!-- table (\S+) -->\n(.*?)\n?<!-- end -->", re.DOTALL)


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def text_of(page):
    """A page of results/ without its line breaks."""
    return " ".join((RESULTS / page).read_text().split())


@pytest.fixture
def sweep(monkeypatch):
    """The module results/sweep.py."""
    monkeypatch.syspath_prepend(RESULTS)
    return importlib.import_module("sweep")


@pytest.fixture
def empty(sweep, monkeypatch, tmp_path):
    """The same, with no results yet; they would go to tmp_path."""
    monkeypatch.setattr(sweep, "HERE", tmp_path)
    return sweep


# ------------------------------------------------------------------------------------------------
# The lines and the pages
# ------------------------------------------------------------------------------------------------


def test_the_pages_show_the_tables_that_the_lines_give(sweep):
    shown = set()
    for page in PAGES:
        text = page.read_text()
        assert text == sweep.fill(text), f"{page.name}: run python results/sweep.py --write"
        shown.update(name for name, _ in MARKERS.findall(text))
    assert shown - {"readme"} == set(sweep.TABLES), "every table has its place"


@pytest.mark.parametrize("name", ["RESULTS.md", "CHOICES.md", "RUNNING.md"])
def test_the_text_of_a_page_has_at_most_100_columns(name):
    for line in (RESULTS / name).read_text().splitlines():
        free = line.startswith(("|", "<img", "python"))
        assert free or len(line) <= 100, line


def test_the_command_prints_the_tables_of_the_pages():
    command = [sys.executable, RESULTS / "sweep.py", "--table"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    shown = {}
    for page in PAGES[1:]:
        shown.update(MARKERS.findall(page.read_text()))
    assert dict(MARKERS.findall(printed)) == shown


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_line_is_a_run_of_its_row(sweep, file):
    runs = {}
    for run in sweep.runs([file.stem]):
        runs[run.dataset, run.row, run.seed] = run
    lines = lines_of(file)
    for line in lines:
        assert line["table"] == file.stem
        run = runs[sweep.identity(line)]
        assert sweep.fits(run, line), f"{line['row']}: not what its command would do"
    identities = [sweep.identity(line) for line in lines]
    assert identities == sorted(set(identities)), "sorted, one line each"


FIRST = "370dac134c4b"  # the first commit of the history


def git(*words):
    command = ["git", "-C", HERE, *words]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.jsonl")), ids=lambda file: file.stem)
def test_every_line_is_of_one_clean_commit(file):
    commits = {line["commit"] for line in lines_of(file)}
    for commit in commits:
        assert re.fullmatch("[0-9a-f]{12}", commit), "no commit, or a changed one"
    if git("cat-file", "-e", FIRST).returncode:
        pytest.skip("the history is not here to look the commits up")
    for commit in commits:
        assert git("merge-base", "--is-ancestor", commit, "HEAD").returncode == 0, commit


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_key_of_a_line_is_explained(file):
    text = (RESULTS / "README.md").read_text()
    explained = set()
    for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE):
        explained.update(re.findall(r"`(\w+)`", row))
    for line in lines_of(file):
        assert set(line) <= explained, set(line) - explained
        for part in ("before", "after"):
            evaluation = line[part] or {}
            others = evaluation.get("transfer", {})
            for shown in (evaluation, *others.values()):
                assert set(shown) <= explained, set(shown) - explained


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_accuracies_of_a_line_are_those_of_its_outcomes(file):
    for line in lines_of(file):
        for evaluation in (line["before"], line["after"]):
            if not evaluation:
                continue
            parts = [evaluation, *evaluation.get("transfer", {}).values()]
            for part in parts:
                for key, digits in (("clean", "12"), ("pgd", "2")):
                    right = torch.tensor([digit in digits for digit in part["outcomes"]])
                    assert part[key] == pytest.approx(100 * right.float().mean().item(), abs=1e-3)
                    assert part["intervals"][key] == common.interval(right)
                assert part["flags"] == []
            if "H" in evaluation:
                four = [part[key] for part in parts for key in ("clean", "pgd")]
                H = 4 / sum(1 / value for value in four) if all(four) else 0
                assert evaluation["H"] == pytest.approx(H, abs=1e-3)


def test_the_final_iterate_is_a_little_above_the_best():
    differences = []
    for line in lines_of(RESULTS / "autoattack.jsonl"):
        (pgd,) = line["pgd"]
        differences.append(pgd["final"] - pgd["best"])
    told = "is {:.1f} points above the best on average, {:.1f} at most"
    assert told.format(statistics.mean(differences), max(differences)) in text_of("RESULTS.md")
    assert min(differences) >= 0


LONG = "AdvMask, 300 steps, budget 3"
SHORT = "AdvMask, 200 steps, budget 1.5"
LAFA = "CE + LAFA"
TRANSFER = "transfer", "tiny_imagenet"
CLEAN_TOO = "AdvLoRA, CE + CE of clean images / 2"
VLP, MAPLE, TGA, FULL = (
    f"{name}, published recipe" for name in ("AdvVLP", "AdvMaPLe", "TGA-ZSR", "TeCoA")
)
# Differences that RESULTS.md states: table, dataset, a row and the row it is compared with, column,
# the words around the mean difference, and whether it has one sign in every seed
CLAIMS = [
    ("main", "embedded", "AdvMask", "zero-shot", "PGD", "AdvMask gains {:.1f} points", 1),
    ("main", "embedded", "zero-shot", "AdvMask", "clean", "for {:.1f} clean ones", 1),
    ("rivals", "embedded", "AdvMask", "AdvVLP", "PGD", "it is {:.0f} points ahead of AdvVLP", 1),
    (
        "rivals",
        "embedded",
        "AdvMask",
        "FAP",
        "PGD",
        "AdvVLP, and {:.0f} ahead of FAP. On Caltech101",
        1,
    ),
    ("rivals", "embedded", "TGA-ZSR", "AdvMask", "PGD", "AdvMask**, by {:.0f} points on the", 1),
    (
        "rivals",
        "embedded",
        "TGA-ZSR",
        "AdvMask",
        "clean",
        "keeps {:.0f} clean points more on the embedded data, within",
        0,
    ),
    (
        "rivals",
        "caltech101",
        "TGA-ZSR",
        "AdvMask",
        "clean",
        "within noise, and {:.0f} more on Caltech101",
        1,
    ),
    ("rivals", "caltech101", "AdvMask", "AdvMaPLe", "PGD", "{:.0f} points ahead of AdvMaPLe", 1),
    ("rivals", "caltech101", "FAP", "AdvVLP", "clean", "keeps {:.0f} clean points more than Ad", 1),
    ("rivals", "caltech101", "FAP", "AdvMaPLe", "clean", "and {:.0f} more than AdvMaPLe.", 1),
    ("rivals", "caltech101", "FAP", "AdvVLP", "PGD", "On Caltech101 it is within noise of both", 0),
    ("rivals", "caltech101", VLP, "AdvVLP", "PGD", "there, and {:.0f} points more under PGD.", 1),
    ("rivals", "embedded", "TGA-ZSR", TGA, "PGD", "it is {:.0f} points less robust than", 1),
    (
        "rivals",
        "embedded",
        "TGA-ZSR",
        "TeCoA",
        "clean",
        "within noise, and keeps {:.0f} clean points more",
        1,
    ),
    (
        "rivals",
        "caltech101",
        "TGA-ZSR",
        "TeCoA",
        "clean",
        "on the embedded data, and {:.0f} on Caltech101. **How",
        1,
    ),
    ("rivals", "embedded", "AdvVLP", "AdvMask", "clean", "AdvVLP keeps {:.0f} points more", 0),
    ("rivals", "embedded", "AdvMaPLe", "AdvMask", "clean", "AdvMaPLe {:.0f} and FAP", 0),
    ("rivals", "embedded", "FAP", "AdvMask", "clean", "and FAP {:.0f}. That is within noise", 0),
    ("rivals", "caltech101", "AdvMask", "AdvVLP", "PGD", "AdvMaPLe, {:.0f} ahead of AdvVLP", 1),
    (
        "rivals",
        "caltech101",
        "AdvMask",
        "FAP",
        "PGD",
        "14 ahead of AdvVLP, and {:.0f} ahead of FAP",
        1,
    ),
    ("rivals", "embedded", "AdvMask", VLP, "PGD", "AdvMask is {:.0f} points ahead of it on", 1),
    ("rivals", "caltech101", "AdvMask", VLP, "PGD", "data, and {:.0f} on Caltech101. It keeps", 1),
    ("rivals", "embedded", "AdvMask", "AdvVP", "clean", "AdvVP keeps {:.1f} points less.", 1),
    ("rivals", "caltech101", "AdvMask", "AdvVLP", "clean", "AdvVLP keeps {:.0f} points less", 1),
    ("rivals", "caltech101", "AdvMask", "AdvMaPLe", "clean", "less, and AdvMaPLe {:.0f}.", 1),
    (
        "rivals",
        "caltech101",
        VLP,
        "AdvMask",
        "clean",
        "It keeps {:.0f} clean points less there",
        1,
    ),
    ("rivals", "embedded", "AdvMaPLe", MAPLE, "clean", "data AdamW keeps {:.0f} clean points", 1),
    (
        "rivals",
        "embedded",
        "AdvMaPLe",
        MAPLE,
        "PGD",
        "and {:.0f} points more under PGD. - **FAP",
        1,
    ),
    ("rivals", "embedded", "AdvVLP", VLP, "clean", "On the embedded data the two are within", 0),
    ("rivals", "caltech101", VLP, "AdvVLP", "clean", "is stable. It keeps {:.0f} clean points ", 1),
    ("rivals", "caltech101", MAPLE, "AdvMaPLe", "clean", "recipe keeps {:.0f} clean points mor", 1),
    (
        "rivals",
        "caltech101",
        "FAP, published recipe",
        "FAP",
        "clean",
        "**FAP**: the two recipes are within noise",
        0,
    ),
    ("rivals", "caltech101", "TGA-ZSR", TGA, "PGD", "data, and {:.0f} on Caltech101. **TGA", 1),
    (
        "rivals",
        "caltech101",
        "AdvVP",
        "AdvVP, published recipe",
        "clean",
        "But it loses {:.0f} clean points on Caltech101. So",
        1,
    ),
    ("rivals", "caltech101", "TGA-ZSR", "AdvMask", "PGD", "data, and by {:.0f} on Caltech101. ", 1),
    (
        "rivals",
        "embedded",
        "AdvVP, published recipe",
        "AdvVP",
        "PGD",
        "wins {:.0f} points under",
        1,
    ),
    (
        "rivals",
        "embedded",
        "FAP, published recipe",
        "FAP",
        "clean",
        "**FAP**: the two recipes are within noise",
        0,
    ),
    ("rivals", "embedded", "AdvVLP", "FAP", "PGD", "it is below AdvVLP and AdvMaPLe. On", 1),
    ("rivals", "embedded", "AdvMaPLe", "FAP", "PGD", "it is below AdvVLP and AdvMaPLe. On", 1),
    ("rivals", "embedded", "zero-shot", "AdvVP", "PGD", "not more robust than zero-shot", 0),
    ("rivals", "caltech101", "zero-shot", "AdvVP", "PGD", "not more robust than zero-shot", 1),
    (
        "rivals",
        "embedded",
        "AdvVP, published recipe",
        "AdvVP",
        "clean",
        "and {:.0f} clean points within noise. But",
        0,
    ),
    ("steps", "caltech101", LONG, SHORT, "PGD", "win?** {:.0f} points under PGD", 1),
    (
        "controls",
        "caltech101",
        "AdvLoRA",
        "AdvLoRA, not aligned",
        "PGD",
        "{:.0f} points are lost",
        1,
    ),
    ("controls", "caltech101", "AdvLoRA", "plain LoRA", "PGD", "in plain LoRA {:.0f} as well", 1),
    ("controls", "caltech101", "AdvLoRA", "plain LoRA", "clean", "Either loses {:.0f} clean", 1),
    (
        "controls",
        "caltech101",
        "AdvLoRA",
        "AdvLoRA, not aligned",
        "clean",
        "Either loses {:.0f} clean",
        1,
    ),
    (
        "controls",
        "embedded",
        "AdvLoRA",
        "AdvLoRA, not aligned",
        "PGD",
        "the loss of {:.1f} points",
        0,
    ),
    (
        "controls",
        "embedded",
        "AdvLoRA, SVD start",
        "AdvLoRA, not aligned",
        "PGD",
        "data it is {:.1f} points above no alignment",
        1,
    ),
    ("modules", "caltech101", "MLP", "attention", "clean", "MLP is {:.0f} points ahead of it o", 1),
    ("modules", "embedded", "MLP", "attention", "clean", "these two are within noise", 0),
    ("modules", "embedded", "attention", "both", "clean", "is last, {:.0f} points behind", 1),
    ("modules", "caltech101", "both", "attention", "PGD", "{:.0f} points ahead of attention,", 1),
    ("modules", "caltech101", "both", "MLP", "PGD", "masking both is first on Caltech101", 1),
    ("modules", "embedded", "attention", "MLP", "PGD", "The MLP is as robust as attention", 0),
    ("modules", "caltech101", "attention", "MLP", "PGD", "The MLP is as robust as attention", 0),
    ("loss", "embedded", "CE", "CE + LAFA", "clean", "under PGD, and {:.0f} clean points", 1),
    ("loss", "embedded", "CE", "CE + LAFA", "PGD", "CE alone is {:.0f} points above LAFA", 1),
    ("loss", "caltech101", "CE + LAFA", "CE", "PGD", "LAFA is {:.0f} points above CE, 4.6", 1),
    ("loss", "caltech101", "CE + LAFA", "CE + KL", "PGD", "is {:.0f} to 6 points above the oth", 1),
    ("loss", "caltech101", "CE + LAFA", "CE + JS", "PGD", "is 5 to {:.0f} points above the oth", 1),
    ("loss", "caltech101", "CE + LAFA", "CE", "clean", "LAFA is {:.0f} points above CE, and", 1),
    ("loss", "caltech101", LAFA, f"{LAFA} unweighted", "clean", "and {:.0f} to 11 above the ot", 1),
    ("loss", "caltech101", "CE + LAFA", "CE + KL", "clean", "and 8 to {:.0f} above the others,", 1),
    ("loss", "caltech101", f"{LAFA}, 1 shot", "CE + JS, 1 shot", "clean", "{:.0f} to 6 clean", 1),
    ("loss", "caltech101", f"{LAFA}, 1 shot", "CE + KL, 1 shot", "clean", "4 to {:.0f} clean", 1),
    ("loss", "caltech101", CLEAN_TOO, "AdvLoRA, CE", "clean", "wins AdvLoRA {:.0f} clean point", 1),
    ("base-to-new", "caltech101", "zero-shot", "AdvMask", "new clean", "They lose {:.0f} clean", 1),
    (
        "base-to-new",
        "caltech101",
        "AdvMask",
        "AdvLoRA",
        "new clean",
        "as AdvMask, and {:.0f} clean points lower there",
        1,
    ),
    (
        "base-to-new",
        "caltech101",
        "AdvMask",
        "AdvLoRA",
        "base clean",
        "classes the two are within noise of each other",
        0,
    ),
    ("base-to-new", "caltech101", "AdvMask", "AdvLoRA", "H", "and so is their H", 0),
    ("base-to-new", "caltech101", "zero-shot", "AdvVP", "new clean", "classes, {:.0f}, and", 1),
    ("base-to-new", "caltech101", "AdvMask", "AdvMaPLe", "H", "is above that of every prompt", 1),
    ("base-to-new", "caltech101", "AdvMask", "AdvVLP", "H", "is above that of every prompt", 1),
    ("base-to-new", "caltech101", "AdvMask", "FAP", "H", "is above that of every prompt", 1),
    ("base-to-new", "caltech101", "AdvMask", "AdvVP", "H", "is above that of every prompt", 1),
    ("base-to-new", "caltech101", "AdvVLP", "FAP", "H", "is below AdvVLP and AdvMaPLe", 1),
    ("base-to-new", "caltech101", "AdvMaPLe", "FAP", "H", "is below AdvVLP and AdvMaPLe", 1),
    ("base-to-new", "caltech101", "TGA-ZSR", "AdvMask", "H", "is ahead of AdvMask on both data", 1),
    ("base-to-new", "caltech101", "TeCoA", "AdvMask", "H", "is ahead of AdvMask on both data s", 1),
    ("base-to-new", "embedded", "TGA-ZSR", "AdvMask", "H", "is ahead of AdvMask on both data s", 1),
    ("base-to-new", "embedded", "TeCoA", "AdvMask", "H", "is ahead of AdvMask on both data set", 1),
    ("base-to-new", "embedded", "AdvMask", "AdvVLP", "H", "is above that of every prompt", 1),
    ("base-to-new", "embedded", "AdvMask", "AdvMaPLe", "H", "is above that of every prompt", 1),
    ("base-to-new", "embedded", "AdvMask", "FAP", "H", "is above that of every prompt", 1),
    ("base-to-new", "embedded", "AdvMask", "AdvVP", "H", "is above that of every prompt", 1),
    ("base-to-new", "embedded", "AdvVLP", "FAP", "H", "is below AdvVLP and AdvMaPLe", 1),
    ("base-to-new", "embedded", "AdvMaPLe", "FAP", "H", "is below AdvVLP and AdvMaPLe", 1),
    (
        "modules",
        "embedded",
        "AdvLoRA, attention",
        "AdvLoRA, both",
        "clean",
        "keeps {:.1f} clean",
        1,
    ),
    (
        "modules",
        "caltech101",
        "AdvLoRA, both",
        "AdvLoRA, attention",
        "clean",
        "it loses {:.0f} clean points and",
        1,
    ),
    ("modules", "caltech101", "AdvLoRA, both", "AdvLoRA, attention", "PGD", "and {:.0f} under", 1),
    (
        "modules",
        "caltech101",
        "attention",
        "AdvLoRA, attention",
        "PGD",
        "on Caltech101 it is {:.0f} points behind, in every",
        1,
    ),
    ("modules", "caltech101", "both", "AdvLoRA, both", "PGD", "is not ahead of AdvMask** under", 0),
    ("modules", "embedded", "both", "AdvLoRA, both", "PGD", "is not ahead of AdvMask** under P", 0),
    ("base-to-new", "embedded", "AdvLoRA", "AdvMask", "H", "AdvLoRA's H is {:.0f} points", 1),
    ("rivals", "embedded", TGA, "zero-shot", "PGD", "wins {:.0f} points over zero-shot under", 1),
    ("rivals", "caltech101", TGA, "zero-shot", "PGD", "and {:.0f} on Caltech101. That is as mu", 1),
    ("rivals", "embedded", FULL, "zero-shot", "PGD", "wins only 1 to {:.0f} points over", 1),
    ("rivals", "caltech101", FULL, "zero-shot", "PGD", "wins only {:.0f} to 3 points over", 1),
    (*TRANSFER, "TGA-ZSR", "AdvMask", "embedded PGD", "TGA-ZSR is {:.0f} points ahead of AdvM", 1),
    (*TRANSFER, "TGA-ZSR", "AdvMask", "caltech101 PGD", "and {:.0f} on Caltech101. FAP", 1),
    (*TRANSFER, "AdvMask", "FAP", "embedded PGD", "the embedded data, by {:.0f} points", 1),
    (*TRANSFER, "AdvMask", "zero-shot", "embedded PGD", "and {:.0f} points on", 1),
    (*TRANSFER, "AdvMask", "zero-shot", "caltech101 PGD", "gains nothing under PGD", 0),
    (*TRANSFER, "AdvLoRA", "zero-shot", "embedded PGD", "It gains {:.0f} points under PGD on", 1),
    (*TRANSFER, "AdvLoRA", "zero-shot", "caltech101 PGD", "nothing beyond noise on Caltech101", 1),
    (*TRANSFER, "AdvLoRA", "AdvMask", "tiny_imagenet PGD", "every seed, by {:.0f} to 4 points", 1),
    (*TRANSFER, "AdvLoRA", "AdvMask", "caltech101 PGD", "is ahead of AdvMask on all three", 1),
    (*TRANSFER, "AdvLoRA", "AdvMask", "embedded PGD", "every seed, by 1 to {:.0f} points", 1),
    (*TRANSFER, "FAP", "AdvMask", "caltech101 clean", "But FAP keeps {:.0f} clean points", 1),
    (
        "base-to-new",
        "caltech101",
        "zero-shot",
        "AdvMask",
        "base clean",
        "classes** lose {:.0f} clean points",
        1,
    ),
    (*TRANSFER, "TeCoA", "TGA-ZSR", "tiny_imagenet PGD", "most robust on all three sets", 1),
    (*TRANSFER, "TeCoA", "TGA-ZSR", "caltech101 PGD", "most robust on all three sets", 1),
    (*TRANSFER, "TeCoA", "TGA-ZSR", "embedded PGD", "most robust on all three sets", 1),
    (*TRANSFER, "TGA-ZSR", "TeCoA", "caltech101 clean", "and TGA-ZSR keeps more clean accuracy", 1),
    (*TRANSFER, "TGA-ZSR", "TeCoA", "embedded clean", "and TGA-ZSR keeps more clean accuracy", 1),
]


# The same of CHOICES.md
NONE, OWN, SAME = "--augment none", "defaults", "unchanged"
SHORTER = "--steps 150"
CHOICES = [
    ("choices", "caltech101", SHORTER, "--lam 50", "PGD", "150 is {:.1f} points more robust", 1),
    ("choices", "caltech101", SHORTER, "--lam 50", "clean", "seed, and keeps {:.0f} clean poin", 1),
    (
        "choices",
        "caltech101",
        "--lam 500",
        SHORTER,
        "PGD",
        "- 500 is {:.0f} points more robust than 150",
        1,
    ),
    ("choices", "caltech101", SHORTER, "--lam 0", "clean", "no LAFA, keeps {:.0f} clean points", 1),
    ("choices", "caltech101", SHORTER, "--budget 3", "clean", "costs {:.1f} clean points", 1),
    ("choices", "caltech101", SHORTER, "--batch-size 64", "clean", "costs AdvMask {:.1f} clean", 1),
    ("choices", "caltech101", SAME, "undivided", "clean", "On Caltech101 it keeps {:.0f} less", 0),
    (
        "choices",
        "caltech101",
        SAME,
        "undivided",
        "clean",
        "Caltech101 it keeps {:.0f} less, within",
        0,
    ),
    ("choices", "caltech101", SAME, "tokens", "PGD", "is {:.1f} points less robust on Cal", 1),
    ("choices", "caltech101", SAME, "raw --lam 0.5", "clean", "keep {:.0f} clean points less", 0),
    ("choices", "caltech101", SAME, "adam --budget 3", "clean", "at {:.0f} clean points less", 1),
    ("choices", "caltech101", SHORTER, SAME, "clean", "It keeps {:.0f} clean points less than", 1),
    (
        "choices",
        "caltech101",
        "--steps 300 --budget 3",
        SHORTER,
        "PGD",
        "budget are {:.0f} points",
        1,
    ),
    (
        "choices",
        "caltech101",
        "--steps 600 --budget 3",
        "--steps 300 --budget 3",
        "clean",
        "600 steps keep {:.0f} clean points more than 300",
        1,
    ),
    (
        "choices-embedded",
        "embedded",
        OWN,
        "undivided",
        "clean",
        "undivided` keeps {:.0f} clean points",
        1,
    ),
    (
        "choices-embedded",
        "embedded",
        OWN,
        "adam --budget 3",
        "clean",
        "and keeps {:.0f} clean points less than ours with",
        1,
    ),
    ("choices-embedded", "embedded", OWN, "raw --lam 0.5", "clean", " noise, and {:.0f} on the", 0),
    ("choices-embedded", "embedded", OWN, "attached", "clean", " embedded data {:.0f} clean po", 1),
    ("choices-embedded", "embedded", OWN, "tokens", "PGD", " Caltech101, and {:.1f} on the emb", 1),
    ("choices-embedded", "embedded", "--lam 0", OWN, "clean", "Lambda 0 keeps {:.0f} clean", 1),
    ("choices-embedded", "embedded", "--lam 500", OWN, "PGD", "Lambda 500 is {:.0f} points", 1),
    ("choices-embedded", "embedded", OWN, "--lam 500", "clean", "robust, at {:.0f} clean point", 1),
    ("choices-embedded", "embedded", "--lam 50", OWN, "PGD", "Lambda 50 is {:.0f} points more", 0),
    ("choices-embedded", "embedded", OWN, "--budget 0.75", "clean", "0.75 keeps {:.0f} clean", 1),
    (
        "choices-embedded",
        "embedded",
        "--lam 0",
        "--lam 500",
        "clean",
        "the least, {:.1f} points",
        1,
    ),
    (
        "choices-embedded",
        "embedded",
        "--lam 500",
        "--lam 0",
        "PGD",
        "Under PGD 500 wins {:.0f} points over 0, one",
        1,
    ),
    ("lora", "caltech101", SHORTER, "unbalanced", "PGD", "it is {:.1f} points lower under PGD", 1),
    ("lora", "caltech101", SHORTER, "unbalanced", "clean", "under PGD and {:.0f} clean, which", 1),
    ("lora", "caltech101", "--clean-weight 0.5", SHORTER, "clean", "wins {:.1f} clean points", 1),
    ("lora", "caltech101", SHORTER, "--clean-weight 0.5", "PGD", "and costs {:.1f} under PGD", 1),
    (
        "attempts",
        "caltech101",
        f"AdvMask {NONE}",
        "AdvMask defaults",
        "clean",
        "wins AdvMask {:.1f} clean points on Caltech101",
        1,
    ),
    (
        "attempts",
        "caltech101",
        f"AdvMask {NONE}",
        "AdvMask defaults",
        "PGD",
        "it wins {:.1f} points",
        1,
    ),
    (
        "attempts",
        "embedded",
        f"AdvMask {NONE}",
        "AdvMask defaults",
        "PGD",
        "and {:.1f} on the embedded data, one image",
        0,
    ),
    (
        "attempts",
        "embedded",
        "AdvMask defaults",
        f"AdvMask {NONE}",
        "clean",
        "and costs {:.0f} on",
        1,
    ),
    (
        "attempts",
        "caltech101",
        f"TeCoA {NONE}",
        "TeCoA defaults",
        "clean",
        "TeCoA wins {:.0f} clean",
        1,
    ),
    (
        "attempts",
        "embedded",
        f"TeCoA {NONE}",
        "TeCoA defaults",
        "clean",
        "TeCoA wins {:.0f} clean",
        1,
    ),
    (
        "attempts",
        "caltech101",
        f"AdvLoRA {NONE}",
        "AdvLoRA defaults",
        "clean",
        "AdvLoRA {:.0f} ",
        1,
    ),
    *[
        ("attempts", dataset, "AdvMask defaults", "AdvMask matrix", column, "seeds disagree", 0)
        for dataset in ("embedded", "caltech101")
        for column in ("clean", "PGD")
    ],
]


def difference(sweep, table, dataset, row, other, column):
    """row - other in points, of every seed that both have; zero-shot stands for every seed."""
    first, second = (sweep.find(table, name, dataset) for name in (row, other))
    of_first = dict(zip([line["seed"] for line in first.lines], first.values[column]))
    of_second = dict(zip([line["seed"] for line in second.lines], second.values[column]))
    if first.zero_shot:
        of_first = dict.fromkeys(of_second, *of_first.values())
    if second.zero_shot:
        of_second = dict.fromkeys(of_first, *of_second.values())
    return [of_first[seed] - of_second[seed] for seed in of_first if seed in of_second]


@pytest.mark.parametrize("claim", CLAIMS + CHOICES, ids=lambda claim: f"{claim[0]}: {claim[5]}")
def test_the_page_states_the_differences_of_the_tables(sweep, claim):
    *where, words, in_every_seed = claim
    differences = difference(sweep, *where)
    text = text_of("CHOICES.md" if claim in CHOICES else "RESULTS.md")
    assert words.format(statistics.mean(differences)) in text
    if in_every_seed:
        assert min(differences) > 0


@pytest.mark.parametrize(
    "row, other", [("TeCoA", "AdvMask"), ("TeCoA", "AdvLoRA"), ("AdvLoRA", "AdvMask")]
)
def test_the_page_has_all_differences_of_the_first_table(sweep, row, other):
    paired = importlib.import_module("scale").paired
    cells = [f"{row} minus {other}"]
    for column, right in (("PGD", "2"), ("clean", "12")):
        for dataset in ("embedded", "caltech101"):
            outcomes = []
            for name in (row, other):
                lines = sweep.find("main", name, dataset).lines
                outcomes.append([line["after"]["outcomes"] for line in lines])
            mean, low, high = paired(*outcomes, right)
            found = difference(sweep, "main", dataset, row, other, column)
            agree = min(found) > 0 or max(found) < 0
            beyond = low > 0 or high < 0
            cells.append(f"{mean:+.0f}" if agree and beyond else f"{mean:+.0f}, within noise")
    assert f"| {' | '.join(cells)} |" in text_of("RESULTS.md")


EVIDENCE = {
    "advmask.py": ("main", "AdvMask"),
    "advlora.py": ("main", "AdvLoRA"),
    "baselines/tecoa.py": ("main", "TeCoA"),
    "baselines/tgazsr.py": ("rivals", "TGA-ZSR"),
    "baselines/advvp.py": ("rivals", "AdvVP"),
}


def evidence(file):
    """The docstring of a program, without its line breaks, with the tables' sign."""
    return " ".join((HERE / file).read_text().split('"""')[1].split()).replace("+-", "±")


@pytest.mark.parametrize("dataset", ["embedded", "caltech101"])
@pytest.mark.parametrize("file", EVIDENCE)
def test_the_evidence_of_a_program_is_its_row(sweep, file, dataset):
    table, name = EVIDENCE[file]
    row, start = (sweep.find(table, key, dataset).values for key in (name, "zero-shot"))
    told = []
    for word, column in (("clean", "clean"), ("robust", "PGD")):
        told.append(f"{word} {sweep.mean(start[column])} -> {sweep.mean(row[column])}")
    assert ", ".join(told) in evidence(file)


@pytest.mark.parametrize("dataset", ["embedded", "caltech101"])
@pytest.mark.parametrize("method", ["AdvVLP", "AdvMaPLe", "FAP"])
def test_the_evidence_of_the_prompts_is_their_rows(sweep, method, dataset):
    values = sweep.find("rivals", method, dataset).values
    told = f"{method} {sweep.mean(values['clean'])} / {sweep.mean(values['PGD'])}"
    assert told in evidence("baselines/prompts.py")
    start = sweep.find("rivals", "zero-shot", dataset).values
    told = f"zero-shot {sweep.mean(start['clean'])} / {sweep.mean(start['PGD'])}:"
    assert told in evidence("baselines/prompts.py")


@pytest.mark.parametrize("dataset", ["embedded", "caltech101"])
def test_advvp_is_more_robust_than_zero_shot_with_no_seed(sweep, dataset):
    assert min(difference(sweep, "rivals", dataset, "zero-shot", "AdvVP", "PGD")) >= 0


def test_the_page_states_the_means_of_base_to_new_and_of_transfer(sweep):
    text = " ".join((RESULTS / "RESULTS.md").read_text().split())

    def mean(table, dataset, row, column):
        return statistics.mean(sweep.find(table, row, dataset).values[column])

    H = {
        row: mean("base-to-new", "caltech101", row, "H") for row in sweep.TABLES["base-to-new"].rows
    }
    best = [mean("base-to-new", "embedded", row, "H") for row in ("AdvMask", "AdvMaPLe")]
    told = f"On Caltech101 it is {H['AdvMask']:.1f} to AdvMaPLe's {H['AdvMaPLe']:.1f}, and on the"
    assert f"{told} embedded data {best[0]:.1f} to AdvMaPLe's {best[1]:.1f}." in text
    assert f"TGA-ZSR's H is {H['TGA-ZSR']:.1f}, TeCoA's {H['TeCoA']:.1f}." in text
    rows = "zero-shot", "AdvMask"
    new = [mean("base-to-new", "caltech101", row, "new PGD") for row in rows]
    assert f"rise from {new[0]:.1f} to {new[1]:.1f} % under PGD." in text
    new = [mean("base-to-new", "embedded", row, "new clean") for row in ("AdvMask", "AdvLoRA")]
    assert f"AdvMask keeps {new[0]:.0f} % clean on new classes, AdvLoRA {new[1]:.0f} %" in text
    new = [mean("base-to-new", "embedded", row, "new PGD") for row in ("TeCoA", "TGA-ZSR")]
    assert f"TeCoA keeps {new[0]:.1f} % on new classes, TGA-ZSR {new[1]:.1f} %" in text
    shots = [mean("shots", "caltech101", f"AdvMask, {k} shots", "PGD") for k in (8, 16)]
    told = f"AdvMask keeps {shots[0]:.1f} % under PGD with 8 shots, {shots[1]:.1f} % with 16,"
    assert f"{told} and {mean('steps', 'caltech101', SHORT, 'PGD'):.1f} % with 16 shots in" in text
    kept = mean("transfer", "tiny_imagenet", "AdvMask", "embedded PGD")
    assert f"It keeps {kept:.1f} % there, where guessing gives 10 %" in text


OLDER, NEWER = (("6d75b594cc9a", "NVIDIA H200"), ("dd229a8e9c70", "NVIDIA H200"))


def test_one_commit_and_one_gpu_made_the_tables_but_for_what_the_page_names(sweep):
    others = {}
    for table in sweep.TABLES:
        for line in sweep.read(table):
            if line["split"] == "test" and table != "scale":
                made = line["commit"], line["device_name"]
                if made != NEWER:
                    others.setdefault(made, set()).add((table, line["dataset"], line["row"]))
    assert "is of one commit, dd229a8, on an NVIDIA H200" in text_of("RESULTS.md")
    rows = {("base-to-new", "caltech101", method) for method in ("AdvMaPLe", "FAP")}
    assert others.pop(OLDER) == rows
    told = "Base to new classes of AdvMaPLe and FAP on Caltech101** are of commit 6d75b59"
    assert told in text_of("RESULTS.md")
    methods = "AdvVP", "AdvVLP", "AdvMaPLe", "FAP"
    rows = {("rivals", "caltech101", f"{method}, published recipe") for method in methods}
    assert others == {("dd229a8e9c70", "1 CPU threads"): rows}
    told = (
        "AdvVP, AdvVLP, AdvMaPLe and FAP on Caltech101 are of dd229a8, but ran on a CPU, in float"
    )
    assert told in text_of("RESULTS.md")
    attacked = lines_of(RESULTS / "autoattack.jsonl")
    assert {line["commit"] for line in attacked} == {"dd229a8e9c70"}
    on_cpu = {(line["row"], line["dtype"]) for line in attacked if line["device"] == "cpu"}
    assert on_cpu == {("AdvVLP, published recipe", "float32")}
    assert "**AutoAttack on AdvVLP's published recipe** is of dd229a8, but" in text_of("RESULTS.md")
    for table in sweep.TABLES:
        for line in sweep.read(table):
            here = line["row"].endswith("published recipe") and "CPU" in line["device_name"]
            assert line["dtype"] == ("float32" if here else "bfloat16"), line["row"]
    assert "All runs of this page computed in bfloat16" in text_of("CHOICES.md")


def test_runs_of_the_older_commit_came_out_alike_at_the_newer_one():
    if git("cat-file", "-e", "dd229a8e9c70").returncode:
        pytest.skip("the history is not here to look older lines up")
    alike = 0
    for table in ("base-to-new", "shots", "transfer"):
        newer = {}
        for line in lines_of(RESULTS / f"{table}.jsonl"):
            newer[line["dataset"], line["row"], line["seed"]] = line
        for text in git("show", f"dd229a8e9c70:results/{table}.jsonl").stdout.splitlines():
            older = json.loads(text)
            line = newer[older["dataset"], older["row"], older["seed"]]
            made = [(run["commit"], run["device_name"]) for run in (older, line)]
            if older["method"] == "prompts" and made == [OLDER, NEWER]:
                assert older["after"] == line["after"]
                alike += 1
    assert alike == 9 and "nine other runs of their program" in text_of("RESULTS.md")


def test_the_page_says_which_choices_ran_on_another_machine(sweep):
    def on_gpu(table, row):
        names = {line["device_name"] for line in sweep.find(table, row, "caltech101").lines}
        return {"NVIDIA" in name for name in names}

    text = text_of("CHOICES.md")
    assert "The rows above `unchanged` ran on a GPU, the others on a CPU" in text
    rows = list(sweep.TABLES["choices"].rows)
    first = rows.index(SAME)
    assert [on_gpu("choices", row) for row in rows[:first]] == [{True}] * first
    assert [on_gpu("choices", row) for row in rows[first:]] == [{False}] * len(rows[first:])


def test_stopping_late_changes_next_to_no_accuracy(sweep):
    late, own = (sweep.find("attempts", f"AdvMask {row}", "embedded") for row in ("late", OWN))
    assert late.values == own.values
    moved = []
    for column in ("clean", "PGD"):
        moved += difference(
            sweep, "attempts", "caltech101", "AdvMask late", "AdvMask defaults", column
        )
    assert len(moved) == 6
    told = f"none moves by more than {max(map(abs, moved)):.1f} points"
    assert told in text_of("CHOICES.md")
    (steps,) = {line["steps"] for line in own.lines}
    decay = 1 + torch.cos(math.pi * torch.arange(steps) / steps)  # as in advmask.train
    left = 100 * decay[-steps // 5 :].sum() / decay.sum()
    assert f"the cosine leaves {left:.1f} % of the budget to that fifth" in text_of("CHOICES.md")


def test_the_page_states_what_other_choices_do(sweep):
    text = text_of("CHOICES.md")
    adam = sweep.find("choices-embedded", "adam --budget 3", "embedded").lines
    off = statistics.mean(100 * line["off"] for line in adam)
    assert f"it turns {off:.0f} % of the weights off with a budget of 3" in text
    own, attached = (sweep.find("choices", row, "caltech101") for row in (SAME, "attached"))
    lost = []
    for column in ("clean", "PGD"):
        left = statistics.mean(attached.values[column]) / statistics.mean(own.values[column])
        lost.append(100 * (1 - left))
    told = (
        "{:.0f} % of the clean accuracy is lost on Caltech101, and {:.0f} % of the accuracy under"
    )
    assert told.format(*lost) in text
    on_gpu = difference(sweep, "choices", "caltech101", SHORTER, SAME, "clean")
    told = "than `--steps 150`: {:.1f}, {:.1f} and {:.0f} by seed"
    assert told.format(*on_gpu) in text
    for lam in (50, 150, 500, 1500):
        wins = []
        for column in ("PGD", "clean"):
            rows = f"scale --lam {lam}", "scale --lam 0"
            won = difference(sweep, "choices", "caltech101", *rows, column)
            wins.append(statistics.mean(won))
            if lam < 500:
                assert abs(wins[-1]) <= 2, "next to nothing"
            else:
                assert min(won) > 0
        told = "{} wins {:.0f} points under PGD over 0, and {:.0f} clean points, in every seed"
        assert lam < 500 or told.format(lam, *wins) in text


def test_with_one_shot_lafa_leads_in_every_seed_by_little(sweep):
    leads = []
    for row in ("CE", "CE + JS", "CE + KL", f"{LAFA} unweighted"):
        leads += difference(
            sweep, "loss", "caltech101", f"{LAFA}, 1 shot", f"{row}, 1 shot", "clean"
        )
    assert f"in every seed, but by as little as {min(leads):.1f} points" in text_of("RESULTS.md")
    assert min(leads) > 0


def test_the_page_states_where_advmask_trains_longer(sweep):
    text = text_of("RESULTS.md")
    for table, dataset, words in (
        ("transfer", "tiny_imagenet", "AdvMask for {} steps, the others for {}."),
        ("base-to-new", "caltech101", "AdvMask trains {} steps here, the others {}."),
    ):
        steps = {}
        for row in sweep.TABLES[table].rows:
            if row != "zero-shot":
                found = sweep.find(table, row, dataset).lines
                steps.setdefault(row == "AdvMask", set()).update(line["steps"] for line in found)
        (own,), (others,) = steps[True], steps[False]
        assert words.format(own, others) in text
    lost = difference(sweep, "base-to-new", "caltech101", "zero-shot", "AdvMask", "base clean")
    assert "{:.0f}, {:.0f} and {:.0f} by seed".format(*lost) in text


@pytest.mark.parametrize("dataset", ["embedded", "caltech101"])
def test_no_rival_sees_more_images_than_advmask(sweep, dataset):
    def images(row):
        found = sweep.find("rivals", row, dataset).lines
        return {line["steps"] * line["batch_size"] for line in found}

    (most,) = images("AdvMask")
    for row in sweep.TABLES["rivals"].rows:
        if row != "zero-shot" and not row.endswith(", published recipe"):
            assert max(images(row)) <= most


def test_the_page_states_what_advmaples_recipe_wins_by_seed(sweep):
    rows = "AdvMaPLe, published recipe", "AdvMaPLe"
    wins = difference(sweep, "rivals", "caltech101", *rows, "clean")
    told = f"more on Caltech101, {min(wins):.1f} to {max(wins):.1f} by seed"
    assert told in text_of("RESULTS.md")


def test_the_page_states_how_advvlp_varies(sweep):
    row = sweep.find("rivals", "AdvVLP", "caltech101")
    clean, robust = row.values["clean"], row.values["PGD"]
    text = " ".join((RESULTS / "RESULTS.md").read_text().split())
    first = f"seed 1 it keeps {clean[0]:.1f} % clean and {robust[0]:.1f} % under PGD"
    others = [f"with seed {k + 1} {clean[k]:.1f} and {robust[k]:.1f}" for k in (1, 2)]
    assert f"{first}, {', '.join(others)}." in text


def test_lafa_is_first_on_caltech101_in_every_seed(sweep):
    leads = difference(sweep, "loss", "caltech101", LAFA, "CE", "PGD")
    assert "points above CE, {:.1f}, {:.1f} and {:.1f} by seed".format(*leads) in text_of(
        "RESULTS.md"
    )
    losses = ("CE", "CE + JS", "CE + KL", "CE + LAFA unweighted")
    for other in losses:
        assert min(difference(sweep, "loss", "caltech101", LAFA, other, "PGD")) > 0
        rows = f"{LAFA}, 1 shot", f"{other}, 1 shot"
        assert min(difference(sweep, "loss", "caltech101", *rows, "clean")) > 0
    for other in losses[1:]:
        assert min(difference(sweep, "loss", "caltech101", LAFA, other, "clean")) > 0
        for column in ("clean", "PGD"):
            assert min(difference(sweep, "loss", "caltech101", "CE", other, column)) >= 0
    for column, words in (
        ("PGD", "Under PGD that is {} to {} points, within noise"),
        ("clean", "In clean accuracy it is {} to {} points, in every seed"),
    ):
        below = [
            round(statistics.mean(difference(sweep, "loss", "caltech101", "CE", other, column)))
            for other in losses[1:]
        ]
        assert words.format(min(below), max(below)) in text_of("RESULTS.md")


@pytest.mark.parametrize("other", ["CE", "CE + JS", "CE + KL"])
def test_lafa_is_below_the_losses_of_outputs_on_the_embedded_data(sweep, other):
    for row in (LAFA, f"{LAFA} unweighted"):
        below = difference(sweep, "loss", "embedded", other, row, "PGD")
        assert min(below) > 0 and 2.5 <= statistics.mean(below) <= 4.5, "3 to 4 points"
    assert "are 3 to 4 points below them in every seed" in text_of("RESULTS.md")


@pytest.mark.parametrize("dataset", ["embedded", "caltech101"])
@pytest.mark.parametrize("column", ["clean", "PGD"])
def test_sixteen_shots_are_better_than_one_in_every_seed(sweep, dataset, column):
    for method in ("AdvMask", "AdvLoRA"):
        rows = f"{method}, 16 shots", f"{method}, 1 shot"
        assert min(difference(sweep, "shots", dataset, *rows, column)) > 0


def test_with_eight_shots_advlora_is_ahead_in_every_seed(sweep):
    leads = []
    for dataset in ("embedded", "caltech101"):
        ahead = difference(sweep, "shots", dataset, "AdvLoRA, 8 shots", "AdvMask, 8 shots", "PGD")
        assert min(ahead) > 0
        leads.append(statistics.mean(ahead))
    assert f"by {leads[0]:.1f} points with 8 shots" in text_of("RESULTS.md")
    assert f"with 8 shots alone, on {leads[1]:.1f} points" in text_of("RESULTS.md")
    for shots in (2, 4, 16):
        rows = f"AdvLoRA, {shots} shots", f"AdvMask, {shots} shots"
        assert min(difference(sweep, "shots", "caltech101", *rows, "PGD")) < 0


@pytest.mark.parametrize("dataset", ["embedded", "caltech101"])
@pytest.mark.parametrize("shots", [2, 4, 8, 16])
def test_from_two_shots_on_advlora_keeps_more_clean_accuracy(sweep, dataset, shots):
    rows = f"AdvLoRA, {shots} shots", f"AdvMask, {shots} shots"
    assert min(difference(sweep, "shots", dataset, *rows, "clean")) > 0
    if dataset == "embedded":
        assert min(difference(sweep, "shots", dataset, *rows, "PGD")) > 0


def test_the_page_states_what_shots_win_fap(sweep):
    kept = []
    for dataset in ("caltech101", "embedded"):
        for shots in ("1 shot", "16 shots"):
            kept.append(
                statistics.mean(sweep.find("shots", f"FAP, {shots}", dataset).values["PGD"])
            )
    told = "{:.1f} % with one shot and {:.1f} % with 16, on the embedded data {:.1f} and {:.1f} %"
    assert told.format(*kept) in text_of("RESULTS.md")


@pytest.mark.parametrize("dataset", ["embedded", "caltech101"])
def test_one_shot_is_more_robust_than_none_in_every_seed(sweep, dataset):
    for method in ("AdvMask", "AdvLoRA"):
        rows = f"{method}, 1 shot", "zero-shot"
        assert min(difference(sweep, "shots", dataset, *rows, "PGD")) > 0


@pytest.mark.parametrize("dataset", ["embedded", "caltech101"])
def test_full_fine_tuning_is_more_robust_than_every_control_in_every_seed(sweep, dataset):
    for row in sweep.TABLES["controls"].rows:
        if row != "TeCoA":
            assert min(difference(sweep, "controls", dataset, "TeCoA", row, "PGD")) > 0


def robust_names(items, outcomes):
    """The class names of the robust images; outcomes are in the order of --test-limit."""
    names = [item.name for item in random.Random(0).sample(items, len(items))]
    return [name for name, digit in zip(names, outcomes, strict=True) if digit == "2"]


def test_few_classes_are_robust_among_the_embedded_new_classes(embedded):
    new = common.half(embedded, "new")
    for line in lines_of(RESULTS / "base-to-new.jsonl"):
        if line["dataset"] == "embedded":
            names = robust_names(new.test, line["after"]["transfer"]["new"]["outcomes"])
            if line["row"] == "AdvMask":
                assert set(names) == {"shirt", "bag"}
            if line["row"] == "AdvLoRA":
                assert set(names) == {"shirt"}
            if line["row"] in ("AdvVP", "AdvVLP", "AdvMaPLe", "FAP"):
                assert len(set(names)) <= 1, "of one class at most with every seed"
            if line["row"] in ("TeCoA", "TGA-ZSR"):
                assert len(set(names)) >= 3, "of three classes or more with every seed"
    told = "shirts and bags alone with AdvMask, and shirts alone with AdvLoRA"
    assert told in text_of("RESULTS.md")


def test_most_embedded_images_that_advmask_keeps_from_tiny_imagenet_are_bags(embedded):
    for line in lines_of(RESULTS / "transfer.jsonl"):
        if line["row"] == "AdvMask":
            outcomes = line["after"]["transfer"]["embedded"]["outcomes"]
            robust = robust_names(embedded.test, outcomes)
            assert robust.count("bag") > len(robust) / 2


def test_the_model_card_states_what_was_measured():
    card = (HERE / "tiny" / "README.md").read_text()
    facts = json.loads((HERE / "tiny" / "pretrain.json").read_text())
    for key in ("zero_shot_caltech101_test", "zero_shot_embedded_test", "logit_scale"):
        assert f"{facts[key]}" in card
    for key in ("seconds", "image_tower_parameters", "bytes", "tokens_seen"):
        assert f"{facts[key]:,}" in card
    assert (HERE / "tiny" / "weights.safetensors").stat().st_size == facts["bytes"] <= 12e6
    assert facts["zero_shot_caltech101_test"] >= 55 and facts["zero_shot_embedded_test"] >= 75


# ------------------------------------------------------------------------------------------------
# The commands
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, datasets", [("tiny", []), ("ViT-B-16-quickgelu", ["dtd", "sun397"])]
)
def test_every_command_of_every_table_is_one_that_its_program_takes(sweep, model, datasets):
    folders = set()
    for run in sweep.runs(sweep.TABLES, model, datasets):
        program, *words = [word for word in sweep.full_command(run, "d")[1:] if word != "-m"]
        module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
        args = common.parse(module.arguments(), words)
        own = f"local-dir:tiny/work/{run.row.split(',')[0].replace(' ', '-')}"
        wanted = own if run.table in ("scale", "scale-val") else model
        assert (args.model, args.dataset, args.seed) == (wanted, run.dataset, run.seed)
        assert args.out == run.folder
        folders.add(run.folder)
    assert len(folders) == len(sweep.runs(sweep.TABLES, model, datasets)), (
        "a folder of its own each"
    )


def test_the_page_has_the_command_of_every_table_with_published_numbers(sweep, monkeypatch, capsys):
    text = (RESULTS / "RESULTS.md").read_text()
    names = " ".join(re.search(r"NAMES are any of\s(.*?)\. Tables", text, re.DOTALL)[1].split())
    assert set(names.split()) == set(common.DATASETS) - {"tiny_imagenet"}
    commands = re.findall(r"On a GPU: `python (.*?) NAMES`\.\n\n<!-- table (\S+) -->", text)
    assert {table for _, table in commands} == set(sweep.PUBLISHED)
    for command, table in commands:
        script, *words = command.split()
        assert script == "results/sweep.py"
        tables = words[: words.index("--model")]
        needed = {table}
        for source in sweep.TABLES[table].rows.values():
            if isinstance(source, sweep.Same | sweep.ZeroShot):
                needed.add(source.table)
        assert set(tables) == needed, "all that the table shows"
        monkeypatch.setattr(sys, "argv", [script, *words, *names.split(), "--list"])
        sweep.main()
        listed = capsys.readouterr().out.splitlines()
        assert len(listed) == len(sweep.runs(tables, "ViT-B-32-quickgelu", names.split()))
        assert all("--model ViT-B-32-quickgelu" in line for line in listed)


def test_the_page_repeats_the_published_numbers_of_the_tables(sweep):
    page = (RESULTS / "RESULTS.md").read_text()
    part = page.partition("## Published numbers")[2].partition("\n## ")[0]
    shown = {}
    for line in part.splitlines():
        method, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        shown.setdefault(len(cells), {})[method.removesuffix(", 16 shots")] = cells
    _, halves = sweep.PUBLISHED["base-to-new"]
    for method, text in halves.items():
        assert "base {}, new {}, H {}".format(*shown[3][method]) == text
    _, transferred = sweep.PUBLISHED["transfer"]
    for method, text in transferred.items():
        assert shown[1][method] == [text]


def test_the_published_means_are_those_of_the_published_rows():
    page = (RESULTS / "RESULTS.md").read_text()
    rows = re.findall(r"^\| ([a-z0-9_]+|mean of 11) \| (.*) / (.*) \| (.*) / (.*) \|$", page, re.M)
    shown = {name: [float(cell) for cell in cells] for name, *cells in rows}
    means = shown.pop("mean of 11")
    assert set(shown) == set(common.DATASETS) - {"tiny_imagenet"}
    for column, published in zip(zip(*shown.values()), means):
        assert statistics.mean(column) == pytest.approx(published, abs=0.011)


def test_more_arguments_may_not_change_what_a_row_is(sweep):
    with pytest.raises(common.Fault, match="--more --steps would change the row 'AdvMask, 200"):
        sweep.runs(["steps"], more=["--steps", "1"])
    with pytest.raises(common.Fault, match="--more --steps would change"):
        sweep.runs(["steps"], more=["--steps=1"])
    assert sweep.runs(["steps"], more=["--pretrained", "file"])


def test_the_clips_of_other_widths_are_the_small_ones_alone(sweep):
    assert sweep.runs(["scale"]) and sweep.runs(["scale"], "ViT-B-32-quickgelu") == []


def test_a_row_of_another_table_is_not_run_twice(sweep):
    commands = [tuple(run.words) for run in sweep.runs(sweep.TABLES)]
    assert len(set(commands)) == len(commands)


def test_other_models_run_on_all_images_with_their_own_weight_of_kl(sweep):
    datasets = ["dtd", "food101"]
    tables = ["shots", "loss", "transfer"]
    more = shlex.split("--pretrained 'my file'")
    told = {}
    for run in sweep.runs(tables, "ViT-B-16-quickgelu", datasets, more):
        told[run.row, run.dataset, run.seed] = " ".join(run.words)
        assert run.words[-2:] == ["--pretrained", "my file"] and "--test-limit" not in run.words
    rest = "--model ViT-B-16-quickgelu --dataset {} --seed 1 --pretrained my file"
    expected = {
        ("AdvLoRA, 8 shots", "dtd"): "advlora.py --shots 8",
        ("CE + KL", "food101"): "advmask.py --loss kl --lam 4",
        ("AdvMask", "tiny_imagenet"): "advmask.py --transfer dtd food101",
    }
    for (row, dataset), text in expected.items():
        assert told[row, dataset, 1] == f"{text} {rest.format(dataset)}"


@pytest.fixture
def stubs(tmp_path):
    """A folder with the scripts, stubs of the programs, and no results -> sweep(*arguments).

    A stub notes its arguments and writes a result; it fails where the file "mode" names its seed.
    """
    (tmp_path / "results").mkdir()
    for script in ("sweep.py", "experiments.py"):
        shutil.copy(RESULTS / script, tmp_path / "results")
    shutil.copy(HERE / "common.py", tmp_path)
    (tmp_path / "baselines").mkdir()
    for program in ("advmask.py", "advlora.py", "baselines/tecoa.py"):
        (tmp_path / program).write_text(STUB)
    (tmp_path / "mode").write_text("")
    (tmp_path / "calls").write_text("")

    def run(*arguments):
        command = [sys.executable, tmp_path / "results" / "sweep.py", *arguments]
        return subprocess.run(command, cwd=tmp_path, text=True, capture_output=True)

    return run


STUB = """
import json, pathlib, sys
words = sys.argv[1:]
with open("calls", "a") as file:
    file.write(" ".join(words) + "\\n")
value = {name: words[words.index(name) + 1] for name in ("--dataset", "--seed", "--out")}
if open("mode").read() == f"{value['--dataset']} {value['--seed']}":
    sys.exit("out of luck")
folder = pathlib.Path(value["--out"]) / "x"
folder.mkdir(parents=True, exist_ok=True)
facts = {"dataset": value["--dataset"], "seed": int(value["--seed"]), "words": words, "off": 1 / 3}
if "--transfer" in words:
    facts["transfer"] = ["caltech101", "embedded"]
(folder / "result.json").write_text(json.dumps(facts))
"""


def kept(folder, table="main"):
    """What a table has lines of: (dataset, row, seed)."""
    file = folder / "results" / f"{table}.jsonl"
    return [(line["dataset"], line["row"], line["seed"]) for line in lines_of(file)]


def calls(folder):
    return (folder / "calls").read_text().splitlines()


def test_a_broken_sweep_goes_on_where_it_was(stubs, tmp_path):
    (tmp_path / "mode").write_text("embedded 3")
    answer = stubs("main")
    assert answer.returncode == 2 and answer.stderr.count("\n") == 1
    assert "out of luck" in answer.stderr and "log.txt" in answer.stderr
    assert kept(tmp_path) == [("embedded", "AdvMask", 1), ("embedded", "AdvMask", 2)]

    # a program that had ended when the sweep was killed: its result is there, its line is not
    first = "runs/sweep/tiny/main/embedded~AdvLoRA~1/x"
    (tmp_path / first).mkdir(parents=True)
    (tmp_path / first / "result.json").write_text('{"dataset": "embedded", "seed": 1}')

    (tmp_path / "mode").write_text("")
    before = len(calls(tmp_path))
    listed = stubs("main", "--list").stdout.splitlines()
    assert len(listed) == 18 - 3
    assert stubs("main", "--data-root", "photos", "--jobs", "2").returncode == 0
    assert len(kept(tmp_path)) == 18 and kept(tmp_path) == sorted(kept(tmp_path))
    assert len(calls(tmp_path)) - before == 18 - 3
    line = lines_of(tmp_path / "results" / "main.jsonl")[0]
    fixed = f"--model tiny --dataset caltech101 --seed 1 --data-root {tmp_path}/photos --out"
    assert " ".join(line["words"][:-1]) == fixed and line["off"] == 0.333333
    assert stubs("main", "--list").stdout == ""
    left = [path.name for path in tmp_path.rglob("*.part")]
    left += [path.name for path in tmp_path.rglob("result.json")]
    assert left == [], "what is kept is not taken a second time"


def test_listed_commands_run_in_the_repository(stubs, tmp_path):
    listed = stubs("main", "--list").stdout.splitlines()
    assert calls(tmp_path) == [] and not (tmp_path / "results" / "main.jsonl").exists()
    tecoa = shlex.split(listed[6])
    assert tecoa[:3] == ["python", "-m", "baselines.tecoa"]
    subprocess.run([sys.executable, *tecoa[1:]], cwd=tmp_path, check=True)
    assert len(stubs("main", "--list").stdout.splitlines()) == len(listed) - 1
    assert stubs("main", "--take").returncode == 0
    assert kept(tmp_path) == [("embedded", "TeCoA", 1)]


def test_the_job_array_runs_one_command_a_task_and_none_twice(stubs, tmp_path):
    assert stubs("transfer", "--slurm", "jobs.sh").returncode == 0
    assert "#SBATCH --array=0-14\n" in (tmp_path / "jobs.sh").read_text()
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": "4"}
    for _ in range(2):
        subprocess.run(["bash", tmp_path / "jobs.sh"], cwd="/", env=environment, check=True)
    assert len(calls(tmp_path)) == 1 and "--transfer caltech101 embedded" in calls(tmp_path)[0]
    # its result is taken in, and the next array has one task less
    assert stubs("transfer", "--take").returncode == 0
    assert kept(tmp_path, "transfer") == [("tiny_imagenet", "AdvLoRA", 2)]
    assert stubs("transfer", "--slurm", "jobs.sh").returncode == 0
    assert "#SBATCH --array=0-13\n" in (tmp_path / "jobs.sh").read_text()
    # to other data sets it has not been measured
    assert len(stubs("transfer", "--list", "--datasets", "dtd").stdout.splitlines()) == 15


def test_an_unknown_table_and_an_empty_array_are_one_sentence(stubs, tmp_path):
    answer = stubs("nope")
    assert answer.returncode == 2 and answer.stderr.startswith("error: ")
    assert answer.stderr.count("\n") == 1 and "nope" in answer.stderr
    answer = stubs("main", "--jobs", "0")
    assert answer.returncode == 2 and answer.stderr.count("\n") == 1
    assert stubs("steps").returncode == 0
    answer = stubs("steps", "--slurm", "none.sh")
    assert answer.returncode == 2 and answer.stderr.count("\n") == 1
    assert not (tmp_path / "none.sh").exists()


# ------------------------------------------------------------------------------------------------
# Lines, tables and pictures of planted results
# ------------------------------------------------------------------------------------------------


def result_of(sweep, run, **facts):
    """What a program would write for this run: arguments, then what was measured."""
    method, asked = sweep.parse(tuple(run.words))
    asked = dict(asked)
    after = {"outcomes": "2" * 10}
    for folder in ("data_root", "out", "load", "export"):
        del asked[folder]
    result = {"method": method, **asked, "versions": {}, "before": {}, "after": after}
    result |= {"training_seconds": 10, "peak_memory_mib": 1000}
    if method == "advmask":
        result |= {"masked": 884736, "off": 0.02}
    else:
        result |= {"trained": 165924}
    return {**result, **facts}


def plant(sweep, table, row, dataset, outcomes, seed=1, others=None, H=None, **facts):
    """Keep a result of this row. others: the outcomes on other test sets, by name."""
    for run in sweep.runs([table]):
        if (run.row, run.dataset, run.seed) == (row, dataset, seed):
            break
    after = {"outcomes": outcomes}
    if others:
        after["transfer"] = {name: {"outcomes": digits} for name, digits in others.items()}
    if H:
        after["H"] = H
    sweep.keep(table, row, result_of(sweep, run, after=after, **facts))


def cells(text):
    """The rows of a Markdown table, without the line under its head."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return [row for row in rows if set(row) != {"---"}]


@pytest.mark.parametrize("table", ["main", "loss", "choices", "lora", "transfer"])
def test_a_run_made_by_hand_is_taken_into_the_row_of_its_arguments(empty, tmp_path, table):
    everything = empty.runs(empty.TABLES)
    seen = set()
    for run in empty.runs([table]):
        if (run.row, run.dataset) in seen:
            continue
        seen.add((run.row, run.dataset))
        folder = tmp_path / "by hand"
        folder.mkdir(exist_ok=True)
        result = result_of(empty, run, eps=3 / 255)
        (folder / "result.json").write_text(json.dumps(result))
        taken = empty.take(folder, everything, "tiny")
        assert (taken.table, taken.row, taken.dataset) == (table, run.row, run.dataset)
    assert len(empty.read(table)) == len(seen)


def test_a_run_that_is_taken_takes_the_place_of_its_line(empty, tmp_path):
    for steps in (100, 300):
        for seed in (1, 2):
            plant(empty, "main", "AdvMask", "embedded", "2" * 10, seed, steps=steps)
    assert [(line["seed"], line["steps"]) for line in empty.read("main")] == [(1, 300), (2, 300)]
    with pytest.raises(common.Fault, match="no result.json"):
        empty.take(tmp_path, empty.runs(["main"]), "tiny")


def test_a_run_with_the_arguments_of_no_row_is_refused(empty, tmp_path):
    (run,) = [run for run in empty.runs(["steps"]) if run.seed == 1]
    changes = {"test_limit": 20}, {"batch_size": 8}, {"seed": 4}, {"loss": "ce"}, {"choice": "raw"}
    for change in changes:
        result = result_of(empty, run, **change)
        (tmp_path / "result.json").write_text(json.dumps(result))
        with pytest.raises(common.Fault, match="no row of steps"):
            empty.take(tmp_path, [run], "tiny")


def test_an_argument_that_a_row_leaves_out_must_have_been_left_out(empty, tmp_path):
    run = empty.runs(["main"])[0]
    for left_out, fits in ((["lam", "steps"], True), (["steps"], False)):
        result = result_of(empty, run, lam=30, steps=100, left_out=left_out)
        assert empty.fits(run, result) == fits
    (tmp_path / "result.json").write_text(json.dumps(result_of(empty, run, before=None)))
    with pytest.raises(common.Fault, match="did not train"):
        empty.take(tmp_path, [run], "tiny")


def test_a_file_of_lines_is_written_whole_or_not_at_all(empty, monkeypatch, tmp_path):
    plant(empty, "main", "AdvMask", "embedded", "2" * 10)
    before = empty.file_of("main").read_bytes()

    def full(*_):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(empty.os, "replace", full)
        with pytest.raises(OSError):
            plant(empty, "main", "AdvMask", "embedded", "0" * 10)
    assert empty.file_of("main").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["main.jsonl"]


def test_the_table_is_mean_and_deviation_beside_the_published_number(empty):
    for seed, wrong in ((1, 4), (2, 8)):
        outcomes = "2" * (20 - wrong) + "1" * wrong
        plant(empty, "modules", "MLP", "embedded", outcomes, seed)
    head, row = cells(empty.table("modules"))
    assert head[:6] == ["images", "run, small CLIP", "seeds", "clean", "PGD", "trained"]
    assert head[6:] == ["published, ViT-B/32, mean of 5 datasets"]
    robust = f"70.0 ± {statistics.stdev([80, 60]):.1f}"
    images = "embedded, 20 test, PGD-100"
    masked = "884,736 bits, 2.0 % off"
    assert row == [images, "MLP", "2", "100.0 ± 0.0", robust, masked, "65.73 / 45.95"]


def test_a_run_on_all_images_counts_on_the_images_of_its_table(empty):
    chosen = set(random.Random(0).sample(range(2465), 500))  # --test-limit 500 of Caltech101
    outcomes = "".join("2" if i in chosen else "0" for i in range(2465))
    plant(empty, "main", "AdvMask", "caltech101", outcomes)
    plant(empty, "shots", "AdvMask, 1 shot", "caltech101", "1" * 500)
    (row,) = cells(empty.table("main"))[1:]
    assert row[:4] == ["caltech101, 2465 test, PGD-100", "AdvMask", "1", "20.3"]
    one, sixteen = cells(empty.table("shots"))[1:]
    images = "caltech101, 500 test, PGD-100"
    assert one[:5] == [images, "AdvMask, 1 shot", "1", "100.0", "0.0"]
    assert sixteen[:5] == [images, "AdvMask, 16 shots", "1", "100.0", "100.0"]
    shown = [(row[1], row[-1]) for row in cells(empty.table("loss"))[1:]]
    assert shown == [("CE + LAFA", "67.3 / 47.1"), ("CE + LAFA, 1 shot", "46.6 / 18.4")]


def test_zero_shot_is_what_a_run_measured_before_its_training(empty):
    before = {"outcomes": "2110"}
    for seed in (1, 2):
        plant(empty, "main", "AdvMask", "embedded", "2222", seed, before=before)
    zero_shot, trained = cells(empty.table("main"))[1:]
    assert zero_shot[1:6] == ["zero-shot", "1", "75.0", "25.0", "0"]
    assert trained[1:5] == ["AdvMask", "2", "100.0 ± 0.0", "100.0 ± 0.0"]


def test_the_tables_of_several_test_sets_have_a_column_for_each(empty):
    plant(empty, "base-to-new", "AdvMask", "embedded", "2211", others={"new": "2111"}, H=43.2)
    head, row = cells(empty.table("base-to-new"))
    assert head[3:8] == ["base clean", "base PGD", "new clean", "new PGD", "H"]
    assert row[3:8] == ["100.0", "50.0", "100.0", "25.0", "43.2"]
    others = {"caltech101": "2211", "embedded": "2110"}
    plant(empty, "transfer", "AdvMask", "tiny_imagenet", "0000", others=others)
    head, row = cells(empty.table("transfer"))
    assert head[5:9] == ["caltech101 clean", "caltech101 PGD", "embedded clean", "embedded PGD"]
    assert row[5:9] == ["100.0", "50.0", "75.0", "25.0"]


@pytest.mark.parametrize("key, values", [("lam", (50, 150)), ("augment", ("crop", "none"))])
def test_runs_of_different_arguments_have_no_mean(empty, key, values):
    for seed, value in enumerate(values, 1):
        plant(empty, "main", "AdvMask", "embedded", "2222", seed, **{key: value})
    with pytest.raises(common.Fault, match=f"AdvMask on embedded differ in {key}:"):
        empty.table("main")


def test_only_what_stands_between_the_markers_is_written(empty):
    plant(empty, "main", "AdvMask", "embedded", "2222")
    page = "a <b>\n<!-- table main -->\nold\nlines\n<!-- end -->\nc\n<!-- other -->\n"
    filled = empty.fill(page)
    head, _, tail = filled.partition(empty.table("main"))
    assert head == "a <b>\n<!-- table main -->\n"
    assert tail == "\n<!-- end -->\nc\n<!-- other -->\n" and empty.fill(filled) == filled


def test_the_short_table_has_a_pair_of_columns_for_every_dataset(empty):
    plant(empty, "main", "AdvMask", "embedded", "2210")
    plant(empty, "main", "AdvMask", "caltech101", "2000")
    found = [row for row in cells(empty.short_table()) if row[0] == "AdvMask"]
    assert found == [["AdvMask", "884,736 bits", "75.0", "50.0", "25.0", "25.0"]]


@pytest.fixture
def pictures(empty):
    """The module results/pictures.py, with no results yet."""
    pytest.importorskip("matplotlib")
    return importlib.import_module("pictures")


def test_the_curve_over_shots_is_the_table(empty, pictures):
    for seed, right in ((1, 100), (2, 140)):
        outcomes = "2" * right + "1" * (200 - right)
        plant(empty, "shots", "AdvMask, 2 shots", "embedded", outcomes, seed)
    before = {"outcomes": "1" * 150 + "0" * 50}
    plant(empty, "main", "AdvMask", "embedded", "0" * 200, before=before)
    assert pictures.curves("embedded") == {
        ("zero-shot", "clean"): [(0, 75.0, 0)],
        ("zero-shot", "PGD"): [(0, 0.0, 0)],
        ("AdvMask", "clean"): [(2, 100.0, 0.0), (16, 0.0, 0)],
        ("AdvMask", "PGD"): [(2, 60.0, pytest.approx(statistics.stdev([50, 70]))), (16, 0.0, 0)],
    }


def test_the_curve_over_widths_is_the_table(empty, pictures):
    for width, outcomes in ((96, "2210"), (288, "2220")):
        plant(empty, "scale", f"width {width}, TeCoA", "caltech101", outcomes)
    assert pictures.over_widths("PGD") == {"TeCoA": [(96, 50.0, 0), (288, 75.0, 0)]}
    assert pictures.over_widths("clean") == {"TeCoA": [(96, 75.0, 0), (288, 75.0, 0)]}


def test_the_marks_of_the_methods_are_the_table(empty, pictures):
    for seed, outcomes in ((1, "2210"), (2, "2220")):
        plant(empty, "main", "TeCoA", "embedded", outcomes, seed)
    spread = pytest.approx(statistics.stdev([50, 75]))
    assert pictures.marks("main", "embedded") == {"TeCoA": ((75.0, 0.0), (62.5, spread))}


@pytest.mark.parametrize("name", ["shots.png", "methods.png", "rivals.png", "scale.png"])
def test_pictures_are_opaque_and_white(name):
    image = common.Image.open(RESULTS / name).convert("RGBA")
    assert image.getchannel("A").getextrema() == (255, 255)
    assert image.getpixel((0, 0)) == (255, 255, 255, 255)
