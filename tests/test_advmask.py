"""advmask.py: the mask, the inner maximisation and the losses against closed forms and loops written again; the adapter and the merged model."""
import math

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import advmask
import common

MASKED_VIT_B_32 = 28_311_552


# ---------------------------------------------------------------------------------------------------------------------------- the mask
def scatter(masks, share=0.1):
    """Switch a random share of the entries off."""
    generator = torch.Generator().manual_seed(0)
    for mask in masks.values():
        mask.M.data[torch.rand(mask.M.shape, generator=generator) < share] = 0


def step(classifier, masks, x, y, eps=0.01, steps=2, loss="lafa", lr=1e-3):
    """One training step as main() takes it, on the masks."""
    optimizer = torch.optim.Adam([mask.M for mask in masks.values()], lr)
    with parametrize.cached():
        x_adv = advmask.pgd(classifier, x, y, eps, eps, steps)
        z_clean, logits_clean = advmask.features(classifier, x)
        z_adv, logits_adv = advmask.features(classifier, x_adv)
        ce = F.cross_entropy(logits_adv, y)
        (ce + advmask.consistency(loss, logits_clean.detach(), logits_adv, z_clean.detach(), z_adv, y, 1e-6)).backward()
    optimizer.step()


def test_a_mask_of_ones_is_the_identity():
    weight = torch.randn(7, 5)
    mask = advmask.BinaryMask(weight)
    assert torch.equal(mask(weight), weight) and mask.kept.all() and mask.M.shape == weight.shape


@pytest.mark.parametrize("layers", ["mhsa", "mlp", "both"])
def test_fresh_masks_leave_the_logits_alone(classifier, images, layers):
    with torch.no_grad():    # else torch takes other kernels once a weight wants a gradient, and the last bits differ
        before = classifier(images[0])
        advmask.attach(classifier.clip, layers)
        assert torch.equal(classifier(images[0]), before)


def test_entries_at_the_threshold_are_off():
    mask = advmask.BinaryMask(torch.ones(3), init=1e-2, threshold=5e-3)
    alpha = torch.tensor(5e-3)
    mask.M.data = torch.stack([alpha, torch.nextafter(alpha, torch.tensor(1.0)), torch.nextafter(alpha, torch.tensor(0.0))])
    assert mask(torch.full((3,), -2.0)).tolist() == [0, -2, 0] and mask.kept.tolist() == [False, True, False]


@pytest.mark.parametrize("init, threshold", [(5e-3, 5e-3), (0.0, 5e-3), (math.nan, 5e-3), (1e-2, math.nan)])
def test_a_mask_must_start_above_its_threshold(init, threshold):
    with pytest.raises(common.Fault, match="--threshold"):
        advmask.BinaryMask(torch.ones(2), init, threshold)


def test_straight_through_gradient_on_one_weight():
    theta, x = torch.randn(4, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    layer = nn.Linear(6, 4, bias=False, dtype=torch.float64).requires_grad_(False)
    layer.weight.copy_(theta)
    mask = advmask.BinaryMask(layer.weight)
    mask.M.data[torch.rand(4, 6) < 0.4] = 0
    parametrize.register_parametrization(layer, "weight", mask)
    layer(x).tanh().square().sum().backward()
    leaf = (theta * (mask.M.detach() > 5e-3)).requires_grad_()
    (x @ leaf.T).tanh().square().sum().backward()
    # dL/dM_bin = theta * dL/dtheta', and nothing is lost where M is off
    torch.testing.assert_close(mask.M.grad, theta * leaf.grad)
    assert (mask.M.grad[~mask.kept] != 0).all() and layer.parametrizations.weight.original.grad is None


def test_straight_through_gradient_in_the_small_clip(tiny, embedded, images):
    clip, config = tiny
    net = common.Classifier(clip, config, embedded.classes)
    masks = advmask.attach(clip, "both")
    scatter(masks)
    F.cross_entropy(net(images[0]), images[1]).backward()
    plain, _ = common.load_clip("tiny")
    leaves = {}
    for name, parameter in plain.named_parameters():
        if name in masks:
            leaves[name] = (parameter.clone(), parameter.requires_grad_())
            parameter.data.mul_(masks[name].kept)
    other = common.Classifier(plain, config, embedded.classes)
    F.cross_entropy(other(images[0]), images[1]).backward()
    assert set(leaves) == set(masks)
    for name, (theta, leaf) in leaves.items():
        torch.testing.assert_close(masks[name].M.grad, theta * leaf.grad, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("layers, entries", [("mhsa", 4), ("mlp", 8), ("both", 12)])
def test_the_named_weights_are_masked_and_no_bias(tiny, layers, entries):
    clip, _ = tiny
    masks = advmask.attach(clip, layers)
    blocks, width = len(clip.visual.transformer.resblocks), clip.visual.conv1.out_channels
    assert sum(m.M.numel() for m in masks.values()) == blocks * entries * width**2
    assert all(name.startswith("visual.") and "bias" not in name for name in masks)
    assert len({id(m) for m in masks.values()}) == len(masks) == blocks * {"mhsa": 2, "mlp": 2, "both": 4}[layers]
    trained = {name for name, p in clip.named_parameters() if p.requires_grad}
    assert {name for name, _ in clip.named_parameters() if name.endswith(".M")} == trained and len(trained) == len(masks)


def test_published_number_of_entries_in_vit_b_32():
    clip, config = common.load_clip("ViT-B-32-quickgelu", "none")
    vision, total = (sum(p.numel() for p in m.parameters()) for m in (clip.visual, clip))
    masked = sum(mask.M.numel() for mask in advmask.attach(clip).values())
    assert masked == MASKED_VIT_B_32 == 12 * 4 * 768**2
    assert (round(100 * masked / vision, 1), round(100 * masked / total, 1)) == (32.2, 18.7)
    assert config["model_cfg"]["quick_gelu"] is True


def test_training_moves_the_masks_and_nothing_else(classifier, images):
    clip = classifier.clip
    before = {k: v.clone() for k, v in clip.state_dict().items()}
    masks = advmask.attach(clip)
    start = {name: mask.M.detach().clone() for name, mask in masks.items()}
    for _ in range(2):
        step(classifier, masks, *images)
    assert {name for name, p in clip.named_parameters() if p.grad is not None} == {name for name, _ in clip.named_parameters() if name.endswith(".M")}
    assert all((mask.M != start[name]).any() for name, mask in masks.items())
    after = {k.replace("parametrizations.", "").removesuffix(".original"): v for k, v in clip.state_dict().items() if not k.endswith(".0.M")}
    assert set(after) == set(before) and all(torch.equal(after[k], before[k]) for k in before)


def test_the_program_computes_a_masked_weight_once_a_step(program, monkeypatch):
    calls, forward, batches = [0], advmask.BinaryMask.forward, common.batches
    at_batch, leaves = [], []

    def counted(self, theta):
        calls[0] += 1
        leaves.append(self.M)
        return forward(self, theta)

    def watched(*arguments):
        for batch in batches(*arguments):
            at_batch.append(calls[0])
            yield batch
        at_batch.append(calls[0])
    monkeypatch.setattr(advmask.BinaryMask, "forward", counted)
    monkeypatch.setattr(common, "batches", watched)
    assert program("advmask", "--steps", 2, "--batch-size", 4, "--test-steps", 1, "--test-limit", 4, "--train-attack-steps", 3).code == 0
    assert [b - a for a, b in zip(at_batch, at_batch[1:])] == [12, 12]    # 6 blocks, 2 weights; not once for each of 5 forward passes
    assert all(M.grad is not None and M.grad.any() for M in leaves)


# ------------------------------------------------------------------------------------------------------------------------------- attack
def test_pgd_reaches_the_closed_form_on_a_linear_classifier(linear):
    x_adv = advmask.pgd(linear.net, linear.x, linear.y, linear.eps, linear.eps / 2, steps=5)
    logits = linear.net(x_adv)
    torch.testing.assert_close(logits[range(40), linear.y] - logits[range(40), 1 - linear.y], linear.worst, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eps, size, steps", [(0.03, 0.03, 2), (0.05, 0.4, 3), (0.6, 0.2, 4)])
def test_pgd_stays_in_the_ball_and_among_pixels(linear, eps, size, steps):
    x = torch.cat([torch.zeros_like(linear.x[:3]), torch.ones_like(linear.x[:3]), linear.x[:3].round() * 0.998 + 0.001, linear.x[:3]])
    advmask.pgd(linear.net, x, torch.arange(12) % 2, eps, size, steps)
    x_adv = advmask.pgd(linear.net, x, torch.arange(12) % 2, eps, size, steps)
    for iterate in (*linear.net.inputs, x_adv):
        assert (iterate - x).abs().max() <= eps + 1e-6 and iterate.min() >= 0 and iterate.max() <= 1
    assert (x_adv - x).abs().max() > 0.99 * eps


def test_pgd_starts_uniformly_in_the_ball(linear):
    starts = [advmask.pgd(linear.net, linear.x, linear.y, 0.1, 0.1, steps=0) - linear.x for _ in range(2)]
    assert not torch.equal(*starts)
    # 1920 draws from U(-0.1, 0.1): extremes at the bounds, standard deviation 0.1 / sqrt(3)
    assert starts[0].min() < -0.099 and starts[0].max() > 0.099 and abs(starts[0].std().item() - 0.1 / math.sqrt(3)) < 0.003


def test_pgd_with_no_radius_is_the_identity(linear):
    assert torch.equal(advmask.pgd(linear.net, linear.x, linear.y, 0.0, 0.01, 3), linear.x)


def test_pgds_gradient_is_that_of_each_image_alone(linear, monkeypatch):
    grads, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: grads.append(grad(*a, **k)[0]) or (grads[-1],))
    advmask.pgd(linear.net, linear.x, linear.y, linear.eps, linear.eps, 2)
    assert len(grads) == 2
    for iterate, g in zip(linear.net.inputs, grads):    # d CE / d x = (softmax - onehot) W, with no 1 / batch
        p = (iterate.flatten(1) @ linear.net.W.T + linear.net.b).softmax(1) - torch.eye(2)[linear.y]
        torch.testing.assert_close(g.flatten(1), (p @ linear.net.W).detach(), rtol=1e-4, atol=1e-5)


def test_pgd_writes_no_gradient_and_wants_eval_mode(classifier, images):
    masks = advmask.attach(classifier.clip)
    x_adv = advmask.pgd(classifier, *images, 0.01, 0.01, 2)
    assert not x_adv.requires_grad and all(p.grad is None for p in classifier.parameters()) and all(m.M.requires_grad for m in masks.values())
    with pytest.raises(AssertionError, match="eval"):
        advmask.pgd(classifier.train(), *images, 0.01, 0.01, 1)


def test_pgd_goes_through_the_masked_network(linear):
    masked = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).eval().requires_grad_(False)
    masked[1].weight.copy_(linear.net.W.detach())
    mask = advmask.BinaryMask(masked[1].weight)
    mask.M.data[:, ::2] = 0
    parametrize.register_parametrization(masked[1], "weight", mask)
    x_adv = advmask.pgd(masked, linear.x, linear.y, linear.eps, linear.eps, 3).flatten(1) - linear.x.flatten(1)
    # pixels that only masked weights read have no gradient: delta keeps its start there, inside the ball, and sits on the bound elsewhere
    on_bound = x_adv.abs() > 0.999 * linear.eps
    assert on_bound[:, 1::2].all() and on_bound[:, ::2].float().mean() < 0.05


# ----------------------------------------------------------------------------------------------------------------------------- features
@pytest.mark.parametrize("kind", ["cls", "mean"])
@pytest.mark.parametrize("raw", [True, False])
def test_features_are_the_blocks_outputs(classifier, images, kind, raw):
    x, _ = images
    z, logits = advmask.features(classifier, x, kind, raw)
    visual, expected = common.load_clip("tiny")[0].visual, []    # as open_clip made it: (b, tokens, d)
    tokens = visual._embeds((x - classifier.mean) / classifier.std)
    for block in visual.transformer.resblocks:
        tokens = block(tokens)
        each = tokens[:, 0] if kind == "cls" else tokens.mean(1)
        expected.append(each if raw else each / each.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(z, torch.stack(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, classifier(x))
    assert z.shape[:2] == (len(visual.transformer.resblocks), len(x))


def test_cls_features_are_open_clips_intermediates(classifier, images):
    x = (images[0] - classifier.mean) / classifier.std
    theirs = classifier.clip.visual.forward_intermediates(x, output_fmt="NLC", output_extra_tokens=True)["image_intermediates_prefix"]
    z, _ = advmask.features(classifier, images[0], "cls", raw=True)
    torch.testing.assert_close(z, torch.stack([t[:, 0] for t in theirs]), rtol=1e-4, atol=1e-5)


def test_features_leave_no_hook(classifier, images, monkeypatch):
    def hooks():
        return sum(len(m._forward_hooks) for m in classifier.modules())
    advmask.features(classifier, images[0])
    assert hooks() == 0
    monkeypatch.setattr(classifier.clip.visual.transformer.resblocks[3].mlp, "forward", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        advmask.features(classifier, images[0])
    assert hooks() == 0


# ------------------------------------------------------------------------------------------------------------------------------- losses
@pytest.fixture
def outputs():
    """z_clean, z_adv (3, 5, 4), logits_clean, logits_adv (5, 6), y (5,)."""
    generator = torch.Generator().manual_seed(0)
    z, w = torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64)
    a, b = 2 * torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    return z, w, a, b, torch.tensor([0, 5, 2, 2, 4])


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def probabilities(logits):
    return [[math.exp(v) / sum(map(math.exp, row)) for v in row] for row in logits.tolist()]


def loop_lafa(z, w, p, eps_w):
    layers, batch, width = z.shape
    mean = sum(p[i].item() for i in range(batch)) / batch
    total = 0.0
    for layer in range(layers):
        for i in range(batch):
            distance = sum((z[layer, i, k].item() - w[layer, i, k].item())**2 for k in range(width))
            total += p[i].item() / (mean + eps_w) * distance
    return total / (layers * batch)


@pytest.mark.parametrize("eps_w", [0, 1e-6, 0.3])
def test_lafa_is_the_double_sum(outputs, eps_w):
    z, w, *_ = outputs
    p = torch.tensor([0.9, 0.1, 0.5, 0.01, 0.4], dtype=torch.float64)
    assert advmask.lafa(z, w, p, eps_w).item() == pytest.approx(loop_lafa(z, w, p, eps_w), rel=1e-12)


def test_lafas_weights_average_1(outputs):
    z, *_ = outputs
    unit = torch.zeros_like(z)
    unit[..., 0] = 1    # every distance is 1, so the loss is the mean weight
    p = torch.tensor([0.9, 0.1, 0.5, 0.01, 0.4], dtype=torch.float64)
    assert advmask.lafa(z, z + unit, p, 0).item() == pytest.approx(1, abs=1e-12)
    assert advmask.lafa(z, z, p).item() == 0


def test_lafas_weight_is_the_clean_probability_of_the_label_and_is_constant(outputs):
    z, w, a, b, y = outputs
    a, w = a.requires_grad_(), w.requires_grad_()
    loss = advmask.consistency("lafa", a, b, z, w, y, 1e-6)
    p = torch.tensor([row[label] for row, label in zip(probabilities(a), y)], dtype=torch.float64)
    assert loss.item() == pytest.approx(loop_lafa(z, w, p, 1e-6), rel=1e-12)
    loss.backward()
    assert a.grad is None and w.grad.abs().sum() > 0


def test_align_is_lafa_with_equal_probabilities(outputs):
    z, w, a, b, y = outputs
    expected = advmask.lafa(z, w, torch.full((5,), 0.3, dtype=torch.float64), 0)
    assert advmask.consistency("align", a, b, z, w, y, 1e-6).item() == pytest.approx(expected.item(), rel=1e-12)


def test_kl_and_js_are_the_sums_over_classes(outputs):
    z, w, a, b, y = outputs
    P, Q = probabilities(a), probabilities(b)
    mean_kl = sum(kl(p, q) for p, q in zip(P, Q)) / 5
    middle = [[(u + v) / 2 for u, v in zip(p, q)] for p, q in zip(P, Q)]
    mean_js = sum(kl(p, m) / 2 + kl(q, m) / 2 for p, q, m in zip(P, Q, middle)) / 5
    assert advmask.consistency("kl", a, b, z, w, y, 0).item() == pytest.approx(mean_kl, rel=1e-9)
    assert advmask.consistency("js", a, b, z, w, y, 0).item() == pytest.approx(mean_js, rel=1e-9)
    assert advmask.consistency("js", b, a, z, w, y, 0).item() == pytest.approx(mean_js, rel=1e-9)


def test_js_is_at_most_log_2(outputs):
    z, w, *_, y = outputs
    far = 200 * torch.eye(6, dtype=torch.float64)
    js = advmask.consistency("js", far[:5], far[1:], z, w, y, 0).item()
    assert js == pytest.approx(math.log(2), abs=1e-9) and js <= math.log(2) + 1e-12


def test_ce_adds_nothing(outputs):
    z, w, a, b, y = outputs
    assert advmask.consistency("ce", a, b, z, w, y, 0).item() == 0


# -------------------------------------------------------------------------------------------------------------- the adapter and the merge
SHAPES = [(1,), (3, 5), (16,), (7, 9), (8, 2)]


def random_masks(init=1e-2, threshold=5e-3):
    generator = torch.Generator().manual_seed(3)
    masks = {f"w{i}": advmask.BinaryMask(torch.ones(shape), init, threshold) for i, shape in enumerate(SHAPES)}
    for mask in masks.values():
        off = torch.rand(mask.M.shape, generator=generator) < 0.5
        mask.M.data[off] = threshold
    return masks


@pytest.mark.parametrize("init, threshold", [(1e-2, 5e-3), (0.5, 0.0), (0.0, -5e-3)])
def test_pack_and_unpack_are_inverse(init, threshold):
    masks = random_masks()
    tensors = advmask.pack(masks)
    assert [len(t) for t in tensors.values()] == [math.ceil(math.prod(s) / 8) for s in SHAPES]
    fresh = {name: advmask.BinaryMask(torch.ones(shape), init, threshold) for name, shape in zip(masks, SHAPES)}
    advmask.unpack(fresh, tensors)
    assert 0 < advmask.flipped(masks) == advmask.flipped(fresh) < 1
    for name in masks:
        assert torch.equal(masks[name].kept, fresh[name].kept)
        assert (fresh[name].M[fresh[name].kept] == init).all()


def test_flipped_is_the_share_that_is_off():
    masks = {"a": advmask.BinaryMask(torch.ones(6)), "b": advmask.BinaryMask(torch.ones(2, 2))}
    masks["a"].M.data[:3] = 0
    assert advmask.flipped(masks) == pytest.approx(0.3)


def test_an_adapter_takes_one_bit_per_entry(tiny, tmp_path):
    masks = advmask.attach(tiny[0])
    common.save_adapter(tmp_path / "a.safetensors", advmask.pack(masks), {"method": "advmask"})
    bits = sum(m.M.numel() for m in masks.values())
    assert bits / 8 <= (tmp_path / "a.safetensors").stat().st_size <= bits / 8 + 200 * len(masks)


def test_an_adapter_of_other_layers_is_refused(tiny):
    masks = advmask.attach(tiny[0], "mhsa")
    tensors = advmask.pack(masks)
    other = advmask.attach(common.load_clip("tiny")[0], "mlp")
    with pytest.raises(common.Fault, match="--layers"):
        advmask.unpack(other, tensors)
    with pytest.raises(common.Fault, match="--layers"):
        advmask.unpack(masks, {**tensors, next(iter(tensors)): torch.zeros(3, dtype=torch.uint8)})


@pytest.mark.parametrize("layers", ["mhsa", "both"])
def test_merged_is_unmerged_is_exported(tiny, embedded, images, tmp_path, layers):
    clip, config = tiny
    keys = list(clip.state_dict())
    net = common.Classifier(clip, config, embedded.classes, embedded.template)
    plain = net(images[0]).detach()
    masks = advmask.attach(clip, layers)
    scatter(masks)
    kept = {name: mask.kept.clone() for name, mask in masks.items()}
    unmerged = net(images[0]).detach()
    advmask.merge(clip, masks)
    merged = net(images[0])
    assert (unmerged - plain).abs().max() > 1e-3
    torch.testing.assert_close(merged, unmerged, rtol=1e-5, atol=1e-5)
    assert sorted(clip.state_dict()) == sorted(keys) and not any(p.requires_grad for p in clip.parameters())
    assert not parametrize.is_parametrized(clip) and all((clip.state_dict()[name][~k] == 0).all() for name, k in kept.items())
    common.export(clip, config, tmp_path / "x")
    again, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'x'}")
    assert sorted(again.state_dict()) == sorted(keys)
    torch.testing.assert_close(common.Classifier(again.eval(), config, embedded.classes, embedded.template)(images[0]), merged, rtol=1e-5, atol=1e-5)
