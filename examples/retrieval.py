"""Does adversarial adaptation keep image-text retrieval alive under attack?

AdvLoRA's paper, "Adversarial Low-Rank Adaptation of Vision-Language Models", arXiv 2404.13425,
adapts for image-text retrieval and says that few trained numbers then do what full adversarial
fine-tuning does. This program puts that to the test with a small CLIP and Flickr8k, on AdvLoRA, on
AdvMask, and on full fine-tuning of the image tower. Every setting is our choice.

    python examples/retrieval.py --data-root DATA                     # all three methods
    python -m examples.retrieval --data-root DATA --method advlora    # one method
    python examples/retrieval.py --data-root DATA --test-limit 1000   # attack all test images

DATA/flickr8k holds Images/, captions.txt (a line is `image,caption`), Flickr_8k.trainImages.txt and
Flickr_8k.testImages.txt. With the lists that tiny/pretrain.py used, the small CLIP has seen the
training pairs before, and no test image.

z_i is the feature of image i, t_j that of caption j, both of unit length, s the logit scale. Each
method trains on random training pairs, an image and one of its captions, drawn anew in every epoch:

    L = (CE(rows of S) + CE(columns of S)) / 2 with S_ij = s <z_i(x~), t_j>, pair i on the diagonal
    x~ = x + argmax over |delta|_inf <= eps of CE(rows of S), PGD of two steps of size eps

AdvLoRA adapts both towers; AdvMask masks the image tower, with L in the place of its CE, and p(y|x)
is the probability of the own caption among those of the batch. The test attack on an image knows
all captions of the test set, and raises

    -log sum_{c of its own captions} softmax(s <z(x + delta), t>)_c

by PGD with steps of 1/255 from a random start. The iterate of the highest loss counts. A run of
PGD-100 passes through PGD-20 on its way, so both cost what the longer one does.

By default 200 of the 1,000 test images are attacked, a fixed random choice, to save time. They are
searched among all 5,000 captions. The other way, their own captions are searched among all 1,000
images, of which the attacked 200 are attacked and the others as they are. The clean numbers are of
the same images and captions. Ties count against us. Captions that are too long for the text tower
are cut, as in its pre-training.

Evidence, on the small CLIP, three seeds, image to text under PGD-100: R@10 is 0.0 zero-shot, 1.8
with AdvMask, 4.2 with AdvLoRA, and 4.3 with full fine-tuning. Clean it is 13.0, 7.5, 12.8 and 13.0.
results/RESULTS.md has the table. It took 531 s on two CPU cores.
"""

import argparse
import collections
import copy
import math
import pathlib
import random
import sys
import time
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import advlora
import advmask
import common

METHODS = {"advmask": "AdvMask", "advlora": "AdvLoRA", "full": "full fine-tuning"}
DIRECTIONS = "image_to_text", "text_to_image"
RECALLS = 1, 5, 10

# ------------------------------------------------------------------------------------------------
# Flickr8k
# ------------------------------------------------------------------------------------------------


class Photograph(NamedTuple):
    """An image's path and its captions."""

    path: pathlib.Path
    captions: list


def read_flickr8k(root):
    """The listed images of root/flickr8k -> train, test: lists of Photograph. Raises Fault."""
    folder = root / "flickr8k"
    lists = [folder / f"Flickr_8k.{part}Images.txt" for part in ("train", "test")]
    for path in (folder / "Images", folder / "captions.txt", *lists):
        if not path.exists():
            wanted = f"expected Images, captions.txt, {lists[0].name} and {lists[1].name}"
            raise common.Fault(f"{path} is missing; {wanted} in {folder}; see --data-root")

    captions = collections.defaultdict(list)
    text = common.read_text(folder / "captions.txt")
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        name, _, caption = line.partition(",")
        # quoted where it has a comma or a mark; doubled marks stay, as in the pre-training
        caption = caption.strip('" \r')
        if len(name.split()) != 1 or not caption:
            found = f"line {number} of {folder / 'captions.txt'} is {line[:40]!r}"
            raise common.Fault(f"{found}; expected an image's name, a comma and a caption")
        captions[name].append(caption)

    parts = []
    for path in lists:
        names = sorted(set(common.read_text(path).split()))
        for name in names:
            if name not in captions:
                raise common.Fault(f"{path} lists {name}, but captions.txt has no caption of it")
        parts.append([Photograph(folder / "Images" / name, captions[name]) for name in names])
    return parts


def decode(photographs, size, augment):
    """-> [((3, h, w) uint8, its number in the list), ...], as common.decode gives them."""
    items = [common.Item(one.path, i, "") for i, one in enumerate(photographs)]
    return common.decode(items, size, augment)


def pair_batches(pictures, tokens, size, batch_size, steps, device="cpu"):
    """Yields `steps` times x (b, 3, size, size) in [0, 1] and tokens (b, length): pairs.

    pictures: as `decode` gives them for random crops. tokens: for every picture a tensor (captions,
    length), of which one row is drawn. No image is twice in a batch, as its own captions would
    count as wrong there: the last images of an epoch, too few for a batch, are left out.
    """
    batch_size = min(batch_size, len(pictures))
    epoch = len(pictures) // batch_size
    for done in range(0, steps, epoch):
        n = min(epoch, steps - done)
        for x, numbers in common.batches(pictures, size, batch_size, n, "crop", device):
            rows = []
            for i in numbers.tolist():
                drawn = torch.randint(len(tokens[i]), ())
                rows.append(tokens[i][drawn])
            yield x, torch.stack(rows).to(device)


# ------------------------------------------------------------------------------------------------
# Retrieval
# ------------------------------------------------------------------------------------------------


def contrastive(logits):
    """CLIP's symmetric loss of a batch of pairs -> scalar.

    logits (b, b): s <z_i, t_j>, a row for every image; pair i is on the diagonal.
    """
    own = torch.arange(len(logits), device=logits.device)
    image_to_text = cross_entropy(logits, own)
    text_to_image = cross_entropy(logits.T, own)
    return (image_to_text + text_to_image) / 2


def caption_loss(logits, own):
    """-log of the probability of all own captions together -> (b,).

    logits (b, captions); own (b, captions) bool, at least one in every row.
    """
    # -log sum_own exp(l_c) / sum_all exp(l_c)
    logits = logits.float()
    mine = logits.masked_fill(~own, -math.inf)
    return logits.logsumexp(1) - mine.logsumexp(1)


def attack(classifier, x, own, start, eps, step, counts):
    """PGD (Madry et al. 2018) on images x (b, 3, h, w) that raises caption_loss -> {steps: x~}.

    own (b, captions) bool, of the classifier's logits. start: delta_0. counts: the numbers of steps
    after which the iterate with the highest loss so far is kept, image by image. Raises ValueError
    in train mode, FloatingPointError where the gradient is not finite.
    """
    if classifier.training:
        raise ValueError("attack the network that is deployed: eval mode")
    delta, best = start.detach(), start.detach()
    highest = torch.full((len(x),), -math.inf, device=x.device)
    attacked = {}
    for t in range(max(counts) + 1):
        delta.requires_grad_()
        loss = caption_loss(classifier(x + delta), own)  # (b,)
        # towards delta alone: no gradients of weights are computed
        (grad,) = torch.autograd.grad(loss.sum(), delta)
        if not torch.isfinite(grad).all():
            raise FloatingPointError("the gradient of the attack is not finite")
        delta, loss = delta.detach(), loss.detach()

        # the best iterate up to here
        better = loss > highest
        highest = torch.where(better, loss, highest)
        best = torch.where(better[:, None, None, None], delta, best)
        if t in counts:
            attacked[t] = x + best

        # delta <- clip(delta + step sign(grad), -eps, eps), x + delta clipped to [0, 1]
        delta = (delta + step * grad.sign()).clamp(-eps, eps)
        delta = (x + delta).clamp(0, 1) - x
    assert best.abs().max() <= eps + 1e-6, "the attack left the ball; was x in [0, 1]?"
    return attacked


def ranks(S, owner):
    """Where the own caption, and the own image, is found -> (images,), (captions,), from 1 on.

    S (images, captions): similarities. owner (captions,): the image of every caption; no image
    is without one. Captions of the same image do not compete. Ties count against us. Raises
    FloatingPointError where a similarity is not finite: a nan would lose every comparison.
    """
    if not torch.isfinite(S).all():
        raise FloatingPointError("a similarity of image and caption is not finite")
    own = owner == torch.arange(len(S), device=S.device)[:, None]  # (images, captions)
    # an image's best own caption; 1 + captions of other images that are as near, or nearer
    nearest = S.masked_fill(~own, -math.inf).max(1).values
    image_to_text = 1 + ((S >= nearest[:, None]) & ~own).sum(1)
    # a caption's own image; 1 + other images that are as near, or nearer
    to_own = S.gather(0, owner[None])  # (1, captions)
    text_to_image = 1 + ((S >= to_own) & ~own).sum(0)
    return image_to_text, text_to_image


def recalls(S, owner, queries):
    """How the images `queries` find their captions, and these captions their images.

    -> {"image_to_text": {"R@1", "R@5", "R@10": recall in %, "median": of the ranks},
    "text_to_image": the same, "interval": 95 %, of image to text at 10, "loss": the mean of
    caption_loss}
    """
    image_to_text, text_to_image = ranks(S, owner)
    own = owner == queries[:, None]  # (queries, captions)
    found = image_to_text[queries], text_to_image[own.any(0)]
    result = {}
    for direction, rank in zip(DIRECTIONS, found):
        result[direction] = {}
        for k in RECALLS:
            result[direction][f"R@{k}"] = 100 * (rank <= k).double().mean().item()
        result[direction]["median"] = rank.double().quantile(0.5).item()
    result["interval"] = common.interval(found[0] <= 10)
    result["loss"] = caption_loss(S[queries], own).mean().item()
    return result


def measure(classifier, images, captions, owner, queries, args):
    """Retrieval, clean and attacked -> {"clean": recalls, "pgd": {"20": recalls, ...}}.

    images (n, 3, h, w) uint8, of which `queries` are searched and attacked; captions: a list, owner
    (captions,) their images.
    """
    # the captions are the classes: t_c / |t_c|, once, by the text tower as it is now
    classifier.set_classes(captions, "{}")
    size, device = 4 * args.batch_size, args.device

    # S = s <z, t_c>, one product for every batch of images
    rows = []
    with torch.no_grad():
        for pixels in images.split(size):
            rows.append(classifier(common.as_float(pixels).to(device)).cpu())
    S = torch.cat(rows)  # (images, captions)
    result = {"clean": recalls(S, owner, queries), "pgd": {}}

    # the rows of the attacked images, for every number of steps
    rows = {count: [] for count in args.test_steps}
    with tqdm(total=len(queries), unit="image", disable=None, leave=False) as bar:
        for numbers in queries.split(size):
            x = common.as_float(images[numbers]).to(device)
            own = (owner == numbers[:, None]).to(device)  # (b, captions)
            # a start belongs to its image: it does not depend on the batch
            start = common.random_start(x, numbers.tolist(), args.eps)
            attacked = attack(classifier, x, own, start, args.eps, 1 / 255, args.test_steps)
            with torch.no_grad():
                for count, x_adv in attacked.items():
                    rows[count].append(classifier(x_adv).cpu())
            bar.update(len(numbers))
    for count in args.test_steps:
        S_adv = S.clone()
        S_adv[queries] = torch.cat(rows[count])
        result["pgd"][str(count)] = recalls(S_adv, owner, queries)
    return result


# ------------------------------------------------------------------------------------------------
# The loops
# ------------------------------------------------------------------------------------------------


def train_masks(classifier, masks, batches, steps, eps, lam, budget):
    """advmask.train for pairs. batches yields (x, tokens) `steps` times.

    The loss apart, all is as there: two steps of PGD, LAFA, lambda, the gradients' running mean,
    the flip budget.
    """
    started = time.time()
    M = [mask.M for mask in masks.values()]
    v = [torch.zeros_like(m) for m in M]
    entries = sum(m.numel() for m in M)
    way = max(mask.init - mask.alpha for mask in masks.values())
    decay = 0.5 * (1 + torch.cos(math.pi * torch.arange(steps) / steps))
    gamma = budget * way * decay / decay.sum()

    for t, (x, tokens) in enumerate(batches):
        # 1. t_j / |t_j|: the captions of the batch are the classes, and image i is of class i
        classifier.tokens = tokens
        classifier.text = classifier.encode_classes()  # (b, d)
        y = torch.arange(len(x), device=x.device)

        # 2. the inner maximisation: raise the image-to-text loss, two steps of size eps
        x_adv = advmask.pgd(classifier, x, y, eps, step=eps, steps=2)

        # 3. what every block makes of the clean and of the attacked image; logits (b, b)
        with torch.no_grad():
            z_clean, logits_clean = advmask.features(classifier, x)
        z_adv, logits_adv = advmask.features(classifier, x_adv)

        # 4. L_mask = L(x~) + lambda * L_LAFA; p(y|x), of the own caption among the batch's
        loss = contrastive(logits_adv)
        p_own = logits_clean.softmax(1).diagonal()  # (b,)
        term = advmask.lafa(z_clean, z_adv, p_own)
        objective = loss + lam * term

        # 5. v <- 0.9 v + 0.1 g / rms(g), then M <- M - gamma_t v / (1 - 0.9^(t + 1))
        gradients = torch.autograd.grad(objective, M)
        rms = nn.utils.get_total_norm(gradients) / math.sqrt(entries)
        rate = gamma[t].item() / (1 - 0.9 ** (t + 1))
        with torch.no_grad():
            for m, v_m, g in zip(M, v, gradients):
                v_m.mul_(0.9).add_(0.1 * g / rms.clamp(min=1e-12))
                m.sub_(rate * v_m)

        if (t + 1) % 50 == 0 or t + 1 == steps:
            right = 100 * (logits_adv.argmax(1) == y).float().mean()
            print(
                f"step {t + 1}/{steps}  contrastive {loss:.3f}  lafa term {term:.4f}  "
                f"own caption first in the batch {right:.0f} %  "
                f"off {100 * advmask.share_off(masks):.2f} %  {time.time() - started:.0f} s",
                flush=True,
            )


def train_weights(classifier, weights, batches, steps, eps, lr):
    """AdamW on a list of parameters: AdvLoRA's factors, or the weights of the image tower.

    batches yields (x, tokens) `steps` times. As in advlora.train, but for the loss.
    """
    started = time.time()
    optimizer = torch.optim.AdamW(weights, lr, weight_decay=0)
    # the rate falls by a cosine from lr towards 0
    decay = 0.5 * (1 + torch.cos(math.pi * torch.arange(steps) / steps))

    for t, (x, tokens) in enumerate(batches):
        # 1. t_j / |t_j|: the captions of the batch are the classes, and image i is of class i
        classifier.tokens = tokens
        classifier.text = classifier.encode_classes()  # (b, d), with a gradient if it is adapted
        y = torch.arange(len(x), device=x.device)

        # 2. the inner maximisation: raise the image-to-text loss, two steps of size eps
        x_adv = advlora.pgd(classifier, x, y, eps, step=eps, steps=2)

        # 3. L(x~)
        logits_adv = classifier(x_adv)  # (b, b)
        loss = contrastive(logits_adv)

        # 4. a step of AdamW at the rate of the cosine
        gradients = torch.autograd.grad(loss, weights)
        for p, gradient in zip(weights, gradients):
            p.grad = gradient
        optimizer.param_groups[0]["lr"] = lr * decay[t].item()
        optimizer.step()

        if (t + 1) % 50 == 0 or t + 1 == steps:
            right = 100 * (logits_adv.argmax(1) == y).float().mean()
            print(
                f"step {t + 1}/{steps}  contrastive {loss:.3f}  "
                f"own caption first in the batch {right:.0f} %  {time.time() - started:.0f} s",
                flush=True,
            )


def adapt(method, classifier, batches, args):
    """Adapt a classifier in place, AdvLoRA in both towers -> numbers trained.

    All else is as the method's program has it by default.
    """
    clip = classifier.clip
    if method == "advmask":
        lam = 150 if args.model == "tiny" else 50
        budget = min(max(args.steps / 100, 1.5), 3)
        masks = advmask.attach(clip, advmask.vision_weights(clip))
        train_masks(classifier, masks, batches, args.steps, args.eps, lam, budget)
        advmask.merge(clip, masks)
        return sum(mask.M.numel() for mask in masks.values())
    if method == "advlora":
        loras = advlora.attach(clip, advlora.clip_weights(clip, towers="both"), seed=args.seed)
        factors = [p for lora in loras.values() for p in lora.parameters()]
        train_weights(classifier, factors, batches, args.steps, args.eps, lr=1e-3)
        advlora.merge(clip, loras)
        return sum(p.numel() for p in factors)
    if method == "full":
        weights = list(clip.visual.requires_grad_(True).parameters())
        train_weights(classifier, weights, batches, args.steps, args.eps, lr=3e-4)
        clip.visual.requires_grad_(False)
        return sum(p.numel() for p in weights)
    raise ValueError(f"method {method!r} is unknown; expected one of {', '.join(METHODS)}")


# ------------------------------------------------------------------------------------------------
# The program
# ------------------------------------------------------------------------------------------------


def arguments():
    """The program's argument parser."""
    parser = common.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    root = "folder of the data, with flickr8k in it"
    add("--data-root", type=pathlib.Path, default=pathlib.Path("data"), help=root)
    methods = "the methods to compare; default all of them"
    names = list(METHODS)
    add("--method", dest="methods", nargs="+", default=names, choices=names, help=methods)
    pairs = "training images, each with one random caption an epoch (our choice)"
    add("--pairs", type=common.at_least(2), default=500, help=pairs)
    steps = "training steps of every method (our choice)"
    add("--steps", type=common.at_least(1), default=100, help=steps)
    batch = "pairs of a training step; evaluation takes four times as many images at once"
    add("--batch-size", type=common.at_least(2), default=32, help=batch)
    eps = f"l_inf radius in pixels; default 1/255, and {round(255 * common.TINY_EPS)}/255 for tiny"
    add("--eps", type=common.fraction, help=f"{eps} (our choice)")
    test_steps = "PGD steps of the test attack, after which the recalls are measured"
    add("--test-steps", nargs="+", type=common.at_least(1), default=[20, 100], help=test_steps)
    limit = "attack and search so many test images, a fixed random choice"
    add("--test-limit", type=common.at_least(1), default=200, help=limit)
    seed = "of the choice of pairs and of the training"
    add("--seed", type=common.at_least(0), default=1, help=seed)
    add("--model", default="tiny", help="tiny, an open_clip name, or local-dir:DIR")
    weights = "open_clip's tag, a checkpoint file, or none for random weights"
    add("--pretrained", default="openai", help=weights)
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    dtype = "auto: bfloat16 where it is the faster, else float32"
    add("--dtype", default="auto", choices=dtypes, help=dtype)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    add("--out", type=pathlib.Path, default=pathlib.Path("runs"), help="folder of the results")
    # what common asks for, and this program has no argument for
    parser.set_defaults(dataset="flickr8k", transfer=[], load=None, export=None)
    return parser


def print_table(rows):
    """Print {name: result}: both directions, clean and under every attack, and what was trained."""
    columns = f"{'R@1':>6} {'R@5':>6} {'R@10':>6}"
    print(f"\n{'':25} | {'image to text':45} | text to image")
    print(f"{'':25} | {columns} (95 % interval)  median | {columns} median")
    for name, row in rows.items():
        settings = {"clean": row["clean"]}
        for count, result in row["pgd"].items():
            settings[f"PGD-{count}"] = result
        for setting, result in settings.items():
            cells = [f"{f'{name}, {setting}':25}"]
            for direction in DIRECTIONS:
                numbers = result[direction]
                cell = " ".join(f"{numbers[f'R@{k}']:6.2f}" for k in RECALLS)
                if direction == "image_to_text":
                    low, high = result["interval"]
                    cell += f" ({low:5.1f} to {high:5.1f})"
                cells.append(f"{cell} {numbers['median']:6.1f}")
            print(" | ".join(cells))
    for name, row in rows.items():
        if row["trained"]:
            seconds = row["training_seconds"]
            print(f"{name}: {row['trained']:,} numbers trained in {seconds:.0f} s")


def main():
    started = time.time()
    args = common.parse(arguments())
    # a run's folder tells how many training images it had
    shots = argparse.Namespace(**vars(args), shots=args.pairs)
    folder = common.run_folder(shots, "retrieval")

    # the training pairs, the test images, and what is said of them
    train, test = read_flickr8k(args.data_root)
    if args.pairs > len(train):
        raise common.Fault(f"--pairs {args.pairs}: the training list has {len(train)} images")
    if len(test) < 2:
        raise common.Fault(f"the test list has {len(test)} images; expected at least 2 to search")
    train = random.Random(args.seed).sample(train, args.pairs)
    queries = random.Random(0).sample(range(len(test)), min(args.test_limit, len(test)))
    queries = torch.tensor(queries)
    captions, owner = [], []
    for i, photograph in enumerate(test):
        captions += photograph.captions
        owner += [i] * len(photograph.captions)
    owner = torch.tensor(owner)

    # CLIP, frozen, with the test captions as classes
    clip, config = common.load_clip(args.model, args.pretrained, args.device)
    if "advlora" in args.methods and not hasattr(clip, "transformer"):
        raise common.Fault("this model has no text transformer to adapt; use --method advmask full")
    classifier = common.Classifier(clip, config, captions, "{}", args.dtype)
    pictures = decode(train, classifier.size, "crop")
    images = torch.stack([pixels for pixels, _ in decode(test, classifier.size, "none")])
    tokenizer = common.tokenizer_of(config)
    tokens = [tokenizer(photograph.captions) for photograph in train]
    print(
        f"{args.model} on flickr8k: {len(train)} training images, {classifier.size} px, "
        f"eps {255 * args.eps:g}/255, {args.dtype} on {args.device}\n"
        f"{len(queries)} of {len(test)} test images are attacked, {len(captions)} captions",
        flush=True,
    )

    # what CLIP can do as it is
    rows = {"zero-shot": measure(classifier, images, captions, owner, queries, args)}
    rows["zero-shot"].update(trained=0, training_seconds=0.0)

    # every method starts from it, and from the same random state
    for method, name in METHODS.items():
        if method not in args.methods:
            continue
        print(f"\n{name}")
        adapted = copy.deepcopy(classifier)
        torch.manual_seed(args.seed)
        batches = pair_batches(
            pictures, tokens, classifier.size, args.batch_size, args.steps, args.device
        )
        began = time.time()
        trained = adapt(method, adapted, batches, args)
        seconds = round(time.time() - began, 1)
        rows[name] = measure(adapted, images, captions, owner, queries, args)
        rows[name].update(trained=trained, training_seconds=seconds)

    print_table(rows)
    training = sum(row["training_seconds"] for row in rows.values())
    common.save_run(
        folder,
        args,
        "retrieval",
        test_images=len(test),
        captions=len(captions),
        rows=rows,
        training_seconds=round(training, 1),
        seconds=round(time.time() - started, 1),
    )
    common.print_end(folder, args, started, training)


if __name__ == "__main__":
    common.guard(main)
