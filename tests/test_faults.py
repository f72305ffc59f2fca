"""Whichever call of the disk fails, what was there is as it was, nothing else is left, and the message says why."""

import errno
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import anndata
import matplotlib.figure
import numpy as np
import pandas as pd
import pytest
from faults import Faults, every_fault, failing, tree
from scipy import sparse

import scvae
from scvae.boundary import files, formats, locks
from scvae.commands.results import write_figure
from scvae.data import results
from scvae.data.shuffling import shuffled
from scvae.data.store import open_store
from scvae.data.tables import open_tables

pytestmark = [
    pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="which file a handle is of is only known on Linux"),
    pytest.mark.filterwarnings("ignore:.*could not be flushed", "ignore:Writing zarr v2", "ignore:.*tries again"),
]


@pytest.fixture(scope="module")
def cells():
    adata = anndata.AnnData(sparse.csr_matrix(np.random.default_rng(0).poisson(2.0, (12, 4)).astype(np.float32)))
    adata.obs["batch"] = ["a", "b"] * 6
    return adata


@pytest.fixture(scope="module")
def models(cells, fit):
    return [fit(cells.copy(), seed=seed, batch_key="batch") for seed in (0, 1)]


def state(model):
    return {name: tensor.numpy().tobytes() for name, tensor in model.program.state_dict().items()}


def nothing(folder):
    pass


@pytest.mark.parametrize("is_there", [False, True], ids=["new", "over another"])
def test_a_model_is_whole_or_as_it_was(tmp_path, models, is_there):
    old, new = models

    def prepare(folder):
        if is_there:
            old.save(folder / "model")

    calls = every_fault(
        tmp_path,
        prepare,
        lambda folder: new.save(folder / "model", overwrite=is_there),
        lambda folder: state(scvae.load(folder / "model")),
    )
    assert {"open", "write", "close", "os.open", "fsync"} <= set(calls)
    assert {"replace" if is_there else "rename"} <= set(calls)


def draw(folder):
    figure = matplotlib.figure.Figure()
    figure.subplots().plot([1, 2], [3, 4])
    write_figure(folder / "figure.png", figure)


WRITERS = {
    "table.csv": lambda folder: files.write_file(folder / "table.csv", pd.DataFrame({"a": range(9)}).to_csv),
    "figure.png": draw,
    "weights.bin": lambda folder: files.write_file(folder / "weights.bin", np.arange(99).tofile),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("is_there", [False, True], ids=["new", "over another"])
def test_a_file_is_whole_or_as_it_was(tmp_path, name, is_there):
    every_fault(
        tmp_path,
        lambda folder: (folder / name).write_bytes(b"old") if is_there else None,
        WRITERS[name],
        lambda folder: len((folder / name).read_bytes()),
        places=[1, 2, 3, 4] if name == "figure.png" else None,  # of a hundred and more
    )


# Every call by which a zarr folder is written, of many hundreds: tests/benchmarks/faults.py.


@pytest.mark.parametrize("is_there", [False, True], ids=["new", "over another"])
def test_a_folder_of_cells_is_whole_or_as_it_was(tmp_path, cells, is_there):
    other = cells[:5].copy()
    calls = every_fault(
        tmp_path,
        lambda folder: formats.write(other, folder / "cells.zarr") if is_there else None,
        lambda folder: formats.write(cells, folder / "cells.zarr"),
        lambda folder: formats.read(folder / "cells.zarr").X.toarray().tobytes(),
        numbers=[errno.EIO if is_there else errno.ENOSPC],
        places=[1, 10, 100],
    )
    assert len(calls) > 100
    assert ("exchange" in calls) == is_there


def test_results_that_are_streamed_to_a_folder_are_whole_or_as_they_were(tmp_path, cells, monkeypatch):
    monkeypatch.setattr(results, "_CHUNK", 8)  # so that several chunks are written at a time
    formats.write(cells, tmp_path / "cells.zarr")
    tables = open_tables(tmp_path / "cells.zarr", None)

    def write(folder, value=1.0):
        results.write_array(folder / "out.zarr", tables, ("obsm", "X_scvae"), [(0, np.full((12, 2), value))])

    places = [1, 40, 125, 200]
    calls = every_fault(
        tmp_path,
        lambda folder: write(folder, 0.0),
        write,
        lambda folder: formats.read(folder / "out.zarr").obsm["X_scvae"].tolist(),
        numbers=[errno.ENOSPC],
        places=places,
    )
    assert len(calls) > max(places)


def test_a_store_is_whole_or_as_it_was(tmp_path, cells):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    source, calls = tmp_path / "cells.h5ad", 0

    def make(folder, seed=1):
        shuffled(source, store=folder / "store", seed=seed).close()

    def result(folder):
        store = open_store(folder / "store")
        try:
            return store.made_from["options"]["seed"], store.take(range(len(store))).values.tolist()
        finally:
            store.close()

    for prepare in (nothing, lambda folder: make(folder, seed=0)):
        root = tmp_path / str(calls)
        root.mkdir()
        places = [1, 2, 3, 6, 12, 24, *range(30, 39)]  # every one: tests/benchmarks/faults.py
        calls = len(every_fault(root, prepare, make, result, numbers=[errno.ENOSPC], places=places))
    assert calls > 38


def test_a_checkpoint_is_whole_or_not_there(tmp_path):
    old, new = b"1" * 1000, b"2" * 1000

    def write(folder, content=new):
        with locks.own_folder(folder / "run") as place:
            files.write_checked(place, "step-1", ".safetensors", content)

    def result(folder):
        paths = sorted((folder / "run").glob("step-*"))
        return [files.read_checked(path) for path in paths]

    every_fault(tmp_path, lambda folder: write(folder, old), write, result, may_be_there=True)


def test_a_training_that_cannot_write_leaves_the_checkpoint_that_was_there(tmp_path, cells, fit):
    fit(cells.copy(), checkpoint=tmp_path / "run", max_epochs=2)
    before = tree(tmp_path)
    for n in (2, 4, 6, 8):
        told = ""
        with failing(Faults(tmp_path, n, for_ever=True)), warnings.catch_warnings(record=True) as warned:
            try:
                fit(cells.copy(), checkpoint=tmp_path / "run", max_epochs=2, resume=True)
            except OSError as error:
                told = str(error)
        told += " ".join(str(each.message) for each in warned)
        assert "No space left on device" in told
        assert str(tmp_path) in told
        assert tree(tmp_path) == before


# ---- Files that C writes, and real disks -------------------------------------------------------------------


def test_an_h5ad_is_whole_or_as_it_was_wherever_the_disk_is_full(tmp_path, cells):
    path = tmp_path / "cells.h5ad"
    formats.write(cells, path)
    size, old = path.stat().st_size, path.read_bytes()
    other = cells.copy()
    other.obs["more"] = np.arange(12.0)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    n_failed = 0
    for most in [0, 1, 96, 800, 2048, *range(4096, size + 8192, size // 12)]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
        try:
            formats.write(other, path)
        except (OSError, ValueError) as error:
            n_failed += 1
            assert str(path) in str(error)  # noqa: PT017
            assert ".part" not in str(error)  # noqa: PT017
            assert path.read_bytes() == old
        else:
            assert "more" in formats.read(path).obs
            path.write_bytes(old)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert os.listdir(tmp_path) == ["cells.h5ad"]
    assert n_failed > 10


@pytest.fixture
def disk(tmp_path):
    """``disk("size=8m")``: a small file system of its own, or one that can only be read."""
    made = []

    def mount(options, *more):
        folder = tmp_path / f"disk_{len(made)}"
        folder.mkdir(exist_ok=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
        made.append(folder)
        return folder

    try:
        yield mount
    except FileNotFoundError:
        pytest.skip("a file system cannot be mounted here: there is no mount")
    finally:
        for folder in made:
            subprocess.run(["umount", folder], check=False)


def fill(folder, left):
    with open(folder / "filling", "wb") as file:
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        file.write(b"\1" * max(0, free - left))


def writers(cells, models, folder):
    return {
        "model": lambda: models[1].save(folder / "model", overwrite=True),
        "h5ad": lambda: formats.write(cells, folder / "cells.h5ad"),
        "zarr": lambda: formats.write(cells, folder / "new.zarr"),
        "store": lambda: shuffled(folder / "cells.h5ad", store=folder / "store", seed=1),
        "checkpoint": lambda: scvae.fit(
            cells.copy(), checkpoint=folder / "run", max_epochs=1, progress=False, n_latent=2, n_hidden=4
        ),
    }


@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs is of Linux")
@pytest.mark.parametrize("left", [0, 4096])
def test_on_a_full_disk_all_is_as_it_was(cells, models, disk, left):
    folder = disk("size=8m")
    models[0].save(folder / "model")
    formats.write(cells, folder / "cells.h5ad")
    fill(folder, left)
    before = tree(folder)
    for name, write in writers(cells, models, folder).items():
        told = ""
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                write()
            except (OSError, ValueError) as error:
                told = str(error)
        if name == "checkpoint":  # a training is not lost with its checkpoint
            told += str(warned[-1].message)
        assert str(folder) in told, name
        assert "No space left on device" in told, (name, told)
        assert ".part" not in told, (name, told)
        assert tree(folder) == before, name
    assert state(scvae.load(folder / "model")) == state(models[0])


@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs is of Linux")
def test_in_a_folder_that_cannot_be_written_to_all_is_as_it_was(cells, models, disk):
    folder = disk("size=8m")
    models[0].save(folder / "model")
    formats.write(cells, folder / "cells.h5ad")
    before = tree(folder)
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    for name, write in writers(cells, models, folder).items():
        with pytest.raises((OSError, ValueError), match=str(folder)) as caught:
            write()
        assert "Read-only" in str(caught.value) or "cannot be written" in str(caught.value), name
        assert tree(folder) == before, name
    assert state(scvae.load(folder / "model")) == state(models[0])
    assert formats.read(folder / "cells.h5ad").shape == cells.shape


SAVE = """
import sys
import scvae
model = scvae.load(sys.argv[1])
print("ready", flush=True)
for _ in range(20):
    model.save(sys.argv[2], overwrite=True)
"""


@pytest.mark.slow
def test_two_processes_that_save_into_one_folder_leave_a_model_of_one_of_them(tmp_path, models):
    for i, model in enumerate(models):
        model.save(tmp_path / str(i))
    children = [subprocess.Popen([sys.executable, "-c", SAVE, tmp_path / name, tmp_path / "model"]) for name in "01"]
    states, seen = [state(model) for model in models], set()
    while any(child.poll() is None for child in children):
        if Path(tmp_path / "model" / "model.json").exists():
            found = state(scvae.load(tmp_path / "model"))
            assert found in states
            seen.add(states.index(found))
    assert [child.returncode for child in children] == [0, 0]
    assert seen
    assert len(os.listdir(tmp_path / "model")) == 2
