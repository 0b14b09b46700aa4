"""What a stranger may hand over, and what a run may give away."""

from __future__ import annotations

import ast
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import budgetsearch
from budgetsearch.cli import app
from budgetsearch.core.errors import CheckpointError, ModelError, SettingsError, SpaceError, UntrustedCode
from budgetsearch.run.configuration import load_settings
from budgetsearch.run.spaces import load_space
from budgetsearch.training import checkpoints
from budgetsearch.training.data.models import resolve_model
from tests.support.faults import fastrun
from tests.support.faults.kills import preload

PACKAGE = Path(budgetsearch.__file__).parent
MODULES = ("pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle")
CALLS = ("eval", "exec", "compile", "__import__")
LOADERS = {"torch.load": "weights_only", "numpy.load": "allow_pickle", "np.load": "allow_pickle"}
SAFE_LOADERS = ("_Loader", "SafeLoader", "yaml.SafeLoader", "CSafeLoader")
SECRET = "hunter2-wonderful"


# ------------------------------------------------------------------ nothing is unpickled


def findings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) of everything that could run code from data."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in MODULES:
                    yield node.lineno, f"import {alias.name}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield node.lineno, f"from {node.module}"
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if name in CALLS:
                yield node.lineno, name
            if name in ("torch.load",) and given.get("weights_only") != "True":
                yield node.lineno, name
            if name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False":
                yield node.lineno, name
            if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"):
                loader = given.get("Loader") or (ast.unparse(node.args[1]) if len(node.args) > 1 else "")
                if loader not in SAFE_LOADERS:
                    yield node.lineno, name
            if any(given.get(word) == "True" for word in ("allow_pickle", "shell")):
                yield node.lineno, f"{name} with {given}"
            if name in ("os.system", "os.popen", "subprocess.getoutput"):
                yield node.lineno, name


def test_the_package_runs_no_code_from_data() -> None:
    """No pickle, no torch.load, no unsafe YAML, no eval or exec, no shell, anywhere in the package."""
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {what}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, what in findings(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert [] == found


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, yaml.Loader)",
        "yaml.unsafe_load(text)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_the_search_for_such_code_finds_it(code: str) -> None:
    """The test above would see each of them."""
    assert list(findings(ast.parse(code)))


def test_a_subclass_of_the_yaml_loader_is_a_safe_one() -> None:
    """``_Loader`` above stands for ``SafeLoader``."""
    import yaml

    from budgetsearch.run.spaces import _Loader

    assert issubclass(_Loader, yaml.SafeLoader)


# ---------------------------------------------------------------------- checkpoints


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A good one."""
    import torch

    folder = tmp_path / "trial0000-rung0-tokens10-attempt0"
    checkpoints.save(
        folder,
        adapter={"w": torch.ones(2)},
        config={"r": 2},
        tensors={"weight/x": torch.ones(2)},
        progress=checkpoints.Progress(10, 1),
    )
    return folder


def test_a_checkpoint_holds_safetensors_and_json_only(checkpoint: Path) -> None:
    """Each file is what its name says."""
    from safetensors.torch import load_file

    for path in checkpoint.iterdir():
        assert path.suffix in (".safetensors", ".json")
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        else:
            load_file(path)


@pytest.mark.parametrize("name", ["trainer.safetensors", "adapter_model.safetensors"])
@pytest.mark.parametrize("sums", ["theirs", "none"])
def test_a_pickle_that_calls_itself_safetensors_is_refused_unopened(
    checkpoint: Path, tmp_path: Path, name: str, sums: str
) -> None:
    """Also where the attacker has put its sum into state.json, or no sums at all."""
    import hashlib

    bomb = pickle.dumps(Bomb(tmp_path / "boom"))
    (checkpoint / name).write_bytes(bomb)
    meta = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    meta["sha256"] = {**meta["sha256"], name: hashlib.sha256(bomb).hexdigest()} if sums == "theirs" else {}
    (checkpoint / "state.json").write_text(json.dumps(meta), encoding="utf-8")
    with pytest.raises(CheckpointError):
        checkpoints.load(checkpoint)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("outside", ["../secret.json", "/etc/hostname", "a/../../secret.json"])
def test_a_checkpoint_that_names_files_outside_of_itself_is_refused(
    checkpoint: Path, tmp_path: Path, outside: str
) -> None:
    """Whatever state.json lists, nothing outside of the folder is read."""
    import hashlib

    (tmp_path / "secret.json").write_text("{}", encoding="utf-8")
    meta = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    target = checkpoint / outside
    meta["sha256"][outside] = hashlib.sha256(target.read_bytes() if target.exists() else b"").hexdigest()
    (checkpoint / "state.json").write_text(json.dumps(meta), encoding="utf-8")
    with pytest.raises(CheckpointError):
        checkpoints.load(checkpoint)


@pytest.mark.parametrize(
    "text", ["[]", "null", "3", '"x"', "{}", '{"sha256": []}', '{"sha256": {"a": 1}}', "{"]
)
def test_a_state_of_another_shape_is_a_checkpoint_error(checkpoint: Path, text: str) -> None:
    """Never an AttributeError from inside."""
    (checkpoint / "state.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError):
        checkpoints.load(checkpoint)


# ----------------------------------------------------------------------------- YAML


TAGS = (
    "!!python/object/apply:os.system ['touch {mark}']",
    "!!python/object/new:pathlib.Path ['{mark}']",
    "!!python/name:os.system",
    "!!python/module:os",
)


@pytest.mark.parametrize("tag", TAGS)
def test_yaml_that_would_make_python_objects_is_refused(tmp_path: Path, tag: str) -> None:
    """In a search space and in settings; with the file's place, and nothing has run."""
    mark = tmp_path / "mark"
    file = tmp_path / "bad.yaml"
    file.write_text(f"dimensions:\n  rank: {tag.format(mark=mark)}\n", encoding="utf-8")
    with pytest.raises(SpaceError, match=r"bad\.yaml"):
        load_space(file)
    file.write_text(f"hours: {tag.format(mark=mark)}\n", encoding="utf-8")
    with pytest.raises(SettingsError, match=r"bad\.yaml"):
        load_settings({}, file)
    assert not mark.exists()


# ---------------------------------------------------------------------- remote code


@pytest.fixture
def model_with_code(tiny_model: Path, tmp_path: Path) -> Path:
    """A model folder whose configuration and tokenizer want to run their own modules."""
    import shutil

    folder = tmp_path / "with-code"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["model_type"] = "their_own"
    config["auto_map"] = {
        "AutoConfig": "theirs.TheirConfig",
        "AutoModelForCausalLM": "theirs.TheirModel",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "theirs.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\nraise SystemExit('ran')\n", encoding="utf-8"
    )
    return folder


def test_a_model_with_its_own_code_needs_the_flag(model_with_code: Path, tmp_path: Path) -> None:
    """Without it the model is refused before anything of it runs; the message names the flag."""
    with pytest.raises(ModelError, match="trust_remote_code"):
        resolve_model(str(model_with_code), tmp_path / "cache")
    assert not (tmp_path / "ran").exists()


def test_a_model_of_a_known_kind_never_runs_the_code_beside_it(model_with_code: Path, tmp_path: Path) -> None:
    """A Llama that brings modules all the same is loaded as transformers' own Llama."""
    from budgetsearch.training.bases import load_base
    from budgetsearch.training.data.tokenizer import load_tokenizer

    config = json.loads((model_with_code / "config.json").read_text(encoding="utf-8"))
    config["model_type"] = "llama"
    (model_with_code / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = json.loads((model_with_code / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer["auto_map"] = {"AutoTokenizer": ["theirs.TheirTokenizer", None]}
    (model_with_code / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    base = resolve_model(str(model_with_code), tmp_path / "cache")
    load_tokenizer(base.path)
    assert type(load_base(str(base.path), "fp32", "cpu")).__name__ == "LlamaForCausalLM"
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def tokenizer_with_code(model_with_code: Path) -> Path:
    """A model of a kind that transformers does not know, whose tokenizer is its own code as well."""
    tokenizer = json.loads((model_with_code / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer |= {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["theirs.Theirs", None]}}
    (model_with_code / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return model_with_code


def test_a_tokenizer_with_its_own_code_is_refused_and_nobody_is_asked(
    tokenizer_with_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A question on the terminal would let a worker wait, which has none: the error names the flag."""
    from budgetsearch.training.data.tokenizer import load_tokenizer

    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "n")
    with pytest.raises(UntrustedCode, match="--trust-remote-code"):
        load_tokenizer(tokenizer_with_code)
    assert [] == asked
    assert not (tmp_path / "ran").exists()


def test_no_from_pretrained_leaves_open_whether_code_may_run() -> None:
    """Each call of a class that can run a model's code says so, or hands on what says so."""
    silent = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            called = ast.unparse(node.func)
            if called.startswith("Auto") and called.endswith((".from_pretrained", ".from_config")):
                named = {keyword.arg for keyword in node.keywords}
                if not named & {"trust_remote_code", None}:
                    silent.append(f"{path.name}:{node.lineno}")
    assert [] == silent


def test_code_that_may_run_is_hashed(model_with_code: Path, tmp_path: Path) -> None:
    """A changed byte of it is another base, also in an inner folder; what may not run does not count."""
    inside = model_with_code / "custom_generate" / "generate.py"
    inside.parent.mkdir()
    inside.write_text("a = 1\n", encoding="utf-8")
    cache = tmp_path / "cache"
    before = resolve_model(str(model_with_code), cache, trust_remote_code=True)
    assert {"theirs.py", "custom_generate/generate.py"} <= set(before.files)
    inside.write_text("a = 22\n", encoding="utf-8")
    after = resolve_model(str(model_with_code), cache, trust_remote_code=True)
    assert before.sha256 != after.sha256
    config = json.loads((model_with_code / "config.json").read_text(encoding="utf-8"))
    (model_with_code / "config.json").write_text(
        json.dumps(config | {"model_type": "llama"}), encoding="utf-8"
    )
    assert not {name for name in resolve_model(str(model_with_code), cache).files if name.endswith(".py")}


# -------------------------------------------------------------------------- network


def test_servers_listen_on_loopback_only() -> None:
    """No host in the package is anything else."""
    hosts = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = {
            node.targets[0].id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg in ("host", "bind", "address", "dashboard_host"):
                value = named.get(node.value.id) if isinstance(node.value, ast.Name) else node.value
                if isinstance(value, ast.Constant):
                    hosts.add(value.value)
                else:  # the cluster that the user named is connected to, nothing listens there
                    assert "address" == node.arg, f"{path.name}: {ast.unparse(node)}"
    assert {"127.0.0.1", "local"} <= hosts, "Ray's dashboard and its cluster of this machine"
    assert hosts <= {"127.0.0.1", "localhost", "::1", "local"}
    named = {path.name for path in PACKAGE.rglob("*.py") if "0.0.0.0" in path.read_text(encoding="utf-8")}
    assert named == {"steps.py"}  # inside a container, whose port its owner opens


# ------------------------------------------------------------------------- passwords


@pytest.fixture(scope="module")
def secretive(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run with a password in its storage's URL, whose database answers nothing; its folder and all
    that it printed."""
    preload()
    place = fastrun.Place(tmp_path_factory.mktemp("secret")).make()
    run = place.path / "runs" / "secret"

    def work() -> None:
        import os

        os.environ["BUDGETSEARCH_CACHE"] = str(place.path / "cache")
        import logging

        from budgetsearch import api

        logging.basicConfig(level=logging.DEBUG)
        fastrun.install()
        code = CliRunner().invoke(app, _arguments(place, run))
        print(code.output)
        print(api.status(run))
        if code.exit_code:
            raise AssertionError(code.output) from code.exception

    assert fastrun.wait_for(fastrun.forked(work, place.log), 120) == 0, place.log.read_text()[-3000:]
    return run, place.log.read_text(encoding="utf-8")


def _arguments(place: fastrun.Place, run: Path) -> list[str]:
    given = place.arguments(run, max_trials=3)
    # A query that SQLite's driver does not mind, in the place where servers have their password.
    given["storage"] = f"sqlite:///file:{place.path}/study.db?mode=rwc&uri=true&password={SECRET}"
    return ["run", *(f"--{name.replace('_', '-')}={value}" for name, value in given.items())]


def test_a_password_reaches_nothing_that_a_run_writes(secretive: tuple[Path, str]) -> None:
    """Not the ledger, settings, report, the adapter's manifest and card, the worker's log, nor the study."""
    run, _ = secretive
    leaks = [
        str(path.relative_to(run))
        for path in sorted(run.rglob("*"))
        if path.is_file() and SECRET.encode() in path.read_bytes()
    ]
    assert [] == leaks


def test_a_password_is_never_printed(secretive: tuple[Path, str]) -> None:
    """Nor in progress lines, a status or a warning about the storage."""
    assert SECRET not in secretive[1]


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql+nodriver://me:{SECRET}@localhost/db",
        f"mysql+nodriver://me:{SECRET}@localhost/db",
        f"postgresql+nodriver://me:{SECRET}@[broken/db",
        f"nonsense me:{SECRET}@x",
    ],
)
def test_an_unusable_storage_is_named_without_its_password(
    tiny_model: Path, rows_file: Path, tmp_path: Path, url: str
) -> None:
    """The error shows the URL's shape."""
    result = CliRunner().invoke(
        app,
        [
            *(
                "run",
                "--model",
                str(tiny_model),
                "--data",
                str(rows_file),
                "--gpu",
                "cpu",
                "--hours",
                "0.0001",
            ),
            *("--out", str(tmp_path / "out"), "--storage", url),
        ],
    )
    assert result.exit_code == 2
    assert SECRET not in result.output
