"""Tasks for lm-eval whose data are files beside their definitions: no network."""

from __future__ import annotations

from pathlib import Path

from tests.support.rows import write_rows

HEAD = (
    "task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {rows}\ntest_split: test\n"
)
ASKED = 'doc_to_text: "{{question}}\\nAnswer:"\n'


def write_choice_task(folder: Path, name: str = "choices_local") -> None:
    """Which colour: by the likelihood of each."""
    _write(
        folder, name,
        f'output_type: multiple_choice\n{ASKED}'
        'doc_to_choice: ["red", "green", "blue", "black", "white"]\n'
        'doc_to_target: "{{answer.split()[0]}}"\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n",
    )  # fmt: skip


def write_open_task(folder: Path, name: str = "open_local") -> None:
    """What to say: a text that ends at a stop sequence."""
    _write(
        folder, name,
        f'output_type: generate_until\n{ASKED}doc_to_target: "{{{{answer}}}}"\n'
        'generation_kwargs:\n  until: ["e"]\n  max_gen_toks: 24\n  do_sample: false\n'
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n",
    )  # fmt: skip


def _write(folder: Path, name: str, rest: str) -> None:
    folder.mkdir(exist_ok=True)
    rows = write_rows(folder / f"{name}.jsonl", 12)
    (folder / f"{name}.yaml").write_text(HEAD.format(name=name, rows=rows) + rest, encoding="utf-8")
