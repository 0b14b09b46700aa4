"""The search spaces that come with the package, and files that the user writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from budgetsearch.core.errors import SettingsError, SpaceError
from budgetsearch.core.space.dimensions import Choice, Number, Tied
from budgetsearch.core.space.space import Space
from budgetsearch.run.spaces import list_spaces, load_space, read_yaml, spaces_folder

FILES = sorted(spaces_folder().rglob("*.yaml"))
NAMES = [str(path.relative_to(spaces_folder())) for path in FILES]
MINIMAL = """dimensions:
  quantization: {kind: constant, value: nf4}
  rank: {kind: constant, value: 8}
  learning_rate: {kind: float, low: 1e-5, high: 1E-3, log: true}
"""


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_every_space_loads_and_survives_json(path: Path) -> None:
    """What comes with the package parses, and parses again from its own record."""
    space = load_space(path)
    assert space == Space.parse(space.to_dict())
    assert space.description


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_every_prior_lies_inside_its_range(path: Path) -> None:
    """The likeliest configuration is one of the space, and each number has its prior."""
    space = load_space(path)
    space.validate(space.default())
    numbers = [dimension for dimension in space.dimensions if isinstance(dimension, Number)]
    assert [] == [
        item.name for item in numbers if not item.prior or not item.low < item.prior.center < item.high
    ]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_every_dimension_says_where_it_comes_from(path: Path) -> None:
    """Each has a source, a comment right above it that says why, and a prior if it is searched."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for name, raw in read_yaml(path, SpaceError)["dimensions"].items():
        above = lines[lines.index(f"  {name}:") - 1]
        assert (True, True) == (bool(raw.get("source")), bool(re.match(r"  # \w", above))), name
        assert raw["kind"] in ("tied", "constant") or "prior" in raw, name


def test_lora_has_the_priors_of_the_field() -> None:
    """bf16 and nf4, ranks 8 to 128, a learning rate about 2e-4, alpha at twice the rank."""
    space = load_space("lora")
    rank, rate, alpha = (space[name] for name in ("rank", "learning_rate", "alpha"))
    assert isinstance(rank, Choice)
    assert isinstance(rate, Number)
    assert isinstance(alpha, Tied)
    assert ("bf16", "nf4") == space["quantization"].corners()  # type: ignore[union-attr]
    assert ((8, 16, 32, 64, 128), True) == (rank.values, rank.ordered)
    assert (1e-5, 1e-3, True, 2e-4) == (rate.low, rate.high, rate.log, rate.prior and rate.prior.center)
    assert ("rank", 2) == (alpha.to, alpha.factor)


def test_lora_small_is_for_the_cpu() -> None:
    """fp32 and nf4, small ranks, a learning rate ten times that of a 7B."""
    space = load_space("lora_small")
    rate = space["learning_rate"]
    assert isinstance(rate, Number)
    assert ("fp32", "nf4") == space["quantization"].corners()  # type: ignore[union-attr]
    assert (4, 8, 16, 32) == space["rank"].corners()  # type: ignore[union-attr]
    assert (3e-4, 1e-2, 2e-3) == (rate.low, rate.high, rate.prior and rate.prior.center)


def test_the_list_names_every_file() -> None:
    """list_spaces gives name, path and description of each, in order."""
    found = list_spaces()
    assert FILES == [info.path for info in found]
    assert ["lora", "lora_small"] == [info.name for info in found]
    assert all(info.description for info in found)


def test_a_user_file_loads_by_its_path_and_1e_5_is_a_number(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-5 as text; people mean the number."""
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL)
    rate = load_space(path)["learning_rate"]
    assert isinstance(rate, Number)
    assert ("mine", 1e-5, 1e-3) == (load_space(str(path)).name, rate.low, rate.high)


def test_an_unknown_name_gets_the_nearest() -> None:
    """A slip of the pen is answered with the name that was meant, and with all names."""
    with pytest.raises(SpaceError, match=r"'lora_smal' \(did you mean 'lora_small'\?\).*lora, lora_small"):
        load_space("lora_smal")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dimensions:\n  rank: [8, 16\n", ["line 3", "correct the YAML"]),
        (MINIMAL + "  rank: {kind: constant, value: 9}\n", ["line 5", "'rank' is there twice"]),
        ("- rank\n", ["must hold a mapping", "list"]),
        ("", ["quantization, rank, learning_rate"]),
        (MINIMAL.replace("value: 8", "valeu: 8"), ["'rank'", "'value'"]),
        ("dimensions: !!python/object/apply:os.getcwd []\n", ["line 1"]),
    ],
)
def test_a_broken_file_says_where(tmp_path: Path, text: str, words: list[str]) -> None:
    """The message names the file and the line, or the dimension; nothing in a file is executed."""
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(SpaceError) as caught:
        load_space(path)
    assert [] == [word for word in [str(path), *words] if word not in str(caught.value)]


def test_a_file_that_cannot_be_read_is_the_callers_error(tmp_path: Path) -> None:
    """The reader raises the class that its caller names, for a folder and for binary alike."""
    with pytest.raises(SettingsError, match="cannot be read"):
        read_yaml(tmp_path, SettingsError)
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match="UTF-8"):
        read_yaml(tmp_path / "x.yaml", SettingsError)
