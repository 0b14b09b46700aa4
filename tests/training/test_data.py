"""Files and other sources of rows: how they are read, how they are split, and when an answer is right."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy
import pytest

from budgetsearch.core.errors import DataError, SettingsError
from budgetsearch.core.records import Score
from budgetsearch.training.data import hub, samples, scan
from budgetsearch.training.data.conversation import Conversation, Sample, Turn, from_json, to_json
from budgetsearch.training.data.grading import answer_is_right, grading_of
from budgetsearch.training.data.lines import Broken
from budgetsearch.training.data.origins import Origin, check_spelling, locate, origins_of
from budgetsearch.training.data.provenance import licences, source_facts
from budgetsearch.training.data.rows import read_rows
from budgetsearch.training.data.samples import check_rows, load_samples
from budgetsearch.training.data.size import guess_data
from budgetsearch.training.data.tally import Tally
from budgetsearch.views.words import accuracy_of

GOOD = '{"question": "q", "answer": "a"}\n'


def write(path: Path, text: str | bytes) -> str:
    """The file's path, after writing it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return str(path)


def sample(prompt: str, answer: str = "a", check: Any = None) -> Sample:
    """One question of a user."""
    return Sample(Conversation((Turn("user", prompt), Turn("assistant", answer))), check)


def pairs(source: str) -> list[tuple[str, str]]:
    """Question and answer of each row."""
    return [(one.asked[0].content, one.answer) for one in load_samples(source)]


# ---------------------------------------------------------------------------------- files


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    """JSON in all its forms, tables with any delimiter, Parquet and Arrow agree, packed or not."""
    import datasets
    import pandas
    import pyarrow
    import pyarrow.parquet

    rows = [{"question": 'é "1",\nnext', "answer": "\u2028x"}, {"question": "二", "answer": "b"}]
    lines, table = "\n\n".join(map(json.dumps, rows)), pyarrow.Table.from_pylist(rows)
    csv = 'question{0}answer\n"é ""1"",\nnext"{0}\u2028x\n二{0}b\n'
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    datasets.Dataset(table).save_to_disk(str(tmp_path / "saved"))
    with pyarrow.output_stream(str(tmp_path / "x.jsonl.zst"), compression="zstd") as packed:
        packed.write(lines.encode())
    sources = [
        *(str(tmp_path / name) for name in ("x.parquet", "saved", "x.jsonl.zst")),
        str(next((tmp_path / "saved").glob("*.arrow"))),
        write(tmp_path / "x.jsonl", "\ufeff" + lines),
        write(tmp_path / "x.jsonl.gz", gzip.compress(lines.encode())),
        write(tmp_path / "list.jsonl", json.dumps(rows, indent=1)),
        write(tmp_path / "lines.json", lines),
        write(tmp_path / "pretty.json", "\n".join(json.dumps(row, indent=2) for row in rows)),
        write(tmp_path / "x.json", json.dumps(rows)),
        write(tmp_path / "y.json", json.dumps({"canary": "c", "tags": ["a", "b"], "examples": rows})),
        write(tmp_path / "columns.json", json.dumps({name: [row[name] for row in rows] for name in rows[0]})),
        write(tmp_path / "pandas.json", pandas.DataFrame(rows).to_json()),
        write(tmp_path / "x.csv", csv.format(",")),
        write(tmp_path / "crlf.csv", "\ufeff" + csv.format(";").replace("二;b\n", "二;b\r\n")),
        write(tmp_path / "x.tsv", csv.format("\t")),
        write(tmp_path / "bars.csv", csv.format("|")),
        write(tmp_path / "empty_cells.csv", csv.format(",").replace("二,b", "二,b,,")),
        write(tmp_path / "marks.jsonl", "\ufeff" + "\n\ufeff".join(map(json.dumps, rows))),
        write(tmp_path / "sep.csv", "sep=^\n" + csv.format("^")),
        write(tmp_path / "wide.csv", csv.format("\t").encode("utf-16")),
        write(tmp_path / "unpacked.jsonl.gz", lines),
        write(tmp_path / "packed.jsonl", gzip.compress(lines.encode())),
        write(tmp_path / "lists.json", "\n".join(json.dumps([row]) for row in rows)),
        write(tmp_path / "behind.json", f"{json.dumps(rows[:1])}\n{json.dumps(rows[1])}"),
    ]
    assert {source: [tuple(row.values()) for row in rows] for source in sources} == {
        source: pairs(source) for source in sources
    }


def test_one_object_of_one_row_is_a_row(tmp_path: Path) -> None:
    """Its list of messages is no list of rows."""
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert [("q", "a")] == pairs(write(tmp_path / "x.json", json.dumps({"messages": chat, "tags": [{}]})))


@pytest.mark.parametrize("name", ["lines.jsonl", "list.json"])
def test_a_bare_list_of_messages_is_a_row(tmp_path: Path, name: str) -> None:
    """A line each, or in a list; messages of a tree, each a row with an id, are none."""
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": "a"}] for q in "qr"]
    text = "\n".join(map(json.dumps, chats)) if name == "lines.jsonl" else json.dumps(chats)
    assert [("q", "a"), ("r", "a")] == pairs(write(tmp_path / name, text))
    tree = [{**message, "message_id": number} for number, message in enumerate(chats[0])]
    with pytest.raises(DataError, match="found: role, content, message_id"):
        pairs(write(tmp_path / name, json.dumps(tree)))


def test_lines_of_old_spreadsheets_end_with_a_carriage_return(tmp_path: Path) -> None:
    """One in quotes is part of a cell."""
    text = 'question,"answer"\r"a\rb",c\rd,"e, f"\r'
    assert [("a\rb", "c"), ("d", "e, f")] == pairs(write(tmp_path / "x.csv", text))


def test_fields_of_megabytes_are_read(tmp_path: Path) -> None:
    """The csv module's own limit is 131,072 characters; a JSON value may be longer than one read."""
    long = "long " * 500_000
    rows = json.dumps([{"question": long, "answer": "a"}, {"question": "q", "answer": "b"}])
    for source in (
        write(tmp_path / "x.csv", f"question,answer\n{long},a\nq,b\n"),
        write(tmp_path / "x.json", rows),
    ):
        assert [(long, "a"), ("q", "b")] == pairs(source)


@pytest.mark.parametrize(("delimiter", "word"), [(";", "semicolons"), ("\t", "tabs"), (",", None)])
def test_the_delimiter_of_a_table_is_named_once(tmp_path: Path, delimiter: str, word: str | None) -> None:
    """It is found in the header, and said where it is not the one that the format is named after."""
    lines, said = [delimiter.join(pair) for pair in (("question", "answer"), ("a, b", "c"))], list[str]()
    if delimiter == ",":
        lines[1] = '"a, b",c'
    (found,) = load_samples(write(tmp_path / "x.csv", "\n".join(lines)), said.append)
    assert ("a, b", "c") == (found.asked[0].content, found.answer)
    assert ([] if word is None else [f"the columns of x.csv are separated by {word}"]) == said


BROKEN = [
    ("x.jsonl", "{oops\n", "2", "it is not valid JSON"),
    ("x.jsonl", "[1]\n", "2", "it is a list"),
    ("x.jsonl", "[{}]\n", "2", "it is a list"),
    ("x.jsonl", "[" * 100_000 + "\n", "2", "nested too deeply"),
    ("x.jsonl", b'{"question": "\xff"}\n', "2", "it is not UTF-8"),
    ("x.jsonl", '{"question": "a\0b", "answer": "a"}\n', "2", "it is not valid JSON"),
    ("x.jsonl", '{"question": "q", "answer": " "}\n', "2", "empty"),
    ("x.jsonl", '{"question": "\\ud800", "answer": "a"}\n', "2", "half a character"),
    ("x.json", '{"question": "q"\n', "2", "it is not valid JSON"),
    ("x.csv", "q\n", "3", "it does not have the 2 columns"),
    ("x.csv", "q,a,b\n", "3", "it does not have the 2 columns"),
    ("x.csv", "question,answer\n", "3", "the header again"),
    ("x.csv", '"a"b,c\n', "3", "it is not valid CSV"),
    ("x.csv", b"\xff,c\n", "3", "it is not UTF-8"),
]


def test_columns_that_nothing_is_made_of_are_said_once(tmp_path: Path) -> None:
    """With the number of rows that hold something there, and nothing that a terminal would obey."""
    rows = [{"question": "q", "answer": "a", "id": 0, "no\x1bte": note} for note in ("", "n", None)]
    source = write(tmp_path / "x.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    said: list[str] = []
    assert 3 == len(list(samples.find([Origin(source)])[0].samples(Tally(), said.append)))
    assert [f"columns of {source} that nothing is made of: id (3 rows), no?te (1 rows)"] == said


@pytest.mark.parametrize(("name", "line", "place", "why"), BROKEN)
def test_a_broken_row_is_counted_and_the_next_is_read(
    tmp_path: Path, name: str, line: str | bytes, place: str, why: str
) -> None:
    """Each by its place and a reason that is the same for all of its kind."""
    first = "question,answer\nq,a\n" if name == "x.csv" else GOOD
    last = "q,a\n" if name == "x.csv" else GOOD
    content = first.encode() + (line if isinstance(line, bytes) else line.encode()) + last.encode()
    found = samples.find([Origin(write(tmp_path / name, content))])[0]
    tally = Tally()
    assert 2 == len(list(found.samples(tally)))
    ((reason, (count, places)),) = tally.to_json().items()
    assert why in reason
    assert (1, [f"{name}:{place}"]) == (count, places)


REFUSED = [
    ("x.jsonl", "", "is empty"),
    ("x.jsonl", "\n\n", "holds no rows"),
    ("x.jsonl", '{"text": "q", "id": 1}', "found: text, id"),
    ("x.jsonl.gz", gzip.compress(GOOD.encode() * 99, mtime=0)[:40], "cannot be read"),
    ("x.json", '[\n{"a": 1},\n]', "x.json:3 is not valid JSON"),
    ("x.json", '{"a": [], "b": []}', "an object with 2 lists"),
    ("x.json", "7", "neither a list"),
    ("x.csv", 'question,answer\nq,"a\n', "x.csv:2 is not valid CSV"),
    ("x.parquet", "PAR1", "cannot be read as Parquet"),
    ("x.arrow", "ARROW1", "cannot be read as Arrow"),
    ("x.txt", "hello", "convert it to JSONL"),
    ("x.csv", "question,answer,answer\nq,a,b\n", "several columns 'answer'"),
    ("x.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
]


@pytest.mark.parametrize(("name", "content", "says"), REFUSED)
def test_a_file_that_cannot_be_used_is_refused(
    tmp_path: Path, name: str, content: str | bytes, says: str
) -> None:
    """The message names the file, what is wrong, and what would work."""
    source = write(tmp_path / name, content)
    for look in (load_samples, lambda text: check_rows(Origin(text))):
        with pytest.raises(DataError) as caught:
            look(source)  # type: ignore[operator]
        assert says in str(caught.value)


def test_a_parquet_row_is_named_by_number(tmp_path: Path) -> None:
    """Parquet has no lines."""
    import pyarrow
    import pyarrow.parquet

    rows = [{"question": "q", "answer": "a"}, {"question": "q", "answer": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    said: list[str] = []
    assert 1 == len(load_samples(str(tmp_path / "x.parquet"), said.append))
    assert "(x.parquet:row 2)" in said[0]


def test_reasons_are_counted_with_their_first_places() -> None:
    """The most frequent first, three places of each."""
    tally = Tally()
    for number in range(5):
        tally.add("it is empty", [f"x:{number}"])
    tally.add("it is a list", ["x:9"])
    again = Tally()
    again.merge(json.loads(json.dumps(tally.to_json())))
    assert "5 it is empty (x:0, x:1, x:2, ...); 1 it is a list (x:9)" == str(again)


@pytest.mark.parametrize(
    ("bad", "rows", "allowed", "refused"),
    [
        (5, 9, None, False),
        (101, 2000, None, True),
        (101, 3000, None, False),
        (2, 200, "1%", False),
        (3, 200, "1%", True),
        (1, 9, "0", True),
        (9, 9, "100%", True),
    ],
)
def test_too_many_bad_rows_stop_a_run(bad: int, rows: int, allowed: str | None, refused: bool) -> None:
    """With their reasons, and what would let them pass; where none is left, whatever is allowed."""
    tally = Tally()
    tally.add("it is empty", ["x:1"], bad)
    if not refused:
        tally.check(rows, allowed)
        return
    with pytest.raises(DataError, match=r"it is empty \(x:1, \.\.\.\)|it is empty \(x:1\)"):
        tally.check(rows, allowed)


@pytest.mark.parametrize("allowed", ["many", "-1", "1.5", "inf", "nan%"])
def test_a_limit_of_bad_rows_is_a_number_or_a_share(allowed: str) -> None:
    """Nothing else."""
    with pytest.raises(SettingsError, match="--bad-rows"):
        Tally({"x": 1}, {"x": []}).check(9, allowed)


# -------------------------------------------------------------------------------- folders


def test_a_folder_is_all_its_files_by_name(tmp_path: Path) -> None:
    """Hidden, temporary and other files are left out; rows carry the name of their file; a change changes the
    folder's hash."""
    for name in ("b", "a", ".c"):
        write(tmp_path / f"{name}.jsonl", json.dumps({"question": f"of {name}", "answer": "x"}))
    write(tmp_path / "README.md", "about")
    write(tmp_path / ".part-00003.jsonl.tmp", "oops")
    write(tmp_path / "_logs" / "x.jsonl", GOOD)
    found = load_samples(str(tmp_path))
    assert [("of a", "a.jsonl:1"), ("of b", "b.jsonl:1")] == [(e.asked[0].content, e.place) for e in found]
    assert found == load_samples(str(tmp_path / "[ab].jsonl"))
    assert 2 == guess_data(str(tmp_path), None).rows
    before = source_facts(str(tmp_path))
    write(tmp_path / "b.jsonl", json.dumps({"question": "other", "answer": "x"}))
    assert before != source_facts(str(tmp_path))


@pytest.mark.parametrize("saved", [False, True])
def test_the_splits_of_a_folder_are_recognised(tmp_path: Path, saved: bool) -> None:
    """Validation rows are set apart, test rows are left alone and that is said; any can be asked for."""
    import datasets

    names = {"train": 4, "validation": 2, "test": 1}
    if saved:
        rows = {
            name: [{"question": f"{name} {i}", "answer": "a"} for i in range(n)] for name, n in names.items()
        }
        datasets.DatasetDict({n: datasets.Dataset.from_list(r) for n, r in rows.items()}).save_to_disk(
            str(tmp_path / "d")
        )
    else:
        for name, count in names.items():
            lines = [json.dumps({"question": f"{name} {i}", "answer": "a"}) + "\n" for i in range(count)]
            write(tmp_path / "d" / f"{name}-00000.jsonl", "".join(lines))
    said: list[str] = []
    found = locate(str(tmp_path / "d"), said.append)
    held_out = found.held_out()
    assert held_out is not None
    assert (4, 2) == (len(list(found.rows())), len(list(held_out.rows())))
    assert "test is left alone" in said[0]
    assert ["test 0"] == [q for q, _ in pairs(f"{tmp_path / 'd'}?split=test")]
    assert ["train 1", "train 2"] == [q for q, _ in pairs(f"{tmp_path / 'd'}?split=train[25%:-1]")]
    assert 5 == len(pairs(f"{tmp_path / 'd'}?split=train+test"))
    with pytest.raises(DataError, match=r"no split 'dev'; it has test, train, validation"):
        locate(f"{tmp_path / 'd'}?split=dev")


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
        write(tmp_path / name, GOOD)
    with pytest.raises(DataError, match=says):
        locate(str(tmp_path))


# ------------------------------------------------------------------------------- mixtures


@pytest.mark.parametrize(
    ("data", "columns", "expected"),
    [
        ("a.jsonl", None, [("a.jsonl", None, "")]),
        ("a.jsonl=0.7\nhub:o/n=.3", "text=t", [("a.jsonl", 0.7, "text=t"), ("hub:o/n", 0.3, "text=t")]),
        ("a.jsonl=2\nb.jsonl=1", "prompt=p\n", [("a.jsonl", 2.0, "prompt=p"), ("b.jsonl", 1.0, "")]),
        ("reasoning-gym:chain_sum?size=5", None, [("reasoning-gym:chain_sum?size=5", None, "")]),
        ("reasoning-gym:chain_sum?size=5=0.5", None, [("reasoning-gym:chain_sum?size=5", 0.5, "")]),
    ],
)
def test_a_mixture_is_sources_with_weights_and_columns(data: str, columns: str | None, expected: Any) -> None:
    """One a line; a parameter of a source is no weight."""
    assert expected == [(one.source, one.weight, one.columns) for one in origins_of(data, columns)]


@pytest.mark.parametrize(
    ("data", "columns", "says"),
    [
        ("a=1\nb", None, "others none"),
        ("a=0\nb=1", None, "above 0"),
        ("a\nb\nc", "x=y\nz=w", "given 2 times for 3 sources"),
    ],
)
def test_a_mixture_that_does_not_fit_is_refused(data: str, columns: str | None, says: str) -> None:
    """With what to do."""
    with pytest.raises(DataError, match=says):
        origins_of(data, columns)


def test_a_mixture_has_its_shares_and_no_row_twice() -> None:
    """The largest that the sources hold: 30 of 90 and all 10 for weights 3 and 1, whatever the seed."""
    sources = numpy.array([0] * 90 + [1] * 10)
    hashes = numpy.arange(100, dtype=numpy.uint64)
    found = [scan.mixed(sources, [3.0, 1.0], hashes, seed) for seed in (0, 0, 1)]
    assert [[30, 10]] * 3 == [numpy.bincount(sources[one]).tolist() for one in found]
    assert found[0].tolist() == found[1].tolist() != found[2].tolist()
    assert all(len(set(one.tolist())) == len(one) for one in found)


# -------------------------------------------------------------------------------- the Hub


def test_an_absent_file_names_its_nearest_sibling(tmp_path: Path) -> None:
    """A typing error in a path is answered with the right name, and is no data set of the Hub."""
    write(tmp_path / "train.jsonl", GOOD)
    for source in (tmp_path / "trian.jsonl", tmp_path / "train"):
        with pytest.raises(DataError, match=r"did you mean 'train\.jsonl'"):
            check_spelling(str(source))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("reasoning-gym:chain_summ", "did you mean 'chain_sum'"),
        ("reasoning-gym:chain_sum?sizes=3", "did you mean 'size'"),
        ("reasoning-gym:chain_sum?size=many", "whole number"),
        ("reasoning-gym:chain_sum?size=4&min_terms=9&max_terms=2", "does not take these parameters"),
        ("hub:owner/file.jsonl", "OWNER/NAME/FILE"),
        ("hub:owner/name/file.bin", "OWNER/NAME/FILE"),
        ("owner/name?split=", "split=NAME"),
        ("owner/name?split=train+test[:9]", "only one split can be cut"),
        ("nothing/*.jsonl", "no file of"),
    ],
)
def test_a_misspelt_source_is_refused_without_network(source: str, says: str) -> None:
    """Names, parameters and file types are checked at once."""
    with pytest.raises(DataError, match=says):
        check_spelling(source)


@pytest.mark.parametrize(
    "source", ["hub:owner/name/file.jsonl", "hub:owner/name", "owner/name:sub@v1?split=train"]
)
def test_an_unreachable_hub_offers_the_local_way(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """Offline, the message says in one line to bring the file."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("Name or service not known\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    assert check_spelling(source)
    with pytest.raises(DataError, match=r"cannot be reached for .*owner/name.*give the local file") as caught:
        load_samples(source)
    assert "\n" not in str(caught.value)


def test_a_hub_file_is_read_at_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Owner, name, file and revision come from the source."""
    import huggingface_hub

    asked: dict[str, object] = {}

    def fetch(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    write(tmp_path / "deep" / "file.jsonl", GOOD)
    assert 1 == len(load_samples("hub:owner/name/deep/file.jsonl@v1"))
    expected = {
        "name": "owner/name",
        "repo_type": "dataset",
        "revision": "v1",
        "allow_patterns": ["deep/file.jsonl"],
    }
    assert expected == asked


README = """---
configs:
- config_name: main
  default: true
  data_files: [{split: train, path: a.jsonl}, {split: validation, path: b.jsonl}]
- config_name: other
  data_files: [{split: train, path: b.jsonl}]
---
"""


def test_subsets_and_splits_of_a_data_set_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its README names the files of each; without network what the cache holds is used."""
    import huggingface_hub

    def offline(*_: object, **__: object) -> object:
        raise ConnectionError("no network")

    asked: list[object] = []

    def kept(name: str, **options: object) -> str:
        asked.append((name, options["revision"], options["local_files_only"]))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", kept)
    write(tmp_path / "README.md", README)
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", json.dumps({"question": f"of {name}", "answer": "x"}))
    found = locate("owner/name@v2")
    assert ["a.jsonl"] == [file.name for file in found.files]
    assert ["b.jsonl"] == [file.name for file in found.valid]
    assert [("of b", "x")] == pairs("hub:owner/name:other@v2")
    assert [("of b", "x")] == pairs("owner/name@v2?split=validation")
    assert {("owner/name", "v2", True)} == set(asked)
    with pytest.raises(DataError, match="that can be read"):
        locate("owner/name:nobody@v2")


def test_a_source_of_the_hub_is_told_from_a_path() -> None:
    """By its parts."""
    assert hub.Address("o/n", "", "main", "v1") == hub.parse("hub:o/n:main@v1")
    assert hub.Address("o/n", "data/x.jsonl.gz", "", None) == hub.parse("hub:o/n/data/x.jsonl.gz")


# -------------------------------------------------------------------------- generated tasks


def test_a_generator_gives_the_same_rows_every_time() -> None:
    """Size, seed and the task's own parameters come from the source."""
    source = "reasoning-gym:chain_sum?size=5&seed=3&min_terms=2&max_terms=2"
    rows = load_samples(source)
    assert 5 == len(rows)
    assert rows == load_samples(source)
    assert rows != load_samples(source.replace("seed=3", "seed=4"))


@pytest.mark.parametrize("task", ["chain_sum", "family_relationships", "arc_agi"])
def test_a_generated_answer_is_graded_after_a_trip_through_json(task: str) -> None:
    """The reference gets 1, nonsense less; even where the task grades with tuples."""
    row = load_samples(f"reasoning-gym:{task}?size=2")[0]
    again = from_json(json.loads(json.dumps(to_json(row))))
    assert 1.0 == answer_is_right(again, f" {row.answer}\n")
    assert answer_is_right(again, "no idea") < 1.0


def test_a_task_without_reference_answers_cannot_be_learnt() -> None:
    """Some tasks only grade."""
    with pytest.raises(DataError, match="no reference answer"):
        load_samples("reasoning-gym:rubiks_cube?size=2")


# -------------------------------------------------------------------------------- the split


def keys(prompts: list[str]) -> Any:
    """The keys of such rows."""
    return numpy.array([samples.prompt_key(sample(one)) for one in prompts], dtype=numpy.uint64)


@pytest.mark.parametrize("seed", range(5))
def test_a_split_keeps_equal_prompts_together(seed: int) -> None:
    """It is a pure function of rows and seed, and does not depend on where else rows stand."""
    rows = keys([f"q{i % 40}" for i in range(100)])
    valid = scan.held_out(rows, seed, 0.1, 500)
    train = numpy.setdiff1d(numpy.arange(100), valid)
    assert not set(rows[valid].tolist()) & set(rows[train].tolist())
    assert 1 <= len(valid) <= 10
    assert valid.tolist() == scan.held_out(rows, seed, 0.1, 500).tolist()
    turned = scan.held_out(rows[::-1].copy(), seed, 0.1, 500)
    assert set(rows[valid].tolist()) == set(rows[::-1][turned].tolist())


def test_seed_and_cap_decide_on_the_split() -> None:
    """Another seed gives another one, and no more than so many rows are kept."""
    rows = keys([str(i) for i in range(100)])
    assert set(scan.held_out(rows, 0, 0.1, 500).tolist()) != set(scan.held_out(rows, 1, 0.1, 500).tolist())
    assert 7 == len(scan.held_out(rows, 0, 0.5, 7))


@pytest.mark.parametrize("rows", [["a", "b"], ["a"] * 9 + ["b"], ["a"] * 5 + ["b"] * 5])
@pytest.mark.parametrize("share", [0.001, 0.5, 1.0])
def test_both_sides_get_a_row(rows: list[str], share: float) -> None:
    """Two different prompts are enough, however uneven."""
    assert 0 < len(scan.held_out(keys(rows), 0, share, 500)) < len(rows)


def test_one_prompt_cannot_be_split() -> None:
    """Training rows would be validation rows too; spaces make no other prompt."""
    with pytest.raises(DataError, match="two different prompts"):
        scan.held_out(keys(["q", " q\n"]), 0, 0.1, 500)


# ------------------------------------------------------------------------------- the grades


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
    assert grade == answer_is_right(sample("q", reference), answer)


def test_how_answers_are_graded_is_told() -> None:
    """By the task where it has a check, else by what follows ####, else by the whole text."""
    checked = sample("q", "so\n#### 7", {"task": "chain_sum"})
    rows = [checked, sample("q", "so\n#### 7"), sample("q", "Paris")]
    assert ["task", "final", "text"] == [grading_of(row) for row in rows]
    shown = tuple({"grading": grading_of(row)} for row in rows[1:])
    told = accuracy_of(Score("ok", "nf4", task_examples=9, samples=shown))
    assert "n = 9, exact match of what follows ####, exact match of the text" == told


def test_every_row_that_is_read_is_an_object_or_broken(tmp_path: Path) -> None:
    """Whoever reads files alone gets both."""
    source = Path(write(tmp_path / "x.jsonl", GOOD + "7\n"))
    assert [("1", dict), ("2", Broken)] == [(place, type(row)) for place, row in read_rows(source)]


def test_the_licence_of_data_is_what_their_own_card_says(tmp_path: Path) -> None:
    """A data set's folder has a card with a header; a generator its package; who says nothing, nothing."""
    folder = tmp_path / "set"
    folder.mkdir()
    for path in (folder / "rows.jsonl", tmp_path / "rows.jsonl"):
        path.write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Rows\n", encoding="utf-8")
    found = licences(f"{folder}\nreasoning-gym:chain_sum?size=4&seed=1", str(tmp_path / "rows.jsonl"))
    expected = {"set": "cc-by-4.0", "reasoning-gym:chain_sum?size=4&seed=1": "Apache-2.0", "rows.jsonl": None}
    assert expected == found
