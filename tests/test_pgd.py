"""The attack of the training, which every file of a method brings along, copied out of it."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from test_advmask import copied

FILES = "advmask", "advlora", "baselines.tecoa", "baselines.tgazsr", "baselines.advvp"
FILES += ("baselines.prompts",)


@pytest.fixture(params=FILES)
def pgd(request):
    """pgd of a file, by itself."""
    return copied(importlib.import_module(request.param), "pgd").pgd


def test_it_reaches_the_closed_form_on_a_linear_classifier(pgd, linear):
    x_adv = pgd(linear.net, linear.x, linear.y, linear.eps, linear.eps / 2, steps=5)
    logits = linear.net(x_adv)
    margin = logits[range(40), linear.y] - logits[range(40), 1 - linear.y]
    torch.testing.assert_close(margin, linear.worst, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eps, size, steps", [(0.03, 0.03, 2), (0.05, 0.4, 3), (0.6, 0.2, 4)])
def test_it_stays_in_the_ball_and_among_pixels(pgd, linear, eps, size, steps):
    black, white, some = torch.zeros(3, 3, 4, 4), torch.ones(3, 3, 4, 4), linear.x[:3]
    x = torch.cat([black, white, some.round() * 0.998 + 0.001, some])
    x_adv = pgd(linear.net, x, torch.arange(12) % 2, eps, size, steps)
    assert len(linear.net.inputs) == steps
    for iterate in (*linear.net.inputs, x_adv):
        assert (iterate - x).abs().max() <= eps + 1e-6
        assert iterate.min() >= 0 and iterate.max() <= 1
    assert (x_adv - x).abs().max() > 0.99 * eps


def test_it_starts_uniformly_in_the_ball(pgd, linear):
    first = pgd(linear.net, linear.x, linear.y, 0.1, 0.1, steps=0) - linear.x
    second = pgd(linear.net, linear.x, linear.y, 0.1, 0.1, steps=0) - linear.x
    assert not torch.equal(first, second)
    # 1,920 draws from U(-0.1, 0.1): extremes at the bounds, standard deviation 0.1 / sqrt(3).
    # Each of these bounds is missed with a probability below 1e-6
    assert -0.1 - 1e-6 <= first.min() < -0.098
    assert 0.098 < first.max() <= 0.1 + 1e-6
    assert first.std().item() == pytest.approx(0.1 / math.sqrt(3), abs=0.003)


def test_with_no_radius_it_is_the_identity(pgd, linear):
    assert torch.equal(pgd(linear.net, linear.x, linear.y, 0.0, 0.01, 3), linear.x)


def test_its_gradient_is_that_of_each_image_alone(pgd, linear):
    outputs, gradients = [], []

    def note(net, inputs, logits):
        outputs.append(logits.detach())
        logits.register_hook(gradients.append)

    linear.net.register_forward_hook(note)
    pgd(linear.net, linear.x, linear.y, linear.eps, linear.eps, 2)
    assert len(gradients) == 2
    for logits, gradient in zip(outputs, gradients):
        # dCE/dlogits = softmax - onehot, with no 1 / batch
        torch.testing.assert_close(gradient, logits.softmax(1) - F.one_hot(linear.y))


def test_it_writes_no_gradient(pgd, linear):
    x_adv = pgd(linear.net, linear.x, linear.y, linear.eps, linear.eps, 2)
    assert not x_adv.requires_grad
    assert all(p.requires_grad and p.grad is None for p in linear.net.parameters())


def test_it_refuses_train_mode_and_a_gradient_that_is_not_finite(pgd, linear):
    with pytest.raises(ValueError, match="eval mode"):
        pgd(linear.net.train(), linear.x, linear.y, 0.01, 0.01, 1)
    linear.net.eval().W.data[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        pgd(linear.net, linear.x, linear.y, 0.01, 0.01, 1)
