"""advlora.py: clustering, alignment and the product of the factors against enumerations, numpy and loops written again; the adapter and the merge."""
import itertools
import math
import operator

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize

import advlora
import common

TRAINED_VIT_B_32 = 1_327_176
INITS = "cluster", "svd", "gaussian"
PLAIN = {"init": "gaussian", "align": False, "adaptive": False}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scatter(loras):
    """Move every factor away from its start."""
    for i, lora in enumerate(loras.values()):
        for p in (lora.A, lora.B, lora.alpha):
            p.data += 0.1 * (p.square().mean().sqrt() + 1e-3) * normal(*p.shape, seed=i)


def step(classifier, loras, x, y, eps=0.01):
    """One training step as main() takes it, on the factors."""
    optimizer = torch.optim.AdamW([p for lora in loras.values() for p in lora.parameters()], 1e-3, weight_decay=0)
    with parametrize.cached():
        F.cross_entropy(classifier(advlora.pgd(classifier, x, y, eps, eps, 2)), y).backward()
    optimizer.step()


# -------------------------------------------------------------------------------------------------------------------------- clustering
def cost(rows, labels):
    """Squared distances to the means of the clusters."""
    return sum(((rows[labels == j] - rows[labels == j].mean(0))**2).sum() for j in set(labels))


def clusters(labels):
    return {frozenset(np.flatnonzero(labels == j).tolist()) for j in set(labels)}


@pytest.mark.parametrize("k, sizes", [(2, (4, 3)), (3, (3, 2, 2))])
def test_kmeans_finds_the_best_of_all_partitions(k, sizes):
    middles = torch.tensor([[0., 0.], [10., 0.], [0., 10.]])[:k]
    rows = torch.cat([middle + 0.5 * normal(n, 2, seed=i) for i, (middle, n) in enumerate(zip(middles, sizes))])
    partitions = [np.array(p) for p in itertools.product(range(k), repeat=7) if len(set(p)) == k]
    best = min(partitions, key=lambda labels: cost(rows.numpy(), labels))
    for seed in range(10):
        centres, labels = advlora.kmeans(rows, k, seed)
        assert clusters(labels.numpy()) == clusters(best)
        assert (rows - centres[labels]).square().sum().item() == pytest.approx(cost(rows.numpy(), best), rel=1e-5)


def test_kmeans_starts_at_rows_far_apart():
    rows = torch.cat([normal(30, 1), torch.tensor([[-100.], [100.]])])
    for seed in range(10):    # k-means++: a second centre among the 30 has a probability of about 60 / 20,000
        assert clusters(advlora.kmeans(rows, 3, seed, iterations=1)[1].numpy()) == {frozenset(range(30)), frozenset({30}), frozenset({31})}


@pytest.mark.parametrize("n, d, k", [(20, 3, 4), (60, 5, 7), (192, 64, 8)])
def test_centres_are_means_and_labels_the_nearest_centres(n, d, k):
    rows = normal(n, d)
    centres, labels = advlora.kmeans(rows, k, seed=3)
    distance = (rows[:, None] - centres).norm(dim=-1)    # (n, k)
    assert centres.shape == (k, d) and (distance[range(n), labels] <= distance.min(1).values + 1e-4).all()
    for j in range(k):
        torch.testing.assert_close(centres[j], rows[labels == j].sum(0) / (labels == j).sum())


def test_kmeans_depends_on_the_seed_alone():
    rows, answers = normal(60, 5), []
    for seed in (1, 1, 2):
        torch.rand(1)
        state = torch.get_rng_state()
        answers.append(advlora.kmeans(rows, 7, seed))
        assert torch.equal(torch.get_rng_state(), state)
    first, same, other = answers
    assert torch.equal(first[0], same[0]) and torch.equal(first[1], same[1]) and not torch.equal(first[0], other[0])


@pytest.mark.parametrize("n", [1, 6, 40])
def test_as_many_centres_as_rows_are_the_rows(n):
    rows = normal(n, 4)
    centres, labels = advlora.kmeans(rows, n)
    assert torch.equal(centres[labels], rows) and sorted(labels.tolist()) == list(range(n))


@pytest.mark.parametrize("n, distinct, k", [(3, 1, 3), (5, 2, 4), (13, 1, 4), (33, 3, 12), (36, 1, 30)])
def test_fewer_distinct_rows_than_centres_leave_no_cluster_empty(n, distinct, k):
    rows = normal(distinct, 4)[torch.arange(n) % distinct]
    for seed in range(3):
        centres, labels = advlora.kmeans(rows, k, seed)
        assert centres.shape == (k, 4) and torch.isfinite(centres).all() and labels.unique().tolist() == list(range(k))
        torch.testing.assert_close(centres[labels], rows)


def test_an_empty_cluster_takes_the_farthest_row(monkeypatch):
    # the least likely row repeats a centre, so that the second cluster starts empty
    monkeypatch.setattr(torch, "multinomial", lambda p, *_, **__: p.argmin()[None])
    rows = torch.tensor([[0.], [1.], [2.], [50.]])
    for seed in range(6):
        taken, rest = sorted(clusters(advlora.kmeans(rows, 2, seed, iterations=1)[1].numpy()), key=len)
        assert len(rest) == 3 and taken <= {0, 3}
        assert clusters(advlora.kmeans(rows, 2, seed)[1].numpy()) == {frozenset({0, 1, 2}), frozenset({3})}


@pytest.mark.parametrize("k", [-1, 0, 6])
def test_no_centre_and_more_centres_than_rows_are_refused(k):
    with pytest.raises(common.Fault, match="--rank"):
        advlora.kmeans(normal(5, 2), k)


# --------------------------------------------------------------------------------------------------------------------------- the start
def least_squares(A, W):
    """numpy's argmin_B |B A - W|_F of least norm, in float64, and the residual |B A - W|_F / |W|_F."""
    A, W = A.detach().double().numpy(), W.double().numpy()
    B = np.linalg.lstsq(A.T, W.T, rcond=1e-6)[0].T
    return torch.from_numpy(B), np.linalg.norm(B @ A - W) / np.linalg.norm(W)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("shape, blocks, rank", [((60, 16), 3, 5), ((16, 40), 1, 4)])
def test_alignment_is_the_least_squares_fit(init, shape, blocks, rank):
    W = normal(*shape)
    lora = advlora.ClusterLoRA(W, rank, blocks, init)
    assert torch.equal(lora.A, lora.A_0) and torch.equal(lora.B, lora.B_0) and lora.B.shape == (blocks, shape[0] // blocks, rank)
    for i, w in enumerate(W.chunk(blocks)):
        B, residual = least_squares(lora.A_0[i], w)
        torch.testing.assert_close(lora.B_0[i].double(), B, rtol=1e-3, atol=1e-4)
        assert lora.residual[i].item() == pytest.approx(residual, rel=1e-5) and 0 < residual < 1


def test_alignment_of_repeated_centres_is_the_least_squares_fit_of_least_norm(monkeypatch):
    monkeypatch.setattr(advlora, "kmeans", lambda rows, k, seed: (rows[[0, 1, 0, 1, 2]], None))
    W = normal(20, 8)
    lora = advlora.ClusterLoRA(W, 5)
    B, residual = least_squares(lora.A_0[0], W)
    torch.testing.assert_close(lora.B_0[0].double(), B, rtol=1e-3, atol=1e-4)
    assert lora.residual.item() == pytest.approx(residual, rel=1e-5) and residual > 0.1


def test_a_weight_of_few_distinct_rows_is_fitted_exactly():
    W = normal(3, 16)[torch.arange(24) % 3]
    lora = advlora.ClusterLoRA(W, 5)
    torch.testing.assert_close(lora.B_0[0] @ lora.A_0[0], W, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_alignment_is_no_worse_than_the_memberships(rank):
    W = normal(60, 16)
    lora = advlora.ClusterLoRA(W, rank, blocks=3, seed=4)
    for i, w in enumerate(W.chunk(3)):
        centres, labels = advlora.kmeans(w, rank, seed=4)
        assert torch.equal(advlora.ClusterLoRA(W, rank, blocks=3, seed=4, balance=False).A_0[i], centres)
        torch.testing.assert_close(F.normalize(lora.A_0[i].flatten(), dim=0), F.normalize(centres.flatten(), dim=0))
        assert lora.residual[i] < (F.one_hot(labels).float() @ centres - w).norm() / w.norm()


@pytest.mark.parametrize("init", INITS)
def test_balanced_factors_have_equal_norms_and_the_same_product(init):
    W = normal(60, 16)
    lora, plain = (advlora.ClusterLoRA(W, 4, 3, init, balance=balance) for balance in (True, False))
    torch.testing.assert_close(lora.A_0.flatten(1).norm(dim=1), lora.B_0.flatten(1).norm(dim=1))
    torch.testing.assert_close(lora.B_0 @ lora.A_0, plain.B_0 @ plain.A_0)
    # SVD's factors have equal norms of themselves
    assert torch.allclose(lora.A_0, plain.A_0, rtol=1e-3) == (init == "svd")


def test_a_weight_of_zeros_starts_finite():
    assert torch.isfinite(advlora.ClusterLoRA(torch.zeros(12, 8), 3).A).all()


@pytest.mark.parametrize("rank", [1, 2, 5, 9, 12])
def test_svd_is_eckart_youngs_optimum_and_bounds_the_clusters(rank):
    W = normal(12, 30)
    S = np.linalg.svd(W.double().numpy(), compute_uv=False)
    optimum = math.sqrt((S[rank:]**2).sum() / (S**2).sum())
    svd, cluster = (advlora.ClusterLoRA(W, rank, init=init) for init in ("svd", "cluster"))
    assert svd.residual.item() == pytest.approx(optimum, abs=1e-5)
    assert cluster.residual.item() >= optimum - 1e-5
    # A_0 = S^1/2 V^T and B_0 = U S^1/2 share the singular values evenly
    for gram in (svd.A_0[0] @ svd.A_0[0].T, svd.B_0[0].T @ svd.B_0[0]):
        torch.testing.assert_close(gram, torch.from_numpy(np.diag(S[:rank])).float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("init, align, adaptive, scale", list(itertools.product(INITS, [True, False], [True, False], [1, 2.5])))
def test_w_is_w_0_at_the_start(init, align, adaptive, scale):
    for shape, blocks in (((30, 8), 3), ((12, 20), 1), ((192, 192), 1)):
        W = normal(*shape)
        assert torch.equal(advlora.ClusterLoRA(W, 5, blocks, init, align, adaptive, scale)(W), W)


def test_fresh_factors_leave_the_logits_alone(classifier, images):
    with torch.no_grad():    # else torch takes other kernels once a weight wants a gradient, and the last bits differ
        before = classifier(images[0])
        advlora.attach(classifier.clip, 4, "both", "both")
        assert torch.equal(classifier(images[0]), before) and torch.equal(classifier.encode_classes(), classifier.text)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("align", [True, False])
def test_gradients_at_the_start_are_those_of_the_product(init, align):
    W, G = normal(30, 8), normal(3, 10, 8, seed=1)
    lora = advlora.ClusterLoRA(W, 4, 3, init, align, scale=2)
    (lora(W) * G.flatten(0, 1)).sum().backward()
    A, B = lora.A.detach(), lora.B.detach()
    torch.testing.assert_close(lora.B.grad, 2 * G @ A.mT)
    torch.testing.assert_close(lora.A.grad, 2 * B.mT @ G)
    torch.testing.assert_close(lora.alpha.grad, (G * (B @ A)).sum((1, 2), keepdim=True))
    # without alignment B = 0, as in LoRA: only B has a gradient at first
    assert lora.B.grad.all() and lora.A.grad.any() == lora.alpha.grad.any() == align


def test_every_factor_of_the_small_clip_has_a_gradient_at_the_start(classifier, images):
    loras = advlora.attach(classifier.clip, 4, "both", "both")
    x, y = images
    x_adv = advlora.pgd(classifier, x, y, 0.01, 0.01, 2)
    classifier.text = classifier.encode_classes()
    F.cross_entropy(classifier(x_adv), y).backward()
    for lora in loras.values():
        for p in (lora.A, lora.B, lora.alpha):
            assert torch.isfinite(p.grad).all() and p.grad.flatten(1).any(1).all(), "of every block: q, k, v"


# ------------------------------------------------------------------------------------------------------------------------- the product
def test_forward_is_the_loop_over_the_blocks():
    W = normal(30, 8)
    lora = advlora.ClusterLoRA(W, 4, 3, scale=1.5)
    A_0, B_0 = lora.A.detach().double().numpy(), lora.B.detach().double().numpy()
    scatter({"": lora})
    A, B, a = (p.detach().double().numpy() for p in (lora.A, lora.B, lora.alpha))
    expected = W.double().numpy()
    for n, i, j in np.ndindex(3, 10, 8):
        expected[10 * n + i, j] += sum(a[n, 0, 0] * B[n, i, k] * A[n, k, j] - 1.5 * B_0[n, i, k] * A_0[n, k, j] for k in range(4))
    assert np.abs(expected - W.numpy()).max() > 0.05
    torch.testing.assert_close(lora(W).double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("key", ["A", "B", "alpha"])
def test_a_blocks_factors_change_its_rows_alone(tiny, key):
    clip, _ = tiny
    lora = advlora.attach(clip, 4)["visual.transformer.resblocks.2.attn.in_proj_weight"]
    attention = clip.visual.transformer.resblocks[2].attn
    before, d = attention.in_proj_weight.detach().clone(), 192
    getattr(lora, key).data[1] += 0.1
    changed = (attention.in_proj_weight != before).any(1)
    assert changed.tolist() == [False] * d + [True] * d + [False] * d


def test_plain_lora_is_w_0_plus_s_b_a():
    W = normal(96, 64)
    lora = advlora.ClusterLoRA(W, 8, blocks=3, scale=0.7, **PLAIN)
    bound = 1 / math.sqrt(64)    # Kaiming uniform with a = sqrt 5, as in LoRA
    assert not lora.B.any() and set(dict(lora.named_parameters())) == {"A", "B"} and lora.alpha.flatten().tolist() == pytest.approx([0.7] * 3)
    assert 0.99 * bound < lora.A.max() <= bound and -bound <= lora.A.min() < -0.99 * bound
    assert lora.A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    lora.B.data = normal(3, 32, 8)
    expected = torch.cat([w + 0.7 * (b @ a) for w, a, b in zip(W.chunk(3), lora.A, lora.B)])
    torch.testing.assert_close(lora(W), expected)


def test_a_is_constant_unless_adaptive():
    for adaptive in (True, False):
        lora = advlora.ClusterLoRA(normal(12, 8), 2, adaptive=adaptive)
        assert ("alpha" in dict(lora.named_parameters()), "alpha" in dict(lora.named_buffers())) == (adaptive, not adaptive)


def test_w_is_computed_in_float32_under_autocast():
    W = normal(30, 8)
    lora = advlora.ClusterLoRA(W, 4, 3)
    scatter({"": lora})
    expected = lora(W)
    with torch.autocast("cpu", torch.bfloat16):
        assert (W @ W.T).dtype == torch.bfloat16
        assert lora(W).dtype == torch.float32 and torch.equal(lora(W), expected)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("shape, rank", [((30, 8), 0), ((30, 8), -1), ((30, 8), 9), ((30, 64), 11)])
def test_a_rank_that_does_not_fit_a_block_is_refused(init, shape, rank):
    with pytest.raises(common.Fault, match="--rank"):
        advlora.ClusterLoRA(normal(*shape), rank, 3, init)


# ---------------------------------------------------------------------------------------------------------------------- the small CLIP
SIZES = {"attn": lambda r, d: 8 * r * d + 4, "mlp": lambda r, d: 10 * r * d + 2, "both": lambda r, d: 18 * r * d + 6}    # of a block of width d


@pytest.mark.parametrize("targets, towers", list(itertools.product(SIZES, ["vision", "both"])))
def test_the_named_weights_are_adapted_and_nothing_else(tiny, targets, towers):
    clip, _ = tiny
    names = {name for name, _ in clip.named_parameters()}
    loras = advlora.attach(clip, 3, targets, towers)
    parts = {"attn": ["attn.in_proj_weight", "attn.out_proj.weight"], "mlp": ["mlp.c_fc.weight", "mlp.c_proj.weight"]}
    weights = parts["attn"] + parts["mlp"] if targets == "both" else parts[targets]
    roots = {"visual.transformer": 6, "transformer": 4} if towers == "both" else {"visual.transformer": 6}
    expected = {f"{root}.resblocks.{i}.{weight}" for root, n in roots.items() for i in range(n) for weight in weights}
    assert set(loras) == expected <= names and len({id(lora) for lora in loras.values()}) == len(expected)
    trained = {name: p.numel() for name, p in clip.named_parameters() if p.requires_grad}
    assert {".".join(name.replace("parametrizations.", "").split(".")[:-2]) for name in trained} == expected
    assert {name.split(".")[-1] for name in trained} == {"A", "B", "alpha"} and len(trained) == 3 * len(expected)
    assert sum(trained.values()) == 6 * SIZES[targets](3, 192) + (4 * SIZES[targets](3, 128) if towers == "both" else 0)


def test_attach_hands_its_options_on(tiny):
    for lora in advlora.attach(tiny[0], 3, **PLAIN, scale=0.5).values():
        assert not lora.B.any() and (lora.alpha == 0.5).all() and set(dict(lora.named_parameters())) == {"A", "B"}


def test_number_of_trained_parameters_in_vit_b_32():
    clip, _ = common.load_clip("ViT-B-32-quickgelu", "none")
    for targets, expected in (("attn", 12 * (8 * 8 * 768 + 4)), ("both", TRAINED_VIT_B_32)):
        loras = advlora.attach(clip, 8, targets, init="gaussian", align=False)
        assert sum(p.numel() for lora in loras.values() for p in lora.parameters()) == expected == 12 * SIZES[targets](8, 768)
        advlora.merge(clip, loras)


def test_training_moves_the_factors_and_nothing_else(classifier, images):
    clip = classifier.clip
    before = {k: v.clone() for k, v in clip.state_dict().items()}
    loras = advlora.attach(clip, 4)
    start = {k: v.clone() for k, v in advlora.pack(loras).items()}
    for _ in range(3):
        step(classifier, loras, *images)
    factors = {f"{name}.{key}" for name in loras for key in ("A", "B", "alpha")}
    assert {k for k, v in advlora.pack(loras).items() if not torch.equal(v, start[k])} == factors
    stored = {k for k in clip.state_dict() if k.split(".")[-1] in advlora.STORED}
    after = {k.replace("parametrizations.", "").removesuffix(".original"): v for k, v in clip.state_dict().items() if k not in stored}
    assert set(after) == set(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert all((p.grad is not None) == p.requires_grad for p in clip.parameters())


def test_eval_and_train_change_no_weight(tiny):
    clip, _ = tiny
    loras = advlora.attach(clip, 4, "both")
    scatter(loras)

    def weights():    # W as the network reads it, and all that is stored
        adapted = [operator.attrgetter(name)(clip).detach() for name in loras]
        return [v.clone() for v in (*clip.state_dict().values(), *adapted)]
    before = weights()
    for mode in (True, False, True, False):
        assert all(torch.equal(a, b) for a, b in zip(before, weights(), strict=True))
        clip.train(mode)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(), strict=True))


def test_the_program_computes_a_weight_once_a_step(program, monkeypatch):
    calls, forward, batches = [0], advlora.ClusterLoRA.forward, common.batches
    at_batch, leaves = [], []

    def counted(self, W_0):
        calls[0] += 1
        leaves.extend([self.A, self.B, self.alpha])
        return forward(self, W_0)

    def watched(*arguments):
        for batch in batches(*arguments):
            at_batch.append(calls[0])
            yield batch
        at_batch.append(calls[0])
    monkeypatch.setattr(advlora.ClusterLoRA, "forward", counted)
    monkeypatch.setattr(common, "batches", watched)
    assert program("advlora", "--towers", "both", "--rank", 2, "--clean-weight", 1, "--steps", 2, "--batch-size", 4, "--test-steps", 1,
                   "--test-limit", 4, "--train-attack-steps", 3).code == 0
    assert [b - a for a, b in zip(at_batch, at_batch[1:])] == [40, 40]    # 6 and 4 blocks, 4 weights; not once for each of 6 forward passes
    assert all(p.grad is not None and p.grad.any() for p in leaves)


# ------------------------------------------------------------------------------------------------------------------------------- attack
def test_pgd_reaches_the_closed_form_on_a_linear_classifier(linear):
    x_adv = advlora.pgd(linear.net, linear.x, linear.y, linear.eps, linear.eps / 2, steps=5)
    logits = linear.net(x_adv)
    torch.testing.assert_close(logits[range(40), linear.y] - logits[range(40), 1 - linear.y], linear.worst, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eps, size, steps", [(0.05, 0.4, 3), (0.6, 0.2, 4)])
def test_pgd_stays_in_the_ball_and_among_pixels(linear, eps, size, steps):
    x = torch.cat([torch.zeros_like(linear.x[:3]), torch.ones_like(linear.x[:3]), linear.x[:3]])
    x_adv = advlora.pgd(linear.net, x, torch.arange(9) % 2, eps, size, steps)
    for iterate in (*linear.net.inputs, x_adv):
        assert (iterate - x).abs().max() <= eps + 1e-6 and iterate.min() >= 0 and iterate.max() <= 1
    assert (x_adv - x).abs().max() > 0.99 * eps


def test_pgd_writes_no_gradient_and_wants_eval_mode(classifier, images):
    loras = advlora.attach(classifier.clip, 2)
    x_adv = advlora.pgd(classifier, *images, 0.01, 0.01, 2)
    assert not x_adv.requires_grad and all(p.grad is None for p in classifier.parameters()) and all(lora.A.requires_grad for lora in loras.values())
    with pytest.raises(AssertionError, match="eval"):
        advlora.pgd(classifier.train(), *images, 0.01, 0.01, 1)


# -------------------------------------------------------------------------------------------------------------- the adapter and the merge
def test_pack_and_unpack_are_inverse(classifier, images, tmp_path):
    loras = advlora.attach(classifier.clip, 3, "both", init="svd")
    scatter(loras)
    common.save_adapter(tmp_path / "a.safetensors", advlora.pack(loras), {"method": "advlora"})
    tensors = common.safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert {v.dtype for v in tensors.values()} == {torch.float32} and len(tensors) == 6 * len(loras)
    other = common.load_clip("tiny")[0]
    fresh = advlora.attach(other, 3, "both", **PLAIN)    # as main() does: the file brings its own start
    advlora.unpack(advlora.pack(fresh), tensors)
    for name in loras:
        for key in ("A", "B", "alpha", "A_0", "B_0", "alpha_0"):
            assert torch.equal(getattr(fresh[name], key), getattr(loras[name], key))
    expected = classifier(images[0])
    classifier.clip = other
    torch.testing.assert_close(classifier(images[0]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank, targets, towers", [(4, "attn", "vision"), (3, "mlp", "vision"), (3, "attn", "vision"), (3, "both", "both")])
def test_an_adapter_of_other_weights_is_refused(tiny, rank, targets, towers):
    tensors = advlora.pack(advlora.attach(tiny[0], 3))
    other = advlora.pack(advlora.attach(common.load_clip("tiny")[0], rank, targets, towers, **PLAIN))
    start = {k: v.clone() for k, v in other.items()}
    with pytest.raises(common.Fault, match="rank, targets and towers"):
        advlora.unpack(other, tensors)
    assert all(torch.equal(v, start[k]) for k, v in other.items())


def test_an_adapter_of_another_type_is_refused(tiny):
    state = advlora.pack(advlora.attach(tiny[0], 3))
    with pytest.raises(common.Fault):
        advlora.unpack(state, {k: v.half() for k, v in state.items()})


@pytest.mark.parametrize("targets, towers", [("attn", "vision"), ("both", "both")])
def test_merged_is_unmerged_is_exported(tiny, embedded, images, tmp_path, targets, towers):
    clip, config = tiny
    start = {k: v.clone() for k, v in clip.state_dict().items()}
    net = common.Classifier(clip, config, embedded.classes, embedded.template)
    plain, plain_text = net(images[0]).detach(), net.text
    loras = advlora.attach(clip, 4, targets, towers)
    scatter(loras)
    text = net.text = net.encode_classes().detach()
    unmerged = net(images[0]).detach()
    advlora.merge(clip, loras)
    merged = net(images[0])
    assert (unmerged - plain).abs().max() > 1e-3
    torch.testing.assert_close(merged, unmerged, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(net.encode_classes(), text, rtol=1e-5, atol=1e-5)
    assert ((text - plain_text).abs().max() > 1e-3) == (towers == "both")
    assert not parametrize.is_parametrized(clip) and not any(p.requires_grad for p in clip.parameters())
    assert {k for k, v in clip.state_dict().items() if not torch.equal(v, start[k])} == set(loras) and sorted(clip.state_dict()) == sorted(start)
    assert not any(p.requires_grad for p in advlora.merge(clip.requires_grad_(), {}).parameters()), "after --full as well"
    common.export(clip, config, tmp_path / "x")
    again, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'x'}")
    assert sorted(again.state_dict()) == sorted(start)
    torch.testing.assert_close(common.Classifier(again.eval(), config, embedded.classes, embedded.template)(images[0]), merged, rtol=1e-5, atol=1e-5)
