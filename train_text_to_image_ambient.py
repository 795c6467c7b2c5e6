"""Fine-tune Stable Diffusion with the ambient objective: flags -> TrainConfig -> ambient_sd.training.run -> card, push."""

from __future__ import annotations

import logging
import os

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
    from ambient_sd.reporting.model_card import write_run_card
    from ambient_sd.reporting.publishing import prepare, push
    from ambient_sd.training import run

    repo, access = str(config.hub_model_id), {"token": config.hub_token, "private": config.hub_private_repo or None}
    # Token and repository are checked before hours of training.
    record = run(config, on_planned=lambda _: prepare(repo, **access) if config.push_to_hub else None)
    if os.environ.get("RANK", "0") != "0":
        return
    print(record.describe(), flush=True)
    write_run_card(record)
    if config.push_to_hub:
        push(record.output, repo, **access)


if __name__ == "__main__":
    main()
