"""A disk that is full is an error of Python, and no crash of HDF5."""

import subprocess
import sys

import h5py
import numpy as np
import pytest

from scvae.boundary import hdf5

FULL = """
import collections, os, resource, shutil, sys
import h5py
import numpy as np
from scvae.boundary import hdf5

folder = sys.argv[1]
with h5py.File(folder + "/old.h5", "w") as file:
    file["x"] = np.arange(20_000.0)
size = os.path.getsize(folder + "/old.h5")

def change(mode):
    shutil.copyfile(folder + "/old.h5", folder + "/new.h5")
    with hdf5.opened(folder + "/new.h5", mode) as file:
        chunked = file.create_dataset("y", (3000, 20), np.float32, chunks=(500, 20))
        for first in range(0, 3000, 500):
            chunked[first : first + 500] = 1
        file.create_group("z")["w"] = np.ones(3000)

for mode, least in (("w", 0), ("r+", size)):
    found = collections.Counter()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    for limit in np.linspace(size, size + 400_000, 15).astype(int):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit - size + least), resource.RLIM_INFINITY))
        try:
            if mode == "r+" or limit - size >= size:
                change(mode)
            else:
                with hdf5.opened(folder + "/new.h5", mode) as file:
                    file["x"] = np.arange(20_000.0)
            found["written"] += 1
        except OSError as error:
            assert "too large" in str(error), error
            found["refused"] += 1
    assert found["written"] and found["refused"] > 3, (mode, found)
"""


def test_a_disk_that_is_full_is_an_error_and_no_crash(tmp_path):
    pytest.importorskip("resource")
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_files_are_written_and_changed_as_by_h5py(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2000, 7))
    with hdf5.opened(tmp_path / "file.h5", "w") as file:
        file.create_dataset("chunks", data=values, chunks=(100, 7), compression="gzip")
        file["text"] = np.array(["a", "b"], dtype=h5py.string_dtype())
    with hdf5.opened(tmp_path / "file.h5", "r+") as file:
        assert np.array_equal(file["chunks"][:], values)
        del file["text"]
        file["chunks"][5] = 0
        file.create_group("more").attrs["note"] = "x" * 10_000
    with h5py.File(tmp_path / "file.h5") as file:
        values[5] = 0
        assert np.array_equal(file["chunks"][:], values)
        assert sorted(file) == ["chunks", "more"]
        assert len(file["more"].attrs["note"]) == 10_000


def test_errors_of_the_block_come_out_as_they_are(tmp_path):
    with pytest.raises(KeyError, match="mine"), hdf5.opened(tmp_path / "file.h5", "w"):
        raise KeyError("mine")
    h5py.File(tmp_path / "file.h5").close()
    with pytest.raises(FileNotFoundError), hdf5.opened(tmp_path / "none.h5", "r+"):
        pass
