"""results/second_opinion.py: its own PGD and AutoAttack against closed forms, the curve over eps,
and runs of every method, an export and a name that go through the program."""

import importlib.util
import json
import math
import sys
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch import nn

import common
from baselines import prompts
from results import second_opinion

PROGRAM = "results.second_opinion"
TINIEST = ("--steps", 1, "--batch-size", 2, "--test-steps", 2, "--test-limit", 4)
METHODS = {
    "advmask": ("advmask",),
    "advlora": ("advlora",),
    "tecoa": ("baselines.tecoa",),
    "tgazsr": ("baselines.tgazsr",),
    "advvp": ("baselines.advvp",),
    "prompts": ("baselines.prompts", "--method", "advmaple"),
}
NOT_EXPORTED = "advvp", "prompts"
needs_torchattacks = pytest.mark.skipif(
    not importlib.util.find_spec("torchattacks"), reason="needs torchattacks"
)


def starts(x, norm, eps, restart=0):
    return second_opinion.random_start(x, range(len(x)), norm, eps, restart)


def attacked(problem, norm, eps, step, steps):
    """second_opinion.pgd on all images of a problem (net, x, y), from their own starts."""
    start = starts(problem.x, norm, eps)
    return second_opinion.pgd(problem.net, problem.x, problem.y, start, norm, eps, step, steps)


def worst_margin(problem, norm, eps):
    """The least margin in the ball around the images of a linear problem: margin - eps |w|_dual."""
    w = (problem.net.W[0] - problem.net.W[1]).detach()
    size = w.abs().sum() if norm == "linf" else w.norm()
    return problem.margin - eps * size


def percent(right):
    return pytest.approx(100 * right.double().mean().item())


class Nonlinear(nn.Module):
    """A small smooth network of 5 classes."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 5))
        for parameter in self.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(noise / parameter.shape[-1] ** 0.5)
        self.eval()

    def forward(self, x):
        return self.net(x)


@pytest.fixture(scope="module")
def curved():
    """A Nonlinear net, 60 images as a Dataset, and which of them it gets right."""
    net = Nonlinear()
    x = torch.rand(60, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = net(x).argmax(1)
    y[::6] = (y[::6] + 1) % 5
    clean = torch.ones(60, dtype=torch.bool)
    clean[::6] = False
    return net, list(zip(x, y.tolist())), clean


# ------------------------------------------------------------------------------------------------
# PGD to the end
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm, eps", [("linf", 0.02), ("l2", 0.1)])
def test_pgd_reaches_the_closed_form_on_a_linear_classifier(linear, norm, eps):
    worst = worst_margin(linear, norm, eps)
    assert worst.abs().min() > 1e-3, "no tie"
    assert 0.2 < (worst > 0).float().mean() < (linear.margin > 0).float().mean()
    final, best = attacked(linear, norm, eps, eps / 2, 40)
    assert torch.equal(final, worst > 0)
    assert torch.equal(best, worst > 0)


@pytest.mark.parametrize("norm, eps, step", [("linf", 0.05, 0.03), ("l2", 0.2, 0.1)])
def test_the_steps_are_the_published_ones(linear, norm, eps, step):
    attacked(linear, norm, eps, step, 5)
    W, b = linear.net.W.detach(), linear.net.b.detach()
    assert len(linear.net.inputs) == 6
    for now, following in zip(linear.net.inputs, linear.net.inputs[1:]):
        # dCE/dx = (softmax - onehot) W
        gradient = ((now.flatten(1) @ W.T + b).softmax(1) - torch.eye(2)[linear.y]) @ W
        delta = (now - linear.x).flatten(1)
        if norm == "linf":
            delta = (delta + step * gradient.sign()).clamp(-eps, eps)
        else:
            delta = delta + step * gradient / gradient.norm(dim=1, keepdim=True)
            outside = delta.norm(dim=1) > eps
            delta[outside] = eps * delta[outside] / delta[outside].norm(dim=1, keepdim=True)
        expected = (linear.x + delta.reshape(linear.x.shape)).clamp(0, 1)
        torch.testing.assert_close(following, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "norm, eps, step",
    [("linf", 0.05, 0.03), ("linf", 0.6, 0.4), ("l2", 0.3, 0.2), ("l2", 5.0, 1.0)],
)
def test_pgd_stays_in_the_ball_and_among_pixels(linear, norm, eps, step):
    # images on the border of what a pixel can be
    linear.x[:2], linear.x[2:4] = 0, 1
    linear.x[4:6] = linear.x[4:6].round()
    attacked(linear, norm, eps, step, 6)
    assert [len(x) for x in linear.net.inputs] == 7 * [40], "every image stays to the end"
    for iterate in linear.net.inputs:
        delta = (iterate - linear.x).flatten(1)
        size = delta.abs().max() if norm == "linf" else delta.norm(dim=1).max()
        assert size <= eps * (1 + 1e-5) + 1e-6
        assert iterate.min() >= 0
        assert iterate.max() <= 1
    assert size > 0.3 * eps


@pytest.mark.parametrize("norm, outside", [("linf", 0.11), ("l2", 0.02)])
def test_a_delta_outside_the_ball_is_an_error(norm, outside):
    x = torch.full((2, 3, 4, 4), 0.5)
    delta = torch.full_like(x, outside)
    with pytest.raises(AssertionError, match="left the ball"):
        second_opinion.check_ball(x, delta, norm, 0.1)


def test_a_picture_outside_0_to_1_is_an_error():
    x = torch.full((2, 3, 4, 4), 0.99)
    with pytest.raises(AssertionError, match="range"):
        second_opinion.check_ball(x, torch.full_like(x, 0.05), "linf", 0.1)


def test_the_l2_projection_moves_only_what_is_outside():
    delta = torch.randn(3, 3, 4, 4)
    delta[0] *= 0.5 / delta[0].norm()
    projected = second_opinion.project(delta, "l2", 1.0)
    assert torch.equal(projected[0], delta[0])
    for before, after in zip(delta[1:], projected[1:]):
        torch.testing.assert_close(after, before / before.norm())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_starts_belong_to_index_and_restart(norm):
    x = 0.3 + 0.4 * torch.rand(20, 3, 4, 4)
    whole = starts(x, norm, 0.1)
    assert torch.equal(whole[5:9], second_opinion.random_start(x[5:9], range(5, 9), norm, 0.1))
    again = starts(x, norm, 0.1, restart=1)
    everything = torch.cat([whole, again]).flatten(1)
    same = torch.cdist(everything, everything) < 1e-3
    assert same.sum() == len(everything), "no two starts are alike"


def test_the_first_linf_start_is_that_of_the_house():
    x = torch.rand(5, 3, 4, 4)
    assert torch.equal(starts(x, "linf", 0.1), common.random_start(x, range(5), 0.1))


def test_an_l2_start_is_on_the_surface_in_any_direction():
    start = starts(torch.full((20, 3, 4, 4), 0.5), "l2", 0.2)
    torch.testing.assert_close(start.flatten(1).norm(dim=1), torch.full((20,), 0.2))
    # 960 numbers of standard deviation 0.2 / sqrt 48: their mean has one of 0.001
    assert start.mean().abs() < 0.005


class Scripted(nn.Module):
    """Right (R) or wrong (W) at the start and at every later iterate, as scripted."""

    def __init__(self, script):
        super().__init__()
        self.script = iter(script)
        self.w = nn.Parameter(torch.tensor(1e-3))
        self.eval()

    def forward(self, x):
        logits = torch.tensor([[1.0, 0.0]]) if next(self.script) == "R" else torch.eye(2)[1:]
        tilt = self.w * x.flatten(1).sum(1, keepdim=True)
        return logits + tilt * torch.tensor([0.0, 1e-2])


@pytest.mark.parametrize(
    "script, final, best",
    [("RRRRR", 1, 1), ("RWWRR", 1, 0), ("WRRRR", 1, 0), ("RRRRW", 0, 0), ("WWWWW", 0, 0)],
)
def test_final_is_the_last_iterate_and_best_is_all_of_them(script, final, best):
    x = torch.full((1, 3, 2, 2), 0.5)
    start = torch.zeros_like(x)
    y = torch.tensor([0])
    found = second_opinion.pgd(Scripted(script), x, y, start, "linf", 0.1, 0.05, 4)
    assert [int(right) for right in found] == [final, best]


def test_a_gradient_that_is_not_finite_is_an_error(linear):
    linear.net.W.data[0, 0] = math.nan
    with pytest.raises(FloatingPointError):
        attacked(linear, "linf", 0.1, 0.1, 1)


# ------------------------------------------------------------------------------------------------
# A whole test set
# ------------------------------------------------------------------------------------------------


def opinion(problem, norm, eps, step, steps, restarts=1, size=16):
    net, images, clean = problem
    return second_opinion.restarted(net, images, clean, norm, eps, step, steps, restarts, size)


@pytest.mark.parametrize("norm, eps", [("linf", 0.05), ("l2", 0.3)])
@pytest.mark.parametrize("step", [0.3, 1.0, 4.0])
def test_the_final_iterate_leaves_at_least_what_the_best_one_leaves(curved, norm, eps, step):
    numbers, _ = opinion(curved, norm, eps, step * eps, 6)
    assert numbers["final"] >= numbers["best"] >= numbers["best_of_starts"]
    assert 0 < numbers["best"] < 100 * 50 / 60, "neither hopeless nor trivial"


def test_an_image_that_is_wrong_when_clean_counts_at_the_final_iterate_alone(curved):
    net, images, _ = curved
    numbers, left = opinion((net, images, torch.zeros(60, dtype=torch.bool)), "linf", 0.0, 0.0, 1)
    assert numbers["final"] == percent(torch.arange(60) % 6 > 0)
    assert numbers["best"] == 0
    assert not left.any()


def test_restarts_never_help_the_defender(curved):
    leftovers = []
    for restarts in (1, 2, 10):
        numbers, left = opinion(curved, "linf", 0.12, 0.12, 1, restarts)
        assert numbers["best_of_starts"] == percent(left)
        leftovers.append((numbers, left))
    (one, alone), (two, after_two), (ten, after_ten) = leftovers
    assert one["final"] == two["final"] == ten["final"]
    assert one["best"] == two["best"] == ten["best"] == one["best_of_starts"]
    assert not (after_two & ~alone).any()
    assert not (after_ten & ~after_two).any()
    assert after_ten.sum() < alone.sum(), "with ten starts some more are broken"


def test_nothing_left_for_a_restart_is_no_fault(linear):
    problem = linear.net, linear.images, linear.margin > 0
    numbers, left = opinion(problem, "linf", 0.3, 0.1, 10, restarts=3)
    assert numbers["final"] == numbers["best"] == numbers["best_of_starts"] == 0
    assert not left.any()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_batch_does_not_matter(curved, norm):
    results = [opinion(curved, norm, 0.1, 0.05, 5, 2, size) for size in (7, 60)]
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_the_best_iterate_is_that_of_the_house(curved):
    net, images, _ = curved
    house = common.evaluate(net, images, 0.05, 8, 0.02, batch_size=16)
    numbers, left = opinion(curved, "linf", 0.05, 0.02, 8)
    assert numbers["best"] == house["pgd"]
    assert numbers["intervals"]["best"] == house["intervals"]["pgd"]
    assert left.tolist() == [digit == "2" for digit in house["outcomes"]]


@pytest.mark.parametrize("norm, eps", [("linf", 0.02), ("l2", 0.1)])
def test_the_curve_falls_from_clean_to_zero_through_the_closed_form(linear, norm, eps):
    clean = linear.margin > 0
    curve = second_opinion.eps_curve(linear.net, linear.images, clean, norm, eps, 16)
    assert curve[0] == [0, percent(clean)]
    assert curve[-1][1] == 0
    assert curve[-2][1] > 0
    for i, (radius, accuracy) in enumerate(curve):
        assert radius == pytest.approx(i * eps / 2)
        exact = 100 * (worst_margin(linear, norm, radius) > 0).double().mean().item()
        assert accuracy == pytest.approx(exact, abs=2.6), "one image of 40 may be near the border"


@pytest.mark.parametrize("norm, whole", [("linf", 1), ("l2", 48**0.5)])
def test_a_curve_that_nothing_bends_ends_when_the_ball_holds_every_picture(norm, whole):
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).eval()
    net[1].weight.data.zero_()
    net[1].bias.data.copy_(torch.tensor([1.0, 0.0]))
    images = [(torch.rand(3, 4, 4), 0)]
    clean = torch.tensor([True])
    curve = second_opinion.eps_curve(net, images, clean, norm, 0.5, 1, steps=1)
    assert [radius for radius, _ in curve] == [0.25 * i for i in range(math.ceil(4 * whole) + 1)]
    assert {accuracy for _, accuracy in curve} == {100}


# ------------------------------------------------------------------------------------------------
# AutoAttack
# ------------------------------------------------------------------------------------------------


@needs_torchattacks
@pytest.mark.parametrize("norm, eps", [("linf", 0.005), ("l2", 0.1)])
def test_autoattack_reaches_the_closed_form_and_leaves_the_random_numbers_alone(
    make_linear, norm, eps
):
    linear = make_linear(16, 0.005)
    clean, worst = linear.margin > 0, worst_margin(linear, norm, eps)
    before = torch.get_rng_state()
    result = second_opinion.autoattack(linear.net, linear.images, clean, norm, eps, 25, 25)
    assert torch.equal(torch.get_rng_state(), before)
    rows = result.pop("images")
    assert len(rows) == 25
    assert rows == sorted(set(rows))
    assert result["clean"] == percent(clean[rows])
    assert result["Square"] == percent(worst[rows] > 0)
    left = list(result.values())
    assert left == sorted(left, reverse=True), "each attacks what the others left"


@needs_torchattacks
def test_autoattack_has_its_four_attacks():
    net = Nonlinear()
    assert list(second_opinion.four_attacks(net, "linf", 0.1, 5)) == [
        "APGD-CE", "APGD-T", "FAB-T", "Square",
    ]  # fmt: skip


def test_what_an_attack_finds_outside_the_ball_does_not_count(linear, monkeypatch):
    far = {"far": lambda x, y: 1 - x}
    monkeypatch.setattr(second_opinion, "four_attacks", lambda *_: far)
    clean = linear.margin > 0
    result = second_opinion.autoattack(linear.net, linear.images, clean, "linf", 1e-6, 40, 16)
    assert result["far"] == result["clean"] == percent(clean)


def test_without_torchattacks_a_sentence_names_the_command(program, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    answer = program(PROGRAM, "tiny", "--autoattack", 5, "--out", tmp_path / "out")
    assert one_sentence(answer)
    assert "pip install scipy && pip install --no-deps torchattacks" in answer.err
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_a_sentence_names_the_command(program, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    answer = program(PROGRAM, "tiny", "--eps-curve")
    assert one_sentence(answer)
    assert "pip install matplotlib" in answer.err


# ------------------------------------------------------------------------------------------------
# The program
# ------------------------------------------------------------------------------------------------


def one_sentence(answer):
    """Exit code 2, and one line on stderr."""
    assert answer.code == 2
    assert answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1
    return True


def read(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_measured_as_it_was_and_attacked_again(program, method, tmp_path):
    out = ["--out", tmp_path / "runs"]
    if method not in NOT_EXPORTED:
        out += ["--export", tmp_path / "exported"]
    base = ("--classes", "base", "--eps", "1/255")
    assert program(*METHODS[method], *TINIEST, *base, *out).code == 0
    (run,) = (tmp_path / "runs").glob("*")
    made = read(run / "result.json")

    answer = program(PROGRAM, run, "--restarts", 2)
    assert answer.code == 0, answer.err
    opinion = read(run / "second_opinion.json")
    # the network, the images and the arguments are the run's own
    assert opinion["house"] == made["after"]
    for key in ("method", "dataset", "classes", "eps", "test_steps", "test_limit", "dtype"):
        assert opinion[key] == made[key]
    (numbers,) = opinion["pgd"]
    assert numbers["step"] == 1 / 255
    assert numbers["restarts"] == 2
    assert numbers["final"] >= numbers["best"] >= numbers["best_of_starts"]
    assert abs(numbers["best"] - made["after"]["pgd"]) <= 25, "one of four images, by rounding"
    for shown in ("common.evaluate", "PGD-2, step 1/255", "2 starts", f"{numbers['final']:.2f}"):
        assert shown in answer.out

    if method in NOT_EXPORTED:
        return
    # the exported network is the same
    exported = tmp_path / "exported"
    words = ("--dataset", "embedded", "--test-steps", 2, "--test-limit", 4, "--batch-size", 2)
    assert program(PROGRAM, exported, *words, *base).code == 0
    assert read(exported / "second_opinion.json")["house"]["outcomes"] == made["after"]["outcomes"]


def test_prompts_do_not_replace_the_names_of_a_template_without_words(embedded, tmp_path):
    clip, config = common.load_clip("tiny")
    net = common.Classifier(clip, config, embedded.classes, "a photo of a {} texture.")
    learned = prompts.Prompts("advvlp", torch.zeros(2, 128), 192, 4)
    facts = {"variant": "advvlp", "length": 2, "depth": 4, "model": "tiny", "pretrained": "none"}
    args = SimpleNamespace(**facts, dataset="dtd")
    common.save_adapter(tmp_path, learned.state_dict(), net, args, "prompts")
    args = SimpleNamespace(load=tmp_path, device="cpu", dtype="float32")
    told = {"method": "prompts", "length": "2"}
    opened = second_opinion.load(args, told, embedded._replace(template="{} texture."))
    assert opened.template == "a photo of a {} texture."


def test_prompts_are_measured_with_their_own_template(program, monkeypatch, embedded, tmp_path):
    short = embedded._replace(template="{} texture.")
    monkeypatch.setattr(common, "load_dataset", lambda *_: short)
    words = ("--steps", 1, "--batch-size", 10, "--test-steps", 1, "--test-limit", 40)
    assert program(*METHODS["prompts"], *words, "--out", tmp_path).code == 0
    (run,) = tmp_path.glob("*")
    assert program(PROGRAM, run).code == 0
    assert read(run / "second_opinion.json")["house"] == read(run / "result.json")["after"]


def test_a_run_on_own_images_is_attacked_again(program, picture_folder, tmp_path):
    mine = ("--data-root", picture_folder(tmp_path / "mine"))
    words = ("--model", "tiny", "--dataset", "folder", *mine, "--out", tmp_path / "runs")
    assert program("advmask", *TINIEST, *words).code == 0
    (run,) = (tmp_path / "runs").glob("*")
    answer = program(PROGRAM, run, *mine)
    assert answer.code == 0, answer.err


def test_a_name_is_attacked_zero_shot_with_every_step_size(program, tmp_path):
    words = ("--test-limit", 2, "--test-steps", 2, "--step", "1/255", "1/510")
    answer = program(PROGRAM, "tiny", *words)
    assert answer.code == 0, answer.err
    opinion = read(tmp_path / "runs" / "second_opinion.json")
    assert [numbers["step"] for numbers in opinion["pgd"]] == [1 / 255, 0.5 / 255]
    assert (opinion["dataset"], opinion["eps"]) == ("embedded", common.TINY_EPS)
    assert "PGD-2, step 0.5/255" in answer.out


def test_tiny_is_the_model_where_a_folder_of_that_name_is_too(monkeypatch, tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "open_clip_config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert second_opinion.find("tiny") == "model"
    assert second_opinion.find("./tiny") == "export"


def test_an_l2_ball_has_its_radius_and_its_step(program, tmp_path):
    words = ("--norm", "l2", "--eps", 2, "--test-limit", 2, "--test-steps", 5)
    assert program(PROGRAM, "tiny", *words).code == 0
    opinion = read(tmp_path / "runs" / "second_opinion.json")
    assert (opinion["norm"], opinion["eps"], opinion["house"]) == ("l2", 2, None)
    assert [numbers["step"] for numbers in opinion["pgd"]] == [2.5 * 2 / 5]


def test_curve_and_autoattack_are_printed_stored_and_drawn(
    program, monkeypatch, tmp_path, files_in
):
    # the real attacks take minutes here: this one finds nothing
    nothing = {"nothing": lambda x, y: x}
    monkeypatch.setattr(second_opinion, "load_torchattacks", lambda: None)
    monkeypatch.setattr(second_opinion, "four_attacks", lambda *_: nothing)
    words = ("--test-limit", 3, "--test-steps", 2, "--eps", "8/255", "--out", tmp_path / "out")
    answer = program(PROGRAM, "tiny", *words, "--eps-curve", "--autoattack", 3)
    assert answer.code == 0, answer.err
    assert files_in(tmp_path / "out") == ["second_opinion.json", "second_opinion.png"]
    assert (tmp_path / "out" / "second_opinion.png").read_bytes().startswith(b"\x89PNG")
    opinion = read(tmp_path / "out" / "second_opinion.json")
    curve = opinion["eps_curve"]
    assert curve[0] == [0, pytest.approx(opinion["clean"])]
    assert curve[-1][1] == 0
    found = opinion["autoattack"]
    assert len(found["images"]) == 3
    assert found["nothing"] == found["clean"]
    assert found["PGD"] <= found["clean"] + 1e-6
    assert f"AutoAttack on 3 images: clean {found['clean']:.2f}" in answer.out
    assert "0/255" in answer.out

    # another call keeps what is there
    assert program(PROGRAM, "tiny", *words).code == 0
    assert "second_opinion-2.json" in files_in(tmp_path / "out")


# ------------------------------------------------------------------------------------------------
# Bad input
# ------------------------------------------------------------------------------------------------


def fault(program, *arguments):
    """What the program says, in one sentence."""
    answer = program(PROGRAM, *arguments)
    assert one_sentence(answer)
    return answer.err


def test_what_is_not_there_is_a_fault(program):
    assert "runs/nowhere" in fault(program, "runs/nowhere")


def test_an_empty_folder_is_a_fault(program, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "adapter.safetensors" in fault(program, tmp_path / "empty")


def adapter(folder, **facts):
    """A file whose metadata are a run's, but for what is given here; None takes a key away."""
    whole = dict(method="advmask", model="tiny", pretrained="openai", weights="attn", names="[]")
    whole |= dict(template="a {}", dataset="embedded", classes="all", eps="0.01", test_steps="2")
    whole |= dict(test_limit="2", split="test", batch_size="8", dtype="float32")
    whole |= facts
    whole = {key: value for key, value in whole.items() if value is not None}
    folder.mkdir()
    safetensors.torch.save_file({"M": torch.zeros(1)}, folder / "adapter.safetensors", whole)
    return folder


@pytest.mark.parametrize(
    "facts, words",
    [
        ({"method": "other"}, "made by other"),
        ({"method": None}, "does not say its method"),
        ({"eps": None, "split": None}, "does not say its eps, split"),
        ({"eps": "much"}, "found 'much'"),
        ({"dataset": "cifar"}, "'cifar'"),
        ({"model": "unknown"}, "unknown model"),
        ({"names": '["a", "b"]'}, "does not fit"),
    ],
)
def test_an_adapter_of_another_kind_is_a_fault(program, tmp_path, facts, words):
    assert words in fault(program, adapter(tmp_path / "run", **facts))


def test_a_broken_adapter_is_a_fault(program, tmp_path):
    folder = adapter(tmp_path / "run")
    (folder / "adapter.safetensors").write_bytes(b"broken")
    assert "cannot be read" in fault(program, folder)


def test_an_export_needs_dataset_and_eps(program, tmp_path):
    (tmp_path / "open_clip_config.json").write_text("{}")
    assert "--dataset and --eps" in fault(program, tmp_path, "--dataset", "embedded")
    assert "--dataset and --eps" in fault(program, tmp_path, "--eps", "1/255")


def test_an_l2_ball_needs_its_radius(program):
    assert "give --eps" in fault(program, "tiny", "--norm", "l2")


def test_an_linf_radius_in_units_of_1_255_is_a_fault(program):
    assert "3/255" in fault(program, "tiny", "--eps", 3)


def test_a_curve_needs_an_eps(program):
    assert "above 0" in fault(program, "tiny", "--eps", 0, "--eps-curve")


def test_float16_is_refused(program):
    assert "float16 is refused" in fault(program, "tiny", "--dtype", "float16")


def test_a_folder_that_cannot_be_written_to_is_a_fault(program, tmp_path):
    (tmp_path / "file").write_text("")
    assert "--out" in fault(program, "tiny", "--out", tmp_path / "file" / "out")
