"""Second-guess a finished run: other attacks on the same network, beside the number it printed.

    python results/second_opinion.py runs/advmask-embedded-tiny-16shot-seed1 --restarts 5
    python results/second_opinion.py runs/NAME --step 0.5/255 1/255 2/255    # other step sizes
    python results/second_opinion.py runs/NAME --norm l2 --eps 0.5           # another ball
    python results/second_opinion.py runs/NAME --autoattack 200 --eps-curve
    python results/second_opinion.py exported --dataset caltech101 --eps 3/255
    python results/second_opinion.py tiny                                    # zero-shot

It takes the folder of a run, an exported folder, or a model's name. What is not given, a run's own
arguments say. PGD here is written anew: every image stays to the end, so that there is the
published number, the final iterate, where an image counts as right if the last step leaves it
right. The best iterate is common.evaluate's, where it counts as lost once any iterate breaks it.
"""

import importlib
import io
import json
import pathlib
import random
import sys
import tempfile

import open_clip
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import advlora
import advmask
import common
from baselines import advvp, prompts, tecoa, tgazsr

METHODS = {
    "advmask": advmask,
    "advlora": advlora,
    "tecoa": tecoa,
    "tgazsr": tgazsr,
    "advvp": advvp,
    "prompts": prompts,
}
# the arguments that a run brings along, unless others are given
OWN = "dataset", "classes", "eps", "test_steps", "test_limit", "split", "batch_size", "dtype"
TORCHATTACKS = "pip install scipy && pip install --no-deps torchattacks"


# ------------------------------------------------------------------------------------------------
# PGD to the end
# ------------------------------------------------------------------------------------------------


def lengths(delta):
    """The l2 norm of every image of delta (b, 3, h, w) -> (b, 1, 1, 1)."""
    return delta.flatten(1).norm(dim=1)[:, None, None, None]


def project(delta, norm, eps):
    """The nearest point of the ball |delta| <= eps, image by image."""
    if norm == "linf":
        return delta.clamp(-eps, eps)
    # delta <- delta min(1, eps / |delta|_2)
    return delta * (eps / lengths(delta).clamp(min=1e-12)).clamp(max=1)


def random_start(x, indices, norm, eps, restart=0):
    """A random delta_0 in the ball, x + delta_0 in [0, 1], for images x (b, 3, h, w).

    It belongs to the image's index and to the restart. linf, restart 0: where common.evaluate
    starts. l2: a uniform direction of length eps; in so many dimensions nearly all of the ball is
    near its surface.
    """
    seeds = [restart * 1_000_003 + index for index in indices]
    if norm == "linf":
        return common.random_start(x, seeds, eps)
    noise = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        noise.append(torch.randn(x.shape[1:], generator=generator))
    noise = torch.stack(noise).to(x)
    return (x + eps * noise / lengths(noise)).clamp(0, 1) - x


def check_ball(x, delta, norm, eps):
    """Raises AssertionError unless delta is in the ball, and x + delta a picture."""
    if norm == "linf":
        size = delta.abs().max()
    else:
        size = lengths(delta).max()
    assert size <= eps * (1 + 1e-5) + 1e-6, "left the ball"
    assert 0 <= (x + delta).min() and (x + delta).max() <= 1, "left the pixels' range"


def pgd(net, x, y, start, norm, eps, step, steps):
    """PGD (Madry et al. 2018) from x + start; every image stays -> final (b,), best (b,).

    linf: delta <- clip(delta + step sign(g), -eps, eps). l2: delta + step g / |g|_2, scaled back to
    |delta|_2 <= eps. Then x + delta is clipped to [0, 1]. final: right at the last iterate. best:
    right at every iterate.
    """
    best = torch.ones(len(y), dtype=torch.bool, device=x.device)
    delta = start
    check_ball(x, delta, norm, eps)
    for t in range(steps + 1):
        logits = net(x + delta.requires_grad_())
        final = logits.argmax(1) == y
        best &= final
        if t == steps:
            break
        # the sum, not the mean: one image's gradient must not depend on the others
        loss = F.cross_entropy(logits, y, reduction="sum")
        (grad,) = torch.autograd.grad(loss, delta)
        if not torch.isfinite(grad).all():
            raise FloatingPointError("the gradient of the attack is not finite")
        if norm == "linf":
            move = grad.sign()
        else:
            move = grad / lengths(grad).clamp(min=1e-12)
        delta = project(delta.detach() + step * move, norm, eps)
        delta = (x + delta).clamp(0, 1) - x
        check_ball(x, delta, norm, eps)
    return final, best


# ------------------------------------------------------------------------------------------------
# A whole test set
# ------------------------------------------------------------------------------------------------


def share(right):
    """The share of True, in %."""
    return 100 * right.double().mean().item()


def batches(images, rows, size, device, name):
    """The images `rows` of a Dataset in batches, under a bar -> x in [0, 1], y, their rows."""
    own = torch.Generator()  # the loader must leave the global random numbers alone
    loader = DataLoader(Subset(images, rows), size, generator=own)
    done = 0
    with tqdm(total=len(rows), desc=name, unit="image", disable=None, leave=False) as bar:
        for pixels, y in loader:
            x = common.as_float(pixels).to(device)
            yield x, y.to(device), rows[done : done + len(y)]
            done += len(y)
            bar.update(len(y))


def right_when_clean(net, images, size):
    """-> right (images,) without an attack."""
    device = next(net.parameters()).device
    right = []
    for x, y, _ in batches(images, range(len(images)), size, device, "clean"):
        with torch.no_grad():
            right.append((net(x).argmax(1) == y).cpu())
    return torch.cat(right)


def attack(net, images, rows, norm, eps, step, steps, size, restart=0, name="PGD"):
    """pgd on the images `rows` of a Dataset -> final (rows,), best (rows,)."""
    device = next(net.parameters()).device
    finals, bests = [], []
    for x, y, indices in batches(images, rows, size, device, name):
        start = random_start(x, indices, norm, eps, restart)
        final, best = pgd(net, x, y, start, norm, eps, step, steps)
        finals.append(final.cpu())
        bests.append(best.cpu())
    return torch.cat(finals), torch.cat(bests)


def restarted(net, images, clean, norm, eps, step, steps, restarts, size):
    """PGD from `restarts` random starts -> its numbers, and what it leaves right (images,).

    final: of the first start, on every image, the published protocol. best: right on the clean
    image (clean, (images,)) and at every iterate of the first start. best_of_starts: of all starts.
    """
    rows = range(len(images))
    name = f"PGD-{steps}, start 1"
    final, best = attack(net, images, rows, norm, eps, step, steps, size, 0, name)
    best &= clean
    left = best.clone()
    for restart in range(1, restarts):
        rows = left.nonzero()[:, 0].tolist()  # what is broken stays broken
        if not rows:
            break
        name = f"PGD-{steps}, start {restart + 1}"
        _, again = attack(net, images, rows, norm, eps, step, steps, size, restart, name)
        left[rows] = again
    numbers = {
        "step": step,
        "final": share(final),
        "best": share(best),
        "restarts": restarts,
        "best_of_starts": share(left),
        "intervals": {
            "final": common.interval(final),
            "best": common.interval(best),
            "best_of_starts": common.interval(left),
        },
    }
    return numbers, left


def eps_curve(net, images, clean, norm, eps, size, steps=20):
    """Accuracy at the best iterate of PGD-20 at 0, eps/2, eps, ... -> [[radius, %], ...].

    It ends where it is 0, or where the ball holds every picture. A step is 2.5 radius / 20. What a
    ball breaks, a larger one breaks too.
    """
    everything = 1.0
    if norm == "l2":
        everything = images[0][0].numel() ** 0.5
    rows = clean.nonzero()[:, 0].tolist()
    curve = [[0.0, 100 * len(rows) / len(images)]]
    while rows and curve[-1][0] < everything:
        radius = len(curve) * eps / 2
        step = 2.5 * radius / steps
        name = f"radius {radius:.4g}"
        _, best = attack(net, images, rows, norm, radius, step, steps, size, name=name)
        rows = [row for row, right in zip(rows, best.tolist()) if right]
        curve.append([radius, 100 * len(rows) / len(images)])
    return curve


def draw_curve(curve, norm, title):
    """eps_curve's points -> a PNG, bytes."""
    from matplotlib.figure import Figure

    radii = [radius for radius, _ in curve]
    label = "eps, l2 norm over all pixels"
    if norm == "linf":
        radii = [255 * radius for radius in radii]
        label = "eps in 1/255"
    figure = Figure((5, 3), layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.plot(radii, [accuracy for _, accuracy in curve], "o-", color="#0072B2", markersize=4)
    axes.set(xlabel=label, ylabel="accuracy under PGD-20 [%]", ylim=(-2, 102), title=title)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    return picture.getvalue()


# ------------------------------------------------------------------------------------------------
# AutoAttack
# ------------------------------------------------------------------------------------------------


def load_torchattacks():
    """The package. Raises Fault where it is missing."""
    try:
        return importlib.import_module("torchattacks")
    except ImportError:
        raise common.Fault(f"--autoattack needs torchattacks; install it with: {TORCHATTACKS}")


def four_attacks(net, norm, eps, classes):
    """AutoAttack's attacks -> {name: attack of torchattacks}."""
    torchattacks = load_torchattacks()
    ball = {"norm": {"linf": "Linf", "l2": "L2"}[norm], "eps": eps}
    targets = min(10, classes)
    attacks = {"APGD-CE": torchattacks.APGD(net, steps=100, **ball)}
    if classes > 3:  # the targeted loss compares four logits
        attacks["APGD-T"] = torchattacks.APGDT(net, steps=100, n_classes=targets, **ball)
    attacks["FAB-T"] = torchattacks.FAB(
        net, steps=100, multi_targeted=True, n_classes=targets, **ball
    )
    attacks["Square"] = torchattacks.Square(net, n_queries=5000, **ball)
    return attacks


def autoattack(net, images, clean, norm, eps, n, size):
    """AutoAttack (Croce & Hein 2020) by torchattacks on n fixed images -> dict.

    images: their rows. clean, and what is left in % after 100 steps of APGD-CE, of targeted APGD
    and FAB, and 5,000 queries of Square, one after the other, each on what the others left. Raises
    Fault where torchattacks is missing.
    """
    device = next(net.parameters()).device
    chosen = sorted(random.Random(0).sample(range(len(images)), min(n, len(images))))
    left = [row for row in chosen if clean[row]]
    result = {"images": chosen, "clean": 100 * len(left) / len(chosen)}
    with torch.no_grad():
        classes = net(common.as_float(images[0][0])[None].to(device)).shape[1]
    for name, adversary in four_attacks(net, norm, eps, classes).items():
        survivors = []
        for x, y, rows in batches(images, left, size, device, name):
            with torch.random.fork_rng():  # these attacks seed the global random numbers
                found = adversary(x, y).detach()
            # back into the ball: FAB looks for the nearest error, wherever that is
            delta = project(found - x, norm, eps)
            with torch.no_grad():
                right = net((x + delta).clamp(0, 1)).argmax(1) == y
            survivors += [row for row, kept in zip(rows, right.tolist()) if kept]
        left = survivors
        result[name] = 100 * len(left) / len(chosen)
    return result


# ------------------------------------------------------------------------------------------------
# What is examined
# ------------------------------------------------------------------------------------------------


def find(text):
    """What RUN names -> "run", "export" or "model". Raises Fault."""
    if text == "tiny":  # not the folder of that name: it is no export
        return "model"
    path = pathlib.Path(text)
    if path.suffix == ".safetensors" or (path / "adapter.safetensors").exists():
        return "run"
    if (path / "open_clip_config.json").exists():
        return "export"
    if path.is_dir():
        files = "adapter.safetensors, as a finished run does, nor open_clip_config.json"
        raise common.Fault(f"{path} holds neither {files}, as an export does")
    if text in open_clip.list_models():
        return "model"
    wanted = "expected the folder of a run or of an export, tiny, or a model of open_clip"
    raise common.Fault(f"{text!r} is not there; {wanted}")


def read_facts(path):
    """The metadata of a run's adapter. Raises Fault."""
    _, facts = common.load_adapter(path, None, OWN)
    maker = facts["method"]
    if maker not in METHODS:
        known = ", ".join(METHODS)
        raise common.Fault(f"adapter {path} was made by {maker}; expected one of {known}")
    return facts


def as_arguments(facts):
    """What a run's metadata says, as arguments of this program."""
    words = []
    for name in OWN:
        if facts[name] != "None":
            words += [f"--{name.replace('_', '-')}", facts[name]]
    return words


def load(args, facts, data):
    """-> the classifier that the arguments name, among the classes of `data`. Raises Fault."""
    if facts:
        classifier = METHODS[facts["method"]].load(args.load, args.device, args.dtype)
        template = data.template
        if facts["method"] == "prompts":
            template = prompts.make_room(template, int(facts["length"]))
        classifier.set_classes(data.classes, template)
        return classifier
    clip, config = common.load_clip(args.model, args.pretrained, args.device)
    return common.Classifier(clip, config, data.classes, data.template, args.dtype)


def output(folder):
    """A new file <folder>/second_opinion.json, -2.json, -3.json, ... Raises Fault.

    Tried now, so that what cannot be written fails before the attacks.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as fault:
        why = fault.strerror
        raise common.Fault(f"cannot write to {folder} ({why}); choose another folder with --out")
    path, n = folder / "second_opinion.json", 1
    while path.exists():
        n += 1
        path = folder / f"second_opinion-{n}.json"
    return path


# ------------------------------------------------------------------------------------------------
# The program
# ------------------------------------------------------------------------------------------------


def arguments():
    """The program's argument parser."""
    about = "What a run was made with takes the place of these defaults."
    parser = common.Parser(description=f"{__doc__.splitlines()[0]} {about}")
    add = parser.add_argument
    what = "the folder of a run or of an export, tiny, or a name of open_clip's"
    add("load", metavar="RUN", help=what)
    names = ["embedded", "folder", *common.DATASETS]
    dataset = "test images; default embedded; an export needs it"
    add("--dataset", choices=names, help=dataset)
    add("--data-root", type=pathlib.Path, default=pathlib.Path("data"), help="folder of the data")
    add("--classes", default="all", choices=["all", "base", "new"], help="CoOp's halves, or all")
    add("--split", default="test", choices=["test", "val"], help="which images")
    limit = "so many images, a fixed random choice; default all"
    add("--test-limit", type=common.at_least(1), help=limit)
    add("--norm", default="linf", choices=["linf", "l2"], help="of the ball")
    eps = "radius in pixels; default as in the programs; l2 and an export need it"
    # apart from args.eps, which common.parse takes for an l_inf radius
    add("--eps", type=common.fraction, dest="radius", metavar="EPS", help=eps)
    add("--test-steps", type=common.at_least(1), default=100, help="PGD steps")
    step = "step sizes, an attack each; default 1/255, in an l2 ball 2.5 eps / steps"
    add("--step", type=common.fraction, nargs="+", help=step)
    add("--restarts", type=common.at_least(1), default=1, help="random starts of every attack")
    add("--autoattack", type=common.at_least(1), metavar="N", help="AutoAttack on N fixed images")
    curve = "accuracy under PGD-20 over eps until it is 0, and a picture of it"
    add("--eps-curve", action="store_true", help=curve)
    weights = "of a name of open_clip's: its tag, a checkpoint file, or none"
    add("--pretrained", default="openai", help=weights)
    batch = "a quarter of the images that are attacked at once"
    add("--batch-size", type=common.at_least(1), default=32, help=batch)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="torch device")
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    add("--dtype", default="auto", choices=dtypes, help="as in the programs")
    out = "folder of the results; default the run's or the export's, runs for a name"
    add("--out", type=pathlib.Path, help=out)
    return parser


def parse():
    """-> the arguments, and a run's metadata, which fills in what is not given. Raises Fault."""
    parser = arguments()
    given = parser.parse_args()
    if given.norm == "l2" and given.radius is None:
        raise common.Fault("--norm l2 needs its radius: give --eps, such as 0.5")
    kind = find(given.load)
    path = pathlib.Path(given.load)
    facts = {}
    if kind == "run":
        facts = read_facts(path)
        own = as_arguments(facts)
        model, pretrained = facts["model"], facts["pretrained"]
        folder = path if path.is_dir() else path.parent
    elif kind == "export":
        if given.dataset is None or given.radius is None:
            raise common.Fault("an export does not say its data: give --dataset and --eps")
        own = []
        model, pretrained, folder = f"local-dir:{path}", "none", path
    else:
        own = ["--dataset", "embedded"]
        model, pretrained, folder = given.load, given.pretrained, pathlib.Path("runs")

    words = [*own, *sys.argv[1:]]  # of an argument that comes twice, the last counts
    radius = parser.parse_args(words).radius
    parser.set_defaults(model=model, eps=radius, transfer=[], seed=0, out=folder)
    if given.norm == "l2":
        parser.set_defaults(eps=None)
    args = common.parse(parser, words)
    if given.norm == "l2":
        args.eps = radius
    args.pretrained = pretrained
    if args.step is None:
        args.step = [1 / 255] if args.norm == "linf" else [2.5 * args.eps / args.test_steps]
    for name in ("radius", "transfer", "seed"):  # common.parse's affair
        delattr(args, name)
    check(args)
    return args, facts


def check(args):
    """Raises Fault for what would fail late."""
    if args.autoattack:
        load_torchattacks()
    if args.eps_curve and args.eps == 0:
        raise common.Fault("--eps-curve needs an --eps above 0: it goes in steps of half of it")
    if args.eps_curve:
        try:
            importlib.import_module("matplotlib")
        except ImportError:
            raise common.Fault(
                "--eps-curve needs matplotlib; install it with: pip install matplotlib"
            )


def in_units(radius, norm):
    """'3/255' of an l_inf radius, '0.5' of an l2 one."""
    return f"{255 * radius:.4g}/255" if norm == "linf" else f"{radius:.4g}"


def print_rows(rows):
    """Print rows of (name, right when clean, at the final iterate, at the best one), in %."""
    width = max(len(name) for name, *_ in rows)
    print(f"\n{'':{width}} |  clean | final iterate | best iterate (95 % interval)")
    for name, clean, final, best, (low, high) in rows:
        shown = f"{final:13.2f}" if final is not None else " " * 13
        print(f"{name:{width}} | {clean:6.2f} | {shown} | {best:12.2f} ({low:.1f} to {high:.1f})")


def main():
    args, facts = parse()
    path = output(args.out)
    data = common.half(common.load_dataset(args.dataset, args.data_root), args.classes)
    if len(data.classes) < 2:
        raise common.Fault(f"--classes {args.classes} leaves one class; there must be two")
    net = load(args, facts, data)
    data = data._replace(template=net.template)  # learned tokens may stand in it
    common.check_names(data.classes, data.template, net.config)
    images = common.test_images(data, args, net.size)
    size = 4 * args.batch_size
    eps = in_units(args.eps, args.norm)
    print(
        f"{pathlib.Path(args.load).name} on {args.dataset}, {args.split}: {len(data.classes)} "
        f"classes, {len(images)} images, {args.norm} eps {eps}, {args.dtype} on {args.device}"
    )

    # the house's number, which is of an l_inf ball
    house = None
    rows = []
    if args.norm == "linf":
        house = common.measure(net, {args.dataset: (data, images)}, args)
        interval = house["intervals"]["pgd"]
        rows.append(("common.evaluate", house["clean"], None, house["pgd"], interval))

    # PGD to the end, for every step size
    clean = right_when_clean(net, images, size)
    attacks = []
    robust = clean.clone()  # under all of them
    for step in args.step:
        numbers, left = restarted(
            net, images, clean, args.norm, args.eps, step, args.test_steps, args.restarts, size
        )
        attacks.append(numbers)
        robust &= left
        name = f"PGD-{args.test_steps}, step {in_units(step, args.norm)}"
        intervals = numbers["intervals"]
        final = numbers["final"]
        rows.append((name, share(clean), final, numbers["best"], intervals["best"]))
        if args.restarts > 1:
            name += f", {args.restarts} starts"
            interval = intervals["best_of_starts"]
            rows.append((name, share(clean), None, numbers["best_of_starts"], interval))
    print_rows(rows)
    if house:
        for flag in house["flags"]:
            print(f"WARNING: {flag}")
    result = {
        **common.describe(args, facts.get("method", "none")),
        "run": pathlib.Path(args.load).resolve().name,
        "clean": share(clean),
        "house": house,
        "pgd": attacks,
    }

    if args.autoattack:
        answer = autoattack(net, images, clean, args.norm, args.eps, args.autoattack, size)
        answer["PGD"] = share(robust[answer["images"]])  # on the same images, by the attacks above
        left = ", ".join(
            f"{name} {value:.2f}" for name, value in answer.items() if name != "images"
        )
        print(f"AutoAttack on {len(answer['images'])} images: {left}")
        result["autoattack"] = answer

    if args.eps_curve:
        curve = eps_curve(net, images, clean, args.norm, args.eps, size)
        points = ", ".join(f"{in_units(radius, args.norm)} {left:.2f}" for radius, left in curve)
        print(f"accuracy under PGD-20 over eps: {points}")
        title = f"{result['run']} on {args.dataset}"
        common.write(path.with_suffix(".png"), draw_curve(curve, args.norm, title))
        result["eps_curve"] = curve

    common.write(path, (json.dumps(result, indent=1) + "\n").encode())
    print(f"see {path}")


if __name__ == "__main__":
    common.guard(main)
