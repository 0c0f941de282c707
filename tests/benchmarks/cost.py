"""What does a training step cost, and how much memory: the methods beside full adversarial fine-tuning.

    python tests/benchmarks/cost.py                # the small CLIP, embedded data; other arguments go to every program

Every program trains 20 steps in a process of its own, three rounds of all of them; the least of three counts, as ratios within one run.
"""
import json
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent.parent.parent
RUNS = {"full fine-tuning": ["advlora.py", "--full"], "AdvLoRA": ["advlora.py"],
        "plain LoRA": ["advlora.py", "--init", "gaussian", "--no-align", "--no-adaptive"], "AdvMask": ["advmask.py"]}
FIXED = ["--steps", "20", "--test-steps", "1", "--test-limit", "1", "--after-only"]

if __name__ == "__main__":
    seconds, memory = ({name: [] for name in RUNS} for _ in range(2))
    for _ in range(3):
        for name, (script, *arguments) in RUNS.items():
            with tempfile.TemporaryDirectory() as out:
                command = [sys.executable, HERE / script, *arguments, *FIXED, *sys.argv[1:], "--out", out]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                result = json.loads(next(pathlib.Path(out).glob("*/result.json")).read_text())
            seconds[name].append(result["training_seconds"])
            memory[name].append(result["peak_memory_mib"])
    print("| run | ms a step | of full fine-tuning | MiB of the process |\n|---|---|---|---|")
    for name in RUNS:
        least = min(seconds[name])
        print(f"| {name} | {1000 * least / 20:.0f} | {100 * least / min(seconds['full fine-tuning']):.0f} % | {min(memory[name])} |", flush=True)
