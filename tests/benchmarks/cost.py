"""What do a training step and its memory cost beside full adversarial fine-tuning?

    python tests/benchmarks/cost.py                        # the small CLIP, embedded data
    python tests/benchmarks/cost.py --rounds 1 --steps 3 --model ViT-B-32-quickgelu \\
        --pretrained none --batch-size 8                   # random weights

Every program trains --steps steps in a process of its own, in turns for --rounds rounds; the least
counts. Unlike speed.py this counts all of a training: augmentation, and the memory of the process.
More arguments go to every program.
"""

import argparse
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
SHORT = ["--test-steps", "1", "--test-limit", "1"]


def run(words, more):
    """Run a program with more arguments -> seconds of its training, MiB of its process."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, *words, *SHORT, *more, "--out", out]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        (file,) = pathlib.Path(out).glob("*/result.json")
        result = json.loads(file.read_text())
    return result["training_seconds"], result["peak_memory_mib"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="the least of so many counts")
    parser.add_argument("--steps", type=int, default=20, help="training steps of every program")
    args, more = parser.parse_known_args()
    more += ["--steps", str(args.steps)]
    seconds = {name: [] for name in RUNS}
    memory = {name: [] for name in RUNS}
    for _ in range(args.rounds):
        for name, words in RUNS.items():
            took, mib = run(words, more)
            seconds[name].append(took)
            memory[name].append(mib)
    print("| run | ms a step | of TeCoA | MiB of the process |\n|---|---|---|---|")
    for name in RUNS:
        least = min(seconds[name])
        share = 100 * least / min(seconds["TeCoA"])
        print(f"| {name} | {1000 * least / args.steps:.0f} | {share:.0f} % | {min(memory[name])} |")


if __name__ == "__main__":
    main()
