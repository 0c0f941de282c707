"""advmask.py: the mask, the attack, the losses and the loop against closed forms and loops written
again; the pieces away from their file; what `main` hands to them; the adapter and the merge."""

import functools
import inspect
import json
import math
import pathlib
from types import SimpleNamespace

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import advmask
import common

HERE = pathlib.Path(__file__).resolve().parent.parent
INIT, ALPHA = 1e-2, 5e-3  # where a mask starts, and its threshold


# ------------------------------------------------------------------------------------------------
# What the tests of the other methods use, too
# ------------------------------------------------------------------------------------------------


def copied(module, *names):
    """The source text of these pieces, executed where nothing but torch's own imports is."""
    space = {"math": math, "torch": torch, "nn": nn, "F": F, "parametrize": parametrize}
    for name in names:
        exec(inspect.getsource(getattr(module, name)), space)
    return SimpleNamespace(**space)


def attacked(net, x, y, eps, loss=F.cross_entropy):
    """The inner maximisation of the training, written again: two steps of size eps."""
    x_adv = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
    for _ in range(2):
        leaf = x_adv.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(net(leaf), y), leaf)
        x_adv = x_adv + eps * gradient.sign()
        x_adv = torch.minimum(torch.maximum(x_adv, x - eps), x + eps).clamp(0, 1)
    return x_adv


def toy_batches(n):
    """n batches of five random images of 4 classes, in double precision."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(n):
        x = torch.rand(5, 3, 2, 2, generator=generator, dtype=torch.float64)
        batches.append((x, torch.randint(4, (5,), generator=generator)))
    return batches


def watch_measure(monkeypatch, x):
    """Put a stand-in for common.measure, which takes no time -> the list of what it saw.

    Its accuracies count up. It notes the answers to x, and the names of the parameters that are
    parametrised or trainable.
    """
    seen = []

    def measure(classifier, tests, args):
        classifier.set_classes(classifier.classes, classifier.template)  # as the real one does
        with torch.no_grad():
            logits = classifier(x)
        adapted = []
        for name, p in classifier.named_parameters():
            if p.requires_grad or "parametrizations" in name:
                adapted.append(name)
        templates = [data.template for data, _ in tests.values()]
        seen.append(SimpleNamespace(logits=logits, adapted=adapted, templates=templates))
        clean, pgd = 20.0 + len(seen), 10.0 + len(seen)
        whole = {"clean": [0, 100], "pgd": [0, 100]}
        return {"clean": clean, "pgd": pgd, "intervals": whole, "flags": []}

    monkeypatch.setattr(common, "measure", measure)
    return seen


def watch_train(monkeypatch, module, change):
    """Put a stand-in for a method's train, which does change(what it is to train) and no more.

    -> the list of the arguments of every call, by name, the batches as a list.
    """
    signature = inspect.signature(module.train)
    calls = []

    @functools.wraps(module.train)
    def train(*arguments, **named):
        call = signature.bind(*arguments, **named)
        call.apply_defaults()
        call.arguments["batches"] = list(call.arguments["batches"])
        calls.append(call.arguments)
        change(call.args[1])

    monkeypatch.setattr(module, "train", train)
    return calls


def quick(program, monkeypatch, module, change, x, out):
    """-> run(*arguments), a run of a method's program that takes no time: train is `change`.

    It answers with what was printed, the folder, its result.json, what common.measure saw, and the
    arguments of train (None where nothing was trained).
    """

    def run(*arguments, change=change):
        seen = watch_measure(monkeypatch, x)
        calls = watch_train(monkeypatch, module, change)
        answer = program(module.__name__, "--dtype", "float32", "--out", out, *arguments)
        assert answer.code == 0, answer.err
        folder = max(out.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        result = json.loads((folder / "result.json").read_text())
        call = calls[0] if calls else None
        return SimpleNamespace(out=answer.out, folder=folder, result=result, seen=seen, call=call)

    return run


# ------------------------------------------------------------------------------------------------
# A vision transformer in miniature
# ------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Every token sees the mean of all: (b, tokens, d) -> (b, tokens, d)."""

    def __init__(self, width):
        super().__init__()
        self.mix = nn.Linear(width, width)

    def forward(self, tokens):
        return tokens + self.mix(tokens + tokens.mean(1, keepdim=True)).tanh()


class Toy(nn.Module):
    """Pixels (b, 3, 2, 2) -> 4 logits, in double precision; always with the same random weights."""

    def __init__(self):
        super().__init__()
        self.clip = nn.Module()
        self.clip.visual = nn.Module()
        self.clip.visual.transformer = nn.Module()
        self.clip.visual.transformer.resblocks = nn.ModuleList([Block(6), Block(6)])
        self.clip.visual.transformer.batch_first = True
        self.embed = nn.Linear(3, 6)
        self.head = nn.Linear(6, 4)
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data = 0.6 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
        self.eval().requires_grad_(False)

    def outputs(self, x):
        """What every block puts out: [(b, 5, 6), ...]. The first of five tokens is CLS."""
        patches = self.embed(x.flatten(2).mT)  # (b, 4, 6)
        tokens = torch.cat([patches.mean(1, keepdim=True), patches], 1)
        outputs = []
        for block in self.clip.visual.transformer.resblocks:
            tokens = block(tokens)
            outputs.append(tokens)
        return outputs

    def forward(self, x):
        return self.head(self.outputs(x)[-1][:, 0])


TOY_WEIGHTS = [f"clip.visual.transformer.resblocks.{i}.mix.weight" for i in range(2)]


def scatter(masks, share=0.1):
    """Switch a random share of the entries off."""
    generator = torch.Generator().manual_seed(0)
    for mask in masks.values():
        mask.M.data[torch.rand(mask.M.shape, generator=generator) < share] = 0


# ------------------------------------------------------------------------------------------------
# The mask
# ------------------------------------------------------------------------------------------------


def test_a_mask_of_ones_is_the_identity():
    weight = torch.randn(7, 5)
    mask = advmask.BinaryMask(weight)
    assert torch.equal(mask(weight), weight)
    assert mask.kept().all() and mask.M.shape == weight.shape


@pytest.mark.parametrize("weights", ["attn", "mlp", "both"])
def test_fresh_masks_leave_the_logits_alone(classifier, images, weights):
    x, _ = images
    # without gradients: with them torch may take other kernels, and the last bits differ
    with torch.no_grad():
        before = classifier(x)
        advmask.attach(classifier.clip, advmask.vision_weights(classifier.clip, weights))
        assert torch.equal(classifier(x), before)


def test_entries_at_the_threshold_are_off():
    mask = advmask.BinaryMask(torch.ones(3), init=INIT, alpha=ALPHA)
    alpha = torch.tensor(ALPHA)
    above = torch.nextafter(alpha, torch.tensor(1.0))
    below = torch.nextafter(alpha, torch.tensor(0.0))
    mask.M.data = torch.stack([alpha, above, below])
    assert mask(torch.full((3,), -2.0)).tolist() == [0, -2, 0]
    assert mask.kept().tolist() == [False, True, False]


@pytest.mark.parametrize(
    "init, alpha", [(5e-3, 5e-3), (0, 5e-3), (math.nan, 5e-3), (1e-2, math.nan), (math.inf, 0)]
)
def test_a_mask_must_start_above_its_threshold(init, alpha):
    with pytest.raises(ValueError, match="above alpha"):
        advmask.BinaryMask(torch.ones(2), init, alpha)


def test_straight_through_gradient_on_one_weight():
    theta = torch.randn(4, 6, dtype=torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64)
    layer = nn.Linear(6, 4, bias=False, dtype=torch.float64).requires_grad_(False)
    layer.weight.copy_(theta)
    mask = advmask.BinaryMask(layer.weight)
    mask.M.data[torch.arange(24).reshape(4, 6) % 3 == 0] = 0
    parametrize.register_parametrization(layer, "weight", mask)
    layer(x).tanh().square().sum().backward()

    leaf = (theta * (mask.M.detach() > ALPHA)).requires_grad_()
    (x @ leaf.T).tanh().square().sum().backward()
    # dL/dM_bin = theta * dL/dtheta', and nothing is lost where M is off
    torch.testing.assert_close(mask.M.grad, theta * leaf.grad)
    assert (mask.M.grad[~mask.kept()] != 0).all()
    assert layer.parametrizations.weight.original.grad is None


def test_straight_through_gradient_in_the_small_clip(classifier, images):
    x, y = images
    masks = advmask.attach(classifier.clip, advmask.vision_weights(classifier.clip, "both"))
    scatter(masks)
    F.cross_entropy(classifier(x), y).backward()

    # a CLIP whose weights were multiplied by hand, and are leaves
    plain, config = common.load_clip("tiny")
    theta = {}
    for name, mask in masks.items():
        weight = plain.get_parameter(name).requires_grad_()
        theta[name] = weight.detach().clone()
        weight.data.mul_(mask.kept())
    other = common.Classifier(plain, config, classifier.classes, classifier.template)
    F.cross_entropy(other(x), y).backward()
    for name, mask in masks.items():
        expected = theta[name] * plain.get_parameter(name).grad
        torch.testing.assert_close(mask.M.grad, expected, rtol=1e-3, atol=1e-7)


# entries per squared width, and weights, of a block
SIZES = {"attn": (4, 2), "mlp": (8, 2), "both": (12, 4)}


@pytest.mark.parametrize("weights", SIZES)
def test_the_named_weights_are_masked_and_no_bias(tiny, weights):
    clip, _ = tiny
    masks = advmask.attach(clip, advmask.vision_weights(clip, weights))
    entries, matrices = SIZES[weights]
    assert len(masks) == 6 * matrices
    assert sum(mask.M.numel() for mask in masks.values()) == 6 * entries * 192**2
    for name in masks:
        assert name.startswith("visual.transformer.resblocks.") and "bias" not in name
    # the masks are all that can be trained, and every weight has one of its own
    trained = [p for p in clip.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(mask.M) for mask in masks.values()}
    assert len(trained) == len(masks)


def test_share_off_is_the_share_that_is_off():
    masks = {"a": advmask.BinaryMask(torch.ones(6)), "b": advmask.BinaryMask(torch.ones(2, 2))}
    masks["a"].M.data[:3] = 0
    assert advmask.share_off(masks) == pytest.approx(0.3)


# ------------------------------------------------------------------------------------------------
# The attack
# ------------------------------------------------------------------------------------------------


def test_pgd_goes_through_the_masked_network(linear):
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).eval().requires_grad_(False)
    net[1].weight.copy_(linear.net.W.detach())
    masks = advmask.attach(net, ["1.weight"])
    masks["1.weight"].M.data[:, ::2] = 0
    x_adv = advmask.pgd(net, linear.x, linear.y, linear.eps, linear.eps, 3)
    # pixels that only masked weights read have no gradient: delta keeps its start inside the ball,
    # where it is within a thousandth of the bound by chance; elsewhere it sits on the bound
    on_bound = (x_adv - linear.x).flatten(1).abs() > 0.999 * linear.eps
    assert on_bound[:, 1::2].all()
    assert on_bound[:, ::2].float().mean() < 0.05


# ------------------------------------------------------------------------------------------------
# Features and losses
# ------------------------------------------------------------------------------------------------


def test_features_are_open_clips_intermediates_scaled_to_unit_length(classifier, images):
    x, _ = images
    z, logits = advmask.features(classifier, x)
    visual = common.load_clip("tiny")[0].visual  # as open_clip made it, batch first
    theirs = visual.forward_intermediates(
        (x - classifier.mean) / classifier.std, output_fmt="NLC", output_extra_tokens=True
    )
    expected = []
    for tokens in theirs["image_intermediates_prefix"]:
        cls = tokens[:, 0]
        expected.append(cls / cls.norm(dim=-1, keepdim=True))
    assert z.shape == (6, 6, 192)
    torch.testing.assert_close(z, torch.stack(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, classifier(x))


def test_features_leave_no_hook(classifier, images, monkeypatch):
    def hooks():
        return sum(len(module._forward_hooks) for module in classifier.modules())

    advmask.features(classifier, images[0])
    assert hooks() == 0
    block = classifier.clip.visual.transformer.resblocks[3]
    monkeypatch.setattr(block.mlp, "forward", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        advmask.features(classifier, images[0])
    assert hooks() == 0


@pytest.fixture
def outputs():
    """z_clean, z_adv (3, 5, 4), logits_clean, logits_adv (5, 6), y (5,), in double precision."""
    generator = torch.Generator().manual_seed(0)
    z, w = torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64)
    a, b = 2 * torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    return z, w, a, b, torch.tensor([0, 5, 2, 2, 4])


P_TRUE = [0.9, 0.1, 0.5, 0.01, 0.4]


def lafa_by_loops(z, w, p, eps_w=1e-6):
    """The double sum of the paper, number by number; p is a list."""
    layers, batch, width = z.shape
    mean = sum(p) / batch
    total = 0.0
    for layer in range(layers):
        for i in range(batch):
            distance = 0.0
            for k in range(width):
                distance += (z[layer, i, k].item() - w[layer, i, k].item()) ** 2
            total += p[i] / (mean + eps_w) * distance
    return total / (layers * batch)


def probabilities(logits):
    """The softmax of every row, as lists."""
    rows = []
    for row in logits.tolist():
        total = sum(math.exp(value) for value in row)
        rows.append([math.exp(value) / total for value in row])
    return rows


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q))


@pytest.mark.parametrize("eps_w", [0, 1e-6, 0.3])
def test_lafa_is_the_double_sum(outputs, eps_w):
    z, w, *_ = outputs
    loss = advmask.lafa(z, w, torch.tensor(P_TRUE, dtype=torch.float64), eps_w)
    assert loss.item() == pytest.approx(lafa_by_loops(z, w, P_TRUE, eps_w), rel=1e-12)


def test_lafas_weights_average_1(outputs):
    z, *_ = outputs
    p = torch.tensor(P_TRUE, dtype=torch.float64)
    unit = torch.zeros_like(z)
    unit[..., 0] = 1  # every distance is 1, so the loss is the mean weight
    assert advmask.lafa(z, z + unit, p, 0).item() == pytest.approx(1, abs=1e-12)
    assert advmask.lafa(z, z, p).item() == 0


def test_lafa_refuses_shapes_that_do_not_fit(outputs):
    z, w, *_ = outputs
    p = torch.tensor(P_TRUE)
    for arguments in ((z, w[:2], p), (z[:, :4], w, p), (z, w, p[:4]), (z[0], w[0], p)):
        with pytest.raises(ValueError, match="layers, b, d"):
            advmask.lafa(*arguments)


def test_lafas_weight_is_the_clean_probability_of_the_label_and_is_constant(outputs):
    z, w, a, b, y = outputs
    a.requires_grad_()
    w.requires_grad_()
    loss = advmask.consistency("lafa", z, w, a, b, y)
    p_true = [row[label] for row, label in zip(probabilities(a), y)]
    assert loss.item() == pytest.approx(lafa_by_loops(z, w, p_true), rel=1e-12)
    loss.backward()
    assert a.grad is None
    assert w.grad.abs().sum() > 0


def test_align_is_lafa_with_equal_probabilities(outputs):
    z, w, a, b, y = outputs
    loss = advmask.consistency("align", z, w, a, b, y)
    assert loss.item() == pytest.approx(lafa_by_loops(z, w, [0.3] * 5, 0), rel=1e-12)


def test_kl_is_the_divergence_of_the_attacked_from_the_clean_output(outputs):
    z, w, a, b, y = outputs
    expected = sum(kl(p, q) for p, q in zip(probabilities(a), probabilities(b))) / 5
    assert advmask.consistency("kl", z, w, a, b, y).item() == pytest.approx(expected, rel=1e-9)


def test_js_is_the_mean_divergence_from_the_middle(outputs):
    z, w, a, b, y = outputs
    expected = 0.0
    for p, q in zip(probabilities(a), probabilities(b)):
        middle = [(u + v) / 2 for u, v in zip(p, q)]
        expected += (kl(p, middle) + kl(q, middle)) / 2 / 5
    assert advmask.consistency("js", z, w, a, b, y).item() == pytest.approx(expected, rel=1e-9)
    assert advmask.consistency("js", z, w, b, a, y).item() == pytest.approx(expected, rel=1e-9)


def test_js_is_at_most_log_2(outputs):
    z, w, *_, y = outputs
    far = 200 * torch.eye(6, dtype=torch.float64)
    js = advmask.consistency("js", z, w, far[:5], far[1:], y).item()
    assert js == pytest.approx(math.log(2), abs=1e-9)
    assert js <= math.log(2) + 1e-12


def test_ce_adds_nothing(outputs):
    assert advmask.consistency("ce", *outputs).item() == 0


def test_an_unknown_loss_is_refused(outputs):
    with pytest.raises(ValueError, match="mse"):
        advmask.consistency("mse", *outputs)


# ------------------------------------------------------------------------------------------------
# The pieces, copied out of the file
# ------------------------------------------------------------------------------------------------


def test_mask_attach_and_merge_can_be_copied():
    copy = copied(advmask, "BinaryMask", "attach", "merge")
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    x, theta = torch.randn(6, 5), net[0].weight.detach().clone()
    masks = copy.attach(net, ["0.weight"], init=0.5, alpha=0.25)
    mask = masks["0.weight"]
    mask.M.data[1] = 0
    theta[1] = 0
    expected = net[2](torch.tanh(F.linear(x, theta, net[0].bias)))
    torch.testing.assert_close(net(x), expected)

    # the masked weight is frozen, and nothing else is
    net(x).square().sum().backward()
    assert net[0].parametrizations.weight.original.grad is None and mask.M.grad.any()
    assert net[0].bias.grad.any() and net[2].weight.grad.any()

    copy.merge(net, masks)
    assert torch.equal(net[0].weight, theta) and not net[0].weight.requires_grad
    assert sorted(net.state_dict()) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    with pytest.raises(ValueError, match="above alpha"):
        copy.attach(net, ["2.weight"], init=0, alpha=0)
    with pytest.raises(AttributeError):
        copy.attach(net, ["1.weight"])


def test_features_can_be_copied():
    copy, net = copied(advmask, "features"), Toy()
    x, _ = toy_batches(1)[0]
    z, logits = copy.features(net, x)
    expected = []
    for tokens in net.outputs(x):
        cls = tokens[:, 0]
        expected.append(cls / cls.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(z, torch.stack(expected).float())
    torch.testing.assert_close(logits, net(x))


def test_lafa_can_be_copied(outputs):
    z, w, *_ = outputs
    copy = copied(advmask, "lafa")
    p = torch.tensor(P_TRUE, dtype=torch.float64, requires_grad=True)
    loss = copy.lafa(z, w.requires_grad_(), p)
    assert loss.item() == pytest.approx(lafa_by_loops(z, w, P_TRUE), rel=1e-12)
    loss.backward()
    assert p.grad is None and w.grad.any(), "p_true is a constant"
    with pytest.raises(ValueError, match="layers, b, d"):
        copy.lafa(z, w, p[:4])


# ------------------------------------------------------------------------------------------------
# The loop
# ------------------------------------------------------------------------------------------------


def snapshot(masks):
    return {name: mask.M.detach().clone() for name, mask in masks.items()}


def second_term(kind, z, w, clean, adv, y):
    """lafa, kl or ce again; z, w: per block, what it makes of clean and attacked images."""
    if kind == "ce":
        return 0.0
    if kind == "kl":
        p = clean.softmax(1)
        return (p * (p.log() - adv.softmax(1).log())).sum(1).mean()
    p_true = clean.softmax(1).gather(1, y[:, None])[:, 0]
    weight = p_true / (p_true.mean() + 1e-6)
    total = 0.0
    for z_l, w_l in zip(z, w):
        total = total + (weight * (z_l - w_l).norm(dim=1) ** 2).mean()
    return total / len(z)


def train_again(net, batches, steps, eps, loss, lam, budget):
    """The training on a Toy without masks, whose weights are written anew in every step.

    -> [{name: M} before every step, and at the end].
    """
    weights = {name: net.get_parameter(name) for name in TOY_WEIGHTS}
    theta = {name: weight.clone() for name, weight in weights.items()}
    M = {name: torch.full_like(weight, INIT) for name, weight in weights.items()}
    v = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    decay = [(1 + math.cos(math.pi * t / steps)) / 2 for t in range(steps)]
    history = [dict(M)]
    for t, (x, y) in enumerate(batches):
        for name, weight in weights.items():
            weight.requires_grad_(False).copy_(theta[name] * (M[name] > ALPHA)).requires_grad_()
        x_adv = attacked(net, x, y, eps)
        z, w = [], []
        for clean, adv in zip(net.outputs(x), net.outputs(x_adv)):
            z.append((clean[:, 0] / clean[:, 0].norm(dim=1, keepdim=True)).detach())
            w.append(adv[:, 0] / adv[:, 0].norm(dim=1, keepdim=True))
        logits, clean_logits = net(x_adv), net(x).detach()
        objective = F.cross_entropy(logits, y)
        objective = objective + lam * second_term(loss, z, w, clean_logits, logits, y)
        objective.backward()
        # dL/dM_bin = theta dL/dtheta'
        g = {}
        for name, weight in weights.items():
            g[name] = theta[name] * weight.grad
            weight.grad = None
        rms = torch.cat([gradient.flatten() for gradient in g.values()]).square().mean().sqrt()
        for name in weights:
            v[name] = 0.9 * v[name] + 0.1 * g[name] / rms
            mean = v[name] / (1 - 0.9 ** (t + 1))
            M[name] = M[name] - budget * (INIT - ALPHA) * decay[t] / sum(decay) * mean
        history.append(dict(M))
    return history


@pytest.mark.parametrize(
    "loss, lam, budget, eps",
    [("lafa", 100, 5, 0.1), ("lafa", 1000, 3, 0.02), ("kl", 20, 5, 0.1), ("ce", 2, 5, 0.1)],
)
def test_training_is_the_loop_written_again(monkeypatch, loss, lam, budget, eps):
    # features are in single precision: not here, so that the two agree to many digits
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    net, plain, batches = Toy(), Toy(), toy_batches(8)
    masks = advmask.attach(net, TOY_WEIGHTS)
    history = []

    def watched():
        for batch in batches:
            history.append(snapshot(masks))
            yield batch

    state = torch.get_rng_state()
    advmask.train(net, masks, watched(), 8, eps, loss, lam, budget)
    history.append(snapshot(masks))
    torch.set_rng_state(state)
    expected = train_again(plain, batches, 8, eps, loss, lam, budget)

    assert 0 < advmask.share_off(masks) < 1, "the masks must have an effect in this test"
    for found, wanted in zip(history, expected, strict=True):
        for name in TOY_WEIGHTS:
            # the rates of the loop are in single precision, those of the loop again are not
            torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-8)


@pytest.mark.parametrize("loss, lam", [("lafa", 2), ("lafa", 2000), ("ce", 0)])
def test_the_first_step_moves_by_its_rate_whatever_the_size_of_the_loss(loss, lam):
    net = Toy()
    masks = advmask.attach(net, TOY_WEIGHTS)
    advmask.train(net, masks, toy_batches(1), 1, 0.1, loss, lam, budget=1.5)
    moved = torch.cat([(M - INIT).flatten() for M in snapshot(masks).values()])
    # all of the budget is spent in one step: gamma_0 = 1.5 (init - alpha), times g / rms(g)
    assert moved.square().mean().sqrt().item() == pytest.approx(1.5 * (INIT - ALPHA))


def test_the_budget_is_in_units_of_the_way_to_the_threshold():
    moved = []
    for init, alpha in ((1e-2, 5e-3), (3.0, 1.0)):
        torch.manual_seed(0)
        net = Toy()
        masks = advmask.attach(net, TOY_WEIGHTS, init, alpha)
        advmask.train(net, masks, toy_batches(3), 3, 0.1, lam=2, budget=9)
        moved.append([(init - M) / (init - alpha) for M in snapshot(masks).values()])
    torch.testing.assert_close(moved[0], moved[1])


def test_training_moves_the_masks_and_nothing_else(classifier, images):
    clip = classifier.clip
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    masks = advmask.attach(clip, advmask.vision_weights(clip))
    advmask.train(classifier, masks, [images, images], 2, 0.01)
    assert all((mask.M != INIT).any() for mask in masks.values())
    assert all(p.grad is None for p in clip.parameters())
    after = {}
    for name, value in clip.state_dict().items():
        if not name.endswith(".0.M"):
            after[name.replace("parametrizations.", "").removesuffix(".original")] = value
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


# ------------------------------------------------------------------------------------------------
# The adapter and the merge
# ------------------------------------------------------------------------------------------------

SHAPES = [(1,), (3, 5), (16,), (7, 9), (8, 2)]


@pytest.mark.parametrize("init, alpha", [(1e-2, 5e-3), (0.5, 0.0), (0.0, -5e-3)])
def test_pack_and_unpack_are_inverse(init, alpha):
    masks, fresh = {}, {}
    for shape in SHAPES:
        masks[str(shape)] = advmask.BinaryMask(torch.ones(shape))
        fresh[str(shape)] = advmask.BinaryMask(torch.ones(shape), init, alpha)
    scatter(masks, 0.5)
    tensors = advmask.pack(masks)
    for shape in SHAPES:
        assert tensors[str(shape)].numel() == math.ceil(math.prod(shape) / 8)
    advmask.unpack(fresh, tensors)
    assert 0 < advmask.share_off(masks) == advmask.share_off(fresh) < 1
    for name in masks:
        kept = fresh[name].kept()
        assert torch.equal(masks[name].kept(), kept)
        assert (fresh[name].M[kept] == init).all() and (fresh[name].M[~kept] == alpha).all()


def test_a_packed_mask_takes_one_bit_per_entry(tiny):
    clip, _ = tiny
    masks = advmask.attach(clip, advmask.vision_weights(clip, "both"))
    tensors = advmask.pack(masks)
    entries = sum(mask.M.numel() for mask in masks.values())
    assert sum(bits.numel() * bits.element_size() for bits in tensors.values()) == entries / 8


def test_masks_of_other_weights_are_refused(tiny):
    clip, _ = tiny
    masks = advmask.attach(clip, advmask.vision_weights(clip, "attn"))
    tensors = advmask.pack(masks)
    first = next(iter(tensors))
    short = {**tensors, first: tensors[first][1:]}
    wide = {**tensors, first: tensors[first].float()}
    missing = {name: bits for name, bits in tensors.items() if name != first}
    more = {**tensors, "visual.proj": torch.zeros(1, dtype=torch.uint8)}
    for other in (short, wide, missing, more):
        with pytest.raises(ValueError, match="other names or sizes"):
            advmask.unpack(masks, other)
    assert advmask.share_off(masks) == 0, "nothing was written"


def test_an_adapter_that_does_not_fit_is_one_sentence(tiny):
    tensors = advmask.pack(advmask.attach(tiny[0], advmask.vision_weights(tiny[0], "attn")))
    for weights in ("mlp", "nonsense"):
        with pytest.raises(common.Fault, match="--model"):
            advmask.restore(common.load_clip("tiny")[0], tensors, {"weights": weights})


@pytest.mark.parametrize("weights", ["attn", "both"])
def test_merged_is_unmerged_is_exported(classifier, images, tmp_path, weights):
    clip, config = classifier.clip, classifier.config
    keys, x = sorted(clip.state_dict()), images[0]
    plain = classifier(x)
    masks = advmask.attach(clip, advmask.vision_weights(clip, weights))
    scatter(masks)
    unmerged = classifier(x).detach()
    advmask.merge(clip, masks)
    merged = classifier(x)
    assert (unmerged - plain).abs().max() > 1e-3
    torch.testing.assert_close(merged, unmerged, rtol=1e-5, atol=1e-5)

    # what is left is a CLIP like any other, frozen, with zeros where a mask was off
    assert sorted(clip.state_dict()) == keys
    assert not any(p.requires_grad for p in clip.parameters())
    for name, mask in masks.items():
        assert not clip.get_parameter(name)[~mask.kept()].any()
    common.export(clip, config, tmp_path / "x")
    again, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'x'}")
    assert sorted(again.state_dict()) == keys
    other = common.Classifier(again.eval(), config, classifier.classes, classifier.template)
    torch.testing.assert_close(other(x), merged, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------
# The program: what main makes of its arguments
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def run(program, monkeypatch, images, tmp_path):
    return quick(program, monkeypatch, advmask, scatter, images[0], tmp_path / "out")


SHORT = "--steps", 2, "--batch-size", 4


def test_the_loop_gets_what_the_arguments_say(run):
    options = "--eps", "5/255", "--loss", "kl", "--lam", 7, "--budget", 2.5, "--weights", "mlp"
    call = run(*SHORT, *options).call
    assert call["eps"] == pytest.approx(5 / 255)
    assert (call["loss"], call["lam"], call["budget"], call["steps"]) == ("kl", 7, 2.5, 2)
    assert list(call["masks"]) == advmask.vision_weights(call["classifier"].clip, "mlp")
    assert len(call["batches"]) == 2
    for x, y in call["batches"]:
        assert x.shape == (4, 3, 64, 64) and y.shape == (4,)
        assert 0 <= x.min() < 0.1 and 0.5 < x.max() <= 1


@pytest.mark.parametrize(
    "arguments, steps, budget",
    [
        (("--batch-size", 32), 100, 1.5),
        (("--batch-size", 5), 192, 1.92),
        (("--steps", 600), 600, 3),
    ],
)
def test_the_defaults_of_the_loop(run, monkeypatch, arguments, steps, budget):
    monkeypatch.setattr(common, "batches", lambda *_: iter(()))
    call = run(*arguments).call
    assert (call["loss"], call["lam"]) == ("lafa", 150)
    assert call["eps"] == common.TINY_EPS
    assert (call["steps"], call["budget"]) == (steps, pytest.approx(budget))


def test_the_model_is_measured_before_it_is_masked_and_after_it_is_merged(run, classifier, images):
    finished = run(*SHORT)
    before, after = finished.seen
    assert before.adapted == after.adapted == []
    with torch.no_grad():
        torch.testing.assert_close(before.logits, classifier(images[0]))
    assert (after.logits - before.logits).abs().max() > 1e-3


def test_before_and_after_are_told_apart(run):
    finished = run(*SHORT)
    assert (finished.result["before"]["clean"], finished.result["after"]["clean"]) == (21, 22)
    rows = [line.split()[0] for line in finished.out.splitlines() if "(  0.0 to 100.0)" in line]
    assert rows == ["zero-shot", "AdvMask"]
    zero_shot, adapted = [line for line in finished.out.splitlines() if "to 100.0)" in line]
    assert "21.00" in zero_shot and "11.00" in zero_shot
    assert "22.00" in adapted and "12.00" in adapted


def test_the_result_tells_how_many_entries_are_masked_and_the_share_that_is_off(run):
    finished = run(*SHORT)
    assert finished.result["masked"] == 6 * 4 * 192**2
    assert finished.result["off"] == advmask.share_off(finished.call["masks"])
    assert "884,736" in finished.out and "WARNING" not in finished.out


@pytest.mark.parametrize("weights", ["attn", "both"])
def test_load_gives_the_merged_model_of_a_run(run, images, weights):
    finished = run(*SHORT, "--weights", weights)
    net = advmask.load(finished.folder)
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    with torch.no_grad():
        assert torch.equal(net(images[0]), finished.seen[1].logits)


def test_a_loaded_run_is_measured_once(run):
    first = run(*SHORT)
    second = run(*SHORT, "--load", first.folder)
    assert second.call is None and second.result["before"] is None
    assert len(second.seen) == 1 and second.seen[0].adapted == []
    assert torch.equal(second.seen[0].logits, first.seen[1].logits)
    assert second.result["masked"] == first.result["masked"]
    assert second.result["off"] == first.result["off"] > 0
    assert "zero-shot" not in second.out
