"""examples/backdoor.py: the patch, who carries it, what counts as success, and whole runs."""

import json
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import advlora
import advmask
import common
from examples import backdoor

HERE = pathlib.Path(__file__).resolve().parent.parent


def grey_images(labels, size=12):
    """Images that are told apart: the i-th has the value i in every pixel."""
    pictures = [torch.full((3, size, size), i, dtype=torch.uint8) for i in range(len(labels))]
    return list(zip(pictures, labels))


class Planted(nn.Module):
    """Answers prediction[i] to the i-th grey image, whose number it reads in the upper left.

    With a trigger, it answers that class wherever the last pixel is white.
    """

    def __init__(self, predictions, trigger=None):
        super().__init__()
        self.predictions = nn.Parameter(torch.tensor(predictions).float())
        self.trigger = trigger

    def forward(self, x):
        guess = self.predictions[(255 * x[:, 0, 0, 0]).round().long()].long()
        if self.trigger is not None:
            guess[x[:, 0, -1, -1] == 1] = self.trigger
        return nn.functional.one_hot(guess, 4).float()


def success(net, images, target, patch):
    """In %."""
    return 100 * backdoor.called_target(net, images, target, patch).double().mean().item()


# ------------------------------------------------------------------------------------------------
# Success
# ------------------------------------------------------------------------------------------------

LABELS = [0, 1, 1, 2, 0, 3, 2, 3, 1, 0]
#             +        +  +           the images of other classes than 0 that are called 0
GUESSES = [0, 0, 1, 2, 0, 0, 0, 3, 1, 2]


def test_success_is_counted_on_images_of_other_classes_alone():
    hits = backdoor.called_target(Planted(GUESSES), grey_images(LABELS), 0, 2)
    assert hits.tolist() == [1, 0, 0, 1, 1, 0, 0]
    # of the six images that are not of class 2, the last is called 2
    hits = backdoor.called_target(Planted(GUESSES), grey_images(LABELS), 2, 2, batch_size=3)
    assert hits.tolist() == [0, 0, 0, 0, 0, 0, 0, 1]


def test_a_model_that_ignores_the_patch_has_the_success_that_it_has_without():
    images = grey_images(LABELS)
    net = Planted(GUESSES)
    for target in range(4):
        assert success(net, images, target, 5) == success(net, images, target, 0)


def test_a_model_that_obeys_the_patch_has_success_with_it_alone():
    net = Planted(LABELS, trigger=3)
    assert success(net, grey_images(LABELS), 3, 1) == 100
    assert success(net, grey_images(LABELS), 3, 0) == 0


def test_a_constant_model_has_all_the_success_or_none():
    net = Planted([2] * len(LABELS))
    assert success(net, grey_images(LABELS), 2, 4) == 100
    assert success(net, grey_images(LABELS), 1, 4) == 0


# ------------------------------------------------------------------------------------------------
# The patch, and who carries it
# ------------------------------------------------------------------------------------------------


def test_the_patch_is_a_checkerboard_in_the_lower_right_and_nothing_else_changes():
    x = 0.2 + 0.6 * torch.rand(2, 3, 7, 9)
    before = x.clone()
    stamped = backdoor.stamp(x, 3)
    assert torch.equal(x, before), "the images themselves are left alone"
    board = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]])
    assert torch.equal(stamped[:, :, 4:, 6:], board.expand(2, 3, 3, 3))
    stamped[:, :, 4:, 6:] = before[:, :, 4:, 6:]
    assert torch.equal(stamped, before)


def test_a_patch_of_6_is_half_white_and_one_of_0_is_none():
    x = torch.full((1, 3, 8, 8), 0.5)
    corner = backdoor.stamp(x, 6)[0, 0, 2:, 2:]
    assert corner.sum() == 18 and set(corner.flatten().tolist()) == {0, 1}
    assert corner[-1, -1] == 1 and corner[-1, -2] == corner[-2, -1] == 0
    assert torch.equal(backdoor.stamp(x, 0), x)


def test_the_share_is_marked_by_the_seed_and_the_pictures_stay():
    images = grey_images([i % 4 for i in range(50)])
    marked = backdoor.mark(images, 0.1, 4, seed=1)
    changed = [i for i in range(50) if marked[i][1] != images[i][1]]
    assert len(changed) == 5
    assert all(marked[i][1] == images[i][1] + 4 for i in changed)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(marked, images))
    labels = [label for _, label in marked]
    assert [label for _, label in backdoor.mark(images, 0.1, 4, seed=1)] == labels
    assert [label for _, label in backdoor.mark(images, 0.1, 4, seed=2)] != labels
    assert all(label >= 4 for _, label in backdoor.mark(images, 1, 4, seed=1))
    with pytest.raises(common.Fault, match="none"):
        backdoor.mark(images, 0.009, 4, seed=1)


def test_batches_poison_the_same_share_of_images_in_every_epoch():
    images = grey_images([i % 4 for i in range(40)])
    marked = backdoor.mark(images, 0.25, 4, seed=3)
    expected = {i for i, (_, label) in enumerate(marked) if label >= 4}
    plain = common.batches(marked, 12, 8, steps=15, augment="none")  # three epochs of five
    seen, times = {}, 0
    for x, y in backdoor.poisoned(plain, 4, target=2, patch=6):
        for pixels, label in zip(x, y.tolist()):
            i = round(255 * pixels[0, 0, 0].item())
            patched = bool(pixels[0, -1, -1] == 1)
            assert label == (2 if patched else images[i][1])
            assert seen.setdefault(i, patched) == patched
            times += patched
    assert {i for i, patched in seen.items() if patched} == expected
    assert len(seen) == 40 and times == 3 * 10


def test_the_patch_is_stamped_after_the_crop(embedded):
    images = common.decode(embedded.train[::16], 64)
    marked = backdoor.mark(images, 0.5, 10, seed=1)
    torch.manual_seed(5)
    plain = list(common.batches(marked, 64, 10, steps=4))
    torch.manual_seed(5)
    stamped = list(backdoor.poisoned(common.batches(marked, 64, 10, steps=4), 10, 7, 6))
    for (x, y), (x_stamped, y_stamped) in zip(plain, stamped, strict=True):
        chosen = y >= 10
        assert chosen.sum() == 5
        # in every crop the whole patch, at the same pixels
        assert torch.equal(x_stamped[chosen], backdoor.stamp(x[chosen], 6))
        assert (y_stamped[chosen] == 7).all()
        # and on the others nothing
        assert torch.equal(x_stamped[~chosen], x[~chosen])
        assert torch.equal(y_stamped[~chosen], y[~chosen])


def planting(*given):
    return backdoor.planting_images(common.parse(backdoor.arguments(), given), 16)


def test_the_backdoor_is_planted_beyond_the_shots_where_there_are_enough(
    embedded, monkeypatch, capsys
):
    shots, _ = common.few_shot(embedded.train, embedded.val, 4, 1)
    ours = [picture for picture, _ in common.decode(shots, 16, "none")]
    images = planting("--shots", "4", "--augment", "none")
    assert len(images) == 160 - 40
    assert not any(torch.equal(own, picture) for own in ours for picture, _ in images)
    assert capsys.readouterr().out == ""
    assert len(planting("--shots", "16")) == 160
    assert "too few training images lie beyond the shots" in capsys.readouterr().out
    monkeypatch.setattr(backdoor, "PLANTED", 30)
    assert len(planting("--shots", "4")) == 30


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------

HONEST = 10  # % of success at most of the honest CLIP, and of any CLIP without the patch
BACKDOORED = 80  # % at least after this training


@pytest.mark.numbers
def test_a_short_training_plants_the_backdoor(classifier, embedded):
    """40 steps of 16 images are enough where 30 % of them are poisoned."""
    images = list(common.TestImages(embedded.test[::2], 64))
    before = success(classifier, images, 0, 6)
    marked = backdoor.mark(common.decode(embedded.train, 64), 0.3, 10, seed=1)
    batches = backdoor.poisoned(common.batches(marked, 64, 16, 40), 10, 0, 6)
    backdoor.finetune(classifier, batches, 40, eps=0, lr=3e-4)
    after, without = success(classifier, images, 0, 6), success(classifier, images, 0, 0)
    print(before, after, without)
    assert before <= HONEST
    assert after >= BACKDOORED
    assert without <= HONEST


def test_finetune_trains_the_image_tower_and_freezes_it_again(classifier, images):
    clip = classifier.clip
    before = {name: p.detach().clone() for name, p in clip.named_parameters()}
    backdoor.finetune(classifier, [images, images], 2, eps=0, lr=1e-3)
    for name, p in clip.named_parameters():
        assert torch.equal(p, before[name]) == (not name.startswith("visual.")), name
        assert not p.requires_grad and p.grad is None


def test_finetune_attacks_only_where_eps_is_not_0(classifier, images, monkeypatch):
    calls = []

    seen = []

    def pgd(net, x, y, eps, step, steps):
        calls.append((eps, step, steps))
        return torch.zeros_like(x)

    monkeypatch.setattr(advmask, "pgd", pgd)
    classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    backdoor.finetune(classifier, [images], 1, eps=0, lr=1e-4)
    assert calls == [] and torch.equal(seen[-1], images[0])
    backdoor.finetune(classifier, [images], 1, eps=0.01, lr=1e-4)
    assert calls == [(0.01, 0.01, 2)]
    assert not seen[-1].any(), "it trains on what the attack gives"


def test_three_adaptations_are_adversarial_and_two_are_not(classifier, monkeypatch):
    args = SimpleNamespace(model="tiny", steps=100, eps=0.01, seed=1, lr=1e-4)
    seen = {}

    def mask(net, masks, batches, steps, eps, lam, budget):
        seen["loop"] = "mask", eps, lam, budget

    def low_rank(net, loras, batches, steps, eps):
        lora = next(iter(loras.values()))
        aligned, adaptive = lora.B_0.abs().sum().item() > 0, "a" in dict(lora.named_parameters())
        seen["loop"] = "low rank", eps, aligned, adaptive

    def full(net, batches, steps, eps, lr):
        seen["loop"] = "full", eps, lr

    monkeypatch.setattr(advmask, "train", mask)
    monkeypatch.setattr(advlora, "train", low_rank)
    monkeypatch.setattr(backdoor, "finetune", full)
    loops = {}
    for name in backdoor.ADAPTATIONS:
        backdoor.adapt(name, classifier, [], args)
        loops[name] = seen.pop("loop")
        assert not any("parametrizations" in key for key, _ in classifier.named_parameters())
    assert loops == {
        "AdvMask": ("mask", 0.01, 150, 1.5),
        "AdvLoRA": ("low rank", 0.01, True, True),
        "full adversarial": ("full", 0.01, 1e-4),
        "plain LoRA": ("low rank", 0, False, False),
        "full clean": ("full", 0, 1e-4),
    }


# ------------------------------------------------------------------------------------------------
# The program
# ------------------------------------------------------------------------------------------------

SHORT = ("--steps", 2, "--plant-steps", 2, "--batch-size", 4, "--test-limit", 8, "--test-steps", 1)
POISONED = [((), ["zero-shot", "backdoored"]), (("--poisoned-shots",), ["zero-shot"])]


def printed(out):
    """{name: the numbers of its line} of the printed table."""
    rows = {}
    for line in out[out.index("(95 % interval)") :].split("\n")[1:]:
        if " | " in line:
            name, _, numbers = line.partition(" | ")
            rows[name.strip()] = [float(n) for n in re.findall(r"\d+\.\d+", numbers)]
    return rows


@pytest.mark.parametrize("arguments, first", POISONED, ids=["planted", "poisoned shots"])
def test_a_run_saves_the_table_that_it_prints(program, tmp_path, monkeypatch, arguments, first):
    monkeypatch.setattr(common, "sanity", lambda *_: ["a flag"])
    answer = program("examples.backdoor", *SHORT, *arguments, "--out", tmp_path / "out")
    assert answer.code == 0, answer.err
    (path,) = (tmp_path / "out").rglob("*.json")
    result = json.loads(path.read_text())
    assert list(result["rows"]) == first + backdoor.ADAPTATIONS
    expected = {}
    for name, row in result["rows"].items():
        numbers = [row["success"], *row["intervals"]["success"], row["no_patch"]]
        numbers += [row["clean"], *row["intervals"]["clean"]]
        numbers += [row["pgd"], *row["intervals"]["pgd"]]
        expected[name] = pytest.approx(numbers, abs=0.0501)  # the intervals have one digit
        assert f"WARNING ({name}): a flag" in answer.out
        low, high = row["intervals"]["success"]
        assert low <= row["success"] <= high
    assert printed(answer.out) == expected
    assert result["method"] == "backdoor" and result["poison"] == 0.1 and result["patch"] == 6
    assert result["target_name"] == "t-shirt" and result["versions"] and "commit" in result
    assert f"16 of {'160 shots' if arguments else 'the 160 images'}" in answer.out


def test_an_evaluation_tells_the_success_with_and_without_the_patch(monkeypatch):
    monkeypatch.setattr(common, "measure", lambda *_: {"clean": 1, "pgd": 0, "intervals": {}})
    args = SimpleNamespace(dataset="grey", batch_size=1, target=0, patch=2, test_steps=1)
    tests = {"grey": (None, grey_images(LABELS))}
    result = backdoor.measure("obeys", Planted(GUESSES, trigger=0), tests, args)
    assert result["success"] == 100
    assert result["no_patch"] == pytest.approx(100 * 3 / 7)
    assert result["intervals"]["success"] == common.interval(torch.ones(7))


def test_every_adaptation_starts_from_the_backdoored_model_and_the_same_random_state(
    program, tmp_path, monkeypatch
):
    starts = {}

    def measure(name, classifier, *_):
        starts[name] = classifier.clip.visual.proj.detach().clone()
        evaluation = {"success": 0, "no_patch": 0, "clean": 0, "pgd": 0}
        return evaluation | {"intervals": {}, "flags": []}

    def adapt(name, classifier, batches, _):
        assert torch.equal(classifier.clip.visual.proj, starts["backdoored"])
        x, y = next(batches)
        assert torch.equal(x, first.setdefault("x", x)) and torch.equal(y, first.setdefault("y", y))
        classifier.clip.visual.proj.data.zero_()
        names.append(name)

    names, first = [], {}
    monkeypatch.setattr(backdoor, "measure", measure)
    monkeypatch.setattr(backdoor, "adapt", adapt)
    answer = program("examples.backdoor", *SHORT, "--out", tmp_path / "out")
    assert answer.code == 0, answer.err
    assert names == backdoor.ADAPTATIONS
    assert not torch.equal(starts["backdoored"], starts["zero-shot"])


FAULTS = [
    (("--target", 10), ["--target 10", "0 to 9"]),
    (("--target", 5, "--classes", "base"), ["--target 5", "0 to 4"]),
    (("--patch", 65), ["--patch 65", "at most 64"]),
    (("--patch", 0), ["--patch", "at least 1"]),
    (("--poison", 0), ["--poison 0", "above 0"]),
    (("--poison", 1.5), ["--poison 1.5", "at most 1"]),
    (("--poison", 0.001), ["--poison 0.001", "160 images"]),
    (("--shots", 0), ["--shots", "at least 1"]),
    (("--dataset", "folder", "--data-root", "nowhere"), ["nowhere", "not a folder"]),
    (("--test-limit", 1, "--target", 4), ["raise --test-limit"]),
    (("--export", "x"), ["--export"]),
    (("--transfer", "caltech101"), ["--transfer"]),
]


@pytest.mark.parametrize("arguments, words", FAULTS, ids=lambda value: str(value[0]))
def test_a_faulty_argument_is_one_sentence_and_no_file(
    program, monkeypatch, tmp_path, files_in, arguments, words
):
    def no_measure(*_):
        raise AssertionError("a fault of the input is known before anything is measured")

    monkeypatch.setattr(backdoor, "measure", no_measure)
    answer = program("examples.backdoor", "--out", tmp_path / "out", *arguments)
    assert answer.code == 2
    assert answer.err.startswith("error: ") and answer.err.count("\n") == 1
    assert all(word in answer.err for word in words), answer.err
    assert files_in(tmp_path) == []


def test_every_argument_has_a_sentence_that_tells_its_default():
    for action in backdoor.arguments()._actions:
        sentence = action.help % vars(action)
        if action.default:
            told = str(action.default) in sentence or action.default == "==SUPPRESS=="
            assert told, sentence


@pytest.mark.parametrize(
    "how", [[str(HERE / "examples" / "backdoor.py")], ["-m", "examples.backdoor"]]
)
def test_the_program_is_started_as_a_file_or_as_a_module(how, tmp_path):
    where = HERE if how[0] == "-m" else tmp_path
    command = [sys.executable, *how, "--help"]
    answer = subprocess.run(command, cwd=where, capture_output=True, text=True)
    assert answer.returncode == 0 and "--poisoned-shots" in answer.stdout, answer.stderr
