"""Stage and push the Space: a static page that runs the ONNX graphs of a model in the visitor's browser.

The page is `model_cards/psam-lidc-space`. Its JavaScript libraries are not in the repository: they are copied from npm
packages of pinned versions when the Space is staged.
"""

import base64
import hashlib
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError
from ..files import replaced_directory
from .model_card import HUB_NAME, read_json
from .push import check_repo_name, push_folder
from .staging import PACKAGE_DATA, copy_files

PAGE_FILES = ("README.md", "index.html", "style.css", "*.js")
REPLACED = ["*.html", "*.css", "*.js", "examples/*", "vendor/*"]  # deleted by a push that does not bring them
NPM_SECONDS = 300


class Package(NamedTuple):
    """An npm package: name, version, hash of its archive in npm's notation, and the files of it that are used."""

    name: str
    version: str
    integrity: str
    files: tuple[str, ...]


PACKAGES = (
    Package(
        "onnxruntime-web",
        "1.30.0",
        "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
        (
            "dist/ort.wasm.min.mjs",
            "dist/ort-wasm-simd-threaded.mjs",
            "dist/ort-wasm-simd-threaded.wasm",
            "dist/ort.webgpu.min.mjs",
            "dist/ort-wasm-simd-threaded.asyncify.mjs",
            "dist/ort-wasm-simd-threaded.asyncify.wasm",
        ),
    ),
    Package(
        "dicom-parser",
        "1.8.21",
        "sha512-lYCweHQDsC8UFpXErPlg86Px2A8bay0HiUY+wzoG3xv5GzgqVHU3lziwSc/Gzn7VV7y2KeP072SzCviuOoU02w==",
        ("dist/dicomParser.min.js",),
    ),
    Package(
        "@cornerstonejs/codec-openjpeg",
        "1.3.6",
        "sha512-bSdZXF+2GxfBkWHUr7yGLQtIwbAm9wOl3e4ARee/9Z9lfKyVqhUCixI6+ZjIn9YKTIuDcn/NZNK94XEUg1SBtw==",
        ("dist/openjpegwasm_decode.js", "dist/openjpegwasm_decode.wasm"),
    ),
    Package(
        "@cornerstonejs/codec-charls",
        "1.2.7",
        "sha512-kNfQ7J8LIrfQUbt56fPJ0SEvevLlAAbsLHjqPS4DUDWVSuAHb5Fn0cMIV/U0SYkJRJqKvzyLJYF1hl7/xQGqLQ==",
        ("dist/charlswasm_decode.js", "dist/charlswasm_decode.wasm"),
    ),
    Package(
        "jpeg-lossless-decoder-js",
        "2.1.2",
        "sha512-fYf/plymnuKwVw+s8gJ8O/BPw8y8OLaN11MBvEcT05kuy3m45o7BEC4J0JbxMNUYyO+MdK/I/jq0q1gkVYZm2Q==",
        ("release/lossless-min.js",),
    ),
)


def stage_space(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    model: str,
    packages: str | os.PathLike[str] | None = None,
) -> None:
    """Write the folder of the Space: the page with the name of its model, the libraries and the phantom examples.

    Args:
        source: `model_cards/psam-lidc-space`.
        output: a new or empty directory.
        model: `organisation/name` of the model on the Hub, with `onnx/`.
        packages: a `node_modules` folder that holds the npm packages; by default `npm pack` fetches them.

    Raises:
        UserError: a bad name, no page in `source`, a package that is missing or of another version, or that npm does
            not deliver; an output directory that is not empty.
    """
    check_repo_name(model)
    source = Path(source)
    if not (source / "index.html").is_file():
        raise UserError(f"no index.html in {source}; accepted: model_cards/psam-lidc-space")
    with replaced_directory(output, ()) as folder:
        copy_files(source, folder, *PAGE_FILES)
        for name in ("README.md", "index.html"):
            text = (folder / name).read_text(encoding="utf-8")
            (folder / name).write_text(text.replace(HUB_NAME, model), encoding="utf-8")
        copy_files(PACKAGE_DATA, folder, "examples/*")
        (folder / "vendor").mkdir()
        with tempfile.TemporaryDirectory() as fetched:
            if packages is None:
                fetch_packages(Path(fetched))
            for package in PACKAGES:
                copy_package(package, Path(packages or fetched), folder / "vendor")


def push_space(
    source: str | os.PathLike[str],
    name: str,
    model: str,
    packages: str | os.PathLike[str] | None = None,
    private: bool = False,
    revision: str | None = None,
) -> str:
    """Stage the Space and push it as one commit.

    Args:
        source: as for `stage_space`.
        name: `organisation/name` of the Space.
        model: as for `stage_space`.
        packages: as for `stage_space`.
        private: make the Space private.
        revision: branch to push to, `main` by default.

    Returns:
        The URL of the commit.

    Raises:
        UserError: see `stage_space` and `push_folder`.
    """
    check_repo_name(name)
    again = f"python training/push_to_hub.py --space {name} --repo-id {model}"
    again += f" --packages {packages}" * bool(packages) + " --private" * private
    again += f" --revision {revision}" * bool(revision)
    with tempfile.TemporaryDirectory() as folder:
        staged = Path(folder) / "staged"
        stage_space(source, staged, model, packages)
        return push_folder(staged, name, "space", private, revision, replace=REPLACED, again=again)


def copy_package(package: Package, packages: Path, output: Path) -> None:
    """Copy the files of a package, without their folders, from a `node_modules` folder.

    Raises:
        UserError: the package is missing, of another version or incomplete.
    """
    folder = packages / package.name
    manifest = folder / "package.json"
    version = read_json(manifest).get("version") if manifest.is_file() else None
    missing = [name for name in package.files if not (folder / name).is_file()]
    if version != package.version or missing:
        raise UserError(
            f"{folder} is not {package.name} {package.version} (version {version}, missing {missing or 'nothing'}); "
            f"accepted: a node_modules folder after npm install {package.name}@{package.version}"
        )
    for name in package.files:
        shutil.copyfile(folder / name, output / Path(name).name)


def fetch_packages(folder: Path) -> None:
    """Fetch the packages with `npm pack`, check their hashes and unpack them as in a `node_modules` folder.

    Raises:
        UserError: npm is missing or fails, or an archive has another hash.
    """
    names = [f"{package.name}@{package.version}" for package in PACKAGES]
    accepted = "accepted: npm with a connection, or --packages with a node_modules folder"
    with tempfile.TemporaryDirectory() as archives:
        command = ["npm", "pack", *names, "--silent", "--pack-destination", archives]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=NPM_SECONDS, cwd=archives)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UserError(f"the npm packages cannot be fetched ({type(error).__name__}); {accepted}") from error
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or [f"status {done.returncode}"]
            raise UserError(f"the npm packages cannot be fetched ({lines[0][:200]}); {accepted}")
        for package in PACKAGES:
            unpack(package, Path(archives), folder / package.name)


def unpack(package: Package, archives: Path, folder: Path) -> None:
    """Check the hash of the archive of a package and unpack it.

    Raises:
        UserError: the archive has another hash.
    """
    archive = archives / f"{package.name.removeprefix('@').replace('/', '-')}-{package.version}.tgz"
    content = archive.read_bytes()
    integrity = f"sha512-{base64.b64encode(hashlib.sha512(content).digest()).decode()}"
    if integrity != package.integrity:
        raise UserError(f"{archive.name} has the hash {integrity}; accepted: {package.integrity}")
    wanted = {f"package/{name}" for name in (*package.files, "package.json")}
    with tarfile.open(fileobj=io.BytesIO(content)) as file:
        file.extractall(folder, [item for item in file if item.name in wanted], filter="data")
    for path in (folder / "package").iterdir():
        path.rename(folder / path.name)
