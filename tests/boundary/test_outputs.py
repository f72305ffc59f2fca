"""Results that could not or should not be written are refused before the work."""

import os
from pathlib import Path

import pytest

from scvae.boundary.outputs import check_output


def test_an_output_is_no_input_by_whatever_name(tmp_path):
    source = tmp_path / "a.h5ad"
    source.write_text("cells")
    (tmp_path / "soft.h5ad").symlink_to("a.h5ad")
    os.link(source, tmp_path / "hard.h5ad")
    (tmp_path / "sub").mkdir()

    def check(path, inputs=(source,), **how):
        check_output(path, "--output", inputs=inputs, suffixes=(".h5ad", ".zarr"), overwrite=True, **how)

    for name in ("a.h5ad", "soft.h5ad", "hard.h5ad", "sub/../a.h5ad"):
        with pytest.raises(ValueError, match=r"--output \S+ is the same as \S+, which it would change: name another"):
            check(tmp_path / name)
    with pytest.raises(ValueError, match="is the same as"):
        check(source, inputs=[tmp_path / "hard.h5ad"])
    store = tmp_path / "b.zarr"
    store.mkdir()
    with pytest.raises(ValueError, match="lies in"):
        check(store / "out.h5ad", inputs=[store])
    with pytest.raises(ValueError, match="holds"):
        check_output(tmp_path, "--model", inputs=[source], overwrite=True)
    check(tmp_path / "other.h5ad")


def test_the_ending_of_an_output_is_checked(tmp_path):
    for name in ("x.txt", "x", "x.h5ad.gz"):
        with pytest.raises(ValueError, match=r"is .h5ad or .zarr; name it \S+\.h5ad"):
            check_output(tmp_path / name, "--output", suffixes=(".h5ad", ".zarr"))
    check_output(tmp_path / "X.H5AD", "--output", suffixes=(".h5ad", ".zarr"))


def test_an_output_that_is_there_is_refused_unless_told(tmp_path):
    def check(name, **how):
        check_output(Path(tmp_path, name), "--output", suffixes=(".h5ad", ".zarr"), **how)

    (tmp_path / "a.h5ad").write_text("old")
    (tmp_path / "b.h5ad").mkdir()
    (tmp_path / "c.zarr").mkdir()
    (tmp_path / "d.zarr").write_text("no folder")
    with pytest.raises(FileExistsError, match="a.h5ad exists: name another file, or add --overwrite"):
        check("a.h5ad")
    check("a.h5ad", overwrite=True)
    with pytest.raises(FileExistsError, match="is a folder: name a file"):
        check("b.h5ad", overwrite=True)
    with pytest.raises(FileExistsError, match="is a file: name a folder"):
        check("d.zarr", overwrite=True)
    (tmp_path / "c.zarr" / "my letters").touch()
    with pytest.raises(FileExistsError, match=r"holds other things than cells \(my letters\): name another folder"):
        check("c.zarr", overwrite=True)
    (tmp_path / "c.zarr" / "zarr.json").touch()
    with pytest.raises(FileExistsError, match="c.zarr exists: name another folder, or add --overwrite"):
        check("c.zarr")
    check("c.zarr", overwrite=True)


def test_an_output_in_a_folder_that_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # whoever runs the tests
    with pytest.raises(PermissionError, match="--output .* cannot be written to; name another"):
        check_output(tmp_path / "out.csv", "--output", suffixes=(".csv",))
