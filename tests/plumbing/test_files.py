"""Files and folders are complete or as they were before, whatever interrupts their writing."""

import errno
import json
import os
from types import SimpleNamespace

import pytest
import torch

from plumbing.files import check_folder, check_output, cut_log, drafted, replacing, write_json


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_replacing(tmp_path):
    path = tmp_path / "a.json"
    write_json(tmp_path / "new" / "b.json", [1, 2])
    assert json.loads((tmp_path / "new" / "b.json").read_text()) == [1, 2]
    path.write_text("old")
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and names(tmp_path) == ["a.json", "new"]


FULL = OSError(errno.ENOSPC, "No space left")


@pytest.mark.parametrize("error", [KeyboardInterrupt(15), FULL, RuntimeError("bug")])
@pytest.mark.parametrize("in_torch_save", [False, True])
def test_a_failure_leaves_the_old_file(tmp_path, error, in_torch_save):
    """torch.save then reports only that it cannot close its archive."""
    path = tmp_path / "a.pt"
    path.write_text("old")

    written = []

    def write(data):
        written.append(data)
        if not in_torch_save or len(written) == 3:
            raise error
        return len(data)

    with pytest.raises((type(error), ValueError)) as raised, replacing(path):
        torch.save(torch.ones(9), SimpleNamespace(write=write)) if in_torch_save else write(b"")
    if error is FULL:
        assert f"{path}: cannot be written (No space left); " in str(raised.value)
    elif not in_torch_save or isinstance(error, KeyboardInterrupt):
        assert raised.value.args == error.args
    assert path.read_text() == "old" and names(tmp_path) == ["a.pt"]


def test_cut_log(tmp_path):
    path = tmp_path / "log.jsonl"
    cut_log(path, 3)
    assert path.read_text() == ""
    lines = [json.dumps({"step": step}) + "\n" for step in (1, 2, 4)]
    path.write_text("".join(lines) + '{"step": 5, "lo')  # killed while it wrote
    cut_log(path, 2)
    assert path.read_text() == "".join(lines[:2])


def test_a_draft_takes_its_name_when_it_is_complete(tmp_path):
    folder = tmp_path / "cache" / "x"
    for notes, kept in ((None, []), ("rows-*", ["x.tmp"])):
        with pytest.raises(KeyboardInterrupt), drafted(folder, notes) as draft:
            (draft / "rows-1").write_text("one")
            assert names(folder.parent) == [".lock", "x.tmp"]
            raise KeyboardInterrupt
        assert names(folder.parent) == [".lock", *kept]
    with drafted(folder) as draft:
        assert names(draft) == ["rows-1"]  # to be resumed
        (draft / "rows-2").write_text("two")
    with drafted(folder) as draft:
        assert draft is None  # somebody has completed it
    assert names(folder) == ["rows-1", "rows-2"] and names(folder.parent) == [".lock", "x"]


def test_places_that_cannot_be_written_to_are_named(tmp_path, monkeypatch):
    check_output(tmp_path / "new" / "deeper" / "x.json")
    assert names(tmp_path) == []
    (tmp_path / "file").write_text("")
    for path, message in (("file/x/y.json", "file: is a file"), (".", "is a folder; give")):
        with pytest.raises(ValueError, match=message):
            check_output(tmp_path / path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(ValueError, match=f"{tmp_path}: cannot be written to; fix permissions"):
        check_folder(tmp_path / "new")
