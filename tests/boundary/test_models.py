"""The folder of a saved model holds the old model or the new one, wherever the writing breaks off."""

import builtins
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from calls import REMOVES, WRITES, interrupted, no_space, nth

import scvae
from scvae.boundary import models


def numbers(path):
    content, weights = models.read_model(path)
    return content["n"], weights


def model_of(n):
    return {"n": n}, bytes([n]) * 1000


def temporary(folder):
    return [path for path in folder.rglob("*") if ".part" in path.name]


SCENES = {
    "fresh": lambda path: None,
    "over a model": lambda path: models.write_model(path, *model_of(1)),
    "over the same weights": lambda path: models.write_model(path, {"n": 1}, model_of(2)[1]),
    "over an empty folder": lambda path: path.mkdir(),
}


def before_and_after(scene, path):
    SCENES[scene](path)
    if not (path / "model.json").exists():
        return None
    return numbers(path)


def now(path):
    try:
        return numbers(path)
    except FileNotFoundError:
        return None


@pytest.mark.parametrize("act", [no_space, interrupted])
@pytest.mark.parametrize("ever_after", [False, True], ids=["once", "for ever"])
@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.filterwarnings("ignore:.*could not be flushed")
def test_a_model_is_the_old_one_whichever_call_fails(tmp_path, failing, monkeypatch, scene, ever_after, act):
    for n in range(1, 60):
        folder = tmp_path / str(n)
        folder.mkdir()
        path = folder / "model"
        old = before_and_after(scene, path)
        fault, calls = nth(n, act, ever_after=ever_after)
        failing(fault, [name for name in WRITES if not (ever_after and name == "os.open")])  # to remove takes that too
        raised = None
        try:
            models.write_model(path, *model_of(2), overwrite=True)
        except (OSError, KeyboardInterrupt) as error:
            raised = error
        finally:
            monkeypatch.undo()
        if raised is None:
            assert now(path) == (2, model_of(2)[1])
        elif act is no_space:
            assert now(path) == old  # what raises has changed nothing
            assert str(raised) == f"{path} could not be written: No space left on device. What was there is as it was."
        else:
            assert now(path) in (old, (2, model_of(2)[1]))
        assert not temporary(folder)
        if path.exists():  # former weights stay where it is not sure that they are not needed
            at_most = {2, 3} if "fsync" in calls[-2:] or "os.open" in calls[-2:] else {2}
            assert len(list(path.iterdir())) in (at_most if now(path) else {0})
            models.write_model(path, *model_of(2), overwrite=True)
            assert len(list(path.iterdir())) == 2
        if len(calls) < n:
            assert raised is None
            break
    else:
        pytest.fail("the calls do not end")
    assert n > 5


@pytest.mark.parametrize("scene", SCENES)
def test_a_model_is_old_or_new_wherever_the_process_stops(tmp_path, failing, monkeypatch, scene):
    for n in range(1, 60):
        folder = tmp_path / str(n)
        folder.mkdir()
        path = folder / "model"
        old = before_and_after(scene, path)
        if (child := os.fork()) == 0:  # the file operations alone, then nothing: not even what is cleaned up
            fault, _ = nth(n, lambda: os._exit(1))
            failing(fault, WRITES + REMOVES)
            models.write_model(path, *model_of(2), overwrite=True)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert now(path) in ([(2, model_of(2)[1])] if code == 0 else [old, (2, model_of(2)[1])])
        models.write_model(path, *model_of(3), overwrite=True)  # what the process left is no hindrance, and goes
        assert numbers(path) == (3, model_of(3)[1])
        assert len(list(path.iterdir())) == 2
        if code == 0:
            break
    else:
        pytest.fail("the calls do not end")
    assert n > 5


class Disk:
    """What a power cut may leave of one folder and its parent, by what POSIX promises and by nothing more.

    Contents last once their file is flushed, and a name or its removal once its folder is; of what was done in a folder
    since, any part may be lost. `calls` holds what was done, in order.
    """

    def __init__(self, root):
        self.contents, self.names, self.calls = {}, {}, []  # names: of the folders, {name: number of a file or folder}
        self.root = self.taken(root)

    def taken(self, path):
        number = len(self.contents)
        self.contents[number] = None if path.is_dir() else path.read_bytes()
        if path.is_dir():
            self.names[number] = {}
            self.names[number] = {each.name: self.taken(each) for each in path.iterdir()}
        return number

    def after_a_cut(self, n):
        """Yield what may be there when the power goes after `n` calls: ``{name: bytes, or the same of a folder}``."""
        contents, lasting = dict(self.contents), {number: dict(names) for number, names in self.names.items()}
        seen = {number: dict(names) for number, names in self.names.items()}
        pending = {number: [] for number in seen}

        def find(path):
            number = self.root
            for name in path.parts:
                number = seen[number][name]
            return number

        def change(folder, **names):
            pending[folder].append(names)
            seen[folder].update(names)

        for what, path, more in self.calls[:n]:
            folder = find(path.parent)
            if what in ("create", "mkdir"):
                number = 1000 + len(contents)
                contents[number] = None if what == "mkdir" else b"torn"
                if what == "mkdir":
                    seen[number], lasting[number], pending[number] = {}, {}, []
                change(folder, **{path.name: number})
            elif what == "move":
                assert folder == find(more.parent)
                change(folder, **{more.name: find(path), path.name: None})
            elif what == "remove":
                change(folder, **{path.name: None})
            elif contents[number := find(path)] is None:  # flushed
                for names in pending[number]:
                    lasting[number].update(names)
                pending[number] = []
            else:
                contents[number] = more
        steps = [(folder, names) for folder, changes in pending.items() for names in changes]
        for kept in itertools.product([False, True], repeat=len(steps)):
            left = {folder: dict(names) for folder, names in lasting.items()}
            for (folder, names), is_kept in zip(steps, kept, strict=True):
                if is_kept:
                    left[folder].update(names)
            yield self._tree(self.root, contents, left)

    def _tree(self, number, contents, left):
        if contents[number] is not None:
            return contents[number]
        return {name: self._tree(each, contents, left) for name, each in left[number].items() if each is not None}


def made(tree, folder):
    folder.mkdir()
    for name, each in tree.items():
        if isinstance(each, dict):
            made(each, folder / name)
        else:
            (folder / name).write_bytes(each)


@pytest.mark.parametrize("scene", SCENES)
def test_a_model_is_old_or_new_after_a_power_cut(tmp_path, monkeypatch, scene):
    root = tmp_path / "root"
    root.mkdir()
    old = before_and_after(scene, root / "model")
    disk, paths = Disk(root), {}

    def within(path):
        return Path(path).absolute().relative_to(root)

    def recorded(name, what):
        real = getattr(os, name)

        def call(path, *more, **how):
            done = real(path, *more, **how)
            disk.calls.append((what, within(path), within(more[0]) if what == "move" else None))
            return done

        monkeypatch.setattr(os, name, call)

    real_open, real_os_open, real_fsync = builtins.open, os.open, os.fsync

    def opened(path, mode="r", *rest, **how):
        if "x" in mode:
            disk.calls.append(("create", within(path), None))
        return real_open(path, mode, *rest, **how)

    def os_opened(path, *rest, **how):
        handle = real_os_open(path, *rest, **how)
        paths[handle] = Path(path)
        return handle

    def flushed(handle):
        real_fsync(handle)
        path = paths[handle]
        disk.calls.append(("flush", within(path), None if path.is_dir() else path.read_bytes()))

    for name, what in {"replace": "move", "rename": "move", "unlink": "remove", "mkdir": "mkdir"}.items():
        recorded(name, what)
    monkeypatch.setattr(builtins, "open", opened)
    monkeypatch.setattr(os, "open", os_opened)
    monkeypatch.setattr(os, "fsync", flushed)
    models.write_model(root / "model", *model_of(2), overwrite=True)
    monkeypatch.undo()
    new, found = (2, model_of(2)[1]), []
    assert [call[0] for call in disk.calls].count("flush") >= 3
    for n in range(len(disk.calls) + 1):
        for i, tree in enumerate(disk.after_a_cut(n)):
            made(tree, left := tmp_path / f"{n}_{i}")
            found.append(now(left / "model"))
            assert found[-1] in (old, new), disk.calls[:n]
    assert old in found
    assert found[-1] == new  # and nothing that was said to be written is lost
    assert all(now_is == new for now_is in found[-(i + 1) :])


LOOP = """
import sys
from scvae.boundary import models
n = 2
while True:
    print("before", n, flush=True)
    models.write_model(sys.argv[1], {"n": n}, bytes([n % 256]) * 100_000, overwrite=True)
    n += 1
"""


def test_a_model_is_there_however_often_its_process_is_killed(tmp_path):
    path = tmp_path / "model"
    models.write_model(path, *model_of(1))
    draw, seen = random.Random(0), set()
    for _ in range(20):
        child = subprocess.Popen([sys.executable, "-c", LOOP, path], stdout=subprocess.PIPE)
        for _ in range(draw.randint(1, 10)):
            child.stdout.readline()
        time.sleep(draw.uniform(0, 0.005))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        n, weights = numbers(path)
        assert set(weights) == {n % 256}
        seen.add(n)
    assert len(seen) > 1
    models.write_model(path, *model_of(1), overwrite=True)
    assert len(list(path.iterdir())) == 2


def test_a_model_that_is_replaced_while_it_is_read_is_read(tmp_path):
    path = tmp_path / "model"
    models.write_model(path, *model_of(1))
    child = subprocess.Popen([sys.executable, "-c", LOOP, path], stdout=subprocess.PIPE)
    try:
        child.stdout.readline()
        for _ in range(200):
            n, weights = numbers(path)
            assert set(weights) == {n % 256}
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def test_two_processes_that_save_to_one_folder_leave_a_model(tmp_path):
    path = tmp_path / "model"
    models.write_model(path, *model_of(1))
    children = [subprocess.Popen([sys.executable, "-c", LOOP, path], stdout=subprocess.PIPE) for _ in range(3)]
    for child in children:
        child.stdout.readline()
    time.sleep(0.5)
    assert [child.poll() for child in children] == [None] * 3  # none of them failed
    for child in children:
        child.kill()
        child.wait()
        child.stdout.close()
    n, weights = numbers(path)
    assert set(weights) == {n % 256}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_model_that_another_process_made_meanwhile_is_replaced_or_named(tmp_path, monkeypatch, overwrite):
    path, rename = tmp_path / "model", os.rename

    def overtaken(part, place):
        monkeypatch.undo()
        models.write_model(path, *model_of(1))
        rename(part, place)

    monkeypatch.setattr(os, "rename", overtaken)
    if overwrite:
        models.write_model(path, *model_of(2), overwrite=True)
    else:
        with pytest.raises(FileExistsError, match="model exists: pass overwrite=True"):
            models.write_model(path, *model_of(2))
    assert numbers(path)[0] == (2 if overwrite else 1)
    assert len(os.listdir(path)) == 2
    assert os.listdir(tmp_path) == ["model"]


def test_a_fitted_model_gives_its_numbers_when_its_replacement_failed(model, fit, adata, tmp_path, monkeypatch):
    path = tmp_path / "model"
    model.save(path)
    expected = scvae.load(path).embed(adata)
    other = fit(adata.copy(), seed=7, batch_key="batch")
    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *_: no_space())
            with pytest.raises(OSError, match=r"model could not be written: No space left"):
                other.save(path, overwrite=True)
        np.testing.assert_array_equal(scvae.load(path).embed(adata), expected)
    other.save(path, overwrite=True)
    np.testing.assert_array_equal(scvae.load(path).embed(adata), other.embed(adata))


@pytest.mark.parametrize("name", ["../weights.safetensors", "/etc/passwd", "model.json", "", 3, None, ["weights"]])
def test_a_model_reads_no_file_but_its_own(tmp_path, name):
    path = tmp_path / "model"
    models.write_model(path, *model_of(1))
    file = json.loads((path / "model.json").read_text())
    (path / "model.json").write_text(json.dumps({**file, "weights": name}))
    with pytest.raises(ValueError, match="is damaged"):
        models.read_model(path)


# ---- Paths -------------------------------------------------------------------------------------------------


def test_a_link_to_a_model_stays_a_link_and_its_target_is_replaced(tmp_path):
    models.write_model(tmp_path / "model", *model_of(1))
    (tmp_path / "latest").symlink_to("model")
    models.write_model(tmp_path / "latest", *model_of(2), overwrite=True)
    assert (tmp_path / "latest").is_symlink()
    assert numbers(tmp_path / "model")[0] == 2


def test_a_link_to_nothing_is_followed_or_named(tmp_path):
    (tmp_path / "link").symlink_to("model")
    models.write_model(tmp_path / "link", *model_of(1))
    assert numbers(tmp_path / "model")[0] == 1
    (tmp_path / "lost").symlink_to("nowhere/model")
    with pytest.raises(FileNotFoundError, match=r"lost is a symbolic link to \S+model, whose folder does not exist"):
        models.write_model(tmp_path / "lost", *model_of(1))
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="a cannot be followed|a exists"):
        models.write_model(tmp_path / "a", *model_of(1))


def test_a_file_is_named_and_left(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="file exists: pass overwrite=True"):
        models.write_model(tmp_path / "file", *model_of(1))
    with pytest.raises(FileExistsError, match="file is a file, and holds other things than a saved model"):
        models.write_model(tmp_path / "file", *model_of(1), overwrite=True)
    with pytest.raises(OSError, match="model"):
        models.write_model(tmp_path / "file" / "model", *model_of(1))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_of_other_things_is_named_with_them(tmp_path):
    path = tmp_path / "model"
    models.write_model(path, *model_of(1))
    (path / ".DS_Store").write_text("")  # what a system leaves everywhere is no hindrance
    models.write_model(path, *model_of(2), overwrite=True)
    for i in range(4):
        (path / f"notes_{i}.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"other things than a saved model \(notes_0.txt, .*, …\)"):
        models.write_model(path, *model_of(3), overwrite=True)
    assert numbers(path)[0] == 2


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # whoever runs the tests
    with pytest.raises(PermissionError, match="cannot be written to: save to another"):
        models.write_model(tmp_path / "model", *model_of(1))
