"""results/scale.py: paired differences, how far weights move, and what RESULTS.md says of both."""

import importlib
import json
import pathlib
import re
import statistics

import pytest
import torch

import advmask
import common

HERE = pathlib.Path(__file__).resolve().parent.parent
RESULTS = HERE / "results"
PAGE = (RESULTS / "RESULTS.md").read_text()


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def scale(monkeypatch):
    """The module results/scale.py."""
    monkeypatch.syspath_prepend(RESULTS)
    return importlib.import_module("scale")


def test_the_page_shows_the_tables_that_the_lines_give(scale):
    assert PAGE == scale.fill(PAGE), "run python results/scale.py --write"
    for marker in (scale.CLIPS, scale.DIFFERENCES, scale.MOVEMENT):
        assert marker in PAGE


def test_zero_shot_is_that_of_the_clips(scale):
    """On all test images in float32, and on 500 of them in bfloat16."""
    for line in lines_of(scale.CLIPS_FILE):
        row = scale.sweep.find("scale", f"width {line['width']}, zero-shot", "caltech101")
        if row is not None:
            assert abs(row.values["clean"][0] - line["zero_shot_caltech101_test"]) < 5


def test_the_clips_differ_in_width_alone(scale):
    lines = lines_of(scale.CLIPS_FILE)
    assert [line["width"] for line in lines] == list(scale.WIDTHS)
    recipes = [[line[key] for key in ("stages", "batch_size", "teacher")] for line in lines]
    assert recipes == [recipes[0]] * len(lines)


def test_every_key_of_a_line_is_explained_and_its_commit_is_clean(scale):
    explained = set(re.findall(r"`(\w+)`", (RESULTS / "README.md").read_text()))
    for line in (*lines_of(scale.FILE), *lines_of(scale.CLIPS_FILE)):
        assert set(line) <= explained, set(line) - explained
        assert re.fullmatch("[0-9a-f]{12}", line["commit"])


def gaps_of(scale, width, column, other="TeCoA"):
    """AdvMask minus the other at this width, seed by seed."""
    rows = []
    for name in ("AdvMask", other):
        rows.append(scale.sweep.find("scale", f"width {width}, {name}", "caltech101"))
    mask, full = (row.values[column] for row in rows)
    return [a - b for a, b in zip(mask, full, strict=True)]


def test_the_page_and_the_readme_state_what_the_widths_show(scale):
    text, readme = " ".join(PAGE.split()), " ".join((HERE / "README.md").read_text().split())
    found = {"12": [], "2": []}
    for width in scale.WIDTHS:
        mine, theirs = (scale.outcomes(f"width {width}, {name}") for name in ("AdvMask", "TeCoA"))
        assert list(mine) == list(theirs) == [1, 2, 3]
        for right, differences in found.items():
            differences.append(scale.paired(mine.values(), theirs.values(), right))
    behind = [-mean for mean, _, _ in found["2"]]
    gap = f"{min(behind):.0f} to {max(behind):.0f} points behind full fine-tuning"
    assert gap in text and gap in readme
    for width in scale.WIDTHS:
        gaps = gaps_of(scale, width, "PGD")
        assert len(gaps) == 3 and max(gaps) < 0, "in each of the twelve pairs of runs"
        # t of two degrees of freedom
        reaches_zero = statistics.mean(gaps) + 4.303 * statistics.stdev(gaps) / 3**0.5 > 0
        assert reaches_zero == (width in (192, 288))
    clean = gaps_of(scale, 384, "clean")
    assert sum(gap > 0 for gap in clean) == 2, "two seeds of three have the other sign"
    assert max(low for _, low, _ in found["2"]) < min(high for _, _, high in found["2"]), "overlap"
    first, *_, last = found["12"]
    assert f"is {-first[0]:.0f} points at width 96 and {-last[0]:.0f} at 384" in text
    assert last[1] < 0 < last[2]
    lora = []
    for width in scale.WIDTHS:
        gaps = gaps_of(scale, width, "PGD", "AdvLoRA")
        lora.append(-statistics.mean(gaps))
        assert (max(gaps) < 0) == (width != 192), "within noise"
    assert f"as well, by {min(lora):.0f} to {max(lora):.0f} points." in text
    assert f"and is {lora[-1]:.0f} points ahead of it" in text
    off = []
    for width in (96, 288):
        lines = scale.sweep.find("scale", f"width {width}, AdvMask", "caltech101").lines
        off.append(100 * statistics.mean(line["off"] for line in lines))
    assert f"{off[0]:.1f} % of the entries are off at width 96, and {off[1]:.1f} % at 288" in text
    ratios = []
    for width in scale.WIDTHS:
        moved = {}
        for line in lines_of(scale.FILE):
            if line["model"].endswith(f"width-{width}"):
                moved.setdefault(line["method"], []).append(line["attention"])
        mean = {method: statistics.mean(some) for method, some in moved.items()}
        ratios.append(mean["advmask"] / mean["tecoa"])
        assert (mean["advlora"] > mean["advmask"]) == (width == 384)
        zero_shot = scale.sweep.find("scale", f"width {width}, zero-shot", "caltech101")
        assert zero_shot.values["PGD"][0] < 10
    assert f"attention {min(ratios):.1f} to {max(ratios):.1f} times as far" in text
    assert ratios == sorted(ratios, reverse=True) and "falls from width to width" in text


def test_the_rate_and_steps_of_a_width_are_the_best_on_val(scale):
    experiments = importlib.import_module("experiments")
    for width in scale.WIDTHS:
        for method, (_, texts) in experiments.SCALE.items():
            sums = {}
            for text in texts:
                name = f"width {width}, {method} {text or 'defaults'}"
                values = scale.sweep.find("scale-val", name, "caltech101").values
                sums[text] = values["clean"][0] + values["PGD"][0]
            assert experiments.CHOSEN[width, method] == max(sums, key=sums.get)


def test_a_difference_is_paired_by_seed_and_image(scale):
    # robust: images 1, 2 of the first method; image 2 of the second, and image 1 with one seed
    first, second = ["0221", "0220"], ["0022", "0220"]
    mean, low, high = scale.paired(first, second, "2")
    # d = the mean over the seeds of 0, 1 and 0, 0 and 0, -1 and 0
    d = 100 * torch.tensor([0, 0.5, 0, -0.5])
    assert mean == pytest.approx(d.mean().item())
    assert high - mean == pytest.approx(1.96 * d.std().item() / 2) == mean - low
    # clean: image 1 of the first method with the first seed
    assert scale.paired(first, second, "12")[0] == pytest.approx(100 * 0.5 / 4)


def test_two_rows_with_other_seeds_are_not_paired(scale):
    with pytest.raises(ValueError):
        scale.paired(["02"], ["02", "02"], "2")


def test_movement_is_the_relative_distance_over_all_weights(scale):
    before = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    after = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([[6.0]])}
    assert scale.movement(before, after, ["a", "b"]) == pytest.approx(5**0.5 / 5)
    assert scale.movement(before, after, ["b"]) == pytest.approx(0.5)


def test_what_is_off_was_not_zero_before(scale):
    before = {"a": torch.tensor([3.0, 0.0, -2.0, 1.0])}
    after = {"a": torch.tensor([0.0, 0.0, -2.0, 0.0])}
    share, size = scale.switched_off(before, after, ["a"])
    assert (share, size) == (0.5, pytest.approx(2 / 1.5))
    assert scale.switched_off(before, before, ["a"]) == (0.0, None)


def test_a_run_of_advmask_is_measured_by_its_bits(scale, program, unchecked, tmp_path):
    few = "--steps", 20, "--batch-size", 4, "--test-limit", 1, "--test-steps", 1
    assert program("advmask", *few, "--device", "cpu", "--out", tmp_path).code == 0
    (folder,) = tmp_path.glob("*/")
    line = scale.measure(folder)
    tensors, facts = common.load_adapter(folder, "advmask", [])
    clip, _ = common.load_clip("tiny")
    theta = {name: p.detach().clone() for name, p in clip.named_parameters()}
    masks = advmask.attach(clip, advmask.vision_weights(clip, "attn"))
    advmask.unpack(masks, tensors)
    lost = sum(theta[name][~mask.kept()].square().sum().item() for name, mask in masks.items())
    length = sum(theta[name].square().sum().item() for name in masks)
    assert line["off"] == pytest.approx(advmask.share_off(masks), rel=1e-3)
    assert line["attention"] == pytest.approx((lost / length) ** 0.5, rel=1e-3)
    assert 0 < line["tower"] < line["attention"] and line["size"] > 1
    assert (line["method"], line["commit"]) == ("advmask", facts["commit"])
