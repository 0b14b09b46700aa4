"""What travels with an exported adapter: ``budgetsearch.json`` for programs, README.md for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from budgetsearch.core.history.history import History
from budgetsearch.core.history.trial import TrialState
from budgetsearch.core.records import Score, cost_class
from budgetsearch.views.loading import load_options, load_snippet, other_snippet
from budgetsearch.views.shortfalls import adapter_shortfalls
from budgetsearch.views.words import accuracy_of, printable

FORMAT = 1
CARD_FILE = "README.md"


def adapter_manifest(
    history: History,
    state: TrialState,
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    quantization: str,
) -> dict[str, Any]:
    """Everything that a program needs to load this adapter and to know where it comes from."""
    plan, opened = history.plan, history.opened
    facts = opened.facts if opened else {}
    return {
        "format": FORMAT,
        "base": {
            **{key: model.get(key) for key in ("source", "loadable", "revision", "sha256", "licence")},
            **({"anatomy": model["anatomy"]} if "anatomy" in model else {}),
        },
        "quantization": quantization,
        "load": load_options(
            quantization, device_of(history), str((model.get("anatomy") or {}).get("checkpoint", ""))
        ),
        "template": data.get("template"),
        "data": dict(data),
        "trial_id": state.trial_id,
        "checkpoint": state.best_checkpoint,
        "params": dict(state.trial.params),
        "tokens": state.best_tokens,
        "seed": state.trial.seed,
        "validation_loss": state.best_loss,
        "eval_examples": plan.eval_examples if plan else None,
        "shortfalls": [asdict(one) for one in adapter_shortfalls(history)],
        "score": _score_dict(scored_for(history, state)),
        "budget_seconds": opened.budget_seconds if opened else None,
        "versions": dict(facts.get("versions", {})),
    }


def adapter_card(
    history: History, state: TrialState, model: Mapping[str, Any], data: Mapping[str, Any], quantization: str
) -> str:
    """The model card, in Markdown with the header that model hubs read."""
    base = str(model.get("source") or model.get("loadable") or "unknown")
    parts = [
        _header(model),
        f"# LoRA adapter for {base}\n",
        "Found by budgetsearch: many configurations got a little time each, the better ones more, and the "
        "best one a full run, all within one fixed budget.\n",
        *_missing(history),
        _section("Result", _results(history, state)),
        _section("How to load it", _loading(history, model, quantization)),
        _section("Training", _training(history, state, quantization)),
        _section("Base model", _facts(model, ("source", "revision", "sha256", "licence"))),
        _section("Data", _data_lines(data)),
        _section("Limits", [*LIMITS, *([INT8] if quantization == "int8" else [])]),
    ]
    return printable("\n".join(parts))


LIMITS = (
    "- The losses come from validation examples that also chose the configuration, so they are a little "
    "optimistic; data that the search never saw would tell more.",
    "- Accuracies of so few answers are uncertain by several points.",
    "- Use the adapter with the base model and the quantization above: others shift its outputs.",
    "- It inherits the limits, biases and licence terms of the base model and of the data.",
)
INT8 = (
    "- LLM.int8() looks at all rows of a batch at once: losses are those of batches, and a row alone differs "
    "a little, more where a router then chooses other experts."
)


# ---------------------------------------------------------------------------- loading


def _loading(history: History, model: Mapping[str, Any], quantization: str) -> list[str]:
    device = device_of(history)
    lines = ["```python", *load_snippet(model, quantization, ".", device, stops=_stops(history)), "```"]
    if other := other_snippet(model, quantization, ".", device):
        name = model["anatomy"]["other_class"]
        lines += ["", f"On the class `{name}` of the same model:", "", "```python", *other, "```"]
    return lines


def _stops(history: History) -> bool:
    """Whether answers end elsewhere than the base's configuration says."""
    return bool(history.opened and history.opened.facts.get("data", {}).get("stops"))


def load_lines(history: History) -> list[str]:
    """Lines that load the best trial's adapter; none before there is one."""
    best, path = history.incumbent, adapter_path(history)
    if best is None or path is None or history.opened is None:
        return []
    model = history.opened.facts.get("model", {})
    quantization, device = cost_class(best.trial.params), device_of(history)
    return load_snippet(model, quantization, path, device, stops=_stops(history))


def device_of(history: History) -> str:
    """The device that the run trained on."""
    facts = history.opened.facts if history.opened else {}
    return str(facts.get("card", {}).get("device", "cpu"))


def adapter_path(history: History) -> str | None:
    """Path of the exported adapter, if it is the best trial's: one that was exported before is not."""
    best, done = history.incumbent, history.exported
    return done.path if best and done and done.checkpoint == best.best_checkpoint else None


def scored_for(history: History, state: TrialState) -> Score | None:
    """The final score, if it is this trial's: an earlier export must not borrow it."""
    best = history.incumbent
    return history.score if best is not None and best.trial_id == state.trial_id else None


# ---------------------------------------------------------------------------- sections


def _section(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"## {title}", "", *lines, ""])


def _missing(history: History) -> list[str]:
    lines = [f"- {one.what}: {one.why}." for one in adapter_shortfalls(history)]
    return [_section("What is missing", lines)] if lines else []


def _header(model: Mapping[str, Any]) -> str:
    lines = ["---", "library_name: peft", "tags: [lora, budgetsearch]"]
    source = str(model.get("source") or "")
    if source and ":" not in source and not source.startswith(("/", ".")) and source.count("/") == 1:
        lines.append(f"base_model: {source}")
    if model.get("licence"):
        lines.append(f"license: {str(model['licence']).lower()}")
    return "\n".join([*lines, "---", ""])


def _results(history: History, state: TrialState) -> list[str]:
    score = scored_for(history, state)
    if score is None or score.adapter_loss is None or score.base_loss is None:
        loss = "unknown" if state.best_loss is None else f"{state.best_loss:.4f}"
        return [f"Validation loss (nats per completion token): {loss}."]
    lines = [
        "| | base | adapter |",
        "|---|---|---|",
        f"| validation loss (nats per completion token) | {score.base_loss:.4f} | {score.adapter_loss:.4f} |",
    ]
    if score.base_accuracy is not None and score.adapter_accuracy is not None:
        lines.append(
            f"| task accuracy ({accuracy_of(score)}) | {score.base_accuracy:.1%} "
            f"| {score.adapter_accuracy:.1%} |"
        )
    return [*lines, "", f"Base and adapter were both scored under {score.quantization}."]


def _training(history: History, state: TrialState, quantization: str) -> list[str]:
    lines = [f"- {name}: {value}" for name, value in state.trial.params.items()]
    lines += [f"- tokens: {state.best_tokens}", f"- batch: {state.trial.batch_size} sequences"]
    lines += [f"- seed: {state.trial.seed}", f"- base held in {quantization}"]
    anatomy = (history.opened.facts.get("model", {}) if history.opened else {}).get("anatomy") or {}
    if anatomy.get("adapters"):
        lines.append(f"- {anatomy['adapters']}")
    if history.opened:
        lines.append(f"- budget of the whole search: {history.opened.budget_seconds:.0f} s")
    lines.append(f"- configurations tried: {sum(1 for t in history.trials.values() if t.started)}")
    return lines


def _data_lines(data: Mapping[str, Any]) -> list[str]:
    lines = _facts(data, ("source", "source_sha256", "template"))
    for part in ("train", "valid"):
        stats = data.get(part)
        if isinstance(stats, Mapping):
            lines.append(f"- {part}: " + ", ".join(f"{key} {value}" for key, value in stats.items()))
    return lines


def _facts(facts: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    return [f"- {key}: {facts[key]}" for key in keys if facts.get(key)]


def _score_dict(score: Score | None) -> dict[str, Any] | None:
    if score is None:
        return None
    names = ("base_loss", "adapter_loss", "base_accuracy", "adapter_accuracy", "task_examples")
    return {name: getattr(score, name) for name in names}
