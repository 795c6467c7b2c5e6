"""Silence for the commands: what libraries say while they load buries what a command has to say."""

from __future__ import annotations


def quiet() -> None:
    """Silence what transformers and diffusers say and draw while loading.

    Example:
        >>> quiet()
    """
    import diffusers
    import transformers

    # Notices (no torchvision), and one bar per loaded file.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
