"""Pushing to the Hub: subprocesses against a server on the loopback address."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from loopback_hub import LOST, RESET, LoopbackHub, Repo

from probabilistic_sam.errors import UserError
from probabilistic_sam.hub.push import check_repo_name

SCRIPT = Path(__file__).resolve().parent.parent / "training" / "build_dataset.py"


def python(hub: LoopbackHub, home: Path, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | hub.environment(home), timeout=300
    )


PULL = """
import json
import datasets
from probabilistic_sam.data.format import split_content
splits = datasets.load_dataset("org/phantom")
print(json.dumps({name: split_content(rows) for name, rows in splits.items()}))
"""


@pytest.mark.slow
def test_pushed_build_is_one_commit_and_loads_by_name(tmp_path):
    output = tmp_path / "phantom"
    with LoopbackHub() as hub:
        command = [SCRIPT, "phantom", "--num-nodules", 1, "--output", output]
        pushed = python(hub, tmp_path / "home", *command, "--push-to-hub", "org/phantom", "--private")
        assert pushed.returncode == 0, pushed.stderr
        repo = hub.repos["dataset", "org/phantom"]
        assert repo.private and len(repo.commits) == 2  # a new repository has an empty first commit
        assert pushed.stdout.splitlines()[-1] == f"pushed to {hub.url}/org/name/commit/{repo.branches['main']}"
        files = {path.relative_to(output).as_posix(): path.read_bytes() for path in output.rglob("*.*")}
        assert repo.files() == files and {"README.md", "manifest.json"} < files.keys()
        pulled = python(hub, tmp_path / "elsewhere", "-c", PULL)
        assert pulled.returncode == 0, pulled.stderr
    assert json.loads(pulled.stdout.splitlines()[-1]) == json.loads(files["manifest.json"])["splits"]


@pytest.mark.slow
def test_failed_push_is_one_line_and_keeps_the_build(tmp_path):
    with LoopbackHub(fails={"/commit/main": 500}) as hub:
        command = [SCRIPT, "phantom", "--num-nodules", 1, "--output", tmp_path / "phantom"]
        result = python(hub, tmp_path / "home", *command, "--push-to-hub", "org/phantom")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: org/phantom: push failed: ") and "500" in last
    assert f"{tmp_path / 'phantom'} is complete" in last and f"delete by hand: {hub.url}/datasets/org/phantom)" in last
    assert "wrote" in result.stdout and (tmp_path / "phantom" / "manifest.json").exists()


PUSHES = """
import functools
import sys
from pathlib import Path
import huggingface_hub
from probabilistic_sam.errors import UserError
from probabilistic_sam.hub.push import push_folder
folder = Path(sys.argv[1])

def attempt(*arguments, **options):
    try:
        push_folder(folder, *arguments, **options)
    except UserError as error:
        print(*str(error).split())

(folder / "data").mkdir(parents=True)
for number in range(2):
    (folder / f"data/{number}.parquet").write_bytes(b"%d" % number)
(folder / "README.md").write_text("one")
attempt("org/twice", "dataset", replace="data/*")
(folder / "data/1.parquet").unlink()
(folder / "README.md").write_text("two")
attempt("org/twice", "dataset", replace="data/*")
attempt("org/twice", "dataset", private=True)
attempt("org/closed", "model")
huggingface_hub.HfApi = functools.partial(huggingface_hub.HfApi, endpoint="http://127.0.0.1:1")
attempt("org/unreachable", "dataset")
"""


def test_pushes_replace_each_other_and_failures_are_user_errors(tmp_path):
    with LoopbackHub(fails={"/closed/preupload/main": 403}) as hub:
        result = python(hub, tmp_path / "home", "-c", PUSHES, tmp_path / "folder")
    assert result.returncode == 0, result.stderr
    repo = hub.repos["dataset", "org/twice"]
    assert repo.files() == {"README.md": b"two", "data/0.parquet": b"0"} and len(repo.commits) == 3
    public, forbidden, unreachable = result.stdout.splitlines()
    assert public == "org/twice: not pushed, it exists and is public; accepted: a new or a private repository"
    assert forbidden.startswith("org/closed: push failed: ") and "403" in forbidden
    assert unreachable.startswith("org/unreachable: push failed: ") and "is complete" in unreachable
    assert "created on the Hub" not in unreachable


ATTEMPTS = """
import json
import sys
from pathlib import Path
import huggingface_hub
from probabilistic_sam.errors import UserError
from probabilistic_sam.hub.push import push_folder

def interrupt(*_, **__):
    raise KeyboardInterrupt

folder, attempts = Path(sys.argv[1]), json.loads(sys.argv[2])
for name, content, revision in attempts:
    (folder / "model.safetensors").write_text(content)
    if content == "interrupt":
        huggingface_hub.HfApi.upload_folder = interrupt
    try:
        push_folder(folder, name, "model", revision=revision, again="do it again")
        print("pushed")
    except KeyboardInterrupt:
        print("interrupted")
    except UserError as error:
        print(*str(error).split())
"""


def attempt(hub, tmp_path, *attempts):
    (tmp_path / "folder").mkdir()
    done = python(hub, tmp_path / "home", "-c", ATTEMPTS, tmp_path / "folder", json.dumps(attempts))
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_failed_push_deletes_nothing_and_says_what_is_on_the_hub(tmp_path):
    fails = {
        f"/lfs/upload/{hashlib.sha256(b'unlucky').hexdigest()}": 403, "/org/error/commit/main": 500,
        "/org/reset/commit/main": RESET, "/org/both/commit/new": 500, "/commit/fresh": 500, "/commit/kept": RESET,
        "/org/lost/commit/main": LOST,
    }  # fmt: skip
    with LoopbackHub(fails) as hub:
        old = hub.repos["model", "org/old"] = Repo(private=False)
        old.branches["kept"] = old.commit("main", {})
        lines = attempt(
            hub, tmp_path, ("org/lfs", "unlucky", None), ("org/error", "a", None), ("org/reset", "a", None),
            ("org/lost", "a", None), ("org/both", "a", "new"), ("org/old", "a", "fresh"), ("org/old", "a", "kept"),
            ("org/old", "a", "good"), ("org/interrupted", "interrupt", None),
        )  # fmt: skip
        assert not [request for request in hub.requests if request[0] == "DELETE" or "delete" in request[1]]
        files = {name: repo.files() for (_, name), repo in hub.repos.items()}
        assert files == {
            "org/old": {}, "org/lfs": {}, "org/error": {}, "org/reset": {}, "org/both": {}, "org/interrupted": {},
            "org/lost": {"model.safetensors": b"a"},
        }  # fmt: skip
        assert old.branches.keys() == {"main", "kept", "fresh", "good"}
        assert old.files("kept") == old.files("fresh") == {} and old.files("good") == {"model.safetensors": b"a"}
    lfs, error, reset, lost, both, fresh, kept, good, interrupted = lines
    assert (good, interrupted) == ("pushed", "interrupted")
    for name, line in {"lfs": lfs, "error": error, "reset": reset, "lost": lost}.items():
        assert line.startswith(f"org/{name}: push failed: ") and line.endswith("to push again: do it again")
        created = (
            f"created on the Hub and not deleted: repository org/{name} (to delete by hand: {hub.url}/org/{name})"
        )
        assert created in line
    assert "403" in lfs and "500" in error
    assert "created on the Hub and not deleted: repository org/both, branch new (to delete" in both
    assert f"created on the Hub and not deleted: branch fresh (to delete by hand: {hub.url}/org/old);" in fresh
    assert kept.startswith("org/old: push failed: ") and "created on the Hub" not in kept  # nothing was created


@pytest.mark.parametrize("name", ["", "phantom", "a/b/c", "org/", "org/a--b", "org/a b", "/name", "datasets/org/name"])
def test_bad_names_are_refused(name):
    with pytest.raises(UserError, match="is not a repository name.*accepted: organisation/name"):
        check_repo_name(name)
