"""From ``my_module:MyRecipe`` to the class: found once, and loaded as it was found wherever it is needed."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from budgetsearch.core.code import RecipeCode
from budgetsearch.core.errors import RecipeError, nearest
from budgetsearch.training.recipes.protocol import REQUIRED, Recipe

FORM = "write my_module:MyRecipe, or path/to/file.py:MyRecipe"


def find_recipe(text: str, cwd: Path | None = None) -> RecipeCode:
    """Where the code of a recipe is: a file, a module in the working folder, or an installed one.

    Nothing is run. Raises:
        RecipeError: there is no such module.
    """
    module, colon, name = text.rpartition(":")
    if not colon or not module or not name:
        raise RecipeError(f"--recipe {text!r} names no class; {FORM}.")
    folder = cwd or Path.cwd()
    if module.endswith(".py"):
        path = (folder / Path(module).expanduser()).absolute()
        if not path.is_file():
            raise RecipeError(f"--recipe {text}: there is no file {path}; {FORM}.")
        return _in_file(path, name)
    for path in (
        folder / f"{module.replace('.', '/')}.py",
        folder / module.replace(".", "/") / "__init__.py",
    ):
        if path.is_file():
            return _in_file(path.absolute(), name)
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError) as error:
        raise RecipeError(f"--recipe {text}: {module} cannot be imported ({error}); {FORM}.") from error
    if found is None or found.origin is None or not Path(found.origin).is_file():
        raise RecipeError(
            f"--recipe {text}: there is no module {module} in {folder}, and none of that name is installed; "
            f"{FORM}."
        )
    return RecipeCode(module, name, _sum(Path(found.origin)))


def code_of(kind: type[Recipe]) -> RecipeCode:
    """The code of a class that Python has at hand.

    Raises:
        RecipeError: it is in no file, as in a notebook: a worker process could not load it.
    """
    module = sys.modules.get(kind.__module__)
    file = getattr(module, "__file__", None)
    if not file or not Path(file).is_file() or "<locals>" in kind.__qualname__:
        raise RecipeError(
            f"The recipe {kind.__qualname__} cannot be loaded by the worker process, which is another one: "
            "put the class at the top of a Python file and import it from there."
        )
    return _in_file(Path(file).absolute(), kind.__qualname__)


def load_recipe(code: RecipeCode) -> Recipe:
    """An object of the class; its module runs.

    Raises:
        RecipeError: the file has changed, cannot be run, has no such class, or the class is no recipe.
    """
    module = _module(code)
    found: Any = module
    for part in code.name.split("."):
        if not hasattr(found, part):
            known = [name for name, kind in vars(module).items() if is_recipe(kind)]
            raise RecipeError(
                f"{code.place} has no {code.name}{nearest(code.name, known)}; "
                f"{'it has ' + ', '.join(known) if known else 'it has no recipe'}."
            )
        found = getattr(found, part)
    if not is_recipe(found):
        raise RecipeError(
            f"{code.place}: {code.name} is no recipe; derive the class from budgetsearch.Recipe, or put "
            "@budgetsearch.objective before a function."
        )
    missing = [name for name in REQUIRED if getattr(found, name) is getattr(Recipe, name)]
    if missing:
        raise RecipeError(f"{code.place}: {code.name} has no {', '.join(missing)}; see budgetsearch.Recipe.")
    try:
        recipe: Recipe = found()
    except Exception as error:
        raise RecipeError(f"{code.place}: {code.name}() raised {_said(error)}.") from error
    _check_words(recipe, code)
    return recipe


def is_recipe(found: Any) -> bool:
    """Whether it is a class derived from ``Recipe``."""
    return inspect.isclass(found) and issubclass(found, Recipe) and found is not Recipe


def _module(code: RecipeCode) -> ModuleType:
    path = Path(code.place)
    if not path.is_absolute():
        try:
            return importlib.import_module(code.place)
        except Exception as error:
            raise RecipeError(f"{code.place} cannot be imported: {_said(error)}.") from error
    name = path.parent.name if path.name == "__init__.py" else path.stem
    for known in list(sys.modules.values()):
        if getattr(known, "__file__", None) == str(path) and known.__name__ != "__main__":
            return known
    if not path.is_file() or _sum(path) != code.sha256:
        state = "another file now" if path.is_file() else "gone"
        raise RecipeError(f"{path} is {state}: bring back what the run began with.")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # modules beside it are part of it; behind all that is installed
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(name, module)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        if sys.modules.get(name) is module:
            del sys.modules[name]
        if isinstance(error, KeyboardInterrupt):
            raise
        raise RecipeError(f"{path} cannot be run: {_said(error)}.") from error
    return module


def _check_words(recipe: Recipe, code: RecipeCode) -> None:
    numbers = {"step": recipe.step, "length": recipe.length or recipe.step}
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise RecipeError(
                f"{code.place}: {code.name}.{name} is {getattr(recipe, name)!r}; it must be a whole number."
            )
    for name in ("unit", "metric"):
        if not isinstance(getattr(recipe, name), str) or not getattr(recipe, name):
            raise RecipeError(f"{code.place}: {code.name}.{name} must be a word.")


def _in_file(path: Path, name: str) -> RecipeCode:
    return RecipeCode(str(path), name, _sum(path))


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"
