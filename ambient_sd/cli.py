"""The command `ambient-sd`: one module of `ambient_sd.commands` for each command, imported when it is asked for.

`train_text_to_image_ambient.py` is the script for `accelerate launch`, with diffusers' flags; `ambient-sd train` takes the same and proposes the rest.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from ambient_sd.utils.errors import UserError, exits_on_user_error
from ambient_sd.utils.settings import Parser, nearest

# Each is a module of ambient_sd.commands with `make_parser` and `run`, which load nothing heavy before a command runs.
COMMANDS = {
    "train": "train a LoRA on a folder of images, stop before it copies, and audit it",
    "demo": "train a small model with each loss, and look at what comes back of its images",
    "inspect": "list what is wrong with an image dataset: broken, small, captionless, duplicate",
    "level": "see the noise level s_n that an image dataset proposes, without training",
    "sample": "sample images under the memorization guard, with scores, a sheet and a page",
    "calibrate": "find the score above which an image is flagged, for one model and sampler",
    "compare": "try every detector and every mitigation on models whose training images are at hand, side by side",
    "audit": "measure how much a model copies its training images, and how good its images are",
    "push": "upload the results of a training to the hub",
}


def make_parser() -> Parser:
    """Return the parser of the command without a command: it explains what there is."""
    commands = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    parser = Parser(
        prog="ambient-sd",
        usage="ambient-sd COMMAND [options]",
        description="Fine-tune Stable Diffusion without the model handing the training images back, and see that it does.",
        epilog=f"commands:\n{commands}\n\nambient-sd COMMAND --help explains one of them.\n",
    )
    parser.add_argument("--version", action="store_true", default=False, help="print the version and leave")
    return parser


def parser_of(command: str) -> Parser:
    """Return the parser of one command.

    Example:
        >>> parser_of("push").prog
        'ambient-sd push'
    """
    parser: Parser = importlib.import_module(f"ambient_sd.commands.{command}").make_parser()
    return parser


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; its exit status is 0, that of the command, or 2 for a mistake."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words and not words[0].startswith("-"):
        if words[0] not in COMMANDS:
            raise UserError(f"unknown command {words[0]}", rule=nearest(words[0], list(COMMANDS)), remedy="see ambient-sd --help")  # fmt: skip
        args = parser_of(words[0]).parse_args(words[1:])
        if status := importlib.import_module(f"ambient_sd.commands.{words[0]}").run(args, words):
            sys.exit(status)
    elif make_parser().parse_args(words).version:
        from ambient_sd import __version__

        print(f"ambient_sd {__version__}")
    else:
        make_parser().print_help(sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
