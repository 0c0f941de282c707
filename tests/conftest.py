"""What the tests share: the data that ADV_DATA names, the small CLIP, a linear classifier whose robustness has a closed form, programs run here."""
import importlib
import os
import pathlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import common


def pytest_configure(config):
    config.addinivalue_line("markers", "numbers: asserts accuracies of the small CLIP; its thresholds are constants at the top of the file")


@pytest.fixture(scope="session", autouse=True)
def fast_attention():
    """The CPU kernels that the programs choose; see common.parse."""
    torch.backends.cuda.enable_flash_sdp(False)


@pytest.fixture(scope="session")
def data_root():
    """The folder that ADV_DATA names, in CoOp's layout."""
    if not os.environ.get("ADV_DATA"):
        pytest.skip("ADV_DATA is not set: it names a folder with caltech-101/, splits/ and fewshot_indices/")
    return pathlib.Path(os.environ["ADV_DATA"])


@pytest.fixture
def tiny():
    """A fresh small CLIP and its configuration: tests change its weights."""
    return common.load_clip("tiny")


@pytest.fixture(scope="session")
def embedded():
    return common.load_dataset("embedded", None)


@pytest.fixture
def classifier(tiny, embedded):
    """The small CLIP on the embedded classes, float32."""
    return common.Classifier(*tiny, embedded.classes, embedded.template)


@pytest.fixture
def images(embedded):
    """Six test images of the embedded set, float in [0, 1], and their labels."""
    x, y = common.test_set(embedded.test[::37], 64)
    return x.float() / 255, y


class Linear(nn.Module):
    """Pixels -> two logits, W x + b; it remembers every input."""

    def __init__(self, pixels):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.W = nn.Parameter(torch.randn(2, pixels, generator=generator))
        self.b = nn.Parameter(-self.W.detach().sum(1) / 2)    # even odds for a mid-grey image
        self.inputs = []

    def forward(self, x):
        self.inputs.append(x.detach().clone())
        return x.flatten(1) @ self.W.T + self.b


def make_linear(side=4, eps=0.02):
    """A binary problem: net, x far from 0 and 1, y (some wrong), eps, margin, and its worst in the ball, margin - eps |w_y - w_other|_1."""
    net = Linear(3 * side**2).eval()
    x = 0.3 + 0.4 * torch.rand(40, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = net(x)
        y = logits.argmax(1)
        y[::7] = 1 - y[::7]
        margin = (logits[range(40), y] - logits[range(40), 1 - y])
        worst = margin - eps * (net.W[0] - net.W[1]).abs().sum()
    assert worst.abs().min() > 1e-3, "no tie"
    assert 0.2 < (worst > 0).float().mean() < (margin > 0).float().mean() < 1, "neither hopeless nor trivial"
    net.inputs.clear()
    return SimpleNamespace(net=net, x=x, y=y, eps=eps, margin=margin, worst=worst)


@pytest.fixture
def linear():
    return make_linear()


@pytest.fixture(name="make_linear")
def make_linear_fixture():
    return make_linear


@pytest.fixture
def program(monkeypatch, capsys, tmp_path):
    """program("advmask", *arguments) -> code, out, err of `python advmask.py arguments`, in this process, from an empty folder."""
    def run(name, *arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
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
    """picture_folder(path, classes, n): n noise images per class, as --dataset folder wants them."""
    def make(path, classes=("cat", "dog"), n=4, size=40):
        generator = np.random.default_rng(0)
        for name in classes:
            (path / name).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(generator.integers(0, 256, (size, size + 8, 3), dtype=np.uint8)).save(path / name / f"{i}.png")
        return path
    return make


def files_in(folder):
    """Every file under a folder, hidden ones too."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()) if folder.is_dir() else []


@pytest.fixture(name="files_in")
def files_in_fixture():
    return files_in
