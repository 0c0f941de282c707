"""AdvVLP, AdvMaPLe and FAP: deep prompts in both towers of CLIP, learned on attacked images.

Papers: FAP is "Few-Shot Adversarial Prompt Learning on Vision-Language Models", NeurIPS 2024,
https://arxiv.org/abs/2403.14774; AdvVLP and AdvMaPLe are its rivals there. Learned words are
CoOp's, IJCV 2022, https://arxiv.org/abs/2109.01134; deep prompts that one tower gets from the other
are MaPLe's, CVPR 2023, https://arxiv.org/abs/2210.03117. This is an independent implementation.

    python -m baselines.prompts --method fap                        # small CLIP, embedded data
    python -m baselines.prompts --method advvlp --published         # the published optimiser, rate
    python -m baselines.prompts --method advmaple --dataset caltech101 --shots 16    # ViT-B/32, GPU

CLIP is frozen. In front of each of the first blocks of both towers stand n learned tokens: t_l in
the text tower, v_l in the image tower. The methods differ in where these come from and in the loss.

    AdvVLP     t_l and v_l are learned                       CE(f(x~), y)
    AdvMaPLe   t_l is learned, v_l = F_l t_l                 CE(f(x~), y)
    FAP        t_1 is learned, v_1 = F_1 t_1; where l > 1    CE(f(x), y) + 1.5 mean_i
               v_l is learned, t_l = G_l v_l                 (cos(z_i, z~_i) + 1) KL(P_i || P~_i)

    x~ = x + argmax over |delta|_inf <= eps of CE(f(x + delta), y), for FAP of KL(P || P~)

F_l and G_l are linear maps with a bias, z the image's features, P the class probabilities, ~ marks
the attacked image. The t stand at the places 1..n, behind the start token, in place of the
template's first words, with which t_1 starts; class names and the rest stay. The v stand behind the
patches and have no position. As in FAP's code v_1 passes the image tower's first norm, ln_pre, with
the patches, and the last v stay through the blocks that follow. Published are n = 2 and 9 blocks of
12; the small CLIP has 4 text blocks, so prompts stand in front of 4 (our choice). AdvMaPLe's maps
are MaPLe's (our choice: in FAP's code it has those of FAP). Every map is drawn by itself, and class
names stand in the template (our choices: FAP's code copies one map, and writes names behind the
template, as in "a photo of a {}. dog.").

Trained on ViT-B/32, with n tokens, L blocks, and widths d_t = 512 and d_v = 768: AdvVLP
L n (d_t + d_v) = 23,040; AdvMaPLe L (n d_t + d_t d_v + d_v) = 3,555,072; FAP
n d_t + d_t d_v + d_v + (L - 1) (n d_v + d_v d_t + d_t) = 3,557,120.

Published are SGD, momentum 0.9, weight decay 5e-4, one epoch at 1e-5, then a cosine from 0.0035, 10
epochs in all, batches of 4 and no augmentation (--published --batch-size 4 --augment none). FAP's
code lowers the rate once an epoch, to a tenth in the end, this one in every step, to 0 (our
choice). The default is AdamW with 3e-3, and with 1e-2 for FAP (our choice, on val:
results/CHOICES.md).

Evidence, on the small CLIP: 16 shots, eps 3/255, PGD-100, seeds 1-3, clean / robust. Embedded data,
zero-shot 82.0 / 6.0: AdvVLP 72.2 +- 3.7 / 16.0 +- 1.3, AdvMaPLe 70.5 +- 4.1 / 15.5 +- 1.8, FAP 73.7
+- 3.1 / 11.7 +- 1.5. 500 images of Caltech101, zero-shot 64.0 / 4.8: AdvVLP 41.6 +- 7.6 / 6.1 +-
2.5, AdvMaPLe 46.6 +- 0.6 / 8.4 +- 1.5, FAP 53.8 +- 1.4 / 6.9 +- 0.3. ViT-B/32 with CLIP's weights
has not been run here.
"""

import math
import time

import torch
import torch.nn.functional as F
from torch import nn

import common

# ------------------------------------------------------------------------------------------------
# The method: pieces to copy. They need torch alone, `attach` and `features` a model of open_clip
# ------------------------------------------------------------------------------------------------


class Prompts(nn.Module):
    """n tokens for each of the first `depth` blocks of a text and of an image tower.

    words (n, d_t): where t_1 starts. width: d_v, of the image tower. All else starts at
    N(0, 0.02^2), and maps as torch's linear layers do. Raises ValueError where the method is not
    advvlp, advmaple or fap.
    """

    def __init__(self, method, words, width, depth):
        super().__init__()
        # in so many blocks, the first ones, t is learned; in so many v is a map of t
        learned_t = {"advvlp": depth, "advmaple": depth, "fap": 1}
        mapped_v = {"advvlp": 0, "advmaple": depth, "fap": 1}
        if method not in learned_t:
            raise ValueError(f"method {method!r} is unknown; expected advvlp, advmaple or fap")
        n, d_t = words.shape
        self.depth = depth
        self.t, self.v = nn.ParameterList(), nn.ParameterList()
        self.v_of_t, self.t_of_v = nn.ModuleList(), nn.ModuleList()
        for block in range(depth):
            if block == 0:
                self.t.append(words.detach().clone())
            elif block < learned_t[method]:
                self.t.append(0.02 * torch.randn(n, d_t))
            else:
                self.t_of_v.append(nn.Linear(width, d_t))
            if block < mapped_v[method]:
                self.v_of_t.append(nn.Linear(d_t, width))
            else:
                self.v.append(0.02 * torch.randn(n, width))
        self.to(words.device, words.dtype).eval()

    def text(self, block):
        """t of a block, counted from 0   (n, d_t)"""
        if block < len(self.t):
            return self.t[block]
        return self.t_of_v[block - len(self.t)](self.vision(block))

    def vision(self, block):
        """v of a block, counted from 0   (n, d_v)"""
        if block < len(self.v_of_t):
            return self.v_of_t[block](self.t[block])
        return self.v[block - len(self.v_of_t)]


def put(tokens, prompt, place, batch_first):
    """Put a prompt (n, d) in place of the tokens `place`, `place` + 1, ...; append it at the end.

    tokens are (b, l, d), or (l, b, d) where not batch_first.
    """
    n = len(prompt)
    prompt = prompt.to(tokens.dtype)
    if batch_first:
        prompt = prompt.expand(len(tokens), -1, -1)  # (b, n, d)
        return torch.cat([tokens[:, :place], prompt, tokens[:, place + n :]], 1)
    prompt = prompt[:, None].expand(-1, tokens.shape[1], -1)  # (n, b, d)
    return torch.cat([tokens[:place], prompt, tokens[place + n :]], 0)


def attach(clip, prompts):
    """Put Prompts into an open_clip model by hooks -> their handles, for `detach`.

    t_1 takes the place of embedded words, and gets their positions. v_1 is appended to the patches
    in front of ln_pre. Deeper prompts take the places of the former block's. Behind the last block
    the v are dropped, so that CLIP pools what it always does. Raises ValueError where a tower has
    too few blocks.
    """
    towers = clip.visual.transformer, clip.transformer
    blocks = min(len(tower.resblocks) for tower in towers)
    if prompts.depth > blocks:
        raise ValueError(f"{prompts.depth} blocks of prompts do not fit; expected at most {blocks}")
    end = len(clip.visual.positional_embedding)  # CLS and the patches
    handles = []
    # only blocks may run tokens first; ln_pre and the whole transformer see (b, tokens, d)

    def embedded(embedding, inputs, output):
        return put(output, prompts.text(0), 1, True)

    def with_patches(ln_pre, inputs):
        return put(inputs[0], prompts.vision(0), end, True)

    def drop(transformer, inputs, output):
        return output[:, :end]  # (b, tokens, d)

    def in_front(tower, block, prompt, place):
        def hook(module, inputs):
            return put(inputs[0], prompt(block), place, tower.batch_first)

        handles.append(tower.resblocks[block].register_forward_pre_hook(hook))

    handles.append(clip.token_embedding.register_forward_hook(embedded))
    handles.append(clip.visual.ln_pre.register_forward_pre_hook(with_patches))
    handles.append(clip.visual.transformer.register_forward_hook(drop))
    for block in range(1, prompts.depth):
        in_front(clip.visual.transformer, block, prompts.vision, end)
        in_front(clip.transformer, block, prompts.text, 1)
    return handles


def detach(handles):
    """Take the prompts off the model again."""
    for handle in handles:
        handle.remove()


def make_room(template, n):
    """A template with at least n words in front of the class name, which prompts can replace.

    Where there are fewer, "a photo of a" comes first (our choice): room for four.
    """
    words = template.partition("{}")[0].split()
    return template if len(words) >= n else f"a photo of a {template}"


def pgd(classifier, x, y, eps, step, steps, kl=False):
    """The inner maximisation: x (b, 3, h, w) in [0, 1], y (b,) -> x~.

    Madry et al. 2018: delta_0 ~ U(-eps, eps), delta <- clip(delta + step sign(grad L), -eps, eps),
    x + delta clipped to [0, 1]. L is CE, or KL(P || P~). eps and step are in units of x: 1/255, not
    1. Raises ValueError in train mode, FloatingPointError where the gradient is not finite.
    """
    if classifier.training:
        raise ValueError("attack the network that is deployed: eval mode")
    if kl:
        with torch.no_grad():
            log_p = F.log_softmax(classifier(x), -1)
    delta = torch.empty_like(x).uniform_(-eps, eps)
    delta = (x + delta).clamp(0, 1) - x
    for _ in range(steps):
        delta.requires_grad_()
        logits = classifier(x + delta)
        # the sum, not the mean: one image's gradient must not depend on the batch size
        if kl:
            log_q = F.log_softmax(logits, -1)
            loss = F.kl_div(log_q, log_p, log_target=True, reduction="sum")
        else:
            loss = F.cross_entropy(logits, y, reduction="sum")
        # towards delta alone: no gradients of prompts are computed
        (grad,) = torch.autograd.grad(loss, delta)
        if not torch.isfinite(grad).all():
            raise FloatingPointError("the gradient of the attack is not finite")
        delta = (delta.detach() + step * grad.sign()).clamp(-eps, eps)
        delta = (x + delta).clamp(0, 1) - x
    assert delta.abs().max() <= eps + 1e-6, "the attack left the ball; was x in [0, 1]?"
    return x + delta


def features(classifier, x):
    """-> z (b, d), the image's features; logits (b, classes).

    classifier.clip is the open_clip model inside the classifier.
    """
    outputs = []

    def record(visual, inputs, output):
        outputs.append(output)

    hook = classifier.clip.visual.register_forward_hook(record)
    try:
        logits = classifier(x)
    finally:
        hook.remove()
    return outputs[0].to(logits.dtype), logits


def consistency(z_clean, z_adv, logits_clean, logits_adv):
    """FAP's second term -> scalar. z (b, d), logits (b, classes); both sides have gradients.

    mean_i (cos(z_i, z~_i) + 1) KL(P_i || P~_i). The outputs are pulled together; the factor, as in
    FAP, lets the features differ.
    """
    log_p = F.log_softmax(logits_clean, -1)
    log_q = F.log_softmax(logits_adv, -1)
    divergence = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)  # (b,)
    cosine = F.cosine_similarity(z_clean, z_adv, dim=-1)  # (b,)
    return ((cosine + 1) * divergence).mean()


# ------------------------------------------------------------------------------------------------
# The loop
# ------------------------------------------------------------------------------------------------


def train(
    classifier,
    prompts,
    batches,
    steps,
    eps,
    method="fap",
    lr=1e-2,
    published=False,
    warmup=0,
    lam=1.5,
):
    """Train the Prompts in place. batches yields (x, y) `steps` times.

    classifier: pixels in [0, 1] -> logits, in eval mode, with the prompts in it;
    classifier.encode_classes() gives its text features, classifier.text holds them. method: advvlp
    and advmaple have the same loss, fap another. lr: RATES has the program's. lam: the weight of
    FAP's second term. published: SGD with momentum 0.9 and weight decay 5e-4, the first `warmup`
    steps at a rate of 1e-5, else AdamW without weight decay.
    """
    started = time.time()
    weights = list(prompts.parameters())
    if published:
        optimizer = torch.optim.SGD(weights, lr, momentum=0.9, weight_decay=5e-4)
    else:
        optimizer = torch.optim.AdamW(weights, lr, weight_decay=0)
    # after the warm-up the rate falls by a cosine from lr towards 0
    passed = torch.arange(steps) - warmup
    rates = lr * 0.5 * (1 + torch.cos(math.pi * passed / max(1, steps - warmup)))
    rates[:warmup] = min(1e-5, lr)

    for t, (x, y) in enumerate(batches):
        # 1. the class features, by the prompts as they are now: t_c / |t_c|
        classifier.text = classifier.encode_classes()  # (classes, d)

        # 2. the inner maximisation: attack the current network, two steps of size eps
        x_adv = pgd(classifier, x, y, eps, step=eps, steps=2, kl=method == "fap")

        # 3. L = CE(f(x~), y), and FAP's CE(f(x), y) + lambda * consistency
        z_adv, logits_adv = features(classifier, x_adv)
        term = torch.zeros((), device=x.device)
        if method == "fap":
            z_clean, logits_clean = features(classifier, x)
            kind = "clean ce"
            ce = F.cross_entropy(logits_clean, y)
            term = consistency(z_clean, z_adv, logits_clean, logits_adv)
        else:
            kind = "ce"
            ce = F.cross_entropy(logits_adv, y)
        objective = ce + lam * term

        # 4. gradients of the prompts and their maps alone
        gradients = torch.autograd.grad(objective, weights)

        # 5. a step of the optimiser at the rate of the cosine
        for p, gradient in zip(weights, gradients):
            p.grad = gradient
        optimizer.param_groups[0]["lr"] = rates[t].item()
        optimizer.step()

        if (t + 1) % 50 == 0 or t + 1 == steps:
            right = 100 * (logits_adv.argmax(1) == y).float().mean()
            print(
                f"step {t + 1}/{steps}  {kind} {ce:.3f}  consistency {term:.3f}  "
                f"adv acc of the batch {right:.0f} %  {time.time() - started:.0f} s",
                flush=True,
            )

    # the text features of the prompts as they are in the end, a constant again
    with torch.no_grad():
        classifier.text = classifier.encode_classes()


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------

NEEDS = "variant", "length", "depth"
TITLES = {"advvlp": "AdvVLP", "advmaple": "AdvMaPLe", "fap": "FAP"}
RATES = {"advvlp": 3e-3, "advmaple": 3e-3, "fap": 1e-2}  # our choice


def load(folder, device="cpu", dtype="float32"):
    """The prompted classifier of a finished run: pixels (b, 3, h, w) in [0, 1] -> logits.

    `folder` holds adapter.safetensors; the classes are those of the run, and set_classes puts the
    prompts around others. Raises common.Fault, an exception with one sentence.
    """
    tensors, facts = common.load_adapter(folder, "prompts", NEEDS)
    classifier = common.adapted_classifier(facts, device, dtype)
    restore(classifier, tensors, facts)
    return classifier


def variant(facts):
    """-> method, length, depth, as an adapter file says. Raises common.Fault."""
    try:
        length, depth = int(facts["length"]), int(facts["depth"])
    except ValueError:
        length = depth = 0
    if facts["variant"] not in TITLES or length < 1 or depth < 1:
        found = f"method {facts['variant']!r}, length {facts['length']}, depth {facts['depth']}"
        raise common.Fault(
            f"the adapter was made with {found}; expected one that this program saved"
        )
    return facts["variant"], length, depth


def restore(classifier, tensors, facts):
    """Prompt a classifier's CLIP as an adapter file says -> the Prompts. Raises common.Fault."""
    clip = classifier.clip
    embedding, width = clip.token_embedding.weight, clip.visual.transformer.width
    method, length, depth = variant(facts)
    try:
        prompts = Prompts(method, embedding.new_zeros(length, embedding.shape[1]), width, depth)
        prompts.load_state_dict(tensors)
        attach(clip, prompts.requires_grad_(False))
    except (ValueError, RuntimeError):
        raise common.Fault("the adapter does not fit; use the --model it was made with")
    classifier.prompts = prompts
    classifier.set_classes(classifier.classes, classifier.template)  # through the prompts
    return prompts


# ------------------------------------------------------------------------------------------------
# The program
# ------------------------------------------------------------------------------------------------


def arguments():
    """The program's argument parser."""
    parser = common.Parser(description=__doc__.split("\n")[0])
    common.add_arguments(parser)
    add = parser.add_argument
    method = "where the prompts come from, and the loss: see the top of this file"
    add("--method", dest="variant", default="fap", choices=list(TITLES), help=method)
    length = "n, the tokens of a prompt"
    add("--length", type=int, default=2, choices=[1, 2, 3, 4], help=length)
    depth = "prompts stand in front of so many blocks; default 9, or all of the shorter tower"
    add("--depth", type=common.at_least(1), help=depth)
    lam = "weight of FAP's second term"
    add("--lam", type=common.at_least(0, float), default=1.5, help=lam)
    published = "the published recipe: SGD, 0.0035 as the rate, 10 epochs"
    add("--published", action="store_true", help=published)
    steps = "training steps; default 4 epochs, but 100 or more (our choice); --published: 10 epochs"
    add("--steps", type=common.at_least(1), help=steps)
    lr = "first rate; default 3e-3, fap 1e-2 (our choice), and 0.0035 with --published"
    add("--lr", type=common.at_least(0, float), help=lr)
    return parser


def main():
    started = time.time()
    args = common.parse(arguments())
    if args.export:
        raise common.Fault("--export is refused: an open_clip model holds no prompts; use --load")
    if args.load:
        tensors, facts = common.load_adapter(args.load, "prompts", NEEDS)
        common.check_model(facts, args)
        args.variant, args.length, args.depth = variant(facts)
    folder = common.run_folder(args, args.variant)

    # CLIP, frozen, as a classifier; the few-shot images; the test sets
    classifier, images, tests = common.prepare(args)
    clip = classifier.clip
    if not hasattr(clip, "transformer"):
        raise common.Fault("this model has no text transformer for prompts; use another --model")
    blocks = min(len(clip.visual.transformer.resblocks), len(clip.transformer.resblocks))
    if args.depth is None:
        args.depth = min(9, blocks)
    if args.depth > blocks:
        raise common.Fault(f"--depth {args.depth} does not fit; expected at most {blocks}")
    epoch = math.ceil(len(images) / args.batch_size)
    if args.steps is None:
        args.steps = 10 * epoch if args.published else max(100, 4 * epoch)
    if args.lr is None:
        args.lr = 0.0035 if args.published else RATES[args.variant]
    # the test sets with templates that have words for the prompts to replace
    prompted = {}
    for name, (data, views) in tests.items():
        prompted[name] = data._replace(template=make_room(data.template, args.length)), views

    before, seconds = None, 0.0  # with --load nothing is measured before, nor trained
    if args.load:
        prompts = restore(classifier, tensors, facts)
    else:
        # what CLIP can do as it is
        before = common.measure(classifier, tests, args)
        print(f"zero-shot: clean {before['clean']:.2f}, PGD-{args.test_steps} {before['pgd']:.2f}")

        # put the prompts in place of the template's first words, train, save, freeze
        classifier.set_classes(classifier.classes, prompted[args.dataset][0].template)
        words = clip.token_embedding(classifier.tokens[0, 1 : 1 + args.length])
        prompts = Prompts(args.variant, words, clip.visual.transformer.width, args.depth)
        attach(clip, prompts)
        classifier.prompts = prompts
        print(f"{args.steps} steps, {'SGD' if args.published else 'AdamW'}, lr {args.lr:g}")
        batches = common.batches(
            images, classifier.size, args.batch_size, args.steps, args.augment, args.device
        )
        began = time.time()
        train(
            classifier,
            prompts,
            batches,
            args.steps,
            args.eps,
            args.variant,
            args.lr,
            args.published,
            epoch if args.published else 0,
            args.lam,
        )
        seconds = time.time() - began
        prompts.requires_grad_(False)
        common.save_adapter(folder, prompts.state_dict(), classifier, args, "prompts")

    trained = sum(p.numel() for p in prompts.parameters())
    print(f"trained {trained:,} numbers in {args.depth} blocks beside {common.sizes(clip)}")

    # what the prompted CLIP can do
    after = common.measure(classifier, prompted, args)
    title = TITLES[args.variant]
    common.print_table([("zero-shot", before), (title, after)], args.test_steps)
    common.save_run(
        folder,
        args,
        "prompts",
        before=before,
        after=after,
        trained=trained,
        training_seconds=round(seconds, 1),
        seconds=round(time.time() - started, 1),
    )
    common.print_end(folder, args, started, seconds)


if __name__ == "__main__":
    common.guard(main)
