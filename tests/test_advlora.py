"""advlora.py: clustering, alignment, the product of the factors and the loop against enumerations,
numpy and loops written again; the pieces away from their file; what `main` hands to them; the
adapter and the merge."""

import itertools
import math
import operator

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from test_advmask import (
    attacked,
    copied,
    quick,
    toy_batches,
)
from torch import nn

import advlora
import common

INITS = "cluster", "svd", "kaiming"
PLAIN = {"init": "kaiming", "align": False, "adaptive": False}  # LoRA
FACTORS = "A", "B", "a"


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scatter(loras):
    """Move every factor away from its start."""
    for i, lora in enumerate(loras.values()):
        for p in (lora.A, lora.B, lora.a):
            p.data += 0.1 * (p.square().mean().sqrt() + 1e-3) * normal(*p.shape, seed=i)


def attach(clip, rank=4, weights="both", towers="vision", **options):
    """advlora.attach on a CLIP; LoRA's noise as the start, which takes no time, unless told."""
    options = {"init": "kaiming", **options}
    return advlora.attach(clip, advlora.clip_weights(clip, weights, towers), rank, **options)


class Toy(nn.Module):
    """Pixels (b, 3, 2, 2) -> 4 logits, in double precision; always with the same random weights.

    A fused weight with three blocks, as in attention, and class features by a layer of their own.
    """

    def __init__(self):
        super().__init__()
        self.image = nn.Module()
        self.image.in_proj_weight = nn.Parameter(torch.empty(18, 12))
        self.words = nn.Linear(5, 6)
        self.prompts = nn.Parameter(torch.empty(4, 5))
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        self.eval().requires_grad_(False)
        self.text = self.encode_classes()

    def encode_classes(self):
        return F.normalize(self.words(self.prompts).tanh(), dim=-1)  # (4, 6)

    def forward(self, x):
        q, k, v = (x.flatten(1) @ self.image.in_proj_weight.T).chunk(3, 1)
        return 5 * F.normalize(q.sigmoid() * k.tanh() + v, dim=-1) @ self.text.T


# ------------------------------------------------------------------------------------------------
# Clustering
# ------------------------------------------------------------------------------------------------


def cost(rows, labels):
    """Squared distances to the means of the clusters."""
    total = 0.0
    for j in set(labels):
        mine = rows[labels == j]
        total += ((mine - mine.mean(0)) ** 2).sum()
    return total


def clusters(labels):
    """Labels (n,) -> the set of the sets of rows that share one."""
    labels = np.asarray(labels)
    return {frozenset(np.flatnonzero(labels == j).tolist()) for j in set(labels.tolist())}


@pytest.mark.parametrize("k, sizes", [(2, (4, 3)), (3, (3, 2, 2))])
def test_kmeans_finds_the_best_of_all_partitions(k, sizes):
    middles = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    parts = []
    for i, n in enumerate(sizes):
        parts.append(middles[i] + 0.5 * normal(n, 2, seed=i))
    rows = torch.cat(parts)
    partitions = [np.array(p) for p in itertools.product(range(k), repeat=7) if len(set(p)) == k]
    best = min(partitions, key=lambda labels: cost(rows.numpy(), labels))
    for seed in range(10):
        centres, labels = advlora.kmeans(rows, k, seed)
        assert clusters(labels) == clusters(best)
        found = (rows - centres[labels]).square().sum().item()
        assert found == pytest.approx(cost(rows.numpy(), best), rel=1e-5)


def test_kmeans_starts_at_rows_far_apart():
    rows = torch.cat([normal(30, 1), torch.tensor([[-100.0], [100.0]])])
    apart = {frozenset(range(30)), frozenset({30}), frozenset({31})}
    for seed in range(10):
        # k-means++: a second centre among the 30 has a probability of about 60 / 20,000
        assert clusters(advlora.kmeans(rows, 3, seed, iterations=1)[1]) == apart


@pytest.mark.parametrize("n, d, k", [(20, 3, 4), (60, 5, 7), (192, 64, 8)])
def test_centres_are_means_and_labels_the_nearest_centres(n, d, k):
    rows = normal(n, d)
    centres, labels = advlora.kmeans(rows, k, seed=3)
    distance = (rows[:, None] - centres).norm(dim=-1)  # (n, k)
    assert centres.shape == (k, d)
    assert (distance[range(n), labels] <= distance.min(1).values + 1e-4).all()
    for j in range(k):
        torch.testing.assert_close(centres[j], rows[labels == j].sum(0) / (labels == j).sum())


def test_kmeans_depends_on_the_seed_alone():
    rows = normal(60, 5)
    answers = []
    for seed in (1, 1, 2):
        torch.rand(1)
        state = torch.get_rng_state()
        answers.append(advlora.kmeans(rows, 7, seed))
        assert torch.equal(torch.get_rng_state(), state)
    first, same, other = answers
    assert torch.equal(first[0], same[0]) and torch.equal(first[1], same[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("n", [1, 6, 40])
def test_as_many_centres_as_rows_are_the_rows(n):
    rows = normal(n, 4)
    centres, labels = advlora.kmeans(rows, n)
    assert torch.equal(centres[labels], rows)
    assert sorted(labels.tolist()) == list(range(n))


@pytest.mark.parametrize(
    "n, distinct, k", [(3, 1, 3), (5, 2, 4), (13, 1, 4), (33, 3, 12), (36, 1, 30)]
)
def test_fewer_distinct_rows_than_centres_leave_no_cluster_empty(n, distinct, k):
    rows = normal(distinct, 4)[torch.arange(n) % distinct]
    for seed in range(3):
        centres, labels = advlora.kmeans(rows, k, seed)
        assert centres.shape == (k, 4)
        assert labels.unique().tolist() == list(range(k))
        torch.testing.assert_close(centres[labels], rows)


def test_an_empty_cluster_takes_the_farthest_row(monkeypatch):
    # the least likely row repeats a centre, so that the second cluster starts empty
    monkeypatch.setattr(torch, "multinomial", lambda p, *_, **__: p.argmin()[None])
    rows = torch.tensor([[0.0], [1.0], [2.0], [50.0]])
    for seed in range(6):
        once = clusters(advlora.kmeans(rows, 2, seed, iterations=1)[1])
        taken, rest = sorted(once, key=len)
        assert len(rest) == 3 and taken <= {0, 3}
        at_last = clusters(advlora.kmeans(rows, 2, seed)[1])
        assert at_last == {frozenset({0, 1, 2}), frozenset({3})}


@pytest.mark.parametrize("k", [-1, 0, 6])
def test_no_centre_and_more_centres_than_rows_are_refused(k):
    with pytest.raises(ValueError, match=f"{k} clusters of 5 rows"):
        advlora.kmeans(normal(5, 2), k)


# ------------------------------------------------------------------------------------------------
# The start
# ------------------------------------------------------------------------------------------------


def least_squares(A, W):
    """numpy's argmin_B |B A - W|_F of least norm, in float64, and |B A - W|_F / |W|_F."""
    A, W = A.detach().double().numpy(), W.double().numpy()
    B = np.linalg.lstsq(A.T, W.T, rcond=1e-6)[0].T
    return torch.from_numpy(B), np.linalg.norm(B @ A - W) / np.linalg.norm(W)


def residual(lora, W, block=0):
    """|B_0 A_0 - W|_F / |W|_F of one block."""
    return ((lora.B_0[block] @ lora.A_0[block] - W).norm() / W.norm()).item()


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("shape, blocks, rank", [((60, 16), 3, 5), ((16, 40), 1, 4)])
def test_alignment_is_the_least_squares_fit(init, shape, blocks, rank):
    W = normal(*shape)
    lora = advlora.ClusterLoRA(W, rank, blocks, init)
    assert torch.equal(lora.A, lora.A_0) and torch.equal(lora.B, lora.B_0)
    assert lora.B.shape == (blocks, shape[0] // blocks, rank)
    for i, w in enumerate(W.chunk(blocks)):
        B, least = least_squares(lora.A_0[i], w)
        torch.testing.assert_close(lora.B_0[i].double(), B, rtol=1e-3, atol=1e-4)
        assert 0 < residual(lora, w, i) < 1
        assert residual(lora, w, i) == pytest.approx(least, rel=1e-5)


def test_alignment_of_repeated_centres_is_the_least_squares_fit_of_least_norm(monkeypatch):
    monkeypatch.setattr(advlora, "kmeans", lambda rows, k, seed: (rows[[0, 1, 0, 1, 2]], None))
    W = normal(20, 8)
    lora = advlora.ClusterLoRA(W, 5)
    B, least = least_squares(lora.A_0[0], W)
    torch.testing.assert_close(lora.B_0[0].double(), B, rtol=1e-3, atol=1e-4)
    assert residual(lora, W) == pytest.approx(least, rel=1e-5)
    assert least > 0.1


def test_a_weight_of_few_distinct_rows_is_fitted_exactly():
    W = normal(3, 16)[torch.arange(24) % 3]
    lora = advlora.ClusterLoRA(W, 5)
    torch.testing.assert_close(lora.B_0[0] @ lora.A_0[0], W, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_0_are_the_centres_and_alignment_is_no_worse_than_the_memberships(rank):
    W = normal(60, 16)
    lora = advlora.ClusterLoRA(W, rank, blocks=3, seed=4)
    unaligned = advlora.ClusterLoRA(W, rank, blocks=3, seed=4, align=False)
    for i, w in enumerate(W.chunk(3)):
        centres, labels = advlora.kmeans(w, rank, seed=4)
        assert torch.equal(unaligned.A_0[i], centres)
        # aligned, they are the centres up to one factor
        torch.testing.assert_close(lora.A_0[i] / lora.A_0[i].norm(), centres / centres.norm())
        members = F.one_hot(labels).float() @ centres
        assert residual(lora, w, i) < (members - w).norm() / w.norm()


@pytest.mark.parametrize("init", INITS)
def test_aligned_factors_have_equal_norms(init):
    lora = advlora.ClusterLoRA(normal(60, 16), 4, 3, init)
    torch.testing.assert_close(lora.A_0.flatten(1).norm(dim=1), lora.B_0.flatten(1).norm(dim=1))


def test_a_weight_of_zeros_starts_finite():
    lora = advlora.ClusterLoRA(torch.zeros(12, 8), 3)
    assert torch.isfinite(lora.A).all() and torch.isfinite(lora.B).all()


@pytest.mark.parametrize("rank", [1, 2, 5, 9, 12])
def test_svd_is_eckart_youngs_optimum_and_bounds_the_clusters(rank):
    W = normal(12, 30)
    S = np.linalg.svd(W.double().numpy(), compute_uv=False)
    optimum = math.sqrt((S[rank:] ** 2).sum() / (S**2).sum())
    svd = advlora.ClusterLoRA(W, rank, init="svd")
    cluster = advlora.ClusterLoRA(W, rank, init="cluster")
    assert residual(svd, W) == pytest.approx(optimum, abs=1e-5)
    assert residual(cluster, W) >= optimum - 1e-5
    # A_0 = S^1/2 V^T and B_0 = U S^1/2 share the singular values evenly
    for gram in (svd.A_0[0] @ svd.A_0[0].T, svd.B_0[0].T @ svd.B_0[0]):
        expected = torch.from_numpy(np.diag(S[:rank])).float()
        torch.testing.assert_close(gram, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("adaptive, scale", [(True, 1), (False, 2.5)])
def test_w_is_w_0_at_the_start(init, align, adaptive, scale):
    for shape, blocks in (((30, 8), 3), ((12, 20), 1), ((192, 192), 1)):
        W = normal(*shape)
        lora = advlora.ClusterLoRA(W, 5, blocks, init, align, adaptive, scale)
        assert torch.equal(lora(W), W)


def test_fresh_factors_leave_the_logits_alone(classifier, images):
    x, _ = images
    # without gradients: with them torch may take other kernels, and the last bits differ
    with torch.no_grad():
        before = classifier(x)
        attach(classifier.clip, 2, "both", "both", init="cluster")
        assert torch.equal(classifier(x), before)
        assert torch.equal(classifier.encode_classes(), classifier.text)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("align", [True, False])
def test_gradients_at_the_start_are_those_of_the_product(init, align):
    W, G = normal(30, 8), normal(3, 10, 8, seed=1)
    lora = advlora.ClusterLoRA(W, 4, 3, init, align, scale=2)
    (lora(W) * G.flatten(0, 1)).sum().backward()
    A, B = lora.A.detach(), lora.B.detach()
    torch.testing.assert_close(lora.B.grad, 2 * G @ A.mT)
    torch.testing.assert_close(lora.A.grad, 2 * B.mT @ G)
    torch.testing.assert_close(lora.a.grad, (G * (B @ A)).sum((1, 2), keepdim=True))
    # without alignment B = 0, as in LoRA: only B has a gradient at first
    assert lora.B.grad.all()
    assert lora.A.grad.any() == lora.a.grad.any() == align


def test_every_factor_of_the_small_clip_has_a_gradient_at_the_start(classifier, images):
    x, y = images
    loras = attach(classifier.clip, 2, "both", "both", init="svd")
    classifier.text = classifier.encode_classes()
    F.cross_entropy(classifier(x), y).backward()
    for lora in loras.values():
        for p in (lora.A, lora.B, lora.a):
            assert torch.isfinite(p.grad).all()
            assert p.grad.flatten(1).any(1).all(), "of every block: q, k, v"


def test_residuals_are_those_of_the_least_squares_fits():
    net = Toy()
    loras = advlora.attach(net, ["image.in_proj_weight", "words.weight"], 3, seed=2)
    found = advlora.residuals(loras, net)
    expected = {}
    for name, lora in loras.items():
        weight = Toy().get_parameter(name)
        expected[name] = []
        for i, w in enumerate(weight.chunk(len(lora.a))):
            expected[name].append(pytest.approx(least_squares(lora.A_0[i], w)[1], abs=1e-4))
    assert found == expected
    assert [len(shares) for shares in found.values()] == [3, 1]


# ------------------------------------------------------------------------------------------------
# The product
# ------------------------------------------------------------------------------------------------


def test_forward_is_the_loop_over_the_blocks():
    W = normal(30, 8)
    lora = advlora.ClusterLoRA(W, 4, 3, scale=1.5)
    A_0, B_0 = (p.detach().double().numpy().copy() for p in (lora.A, lora.B))
    scatter({"": lora})
    A, B, a = (p.detach().double().numpy() for p in (lora.A, lora.B, lora.a))
    expected = W.double().numpy().copy()
    for n, i, j in np.ndindex(3, 10, 8):
        for k in range(4):
            change = a[n, 0, 0] * B[n, i, k] * A[n, k, j] - 1.5 * B_0[n, i, k] * A_0[n, k, j]
            expected[10 * n + i, j] += change
    assert np.abs(expected - W.numpy()).max() > 0.05
    torch.testing.assert_close(lora(W).double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("key", FACTORS)
def test_a_blocks_factors_change_its_rows_alone(tiny, key):
    clip, _ = tiny
    attention = clip.visual.transformer.resblocks[2].attn
    before = attention.in_proj_weight.detach().clone()
    loras = attach(clip, 4, "attn", init="svd")
    lora = loras["visual.transformer.resblocks.2.attn.in_proj_weight"]
    getattr(lora, key).data[1] += 0.1
    changed = (attention.in_proj_weight != before).any(1)
    assert changed.tolist() == [False] * 192 + [True] * 192 + [False] * 192


def test_plain_lora_is_w_0_plus_s_b_a():
    W = normal(96, 64)
    lora = advlora.ClusterLoRA(W, 8, blocks=3, scale=0.7, **PLAIN)
    assert not lora.B.any()
    assert set(dict(lora.named_parameters())) == {"A", "B"}
    assert lora.a.flatten().tolist() == pytest.approx([0.7] * 3)
    # A is Kaiming uniform with a = sqrt 5, as in LoRA: between -1/sqrt(d_in) and 1/sqrt(d_in)
    bound = 1 / math.sqrt(64)
    assert 0.99 * bound < lora.A.max() <= bound
    assert -bound <= lora.A.min() < -0.99 * bound
    assert lora.A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    lora.B.data = normal(3, 32, 8)
    parts = []
    for w, A, B in zip(W.chunk(3), lora.A, lora.B):
        parts.append(w + 0.7 * (B @ A))
    torch.testing.assert_close(lora(W), torch.cat(parts))


def test_a_is_constant_unless_adaptive():
    for adaptive in (True, False):
        lora = advlora.ClusterLoRA(normal(12, 8), 2, adaptive=adaptive)
        assert ("a" in dict(lora.named_parameters())) == adaptive
        assert ("a" in dict(lora.named_buffers())) == (not adaptive)


def test_w_is_computed_in_float32_under_autocast():
    W = normal(30, 8)
    lora = advlora.ClusterLoRA(W, 4, 3)
    scatter({"": lora})
    expected = lora(W)
    with torch.autocast("cpu", torch.bfloat16):
        assert (W @ W.T).dtype == torch.bfloat16
        assert lora(W).dtype == torch.float32
        assert torch.equal(lora(W), expected)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("shape, rank", [((30, 8), 0), ((30, 8), -1), ((30, 8), 9), ((30, 64), 11)])
def test_a_rank_that_does_not_fit_a_block_is_refused(init, shape, rank):
    with pytest.raises(ValueError, match=f"rank {rank} does not fit"):
        advlora.ClusterLoRA(normal(*shape), rank, 3, init)


def test_an_unknown_start_is_refused():
    with pytest.raises(ValueError, match="gaussian"):
        advlora.ClusterLoRA(normal(12, 8), 2, init="gaussian")


# ------------------------------------------------------------------------------------------------
# The small CLIP, and ViT-B/32
# ------------------------------------------------------------------------------------------------


def size(weights, rank, width):
    """Trained numbers of a block."""
    attn = 8 * rank * width + 4  # q, k, v, out: each r (d + d) and a scale
    mlp = 10 * rank * width + 2  # c_fc, c_proj: each r (d + 4 d) and a scale
    return {"attn": attn, "mlp": mlp, "both": attn + mlp}[weights]


@pytest.mark.parametrize("weights", ["attn", "mlp", "both"])
@pytest.mark.parametrize("towers", ["vision", "both"])
def test_the_named_weights_are_adapted_and_nothing_else(tiny, weights, towers):
    clip, _ = tiny
    loras = attach(clip, 3, weights, towers)
    endings = []
    if weights in ("attn", "both"):
        endings += ["attn.in_proj_weight", "attn.out_proj.weight"]
    if weights in ("mlp", "both"):
        endings += ["mlp.c_fc.weight", "mlp.c_proj.weight"]
    blocks = [f"visual.transformer.resblocks.{i}" for i in range(6)]
    numbers = 6 * size(weights, 3, 192)
    if towers == "both":
        blocks += [f"transformer.resblocks.{i}" for i in range(4)]
        numbers += 4 * size(weights, 3, 128)
    assert set(loras) == {f"{block}.{ending}" for block in blocks for ending in endings}
    # their factors are all that can be trained, and every weight has its own
    factors = [p for lora in loras.values() for p in lora.parameters()]
    trained = [p for p in clip.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in factors}
    assert len(trained) == 3 * len(loras)
    assert sum(p.numel() for p in trained) == numbers


def test_every_matrix_has_a_seed_of_its_own(tiny):
    first, second, *_ = attach(tiny[0], 3, "attn", seed=5).values()
    assert not torch.equal(first.A[0], second.A[0])
    again = attach(common.load_clip("tiny")[0], 3, "attn", seed=5)
    assert torch.equal(list(again.values())[1].A, second.A)
    other = attach(common.load_clip("tiny")[0], 3, "attn", seed=50)
    assert not torch.equal(list(other.values())[1].A, second.A)


def test_number_of_trained_parameters_in_vit_b_32():
    with torch.device("meta"):
        clip = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32-quickgelu"))
    loras = attach(clip.to_empty(device="cpu"), 8, align=False)
    trained = sum(p.numel() for lora in loras.values() for p in lora.parameters())
    assert trained == 1_327_176 == 12 * size("both", 8, 768)
    assert f"{trained:,}" in advlora.__doc__


def test_eval_and_train_change_no_weight(tiny):
    clip, _ = tiny
    loras = attach(clip, 4)
    scatter(loras)

    def weights():  # all that is stored, and W as the network reads it
        adapted = [operator.attrgetter(name)(clip).detach() for name in loras]
        return [value.clone() for value in (*clip.state_dict().values(), *adapted)]

    before = weights()
    for training in (True, False):
        clip.train(training)
        for found, expected in zip(weights(), before, strict=True):
            assert torch.equal(found, expected)


# ------------------------------------------------------------------------------------------------
# The pieces, copied out of the file
# ------------------------------------------------------------------------------------------------


def test_kmeans_can_be_copied():
    copy = copied(advlora, "kmeans")
    rows = torch.tensor([[0.0, 0.0], [0.0, 1.0], [9.0, 9.0]])
    centres, labels = copy.kmeans(rows, 2)
    assert clusters(labels) == {frozenset({0, 1}), frozenset({2})}
    torch.testing.assert_close(centres[labels[0]], torch.tensor([0.0, 0.5]))
    with pytest.raises(ValueError, match="4 clusters of 3 rows"):
        copy.kmeans(rows, 4)


@pytest.mark.parametrize("init", INITS)
def test_lora_attach_and_merge_can_be_copied(init):
    copy = copied(advlora, "kmeans", "ClusterLoRA", "attach", "merge")
    net = nn.MultiheadAttention(8, 2, batch_first=True)
    net.in_proj_bias.data = normal(24)
    x = normal(3, 5, 8)
    before = net(x, x, x)[0]
    loras = copy.attach(net, ["in_proj_weight", "out_proj.weight"], 2, init=init)
    assert [len(lora.a) for lora in loras.values()] == [3, 1]
    torch.testing.assert_close(net(x, x, x)[0], before)

    # the adapted weights are frozen, and nothing else is
    net(x, x, x)[0].square().sum().backward()
    assert net.parametrizations.in_proj_weight.original.grad is None
    assert net.out_proj.parametrizations.weight.original.grad is None
    assert net.in_proj_bias.grad.any() and net.out_proj.bias.grad.any()
    assert all(lora.B.grad.any() for lora in loras.values())

    scatter(loras)
    changed = net(x, x, x)[0]
    copy.merge(net, loras)
    assert (changed - before).abs().max() > 1e-3
    torch.testing.assert_close(net(x, x, x)[0], changed)
    assert sorted(net.state_dict()) == sorted(nn.MultiheadAttention(8, 2).state_dict())
    for wrong in ({"rank": 9}, {"rank": 0}, {"rank": 2, "init": "gaussian"}):
        with pytest.raises(ValueError):
            copy.attach(net, ["in_proj_weight"], **wrong)
    with pytest.raises(AttributeError):
        copy.attach(net, ["q_weight"])


# ------------------------------------------------------------------------------------------------
# The loop
# ------------------------------------------------------------------------------------------------


def snapshot(loras):
    """The factors as they are: {name: (A, B, a)}."""
    return {
        name: [getattr(lora, f).detach().clone() for f in FACTORS] for name, lora in loras.items()
    }


def train_again(net, start, batches, steps, eps, lr, clean_weight):
    """The training on a Toy without factors, whose weights are written anew in every step.

    start: {name: (A, B, a)}. -> [{name: (A, B, a)} before every step, and at the end].
    """
    weights = {name: net.get_parameter(name) for name in start}
    W_0 = {name: weight.clone() for name, weight in weights.items()}
    now = dict(start)
    first, second = {}, {}  # AdamW's running means of the gradients and of their squares
    for name, factors in start.items():
        first[name] = [torch.zeros_like(p) for p in factors]
        second[name] = [torch.zeros_like(p) for p in factors]
    history = [dict(now)]
    for t, (x, y) in enumerate(batches):
        for name, weight in weights.items():
            (A_0, B_0, a_0), (A, B, a) = start[name], now[name]
            W = W_0[name] + (a * (B @ A) - a_0 * (B_0 @ A_0)).flatten(0, 1)
            weight.requires_grad_(False).copy_(W).requires_grad_()
        net.text = net.encode_classes().detach()
        x_adv = attacked(net, x, y, eps)
        net.text = net.encode_classes()
        objective = F.cross_entropy(net(x_adv), y) + clean_weight * F.cross_entropy(net(x), y)
        objective.backward()
        rate = lr * (1 + math.cos(math.pi * t / steps)) / 2
        for name, weight in weights.items():
            A, B, a = now[name]
            G = weight.grad.unflatten(0, (len(a), -1))
            weight.grad = None
            gradients = a * (B.mT @ G), a * (G @ A.mT), (G * (B @ A)).sum((1, 2), keepdim=True)
            moved = []
            for i, (p, g) in enumerate(zip(now[name], gradients)):
                first[name][i] = 0.9 * first[name][i] + 0.1 * g
                second[name][i] = 0.999 * second[name][i] + 0.001 * g**2
                mean = first[name][i] / (1 - 0.9 ** (t + 1))
                square = second[name][i] / (1 - 0.999 ** (t + 1))
                moved.append(p - rate * mean / (square.sqrt() + 1e-8))
            now[name] = moved
        history.append(dict(now))
    return history


@pytest.mark.parametrize(
    "clean_weight, text, eps, lr",
    [(0, False, 0.1, 0.02), (0.7, False, 0.02, 0.02), (0, True, 0.1, 0.05), (0.7, True, 0.1, 0.01)],
)
def test_training_is_the_loop_written_again(clean_weight, text, eps, lr):
    net, plain, batches = Toy(), Toy(), toy_batches(8)
    names = ["image.in_proj_weight"]
    if text:
        names.append("words.weight")
    loras = advlora.attach(net, names, 2, init="svd")
    for lora in loras.values():
        lora.double()
    history = []

    def watched():
        for batch in batches:
            history.append(snapshot(loras))
            yield batch

    state = torch.get_rng_state()
    advlora.train(net, loras, watched(), 8, eps, lr, clean_weight, text)
    history.append(snapshot(loras))
    torch.set_rng_state(state)
    expected = train_again(plain, history[0], batches, 8, eps, lr, clean_weight)

    for found, wanted in zip(history, expected, strict=True):
        for name in names:
            # the rate of the loop is in single precision, which that of the loop again is not
            torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-7)
    # text features of the factors as they are in the end, and no graph behind them
    assert not net.text.requires_grad or not text
    assert torch.equal(net.text, net.encode_classes())


def test_training_moves_the_factors_and_nothing_else(classifier, images):
    clip = classifier.clip
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    loras = attach(clip, 4, "attn", init="svd")
    start = {name: value.clone() for name, value in advlora.pack(loras).items()}
    advlora.train(classifier, loras, [images] * 2, 2, 0.01)
    for name, value in advlora.pack(loras).items():
        moves = name.rpartition(".")[2] in FACTORS
        assert torch.equal(value, start[name]) != moves, name
    after = {}
    for name, value in clip.state_dict().items():
        if name.rpartition(".")[2] not in ("A", "B", "a", "A_0", "B_0", "a_0"):
            after[name.replace("parametrizations.", "").removesuffix(".original")] = value
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all((p.grad is not None) == p.requires_grad for p in clip.parameters())


# ------------------------------------------------------------------------------------------------
# The adapter and the merge
# ------------------------------------------------------------------------------------------------


def test_pack_and_unpack_are_inverse(tiny):
    loras = attach(tiny[0], 3, "attn", init="svd")
    scatter(loras)
    tensors = {name: value.clone() for name, value in advlora.pack(loras).items()}
    assert len(tensors) == 6 * len(loras)
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    fresh = attach(common.load_clip("tiny")[0], 3, "attn")
    advlora.unpack(fresh, tensors)
    for name in loras:
        for key in ("A", "B", "a", "A_0", "B_0", "a_0"):
            assert torch.equal(getattr(fresh[name], key), getattr(loras[name], key))


@pytest.mark.parametrize(
    "rank, weights, towers", [(4, "attn", "vision"), (3, "mlp", "vision"), (3, "attn", "both")]
)
def test_factors_of_other_weights_are_refused(tiny, rank, weights, towers):
    tensors = advlora.pack(attach(tiny[0], 3, "attn"))
    other = attach(common.load_clip("tiny")[0], rank, weights, towers)
    start = {name: value.clone() for name, value in advlora.pack(other).items()}
    with pytest.raises(ValueError, match="not those"):
        advlora.unpack(other, tensors)
    for name, value in advlora.pack(other).items():
        assert torch.equal(value, start[name]), "nothing was written"


def test_factors_of_another_type_are_refused(tiny):
    loras = attach(tiny[0], 3, "attn")
    tensors = {name: value.half() for name, value in advlora.pack(loras).items()}
    with pytest.raises(ValueError, match="not those"):
        advlora.unpack(loras, tensors)


@pytest.mark.parametrize(
    "key, value",
    [("rank", "4"), ("rank", "0"), ("rank", "many"), ("weights", "mlp"), ("towers", "")],
)
def test_an_adapter_that_does_not_fit_is_one_sentence(tiny, key, value):
    tensors = advlora.pack(attach(tiny[0], 3, "attn"))
    facts = {"rank": "3", "weights": "attn", "towers": "vision", "no_adaptive": "False"}
    with pytest.raises(common.Fault, match="--model"):
        advlora.restore(common.load_clip("tiny")[0], tensors, {**facts, key: value})


@pytest.mark.parametrize("weights, towers", [("attn", "vision"), ("both", "both")])
def test_merged_is_unmerged_is_exported(classifier, images, tmp_path, weights, towers):
    clip, config, x = classifier.clip, classifier.config, images[0]
    start = {name: value.clone() for name, value in clip.state_dict().items()}
    plain, plain_text = classifier(x), classifier.text
    loras = attach(clip, 4, weights, towers, init="svd")
    scatter(loras)
    classifier.text = text = classifier.encode_classes().detach()
    unmerged = classifier(x).detach()
    advlora.merge(clip, loras)
    merged = classifier(x)
    assert (unmerged - plain).abs().max() > 1e-3
    torch.testing.assert_close(merged, unmerged, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(classifier.encode_classes(), text, rtol=1e-5, atol=1e-5)
    assert ((text - plain_text).abs().max() > 1e-3) == (towers == "both")

    # what is left is a CLIP like any other, frozen, in which the named weights alone have changed
    assert not any(p.requires_grad for p in clip.parameters())
    assert sorted(clip.state_dict()) == sorted(start)
    changed = [name for name, value in clip.state_dict().items() if not value.equal(start[name])]
    assert sorted(changed) == sorted(loras)
    common.export(clip, config, tmp_path / "x")
    again, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'x'}")
    other = common.Classifier(again.eval(), config, classifier.classes, classifier.template)
    torch.testing.assert_close(other(x), merged, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------
# The program: what main makes of its arguments
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def run(program, monkeypatch, images, tmp_path):
    return quick(program, monkeypatch, advlora, scatter, images[0], tmp_path / "out")


SHORT = "--steps", 2, "--batch-size", 4, "--rank", 2, "--weights", "attn"


def test_the_loop_gets_what_the_arguments_say(run):
    call = run(*SHORT, "--eps", "5/255", "--lr", 0.25, "--clean-weight", 0.5).call
    assert call["eps"] == pytest.approx(5 / 255)
    assert (call["lr"], call["clean_weight"], call["steps"]) == (0.25, 0.5, 2)
    assert call["text"] is False
    assert len(call["batches"]) == 2
    for x, y in call["batches"]:
        assert x.shape == (4, 3, 64, 64) and y.shape == (4,)
        assert 0 <= x.min() < 0.1 and 0.5 < x.max() <= 1


@pytest.mark.parametrize("batch_size, steps", [(32, 100), (5, 128)])
def test_the_defaults_of_the_loop(run, monkeypatch, batch_size, steps):
    monkeypatch.setattr(common, "batches", lambda *_: iter(()))
    call = run("--batch-size", batch_size, "--init", "kaiming").call
    assert (call["lr"], call["clean_weight"], call["text"]) == (1e-3, 0, False)
    assert call["eps"] == common.TINY_EPS
    assert call["steps"] == steps
    assert list(call["loras"]) == advlora.clip_weights(call["classifier"].clip)
    assert {lora.A.shape[1] for lora in call["loras"].values()} == {8}


@pytest.mark.parametrize(
    "arguments, options",
    [
        ((), {"init": "cluster"}),
        (("--init", "svd", "--seed", 3, "--no-adaptive"), {"init": "svd", "adaptive": False}),
        (("--init", "kaiming", "--seed", 3, "--no-align"), {"init": "kaiming", "align": False}),
    ],
)
def test_the_factors_start_as_the_arguments_say(run, tiny, arguments, options):
    loras = run(*SHORT, *arguments).call["loras"]
    expected = attach(tiny[0], 2, "attn", seed=3 if "--seed" in arguments else 1, **options)
    assert list(loras) == list(expected)
    for name, lora in loras.items():
        assert torch.equal(lora.A_0, expected[name].A_0)
        assert torch.equal(lora.B_0, expected[name].B_0)
        assert isinstance(lora.a, nn.Parameter) == isinstance(expected[name].a, nn.Parameter)


def test_the_model_is_measured_before_it_is_adapted_and_after_it_is_merged(run, classifier, images):
    before, after = run(*SHORT).seen
    assert before.adapted == after.adapted == []
    with torch.no_grad():
        torch.testing.assert_close(before.logits, classifier(images[0]))
    assert (after.logits - before.logits).abs().max() > 1e-3


def test_before_and_after_are_told_apart(run):
    finished = run(*SHORT)
    assert (finished.result["before"]["clean"], finished.result["after"]["clean"]) == (21, 22)
    zero_shot, adapted = [line for line in finished.out.splitlines() if "to 100.0)" in line]
    assert zero_shot.startswith("zero-shot") and "21.00" in zero_shot and "11.00" in zero_shot
    assert adapted.startswith("AdvLoRA") and "22.00" in adapted and "12.00" in adapted


def test_the_result_tells_how_many_numbers_are_trained_and_how_well_the_start_fits(run):
    finished = run(*SHORT)
    assert finished.result["trained"] == 6 * size("attn", 2, 192)
    assert list(finished.result["residual"]) == list(finished.call["loras"])
    for shares in finished.result["residual"].values():
        assert len(shares) in (1, 3)
        assert all(0 < share < 1 for share in shares)


@pytest.mark.parametrize("options", [(), ("--no-adaptive",), ("--towers", "both")])
def test_load_gives_the_merged_model_of_a_run(run, images, options):
    finished = run(*SHORT, "--init", "svd", *options)
    assert finished.call["text"] is ("both" in options)
    net = advlora.load(finished.folder)
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    with torch.no_grad():
        assert torch.equal(net(images[0]), finished.seen[1].logits)


def test_a_loaded_run_is_measured_once(run):
    first = run(*SHORT, "--init", "svd", "--towers", "both")
    second = run("--load", first.folder)
    assert second.call is None and second.result["before"] is None
    assert len(second.seen) == 1 and second.seen[0].adapted == []
    assert torch.equal(second.seen[0].logits, first.seen[1].logits)
    assert second.result["trained"] == first.result["trained"]
    assert "zero-shot" not in second.out
