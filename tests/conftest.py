"""What the tests share: data, the small CLIP, a linear classifier whose robustness has a closed
form, and programs that run in this process."""

import importlib
import json
import os
import pathlib
import random
import sys
import urllib.error
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

# The tests assert what a CPU computes, also where there is a GPU. test_gpu.py gives the GPU back to
# the programs that it runs.
os.environ.setdefault("ADV_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from torch import nn

import common


def pytest_configure(config):
    numbers = "asserts accuracies of the small CLIP; their thresholds are constants of the file"
    config.addinivalue_line("markers", f"numbers: {numbers}")


@pytest.fixture(scope="session", autouse=True)
def fast_attention():
    """The CPU kernel that the programs choose; see common.parse."""
    torch.backends.cuda.enable_flash_sdp(False)


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state, whichever tests run."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def no_test_leaves_this_machine(monkeypatch):
    def no_network(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)


@pytest.fixture
def unchecked(monkeypatch):
    """Evaluation without the sanity checks, which take longest."""
    monkeypatch.setattr(common, "sanity", lambda *_: [])


@pytest.fixture(scope="session")
def data_root():
    """The folder that ADV_DATA names, in CoOp's layout."""
    if not os.environ.get("ADV_DATA"):
        wanted = "a folder with caltech-101/, tiny-imagenet-200/, splits/ and fewshot_indices/"
        pytest.skip(f"ADV_DATA is not set: it names {wanted}")
    return pathlib.Path(os.environ["ADV_DATA"])


@pytest.fixture
def tiny():
    """A fresh small CLIP and its configuration: tests change its weights."""
    return common.load_clip("tiny")


@pytest.fixture(scope="session")
def embedded():
    """The data in tiny/, as common.Data."""
    return common.load_dataset("embedded", None)


@pytest.fixture
def classifier(tiny, embedded):
    """The small CLIP on the embedded classes, float32."""
    return common.Classifier(*tiny, embedded.classes, embedded.template)


@pytest.fixture
def images(embedded):
    """Six test images of the embedded set: x (6, 3, 64, 64) in [0, 1], y (6,)."""
    pairs = list(common.TestImages(embedded.test[::37], 64))
    x = torch.stack([pixels for pixels, _ in pairs]) / 255
    y = torch.tensor([label for _, label in pairs])
    return x, y


class Linear(nn.Module):
    """Pixels -> two logits, W x + b; it remembers every input."""

    def __init__(self, pixels):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.W = nn.Parameter(torch.randn(2, pixels, generator=generator))
        self.b = nn.Parameter(-self.W.detach().sum(1) / 2)  # even odds for a mid-grey image
        self.inputs = []

    def forward(self, x):
        self.inputs.append(x.detach().clone())
        return x.flatten(1) @ self.W.T + self.b


def make_linear(side=4, eps=0.02):
    """A binary problem that can be solved by hand: net, x (40, 3, side, side), y, some wrong, eps.

    margin is the right logit less the other, and worst its least value in the ball,
    margin - eps |w_y - w_other|_1: x is so far from 0 and 1 that no pixel is clipped. images is
    the same as a list of (pixels, label).
    """
    net = Linear(3 * side**2).eval()
    x = 0.3 + 0.4 * torch.rand(40, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = net(x)
        y = logits.argmax(1)
        y[::7] = 1 - y[::7]
        margin = logits[range(40), y] - logits[range(40), 1 - y]
        worst = margin - eps * (net.W[0] - net.W[1]).abs().sum()
    assert worst.abs().min() > 1e-3, "no tie"
    clean, robust = (margin > 0).float().mean(), (worst > 0).float().mean()
    assert 0.2 < robust < clean < 1, "neither hopeless nor trivial"
    net.inputs.clear()
    images = list(zip(x, y.tolist()))
    return SimpleNamespace(net=net, x=x, y=y, images=images, eps=eps, margin=margin, worst=worst)


@pytest.fixture
def linear():
    return make_linear()


@pytest.fixture(name="make_linear")
def make_linear_fixture():
    return make_linear


@pytest.fixture
def program(monkeypatch, capsys, tmp_path):
    """program("advmask", *arguments) -> code, out, err of `python advmask.py arguments`.

    It runs in this process, from an empty folder; "baselines.tecoa" names a baseline.
    """

    def run(name, *arguments):
        capsys.readouterr()
        file = name.replace(".", "/") + ".py"
        monkeypatch.setattr(sys, "argv", [file, *map(str, arguments)])
        monkeypatch.chdir(tmp_path)
        code = 0
        try:
            common.guard(importlib.import_module(name).main)
        except SystemExit as stop:
            code = stop.code
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())

    return run


@pytest.fixture
def picture_folder():
    """picture_folder(path, classes, n): n noise images a class, as --dataset folder wants them."""

    def make(path, classes=("cat", "dog"), n=4, size=40):
        generator = np.random.default_rng(0)
        for name in classes:
            (path / name).mkdir(parents=True)
            for i in range(n):
                noise = generator.integers(0, 256, (size, size + 8, 3), dtype=np.uint8)
                Image.fromarray(noise).save(path / name / f"{i}.png")
        return path

    return make


def files_in(folder):
    """Every file under a folder, hidden ones too."""
    if not folder.is_dir():
        return []
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir())


@pytest.fixture(name="files_in")
def files_in_fixture():
    return files_in


def result_in(folder):
    """What the one run under this folder wrote as its result."""
    (path,) = folder.rglob("result.json")
    return json.loads(path.read_text())


def assert_fault(answer, *words):
    """The program ended with one sentence on stderr, with these words in it, and code 2."""
    assert answer.code == 2, answer.err
    assert answer.err.startswith("error: ") and answer.err.endswith("\n"), answer.err
    assert answer.err.count("\n") == 1, answer.err
    for word in words:
        assert word in answer.err, answer.err


class ByHand:
    """SGD with momentum 0.9, or Adam without weight decay, written out.

    It moves the weights {name: tensor} in place.
    """

    def __init__(self, weights, published, decay=0.0):
        self.weights = weights
        self.published = published
        self.decay = decay
        self.steps = 0
        self.first = {name: torch.zeros_like(p) for name, p in weights.items()}
        self.second = {name: torch.zeros_like(p) for name, p in weights.items()}

    def step(self, loss, rate):
        gradients = torch.autograd.grad(loss, list(self.weights.values()))
        self.steps += 1
        for (name, p), g in zip(self.weights.items(), gradients):
            if self.published:
                self.first[name] = 0.9 * self.first[name] + g + self.decay * p.detach()
                p.data -= rate * self.first[name]
                continue
            self.first[name] = 0.9 * self.first[name] + 0.1 * g
            self.second[name] = 0.999 * self.second[name] + 0.001 * g**2
            mean = self.first[name] / (1 - 0.9**self.steps)
            square = self.second[name] / (1 - 0.999**self.steps)
            p.data -= rate * mean / (square.sqrt() + 1e-8)


def snapshot(weights):
    return {name: p.detach().clone() for name, p in weights.items()}


def compare(train, weights, batches, again):
    """Run train(batches), note the weights before every step and in the end; compare with again().

    Both start from the same random state. again() -> [{name: weight}, ...].
    """
    history = []

    def watched():
        for batch in batches:
            history.append(snapshot(weights))
            yield batch

    state = torch.get_rng_state()
    train(watched())
    history.append(snapshot(weights))
    torch.set_rng_state(state)
    expected = again()
    moved = 0.0
    for found, wanted in zip(history, expected, strict=True):
        for name in wanted:
            # the rate of the loop is in single precision, which that of the loop again is not
            torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-7)
            moved = max(moved, (found[name] - history[0][name]).abs().max().item())
    assert moved > 1e-3, "something was trained"
