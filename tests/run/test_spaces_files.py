"""The search spaces that come with the package, and files that the user writes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from budgetsearch.core.errors import SettingsError, SpaceError
from budgetsearch.core.space.dimensions import Choice, Constant, Normal, Number
from budgetsearch.core.space.space import Space
from budgetsearch.machine import rates
from budgetsearch.machine.shapes import ModelShape, shape_of
from budgetsearch.run.spaces import following, list_spaces, load_space, read_yaml, spaces_folder

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
    """bf16 and nf4, ranks 8 to 128, a learning rate that follows the model, about 3e-4, at alpha 32."""
    space = load_space("lora")
    rank, rate, alpha = (space[name] for name in ("rank", "learning_rate", "alpha"))
    assert isinstance(rank, Choice)
    assert isinstance(rate, Number)
    assert isinstance(alpha, Constant)
    assert ("bf16", "nf4") == space["quantization"].corners()  # type: ignore[union-attr]
    assert ((8, 16, 32, 64, 128), True) == (rank.values, rank.ordered)
    assert (2e-5, 3e-3, True) == (rate.low, rate.high, rate.log)
    assert Normal(3e-4, 0.4, "model") == rate.prior
    assert 32 == alpha.value


@pytest.mark.parametrize(
    ("name", "width", "expected"),
    [
        ("lora", 4096, 3.1e-4),  # Llama 7B
        ("lora", 2048, 3.4e-4),  # Qwen3 1.7B
        ("lora_small", 960, 9.8e-4),  # SmolLM2 360M
        ("lora_small", 576, 2e-3),  # SmolLM2 135M
        ("lora_small", 64, 2e-3),
    ],
)
def test_the_learning_rate_begins_where_it_suits_the_model(name: str, width: int, expected: float) -> None:
    """As the fit and the measured small model have it; it says so, and the record of it follows no more."""
    shape = make_shape(width)
    space = following(load_space(name), shape)
    assert expected == space.default()["learning_rate"]
    assert str(shape.hidden) in space["learning_rate"].source
    assert Space.parse(space.to_dict()) == space
    assert "follows" not in str(space.to_dict())
    assert following(space, shape) is space
    assert load_space(name) == following(load_space(name), None)


def test_a_centre_that_does_not_fit_into_the_range_moves_to_its_end() -> None:
    """A space of one's own may be narrower than what suits the model."""
    raw = {**load_space("lora").to_dict(), "name": "own"}
    rate = next(d for d in raw["dimensions"] if d["name"] == "learning_rate")
    rate.update(low=1e-6, high=1e-4, prior={"center": 1e-5, "spread": 0.4, "follows": "model"})
    assert 1e-4 == following(Space.parse(raw), make_shape(4096)).default()["learning_rate"]


def make_shape(hidden: int) -> ModelShape:
    """The shape of a dense model of this width."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 100}
    return shape_of({"model_type": "llama", "hidden_size": hidden, **sizes})


def test_the_fit_in_the_package_is_the_one_that_was_made() -> None:
    """``benchmarks.spaces.rates`` wrote it down."""
    found = json.loads(Path("benchmarks/spaces/results/rates.json").read_text(encoding="utf-8"))
    assert (rates.FIT, rates.PER_DECADE) == (found["fit"]["constant"], found["fit"]["per_width"])
    left_out, trials = found["left_out"], found["first_trials"]
    assert left_out["width"]["mean_regret"] < left_out["fixed"]["mean_regret"]
    assert all(trials["now"][key] < trials["before"][key] for key in trials["now"])


def test_lora_small_is_for_the_cpu() -> None:
    """fp32 and nf4, small ranks, a learning rate ten times that of a 7B."""
    space = load_space("lora_small")
    rate = space["learning_rate"]
    assert isinstance(rate, Number)
    assert ("fp32", "nf4") == space["quantization"].corners()  # type: ignore[union-attr]
    assert (4, 8, 16, 32) == space["rank"].corners()  # type: ignore[union-attr]
    assert (3e-4, 1e-2, 2e-3) == (rate.low, rate.high, rate.prior and rate.prior.center)


def test_lora_wide_is_lora_and_more() -> None:
    """The five that every run has are the same: ranges, centres that follow the model, and sources."""
    plain, wide = load_space("lora"), load_space("lora_wide")
    assert plain.dimensions == tuple(wide[dimension.name] for dimension in plain.dimensions)
    assert len(wide.dimensions) > len(plain.dimensions)


def test_the_list_names_every_file() -> None:
    """list_spaces gives name, path and description of each, in order."""
    found = list_spaces()
    assert FILES == [info.path for info in found]
    assert ["lora", "lora_small", "lora_wide"] == [info.name for info in found]
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
