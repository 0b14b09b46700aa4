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


MINE = """
def surprise(doc, results):
    return {"surprise": -results[0][0]}


def spoken(doc, results):
    if doc["question"].startswith("Say black"):
        raise ValueError("no such colour")
    return {"spoken": sum(map(ord, results[0])) % 997}
"""


def write_own_tasks(folder: Path) -> None:
    """Two that are graded by code beside them, with numbers that any other weights change: how likely the
    answer is (less is better), and what is said, which fails for one colour in five."""
    _write(
        folder, "surprise_local",
        f'output_type: loglikelihood\n{ASKED}doc_to_target: " {{{{answer}}}}"\n'
        "process_results: !function mine.surprise\n"
        "metric_list:\n  - metric: surprise\n    aggregation: mean\n    higher_is_better: false\n",
    )  # fmt: skip
    _write(
        folder, "spoken_local",
        f'output_type: generate_until\n{ASKED}doc_to_target: "{{{{answer}}}}"\n'
        "process_results: !function mine.spoken\n"
        'generation_kwargs:\n  until: ["\\n\\n"]\n  max_gen_toks: 16\n  do_sample: false\n'
        "metric_list:\n  - metric: spoken\n    aggregation: mean\n    higher_is_better: true\n",
    )  # fmt: skip
    (folder / "mine.py").write_text(MINE, encoding="utf-8")
