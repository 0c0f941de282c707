"""examples/retrieval.py: ranks, losses and batches against loops written out, the attack against a
closed form and noise, the training loops against the methods' own, and runs of the program."""

import math
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_fault, result_in
from PIL import Image

import advlora
import advmask
import common
from examples import retrieval
from tiny import pretrain

HERE = pathlib.Path(__file__).resolve().parent.parent
PROGRAM = "examples.retrieval"
TINIEST = ("--pairs", 6, "--batch-size", 3, "--steps", 2, "--test-limit", 8, "--test-steps", 1)
EPS = 3 / 255


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------
# Flickr8k
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def flickr(tmp_path):
    """A data root with a Flickr8k of noise: 7 training images, 12 test images, five captions."""
    folder = tmp_path / "data" / "flickr8k"
    (folder / "Images").mkdir(parents=True)
    generator = np.random.default_rng(0)
    lines = ["image,caption"]
    for part, n in (("train", 7), ("test", 12)):
        names = [f"{part}{i:02}.jpg" for i in range(n)]
        for name in names:
            noise = generator.integers(0, 256, (70, 80, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / "Images" / name)
            for caption in range(5):
                lines.append(f'{name},"Picture {name[:-4]} , in words {caption} ."')
        (folder / f"Flickr_8k.{part}Images.txt").write_text("\n".join(names) + "\n")
    (folder / "captions.txt").write_text("\n".join(lines) + "\n")
    return tmp_path / "data"


@pytest.fixture
def real_root(data_root):
    """The data root that has the real Flickr8k."""
    if not (data_root / "flickr8k").is_dir():
        pytest.skip(f"{data_root} has no flickr8k/; examples/retrieval.py tells what is in it")
    return data_root


def test_listed_images_get_their_captions_without_quotes(flickr):
    train, test = retrieval.read_flickr8k(flickr)
    assert [len(train), len(test)] == [7, 12]
    assert train[3].path == flickr / "flickr8k" / "Images" / "train03.jpg"
    assert train[3].captions == [f"Picture train03 , in words {i} ." for i in range(5)]


def test_the_training_part_is_what_the_small_clip_was_trained_on(real_root):
    train, test = retrieval.read_flickr8k(real_root)
    items, texts, _ = pretrain.captioned_photographs(real_root)
    seen = [(path, texts[text]) for path, source, text in items if source == "flickr"]
    assert [(one.path, one.captions) for one in train] == seen
    assert len(test) == 1000 and all(len(one.captions) == 5 for one in test)
    assert not {one.path for one in train} & {one.path for one in test}


def test_an_epoch_has_every_image_at_most_once_with_a_caption_of_its_own():
    # picture i is grey level i everywhere; its captions are 10 i, 10 i + 1, ...
    pictures = [(torch.full((3, 10, 10), i, dtype=torch.uint8), i) for i in range(7)]
    tokens = [10 * i + torch.arange(5)[:, None] for i in range(7)]
    epoch, drawn = [], {i: set() for i in range(7)}
    # batches of 3: two to an epoch of 7 images
    for t, (x, words) in enumerate(retrieval.pair_batches(pictures, tokens, 8, 3, 81)):
        assert x.shape == (3, 3, 8, 8) and words.shape == (3, 1)
        if t % 2 == 0:
            epoch = []
        for image, word in zip(x, words[:, 0].tolist()):
            assert image.mul(255).round().unique().tolist() == [word // 10]
            drawn[word // 10].add(word % 10)
            epoch.append(word // 10)
        assert len(set(epoch)) == len(epoch)
    assert t == 80
    assert all(captions == set(range(5)) for captions in drawn.values())


def test_a_batch_is_no_larger_than_the_pairs():
    pictures = [(torch.zeros(3, 10, 10, dtype=torch.uint8), i) for i in range(4)]
    tokens = [torch.tensor([[i]]) for i in range(4)]
    for _, words in retrieval.pair_batches(pictures, tokens, 8, 32, 3):
        assert sorted(words[:, 0].tolist()) == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------------
# Ranks and losses
# ------------------------------------------------------------------------------------------------


def ranks_by_hand(S, owner):
    """The definition, one comparison after the other."""
    images, captions = len(S), len(owner)
    image_to_text = []
    for i in range(images):
        best = math.inf
        for c in range(captions):
            if owner[c] == i:
                others = [k for k in range(captions) if owner[k] != i and S[i][k] >= S[i][c]]
                best = min(best, 1 + len(others))
        image_to_text.append(best)
    text_to_image = []
    for c in range(captions):
        own = owner[c]
        others = [j for j in range(images) if j != own and S[j][c] >= S[own][c]]
        text_to_image.append(1 + len(others))
    return image_to_text, text_to_image


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [False, True])
def test_ranks_are_those_of_a_double_loop(seed, ties):
    S = normal(6, 14, seed=seed)
    if ties:
        S = S.round()
    # from one to three captions an image, in no order
    owner = torch.tensor([0, 1, 1, 2, 5, 3, 2, 4, 3, 0, 5, 0, 1, 2])
    image_to_text, text_to_image = retrieval.ranks(S, owner)
    expected = ranks_by_hand(S.tolist(), owner.tolist())
    assert (image_to_text.tolist(), text_to_image.tolist()) == expected


def test_a_tie_counts_against_us_and_own_captions_do_not_compete():
    owner = torch.tensor([0, 0, 1, 2])
    S = torch.tensor([[3.0, 2.0, 3.0, 1.0], [0.0, 2.0, 5.0, 0.0], [0.0, 0.0, 5.0, 9.0]])
    image_to_text, text_to_image = retrieval.ranks(S, owner)
    assert image_to_text.tolist() == [2, 1, 1]
    assert text_to_image.tolist() == [1, 2, 2, 1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_similarity_that_is_not_finite_is_no_good_rank(value):
    S = torch.tensor([[value, 0.0], [0.0, 1.0]])
    with pytest.raises(FloatingPointError, match="not finite"):
        retrieval.ranks(S, torch.tensor([0, 1]))


def test_recalls_are_of_the_queries_and_their_captions_alone():
    S = normal(30, 60)
    owner = torch.arange(60) % 30
    queries = torch.tensor([7, 3, 21, 22])
    image_to_text, text_to_image = ranks_by_hand(S.tolist(), owner.tolist())
    found = {
        "image_to_text": [image_to_text[i] for i in queries],
        "text_to_image": [text_to_image[c] for c in range(60) if c % 30 in queries],
    }
    result = retrieval.recalls(S, owner, queries)
    for direction, numbers in found.items():
        for k in (1, 5, 10):
            share = 100 * sum(n <= k for n in numbers) / len(numbers)
            assert result[direction][f"R@{k}"] == pytest.approx(share)
        assert result[direction]["median"] == np.median(numbers)
    ten = torch.tensor(found["image_to_text"]) <= 10
    assert result["interval"] == common.interval(ten)


def test_the_contrastive_loss_is_that_of_a_loop():
    S = 3 * normal(5, 5)
    total = 0.0
    for i in range(5):
        row = sum(math.exp(S[i, j]) for j in range(5))
        column = sum(math.exp(S[j, i]) for j in range(5))
        total -= math.log(math.exp(S[i, i]) / row) / 5
        total -= math.log(math.exp(S[i, i]) / column) / 5
    assert retrieval.contrastive(S).item() == pytest.approx(total / 2, rel=1e-5)


def test_the_caption_loss_is_that_of_a_loop():
    logits = 3 * normal(4, 9)
    own = torch.arange(9) % 4 == torch.arange(4)[:, None]
    loss = retrieval.caption_loss(logits, own)
    for i in range(4):
        probability = logits[i].softmax(0)[own[i]].sum().item()
        assert loss[i].item() == pytest.approx(-math.log(probability), rel=1e-5)


# ------------------------------------------------------------------------------------------------
# The attack
# ------------------------------------------------------------------------------------------------


def captioned(embedded, per_class=1):
    """Training images of the embedded set and what they show: pictures, captions, owner."""
    items = []
    for label in range(len(embedded.classes)):
        items += [item for item in embedded.train if item.label == label][:per_class]
    pictures = [(pixels, i) for i, (pixels, _) in enumerate(common.TestImages(items, 64))]
    templates = "a photo of a {}.", "a small picture of the {}."
    captions, owner = [], []
    for i, item in enumerate(items):
        captions += [template.format(item.name) for template in templates]
        owner += [i, i]
    return pictures, captions, torch.tensor(owner)


def test_on_a_linear_network_the_attack_finds_the_worst_case(linear):
    # one own caption an image: the loss is the cross-entropy, its maximum has a closed form
    own = F.one_hot(linear.y, 2).bool()
    start = common.random_start(linear.x, range(40), linear.eps)
    found = retrieval.attack(linear.net, linear.x, own, start, linear.eps, linear.eps / 2, [9])
    logits = linear.net(found[9])
    margin = logits[range(40), linear.y] - logits[range(40), 1 - linear.y]
    torch.testing.assert_close(margin.detach(), linear.worst)


def test_the_attack_beats_noise_and_more_steps_beat_fewer(classifier, embedded):
    pictures, captions, owner = captioned(embedded)
    classifier.set_classes(captions, "{}")
    x = torch.stack([pixels for pixels, _ in pictures]) / 255
    own = owner == torch.arange(len(x))[:, None]
    start = common.random_start(x, range(len(x)), EPS)
    kept = start.clone()
    found = retrieval.attack(classifier, x, own, start, EPS, 1 / 255, [2, 12])
    assert torch.equal(start, kept) and not start.requires_grad
    losses = {}
    with torch.no_grad():
        for name, x_adv in {"noise": x + start, **found}.items():
            assert (x_adv - x).abs().max() <= EPS + 1e-6
            assert x_adv.min() >= 0 and x_adv.max() <= 1
            losses[name] = retrieval.caption_loss(classifier(x_adv), own)
    # the best iterate is kept, image by image
    assert (losses[12] >= losses[2] - 1e-4).all() and (losses[2] >= losses["noise"] - 1e-4).all()
    assert losses[2].mean() > losses["noise"].mean() + 1
    assert losses[12].mean() > losses[2].mean()


def test_the_best_iterate_is_kept(classifier, embedded, monkeypatch):
    pictures, captions, owner = captioned(embedded)
    classifier.set_classes(captions, "{}")
    x = torch.stack([pixels for pixels, _ in pictures]) / 255
    own = owner == torch.arange(len(x))[:, None]
    start = common.random_start(x, range(len(x)), EPS)
    seen = []

    def remember(logits, own):
        seen.append(caption_loss(logits, own))
        return seen[-1]

    caption_loss = retrieval.caption_loss
    monkeypatch.setattr(retrieval, "caption_loss", remember)
    # a step as large as the ball goes to and fro
    found = retrieval.attack(classifier, x, own, start, EPS, 4 * EPS, [3, 6])
    monkeypatch.undo()
    losses = torch.stack([loss.detach() for loss in seen])  # (iterates, images)
    assert len(losses) == 7 and (losses.argmax(0) < 6).any()
    with torch.no_grad():
        for count in (3, 6):
            best = losses[: count + 1].max(0).values
            again = caption_loss(classifier(found[count]), own)
            torch.testing.assert_close(again, best, rtol=1e-4, atol=1e-4)


def test_only_the_deployed_network_is_attacked(linear):
    own = F.one_hot(linear.y, 2).bool()
    with pytest.raises(ValueError, match="eval mode"):
        retrieval.attack(linear.net.train(), linear.x, own, linear.x * 0, 0.1, 0.1, [1])
    with torch.no_grad():
        linear.net.W[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        retrieval.attack(linear.net.eval(), linear.x, own, linear.x * 0, 0.1, 0.1, [1])


def test_only_the_queries_are_attacked(classifier, embedded, monkeypatch):
    pictures, captions, owner = captioned(embedded)
    images = torch.stack([pixels for pixels, _ in pictures])
    queries = torch.tensor([8, 2, 5])
    seen = []
    recalls = retrieval.recalls

    def remember(S, *rest):
        seen.append(S)
        return recalls(S, *rest)

    monkeypatch.setattr(retrieval, "recalls", remember)
    args = SimpleNamespace(batch_size=1, device="cpu", eps=EPS, test_steps=[1, 3])
    result = retrieval.measure(classifier, images, captions, owner, queries, args)
    clean, one, three = seen
    with torch.no_grad():
        torch.testing.assert_close(clean, classifier(images / 255), rtol=1e-4, atol=1e-4)
    for attacked in (one, three):
        changed = (attacked != clean).any(1).nonzero().flatten()
        assert changed.tolist() == [2, 5, 8]
    own = owner == torch.arange(len(images))[:, None]
    loss = retrieval.caption_loss
    assert (loss(three, own) >= loss(one, own) - 1e-4).all()
    assert (loss(one, own) >= loss(clean, own) - 1e-4)[queries].all()
    assert list(result["pgd"]) == ["1", "3"]
    assert result["pgd"]["3"]["loss"] == pytest.approx(loss(three, own)[queries].mean().item())


def test_in_a_ball_of_no_size_nothing_is_attacked(classifier, embedded):
    pictures, captions, owner = captioned(embedded)
    images = torch.stack([pixels for pixels, _ in pictures])
    args = SimpleNamespace(batch_size=4, device="cpu", eps=0.0, test_steps=[1])
    result = retrieval.measure(classifier, images, captions, owner, torch.arange(10), args)
    assert result["pgd"]["1"].pop("loss") == pytest.approx(result["clean"].pop("loss"), rel=1e-4)
    assert result["pgd"]["1"] == result["clean"]


# ------------------------------------------------------------------------------------------------
# The loops
# ------------------------------------------------------------------------------------------------


def one_way(logits):
    """The first half of the contrastive loss: the cross-entropy of the methods' own loops."""
    return F.cross_entropy(logits, torch.arange(len(logits)))


@pytest.fixture
def same_problem(monkeypatch, embedded):
    """A new classifier of ten captions, and batches of the ten images, for either loop."""
    monkeypatch.setattr(retrieval, "contrastive", one_way)
    pictures, captions, _ = captioned(embedded)
    x = torch.stack([pixels for pixels, _ in pictures]) / 255

    def make():
        torch.manual_seed(0)
        net = common.Classifier(*common.load_clip("tiny"), captions[::2], "{}")
        labelled = [(x, torch.arange(10))] * 3
        paired = [(x, net.tokens.clone())] * 3
        return net, labelled, paired

    return make


def test_but_for_the_loss_masks_are_trained_as_by_advmask(same_problem):
    net, labelled, _ = same_problem()
    names = advmask.vision_weights(net.clip)[:4]
    expected = advmask.attach(net.clip, names)
    advmask.train(net, expected, labelled, 3, EPS, lam=150, budget=2)
    net, _, paired = same_problem()
    masks = advmask.attach(net.clip, names)
    retrieval.train_masks(net, masks, paired, 3, EPS, lam=150, budget=2)
    for name, mask in masks.items():
        assert (mask.M != mask.init).any()
        torch.testing.assert_close(mask.M, expected[name].M)


def test_but_for_the_loss_factors_are_trained_as_by_advlora(same_problem):
    def attach(net):
        names = advlora.clip_weights(net.clip, "attn", "both")
        return advlora.attach(net.clip, names, 4, init="svd")

    net, labelled, _ = same_problem()
    expected = attach(net)
    advlora.train(net, expected, labelled, 3, EPS, lr=1e-3, text=True)
    net, _, paired = same_problem()
    loras = attach(net)
    factors = [p for lora in loras.values() for p in lora.parameters()]
    retrieval.train_weights(net, factors, paired, 3, EPS, lr=1e-3)
    assert any(not name.startswith("visual.") for name in loras)
    for name, lora in loras.items():
        for key in ("A", "B", "a"):
            trained, start = getattr(lora, key), getattr(lora, f"{key}_0")
            assert not torch.equal(trained, start), (name, key)
            torch.testing.assert_close(trained, getattr(expected[name], key))


def adversarial_loss(classifier, pictures, captions):
    """The training's loss on ten fixed pairs, attacked from fixed starts."""
    x = torch.stack([pixels for pixels, _ in pictures]) / 255
    classifier.set_classes(captions[::2], "{}")
    torch.manual_seed(7)
    x_adv = advlora.pgd(classifier, x, torch.arange(len(x)), EPS, step=EPS, steps=2)
    with torch.no_grad():
        return retrieval.contrastive(classifier(x_adv)).item()


TRAINED = [("advmask", 884_736), ("advlora", 239_676), ("full", 2_768_640)]


@pytest.mark.numbers
@pytest.mark.parametrize("method, trained", TRAINED)
def test_a_short_training_lowers_the_loss(classifier, embedded, method, trained):
    pictures, captions, _ = captioned(embedded)
    classifier.set_classes(captions, "{}")
    tokens = classifier.tokens.view(10, 2, -1).unbind()
    text = {n: p.clone() for n, p in classifier.clip.transformer.named_parameters()}
    before = adversarial_loss(classifier, pictures, captions)
    batches = retrieval.pair_batches(pictures, tokens, 64, 10, 8)
    args = SimpleNamespace(model="tiny", steps=8, eps=EPS, seed=1)
    assert retrieval.adapt(method, classifier, batches, args) == trained
    after = adversarial_loss(classifier, pictures, captions)
    assert after < 0.75 * before
    # merged: an ordinary, frozen CLIP, whose text tower only AdvLoRA has changed
    assert not any(p.requires_grad for p in classifier.clip.parameters())
    left = dict(classifier.clip.transformer.named_parameters())
    assert left.keys() == text.keys()
    changed = [name for name in text if not torch.equal(text[name], left[name])]
    assert len(changed) == (16 if method == "advlora" else 0)


# ------------------------------------------------------------------------------------------------
# The program
# ------------------------------------------------------------------------------------------------


def printed_rows(out):
    """{label: the eight recalls and medians} of the table that a run printed."""
    table = {}
    for line in out.splitlines():
        label, *cells = line.split(" | ")
        numbers = []
        for cell in cells:
            without_interval = re.sub(r"\(.*\)", "", cell)
            numbers += without_interval.split()
        if len(numbers) == 8 and "R@1" not in numbers:
            table[label.strip()] = [float(number) for number in numbers]
    return table


def check_result(answer, folder, methods, attacks=(1,)):
    """A run's numbers are recalls, and its table and its file say the same."""
    assert answer.code == 0, answer.err
    result = result_in(folder)
    table = printed_rows(answer.out)
    names = ["zero-shot", *(retrieval.METHODS[method] for method in methods)]
    assert list(result["rows"]) == names
    assert len(table) == len(names) * (1 + len(attacks))
    for name, row in result["rows"].items():
        settings = {"clean": row["clean"]}
        for count in attacks:
            settings[f"PGD-{count}"] = row["pgd"][str(count)]
        for setting, numbers in settings.items():
            found = []
            for direction in ("image_to_text", "text_to_image"):
                one, five, ten, median = numbers[direction].values()
                assert 0 <= one <= five <= ten <= 100 and median >= 1
                found += [one, five, ten, median]
            assert table[f"{name}, {setting}"] == pytest.approx(found, abs=0.006, rel=0)
        assert (row["trained"] == 0) == (name == "zero-shot")
    return result


def test_a_run_prints_and_saves_the_same_numbers(program, flickr, tmp_path, files_in):
    out = tmp_path / "out"
    several = ("--test-steps", 1, 2)
    answer = program(PROGRAM, "--data-root", flickr, *TINIEST, *several, "--out", out)
    result = check_result(answer, out, ["advmask", "advlora", "full"], attacks=(1, 2))
    assert files_in(out) == ["retrieval-flickr8k-tiny-6shot-seed1/result.json"]
    trained = [row["trained"] for row in result["rows"].values()]
    assert trained == [0, 884_736, 239_676, 2_768_640]
    assert "239,676 numbers trained" in answer.out
    facts = {"method": "retrieval", "dataset": "flickr8k", "model": "tiny", "pairs": 6, "steps": 2}
    facts.update(batch_size=3, test_limit=8, test_steps=[1, 2], test_images=12, captions=60)
    assert {key: result[key] for key in facts} == facts
    assert result["eps"] == pytest.approx(EPS) and result["versions"]
    # the attack does something, to every model
    for row in result["rows"].values():
        assert row["pgd"]["2"]["loss"] > row["clean"]["loss"]


def test_a_method_gives_the_same_alone_and_after_another(program, flickr, tmp_path):
    results = []
    for methods in (["advmask", "full"], ["full"]):
        out = tmp_path / "-".join(methods)
        answer = program(
            PROGRAM, "--data-root", flickr, *TINIEST, "--out", out, "--method", *methods
        )
        results.append(check_result(answer, out, methods))
        for row in results[-1]["rows"].values():
            del row["training_seconds"]
    first, second = results
    for name, row in second["rows"].items():
        assert row == first["rows"][name]


def test_a_run_on_the_first_100_test_images_of_flickr8k(program, real_root, tmp_path):
    folder = tmp_path / "data" / "flickr8k"
    folder.mkdir(parents=True)
    for name in ("Images", "captions.txt", "Flickr_8k.trainImages.txt"):
        (folder / name).symlink_to(real_root / "flickr8k" / name)
    names = (real_root / "flickr8k" / "Flickr_8k.testImages.txt").read_text().split()
    (folder / "Flickr_8k.testImages.txt").write_text("\n".join(names[:100]))
    more = ("--test-limit", 50, "--method", "advlora", "--out", tmp_path / "out")
    answer = program(PROGRAM, "--data-root", tmp_path / "data", *TINIEST, *more)
    result = check_result(answer, tmp_path / "out", ["advlora"])
    assert (result["test_images"], result["captions"]) == (100, 500)
    # the small CLIP is far better than chance, a median of 50, until it is attacked
    clean, attacked = result["rows"]["zero-shot"]["clean"], result["rows"]["zero-shot"]["pgd"]["1"]
    assert clean["text_to_image"]["median"] < 25
    assert attacked["text_to_image"]["median"] > clean["text_to_image"]["median"]


def test_it_runs_as_a_file_from_any_folder(tmp_path):
    command = [sys.executable, HERE / "examples" / "retrieval.py", "--data-root", "nowhere"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.startswith("error: nowhere/flickr8k/Images is missing")


# ------------------------------------------------------------------------------------------------
# Faults of the input
# ------------------------------------------------------------------------------------------------


FAULTY_ARGUMENTS = {
    "no pairs": (("--pairs", 0), ["--pairs", "at least 2", "'0'"]),
    "more pairs than images": (("--pairs", 8), ["--pairs 8", "7 images"]),
    "negative eps": (("--eps", -1), ["--eps", "'-1'"]),
    "huge eps": (("--eps", 3), ["3/255"]),
    "no steps of the attack": (("--test-steps", 20, 0), ["--test-steps", "'0'"]),
    "unknown method": (("--method", "lora"), ["--method", "advlora"]),
}


@pytest.mark.parametrize("name", FAULTY_ARGUMENTS)
def test_a_faulty_argument_is_one_sentence_and_no_file(program, flickr, tmp_path, files_in, name):
    arguments, words = FAULTY_ARGUMENTS[name]
    out = ("--out", tmp_path / "out")
    answer = program(PROGRAM, "--data-root", flickr, *TINIEST, *out, *arguments)
    assert_fault(answer, *words)
    assert files_in(tmp_path / "out") == []


def remove_captions(folder):
    (folder / "captions.txt").unlink()


def break_a_line(folder):
    path = folder / "captions.txt"
    path.write_text(path.read_text().replace("train00.jpg,", "train00.jpg ", 1))


def empty_a_caption(folder):
    path = folder / "captions.txt"
    path.write_text(path.read_text() + 'test00.jpg,""\n')


def list_an_unknown_image(folder):
    with open(folder / "Flickr_8k.testImages.txt", "a") as file:
        file.write("unknown.jpg\n")


def remove_an_image(folder):
    (folder / "Images" / "test05.jpg").unlink()


def keep_one_test_image(folder):
    (folder / "Flickr_8k.testImages.txt").write_text("test00.jpg\n")


def write_in_latin_1(folder):
    (folder / "captions.txt").write_bytes("train00.jpg,Caf\xe9\n".encode("latin-1"))


FAULTY_FOLDERS = {
    remove_captions: ["captions.txt is missing", "--data-root"],
    break_a_line: ["line 2 of", "captions.txt", "train00.jpg", "a comma"],
    empty_a_caption: ["line 97 of", "test00.jpg"],
    list_an_unknown_image: ["Flickr_8k.testImages.txt", "unknown.jpg"],
    remove_an_image: ["test05.jpg", "missing"],
    keep_one_test_image: ["1 images", "at least 2"],
    write_in_latin_1: ["captions.txt", "UTF-8"],
}


@pytest.mark.parametrize("damage", FAULTY_FOLDERS, ids=lambda damage: damage.__name__)
def test_a_faulty_folder_is_one_sentence_and_no_file(program, flickr, tmp_path, files_in, damage):
    damage(flickr / "flickr8k")
    answer = program(PROGRAM, "--data-root", flickr, *TINIEST, "--out", tmp_path / "out")
    assert_fault(answer, *FAULTY_FOLDERS[damage])
    assert files_in(tmp_path / "out") == []
