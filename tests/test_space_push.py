"""The Space: its staging and push."""

import base64
import functools
import io
import json
import shutil
import sys
import tarfile
from pathlib import Path

import huggingface_hub
import pytest
from loopback_hub import LoopbackHub
from tiny import load_script

from probabilistic_sam.errors import UserError
from probabilistic_sam.hub import space

ROOT = Path(__file__).resolve().parent.parent
PAGE, MODEL = ROOT / "model_cards" / "psam-lidc-space", ROOT / "model_cards" / "psam-lidc"


@pytest.fixture
def packages(tmp_path):
    """A `node_modules` folder of the right versions; each file holds its own name."""
    for package in space.PACKAGES:
        for name in package.files:
            path = tmp_path / "node_modules" / package.name / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
        manifest = {"name": package.name, "version": package.version}
        (tmp_path / "node_modules" / package.name / "package.json").write_text(json.dumps(manifest))
    return tmp_path / "node_modules"


def test_staged_space_is_the_page_with_its_model_libraries_and_examples(packages, tmp_path):
    space.stage_space(PAGE, tmp_path / "staged", "me/mine", packages)
    files = {path.relative_to(tmp_path / "staged").as_posix() for path in (tmp_path / "staged").rglob("*.*")}
    expected = {path.name for path in PAGE.iterdir()} | {
        f"vendor/{Path(n).name}" for p in space.PACKAGES for n in p.files
    }
    assert files == expected | {"examples/examples.json"} | {f"examples/phantom-{number}.png" for number in (1, 2, 3)}
    page, card = ((tmp_path / "staged" / name).read_text() for name in ("index.html", "README.md"))
    assert (
        '<meta name="model" content="me/mine">' in page
        and "- me/mine\n" in card
        and "org/psam-lidc" not in page + card
    )
    assert (
        card.startswith("---\n") and "sdk: static\n" in card and "cross-origin-embedder-policy: require-corp" in card
    )


def test_every_file_that_the_service_worker_keeps_is_staged(packages, tmp_path):
    space.stage_space(PAGE, tmp_path / "staged", "me/mine", packages)
    listed = (PAGE / "service-worker.js").read_text().partition("PAGE = [")[2].partition("];")[0]
    names = [name.strip(' "\n') for name in listed.split(",")]
    assert names[0] == "./" and names[-1] == ""
    assert [name for name in names[1:-1] if not (tmp_path / "staged" / name).is_file()] == []


def test_packages_of_another_version_or_incomplete_are_refused(packages, tmp_path):
    (packages / "dicom-parser" / "package.json").write_text('{"version": "1.0.0"}')
    with pytest.raises(UserError, match=r"is not dicom-parser 1\.8\.21 \(version 1\.0\.0, .*accepted: a node_modules"):
        space.stage_space(PAGE, tmp_path / "staged", "me/mine", packages)
    assert not (tmp_path / "staged").exists()
    shutil.rmtree(packages / "onnxruntime-web" / "dist")
    with pytest.raises(UserError, match="is not onnxruntime-web .*missing .*ort.wasm.min.mjs"):
        space.stage_space(PAGE, tmp_path / "staged", "me/mine", packages)


def test_without_npm_or_page_the_error_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        UserError, match=r"^the npm packages cannot be fetched \(FileNotFoundError\); accepted: npm .*$"
    ):
        space.stage_space(PAGE, tmp_path / "staged", "me/mine")
    with pytest.raises(UserError, match="^no index.html in .*; accepted: model_cards/psam-lidc-space$"):
        space.stage_space(MODEL, tmp_path / "staged", "me/mine")


def test_archives_are_unpacked_only_with_the_pinned_hash(tmp_path):
    package = space.PACKAGES[1]
    archive = tmp_path / "dicom-parser-1.8.21.tgz"
    with tarfile.open(archive, "w:gz") as file:
        for name in (*package.files, "package.json", "other.js"):
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(name)
            file.addfile(info, io.BytesIO(name.encode()))
    with pytest.raises(UserError, match=r"has the hash sha512-\S+; accepted: sha512-lYCweHQ"):
        space.unpack(package, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    digest = base64.b64encode(space.hashlib.sha512(archive.read_bytes()).digest()).decode()
    space.unpack(package._replace(integrity=f"sha512-{digest}"), tmp_path, tmp_path / "out")
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    assert files == {*package.files, "package.json"}


def test_space_is_pushed_as_one_commit(packages, tmp_path, monkeypatch, capsys):
    command = ["push_to_hub.py", "--space", "org/demo", "--repo-id", "org/mine", "--packages", str(packages)]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    with LoopbackHub() as hub:
        client = functools.partial(huggingface_hub.HfApi, endpoint=hub.url, token="hf_test")
        monkeypatch.setattr(huggingface_hub, "HfApi", client)
        load_script("push_to_hub").main()
        repo = hub.repos["space", "org/demo"]
        address = f"{hub.url}/org/name/commit/{repo.branches['main']}"
    files = repo.files()
    assert len(repo.commits) == 2 and capsys.readouterr().out == f"pushed to {address}\n"
    assert b"org/mine" in files["index.html"] and files["vendor/ort.wasm.min.mjs"] == b"dist/ort.wasm.min.mjs"


@pytest.mark.parametrize(
    "arguments", [[], ["--model", "run", "--space", "org/demo"], ["--model", "run", "--packages", "x"]]
)
def test_either_a_model_or_the_space_is_pushed(arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["push_to_hub.py", "--repo-id", "org/mine", *arguments])
    with pytest.raises(UserError, match="accepted: (either --model or --space|only with --space)$"):
        load_script("push_to_hub").main()
