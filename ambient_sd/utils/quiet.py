"""Silence for the commands: what libraries say while they load buries what a command has to say."""

from __future__ import annotations


def quiet() -> None:
    """Silence what transformers and diffusers say and draw while loading; errors are still raised.

    Example:
        >>> quiet()
    """
    import diffusers
    import transformers

    # Notices (no torchvision, a cast of "[]" modules, prompts that are cut, which we say ourselves), and one bar per loaded file.
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
