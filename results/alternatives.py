"""A program with one of our choices made otherwise: what stands behind a default.

    python results/alternatives.py adam --dataset caltech101 --model tiny --budget 3

runs advmask.py, all of it, but for the lines that ALTERNATIVES replaces: what differs is what
stands there. It takes the program's other arguments, prints what it prints and writes what it
writes. "unbalanced" is of advlora.py. "scale" acts in the run alone: its adapter does not hold it.
CHOICES.md has the tables.
"""

import pathlib
import sys
import types
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common


class Alternative(NamedTuple):
    """What is otherwise, in which program, and the lines that make it so: old -> new."""

    what: str
    program: str
    lines: dict


ALTERNATIVES = {
    "unchanged": Alternative(
        "nothing is otherwise: the run to compare the others with, on their machine", "advmask", {}
    ),
    "tokens": Alternative(
        "LAFA's features are the mean over all tokens, not the CLS token",
        "advmask",
        {
            "cls = output[:, 0] if transformer.batch_first else output[0]": (
                "cls = output.mean(1) if transformer.batch_first else output.mean(0)"
            )
        },
    ),
    "raw": Alternative(
        "LAFA's features keep their length; lambda has to be smaller",
        "advmask",
        {"z.append(F.normalize(cls.float(), dim=-1))": "z.append(cls.float())"},
    ),
    "attached": Alternative(
        "the clean side of LAFA has a gradient",
        "advmask",
        {"with torch.no_grad():  # by the masked network": "if True:  # by the masked network"},
    ),
    "undivided": Alternative(
        "the running mean of the gradients starts at 0 and is not divided by its weight",
        "advmask",
        {"rate = gamma[t].item() / (1 - 0.9 ** (t + 1))": "rate = gamma[t].item()"},
    ),
    "matrix": Alternative(
        "every matrix has a rate of its own: gradients are divided by the matrix's own size",
        "advmask",
        {"0.1 * g / rms.clamp(": "0.1 * g / g.square().mean().sqrt().clamp("},
    ),
    "late": Alternative(
        "in the last fifth of the steps no entry moves that is a tenth of the way or more from "
        "the threshold",
        "advmask",
        {
            "                m.sub_(rate * v_m)": """\
                near = (m - list(masks.values())[0].alpha).abs() < way / 10
                m.sub_(rate * v_m * (near if t >= 0.8 * steps else 1))"""
        },
    ),
    "adam": Alternative(
        "M is trained by Adam, as in R-AMT",
        "advmask",
        {
            "v = [torch.zeros_like(m) for m in M]": "adam = torch.optim.Adam(M)",
            """\
            for m, v_m, g in zip(M, v, gradients):
                v_m.mul_(0.9).add_(0.1 * g / rms.clamp(min=1e-12))
                m.sub_(rate * v_m)""": """\
            for m, g in zip(M, gradients):
                m.grad = g
            adam.param_groups[0]["lr"] = gamma[t].item()
            adam.step()""",
        },
    ),
    "scale": Alternative(
        "the logit scale is 100, as OpenAI's, on a CLIP that was trained to another",
        "advmask",
        {"clip = classifier.clip\n": "clip = classifier.clip\n    classifier.scale = 100\n"},
    ),
    "unbalanced": Alternative(
        "A_0 and B_0 keep the norms of centres and least squares",
        "advlora",
        {"            A, B = c * A, B / c\n": ""},
    ),
}


def program(choice):
    """The module of an alternative's program, with its lines replaced.

    Raises ValueError where a line is not there exactly once.
    """
    alternative = ALTERNATIVES[choice]
    source = (ROOT / f"{alternative.program}.py").read_text(encoding="utf-8")
    for old, new in alternative.lines.items():
        if source.count(old) != 1:
            raise ValueError(f"{alternative.program}.py has not this line once: {old}")
        source = source.replace(old, new)
    module = types.ModuleType(choice)
    exec(compile(source, f"{alternative.program}.py, {choice}", "exec"), vars(module))
    return module


class Parser(common.Parser):
    """Takes the choice, and all arguments of its program."""

    def parse_args(self, words=None):
        choice = self.parse_known_args(words)[0].choice
        parser = program(choice).arguments()
        parser.add_argument("choice")
        return parser.parse_args(words)


def arguments():
    """The program's argument parser."""
    parser = Parser(description=__doc__.split("\n")[0])
    what = "what is made otherwise; the other arguments are those of its program, see its --help"
    for name, alternative in ALTERNATIVES.items():
        what += f"; {name}: {alternative.what}"
    parser.add_argument("choice", choices=list(ALTERNATIVES), help=what)
    return parser


def main():
    choice = arguments().parse_args().choice
    module = program(choice)
    module.arguments = arguments
    module.main()


if __name__ == "__main__":
    common.guard(main)
