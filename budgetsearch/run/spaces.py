"""Search spaces as files: the ones that come with the package, and the user's own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from budgetsearch.core.errors import SpaceError, UsageError, nearest
from budgetsearch.core.space.dimensions import Number
from budgetsearch.core.space.space import Space
from budgetsearch.machine.rates import center_of
from budgetsearch.machine.shapes import ModelShape

SUFFIXES = (".yaml", ".yml")
OWN = "own"
"""The name of a search space that is given without one."""
MOST_VALUES = 100_000
"""No file of settings or of a search space holds as many."""


@dataclass(frozen=True)
class SpaceInfo:
    """A search space that comes with the package."""

    name: str
    path: Path
    description: str


class _Loader(yaml.SafeLoader):
    """The safe loader, less two traps: ``1e-5`` is a number, and no key may stand twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+|\d*\.\d+|\d+\.)[eE][-+]?\d+\Z"), list("-+.0123456789")
)


def read_yaml(path: Path, error: type[UsageError]) -> Mapping[str, Any]:
    """The mapping that a YAML file holds; an empty file is an empty mapping.

    Raises:
        UsageError: of the class ``error``: unreadable, broken (with its line), or no mapping.
    """
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror}); check the path.") from problem
    except UnicodeDecodeError as problem:
        raise error(f"{path}: is not text in UTF-8; save it as YAML.") from problem
    except (ValueError, OverflowError, RecursionError) as problem:  # a date of month 99, endless brackets
        raise error(f"{path}: holds a value that cannot be read ({problem}); correct the YAML.") from problem
    except yaml.YAMLError as problem:
        raise error(f"{path}{_place(problem)}; correct the YAML.") from problem
    if _is_endless(loaded):
        raise error(f"{path}: its aliases unfold to more than {MOST_VALUES} values; write fewer of them.")
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise error(f"{path}: must hold a mapping (key: value), not a {type(loaded).__name__}.")
    return loaded


def _is_endless(value: Any) -> bool:
    """Whether aliases of aliases make a few lines hold more than anybody wrote."""
    waiting, seen = [value], 0
    while waiting and seen <= MOST_VALUES:
        one = waiting.pop()
        seen += 1
        if isinstance(one, (dict, list)):
            waiting += one if isinstance(one, list) else [*one, *one.values()]
    return seen > MOST_VALUES


def list_spaces() -> list[SpaceInfo]:
    """The search spaces that come with the package, by name.

    Raises:
        SpaceError: one of the files is broken.
    """
    folder = spaces_folder()
    files = sorted(path for suffix in SUFFIXES for path in folder.rglob(f"*{suffix}"))
    return [_info(path, folder) for path in files]


def find_space(name_or_path: str | Path) -> Path:
    """The file of a search space, by the name of one that comes with the package, or by path.

    Raises:
        SpaceError: there is none; it names the nearest.
    """
    text = str(name_or_path)
    folder = spaces_folder()
    names = {_name(path, folder): path for suffix in SUFFIXES for path in folder.rglob(f"*{suffix}")}
    if text in names:
        return names[text]
    path = Path(text).expanduser()
    if path.is_file():
        return path
    hint = nearest(text, names)
    known = ", ".join(sorted(names))
    raise SpaceError(
        f"There is no search space {text!r}{hint}; use one of {known}, or the path of a YAML file."
    )


def load_space(space: str | Path | Mapping[str, Any], *, free: bool = False) -> Space:
    """Read a search space: by the name of one that comes with the package, by path, or from its mapping.

    ``free``: it is that of a recipe, and names whatever that takes.

    Raises:
        SpaceError: there is none, or it is broken; it names the file, the line or the dimension.
    """
    if isinstance(space, Mapping):
        space = {**space, "free": True} if free else space
        return Space.parse(space, str(space.get("name") or OWN))
    path = find_space(space)
    raw = read_yaml(path, SpaceError)
    raw = {**raw, "free": True} if free else raw
    try:
        return Space.parse(raw, path.stem)
    except SpaceError as problem:
        raise SpaceError(f"{path}: {problem}") from problem


def following(space: Space, shape: ModelShape | None) -> Space:
    """The space with the centre of its learning rate where it suits this model, if it is to follow it and the
    model's width is known."""
    rate = next((d for d in space.dimensions if d.name == "learning_rate"), None)
    if shape is None or not isinstance(rate, Number) or rate.prior is None or not rate.prior.follows:
        return space
    center = center_of(shape.hidden)
    return space.centered("learning_rate", center.rate, center.source)


def spaces_folder() -> Path:
    """Inside the package when it comes from a wheel, beside it in a checkout."""
    package = Path(__file__).parent.parent
    shipped = package / "search_spaces"
    return shipped if shipped.is_dir() else package.parent / "search_spaces"


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def _info(path: Path, folder: Path) -> SpaceInfo:
    description = str(read_yaml(path, SpaceError).get("description", ""))
    return SpaceInfo(_name(path, folder), path, description)


def _place(problem: yaml.YAMLError) -> str:
    if isinstance(problem, yaml.MarkedYAMLError) and problem.problem_mark is not None:
        mark = problem.problem_mark
        return f", line {mark.line + 1}, column {mark.column + 1}: {problem.problem}"
    return f": {problem}"
