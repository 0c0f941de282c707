"""On a GPU: what the programs give, and the memory they take. Skipped where there is none."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
from conftest import result_in

HERE = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def on_gpu():
    """on_gpu(*words): run python with these words where the GPU is seen -> what it printed."""
    environment = {**os.environ}
    del environment["CUDA_VISIBLE_DEVICES"]  # conftest.py hid it
    if os.environ["ADV_GPUS"] != "all":
        environment["CUDA_VISIBLE_DEVICES"] = os.environ["ADV_GPUS"]

    def run(*words):
        command = [sys.executable, *map(str, words)]
        ended = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    if run("-c", "import torch; print(torch.cuda.is_available())").strip() != "True":
        pytest.skip("there is no GPU")
    return run


@pytest.mark.parametrize(
    "words",
    [
        ["advmask.py"],
        ["advlora.py"],
        ["-m", "baselines.tecoa"],
        ["-m", "baselines.tgazsr"],
        ["-m", "baselines.advvp"],
        ["-m", "baselines.prompts", "--method", "fap"],
    ],
    ids=lambda words: words[-1],
)
def test_a_program_trains_and_evaluates_on_the_gpu(on_gpu, tmp_path, words):
    on_gpu(*words, "--steps", 20, "--test-steps", 10, "--test-limit", 64, "--out", tmp_path)
    result = result_in(tmp_path)
    assert (result["device"], result["dtype"]) == ("cuda", "bfloat16")
    assert "CPU" not in result["device_name"]
    for evaluation in (result["before"], result["after"]):
        assert evaluation["flags"] == []
        assert 0 < evaluation["clean"] and evaluation["pgd"] <= evaluation["clean"]


def test_the_gpu_gives_the_outcomes_of_the_cpu(on_gpu, tmp_path):
    few = ["--dtype", "float32", "--steps", 1, "--budget", 0, "--test-steps", 20]
    outcomes = {}
    for device in ("cuda", "cpu"):
        on_gpu("advmask.py", *few, "--device", device, "--out", tmp_path / device)
        outcomes[device] = result_in(tmp_path / device)["before"]["outcomes"]
    differ = sum(a != b for a, b in zip(outcomes["cuda"], outcomes["cpu"]))
    assert len(outcomes["cpu"]) == 200 and differ <= 2


def test_the_measured_memory_is_that_of_the_formula(on_gpu):
    model = "ViT-B-32-quickgelu"
    printed = {}
    for more in ([], ["--measure"]):
        answer = on_gpu("results/memory.py", "--models", model, *more)
        row = next(line for line in answer.splitlines() if line.startswith(f"| {model}"))
        printed[len(more)] = [float(gib) for gib in re.findall(r"([\d.]+) GiB", row)]
    # the first row measured is that of float32, which the formula counts
    assert printed[1] == pytest.approx(printed[0], rel=0.15)
