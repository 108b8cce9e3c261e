"""Silences progress bars and warnings of libraries in a process whose output is for people. Errors stay."""

from __future__ import annotations

import logging
import os
import warnings


def quieten() -> None:
    """Call before the libraries are imported."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    warnings.filterwarnings("ignore", module=r"(transformers|peft|opacus|torch|flwr)\b")
    # Opacus' hooks on the first layers; the gradients of the layers that are trained are there.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("absl").setLevel(logging.ERROR)
    logging.getLogger("flwr").setLevel(logging.ERROR)
