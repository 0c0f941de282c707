"""baselines/: every rival by itself. TeCoA's loop against the same written again, its pieces away
from their file, what `main` hands to them, and its files."""

import math

import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import ByHand, compare, snapshot
from test_advmask import attacked, copied, quick, toy_batches
from torch import nn

import common
from baselines import tecoa


class Toy(nn.Module):
    """Pixels (b, 3, 2, 2) -> 4 logits, in double precision; always with the same random weights."""

    def __init__(self):
        super().__init__()
        self.clip = nn.Module()
        self.clip.visual = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 5))
        self.clip.words = nn.Parameter(torch.empty(4, 5))
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        self.eval().requires_grad_(False)

    def forward(self, x):
        return self.clip.visual(x) @ self.clip.words.T


def scatter(parameters):
    """Move every weight by about a tenth of its size."""
    generator = torch.Generator().manual_seed(0)
    for p in parameters.values():
        noise = torch.randn(p.shape, generator=generator)
        p.data += 0.1 * p.data.square().mean().sqrt() * noise


# ------------------------------------------------------------------------------------------------
# TeCoA: what is trained
# ------------------------------------------------------------------------------------------------


def test_attach_thaws_every_weight_of_the_image_tower_and_nothing_else(tiny):
    clip, _ = tiny
    parameters = tecoa.attach(clip)
    thawed = {name for name, p in clip.named_parameters() if p.requires_grad}
    assert thawed == set(parameters)
    assert thawed == {name for name, _ in clip.named_parameters() if name.startswith("visual.")}
    assert all(parameters[name] is clip.get_parameter(name) for name in thawed)
    tecoa.merge(clip, parameters)
    assert not any(p.requires_grad for p in clip.parameters())


def test_number_of_trained_parameters_in_vit_b_32():
    with torch.device("meta"):
        clip = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32-quickgelu"))
    trained = sum(p.numel() for p in tecoa.attach(clip).values())
    assert f"{trained:,}" in tecoa.__doc__
    # 12 blocks; embeddings of patches, of 50 positions and of the class; two norms; a projection
    block = 12 * 768**2 + 13 * 768
    assert trained == 87_849_216 == 12 * block + (3 * 32**2 + 50 + 1 + 4 + 512) * 768


def test_tecoa_with_a_rate_of_zero_is_clip():
    clip, config = common.load_clip("tiny")
    net = common.Classifier(clip, config, ["cat", "dog"], "a photo of a {}.", "float32")
    before = {name: p.clone() for name, p in clip.state_dict().items()}
    batch = torch.rand(2, 3, net.size, net.size), torch.tensor([0, 1])
    tecoa.train(net, tecoa.attach(clip), [batch], 1, 3 / 255, lr=0.0)
    assert all(torch.equal(p, before[name]) for name, p in clip.state_dict().items())


# ------------------------------------------------------------------------------------------------
# TeCoA: the pieces, copied out of the file
# ------------------------------------------------------------------------------------------------


def test_attach_and_merge_can_be_copied():
    copy, net = copied(tecoa, "attach", "merge"), Toy()
    parameters = copy.attach(net.clip)
    assert all(p.requires_grad for p in net.clip.visual.parameters())
    assert not net.clip.words.requires_grad
    copy.merge(net.clip, parameters)
    assert not any(p.requires_grad for p in net.parameters())


# ------------------------------------------------------------------------------------------------
# TeCoA: the loop
# ------------------------------------------------------------------------------------------------


def train_again(net, batches, eps, lr, published):
    """The training on another Toy -> [{name: weight} before every step, and at the end]."""
    weights = {f"visual.{name}": p for name, p in net.clip.visual.named_parameters()}
    optimizer = ByHand(weights, published)
    history = [snapshot(weights)]
    for t, (x, y) in enumerate(batches):
        x_adv = attacked(net, x, y, eps)
        net.clip.visual.requires_grad_(True)
        rate = lr * (1 + math.cos(math.pi * t / len(batches))) / 2
        optimizer.step(F.cross_entropy(net(x_adv), y), rate)
        net.clip.visual.requires_grad_(False)
        history.append(snapshot(weights))
    return history


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("eps", [0.1, 0.02])
def test_training_is_the_loop_written_again(published, eps):
    net, plain, batches = Toy(), Toy(), toy_batches(8)
    parameters = tecoa.attach(net.clip)

    def train(watched):
        tecoa.train(net, parameters, watched, 8, eps, 0.02, published)

    compare(train, parameters, batches, lambda: train_again(plain, batches, eps, 0.02, published))
    assert torch.equal(net.clip.words, plain.clip.words)


@pytest.mark.parametrize("published, lr", [(False, 1e-5), (True, 1e-4)])
def test_a_step_lowers_the_loss_and_moves_the_image_tower_alone(classifier, images, published, lr):
    x, y = images
    clip = classifier.clip
    start = {name: value.clone() for name, value in clip.state_dict().items()}
    before = F.cross_entropy(classifier(x), y).item()
    # with eps 0 the loss of the step is that of the clean images
    tecoa.train(classifier, tecoa.attach(clip), [images], 1, 0.0, lr, published)
    assert F.cross_entropy(classifier(x), y).item() < before
    for name, value in clip.state_dict().items():
        assert torch.equal(value, start[name]) != name.startswith("visual."), name


# ------------------------------------------------------------------------------------------------
# TeCoA: files, and what main makes of its arguments
# ------------------------------------------------------------------------------------------------


def test_restore_is_the_inverse_of_what_is_saved(tiny):
    clip, _ = tiny
    parameters = tecoa.attach(clip)
    scatter(parameters)
    other, _ = common.load_clip("tiny")
    tecoa.restore(other, {name: p.data for name, p in parameters.items()})
    for name, value in clip.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    assert not any(p.requires_grad for p in other.parameters())


def test_weights_of_another_model_are_refused(tiny):
    clip, _ = tiny
    start = {name: value.clone() for name, value in clip.state_dict().items()}
    tensors = {name: p + 1 for name, p in clip.named_parameters() if name.startswith("visual.")}
    missing = {name: value for name, value in tensors.items() if name != "visual.proj"}
    more = {**tensors, "logit_scale": torch.zeros(())}
    wide = {**tensors, "visual.proj": torch.zeros(192, 257)}
    for other in ({}, missing, more, wide):
        with pytest.raises(common.Fault, match="--model"):
            tecoa.restore(clip, other)
    for name, value in clip.state_dict().items():
        assert torch.equal(value, start[name]), "nothing was written"


@pytest.fixture
def run(program, monkeypatch, images, tmp_path):
    return quick(program, monkeypatch, tecoa, scatter, images[0], tmp_path / "out")


SHORT = "--steps", 2, "--batch-size", 4


@pytest.mark.parametrize(
    "arguments, lr, published",
    [
        ((), 3e-4, False),
        (("--published",), 1e-5, True),
        (("--lr", 0.25), 0.25, False),
        (("--published", "--lr", 0.25, "--eps", "5/255"), 0.25, True),
    ],
)
def test_the_loop_gets_what_the_arguments_say(run, arguments, lr, published):
    call = run(*SHORT, *arguments).call
    assert call["eps"] == pytest.approx(5 / 255 if "--eps" in arguments else common.TINY_EPS)
    assert (call["steps"], call["lr"], call["published"]) == (2, lr, published)
    names = [name for name, _ in call["classifier"].clip.visual.named_parameters()]
    assert list(call["parameters"]) == [f"visual.{name}" for name in names]
    assert len(call["batches"]) == 2
    for x, y in call["batches"]:
        assert x.shape == (4, 3, 64, 64) and y.shape == (4,)


@pytest.mark.parametrize(
    "arguments, steps",
    [((), 100), (("--batch-size", 5), 128), (("--batch-size", 5, "--published"), 320)],
)
def test_the_default_number_of_steps(run, monkeypatch, arguments, steps):
    monkeypatch.setattr(common, "batches", lambda *_: iter(()))
    assert run(*arguments).call["steps"] == steps


def test_before_and_after_are_measured_and_told_apart(run, classifier, images):
    finished = run(*SHORT)
    before, after = finished.seen
    assert before.adapted == after.adapted == []
    with torch.no_grad():
        torch.testing.assert_close(before.logits, classifier(images[0]))
    assert (after.logits - before.logits).abs().max() > 1e-3
    assert (finished.result["before"]["clean"], finished.result["after"]["clean"]) == (21, 22)
    zero_shot, adapted = [line for line in finished.out.splitlines() if "to 100.0)" in line]
    assert zero_shot.startswith("zero-shot") and "21.00" in zero_shot and "11.00" in zero_shot
    assert adapted.startswith("TeCoA") and "22.00" in adapted and "12.00" in adapted
    assert finished.result["trained"] == sum(p.numel() for p in classifier.clip.visual.parameters())


def test_load_gives_the_model_of_a_run_which_is_measured_once(run, images):
    first = run(*SHORT)
    net = tecoa.load(first.folder)
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    with torch.no_grad():
        assert torch.equal(net(images[0]), first.seen[1].logits)
    second = run(*SHORT, "--load", first.folder)
    assert second.call is None and second.result["before"] is None
    assert len(second.seen) == 1 and second.seen[0].adapted == []
    assert torch.equal(second.seen[0].logits, first.seen[1].logits)
    assert second.result["trained"] == first.result["trained"]
    assert "zero-shot" not in second.out
