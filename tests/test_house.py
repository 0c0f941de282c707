"""The promises of the house: who may know of whom, how many arguments, what can be copied."""

import ast
import builtins
import importlib
import math
import pathlib
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

import common

HERE = pathlib.Path(__file__).resolve().parent.parent
METHODS = sorted(path for path in HERE.glob("*.py") if path.name != "common.py")
METHODS += sorted((HERE / "baselines").glob("*.py"))
# as modules: advmask, baselines.tecoa
PROGRAMS = [".".join(path.relative_to(HERE).with_suffix("").parts) for path in METHODS]

# where these arguments are not given, nothing takes their place
WITHOUT_DEFAULT = {"test_limit", "load", "export"}


def stem(path):
    return path.stem


# ------------------------------------------------------------------------------------------------
# Three floors
# ------------------------------------------------------------------------------------------------


def test_the_methods_and_baselines_are_found():
    assert set(PROGRAMS) >= {"advmask", "advlora", "baselines.tecoa"}


def test_the_ground_floor_mentions_no_method():
    text = (HERE / "common.py").read_text().lower()
    mentioned = [path.stem for path in METHODS if path.stem in text]
    assert mentioned == []


def imports(path):
    """Every part of every name that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names.update(alias.name.split("."))
        if isinstance(node, ast.ImportFrom):
            names.update((node.module or "").split("."))
            names.update(alias.name for alias in node.names)
    return names


def house():
    """Names that are the house's own: its methods, baselines and folders."""
    folders = [path.name for path in HERE.iterdir() if any(path.glob("*.py"))]
    return {*folders, *(path.stem for path in METHODS)}


@pytest.mark.parametrize("path", METHODS, ids=stem)
def test_methods_and_baselines_import_nothing_of_the_house_but_common(path):
    assert imports(path) & (house() | {"common"}) == {"common"}


def test_the_ground_floor_imports_nothing_of_the_house():
    assert imports(HERE / "common.py") & house() == set()


# ------------------------------------------------------------------------------------------------
# Layout
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["format", "--check"], ["check"]], ids=["format", "check"])
def test_ruff_has_nothing_to_say(command):
    pytest.importorskip("ruff")
    ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "."]
    answer = subprocess.run(ruff, cwd=HERE, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr


# ------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------


def options(parser):
    """The arguments of a parser, without -h."""
    return [action for action in parser._actions if action.dest != "help"]


def test_at_most_20_arguments_are_shared():
    parser = common.Parser()
    common.add_arguments(parser)
    assert len(options(parser)) <= 20


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_has_at_most_28_arguments(name):
    parser = importlib.import_module(name).arguments()
    assert len(options(parser)) <= 28


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_argument_has_a_sentence_that_tells_its_default(name):
    parser = importlib.import_module(name).arguments()
    for action in options(parser):
        assert action.help, action.dest
        sentence = action.help % vars(action)
        if action.default is None:
            told = "default" in sentence or action.dest in WITHOUT_DEFAULT
        elif action.default is False or action.default == []:
            told = True  # a switch that is off, a list that is empty
        else:
            told = str(action.default) in sentence
        assert told, f"{action.dest}: {sentence!r} does not tell {action.default!r}"


# what the libraries do is not ours: they come first
IMPORT = """
import argparse, importlib, random, sys
import numpy, open_clip, safetensors.torch, torch, torchvision, tqdm
from torchvision.transforms import v2
def states():
    flash = torch.backends.cuda.flash_sdp_enabled()
    drawn = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    return flash, drawn, torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
def refuse(*_, **__):
    sys.exit("an import made a parser")
argparse.ArgumentParser.__init__ = refuse
before = states()
for name in sys.argv[1:]:
    importlib.import_module(name)
assert states() == before, "an import changed a global state"
"""


def test_importing_a_method_builds_no_parser_and_changes_no_global_state():
    command = [sys.executable, "-c", IMPORT, *PROGRAMS]
    answer = subprocess.run(command, cwd=HERE, stderr=subprocess.PIPE)
    assert answer.returncode == 0, answer.stderr.decode()


# ------------------------------------------------------------------------------------------------
# Sections that can be copied
# ------------------------------------------------------------------------------------------------

RULE = "# " + 96 * "-" + "\n"


def sections():
    """-> {banner: text up to the next banner} of common.py, and "" for what precedes them all."""
    parts = re.split(f"{RULE}# (.*)\n{RULE}", (HERE / "common.py").read_text())
    return dict(zip(["", *parts[1::2]], parts[::2]))


def test_common_has_its_five_sections():
    robust = "Robust evaluation: needs torch alone"
    assert list(sections()) == ["", "Arguments", "Data", "CLIP", robust, "Files"]


def names_from_elsewhere(text):
    """Names that a section uses and neither defines nor finds among Python's own."""
    used, bound = set(), set(dir(builtins))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            used.add(node.id)
        elif isinstance(node, ast.Name):
            bound.add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound.add(node.name)
    return used - bound


def test_robust_evaluation_names_nothing_but_torch():
    torch_and_math = {"torch", "F", "nn", "math", "DataLoader", "Dataset", "Subset"}
    text = sections()["Robust evaluation: needs torch alone"]
    assert names_from_elsewhere(text) <= torch_and_math


def test_robust_evaluation_runs_where_there_is_torch_alone(linear):
    place = {"torch": torch, "F": F, "nn": nn, "math": math}
    place.update(DataLoader=DataLoader, Dataset=Dataset, Subset=Subset)
    exec(sections()["Robust evaluation: needs torch alone"], place)
    result = place["evaluate"](linear.net, linear.images, linear.eps, 30, linear.eps / 2)
    assert result["pgd"] == pytest.approx(100 * (linear.worst > 0).double().mean().item())
    place["print_table"]([("linear", result)], 30)


def test_the_data_section_needs_only_fault_and_write_of_the_others():
    place = {"__file__": str(HERE / "common.py")}
    exec(sections()[""], place)
    place.update(Fault=common.Fault, write=common.write)
    exec(sections()["Data"], place)
    data = place["load_dataset"]("embedded", None)
    train, _ = place["few_shot"](data.train, data.val, 1, 1)
    images = place["decode"](place["half"](data._replace(train=train), "base").train, 8)
    ((x, y),) = place["batches"](images, 8, 5, steps=1)
    assert x.shape == (5, 3, 8, 8)
    assert sorted(y.tolist()) == [0, 1, 2, 3, 4]
    with pytest.raises(common.Fault, match="not a folder"):
        place["load_dataset"]("folder", pathlib.Path("nowhere"))


def test_the_patch_embedding_runs_where_there_is_torch_alone():
    text = sections()["CLIP"]
    tree = ast.parse(text)
    (node,) = [node for node in tree.body if getattr(node, "name", "") == "PatchEmbedding"]
    place = {"torch": torch, "nn": nn}
    exec(ast.get_source_segment(text, node), place)
    convolution = nn.Conv2d(3, 5, 4, 4, bias=False)
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(place["PatchEmbedding"](convolution)(x), convolution(x))
