"""A file or a folder is whole or not there, wherever the writing breaks off."""

import os
import stat

import pytest
from calls import interrupted, no_space, nth

from scvae.boundary import files


@pytest.mark.parametrize("act", [no_space, interrupted])
def test_a_file_is_the_old_one_whichever_call_fails(tmp_path, failing, monkeypatch, act):
    path = tmp_path / "table.csv"

    def write(part):
        assert part.parent == path.parent
        assert part.suffix == path.suffix
        with open(part, "wb") as file:
            file.write(b"new and longer")

    for n in range(1, 20):
        path.write_bytes(b"old")
        path.chmod(0o640)
        fault, calls = nth(n, act)
        failing(fault)
        with pytest.warns(UserWarning, match="could not be flushed") if 6 <= n <= 7 and act is no_space else _nothing():
            try:
                files.write_file(path, write)
                expected = b"new and longer"
            except (OSError, KeyboardInterrupt):
                expected = b"old" if act is no_space or n < 6 else b"new and longer"
            finally:
                monkeypatch.undo()
        assert path.read_bytes() == expected
        assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]
        if len(calls) < n:
            break
    assert calls == ["open", "write", "os.open", "fsync", "replace", "os.open", "fsync"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o640  # as it was


def test_a_link_to_a_file_of_another_ending_is_followed(tmp_path):
    (tmp_path / "table.csv").symlink_to("store")
    files.write_file(tmp_path / "table.csv", lambda part: part.write_text(part.suffix))
    assert (tmp_path / "store").read_text() == ".csv"
    assert (tmp_path / "table.csv").is_symlink()


def _nothing():
    import contextlib

    return contextlib.nullcontext()


def test_a_failure_of_the_writer_is_its_own(tmp_path):
    def write(part):
        part.write_text("half")
        raise TypeError("this cannot be written")

    with pytest.raises(TypeError, match="this cannot be written"):
        files.write_file(tmp_path / "table.csv", write)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*could not be flushed")
def test_a_folder_is_whole_or_not_there(tmp_path, failing, monkeypatch):
    path = tmp_path / "cells.zarr"

    def write(part):
        (part / "inner").mkdir(parents=True)
        (part / "inner" / "numbers").write_bytes(b"new")

    for n in range(1, 30):
        fault, _ = nth(n, no_space)
        failing(fault)
        try:
            files.write_folder(path, write)
        except OSError:
            monkeypatch.undo()
            assert not list(tmp_path.iterdir())
        except BaseException:
            monkeypatch.undo()
            raise
        else:
            monkeypatch.undo()
            assert (path / "inner" / "numbers").read_bytes() == b"new"
            break
    with pytest.raises(OSError, match="could not be written"):
        files.write_folder(path, write)
    assert [p.name for p in tmp_path.iterdir()] == ["cells.zarr"]


def test_a_folder_that_another_process_made_meanwhile_is_replaced(tmp_path, monkeypatch):
    path, rename = tmp_path / "store", os.rename

    def write(content):
        def write(part):
            part.mkdir()
            (part / "numbers").write_bytes(content)

        return write

    def overtaken(part, place):
        monkeypatch.undo()
        files.write_folder(path, write(b"other"))
        rename(part, place)

    monkeypatch.setattr(os, "rename", overtaken)
    files.write_folder(path, write(b"new"), overwrite=True)
    assert (path / "numbers").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["store"]
