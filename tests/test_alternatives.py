"""results/alternatives.py: every alternative is its program but for the choice that it names."""

import importlib
import json
import pathlib

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_fault
from test_advmask import attacked

import advlora
import advmask
import common

HERE = pathlib.Path(__file__).resolve().parent.parent
INIT, ALPHA = 1e-2, 5e-3  # where a mask starts, and its threshold
WAY = INIT - ALPHA
EPS = 3 / 255
BUDGET = 1.5


@pytest.fixture
def alternatives(monkeypatch):
    """The module results/alternatives.py."""
    monkeypatch.syspath_prepend(HERE / "results")
    return importlib.import_module("alternatives")


def trained(module, classifier, images, steps, seen=None, lam=150):
    """M of every mask after `steps` steps of module.train; `seen` takes M before each of them."""
    torch.manual_seed(1)
    masks = module.attach(classifier.clip, module.vision_weights(classifier.clip))

    def batches():
        for _ in range(steps):
            if seen is not None:
                seen.append([mask.M.detach().clone() for mask in masks.values()])
            yield images

    module.train(classifier, masks, batches(), steps, EPS, lam=lam, budget=BUDGET)
    return [mask.M.detach().clone() for mask in masks.values()]


@pytest.fixture
def after_one_step(embedded, images):
    """after_one_step(module) -> INIT - M of every mask of a fresh small CLIP."""

    def run(module):
        classifier = common.Classifier(
            *common.load_clip("tiny"), embedded.classes, embedded.template
        )
        return [INIT - M for M in trained(module, classifier, images, 1)]

    return run


def test_every_alternative_is_a_program_of_its_own(alternatives):
    for choice, alternative in alternatives.ALTERNATIVES.items():
        module = alternatives.program(choice)
        assert module.__doc__.startswith(
            {"advmask": "AdvMask", "advlora": "AdvLoRA"}[alternative.program]
        )
        assert module is not alternatives.program(choice), "nothing is shared"


def test_a_line_that_the_program_has_not_is_refused(alternatives, monkeypatch):
    wrong = alternatives.Alternative("", "advmask", {"no such line": ""})
    monkeypatch.setitem(alternatives.ALTERNATIVES, "wrong", wrong)
    with pytest.raises(ValueError, match="no such line"):
        alternatives.program("wrong")


@pytest.fixture
def blocks(classifier, images):
    """What every block of the image tower puts out -> (layers, b, tokens, d)."""
    seen = []
    transformer = classifier.clip.visual.transformer
    for block in transformer.resblocks:
        block.register_forward_hook(lambda block, inputs, output: seen.append(output))
    with torch.no_grad():
        classifier(images[0])
    outputs = torch.stack(seen)
    return outputs if transformer.batch_first else outputs.transpose(1, 2)


def test_tokens_takes_the_mean_over_all_tokens(alternatives, blocks, classifier, images):
    with torch.no_grad():
        z, _ = alternatives.program("tokens").features(classifier, images[0])
    torch.testing.assert_close(z, F.normalize(blocks.mean(2), dim=-1))


def test_raw_keeps_the_length_of_the_class_token(alternatives, blocks, classifier, images):
    with torch.no_grad():
        z, _ = alternatives.program("raw").features(classifier, images[0])
    torch.testing.assert_close(z, blocks[:, :, 0])


def test_attached_has_a_gradient_through_the_clean_side(
    alternatives, after_one_step, classifier, images
):
    moved = after_one_step(alternatives.program("attached"))
    x, y = images
    torch.manual_seed(1)
    masks = advmask.attach(classifier.clip, advmask.vision_weights(classifier.clip))
    x_adv = attacked(classifier, x, y, EPS)
    z_clean, logits_clean = advmask.features(classifier, x)
    z_adv, logits_adv = advmask.features(classifier, x_adv)
    p_true = logits_clean.softmax(-1)[range(len(y)), y]
    objective = F.cross_entropy(logits_adv, y) + 150 * advmask.lafa(z_clean, z_adv, p_true)
    gradients = torch.autograd.grad(objective, [mask.M for mask in masks.values()])
    rms = torch.cat([g.flatten() for g in gradients]).square().mean().sqrt()
    for M, g in zip(moved, gradients, strict=True):
        wanted = BUDGET * WAY * g / rms
        assert F.cosine_similarity(M.flatten(), wanted.flatten(), dim=0) > 0.999
    detached = after_one_step(advmask)
    for M, g in zip(detached, gradients, strict=True):
        assert F.cosine_similarity(M.flatten(), g.flatten(), dim=0) < 0.99


def test_unchanged_trains_as_the_program_does(alternatives, after_one_step):
    own, unchanged = map(after_one_step, (advmask, alternatives.program("unchanged")))
    for a, b in zip(own, unchanged, strict=True):
        torch.testing.assert_close(b, a)


def test_undivided_moves_a_tenth_in_the_first_step(alternatives, after_one_step):
    divided, undivided = map(after_one_step, (advmask, alternatives.program("undivided")))
    for a, b in zip(divided, undivided, strict=True):
        torch.testing.assert_close(b, a / 10, rtol=1e-3, atol=1e-8)


def test_matrix_moves_every_matrix_by_the_same_size(alternatives, after_one_step):
    sizes = [
        M.square().mean().sqrt().item() for M in after_one_step(alternatives.program("matrix"))
    ]
    assert sizes == pytest.approx([BUDGET * WAY] * len(sizes), rel=1e-4)
    together = [M.square().mean().sqrt().item() for M in after_one_step(advmask)]
    assert max(together) > 1.5 * min(together), "by default the matrices differ"


def test_late_moves_what_is_far_in_all_but_the_last_fifth(alternatives, classifier, images):
    seen = []
    after = trained(alternatives.program("late"), classifier, images, 5, seen)
    for before_4, before_5, M in zip(seen[3], seen[4], after, strict=True):
        far = (before_5 - ALPHA).abs() >= WAY / 10
        assert far.any() and (~far).any()
        assert (M == before_5)[far].all()
        assert (M != before_5)[~far].float().mean() > 0.9
        assert (before_5 != before_4).float().mean() > 0.9, "the first four move all"


def test_adam_moves_every_entry_by_the_rate_in_the_first_step(alternatives, after_one_step):
    for M in after_one_step(alternatives.program("adam")):
        moves = M[M != 0].abs()
        # an entry whose gradient is near Adam's own 1e-8 moves less
        assert moves.median().item() == pytest.approx(BUDGET * WAY, rel=1e-3)
        assert moves.max().item() <= BUDGET * WAY * 1.001


def test_unbalanced_is_the_same_start_with_other_norms(alternatives):
    W_0 = torch.randn(24, 16)
    own = alternatives.program("unbalanced").ClusterLoRA(W_0, 4)
    default = advlora.ClusterLoRA(W_0, 4)
    torch.testing.assert_close(own.B @ own.A, default.B @ default.A)
    centres, _ = advlora.kmeans(W_0, 4)
    torch.testing.assert_close(own.A[0].detach(), centres)
    assert default.A.norm().item() == pytest.approx(default.B.norm().item(), rel=1e-4)


def test_scale_attacks_and_trains_with_a_scale_of_100(alternatives, monkeypatch, program):
    scales = []

    def measure(classifier, tests, args):
        scales.append(classifier.scale)
        numbers = {"clean": 1.0, "pgd": 1.0, "intervals": {"clean": [0, 1], "pgd": [0, 1]}}
        return numbers | {"flags": []}

    monkeypatch.setattr(common, "measure", measure)
    monkeypatch.setattr(common, "batches", lambda *_: iter(()))
    answer = program("alternatives", "scale", "--steps", 1)
    assert answer.code == 0, answer.err
    assert scales == [100, 100]


def test_the_program_takes_the_arguments_of_its_choice_and_keeps_the_choice(
    alternatives, program, tmp_path
):
    words = ["unbalanced", "--rank", 2, "--steps", 1, "--test-steps", 1, "--test-limit", 1]
    answer = program("alternatives", *words, "--out", tmp_path)
    assert answer.code == 0, answer.err
    (file,) = tmp_path.rglob("result.json")
    result = json.loads(file.read_text())
    assert (result["method"], result["choice"], result["rank"]) == ("advlora", "unbalanced", 2)
    assert_fault(program("alternatives", "no-such"), "no-such")
    assert_fault(program("alternatives", "adam", "--rank", 2), "rank")
