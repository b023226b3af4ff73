"""Files and folders are written completely or not at all, whatever goes wrong in between."""

import errno
import os
import re
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from probabilistic_sam import files
from probabilistic_sam.errors import UserError
from probabilistic_sam.files import TEMPORARY, replaced_directory, replaced_files, write_json, write_text


def contents(folder: Path) -> dict[str, str]:
    """Text of every file below a folder; empty folders are listed too, so that nothing temporary is missed."""
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else ""
        for path in folder.rglob("*")
        if path.is_file() or not any(path.iterdir())
    }


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_folder_is_replaced_as_a_whole(tmp_path):
    for names in (["a", "b"], ["b", "c"]):
        with replaced_directory(tmp_path / "deep" / "out", ("[abc]",)) as folder:
            for name in names:
                (folder / name).write_text(names[0])
            before = {name: text for name, text in contents(tmp_path).items() if TEMPORARY not in name}
            assert before == ({} if "a" in names else {"deep/out/a": "a", "deep/out/b": "a"})
    assert contents(tmp_path) == {"deep/out/b": "b", "deep/out/c": "b"}


def test_files_are_replaced_one_by_one_and_others_stay(tmp_path):
    (tmp_path / "other").write_text("mine")
    for text in ("1", "2"):
        with replaced_files(tmp_path) as folder:
            (folder / "a").write_text(text)
            (folder / "b").write_text(text)
    assert contents(tmp_path) == {"other": "mine", "a": "2", "b": "2"}
    write_text(tmp_path / "new" / "a", "é")
    assert (tmp_path / "new" / "a").read_bytes() == b"\xc3\xa9"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, UserError("wrong")])
def test_a_failure_changes_nothing(tmp_path, error):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("old")
    for writer in (replaced_directory(tmp_path / "out", ("a",)), replaced_files(tmp_path / "out")):
        with pytest.raises(error if isinstance(error, type) else type(error)), writer as folder:
            (folder / "a").write_text("half")
            raise error
    assert contents(tmp_path) == {"out/a": "old"}


def test_a_failure_while_moving_brings_the_previous_folder_back(tmp_path, monkeypatch):
    with replaced_directory(tmp_path / "out", ()) as folder:
        (folder / "a").write_text("old")
    move = os.replace

    def fails_for_the_new_b(source, target):
        if Path(source).parts[-2:] == ("new", "b"):
            raise OSError(errno.EIO, "Input/output error", str(source))
        move(source, target)

    monkeypatch.setattr(os, "replace", fails_for_the_new_b)
    with (
        pytest.raises(UserError, match="^output directory .*/out cannot be written: Input/output error$"),
        replaced_directory(tmp_path / "out", ("a", "b")) as folder,
    ):
        (folder / "a").write_text("new")
        (folder / "b").write_text("new")
    assert contents(tmp_path) == {"out/a": "old"}


def test_a_folder_that_exists_stays_where_it_is(tmp_path, monkeypatch):
    # As for a mount, or a parent that is not writable, or the current directory of a shell
    out = tmp_path / "locked" / "out"
    out.mkdir(parents=True)
    (out / ".DS_Store").write_text("of the file manager")
    before, move = out.stat().st_ino, os.replace

    def inside(source, target):
        assert {Path(source), Path(target)} & {out, out.parent} == set()
        assert out in Path(source).parents and out in Path(target).parents
        move(source, target)

    monkeypatch.setattr(os, "replace", inside)
    monkeypatch.chdir(out)
    for name in ("a", "b"):
        with replaced_directory(".", ("a", "b")) as folder:
            (folder / name).write_text(name)
        assert out.stat().st_ino == before and os.getcwd() == str(out)
        assert contents(out) == {".DS_Store": "of the file manager", name: name}


def write_result(folder, *files):
    for file in ("result.json", *files):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text('{"versions": {"probabilistic_sam": "0"}}' if file == "result.json" else "")


RESULT = ("masks/sample-[0-9]*.png", "mean.png", "result.json")


@pytest.mark.parametrize(
    ("names", "foreign"),
    [
        (["masks/mask-0.png"], "masks/mask-0.png"),
        (["masks/sample-00.png"], "masks"),  # no result.json
        (["masks/empty/"], "masks/empty"),
        (["masks/"], "masks"),
        (["box-1/"], "box-1"),
        (["result.json"], "result.json"),  # of another program
        (["!", "masks/mask-0.png"], "masks/mask-0.png"),
        (["!", "masks/more/sample-00.png"], "masks/more"),
        (["!", "notes.txt"], "notes.txt"),
        (["!", "masks/Thumbs.db", "desktop.ini", "mean.png", "masks/sample-00.png"], None),
        (["desktop.ini"], None),
        (["!"], None),
    ],
)
def test_only_a_folder_with_a_result_and_nothing_else_is_replaced(tmp_path, names, foreign):
    out = tmp_path / "out"
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        if name == "!":
            write_result(out)
        elif name.endswith("/"):
            (out / name).mkdir()
        else:
            (out / name).write_text("{}")
    before = contents(tmp_path)
    if foreign is None:
        with replaced_directory(out, RESULT, ".") as folder:
            (folder / "mean.png").write_text("new")
        kept = {name: text for name, text in before.items() if name == "out/desktop.ini"}
        assert contents(tmp_path) == {**kept, "out/mean.png": "new"}
        return
    message = rf"out holds other files \({re.escape(foreign)}\); accepted: a new directory"
    with pytest.raises(UserError, match=message), replaced_directory(out, RESULT, "."):
        pytest.fail("the block ran")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "foreign"),
    [
        ("nodule-1/mask-0/1.png", "nodule-1/mask-0"),  # as in the public slices of LIDC-IDRI
        ("nodule-1/masks/sample-00.png", "nodule-1"),
        ("nodule-x/result.json", "nodule-x"),
        ("summary.csv", None),
        ("nodule-1/result.json", None),
    ],
)
def test_every_folder_of_a_table_must_be_a_result(tmp_path, name, foreign):
    owned = (*(f"nodule-[0-9]*/{file}" for file in RESULT), "summary.csv")
    write_result(tmp_path / "out" / "nodule-0", "masks/sample-00.png")
    if name.endswith("json"):
        write_result((tmp_path / "out" / name).parent)
    else:
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("mine")
    before = contents(tmp_path)
    if foreign is None:
        with replaced_directory(tmp_path / "out", owned, "nodule-*"):
            pass
        assert contents(tmp_path) == {"out": ""}
        (tmp_path / "out" / "summary.csv").write_text("mine")
        foreign, before = "summary.csv", contents(tmp_path)
    with (
        pytest.raises(UserError, match=rf"out holds other files \({re.escape(foreign)}\)"),
        replaced_directory(tmp_path / "out", owned, "nodule-*"),
    ):
        pytest.fail("the block ran")
    assert contents(tmp_path) == before


def test_a_link_to_a_folder_is_not_a_result(tmp_path):
    write_result(tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "sample-00.png").write_text("mine")
    (tmp_path / "out" / "masks").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match=r"other files \(masks\)"), replaced_directory(tmp_path / "out", RESULT, "."):
        pass


def test_json_without_a_value_for_nan_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"value": 1.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"value": float("nan")})
    assert contents(tmp_path) == {"a.json": '{\n "value": 1.5\n}\n'}


def test_permissions_are_kept_and_new_ones_follow_the_umask(tmp_path):
    umask = os.umask(0o027)
    try:
        for _ in range(2):
            write_text(tmp_path / "file", "text")
            with replaced_directory(tmp_path / "out", ("a",)) as folder:
                (folder / "a").write_text("text")
            modes = mode(tmp_path / "file"), mode(tmp_path / "out")
            assert modes == (0o640, 0o750)
        (tmp_path / "file").chmod(0o604)
        (tmp_path / "out").chmod(0o705)
        write_text(tmp_path / "file", "text")
        with replaced_directory(tmp_path / "out", ("a",)):
            pass
        assert (mode(tmp_path / "file"), mode(tmp_path / "out")) == (0o604, 0o705)
    finally:
        os.umask(umask)


def test_concurrent_writers_do_not_collide(tmp_path):
    texts = [str(number) * 100_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: write_text(tmp_path / "file", text), texts * 4))
    (result,) = contents(tmp_path).values()
    assert result in texts
    with replaced_directory(tmp_path / "out", ("a",)) as first, replaced_directory(tmp_path / "out", ("a",)) as second:
        (first / "a").write_text("first")
        (second / "a").write_text("second")
    assert (tmp_path / "out" / "a").read_text() == "first"  # the outer block ends last


def test_only_what_killed_processes_left_is_removed(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = [f"{TEMPORARY}{ended.pid}-a", f"{TEMPORARY}{os.getppid()}-a", ".tmp-other.host-1-a", f"{TEMPORARY}x"]
    for name in names:
        (tmp_path / name / "new").mkdir(parents=True)
    write_text(tmp_path / "file", "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names[1:], "file"])


def test_what_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder" / "a").mkdir(parents=True)
    here = re.escape(str(tmp_path))
    with (
        pytest.raises(UserError, match=f"^{here}/file/a cannot be written: Not a directory$"),
        replaced_files(tmp_path / "file" / "a"),
    ):
        pass
    with pytest.raises(UserError, match=f"^{here}/folder cannot be written: Is a directory$"):
        write_text(tmp_path / "folder" / "a", "text")
    with (
        pytest.raises(UserError, match="file is a file; accepted: a directory"),
        replaced_directory(tmp_path / "file", ()),
    ):
        pass
    with (
        pytest.raises(UserError, match=r"folder holds other files \(a\); accepted: a new"),
        replaced_directory(tmp_path / "folder", ("b*",)),
    ):
        pass
    with (
        pytest.raises(UserError, match=f"^{here}/absent: No such file or directory; {here} cannot be written$"),
        replaced_files(tmp_path),
    ):
        (tmp_path / "absent").read_text()  # the error names the file that it is about
    monkeypatch.setattr(files.os, "access", lambda *_: False)  # the superuser may write everywhere
    with pytest.raises(UserError, match="not writable"), replaced_directory(tmp_path / "folder", ("a",)):
        pass
    assert contents(tmp_path) == {"file": "mine", "folder/a": ""}
