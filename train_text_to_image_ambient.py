"""Fine-tune Stable Diffusion with the ambient objective: flags -> TrainConfig -> ambient_sd.training.loop.run."""

from __future__ import annotations

import logging
import os
import time

from ambient_sd.errors import UserError, exits_on_user_error
from ambient_sd.training.config import parse


@exits_on_user_error
def main() -> None:
    try:
        config = parse()
        # After parsing: torch and diffusers take seconds to import, and neither --help nor a typo should wait for them.
        import diffusers
        import transformers

        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        # Its notices (no torchvision) and one bar per loaded file bury what this run has to say.
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        diffusers.utils.logging.disable_progress_bar()
        from ambient_sd.training.loop import run

        summary = run(config)
    except UserError:
        # Every process meets the same mistake and one line is enough. The launcher stops the others as soon as one has
        # ended, so they let the first process speak; what only they have met they still say, a little later.
        if os.environ.get("RANK", "0") != "0":
            time.sleep(10)
        raise
    if os.environ.get("RANK", "0") == "0":
        print(
            f"{summary['steps']} steps in {summary['seconds']:.0f} s, loss {summary['loss']:.4f}; "
            f"results in {summary['output_dir']}",
            flush=True,
        )


if __name__ == "__main__":
    main()
