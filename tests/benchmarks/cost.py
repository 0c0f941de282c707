"""What do a training step and its memory cost beside full adversarial fine-tuning?

    python tests/benchmarks/cost.py                        # the small CLIP, embedded data
    python tests/benchmarks/cost.py --model ViT-B-32-quickgelu --pretrained none --batch-size 8

Every program trains 20 steps in a process of its own, in turns for three rounds; the least of three
counts. Unlike speed.py this counts all of a training: augmentation, and the memory of the process.
More arguments go to every program.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
RUNS = {
    "TeCoA": ["-m", "baselines.tecoa"],
    "AdvLoRA": ["advlora.py"],
    "plain LoRA": ["advlora.py", "--init", "kaiming", "--no-align", "--no-adaptive"],
    "AdvMask": ["advmask.py"],
    "TGA-ZSR": ["-m", "baselines.tgazsr"],
    "AdvVP": ["-m", "baselines.advvp"],
    "AdvVLP": ["-m", "baselines.prompts", "--method", "advvlp"],
    "AdvMaPLe": ["-m", "baselines.prompts", "--method", "advmaple"],
    "FAP": ["-m", "baselines.prompts", "--method", "fap"],
}
STEPS = 20
SHORT = ["--steps", str(STEPS), "--test-steps", "1", "--test-limit", "1"]


def run(words):
    """Run a program -> seconds of its training, MiB of its process."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, *words, *SHORT, *sys.argv[1:], "--out", out]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        (file,) = pathlib.Path(out).glob("*/result.json")
        result = json.loads(file.read_text())
    return result["training_seconds"], result["peak_memory_mib"]


def main():
    seconds = {name: [] for name in RUNS}
    memory = {name: [] for name in RUNS}
    for _ in range(3):
        for name, words in RUNS.items():
            took, mib = run(words)
            seconds[name].append(took)
            memory[name].append(mib)
    print("| run | ms a step | of TeCoA | MiB of the process |\n|---|---|---|---|")
    for name in RUNS:
        least = min(seconds[name])
        share = 100 * least / min(seconds["TeCoA"])
        print(f"| {name} | {1000 * least / STEPS:.0f} | {share:.0f} % | {min(memory[name])} |")


if __name__ == "__main__":
    main()
