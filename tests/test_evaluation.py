"""common.py's robust evaluation, against closed forms, an independent PGD written here, and models
with a planted fault, each of which must raise its flag."""

import importlib.util
import io
import json
import math
import random
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common

# Accuracies of the small CLIP on the embedded test set, in %, at its default eps
ZERO_SHOT_CLEAN = 75
ZERO_SHOT_PGD = 10


def toy(seed=0):
    """A small smooth network of 5 classes, and 41 images that it gets right, two in three."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 5)).eval()
    for parameter in net.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(noise / parameter.shape[-1] ** 0.5)
    x = torch.rand(41, 3, 4, 4, generator=generator)
    with torch.no_grad():
        y = net(x).argmax(1)
    y[::3] = (y[::3] + 1) % 5
    return net, x, y


def pairs(x, y):
    """Images as a Dataset: a list will do."""
    return list(zip(x, y.tolist()))


def plain_pgd(net, x, y, start, eps, step, steps):
    """PGD that keeps every image to the end -> margins (steps + 1, b): right logit less the best
    other one, at the start and after every step; an image is broken where it is not positive."""
    adversarial = x + start
    margins = []
    for _ in range(steps + 1):
        leaf = adversarial.clone().requires_grad_()
        logits = net(leaf)
        own = logits[range(len(y)), y]
        others = logits.detach().clone()
        others[range(len(y)), y] = -math.inf
        margins.append(own.detach() - others.max(1).values)
        F.cross_entropy(logits, y, reduction="sum").backward()
        moved = adversarial + step * leaf.grad.sign()
        lowest = torch.maximum(x - eps, torch.zeros_like(x))
        highest = torch.minimum(x + eps, torch.ones_like(x))
        adversarial = torch.maximum(torch.minimum(moved, highest), lowest)
    net.zero_grad(set_to_none=True)
    return torch.stack(margins)


def expected_digits(net, x, y, eps, step, steps):
    """Outcomes by plain_pgd from evaluate's starts -> digits, and how near each was to another."""
    start = common.random_start(x, range(len(y)), eps)
    margins = plain_pgd(net, x, y, start, eps, step, steps)
    with torch.no_grad():
        logits = net(x)
        others = logits.clone()
        others[range(len(y)), y] = -math.inf
        clean = logits[range(len(y)), y] - others.max(1).values
    right, robust = clean > 0, (margins > 0).all(0)
    digits = right.int() + (right & robust).int()
    nearest = torch.minimum(clean.abs(), margins.min(0).values.abs())
    return "".join(map(str, digits.tolist())), nearest


def share(right):
    return pytest.approx(100 * right.double().mean().item())


# ------------------------------------------------------------------------------------------------
# The attack
# ------------------------------------------------------------------------------------------------


class Watched(nn.Module):
    """A network that keeps its inputs, and the gradients that arrive there."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.inputs = []
        self.gradients = []
        self.eval()

    def forward(self, x):
        self.inputs.append(x.detach().clone())
        if x.requires_grad:
            x.register_hook(self.gradients.append)
        return self.net(x)


def attacked(problem, eps, step, steps, x=None, y=None):
    """common.attack on all images of a problem (net, x, y), from their own starts."""
    x = problem.x if x is None else x
    y = problem.y if y is None else y
    start = common.random_start(x, range(len(y)), eps)
    return common.attack(problem.net, x, y, start, eps, step, steps)


def test_the_attack_reaches_the_closed_form_on_a_linear_classifier(linear):
    right, zero, _, _ = attacked(linear, linear.eps, linear.eps / 2, 30)
    assert torch.equal(right, linear.worst > 0)
    assert not zero.any()


def test_an_attack_without_steps_is_the_random_start(linear):
    right, _, _, _ = attacked(linear, linear.eps, linear.eps, 0)
    start = common.random_start(linear.x, range(40), linear.eps)
    assert torch.equal(right, linear.net(linear.x + start).argmax(1) == linear.y)


@pytest.mark.parametrize("eps, step", [(0.05, 0.03), (0.6, 0.4)])
def test_the_attack_stays_in_the_ball_and_among_pixels(eps, step):
    # a network that no attack breaks, and images on the border of what a pixel can be
    net = Watched(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)))
    net.net[1].weight.data.mul_(1e-3)
    net.net[1].bias.data.copy_(torch.tensor([1.0, 0.0]))
    x = torch.rand(8, 3, 4, 4)
    x[:2], x[2:4] = 0, 1
    x[4:6] = x[4:6].round()
    problem = SimpleNamespace(net=net, x=x, y=torch.zeros(8, dtype=torch.long))
    attacked(problem, eps, step, 6)
    assert len(net.inputs) == 7
    for iterate in net.inputs:
        assert (iterate - x).abs().max() <= eps + 1e-6
        assert iterate.min() >= 0
        assert iterate.max() <= 1
    assert (net.inputs[-1] - x).abs().max() > 0.9 * eps


def test_the_steps_are_the_published_ones(linear):
    keep = linear.worst > 0  # so far from the border that none leaves
    x, y = linear.x[keep], linear.y[keep]
    assert len(y) > 5
    net = Watched(linear.net)
    eps, step = 0.01, 0.004
    attacked(SimpleNamespace(net=net), eps, step, 5, x, y)
    W, b = linear.net.W.detach(), linear.net.b.detach()
    assert len(net.inputs) == len(net.gradients) == 6
    for now, following, gradient in zip(net.inputs, net.inputs[1:], net.gradients):
        # dCE/dx = (softmax - onehot) W, of each image alone: no 1 / batch
        by_hand = ((now.flatten(1) @ W.T + b).softmax(1) - torch.eye(2)[y]) @ W
        torch.testing.assert_close(gradient.flatten(1), by_hand, rtol=1e-3, atol=1e-7)
        delta = (now - x + step * by_hand.reshape(x.shape).sign()).clamp(-eps, eps)
        torch.testing.assert_close(following, (x + delta).clamp(0, 1), rtol=0, atol=1e-6)


def test_a_broken_image_leaves_at_once(linear, unchecked):
    eps, step, steps = linear.eps, linear.eps / 8, 12
    start = common.random_start(linear.x, range(40), eps)
    margins = plain_pgd(linear.net, linear.x, linear.y, start, eps, step, steps)
    linear.net.inputs.clear()
    common.evaluate(linear.net, linear.images, eps, steps, step)

    left = (linear.margin > 0) & (margins[0] > 0)
    expected = [40, 40]  # the clean images, and the starts
    for margin in margins:
        expected.append(int(left.sum()))
        left = left & (margin > 0)
    assert len(set(expected)) > 3, "some must leave on the way"
    assert [len(x) for x in linear.net.inputs] == expected


def test_the_attack_ends_when_no_image_is_left(linear):
    linear.net.inputs.clear()
    right, _, _, _ = attacked(linear, 0.3, 0.1, 50)
    assert not right.any()
    assert len(linear.net.inputs) < 20


def test_the_attack_writes_no_gradient_into_the_model():
    net, x, y = toy()
    common.evaluate(net, pairs(x, y), 0.05, 2)
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_the_losses_are_those_after_a_quarter_of_the_steps_and_at_the_end(linear):
    keep = linear.worst > 0  # none of these leaves
    x, y = linear.x[keep], linear.y[keep]
    net = Watched(linear.net)
    right, _, early, late = attacked(SimpleNamespace(net=net), linear.eps, linear.eps / 8, 8, x, y)
    assert right.all()
    with torch.no_grad():
        quarter = F.cross_entropy(linear.net(net.inputs[2]), y, reduction="none")
        end = F.cross_entropy(linear.net(net.inputs[8]), y, reduction="none")
    torch.testing.assert_close(early, quarter)
    torch.testing.assert_close(late, end)
    assert (late > early).all(), "the attack raises the loss"


# ------------------------------------------------------------------------------------------------
# Starts
# ------------------------------------------------------------------------------------------------


def test_starts_are_uniform_in_the_ball():
    x = torch.full((40, 3, 4, 4), 0.5)
    start = common.random_start(x, range(40), 0.1)
    # 1920 draws from U(-0.1, 0.1): extremes near the bounds, standard deviation 0.1 / sqrt(3)
    assert -0.1 <= start.min() < -0.099
    assert 0.099 < start.max() <= 0.1 + 1e-6
    assert start.std().item() == pytest.approx(0.1 / math.sqrt(3), abs=0.003)
    assert start.mean().item() == pytest.approx(0, abs=0.006)


def test_starts_differ_between_images():
    start = common.random_start(torch.full((40, 3, 4, 4), 0.5), range(40), 0.1)
    assert len(start.unique(dim=0)) == 40


def test_a_start_belongs_to_its_index():
    x = torch.rand(9, 3, 4, 4)
    whole = common.random_start(x, range(9), 0.1)
    order = [4, 0, 8]
    assert torch.equal(common.random_start(x[order], order, 0.1), whole[order])
    torch.rand(3)  # whatever was drawn in between
    assert torch.equal(common.random_start(x, range(9), 0.1), whole)


def test_a_start_leaves_pixels_pixels():
    x = torch.rand(9, 3, 4, 4).round()
    moved = x + common.random_start(x, range(9), 0.1)
    assert 0 <= moved.min()
    assert moved.max() <= 1


@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_evaluate_starts_each_image_where_its_index_says(linear, unchecked, batch_size):
    linear.net.inputs.clear()
    common.evaluate(linear.net, linear.images, 0.02, 1, batch_size=batch_size)
    expected = linear.x + common.random_start(linear.x, range(40), 0.02)
    seen = torch.cat(linear.net.inputs)
    for moved in expected:
        assert (seen == moved).flatten(1).all(1).any()


# ------------------------------------------------------------------------------------------------
# evaluate
# ------------------------------------------------------------------------------------------------


def test_evaluate_reaches_the_closed_form_on_a_linear_classifier(linear):
    result = common.evaluate(linear.net, linear.images, linear.eps, 30, linear.eps / 2)
    assert result["clean"] == share(linear.margin > 0)
    assert result["pgd"] == share(linear.worst > 0)
    assert result["clean"] >= result["noise"] > result["pgd"]
    digits = (linear.margin > 0).int() + (linear.worst > 0).int()
    assert result["outcomes"] == "".join(map(str, digits.tolist()))
    assert result["zero_gradient"] == 0
    assert result["flags"] == []


def test_the_noise_is_the_start_alone(linear, unchecked):
    result = common.evaluate(linear.net, linear.images, 0.1, 1)
    moved = linear.x + common.random_start(linear.x, range(40), 0.1)
    right = linear.net(moved).argmax(1) == linear.y
    assert result["noise"] == share(right)
    assert result["noise"] != result["clean"]


def test_an_image_that_is_wrong_before_the_attack_is_not_robust(linear):
    # no attack of size 0 can break them: what is wrong stays wrong
    images = pairs(linear.x, 1 - linear.y)
    result = common.evaluate(linear.net, images, 0.0, 2)
    assert result["clean"] == result["pgd"] == share(linear.margin < 0)
    assert set(result["outcomes"]) == {"0", "2"}


def test_an_image_that_is_wrong_when_clean_stays_lost_where_noise_makes_it_right(unchecked):
    # right is brighter than 0.5: these lie just below, and about half of the starts lie above
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).eval()
    net[1].weight.data.copy_(torch.stack([-torch.ones(48), torch.ones(48)]))
    net[1].bias.data.copy_(torch.tensor([24.0, -24.0]))
    x = torch.full((40, 3, 4, 4), 0.4999)
    result = common.evaluate(net, pairs(x, torch.ones(40, dtype=torch.long)), 0.1, 1)
    assert 20 < result["noise"] < 80
    assert (result["clean"], result["pgd"], result["outcomes"]) == (0, 0, 40 * "0")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_evaluate_agrees_image_by_image_with_a_pgd_that_keeps_every_image(seed, unchecked):
    net, x, y = toy(seed)
    eps, step, steps = 0.08, 0.02, 8
    digits, nearest = expected_digits(net, x, y, eps, step, steps)
    result = common.evaluate(net, pairs(x, y), eps, steps, step)
    assert set(digits) == set("012"), "neither hopeless nor trivial"
    for found, expected, near in zip(result["outcomes"], digits, nearest):
        assert found == expected or near < 1e-4


def test_on_the_small_clip_evaluate_agrees_with_a_pgd_that_keeps_every_image(
    classifier, embedded, unchecked
):
    images = list(common.TestImages(embedded.test[::20], classifier.size))
    x = torch.stack([pixels for pixels, _ in images]) / 255
    y = torch.tensor([label for _, label in images])
    eps, step, steps = 1.5 / 255, 1 / 255, 4
    digits, nearest = expected_digits(classifier, x, y, eps, step, steps)
    result = common.evaluate(classifier, images, eps, steps, step)
    assert len(set(digits)) > 1, "neither hopeless nor trivial"
    # another batch rounds otherwise: what lies on the border may fall to either side
    for found, expected, near in zip(result["outcomes"], digits, nearest):
        assert found == expected or near < 0.05
    assert (nearest > 0.05).double().mean() > 0.7


class Band(nn.Module):
    """Two classes; wrong where the mean pixel lies in a narrow band that the attack crosses."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))

    def forward(self, x):
        mean = x.flatten(1).mean(1)
        margin = self.w * (1 - mean)  # the attack makes images brighter
        inside = (mean > 0.52) & (mean < 0.54)
        margin = margin - 2 * inside * margin.detach()
        return torch.stack([margin, torch.zeros_like(margin)], 1)


def test_an_image_is_lost_once_any_iterate_breaks_it():
    net, y = Band().eval(), torch.zeros(4, dtype=torch.long)
    x = torch.full((4, 3, 8, 8), 0.5)
    start = torch.zeros_like(x)
    margins = plain_pgd(net, x, y, start, 0.1, 0.03, 3)
    assert (margins[1] < 0).all()
    assert (margins[-1] > 0).all(), "right again at the end"
    right, _, _, _ = common.attack(net, x, y, start, 0.1, 0.03, 3)
    assert not right.any()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_outcomes_depend_neither_on_the_batch_nor_on_the_workers(unchecked, workers, batch_size):
    net, x, y = toy()
    images = pairs(x, y)
    usual = common.evaluate(net, images, 0.08, 8, 0.02)
    other = common.evaluate(net, images, 0.08, 8, 0.02, batch_size=batch_size, workers=workers)
    assert set(usual["outcomes"]) == set("012")
    assert other == usual


def test_outcomes_of_the_small_clip_do_not_depend_on_the_batch(classifier, embedded, unchecked):
    images = list(common.TestImages(embedded.test[::18], classifier.size))
    found = []
    for batch_size in (1, 7, 256):
        result = common.evaluate(classifier, images, common.TINY_EPS / 2, 3, batch_size=batch_size)
        found.append(result["outcomes"])
    assert len(set(found[0])) > 1
    assert found[0] == found[1] == found[2]


def test_uint8_and_float_images_agree(linear):
    as_bytes = (255 * linear.x).round().to(torch.uint8)
    as_float = as_bytes.float() / 255
    results = []
    for x in (as_bytes, as_float):
        results.append(common.evaluate(linear.net, pairs(x, linear.y), linear.eps, 3))
    assert results[0] == results[1]


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluate_leaves_the_global_random_numbers_alone(workers):
    net, x, y = toy()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    common.evaluate(net, pairs(x, y), 0.05, 2, workers=workers)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


def test_progress_tells_images_done_and_robust_ones(linear):
    told = []
    result = common.evaluate(
        linear.net,
        linear.images,
        linear.eps,
        30,
        linear.eps / 2,
        batch_size=16,
        progress=lambda done, robust: told.append((done, robust)),
    )
    so_far = [result["outcomes"][:done].count("2") for done in (16, 32, 40)]
    assert told == list(zip((16, 32, 40), so_far))


class Dark(nn.Module):
    """Blind to pixels up to 0.9: there its gradient is exactly zero."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))

    def forward(self, x):
        seen = self.w * F.relu(x - 0.9).flatten(1).sum(1)
        return torch.stack([1 + 0 * seen, 0.1 * seen], 1)


def test_zero_gradients_are_counted_among_the_attacked(unchecked):
    dark, bright = torch.full((6, 3, 4, 4), 0.5), torch.full((2, 3, 4, 4), 0.95)
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 0, 0])  # the three in the middle are wrong at once
    result = common.evaluate(Dark().eval(), pairs(torch.cat([dark, bright]), labels), 0.01, 2)
    assert result["zero_gradient"] == pytest.approx(3 / 5)
    assert any("the first gradient is zero on 60.0 %" in flag for flag in result["flags"])


def test_float16_weights_are_refused():
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).eval().half()
    with pytest.raises(ValueError, match="float16"):
        common.evaluate(net, pairs(torch.rand(4, 3, 4, 4), torch.zeros(4)), 0.01)


def test_a_gradient_that_is_not_finite_raises():
    class Cliff(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))

        def forward(self, x):
            flat = self.w * (x - x.detach()).flatten(1).sum(1).sqrt()  # infinitely steep at 0
            return torch.stack([1 + flat, flat.detach()], 1)

    with pytest.raises(FloatingPointError, match="not finite"):
        common.evaluate(Cliff().eval(), pairs(torch.rand(4, 3, 4, 4), torch.zeros(4).long()), 0.01)


@pytest.mark.parametrize("n, k, low, high", [(200, 72, 29.67, 42.85), (200, 0, 0, 1.88)])
def test_the_interval_is_wilsons(n, k, low, high):
    assert common.interval(torch.arange(n) < k) == pytest.approx([low, high], abs=0.02)


@pytest.mark.parametrize("n, k", [(200, 72), (25, 1), (10, 10), (40, 20), (7, 0)])
def test_at_an_end_of_the_interval_the_share_lies_196_deviations_away(n, k):
    p = k / n
    low, high = common.interval(torch.arange(n) < k)
    for end in (low / 100, high / 100):
        if 0 < end < 1:
            deviation = math.sqrt(end * (1 - end) / n)
            assert abs(p - end) == pytest.approx(1.96 * deviation, abs=5e-4)
    assert 0 <= low <= 100 * p <= high <= 100


def test_the_intervals_are_of_the_outcomes(linear):
    result = common.evaluate(linear.net, linear.images, linear.eps, 30, linear.eps / 2)
    assert result["intervals"]["clean"] == common.interval(linear.margin > 0)
    assert result["intervals"]["pgd"] == common.interval(linear.worst > 0)


# ------------------------------------------------------------------------------------------------
# Planted faults
# ------------------------------------------------------------------------------------------------


class Around(nn.Module):
    """A classifier behind a fault: something done to its input, or to its logits."""

    def __init__(self, classifier, before=nn.Identity(), after=nn.Identity()):
        super().__init__()
        self.classifier = classifier
        self.before = before
        self.after = after
        self.eval()

    def forward(self, x):
        return self.after(self.classifier(self.before(x)))


@pytest.fixture(scope="module")
def small(embedded):
    """The small CLIP and 8 embedded test images, uint8, that it gets right."""
    net = common.Classifier(*common.load_clip("tiny"), embedded.classes, embedded.template)
    right = []
    for pixels, label in common.TestImages(embedded.test[::15], net.size):
        with torch.no_grad():
            if net(pixels[None] / 255).argmax() == label:
                right.append((pixels, label))
    assert len(right) >= 8
    return net, right[:8]


def flags(net, images, eps=common.TINY_EPS, steps=4):
    return common.evaluate(net, images, eps, steps)["flags"]


@pytest.mark.parametrize("eps", [3 / 255, 1 / 255])
def test_the_honest_small_clip_raises_no_flag(small, eps):
    result = common.evaluate(*small, eps, 10)
    assert result["flags"] == []
    assert eps == common.TINY_EPS or "2" in result["outcomes"], "some must withstand the small ball"


def test_a_quantising_layer_is_flagged(linear):
    raised = flags(Around(linear.net, before=lambda x: (x * 32).round() / 32), linear.images)
    assert any("first gradient is zero" in flag for flag in raised)


def test_a_saturated_softmax_is_flagged(linear):
    raised = flags(Around(linear.net, after=lambda logits: 1e4 * logits), linear.images)
    assert any("first gradient is zero" in flag for flag in raised)


class Backwards(torch.autograd.Function):
    """The identity with another gradient: noise, or a multiple of the true one."""

    @staticmethod
    def forward(ctx, x, gradient):
        ctx.gradient = gradient
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.gradient == "noise":
            return torch.randn(grad.shape, generator=torch.Generator().manual_seed(0)), None
        return ctx.gradient * grad, None


@pytest.mark.parametrize("gradient", ["noise", -1.0])
def test_a_masked_gradient_that_is_not_zero_is_flagged(small, gradient):
    net, images = small
    masked = Around(net, before=lambda x: Backwards.apply(x, gradient))
    raised = flags(masked, images, eps=8 / 255)
    assert any("promises a slope" in flag for flag in raised)
    assert any("random guesses break" in flag for flag in raised)


def test_a_model_that_withstands_a_huge_ball_is_flagged():
    # its margin is 1, and all pixels together move it by less
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).eval()
    net[1].weight.data.mul_(0.01)
    net[1].bias.data.copy_(torch.tensor([1.0, 0.0]))
    raised = flags(net, pairs(torch.rand(20, 3, 4, 4), torch.zeros(20).long()))
    assert raised == ["20 of 20 images withstand a ball of radius 0.25"]


def test_noise_that_hurts_more_than_the_attack_is_flagged(linear):
    masked = Around(linear.net, before=lambda x: Backwards.apply(x, -1.0))
    raised = flags(masked, linear.images, eps=0.1)
    assert any("random noise breaks" in flag for flag in raised)


def test_a_randomised_model_is_flagged(linear):
    raised = flags(
        Around(linear.net, before=lambda x: x + 0.1 * torch.randn_like(x)), linear.images
    )
    assert any("it is random" in flag for flag in raised)


def test_a_part_in_train_mode_is_flagged(linear):
    net = nn.Sequential(linear.net, nn.Dropout(0.0)).eval()
    net[1].train()
    assert flags(net, linear.images) == ["the model is in train mode"]


@pytest.mark.parametrize("value", [-1e-3, 1 + 1e-3])
def test_pixels_outside_0_to_1_are_refused(linear, value):
    x = linear.x.clone()
    x[3, 0, 0, 0] = value
    with pytest.raises(ValueError, match="expected 0 to 1"):
        common.evaluate(linear.net, pairs(x, linear.y), 0.02, 2)


def test_more_steps_that_help_the_defender_are_flagged(unchecked):
    class Later(nn.Module):
        """Its loss is large at one call alone: after one step, a quarter of the way."""

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            # calls: the clean images, the starts, then the iterates 0, 1, 2, 3, 4
            other = 0.9 if self.calls == 4 else 0.0
            mean = self.w * x.flatten(1).mean(1, keepdim=True)
            return mean * torch.tensor([[1.0, other]])

    images = pairs(torch.full((4, 3, 4, 4), 0.5), torch.zeros(4).long())
    assert flags(Later().eval(), images) == [
        "more steps of the attack help the defender: the loss falls again"
    ]


class Turns(nn.Module):
    """Right on all images when first asked; on the noise wrong on the first `broken`."""

    def __init__(self, broken):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))
        self.wrong = [0, broken]

    def forward(self, x):
        right = torch.arange(len(x)) >= self.wrong.pop(0)
        return self.w * torch.stack([right.float(), 1 - right.float()], 1)


@pytest.mark.parametrize(
    "planted, flag",
    [
        ({"zero": 1}, None),
        ({"zero": 2}, "the first gradient is zero on 2.0 %"),
        ({"noise": 1}, None),
        ({"noise": 2}, "random noise breaks 2 images"),
        ({"late": 0.81}, None),
        ({"late": 0.79}, "more steps of the attack help"),
    ],
)
def test_where_a_flag_of_all_images_begins(unchecked, monkeypatch, planted, flag):
    def attack(net, x, *_):
        zero = torch.arange(len(x)) < planted.get("zero", 0)
        early = torch.ones(len(x))
        return torch.ones(len(x)), zero, early, planted.get("late", 1.0) * early

    monkeypatch.setattr(common, "attack", attack)
    images = pairs(torch.full((100, 3, 4, 4), 0.5), torch.zeros(100).long())
    net = Turns(planted.get("noise", 0)).eval()
    raised = common.evaluate(net, images, 0.01, batch_size=100)["flags"]
    assert len(raised) == (flag is not None)
    assert all(one.startswith(flag) for one in raised)


@pytest.mark.parametrize(
    "planted, flag",
    [
        ({"withstood": 2}, None),
        ({"withstood": 3}, "3 of 40 images withstand a ball"),
        ({"guessed": 2}, None),
        ({"guessed": 3}, "random guesses break 3 of 40 images"),
        ({"times": 1.9}, None),
        ({"times": 2.1}, "the gradient promises a slope"),
        ({"times": 0.55}, None),
        ({"times": 0.45}, "the gradient promises a slope"),
    ],
)
def test_where_a_flag_of_some_images_begins(monkeypatch, planted, flag):
    number = torch.arange(40)
    withstood, guessed = planted.get("withstood", 0), planted.get("guessed", 0)
    monkeypatch.setattr(common, "attack", lambda *_: (number < withstood,))
    monkeypatch.setattr(common, "random_search", lambda *_: number >= guessed)
    line = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).eval()
    net = Around(line, before=lambda x: Backwards.apply(x, planted.get("times", 1.0)))
    images = pairs(torch.rand(40, 3, 4, 4), torch.zeros(40).long())
    raised = common.sanity(net, images, 0.01, torch.ones(40))
    assert len(raised) == (flag is not None)
    assert all(one.startswith(flag) for one in raised)


def test_one_image_is_enough(linear):
    image = [(linear.x[0], int(linear.net(linear.x[:1]).argmax()))]
    result = common.evaluate(linear.net, image, 1e-4, 2)
    assert (result["clean"], result["pgd"], result["outcomes"]) == (100, 100, "2")


# ------------------------------------------------------------------------------------------------
# Random guesses
# ------------------------------------------------------------------------------------------------


class Redder(nn.Module):
    """Is an image redder than green? Its margin is a mean: all pixels move it by 2 eps at most."""

    def forward(self, x):
        return x.mean((2, 3))[:, :2]


def red(margin):
    """8 grey images, redder than green by the margin, and their label."""
    x = torch.full((8, 3, 8, 8), 0.5)
    x[:, 0] += margin
    return x, torch.zeros(8, dtype=torch.long)


# only guesses on top of good guesses reach three tenths of what the closed form allows
@pytest.mark.parametrize("share_of_worst, right", [(0.3, False), (1.05, True), (-0.1, False)])
def test_random_search_breaks_what_is_near_the_border_and_nothing_that_cannot_be(
    share_of_worst, right
):
    eps = 0.1
    found = common.random_search(Redder(), *red(2 * eps * share_of_worst), eps)
    assert found.tolist() == 8 * [right]


def test_random_search_stays_in_the_ball_and_among_pixels():
    net = Watched(Redder())
    x = torch.rand(8, 3, 8, 8).round()
    common.random_search(net, x, torch.zeros(8, dtype=torch.long), 0.1)
    assert len(net.inputs) == 50
    for guess in net.inputs:
        assert (guess - x).abs().max() <= 0.1 + 1e-6
        assert 0 <= guess.min()
        assert guess.max() <= 1


# ------------------------------------------------------------------------------------------------
# Several processes
# ------------------------------------------------------------------------------------------------


def one_of_two(rank, folder):
    """A process of two: evaluates its share with process 0's weights, and writes the result."""
    torch.set_num_threads(1)
    address = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", address, rank=rank, world_size=2)
    net, x, y = toy()
    if rank:
        for parameter in net.parameters():
            parameter.data.mul_(-1)  # it must not matter what others have trained
    result = common.evaluate(net, pairs(x, y), 0.08, 8, 0.02, batch_size=4)
    common.write(folder / f"{rank}.json", json.dumps(result).encode())
    (folder / f"{rank}.txt").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_result_of_one(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (tmp_path,), nprocs=2)
    net, x, y = toy()
    alone = common.evaluate(net, pairs(x, y), 0.08, 8, 0.02, batch_size=4)
    assert set(alone["outcomes"]) == set("012")
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.txt").read_text()) == alone
    written = sorted(path.name for path in tmp_path.glob("*.json"))
    assert written == ["0.json"], "only process 0 writes files"


# ------------------------------------------------------------------------------------------------
# The small CLIP, and another's attack
# ------------------------------------------------------------------------------------------------


@pytest.mark.numbers
def test_the_small_clip_is_accurate_and_not_robust(classifier, embedded):
    images = common.TestImages(embedded.test, classifier.size)
    result = common.evaluate(classifier, images, common.TINY_EPS, 20)
    assert result["clean"] >= ZERO_SHOT_CLEAN
    assert result["pgd"] < ZERO_SHOT_PGD < result["noise"]
    assert result["zero_gradient"] == 0
    assert result["flags"] == []


@pytest.mark.numbers
def test_bfloat16_attacks_like_float32(tiny, embedded, unchecked):
    # a third of the default radius, where accuracy is neither 0 nor 100
    images = list(common.TestImages(embedded.test[::4], 64))
    results = []
    for dtype in ("float32", "bfloat16"):
        net = common.Classifier(*tiny, embedded.classes, embedded.template, dtype)
        results.append(common.evaluate(net, images, common.TINY_EPS / 3, 3))
    full, low = results
    for key in ("clean", "pgd"):
        assert full["intervals"][key][0] <= low[key] <= full["intervals"][key][1]
    same = sum(a == b for a, b in zip(full["outcomes"], low["outcomes"]))
    assert same >= 0.92 * len(images)


@pytest.mark.skipif(not importlib.util.find_spec("torchattacks"), reason="needs torchattacks")
def test_the_iterates_are_those_of_torchattacks(small):
    import torchattacks

    net, images = small
    x = torch.stack([pixels for pixels, _ in images]) / 255
    y = torch.tensor([label for _, label in images])
    eps, step, steps = 1.5 / 255, 1 / 255, 5
    watched = Watched(net)
    right, _, _, _ = common.attack(watched, x, y, torch.zeros_like(x), eps, step, steps)
    theirs = torchattacks.PGD(net, eps, step, steps, random_start=False)(x, y)
    assert 0 < right.sum() < len(y), "neither hopeless nor trivial"
    # what no iterate broke is right at the last one, which is theirs; another batch rounds
    # otherwise, and so a sign of a tiny gradient may differ
    with torch.no_grad():
        right_at_theirs = net(theirs).argmax(1) == y
    assert (right & ~right_at_theirs).sum() <= 1
    last = watched.inputs[-1]
    for image in theirs[right]:
        distance = (last - image).abs().flatten(1).mean(1)
        assert distance.min() < 0.02 * eps


# ------------------------------------------------------------------------------------------------
# Every test set, a bar, a table
# ------------------------------------------------------------------------------------------------

COLOURS = {"red": [1.0, 0.0, 0.0], "green": [0.0, 1.0, 0.0], "blue": [0.0, 0.0, 1.0]}


class Colours(nn.Module):
    """Pixels -> the mean of the channel that each class is named after."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))
        self.eval()

    def set_classes(self, classes, template):
        self.classes = classes
        self.template = template
        self.register_buffer("text", torch.tensor([COLOURS[name] for name in classes]))

    def forward(self, x):
        return self.w * x.mean((2, 3)) @ self.text.T


def coloured(classes, robust, weak, wrong):
    """A test set: so many images that an attack of 0.05 leaves right, makes wrong, finds wrong."""
    items = []
    for n, gap in ((robust, 0.3), (weak, 0.02), (wrong, -0.3)):
        for i in range(n):
            label = i % len(classes)
            pixels = torch.full((3, 4, 4), 0.3)
            channel = torch.tensor(COLOURS[classes[label]]).argmax()
            pixels[channel] += gap
            items.append((pixels, label))
    return common.Data(classes, f"a {len(items)} {{}}.", [], [], []), items


@pytest.fixture
def three_sets():
    """The training classes, and two sets whose classes have other places."""
    return {
        "first": coloured(["red", "green"], 12, 4, 4),
        "second": coloured(["green", "red"], 2, 2, 0),
        "new": coloured(["blue", "red", "green"], 3, 3, 4),
    }


def arguments():
    return SimpleNamespace(dataset="first", eps=0.05, test_steps=30, batch_size=2)


def test_every_test_set_is_measured_with_its_own_classes(three_sets, unchecked):
    result = common.measure(Colours(), three_sets, arguments())
    assert (result["clean"], result["pgd"]) == (80, 60)
    second, new = result["transfer"]["second"], result["transfer"]["new"]
    assert (second["clean"], second["pgd"]) == (100, 50)
    assert (new["clean"], new["pgd"]) == (pytest.approx(60), pytest.approx(30))
    assert set(result["transfer"]) == {"second", "new"}


def test_the_test_attack_has_steps_of_a_255th(unchecked):
    net = Watched(Colours())
    net.set_classes = net.net.set_classes
    data, items = coloured(["red", "green"], 1, 0, 0)
    args = SimpleNamespace(dataset="d", eps=0.1, test_steps=3, batch_size=1)
    common.measure(net, {"d": (data, items)}, args)
    first, second = net.inputs[-2:]
    assert (second - first).abs().max() == pytest.approx(1 / 255, rel=1e-4)


def test_h_is_the_harmonic_mean_of_four(three_sets, unchecked):
    result = common.measure(Colours(), three_sets, arguments())
    assert result["H"] == pytest.approx(4 / (1 / 80 + 1 / 60 + 1 / 60 + 1 / 30))
    del three_sets["new"]
    assert "H" not in common.measure(Colours(), three_sets, arguments())


def test_h_is_0_where_nothing_is_robust(three_sets, unchecked):
    three_sets["new"] = coloured(["blue", "red"], 0, 4, 0)
    assert common.measure(Colours(), three_sets, arguments())["H"] == 0


def test_after_measure_the_classes_are_the_training_classes(three_sets, unchecked):
    net = Colours()
    common.measure(net, three_sets, arguments())
    assert net.classes == ["red", "green"]
    assert net.template == three_sets["first"][0].template


def test_a_single_test_set_has_no_transfer(three_sets, unchecked):
    result = common.measure(Colours(), {"first": three_sets["first"]}, arguments())
    assert "transfer" not in result
    assert "H" not in result


def test_where_there_is_no_terminal_no_bar_is_drawn(three_sets, capsys, unchecked):
    common.measure(Colours(), three_sets, arguments())
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_images_done_and_the_accuracy_so_far(three_sets, monkeypatch, unchecked):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    common.measure(Colours(), {"first": three_sets["first"]}, arguments())
    # 20 images in batches of 8: 8 robust, then 4 robust and 4 weak, then 4 wrong
    shown = screen.getvalue()
    assert "first" in shown
    assert {"8", "16"} <= set(re.findall(r"(\d+)/20", shown)) <= {"0", "8", "16", "20"}
    for accuracy in (100 * 8 / 8, 100 * 12 / 16, 100 * 12 / 20):
        assert f"PGD-30 {accuracy:.1f} %" in shown


def test_the_table_shows_every_result_its_interval_and_its_flags(three_sets, capsys, unchecked):
    before = common.measure(Colours(), three_sets, arguments())
    before["transfer"]["second"]["flags"] = ["something is odd"]
    common.print_table([("zero-shot", None), ("adapted", before)], 30)
    out, _ = capsys.readouterr()
    lines = out.strip("\n").split("\n")
    assert "PGD-30" in lines[0] and "clean" in lines[0]
    assert [line.split("|")[0].strip() for line in lines[1:4]] == [
        "adapted",
        "adapted on second",
        "adapted on new",
    ]
    low, high = before["intervals"]["pgd"]
    assert "80.00" in lines[1]
    assert f"60.00 ( {low:.1f} to  {high:.1f})" in lines[1]
    assert lines[4].startswith(f"adapted: H {before['H']:.2f}")
    assert lines[5:] == ["WARNING (adapted on second): something is odd"]
    assert "zero-shot" not in out
