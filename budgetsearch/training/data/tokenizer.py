"""The tokenizer of a base model: loaded with a pad token, and what decides on its tokens."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from budgetsearch.core.errors import DataError, UntrustedCode
from budgetsearch.storage.files import sha256_of
from budgetsearch.training.data.trust import FLAG, code_files, uses_code
from budgetsearch.training.quiet import quiet

FILES = ("*token*", "chat_template*", "vocab.*", "merges.txt", "*.model", "*.tiktoken", "config.json")
"""The class of a tokenizer may be chosen by the model type in config.json."""


def load_tokenizer(model_path: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a base model's folder, with a pad token.

    Raises:
        UntrustedCode: it runs its own code to load, and that is not allowed.
        DataError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        with quiet():
            # Said, not left out: else transformers asks on the terminal, and a worker has none.
            tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        if uses_code(model_path) and not trust_remote_code and "trust_remote_code" in str(error):
            raise UntrustedCode(
                f"the tokenizer in {model_path} runs its own Python code to load; read that code, then allow "
                f"it with {FLAG} (trust_remote_code)"
            ) from error
        raise DataError(f"the tokenizer in {model_path} cannot be loaded: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_hash(model_path: Path, *, code: bool) -> str:
    """Hash of all files that decide on the tokens of a text."""
    files = {file for pattern in FILES for file in model_path.glob(pattern) if file.is_file()}
    files.update(code_files(model_path) if code else ())
    lines = [f"{file.name} {sha256_of(file)}\n" for file in sorted(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
