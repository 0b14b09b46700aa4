"""Libraries that talk too much: progress bars and notices that would bury what matters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings from transformers and the Hub while this lasts."""
    import huggingface_hub.utils as hub
    from transformers.utils import logging

    bars, level, hub_off = (
        logging.is_progress_bar_enabled(),
        logging.get_verbosity(),
        hub.are_progress_bars_disabled(),
    )
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    hub.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        if not hub_off:
            hub.enable_progress_bars()
