"""Rows, their shapes, their split and their grades."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from budgetsearch.core.errors import DataError
from budgetsearch.core.records import Score
from budgetsearch.training.data.examples import (
    FIRST_ROWS,
    Example,
    answer_is_right,
    check_data,
    grading_of,
    load_examples,
    prompt_key,
    split,
)
from budgetsearch.training.data.provenance import source_facts
from budgetsearch.training.data.size import guess_data
from budgetsearch.views.words import accuracy_of


def write(path: Path, text: str | bytes) -> str:
    """The file's path, after writing it."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return str(path)


def example(prompt: str, completion: str = "a", check: Any = None) -> Example:
    """One question of a user."""
    return Example(({"role": "user", "content": prompt},), completion, check)


ROW_SHAPES = [
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "q"),
    ({"prompt": "q", "completion": "a"}, "q"),
    ({"instruction": "q", "output": "a"}, "q"),
    ({"instruction": "q", "input": "more", "output": "a"}, "q\n\nmore"),
    ({"instruction": "q", "context": "more", "response": "a"}, "q\n\nmore"),
    ({"instruction": "q", "input": "", "output": "a"}, "q"),
    ({"question": "q", "answer": "a", "id": 7}, "q"),
    ({"input": "q", "target": "a"}, "q"),
    (
        {
            "prompt": [{"role": "user", "content": "q"}],
            "completion": [{"role": "assistant", "content": "a"}],
        },
        "q",
    ),
]


@pytest.mark.parametrize(("row", "prompt"), ROW_SHAPES)
def test_every_shape_of_row_becomes_an_example(tmp_path: Path, row: dict[str, Any], prompt: str) -> None:
    """Each documented set of columns gives one user message and a completion."""
    source = write(tmp_path / "x.jsonl", json.dumps(row))
    assert [Example(({"role": "user", "content": prompt},), "a", None, "x.jsonl:1")] == load_examples(source)


def test_messages_before_the_last_answer_are_the_prompt(tmp_path: Path) -> None:
    """Only the last assistant message is learnt."""
    roles = ["system", "user", "assistant", "user", "assistant"]
    chat = [{"role": role, "content": str(i)} for i, role in enumerate(roles)]
    found = load_examples(write(tmp_path / "x.jsonl", json.dumps({"messages": chat})))[0]
    assert (tuple(chat[:4]), "4") == (found.prompt, found.completion)


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    """JSONL, JSON (bare and wrapped), CSV with any delimiter and Parquet agree, whatever the characters."""
    import pyarrow
    import pyarrow.parquet

    rows = [{"question": 'é "1",\nnext', "answer": "\u2028x"}, {"question": "二", "answer": "b"}]
    csv = 'question,answer\n"é ""1"",\nnext",\u2028x\n二,b\n'
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    sources = [
        str(tmp_path / "x.parquet"),
        write(tmp_path / "x.jsonl", "\ufeff" + "\n\n".join(json.dumps(row) for row in rows)),
        write(tmp_path / "x.json", json.dumps(rows)),
        write(tmp_path / "y.json", json.dumps({"canary": "c", "examples": rows})),
        write(tmp_path / "x.csv", csv),
        write(
            tmp_path / "y.csv",
            csv.replace("question,", "question;").replace('",\u2028', '";\u2028').replace("二,", "二;"),
        ),
        write(
            tmp_path / "x.tsv",
            csv.replace("question,", "question\t").replace('",\u2028', '"\t\u2028').replace("二,", "二\t"),
        ),
    ]
    expected = [(row["question"], row["answer"]) for row in rows]
    for source in sources:
        assert expected == [(e.prompt[0]["content"], e.completion) for e in load_examples(source)]


@pytest.mark.parametrize(("delimiter", "word"), [(";", "semicolons"), ("\t", "tabs"), (",", None)])
def test_the_delimiter_of_a_table_is_named_once(tmp_path: Path, delimiter: str, word: str | None) -> None:
    """It is found in the header, and said where it is not the one that the format is named after."""
    lines, said = [delimiter.join(pair) for pair in (("question", "answer"), ("a, b", "c"))], list[str]()
    if delimiter == ",":
        lines[1] = '"a, b",c'
    (found,) = load_examples(write(tmp_path / "x.csv", "\n".join(lines)), said.append)
    assert ("a, b", "c") == (found.prompt[0]["content"], found.completion)
    assert ([] if word is None else [f"the columns of x.csv are separated by {word}"]) == said


def test_a_folder_is_all_its_files_by_name(tmp_path: Path) -> None:
    """Other files are left out; rows carry the name of their file; a change changes the folder's hash."""
    for name in ("b", "a"):
        write(tmp_path / f"{name}.jsonl", json.dumps({"question": f"of {name}", "answer": "x"}))
    write(tmp_path / "README.md", "about")
    found = load_examples(str(tmp_path))
    assert [("of a", "a.jsonl:1"), ("of b", "b.jsonl:1")] == [
        (e.prompt[0]["content"], e.place) for e in found
    ]
    assert 2 == guess_data(str(tmp_path), None).rows
    before = source_facts(str(tmp_path))
    write(tmp_path / "b.jsonl", json.dumps({"question": "other", "answer": "x"}))
    assert before != source_facts(str(tmp_path))


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("a.csv", "b.jsonl"), r"files of several kinds: a\.csv, b\.jsonl"),
        (("a.txt", "sub.jsonl/x"), r"no file of .*: a\.txt, sub\.jsonl/"),
        ((), "nothing"),
    ],
)
def test_a_folder_that_leaves_a_doubt_is_refused_with_what_it_holds(
    tmp_path: Path, names: tuple[str, ...], says: str
) -> None:
    """Several kinds, or nothing to read."""
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, GOOD)
    with pytest.raises(DataError, match=says):
        check_data(str(tmp_path))


GOOD = '{"question": "q", "answer": "a"}\n'
BROKEN = [
    ("x.jsonl", GOOD + "{oops\n", "x.jsonl:2 is not valid JSON"),
    ("x.jsonl", GOOD + "[1]\n", "x.jsonl:2 is a list"),
    ("x.jsonl", GOOD.encode() + b'{"question": "\xff"}', "x.jsonl:2 is not UTF-8"),
    ("x.jsonl", GOOD + '{"question": "q", "answer": " "}', "x.jsonl:2: 'answer' is empty"),
    ("x.jsonl", '{"question": null, "answer": "a"}', "x.jsonl:1: 'question' is empty"),
    (
        "x.jsonl",
        '{"text": "q", "id": 1}',
        "x.jsonl:1 has no usable columns; found: text, id; what works: messages;",
    ),
    ("x.jsonl", '{"question": ["q"], "answer": "a"}', "'question' is a list, not text"),
    ("x.jsonl", '{"question": "\\ud800", "answer": "a"}', "half a character"),
    (
        "x.jsonl",
        '{"messages": [{"role": "user", "content": "q"}]}',
        "a user message and an assistant message",
    ),
    (
        "x.jsonl",
        '{"messages": [{"role": "assistant", "content": "q"}, {"role": "user", "content": "q"}]}',
        "must end with an assistant message, not 'user'",
    ),
    (
        "x.jsonl",
        '{"messages": [{"from": "user"}, {"role": "user", "content": "q"}]}',
        "message 1 needs 'role'",
    ),
    ("x.jsonl", "", "is empty"),
    ("x.jsonl", "\n\n", "holds no rows"),
    ("x.json", '[\n{"a": 1},\n]', "x.json:3 is not valid JSON"),
    ("x.json", '{"a": [], "b": []}', "an object with 2 lists"),
    ("x.json", "7", "neither a list"),
    ("x.csv", "question,answer\nq,a\nq\n", "x.csv:3 does not have the 2 columns"),
    ("x.csv", 'question,answer\nq,"a\n', "x.csv:2 is not valid CSV"),
    ("x.parquet", "PAR1", "cannot be read as Parquet"),
    ("x.txt", "hello", "convert it to JSONL"),
]


@pytest.mark.parametrize(("name", "content", "says"), BROKEN)
def test_a_bad_row_is_named(tmp_path: Path, name: str, content: str | bytes, says: str) -> None:
    """The message names the file and line, what is wrong, and what would work."""
    source = write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        load_examples(source)
    assert says in str(caught.value)


def test_a_parquet_row_is_named_by_number(tmp_path: Path) -> None:
    """Parquet has no lines."""
    import pyarrow
    import pyarrow.parquet

    rows = [{"question": "q", "answer": "a"}, {"question": "q", "answer": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet:row 2: 'answer' is empty"):
        load_examples(str(tmp_path / "x.parquet"))


def test_the_cheap_check_reads_the_first_rows_only(tmp_path: Path) -> None:
    """A row that is broken far down is found on loading, one of the first at once."""
    late = GOOD * FIRST_ROWS + "oops"
    assert check_data(write(tmp_path / "x.jsonl", late)) is None  # type: ignore[func-returns-value]
    with pytest.raises(DataError, match=":2 is not valid JSON"):
        check_data(write(tmp_path / "y.jsonl", GOOD + "oops"))


def test_an_absent_file_names_its_nearest_sibling(tmp_path: Path) -> None:
    """A typing error in a path is answered with the right name."""
    write(tmp_path / "train.jsonl", GOOD)
    with pytest.raises(DataError, match=r"did you mean 'train\.jsonl'"):
        check_data(str(tmp_path / "trian.jsonl"))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("reasoning-gym:chain_summ", "did you mean 'chain_sum'"),
        ("reasoning-gym:chain_sum?sizes=3", "did you mean 'size'"),
        ("reasoning-gym:chain_sum?size=many", "whole number"),
        ("reasoning-gym:chain_sum?size=4&min_terms=9&max_terms=2", "does not take these parameters"),
        ("hub:owner/file.jsonl", "OWNER/NAME/FILE"),
        ("hub:owner/name/file.bin", "OWNER/NAME/FILE"),
    ],
)
def test_a_misspelt_source_is_refused_without_network(source: str, says: str) -> None:
    """Names, parameters and file types are checked at once."""
    with pytest.raises(DataError, match=says):
        check_data(source)


def test_a_generator_gives_the_same_rows_every_time() -> None:
    """Size, seed and the task's own parameters come from the source."""
    source = "reasoning-gym:chain_sum?size=5&seed=3&min_terms=2&max_terms=2"
    rows = load_examples(source)
    assert 5 == len(rows)
    assert rows == load_examples(source)
    assert rows != load_examples(source.replace("seed=3", "seed=4"))


@pytest.mark.parametrize("task", ["chain_sum", "family_relationships", "arc_agi"])
def test_a_generated_answer_is_graded_after_a_trip_through_json(task: str) -> None:
    """The reference gets 1, nonsense less; even where the task grades with tuples."""
    row = load_examples(f"reasoning-gym:{task}?size=2")[0]
    again = Example(row.prompt, row.completion, json.loads(json.dumps(row.check)))
    assert 1.0 == answer_is_right(again, f" {row.completion}\n")
    assert answer_is_right(again, "no idea") < 1.0


def test_a_task_without_reference_answers_cannot_be_learnt() -> None:
    """Some tasks only grade."""
    with pytest.raises(DataError, match="no reference answer"):
        load_examples("reasoning-gym:rubiks_cube?size=2")


def test_an_unreachable_hub_offers_the_local_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, the message says to bring the file."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(DataError, match="give the local file"):
        load_examples("hub:owner/name/file.jsonl")


def test_a_hub_file_is_read_at_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Owner, name, file and revision come from the source."""
    import huggingface_hub

    asked: dict[str, object] = {}

    def fetch(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep" / "file.jsonl", GOOD)
    assert 1 == len(load_examples("hub:owner/name/deep/file.jsonl@v1"))
    expected = {
        "name": "owner/name",
        "repo_type": "dataset",
        "revision": "v1",
        "allow_patterns": ["deep/file.jsonl"],
    }
    assert expected == asked


@pytest.mark.parametrize("seed", range(5))
def test_a_split_is_disjoint_and_complete(seed: int) -> None:
    """Rows with the same prompt stay on one side, and every row is on a side."""
    rows = [example(f"q{i % 40}", str(i)) for i in range(100)]
    train, valid = split(rows, seed)
    assert 100 == len(train) + len(valid)
    assert set() == {prompt_key(e) for e in train} & {prompt_key(e) for e in valid}
    assert 1 <= len(valid) <= 10
    assert (train, valid) == split(rows, seed)


def test_another_seed_gives_another_split() -> None:
    """The seed decides."""
    rows = [example(str(i)) for i in range(100)]
    assert split(rows, 0) != split(rows, 1)


def test_validation_is_capped() -> None:
    """``max_valid`` bounds the share."""
    assert 7 == len(split([example(str(i)) for i in range(100)], 0, 0.5, max_valid=7)[1])


@pytest.mark.parametrize("rows", [["a", "b"], ["a"] * 9 + ["b"], ["a"] * 5 + ["b"] * 5])
@pytest.mark.parametrize("share", [0.001, 0.5, 1.0])
def test_both_sides_get_a_row(rows: list[str], share: float) -> None:
    """Two different prompts are enough, however uneven."""
    train, valid = split([example(row) for row in rows], 0, share)
    assert train
    assert valid


def test_one_prompt_cannot_be_split() -> None:
    """Training rows would be validation rows too."""
    with pytest.raises(DataError, match="two different prompts"):
        split([example("q"), example("q", "b")], 0)


@pytest.mark.parametrize(
    ("reference", "answer", "grade"),
    [
        ("Paris", " paris. ", 1.0),
        ("Paris", "It is Paris", 0.0),
        ("a  b", "A\nb", 1.0),
        ("so\n#### 1,000", "I think\n#### $1000", 1.0),
        ("so\n#### 72", "#### 7\n#### 72.\nand more", 1.0),
        ("so\n#### 72", "72", 0.0),
        ("so\n#### 72", "#### 73", 0.0),
        ("so\n#### 72", "####", 0.0),
    ],
)
def test_answers_are_compared_without_their_dress(reference: str, answer: str, grade: float) -> None:
    """Case, spacing, closing punctuation and thousands separators do not count."""
    assert grade == answer_is_right(example("q", reference), answer)


def test_how_answers_are_graded_is_told() -> None:
    """By the task where it has a check, else by what follows ####, else by the whole text."""
    checked = example("q", "so\n#### 7", {"task": "chain_sum"})
    rows = [checked, example("q", "so\n#### 7"), example("q", "Paris")]
    assert ["task", "final", "text"] == [grading_of(row) for row in rows]
    samples = tuple({"grading": grading_of(row)} for row in rows[1:])
    told = accuracy_of(Score("ok", "nf4", task_examples=9, samples=samples))
    assert "n = 9, exact match of what follows ####, exact match of the text" == told
