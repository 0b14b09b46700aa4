"""The README of an exported folder: what it was made of, how close it comes, how to use it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from budgetsearch.run.winner import Winner
from budgetsearch.tools.export.wanted import Compared
from budgetsearch.views.card import CARD_FILE

KEPT = ("Result", "Training", "Base model", "Data", "Licences")
"""Sections of the adapter's card that hold for what is made of it."""
USES = {
    "merged": (
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "model = AutoModelForCausalLM.from_pretrained('.', dtype='bfloat16')",
        "tokenizer = AutoTokenizer.from_pretrained('.')",
        "```",
        "",
        "```bash",
        "vllm serve .",
        "budgetsearch serve .",
        "```",
    ),
    "gguf": (
        "```python",
        "from transformers import AutoModelForCausalLM",
        "model = AutoModelForCausalLM.from_pretrained('.', gguf_file='model.gguf')",
        "```",
        "",
        "```bash",
        "llama-server -m model.gguf --jinja",
        "```",
    ),
    "ollama": ("```bash", "ollama create mine -f Modelfile", "ollama run mine", "```"),
}


def export_card(winner: Winner, compared: Compared, uses: Sequence[str]) -> str:
    """Markdown, with the header of the adapter's card."""
    source = (winner.folder / CARD_FILE).read_text(encoding="utf-8")
    header, parts = _sections(source)
    from_nf4 = (
        f" The base was held in {compared.quantization} while it was trained, so its weights here are those, "
        "unpacked, and not the original ones."
        if compared.quantization in ("nf4", "int8")
        else ""
    )
    lines = [
        header.replace("library_name: peft", "library_name: transformers"),
        f"# {winner.name}: base and adapter in one model ({compared.form})\n",
        f"Made from the LoRA adapter of a budgetsearch run.{from_nf4}\n",
        "## Checked\n",
        f"Loaded again and compared: {compared.line}.\n",
        "## How to use it\n",
        *(line for use in uses for line in (*USES[use], "")),
        *(f"## {name}\n{parts[name]}" for name in KEPT if name in parts),
    ]
    return "\n".join(lines)


def _sections(card: str) -> tuple[str, dict[str, str]]:
    """(header, text by the title of its section)."""
    found = re.match(r"---\n.*?\n---\n", card, flags=re.DOTALL)
    header = found.group() if found else ""
    pairs = re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", card, flags=re.DOTALL | re.MULTILINE)
    return header, dict(pairs)
