"""robustness.py against closed forms, scripted classifiers, and classifiers with a planted fault, each of which must raise its flag."""
import importlib.util
import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import robustness

# Accuracies of the small CLIP on the embedded test set, in %, at its default eps
ZERO_SHOT_CLEAN = 75
ZERO_SHOT_PGD = 10


def pgd(problem, steps, norm="linf", eps=None, x=None, y=None, step=None, **options):
    """robustness.attack on all images of a problem (net, x, y, eps)."""
    x, y, eps = problem.x if x is None else x, problem.y if y is None else y, problem.eps if eps is None else eps
    everything = torch.arange(len(y))
    return robustness.attack(problem.net, x, y, eps, eps / 2 if step is None else step, steps, everything, everything, norm, **options)


def share(right):
    return 100 * right.double().mean().item()


# ------------------------------------------------------------------------------------------------------------------------------- attack
@pytest.mark.parametrize("settle", [0, 1, 10])
def test_the_attack_reaches_the_closed_form_on_a_linear_classifier(linear, settle):
    (start, _, final, best), zero = pgd(linear, 30, settle=settle)
    assert torch.equal(final, linear.worst > 0) and torch.equal(best, linear.worst > 0) and zero == 0
    assert start.sum() > final.sum()


def test_the_l2_attack_reaches_the_closed_form_on_a_linear_classifier(linear):
    eps = 0.1
    worst = linear.margin - eps * (linear.net.W[0] - linear.net.W[1]).norm()    # no pixel leaves [0, 1]
    assert worst.abs().min() > 1e-3 and 0.2 < (worst > 0).float().mean() < (linear.margin > 0).float().mean()
    (_, _, final, best), _ = pgd(linear, 40, "l2", eps, settle=0)
    assert torch.equal(final, worst > 0) and torch.equal(best, worst > 0)


@pytest.mark.parametrize("norm, eps, step", [("linf", 0.05, 0.03), ("linf", 0.6, 0.4), ("l2", 0.3, 0.2), ("l2", 5.0, 1.0)])
def test_the_attack_stays_in_the_ball_and_among_pixels(linear, norm, eps, step):
    x = torch.cat([linear.x[:4], torch.zeros_like(linear.x[:2]), torch.ones_like(linear.x[:2]), linear.x[:2].round() * 0.998 + 0.001])
    pgd(linear, 6, norm, eps, x, torch.arange(10) % 2, step, settle=0)
    assert len(linear.net.inputs) == 7
    for iterate in linear.net.inputs:
        delta = iterate - x
        size = delta.abs().max() if norm == "linf" else delta.flatten(1).norm(dim=1).max()
        assert size <= eps * (1 + 1e-5) + 1e-6 and iterate.min() >= 0 and iterate.max() <= 1
    assert size > 0.3 * eps


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_steps_are_the_published_ones(linear, norm, monkeypatch):
    grads, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: grads.append(grad(*a, **k)[0]) or (grads[-1],))
    eps, step = (0.05, 0.03) if norm == "linf" else (0.2, 0.1)
    pgd(linear, 5, norm, eps, step=step, settle=0)
    for iterate, following, g in zip(linear.net.inputs, linear.net.inputs[1:], grads):
        p = (iterate.flatten(1) @ linear.net.W.T + linear.net.b).softmax(1) - torch.eye(2)[linear.y]
        torch.testing.assert_close(g.flatten(1), (p @ linear.net.W).detach(), rtol=1e-4, atol=1e-5)    # of the sum: no 1 / batch
        delta = iterate - linear.x + step * (g.sign() if norm == "linf" else g / g.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1))
        length = delta.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        delta = delta.clamp(-eps, eps) if norm == "linf" else torch.where(length > eps, delta * eps / length, delta)
        torch.testing.assert_close(following, (linear.x + delta).clamp(0, 1), rtol=0, atol=1e-6)
    assert all(p.grad is None for p in linear.net.parameters())


def test_the_batch_shrinks_as_images_break_and_is_filled_again(linear):
    rows = {}
    for settle, batch_size in ((0, 64), (1, 64), (3, 16)):
        linear.net.inputs.clear()
        pgd(linear, 20, settle=settle, batch_size=batch_size)
        rows[settle] = [len(x) for x in linear.net.inputs]
    robust = int((linear.worst > 0).sum())
    assert rows[0] == [40] * 21
    assert rows[1] == sorted(rows[1], reverse=True) and rows[1][-1] == robust
    assert rows[3][:4] == [16] * 4 and max(rows[3]) == 16 and sum(rows[3]) < 0.8 * 21 * 40


def test_starts_are_uniform_and_belong_to_seed_and_index(linear):
    def starts(batch_size=64, seed=0, index=None, x=linear.x, norm="linf"):
        linear.net.inputs.clear()
        everything = torch.arange(40)
        robustness.attack(linear.net, x, linear.y, 0.1, 0.1, 0, everything, everything if index is None else index, norm, seed, batch_size, 0)
        return torch.cat(linear.net.inputs) - x
    whole, order = starts(), torch.randperm(40)
    assert torch.equal(whole, starts(batch_size=7)) and torch.equal(whole[order], starts(index=order, x=linear.x[order]))
    other = starts(seed=1)
    assert not torch.isclose(whole, other).flatten(1).all(1).any() and not torch.isclose(whole[1:], whole[:-1]).flatten(1).all(1).any()
    # 1920 draws from U(-0.1, 0.1): extremes at the bounds, standard deviation 0.1 / sqrt(3)
    assert whole.min() < -0.099 and whole.max() > 0.099 and abs(whole.std().item() - 0.1 / math.sqrt(3)) < 0.003
    torch.testing.assert_close(starts(norm="l2").flatten(1).norm(dim=1), torch.full((40,), 0.1))


class Scripted(nn.Module):
    """Right (R) or wrong (W) at the start and every later iterate, as scripted."""

    def __init__(self, script):
        super().__init__()
        self.script, self.calls, self.w = script, 0, nn.Parameter(torch.tensor(1e-3))
        self.eval()

    def forward(self, x):
        right, self.calls = self.script[self.calls] == "R", self.calls + 1
        return torch.tensor([[1.0, 0.0]] if right else [[0.0, 1.0]]) + self.w * x.flatten(1).sum(1, keepdim=True) * torch.tensor([0.0, 1e-2])


@pytest.mark.parametrize("script, settle, start, final, best", [
    ("RRRRR", 0, 1, 1, 1),
    ("RWWRR", 0, 1, 1, 0),    # broken on the way, right at the end: only the best iterate counts it as lost
    ("RWWRR", 3, 1, 1, 0),
    ("RWWRR", 2, 1, 0, 0),    # broken twice in a row: it leaves
    ("RWRWR", 2, 1, 1, 0),    # broken twice, not in a row: it stays
    ("RWRWR", 1, 1, 0, 0),
    ("WRRRR", 0, 0, 1, 0),
    ("RRRRW", 0, 1, 0, 0),
])
def test_final_and_best_iterate(script, settle, start, final, best):
    net, one = Scripted(script), torch.tensor([0])
    right, _ = robustness.attack(net, torch.full((1, 3, 2, 2), 0.5), one, 0.1, 0.05, 4, one, one, settle=settle)
    assert right[[0, 2, 3], 0].tolist() == [start, final, best]
    assert net.calls == {("RWWRR", 2): 3, ("RWRWR", 1): 2}.get((script, settle), 5)


# ------------------------------------------------------------------------------------------------------------------------------ evaluate
def test_evaluate_reaches_the_closed_form_on_a_linear_classifier(linear):
    results = [robustness.evaluate(linear.net, linear.x, linear.y, linear.eps, linear.eps / 2, steps=30, settle=settle) for settle in (0, 10)]
    for result in results:
        assert result["clean"] == share(linear.margin > 0)
        assert result["pgd"] == result["pgd_best"] == share(linear.worst > 0)
        assert result["clean"] >= result["noise"] > result["pgd"] and result["zero_gradient"] == 0 and result["flags"] == []
        assert result["outcomes"] == "".join(str((m > 0) + 6 * (w > 0)) for m, w in zip(linear.margin.tolist(), linear.worst.tolist()))
    assert results[0] == results[1]


def test_an_image_that_is_wrong_when_clean_is_never_robust_at_best(linear):
    flipped = -linear.margin    # with the other label, an attack of no size leaves them wrong
    result = robustness.evaluate(linear.net, linear.x, 1 - linear.y, 0.0, steps=2)
    assert result["clean"] == result["pgd"] == result["pgd_best"] == share(flipped > 0)


def net_of_16():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 5)).eval()


@pytest.mark.parametrize("settle", [0, 2])
@pytest.mark.parametrize("norm, eps, step", [("linf", 0.05, 0.02), ("l2", 0.3, 0.1)])
def test_outcomes_depend_neither_on_the_batch_nor_on_the_order(settle, norm, eps, step):
    net = net_of_16()
    x = torch.rand(40, 3, 4, 4)
    y = net(x).argmax(1)
    results = [robustness.evaluate(net, x, y, eps, step, 8, batch_size=b, settle=settle, norm=norm, restarts=2) for b in (1, 7, 256)]
    assert results[0] == results[1] == results[2]
    assert len(set(results[0]["outcomes"])) > 1, "the problem must be neither too easy nor too hard"
    order = torch.randperm(40)
    shuffled = robustness.evaluate(net, x[order], y[order], eps, step, 8, settle=settle, norm=norm, restarts=2, index=order)
    assert shuffled["outcomes"] == "".join(results[0]["outcomes"][i] for i in order)


def test_outcomes_of_the_small_clip_do_not_depend_on_the_batch(classifier, embedded):
    x, y = common.test_set(embedded.test[::12], 64)
    results = [robustness.evaluate(classifier, x, y, common.TINY_EPS / 2, steps=3, batch_size=b, checks=0)["outcomes"] for b in (1, 7, 256)]
    assert results[0] == results[1] == results[2] and len(set(results[0])) > 2


def test_restarts_break_more_and_leave_the_final_iterate_alone():
    net = net_of_16()
    x = torch.rand(200, 3, 4, 4)
    y = net(x).argmax(1)
    one, many = (robustness.evaluate(net, x, y, 0.12, 0.12, steps=1, restarts=r) for r in (1, 20))
    assert many["pgd"] == one["pgd"] and many["pgd_best"] < one["pgd_best"]
    assert all(int(a) & 4 >= int(b) & 4 for a, b in zip(one["outcomes"], many["outcomes"]))


def test_nothing_left_for_a_restart_is_no_fault(linear):
    result = robustness.evaluate(linear.net, linear.x, linear.y, 0.3, 0.1, steps=10, restarts=3)
    assert result["pgd"] == result["pgd_best"] == 0


def test_evaluate_takes_uint8(linear):
    x = (255 * linear.x).round()
    as_float, as_bytes = (robustness.evaluate(linear.net, v, linear.y, linear.eps, steps=3) for v in (x / 255, x.to(torch.uint8)))
    assert as_float == as_bytes


@pytest.mark.parametrize("n, k, low, high", [(200, 72, 29.67, 42.85), (200, 0, 0, 1.88), (10, 10, 72.25, 100)])
def test_the_interval_is_wilsons(n, k, low, high):
    assert robustness.interval(torch.arange(n) < k) == pytest.approx([low, high], abs=0.02)
    p, z = k / n, 1.96    # its ends are where the normal approximation under that end just reaches p
    for end in robustness.interval(torch.arange(n) < k):
        assert abs(p - end / 100) == pytest.approx(z * math.sqrt(end / 100 * (1 - end / 100) / n), abs=2e-3) or end in (0, 100)


# --------------------------------------------------------------------------------------------------------------------- planted faults
class Around(nn.Module):
    """The small CLIP behind a fault."""

    def __init__(self, classifier, before=None, after=None):
        super().__init__()
        self.classifier, self.before, self.after = classifier, before or (lambda x: x), after or (lambda logits: logits)
        self.eval()

    def forward(self, x):
        return self.after(self.classifier(self.before(x)))


@pytest.fixture(scope="module")
def small():
    """The small CLIP and 25 embedded test images, uint8."""
    data = common.load_dataset("embedded", None)
    net = common.Classifier(*common.load_clip("tiny"), data.classes, data.template)
    return net, *common.test_set(data.test[::8], 64)


def flags(net, x, y, eps=common.TINY_EPS, **options):
    return robustness.evaluate(net, x, y, eps, steps=options.pop("steps", 5), **options)["flags"]


def test_the_honest_small_clip_raises_no_flag(small):
    assert flags(*small) == [] and flags(*small, eps=1.0, norm="l2", step=0.25) == []


def test_a_quantising_layer_is_flagged(small):
    net, x, y = small
    raised = flags(Around(net, before=lambda x: (x * 32).round() / 32), x, y)
    assert any("first gradient is zero" in flag for flag in raised)


class Backwards(torch.autograd.Function):
    """The identity with another gradient: that of noise, or the opposite one."""

    @staticmethod
    def forward(ctx, x, kind):
        ctx.kind = kind
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return -grad if ctx.kind == "opposite" else torch.randn(grad.shape, generator=torch.Generator().manual_seed(0)), None


@pytest.mark.parametrize("kind", ["noise", "opposite"])
def test_a_masked_gradient_that_is_not_zero_is_flagged(small, kind):
    net, x, y = small
    raised = flags(Around(net, before=lambda x: Backwards.apply(x, kind)), x, y, eps=8 / 255)
    assert any("promises a slope" in flag for flag in raised) and any("random guesses break" in flag for flag in raised)
    if kind == "opposite":
        assert any("withstand a ball" in flag for flag in raised) and any("noise" in flag for flag in raised)


def test_a_randomised_model_is_flagged(small):
    net, x, y = small
    assert any("random" in flag for flag in flags(Around(net, before=lambda x: x + 0.1 * torch.randn_like(x)), x, y))


def test_a_saturated_softmax_is_flagged(small):
    net, x, y = small
    assert any("first gradient is zero" in flag for flag in flags(Around(net, after=lambda logits: 1e4 * logits), x, y))


def test_a_model_in_train_mode_is_flagged(small):
    net, x, y = small
    assert any("train mode" in flag for flag in flags(Around(nn.Sequential(net, nn.Dropout(0.0)).train()).train(), x, y))


def test_an_eps_in_another_space_is_flagged(small):
    net, x, y = small
    assert any("units of 1/255" in flag for flag in flags(net, x, y, eps=3.0, steps=2))
    normalised = (x / 255 - net.mean) / net.std
    with pytest.raises(AssertionError, match="ball"):    # it clips to [0, 1], and so cannot stay near such images
        flags(Around(net, before=lambda z: z * net.std + net.mean), normalised, y)
    assert any("another space" in flag for flag in flags(Around(net), x / 255 - 1e-3, y))


def test_more_steps_that_help_the_defender_are_flagged():
    class Later(nn.Module):
        """Wrong at the third call alone: after one step of the attack, a quarter of the way."""

        def __init__(self):
            super().__init__()
            self.w, self.calls = nn.Parameter(torch.ones(1)), 0

        def forward(self, x):
            self.calls += 1
            return self.w * x.flatten(1).mean(1, keepdim=True) * torch.tensor([[1.0, 2.0 if self.calls == 3 else 0.0]])
    raised = flags(Later().eval(), torch.full((4, 3, 4, 4), 0.5), torch.zeros(4, dtype=torch.long), settle=0)
    assert any("more steps" in flag for flag in raised)


def test_float16_is_refused(small):
    _, x, y = small
    with pytest.raises(ValueError, match="float16"):
        robustness.evaluate(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 10)).eval().half(), x, y, 0.01)


# ------------------------------------------------------------------------------------------------------------------------ the small CLIP
@pytest.fixture(scope="module")
def zero_shot(embedded):
    net = common.Classifier(*common.load_clip("tiny"), embedded.classes, embedded.template)
    return robustness.evaluate(net, *common.test_set(embedded.test, net.size), common.TINY_EPS)


@pytest.mark.numbers
def test_the_small_clip_is_accurate_and_not_robust(zero_shot):
    assert zero_shot["clean"] >= ZERO_SHOT_CLEAN
    assert zero_shot["pgd_best"] <= zero_shot["pgd"] < ZERO_SHOT_PGD < zero_shot["noise"]
    assert zero_shot["zero_gradient"] == 0 and zero_shot["flags"] == []


@pytest.mark.numbers
def test_bfloat16_attacks_like_float32(tiny, embedded):
    x, y = common.test_set(embedded.test[::2], 64)
    # a third of the default radius, where accuracy is neither 0 nor 100
    full, low = (robustness.evaluate(common.Classifier(*tiny, embedded.classes, embedded.template, dtype), x, y, common.TINY_EPS / 3, steps=5)
                 for dtype in ("float32", "bfloat16"))
    for key in ("clean", "pgd", "pgd_best"):
        assert full["intervals"][key][0] <= low[key] <= full["intervals"][key][1]
    same = sum(a == b for a, b in zip(full["outcomes"], low["outcomes"]))
    assert same >= 0.95 * len(y)


# -------------------------------------------------------------------------------------------------------------------- curve and AutoAttack
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_eps_curve_falls_from_clean_to_zero_through_the_closed_form(linear, norm):
    eps = linear.eps if norm == "linf" else 0.1
    slope = (linear.net.W[0] - linear.net.W[1]).norm(p=1 if norm == "linf" else 2)
    curve = robustness.eps_curve(linear.net, linear.x, linear.y, eps, norm, 20, 16)
    assert curve[0] == [0, share(linear.margin > 0)] and curve[-1][1] == 0 and len(curve) > 3
    for i, (radius, accuracy) in enumerate(curve):
        assert radius == pytest.approx(i * eps / 2) and accuracy == pytest.approx(share(linear.margin - radius * slope > 0), abs=2.6)


@pytest.mark.parametrize("norm, whole", [("linf", 1), ("l2", (3 * 4 * 4) ** 0.5)])
def test_the_eps_curve_of_what_cannot_be_broken_ends_when_the_ball_holds_every_image(norm, whole):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 4, 2))
    net[1].weight.data.zero_()
    net[1].bias.data.copy_(torch.tensor([1.0, 0.0]))
    curve = robustness.eps_curve(net.eval(), torch.rand(2, 3, 4, 4), torch.zeros(2, dtype=torch.long), 0.5, norm, 2, 2)
    assert [radius for radius, _ in curve] == [0.25 * i for i in range(int(4 * whole) + 2)] and {accuracy for _, accuracy in curve} == {100}


@pytest.mark.skipif(not importlib.util.find_spec("torchattacks"), reason=robustness.TORCHATTACKS)
def test_pgd_agrees_with_torchattacks_on_the_small_clip(small):
    import torchattacks
    net, x, y = small
    ours = robustness.evaluate(net, x, y, common.TINY_EPS / 2, 1 / 255, 10, settle=0)
    torch.manual_seed(0)
    theirs = net(torchattacks.PGD(net, eps=common.TINY_EPS / 2, alpha=1 / 255, steps=10)(x / 255, y)).argmax(1) == y
    assert 10 < ours["pgd"] < 90 and abs(ours["pgd"] - share(theirs)) <= 100 / len(y)


@pytest.mark.skipif(not importlib.util.find_spec("torchattacks"), reason=robustness.TORCHATTACKS)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_autoattack_reaches_the_closed_form_and_leaves_the_random_numbers_alone(make_linear, norm):
    linear = make_linear(16, 0.005)
    eps = linear.eps if norm == "linf" else 0.1
    worst = linear.margin - eps * (linear.net.W[0] - linear.net.W[1]).norm(p=1 if norm == "linf" else 2)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    result = robustness.autoattack(linear.net, linear.x, linear.y, eps, norm, 25, batch_size=8)
    assert torch.equal(torch.random.get_rng_state(), before)
    rows = torch.tensor(result["images"])
    assert len(rows) == 25 and result["images"] == sorted(set(result["images"]))
    assert result["clean"] == share(linear.margin[rows] > 0) and result["square"] <= result["fab_t"] <= result["apgd_t"] <= result["apgd_ce"]
    assert result["square"] == share(worst[rows] > 0)


def test_without_torchattacks_a_sentence_names_the_command(program, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torchattacks" else find_spec(name, *a))
    answer = program("advmask", "--autoattack", 5, "--out", tmp_path)
    assert answer.code == 2 and answer.err.startswith("error: ") and "pip install" in answer.err and answer.err.count("\n") == 1


def test_the_cross_entropy_that_is_attacked_is_of_the_scaled_logits(small):
    net, x, y = small
    scaled = F.cross_entropy(net(x[:4] / 255), y[:4])
    assert scaled.item() != pytest.approx(F.cross_entropy(net(x[:4] / 255) / net.scale, y[:4]).item(), rel=1e-2)


def test_the_curve_is_stored_and_drawn(program, tmp_path):
    answer = program("advmask", "--steps", 1, "--batch-size", 2, "--test-steps", 2, "--test-limit", 4, "--eps-curve", "--out", tmp_path)
    picture, = tmp_path.rglob("eps_curve.png")
    result = json.loads(picture.with_name("result.json").read_text())
    assert answer.code == 0 and picture.read_bytes().startswith(b"\x89PNG")
    for key in ("before", "after"):
        curve = result[key]["eps_curve"]
        assert curve[0] == [0, result[key]["clean"]] and curve[-1][1] == 0 and [a for _, a in curve] == sorted((a for _, a in curve), reverse=True)


def test_an_l2_radius_must_be_given_and_is_used(program, tmp_path):
    answer = program("advmask", "--norm", "l2", "--out", tmp_path)
    assert answer.code == 2 and "--test-eps" in answer.err
    assert program("advmask", "--steps", 1, "--batch-size", 2, "--test-steps", 5, "--test-limit", 4, "--norm", "l2", "--test-eps", "0.5",
                   "--after-only", "--out", tmp_path).code == 0
    path, = tmp_path.rglob("result.json")
    result = json.loads(path.read_text())
    assert (result["norm"], result["test_eps"], result["step"], result["eps"], result["before"]) == ("l2", 0.5, 0.25, common.TINY_EPS, None)


def test_float16_is_refused_by_the_programs(program, tmp_path):
    answer = program("advmask", "--dtype", "float16", "--out", tmp_path)
    assert answer.code == 2 and "float16 is refused" in answer.err and answer.err.count("\n") == 1
