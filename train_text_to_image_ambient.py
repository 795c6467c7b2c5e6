"""Fine-tune Stable Diffusion with the ambient objective: flags -> TrainConfig -> ambient_sd.training.run -> card, push."""

from __future__ import annotations

import logging

from ambient_sd.training.config import parse
from ambient_sd.utils.errors import exits_on_user_error


@exits_on_user_error
def main() -> None:
    config = parse()
    # After parsing: torch and diffusers take seconds to import, and neither --help nor a typo should wait for them.
    from ambient_sd.utils.quiet import quiet

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("ambient_sd").setLevel(logging.INFO)
    quiet()
    from ambient_sd.commands.train.work import fit

    fit(config)


if __name__ == "__main__":
    main()
