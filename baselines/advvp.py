"""AdvVP: visual prompting under attack. A frame around the image and a few tokens are learned.

Papers: visual prompting is "Exploring Visual Prompts for Adapting Large-Scale Models", arXiv
2203.17274. Trained on attacked images it is the smaller method of TeCoA's paper, ICLR 2023,
https://openreview.net/forum?id=P4bXCawRi5J, and a rival in FAP's, NeurIPS 2024,
https://arxiv.org/abs/2403.14774. This is an independent implementation.

    python -m baselines.advvp                                      # small CLIP, embedded data
    python -m baselines.advvp --published                          # the published optimiser, rate
    python -m baselines.advvp --dataset caltech101 --shots 16      # OpenAI ViT-B/32, a GPU

    min over v, u  E[ CE(f_{v,u}(x~), y) ]
    x~ = x + argmax over |delta|_inf <= eps of CE(f_{v,u}(x + delta), y)

CLIP is frozen. v, 30 pixels wide at an image of 224, is added to the image after CLIP's own
normalisation; on other sizes its width is 30/224 of the image's, rounded: 9 on the small CLIP. u
are 5 tokens that stand behind those of the patches, and pass the image tower's first norm, ln_pre,
with them. Both belong to the network: every attack and every evaluation sees them. (The code of
FAP's study trains with the frame, and evaluates without it.) u starts at N(0, 1), as published, so
a fresh prompt changes some answers already: notebook 6 counts them. v starts at N(0, 1) with
--published, else at 0 (our choice).

With image h, frame w, n tokens of width d, 3 (h^2 - (h - 2 w)^2) + n d numbers are trained: 73,680
on ViT-B/32.

Published are, in FAP's study, SGD, momentum 0.9, weight decay 5e-4, 40 as the rate, a cosine, 10
epochs, batches of 4 and no augmentation (--published --batch-size 4 --augment none). Its code
lowers the rate once an epoch, this one in every step (our choice). The default is AdamW with 3e-3
(our choice: on val no rate of AdamW wins robustness, and on Caltech101 this one keeps most clean
accuracy). On the small CLIP the published recipe is better on the embedded data, and loses much on
Caltech101: results/CHOICES.md.

Evidence, on the small CLIP: 16 shots, eps 3/255, PGD-100, seeds 1-3. Embedded data: clean 82.0 ->
56.8 +- 3.8, robust 6.0 -> 4.7 +- 0.6. 500 images of Caltech101: clean 64.0 -> 55.3 +- 1.0, robust
4.8 -> 3.7 +- 0.2. So it loses clean accuracy and wins nothing. ViT-B/32 with CLIP's weights has not
been run here.
"""

import math
import time

import torch
import torch.nn.functional as F
from torch import nn

import common

# ------------------------------------------------------------------------------------------------
# The method: pieces to copy. They need torch alone, and `attach` a model of open_clip
# ------------------------------------------------------------------------------------------------


class VisualPrompt(nn.Module):
    """A frame v of `frame` pixels for images (3, size, size), and n tokens u of a width.

    v starts at N(0, spread^2), u at N(0, 1); published is a spread of 1. Raises ValueError where
    the frame is wider than half the image.
    """

    def __init__(self, size, frame, n, width, spread=1.0):
        super().__init__()
        if not 0 <= 2 * frame <= size:
            raise ValueError(f"a frame of {frame} pixels does not fit an image of {size}")
        border = torch.ones(size, size, dtype=torch.bool)
        border[frame : size - frame, frame : size - frame] = False
        self.register_buffer("border", border, persistent=False)
        self.v = nn.Parameter(spread * torch.randn(3, int(border.sum())))
        self.u = nn.Parameter(torch.randn(n, width))
        self.eval()

    def add_frame(self, x):
        """x (b, 3, size, size) -> x + v on the frame, x inside it."""
        picture = torch.zeros(x.shape[1:], dtype=x.dtype, device=x.device)
        picture[:, self.border] = self.v.to(x.dtype)
        return x + picture

    def append_tokens(self, tokens):
        """(b, l, d) -> (b, l + n, d)"""
        u = self.u.to(tokens.dtype)
        return torch.cat([tokens, u.expand(len(tokens), -1, -1)], 1)


def attach(clip, prompt):
    """Put a VisualPrompt into an open_clip model by hooks -> their handles, for `detach`.

    The frame is added to what the image tower gets, that is after the normalisation. The tokens are
    appended to the patches in front of ln_pre, have no position embedding, and are dropped behind
    the last block, so that CLIP pools what it always does.
    """
    visual = clip.visual
    end = len(visual.positional_embedding)  # CLS and the patches

    def add(module, inputs):
        return prompt.add_frame(inputs[0])

    def append(ln_pre, inputs):
        return prompt.append_tokens(inputs[0])

    def drop(transformer, inputs, output):
        return output[:, :end]  # (b, tokens, d)

    return [
        visual.register_forward_pre_hook(add),
        visual.ln_pre.register_forward_pre_hook(append),
        visual.transformer.register_forward_hook(drop),
    ]


def detach(handles):
    """Take the prompt off the model again."""
    for handle in handles:
        handle.remove()


def pgd(classifier, x, y, eps, step, steps):
    """The inner maximisation: x (b, 3, h, w) in [0, 1], y (b,) -> x~.

    Madry et al. 2018: delta_0 ~ U(-eps, eps), delta <- clip(delta + step sign(grad CE), -eps, eps),
    x + delta clipped to [0, 1]. eps and step are in units of x: 1/255, not 1. Raises ValueError in
    train mode, FloatingPointError where the gradient is not finite.
    """
    if classifier.training:
        raise ValueError("attack the network that is deployed: eval mode")
    delta = torch.empty_like(x).uniform_(-eps, eps)
    delta = (x + delta).clamp(0, 1) - x
    for _ in range(steps):
        delta.requires_grad_()
        # the sum, not the mean: one image's gradient must not depend on the batch size
        loss = F.cross_entropy(classifier(x + delta), y, reduction="sum")
        # towards delta alone: no gradients of the prompt are computed
        (grad,) = torch.autograd.grad(loss, delta)
        if not torch.isfinite(grad).all():
            raise FloatingPointError("the gradient of the attack is not finite")
        delta = (delta.detach() + step * grad.sign()).clamp(-eps, eps)
        delta = (x + delta).clamp(0, 1) - x
    assert delta.abs().max() <= eps + 1e-6, "the attack left the ball; was x in [0, 1]?"
    return x + delta


# ------------------------------------------------------------------------------------------------
# The loop
# ------------------------------------------------------------------------------------------------


def train(classifier, prompt, batches, steps, eps, lr=3e-3, published=False):
    """Train a VisualPrompt in place. batches yields (x, y) `steps` times.

    classifier: pixels in [0, 1] -> logits, in eval mode, with the prompt in it. published: SGD with
    momentum 0.9 and weight decay 5e-4, as in FAP's study, else AdamW without weight decay.
    """
    started = time.time()
    weights = list(prompt.parameters())
    if published:
        optimizer = torch.optim.SGD(weights, lr, momentum=0.9, weight_decay=5e-4)
    else:
        optimizer = torch.optim.AdamW(weights, lr, weight_decay=0)
    # the rate falls by a cosine from lr towards 0
    decay = 0.5 * (1 + torch.cos(math.pi * torch.arange(steps) / steps))

    for t, (x, y) in enumerate(batches):
        # 1. the inner maximisation: attack the current network, two steps of size eps
        x_adv = pgd(classifier, x, y, eps, step=eps, steps=2)

        # 2. L = CE(x~, y)
        logits_adv = classifier(x_adv)
        ce = F.cross_entropy(logits_adv, y)

        # 3. gradients of v and u alone
        gradients = torch.autograd.grad(ce, weights)

        # 4. a step of the optimiser at the rate of the cosine
        for p, gradient in zip(weights, gradients):
            p.grad = gradient
        optimizer.param_groups[0]["lr"] = lr * decay[t].item()
        optimizer.step()

        if (t + 1) % 50 == 0 or t + 1 == steps:
            right = 100 * (logits_adv.argmax(1) == y).float().mean()
            print(
                f"step {t + 1}/{steps}  ce {ce:.3f}  adv acc of the batch {right:.0f} %  "
                f"|v| up to {prompt.v.detach().abs().max():.2f}  {time.time() - started:.0f} s",
                flush=True,
            )


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------

NEEDS = "frame", "tokens"


def load(folder, device="cpu", dtype="float32"):
    """The prompted classifier of a finished run: pixels (b, 3, h, w) in [0, 1] -> logits.

    `folder` holds adapter.safetensors; the classes are those of the run. Raises common.Fault, an
    exception with one sentence.
    """
    tensors, facts = common.load_adapter(folder, "advvp", NEEDS)
    classifier = common.adapted_classifier(facts, device, dtype)
    restore(classifier, tensors, facts)
    return classifier


def variant(facts):
    """-> frame, tokens, as an adapter file says. Raises common.Fault."""
    try:
        return int(facts["frame"]), int(facts["tokens"])
    except ValueError:
        found = f"frame {facts['frame']}, tokens {facts['tokens']}"
        raise common.Fault(
            f"the adapter was made with {found}; expected one that this program saved"
        )


def restore(classifier, tensors, facts):
    """Prompt a classifier's CLIP as an adapter file says -> the prompt. Raises common.Fault."""
    clip = classifier.clip
    frame, tokens = variant(facts)
    try:
        prompt = VisualPrompt(classifier.size, frame, tokens, clip.visual.transformer.width)
        prompt.load_state_dict(tensors)
    except (ValueError, RuntimeError):
        raise common.Fault("the adapter does not fit; use the --model it was made with")
    prompt.requires_grad_(False).to(clip.logit_scale.device)
    attach(clip, prompt)
    classifier.prompt = prompt
    return prompt


# ------------------------------------------------------------------------------------------------
# The program
# ------------------------------------------------------------------------------------------------


def arguments():
    """The program's argument parser."""
    parser = common.Parser(description=__doc__.split("\n")[0])
    common.add_arguments(parser)
    add = parser.add_argument
    frame = "width of the frame in pixels; default 30/224 of the image's width, rounded"
    add("--frame", type=common.at_least(1), help=frame)
    tokens = "learned tokens behind those of the patches"
    add("--tokens", type=common.at_least(0), default=5, help=tokens)
    published = "the published recipe: SGD, 40 as the rate, 10 epochs"
    add("--published", action="store_true", help=published)
    steps = "training steps; default 4 epochs, but 100 or more (our choice); --published: 10 epochs"
    add("--steps", type=common.at_least(1), help=steps)
    lr = "first rate; default 3e-3 (our choice), and 40 with --published"
    add("--lr", type=common.at_least(0, float), help=lr)
    return parser


def main():
    started = time.time()
    args = common.parse(arguments())
    if args.export:
        raise common.Fault("--export is refused: an open_clip model holds no prompt; use --load")
    folder = common.run_folder(args, "advvp")
    if args.load:
        tensors, facts = common.load_adapter(args.load, "advvp", NEEDS)
        common.check_model(facts, args)
        args.frame, args.tokens = variant(facts)

    # CLIP, frozen, as a classifier; the few-shot images; the test sets
    classifier, images, tests = common.prepare(args)
    clip = classifier.clip
    epoch = math.ceil(len(images) / args.batch_size)
    if args.steps is None:
        args.steps = 10 * epoch if args.published else max(100, 4 * epoch)
    if args.lr is None:
        args.lr = 40 if args.published else 3e-3
    if args.frame is None:
        args.frame = round(classifier.size * 30 / 224)
    if 2 * args.frame > classifier.size:
        most = classifier.size // 2
        raise common.Fault(f"--frame {args.frame} does not fit; expected at most {most}")

    before, seconds = None, 0.0  # with --load nothing is measured before, nor trained
    if args.load:
        prompt = restore(classifier, tensors, facts)
    else:
        # what CLIP can do as it is
        before = common.measure(classifier, tests, args)
        print(f"zero-shot: clean {before['clean']:.2f}, PGD-{args.test_steps} {before['pgd']:.2f}")

        # put the prompt in, train, save, freeze
        width = clip.visual.transformer.width
        spread = 1.0 if args.published else 0.0
        prompt = VisualPrompt(classifier.size, args.frame, args.tokens, width, spread)
        attach(clip, prompt.to(args.device))
        classifier.prompt = prompt
        print(f"{args.steps} steps, {'SGD' if args.published else 'AdamW'}, lr {args.lr:g}")
        batches = common.batches(
            images, classifier.size, args.batch_size, args.steps, args.augment, args.device
        )
        began = time.time()
        train(classifier, prompt, batches, args.steps, args.eps, args.lr, args.published)
        seconds = time.time() - began
        prompt.requires_grad_(False)
        common.save_adapter(folder, prompt.state_dict(), classifier, args, "advvp")

    trained = sum(p.numel() for p in prompt.parameters())
    print(f"trained {trained:,} numbers beside {common.sizes(clip)}")

    # what the prompted CLIP can do
    after = common.measure(classifier, tests, args)
    common.print_table([("zero-shot", before), ("AdvVP", after)], args.test_steps)
    common.save_run(
        folder,
        args,
        "advvp",
        before=before,
        after=after,
        trained=trained,
        training_seconds=round(seconds, 1),
        seconds=round(time.time() - started, 1),
    )
    common.print_end(folder, args, started, seconds)


if __name__ == "__main__":
    common.guard(main)
