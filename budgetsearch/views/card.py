"""What travels with an exported adapter: ``budgetsearch.json`` for programs, README.md for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from budgetsearch.core.bases import facts_for
from budgetsearch.core.history.history import History
from budgetsearch.core.history.trial import TrialState
from budgetsearch.core.records import Score
from budgetsearch.views.loading import (
    load_options,
    load_snippet,
    other_snippet,
    transformers_snippet,
    vllm_command,
)
from budgetsearch.views.metric import metric_line
from budgetsearch.views.shortfalls import adapter_shortfalls
from budgetsearch.views.words import accuracy_of, printable, words_of

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
        _section("How to serve it", _serving(state, model, quantization)),
        _section("Training", _training(history, state, quantization)),
        _section("Base model", _facts(model, ("source", "revision", "sha256", "licence"))),
        _section("Data", _data_lines(data)),
        _section("Licences", _licences(model, data)),
        _section("Limits", [*LIMITS, *([INT8] if quantization == "int8" else [])]),
    ]
    return printable("\n".join(parts))


def recipe_manifest(history: History, state: TrialState, files: Sequence[str]) -> dict[str, Any]:
    """What a program needs to know of what a recipe hands out."""
    opened = history.opened
    facts = opened.facts if opened else {}
    return {
        "format": FORMAT,
        "recipe": dict(facts.get("recipe", {})),
        "files": list(files),
        "trial_id": state.trial_id,
        "checkpoint": state.best_checkpoint,
        "params": dict(state.trial.params),
        "units": state.best_tokens,
        "seed": state.trial.seed,
        "validation_loss": state.best_loss,
        "budget_seconds": opened.budget_seconds if opened else None,
        "versions": dict(facts.get("versions", {})),
    }


def recipe_card(history: History, state: TrialState, manifest: Mapping[str, Any]) -> str:
    """What people read beside it, in Markdown."""
    recipe = manifest["recipe"]
    metric = recipe.get("metric", "loss")
    loss = "unknown" if state.best_loss is None else f"{state.best_loss:.6g}"
    score = scored_for(history, state)
    before = []
    if score is not None and score.base_loss is not None:
        before = [f"Untrained, the same configuration comes to {score.base_loss:.6g}."]
    parts = [
        f"# {recipe.get('name', 'recipe')}\n",
        "Found by budgetsearch: many configurations got a little time each, the better ones more, and the "
        "best one a full run, all within one fixed budget.\n",
        *_missing(history),
        _section("Result", [f"Validation {metric}: {loss}.", *before]),
        _section(
            "Training",
            [
                *(f"- {name}: {value}" for name, value in state.trial.params.items()),
                f"- {recipe.get('unit', 'units')}: {state.best_tokens}",
                f"- seed: {state.trial.seed}",
                f"- code: {recipe.get('place')}:{recipe.get('name')}, sha256 {recipe.get('sha256')}",
            ],
        ),
        _section("Files", [f"- {name}" for name in manifest["files"]]),
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
    lines = ["With PEFT:", "", "```python"]
    lines += [*load_snippet(model, quantization, ".", device, stops=_stops(history)), "```"]
    if (model.get("anatomy") or {}).get("auto", True):
        lines += ["", "With transformers alone, which finds the base by the adapter's configuration:", ""]
        lines += ["```python", *transformers_snippet(model, quantization, ".", device), "```"]
    if other := other_snippet(model, quantization, ".", device):
        name = model["anatomy"]["other_class"]
        lines += ["", f"On the class `{name}` of the same model:", "", "```python", *other, "```"]
    return lines


def _serving(state: TrialState, model: Mapping[str, Any], quantization: str) -> list[str]:
    """For vLLM and Ollama; neither is a part of this package, and the lines were not run with it."""
    command = vllm_command(model, quantization, ".", int(state.trial.params["rank"]))
    lines = ["```bash", "# in this folder, or with its path instead of the dot", "budgetsearch serve ."]
    lines += [command] if command else []
    lines += [
        "# Ollama takes a GGUF file: base and adapter merged, beside a Modelfile with template and stops",
        "budgetsearch export RUN --ollama",
        "```",
    ]
    if quantization in ("nf4", "int8"):
        lines += ["", f"vLLM quantizes the base its own way, which is not quite the {quantization} above."]
    return lines


def _licences(model: Mapping[str, Any], data: Mapping[str, Any]) -> list[str]:
    """Of base and data, as far as their own cards say."""
    named = model.get("licence") or "its files name none; look where it comes from"
    lines = [f"- base model: {named}"]
    for source, licence in (data.get("licences") or {}).items():
        lines.append(f"- data {source}: {licence or 'not stated with the files'}")
    return [*lines, "- The terms that came with the base model's files lie beside this one."]


def _stops(history: History) -> bool:
    """Whether answers end elsewhere than the base's configuration says."""
    return bool(history.facts.get("data", {}).get("stops"))


def load_lines(history: History) -> list[str]:
    """Lines that load the best trial's adapter; none before there is one."""
    best, path = history.incumbent, adapter_path(history)
    if best is None or path is None or history.opened is None:
        return []
    if recipe := history.opened.facts.get("recipe"):
        place, name, params = recipe["place"], recipe["name"], dict(best.trial.params)
        return [
            f"# with {name} of {place}",
            f"recipe = {name}()",
            f"recipe.setup({device_of(history)!r})",
            f"trial = recipe.load({params!r}, {best.trial.seed}, pathlib.Path({path!r}))",
        ]
    model = history.facts.get("model", {})
    quantization, device = str(best.trial.params["quantization"]), device_of(history)
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
    score, unit = scored_for(history, state), words_of(history).exact
    if score is None or score.adapter_loss is None or score.base_loss is None:
        loss = "unknown" if state.best_loss is None else f"{state.best_loss:.4f}"
        return [f"Validation loss ({unit}): {loss}."]
    lines = [
        "| | base | adapter |",
        "|---|---|---|",
        f"| validation loss ({unit}) | {score.base_loss:.4f} | {score.adapter_loss:.4f} |",
    ]
    if score.base_accuracy is not None and score.adapter_accuracy is not None:
        lines.append(
            f"| task accuracy ({accuracy_of(score)}) | {score.base_accuracy:.1%} "
            f"| {score.adapter_accuracy:.1%} |"
        )
    if (line := metric_line(history)) is not None and score is history.score:
        name, base, adapter, count = line
        cell = printable(name).replace("|", "\\|")
        lines.append(f"| {cell}, what was chosen by (n = {count}) | {base:.4f} | {adapter:.4f} |")
    return [*lines, "", f"Base and adapter were both scored under {score.quantization}."]


def _training(history: History, state: TrialState, quantization: str) -> list[str]:
    lines = [f"- {name}: {value}" for name, value in state.trial.params.items()]
    lines += [f"- tokens: {state.best_tokens}", f"- batch: {state.trial.batch_size} sequences"]
    lines += [f"- seed: {state.trial.seed}", f"- base held in {quantization}"]
    facts = facts_for(history.opened.facts, state.trial.params) if history.opened else {}
    anatomy = facts.get("model", {}).get("anatomy") or {}
    if anatomy.get("adapters"):
        lines.append(f"- {anatomy['adapters']}")
    if anatomy.get("layers"):
        lines.append("- layers: " + ", ".join(f"{n} x {name}" for name, n in anatomy["layers"].items()))
    if share := (anatomy.get("quantized") or {}).get(quantization):
        lines.append(f"- {share:.0%} of the base's weights lie in {quantization}")
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
