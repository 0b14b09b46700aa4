"""The README of a submission."""

from __future__ import annotations

import json
from collections.abc import Sequence

from budgetsearch.machine.host import gib
from budgetsearch.tools.submit.entry import Entry, Fit
from budgetsearch.tools.submit.steps import Steps
from budgetsearch.views.words import printable

FILES = (
    ("Dockerfile", "answers over the challenge's API on port 80"),
    ("Dockerfile.train", "trains the winner again from `adapter/manifest.json` and compares"),
    ("requirements.txt", "the exact version of every package; beside it this budgetsearch as a wheel"),
    ("adapter/", "the LoRA adapter with its tokenizer, template, ends of answers, manifest and sums"),
)


def page(name: str, entry: Entry, steps: Steps) -> str:
    """Markdown."""
    parts = [
        f"# {name}, as the NeurIPS LLM Efficiency Challenge asked for it\n",
        f"A LoRA adapter for {entry.base}, found by budgetsearch within {_hours(entry.budget_seconds)}; "
        "`adapter/README.md` says how good it is and what it was trained on.\n",
        _section("Build it and ask", _building()),
        _section("Files", _files(steps)),
        _section("The base model", _base(entry)),
        _section("Memory", fit_lines(entry.fit)),
        _section("Trained again", _training(entry)),
        _section("Licences", _licences(entry)),
        _section("Checked", _checked(entry, steps)),
    ]
    return printable("\n".join(parts))


def fit_lines(fit: Fit) -> list[str]:
    """Whether it fits, and by what."""
    if not fit.parts:
        return ["The shape of this base cannot be foreseen, so nobody knows before it runs."]
    need = gib(int(fit.bytes))
    where = f"; {fit.card} has {gib(fit.usable_bytes)}" if fit.usable_bytes else ""
    each = ", ".join(f"{what} {gib(int(size))}" for what, size in fit.parts.items() if size)
    return [
        f"It fits: {need} for {fit.rows} answers at once of {fit.length} tokens with their prompts{where}.",
        f"In parts: {each}. Foreseen from the base's shape, not measured.",
    ]


def _building() -> list[str]:
    asked = json.dumps({"prompt": "The capital of France is", "max_new_tokens": 8})
    return [
        "```sh",
        "docker build -t submission .",
        "docker run --gpus all -p 8080:80 submission",
        f"curl -s localhost:8080/process -H 'Content-Type: application/json' -d '{asked}'",
        "",
        "docker build -t training -f Dockerfile.train .",
        "docker run --gpus all -v $PWD/out:/out training",
        "```",
        "",
        "Without a card leave `--gpus all` out.",
    ]


def _files(steps: Steps) -> list[str]:
    lines = [f"- `{name}`: {what}" for name, what in FILES]
    lines += ["- `base/`: the base model"] if steps.copied else ["- `fetch.py`: brings the base model"]
    return [*lines, *(["- `data/`: the rows"] if any("data/" in s for s in steps.sources.values()) else [])]


def _base(entry: Entry) -> list[str]:
    where = "its files lie in `base/`" if entry.copied else "it is fetched while the image is built"
    pinned = f" at commit {entry.revision}" if entry.revision else ""
    return [
        f"{entry.base}{pinned}, held in {entry.quantization} as in training; {where}. Its files have the sum "
        f"{entry.sha256}; with others nothing is served or trained."
    ]


def _training(entry: Entry) -> list[str]:
    return [
        f"The winner took {entry.winner_seconds:.0f} s of the search's {_hours(entry.budget_seconds)}, and "
        "the training image stops after those. It repeats the same tokens in the same order beside the same "
        "neighbours, compares the result with `adapter/`, and leaves it in `out/adapter`. On a card sums "
        "round differently each time; the comparison says by how much."
    ]


def _licences(entry: Entry) -> list[str]:
    lines = [f"- {line}" for line in entry.licences]
    if entry.checked:
        lines.append("- Whoever made this folder says to have looked at those that are not known to be open.")
    return lines


def _checked(entry: Entry, steps: Steps) -> list[str]:
    commands: Sequence[Sequence[str]] = (*steps.install, *steps.fetch, steps.serve("127.0.0.1", 8080))
    if entry.answer is None:
        tried = (
            "Neither were the images built where this was made, nor were their steps tried. In a fresh "
            f"virtual environment of Python {steps.python} they are:"
        )
    else:
        tried = (
            "The images were not built where this was made. The same steps ran in a fresh virtual "
            f"environment, and the server answered a request: {entry.answer!r}."
        )
    versions = [f"- {line}" for line in entry.changed]
    if versions:
        versions = ["", "These packages are others than in training:", "", *versions]
    return [tried, "", "```sh", *(" ".join(command) for command in commands), "```", *versions]


def _section(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"## {title}", "", *lines, ""])


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.3g} hours"
