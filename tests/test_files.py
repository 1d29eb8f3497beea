"""Files and folders are complete or absent."""

import os
from pathlib import Path

import pytest

from recurrent_bart import files
from recurrent_bart.files import atomic_directory, atomic_write, fingerprint, replace_and_fsync


def test_a_file_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic_write(path, "old")
    monkeypatch.setattr(files.os, "replace", lambda *_: pytest.fail("crash"))
    with pytest.raises(BaseException, match="crash"):
        atomic_write(path, "new")
    assert path.read_text() == "old"


def test_a_folder_appears_when_it_is_complete_and_not_when_it_fails(tmp_path):
    folder = tmp_path / "deep" / "folder"
    with atomic_directory(folder) as draft:
        (draft / "file").write_text("new")
        assert not folder.exists()
    assert (folder / "file").read_text() == "new"
    assert folder.stat().st_mode & 0o777 == 0o755
    other = tmp_path / "deep" / "other"
    with pytest.raises(FileNotFoundError), atomic_directory(other) as draft:
        (draft / "no folder" / "file").write_text("half")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["folder"]


def test_a_folder_makes_way_for_a_new_one_only_when_told(tmp_path):
    folder = tmp_path / "folder"
    for text, replaces in (("first", False), ("dropped", False), ("second", True)):
        with atomic_directory(folder, replaces) as draft:
            (draft / "file").write_text(text)
        assert (folder / "file").read_text() == ("first" if text == "dropped" else text)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_failed_replacement_leaves_the_old_one(tmp_path):
    folder = tmp_path / "folder"
    with atomic_directory(folder) as draft:
        (draft / "file").write_text("old")
    with pytest.raises(FileNotFoundError), atomic_directory(folder, replaces=True) as draft:
        (draft / "no folder" / "file").write_text("half")
    assert (folder / "file").read_text() == "old"


def test_what_a_crash_left_behind_does_not_stand_in_the_way(tmp_path):
    folder = tmp_path / "folder"
    for name in (folder.name, ".folder.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("old")
    with atomic_directory(folder, replaces=True) as draft:
        (draft / "file").write_text("new")
    assert (folder / "file").read_text() == "new"


def test_a_fingerprint_depends_on_all_values_and_their_order():
    values = [fingerprint("a", 1), fingerprint("a", 2), fingerprint(1, "a"), fingerprint(["a", 1])]
    assert len(set(values)) == 4
    # Caches and checkpoints on disk contain this hash.
    assert values[0] == fingerprint("a", 1) == "2657442bb4a48d62"


def test_a_replaced_file_is_on_disk_before_its_name_and_its_folder_after(tmp_path, monkeypatch):
    events, (fsync, replace) = [], (files.os.fsync, files.os.replace)
    monkeypatch.setattr(
        files.os, "fsync", lambda number: (events.append(os.readlink(f"/proc/self/fd/{number}")), fsync(number))
    )
    monkeypatch.setattr(files.os, "replace", lambda *names: (events.append("replace"), replace(*names)))
    draft, path = tmp_path / "draft", tmp_path / "file"
    draft.write_text("new")
    path.write_text("old")
    replace_and_fsync(draft, path)
    assert events == [str(draft), "replace", str(tmp_path)]
    assert (path.read_text(), draft.exists()) == ("new", False)


@pytest.mark.parametrize("how", ["file", "folder"])
def test_a_new_file_or_folder_survives_a_crash_of_the_host(tmp_path, monkeypatch, how):
    events, (fsync, rename, replace) = [], (files.os.fsync, Path.rename, files.os.replace)
    monkeypatch.setattr(
        files.os, "fsync", lambda number: (events.append(os.readlink(f"/proc/self/fd/{number}")), fsync(number))
    )
    monkeypatch.setattr(Path, "rename", lambda *names: (events.append("rename"), rename(*names)))
    monkeypatch.setattr(files.os, "replace", lambda *names: (events.append("rename"), replace(*names)))
    if how == "file":
        atomic_write(tmp_path / "file", "text")
    else:
        with atomic_directory(tmp_path / "folder") as draft:
            (draft / "inner").mkdir()
            (draft / "inner" / "weights").write_text("text")
    before, after = events[: events.index("rename")], events[events.index("rename") :]
    names = {Path(path).name.split(".")[0] for path in before if Path(path) != tmp_path}
    assert names == ({"file"} if how == "file" else {"", "inner", "weights"})
    assert after == ["rename", str(tmp_path)]
