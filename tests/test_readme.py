"""The README's tables are what results/sweep.py prints from the JSON files."""
import json
import pathlib
import random
import re
import subprocess
import sys

import pytest

import common

HERE = pathlib.Path(__file__).resolve().parent.parent


def test_the_tables_are_what_the_command_prints():
    command = [sys.executable, HERE / "results" / "sweep.py", "--table"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    blocks = dict(re.findall(r"<!-- table (\S+) -->\n(.*?)\n?<!-- end -->", printed, re.DOTALL))
    shown = dict(re.findall(r"<!-- table (\S+) -->\n(.*?)\n?<!-- end -->", (HERE / "README.md").read_text(), re.DOTALL))
    assert shown == blocks    # every table has its place


def test_the_table_of_memory_is_what_the_command_prints():
    printed = subprocess.run([sys.executable, HERE / "results" / "memory.py"], check=True, capture_output=True, text=True).stdout
    assert f"<!-- memory -->\n{printed}<!-- end -->" in (HERE / "README.md").read_text()


def test_the_table_of_ranks_is_what_the_results_say(monkeypatch):
    monkeypatch.syspath_prepend(HERE / "results")
    pytest.importorskip("matplotlib")
    import lowrank
    shown = dict(re.findall(r"<!-- lowrank (\S+) -->\n(.*?)\n<!-- end -->", (HERE / "README.md").read_text(), re.DOTALL))
    facts = {name: json.loads((HERE / "results" / "lowrank" / f"{name}.json").read_text()) for name in shown}
    assert "caltech101" in shown and shown == {name: lowrank.table(facts[name]) for name in shown}
    for row in facts["caltech101"]["rows"]:    # the rank is that of the singular values
        energy = [v**2 for v in row["singular_values"]]
        assert sum(energy[:row["rank_90"] - 1]) < 0.9 * sum(energy) <= 1.001 * sum(energy[:row["rank_90"]])
        assert row["residual"]["svd"] <= row["residual"]["cluster"] <= row["residual"]["membership"]


def test_only_shirts_and_bags_are_robust_among_the_embedded_new_classes(embedded):
    new = common.half(embedded, "new")
    names = [item.name for item in random.Random(0).sample(new.test, len(new.test))]    # the order of the outcomes, as of --test-limit 500
    for method, expected in (("AdvMask", {"shirt", "bag"}), ("AdvLoRA", {"shirt"})):
        for seed in (1, 2, 3):
            result = json.loads((HERE / "results" / "base-to-new" / f"embedded~{method}~{seed}.json").read_text())
            outcomes = result["after"]["transfer"]["new"]["outcomes"]
            assert {name for name, digit in zip(names, outcomes, strict=True) if int(digit) & 2} == expected


def test_most_embedded_images_that_advmask_keeps_from_tiny_imagenet_are_bags(embedded):
    names = [item.name for item in random.Random(0).sample(embedded.test, len(embedded.test))]
    for seed in (1, 2, 3):
        result = json.loads((HERE / "results" / "transfer" / f"tiny_imagenet~AdvMask~{seed}.json").read_text())
        robust = [name for name, digit in zip(names, result["after"]["transfer"]["embedded"]["outcomes"], strict=True) if int(digit) & 2]
        assert robust.count("bag") > len(robust) / 2


def test_the_model_card_states_what_was_measured():
    card, facts = (HERE / "tiny" / "README.md").read_text(), json.loads((HERE / "tiny" / "pretrain.json").read_text())
    for key in ("zero_shot_caltech101_test", "zero_shot_embedded_test", "logit_scale"):
        assert f"{facts[key]}" in card
    for key in ("seconds", "image_tower_parameters", "bytes", "tokens_seen"):
        assert f"{facts[key]:,}" in card
    assert (HERE / "tiny" / "weights.safetensors").stat().st_size == facts["bytes"] <= 12e6
    assert facts["zero_shot_caltech101_test"] >= 55 and facts["zero_shot_embedded_test"] >= 75
