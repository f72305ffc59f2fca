"""An image of a cell shows what lies around it, in its place, and nothing else; bad input is refused untouched."""

import math
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, sparse

from scvae import pp
from scvae.pp import neighborhoods as module

OSMFISH = Path(__file__).parents[3] / "shared" / "data" / "osmfish_cortex.h5ad"


@pytest.fixture
def cells():
    """60 cells of three types and two samples in a square of 100 µm."""
    rng = np.random.default_rng(0)
    x = sparse.random(60, 5, 0.6, random_state=0, data_rvs=lambda n: rng.integers(1, 9, n)).tocsr().astype(np.float32)
    adata = anndata.AnnData(x, var=pd.DataFrame(index=list("abcde")))
    adata.obs_names = [f"cell_{i}" for i in range(60)]
    adata.obsm["spatial"] = rng.uniform(0, 100, (60, 2))
    adata.obsm["X_pca"] = rng.normal(size=(60, 3)).astype(np.float32)
    adata.layers["logged"] = x.log1p()
    adata.obs["type"] = pd.Categorical(rng.choice(["neuron", "glia", "other"], 60))
    adata.obs["sample"] = rng.choice(["left", "right"], 60)
    return adata


@pytest.fixture
def molecules():
    rng = np.random.default_rng(1)
    table = pd.DataFrame(rng.uniform(0, 100, (500, 2)), columns=["x", "y"])
    return table.assign(gene=rng.choice(["Gad1", "Gfap", "Mbp"], 500), sample=rng.choice(["left", "right"], 500))


def drawn(adata, **options):
    """The images that are drawn with these options, of types within 20 µm unless told otherwise."""
    adata = adata.copy()
    if not {"genes", "layer", "use_rep", "transcripts"} & options.keys():
        options = {"cell_type_key": "type", **options}
    if "n_neighbors" not in options:
        options = {"radius": 20, **options}
    pp.neighborhood_images(adata, **options)
    return adata.obsm["neighborhood"]


def resampled(images, angles, order):
    """Images, ``[n, C, H, W]``, each turned by its angle from the x axis to the y axis."""
    rows, columns = np.indices(images.shape[2:]) - (images.shape[-1] - 1) / 2
    turned = np.empty_like(images)
    for i, angle in enumerate(angles):
        x, y = columns * np.cos(angle) + rows * np.sin(angle), rows * np.cos(angle) - columns * np.sin(angle)
        places = np.stack([y, x]) + (images.shape[-1] - 1) / 2
        turned[i] = [ndimage.map_coordinates(channel, places, order=order) for channel in images[i]]
    return turned


def slowly(here, there, mass, radius, size, blur, angles, own=True):
    """The images by their definition: cell by cell, point by point, pixel by pixel."""
    reach = 3 * blur if blur else 1
    unit = radius / ((size + 1) / 2 - reach)
    images = np.zeros((len(here), mass.shape[1], size, size))
    for i, centre in enumerate(here):
        for j, point in enumerate(there):
            dx, dy = point - centre
            if math.hypot(dx, dy) > radius or (own and i == j):
                continue
            cos, sin = math.cos(angles[i]), math.sin(angles[i])
            column = (dx * cos - dy * sin) / unit + (size - 1) / 2
            row = (dx * sin + dy * cos) / unit + (size - 1) / 2
            weight = np.zeros((size, size))
            for r in range(size):
                for c in range(size):
                    if abs(r - row) < reach and abs(c - column) < reach:
                        far = (r - row) ** 2 + (c - column) ** 2
                        weight[r, c] = (
                            math.exp(-far / 2 / blur**2) if blur else (1 - abs(r - row)) * (1 - abs(c - column))
                        )
            images[i] += mass[j][:, None, None] * weight / weight.sum()
    return images


# ---- What is drawn -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("blur", "size"), [(1.0, 12), (0.7, 9), (0.0, 7)])
@pytest.mark.parametrize("source", ["type", "genes", "layer", "rep", "transcripts"])
def test_images_are_what_their_definition_says(cells, molecules, blur, size, source):
    cells = cells[:50].copy()
    here = there = cells.obsm["spatial"]
    angles = np.random.default_rng(2).uniform(-4, 4, 50)
    options = {
        "type": {"cell_type_key": "type"},
        "genes": {"genes": ["d", "a"]},
        "layer": {"layer": "logged"},
        "rep": {"use_rep": "X_pca"},
        "transcripts": {"transcripts": molecules, "genes": ["Mbp", "Gad1"]},
    }[source]
    if source == "type":
        mass = pd.get_dummies(cells.obs["type"])[["glia", "neuron", "other"]].to_numpy(float)
    elif source == "genes":
        mass = cells[:, ["d", "a"]].X.toarray()
    elif source == "layer":
        mass = cells.layers["logged"].toarray()
    elif source == "rep":
        mass = cells.obsm["X_pca"]
    else:
        there = molecules[["x", "y"]].to_numpy()
        mass = np.stack([molecules["gene"] == "Mbp", molecules["gene"] == "Gad1"], 1).astype(float)
    found = drawn(cells, size=size, blur=blur, angles=angles, **options)
    assert found.dtype == np.float32
    expected = slowly(here, there, mass, 20, size, blur, angles, own=source != "transcripts")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    size=st.integers(14, 33),
    blur=st.sampled_from([0.0, 0.5, 0.8, 1.0, 2.0]),
    radius=st.floats(1, 500),
    turn=st.floats(-10, 10),
)
def test_the_sum_of_a_channel_is_the_mass_in_the_circle(seed, size, blur, radius, turn):
    rng = np.random.default_rng(seed)
    adata = anndata.AnnData(np.ones((40, 1), np.float32))
    adata.obsm["spatial"] = here = rng.uniform(-100, 100, (40, 2))
    adata.obsm["mass"] = mass = rng.normal(size=(40, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MANY", 1)
        pp.neighborhood_images(
            adata, use_rep="mass", radius=radius, size=size, blur=blur, angles=np.full(40, turn), include_center=True
        )
    near = np.linalg.norm(here[:, None] - here, axis=-1) <= radius
    np.testing.assert_allclose(adata.obsm["neighborhood"].sum((2, 3)), near @ mass, atol=1e-4)


def test_the_cell_itself_is_left_out_unless_asked_for(cells):
    without, with_it = drawn(cells), drawn(cells, include_center=True)
    centre = with_it - without
    np.testing.assert_allclose(centre.sum((2, 3)), pd.get_dummies(cells.obs["type"]), atol=1e-5)
    alone = centre.sum(1)
    np.testing.assert_allclose(alone, np.broadcast_to(alone[0], alone.shape), atol=1e-6)
    np.testing.assert_allclose(alone[0], np.rot90(alone[0]), atol=1e-6)
    assert alone[0].argmax() in (13 * 28 + 13, 13 * 28 + 14, 14 * 28 + 13, 14 * 28 + 14)


def test_cells_in_one_place_see_each_other(cells):
    cells.obsm["spatial"][:] = 3
    np.testing.assert_allclose(drawn(cells).sum((1, 2, 3)), 59, rtol=1e-5)


def test_x_runs_to_the_right_and_y_downwards(cells):
    two = cells[:2].copy()
    two.obsm["spatial"] = np.array([[0.0, 0.0], [15.0, 5.0]])
    first, second = drawn(two, size=21).sum(1)
    row, column = np.unravel_index(first.argmax(), first.shape)
    assert row > 10
    assert column > row
    np.testing.assert_allclose(second, first[::-1, ::-1], atol=1e-6)


def test_angles_turn_from_the_x_axis_to_the_y_axis_clockwise_as_seen(cells):
    upright = drawn(cells)
    for quarters in (1, 2, 3, -1):
        turned = drawn(cells, angles=np.full(60, quarters * np.pi / 2))
        np.testing.assert_allclose(turned, np.rot90(upright, -quarters, axes=(2, 3)), atol=1e-5)


@pytest.mark.parametrize("blur", [0.0, 1.0])
def test_a_tissue_that_is_turned_gives_images_that_are_turned(cells, blur):
    angle = 0.7
    turned = cells.copy()
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    turned.obsm["spatial"] = cells.obsm["spatial"] @ rotation.T
    images = drawn(turned, blur=blur)
    np.testing.assert_allclose(images, drawn(cells, blur=blur, angles=np.full(60, angle)), atol=1e-5)
    np.testing.assert_allclose(drawn(turned, blur=blur, angles=np.full(60, -angle)), drawn(cells, blur=blur), atol=1e-5)
    if blur:  # smooth enough to be turned as an image, too
        error = resampled(drawn(cells), np.full(60, angle), order=3) - images
        assert np.linalg.norm(error) < 0.05 * np.linalg.norm(images)


@pytest.mark.parametrize("options", [{}, {"use_rep": "X_pca"}, {"n_neighbors": 5}], ids=["types", "rep", "n_neighbors"])
def test_order_place_and_units_do_not_matter(cells, options):
    images = drawn(cells, **options)
    order = np.random.default_rng(0).permutation(60)
    np.testing.assert_allclose(drawn(cells[order], **options), images[order], atol=1e-6)
    moved = cells.copy()
    moved.obsm["spatial"] = cells.obsm["spatial"] + (1e4, -3e5)
    np.testing.assert_allclose(drawn(moved, **options), images, atol=1e-5)
    moved.obsm["spatial"] = cells.obsm["spatial"] * 1e3
    larger = options if "n_neighbors" in options else {**options, "radius": 20e3}
    np.testing.assert_allclose(drawn(moved, **larger), images, atol=1e-5)


def test_samples_do_not_mix(cells, molecules):
    together = drawn(cells, radius=30, sample_key="sample")
    of_molecules = drawn(cells, radius=30, sample_key="sample", transcripts=molecules)
    assert not np.allclose(together, drawn(cells, radius=30))
    for sample in ("left", "right"):
        here = (cells.obs["sample"] == sample).to_numpy()
        np.testing.assert_allclose(together[here], drawn(cells[here], radius=30), atol=1e-6)
        alone = drawn(cells[here], radius=30, transcripts=molecules[molecules["sample"] == sample])
        np.testing.assert_allclose(of_molecules[here], alone, atol=1e-6)


def test_molecules_of_other_samples_are_left_out(cells, molecules):
    left = cells[cells.obs["sample"] == "left"]
    images = drawn(left, sample_key="sample", transcripts=molecules)
    np.testing.assert_allclose(images, drawn(left, transcripts=molecules[molecules["sample"] == "left"]), atol=1e-6)


def test_samples_without_molecules_have_empty_images(cells, molecules):
    with pytest.warns(UserWarning, match="of 60 images are empty"):
        images = drawn(cells, sample_key="sample", transcripts=molecules[molecules["sample"] == "left"])
    assert images.any((1, 2, 3)).tolist() == (cells.obs["sample"] == "left").tolist()


def test_the_radius_holds_the_neighbours_asked_for(cells):
    rows, columns = np.divmod(np.arange(20 * 20), 20)  # spots on a hexagonal grid, as of Visium
    spots = anndata.AnnData(
        np.ones((400, 1), np.float32), obs=pd.DataFrame({"type": "spot"}, index=[f"{i}" for i in range(400)])
    )
    jitter = np.random.default_rng(0).uniform(-0.5, 0.5, (400, 2))
    spots.obsm["spatial"] = np.stack([columns + rows % 2 / 2, rows * math.sqrt(3) / 2], 1) * 100 + jitter
    inner = (rows > 1) & (rows < 18) & (columns > 1) & (columns < 18)
    n_near = drawn(spots, n_neighbors=6).sum((1, 2, 3))
    np.testing.assert_allclose(n_near[inner], 6, atol=1e-4)
    assert (n_near[~inner] < 6.01).all()
    assert np.median(drawn(cells, n_neighbors=7).sum((1, 2, 3))).round() == 7


@pytest.mark.parametrize("options", [{}, {"layer": "logged"}, {"sample_key": "sample", "n_neighbors": 3}])
def test_the_size_of_the_blocks_does_not_matter(cells, monkeypatch, options):
    images = drawn(cells, **options)
    for size in (1, 20_000):
        monkeypatch.setattr(module, "_BLOCK", size)
        np.testing.assert_allclose(drawn(cells, **options), images, atol=1e-6)


def test_memory_beside_the_images_is_bounded(peak_memory):
    adata = anndata.AnnData(np.ones((2000, 1), np.float32))
    adata.obsm["spatial"] = np.random.default_rng(0).uniform(0, 1, (2000, 2))
    with peak_memory() as peak:
        pp.neighborhood_images(adata, genes=adata.var_names, radius=0.5, size=12)  # 1.5 million pairs
    assert peak() < 150e6  # all at once: more than 1 GB


@pytest.mark.parametrize("kind", ["csc", "dense", "view", "backed", "float16"])
def test_any_matrix_of_expression_gives_the_same_images(cells, tmp_path, kind):
    images = drawn(cells, genes=["a", "c"])
    other = cells.copy()
    if kind == "csc":
        other.X = cells.X.tocsc()
    elif kind == "dense":
        other.X = cells.X.toarray()
    elif kind == "float16":
        other.X = cells.X.toarray().astype(np.float16)
    elif kind == "view":
        other = cells[:, ["c", "b", "a"]]
    else:
        cells.write_h5ad(tmp_path / "cells.h5ad")
        other = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    pp.neighborhood_images(other, genes=["a", "c"], radius=20)
    np.testing.assert_allclose(other.obsm["neighborhood"], images, atol=1e-6)
    assert not other.is_view


def test_channels_are_the_categories_in_their_order_used_or_not(cells):
    cells.obs["type"] = cells.obs["type"].cat.set_categories(["other", "none", "neuron", "glia"])
    pp.neighborhood_images(cells, cell_type_key="type", radius=20)
    assert cells.uns["neighborhood"]["channels"].tolist() == ["other", "none", "neuron", "glia"]
    assert not cells.obsm["neighborhood"][:, 1].any()
    cells.obs["number"] = np.arange(60) % 2
    pp.neighborhood_images(cells, cell_type_key="number", radius=20)
    assert cells.uns["neighborhood"]["channels"].tolist() == ["0", "1"]


# ---- What is written ---------------------------------------------------------------------------------------


def test_what_was_done_is_written_and_nothing_else(cells, tmp_path):
    cells.obs["sample"] = cells.obs["sample"].astype("category")
    before = cells.copy()
    options = {"sample_key": "sample", "n_neighbors": np.int64(4), "size": np.int64(20), "angles": np.zeros(60)}
    pp.neighborhood_images(cells, cell_type_key="type", key_added="here", **options)
    found = cells.uns["here"]
    assert found["channels"].tolist() == ["glia", "neuron", "other"]
    assert found["pixel_size"] == pytest.approx(found["radius"] / 7.5)
    assert found["turned"] is True
    params = {"source": "cell_type_key", "cell_type_key": "type", "n_neighbors": 4, "size": 20, "blur": 1.0}
    params |= {"include_center": False, "spatial_key": "spatial", "sample_key": "sample"}
    assert found["params"] == params
    cells.write_h5ad(tmp_path / "cells.h5ad")
    read = anndata.read_h5ad(tmp_path / "cells.h5ad")
    np.testing.assert_array_equal(read.obsm["here"], cells.obsm["here"])
    assert read.obsm["here"].dtype == np.float32
    assert read.uns["here"].keys() == found.keys()
    assert read.uns["here"]["params"] == params
    assert read.uns["here"]["channels"].tolist() == found["channels"].tolist()
    assert read.uns["here"]["radius"] == found["radius"]
    del cells.obsm["here"], cells.uns["here"]
    assert list(cells.obsm) == list(before.obsm)
    assert list(cells.uns) == list(before.uns)
    pd.testing.assert_frame_equal(cells.obs, before.obs)
    np.testing.assert_array_equal(cells.obsm["spatial"], before.obsm["spatial"])


def test_a_view_is_written_to_without_a_warning_and_its_parent_is_left_alone(cells, unchanged, no_warning):
    view = cells[5:50]
    with unchanged(cells), no_warning():
        pp.neighborhood_images(view, cell_type_key="type", radius=30)
        pp.crop_images(view, np.ones((100, 100)), radius=5)
    assert not view.is_view
    np.testing.assert_array_equal(view.obsm["neighborhood"], drawn(cells[5:50].copy(), radius=30))


def test_many_empty_images_are_warned_of_and_few_are_not(cells, recwarn):
    cells.obsm["spatial"][:6] += 1e4 * np.arange(1, 7)[:, None]
    drawn(cells)
    assert len(recwarn) == 0
    cells.obsm["spatial"][6] -= 1e4
    with pytest.warns(
        UserWarning, match="7 of 60 images are empty, as nothing lies within 20 of the cell: raise radius"
    ):
        images = drawn(cells)
    assert not images[:7].any()


# ---- What is refused ---------------------------------------------------------------------------------------

ONE_SOURCE = (
    r"Name one source of what is drawn: cell_type_key, genes \(of adata.X or of layer\), use_rep or transcripts"
)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cell_type_key": None}, ValueError, ONE_SOURCE + "; none is named"),
        ({"use_rep": "X_pca"}, ValueError, ONE_SOURCE + "; named are cell_type_key and use_rep"),
        ({"layer": "logged"}, ValueError, ONE_SOURCE + "; named are cell_type_key and layer"),
        ({"genes": ["a"]}, ValueError, ONE_SOURCE + "; named are cell_type_key and genes"),
        ({"radius": None}, ValueError, "Pass radius, in units of the positions, or n_neighbors.*: neither is given"),
        ({"n_neighbors": 3}, ValueError, "Pass radius.*: both are given"),
        ({"radius": 0}, ValueError, "radius is a number above 0, not 0"),
        ({"radius": np.nan}, ValueError, "radius is a number above 0, not nan"),
        ({"radius": None, "n_neighbors": 2.5}, ValueError, "n_neighbors is a whole number of at least 1, not 2.5"),
        ({"radius": None, "n_neighbors": 60}, ValueError, "n_neighbors is 60, but most cells have no more than that"),
        ({"size": 0}, ValueError, "size is a whole number of at least 1, not 0"),
        ({"size": 6}, ValueError, "size is 6 pixels, too few for a blur of 1: it is at least 7"),
        ({"blur": 0.2}, ValueError, "blur is 0 or at least 0.5 pixels, not 0.2"),
        ({"blur": np.nan}, ValueError, "blur is a number of at least 0, not nan"),
        (
            {"angles": np.zeros(59)},
            ValueError,
            r"angles are of shape \(59,\): one a cell is wanted, \(60,\), in radians",
        ),
        ({"angles": np.full(60, np.nan)}, ValueError, "angles are NaN or infinite"),
        ({"spatial_key": "X_umap"}, KeyError, "adata.obsm has no 'X_umap'; it has 'spatial', 'X_pca'. Name the pos"),
        ({"spatial_key": "X_pca"}, ValueError, r"'X_pca'\] has 3 columns, but images have two axes: choose two, with"),
        ({"cell_type_key": "kind"}, KeyError, "adata.obs has no column 'kind'; it has 'type', 'sample'"),
        ({"sample_key": "slide"}, KeyError, "adata.obs has no column 'slide'; it has 'type', 'sample'"),
        ({"cell_type_key": None, "layer": "raw"}, KeyError, "adata.layers has no 'raw'; it has 'logged'"),
        ({"cell_type_key": None, "use_rep": "X_none"}, KeyError, "adata.obsm has no 'X_none'; it has"),
        ({"cell_type_key": None, "genes": ["a", "z"]}, KeyError, r"adata.var_names lacks 1 gene \('z'\) of genes"),
        ({"cell_type_key": None, "genes": ["a", "a"]}, ValueError, "has repeats, 'a': a channel is one gene"),
        ({"cell_type_key": None, "genes": []}, ValueError, "genes is empty: name some"),
        ({"key_added": "spatial"}, ValueError, "key_added is 'spatial', where the input is: choose another"),
    ],
)
def test_what_is_not_an_option_is_refused(cells, unchanged, options, error, message):
    with unchanged(cells), pytest.raises(error, match=message):
        pp.neighborhood_images(cells, **{"cell_type_key": "type", "radius": 20, **options})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x: np.where(np.arange(60)[:, None] == 7, np.nan, x),
            r"is NaN or infinite in 1 cell \('cell_7'\): leave",
        ),
        (lambda x: x[:, :1], r"is of shape \(60, 1\): positions are wanted, \[n_cells, 2\]"),
        (
            lambda x: pd.DataFrame({"x": ["a"] * 60, "y": 1.0}, index=[f"cell_{i}" for i in range(60)]),
            "is not an array",
        ),
    ],
    ids=["NaN", "one column", "words"],
)
@pytest.mark.parametrize("function", ["neighborhood_images", "crop_images"])
def test_bad_positions_are_refused(cells, unchanged, change, message, function):
    cells.obsm["spatial"] = change(cells.obsm["spatial"])
    options = {"cell_type_key": "type"} if function == "neighborhood_images" else {"image": np.ones((100, 100))}
    with unchanged(cells), pytest.raises(ValueError, match=message):
        getattr(pp, function)(cells, radius=20, **options)


def test_bad_masses_are_refused(cells, unchanged):
    cells.obs["fraction"] = np.linspace(0, 1, 60)
    cells.obs["type"] = cells.obs["type"].where(np.arange(60) != 3)
    cells.obsm["X_pca"][[2, 4], 1] = np.nan
    cells.X.data[-1] = np.inf
    with unchanged(cells):
        with pytest.raises(ValueError, match=r"'type'\] is missing \(NaN\) in 1 cell \('cell_3'\): fill it in"):
            pp.neighborhood_images(cells, cell_type_key="type", radius=20)
        with pytest.raises(ValueError, match=r"'fraction'\] holds fractions, not types"):
            pp.neighborhood_images(cells, cell_type_key="fraction", radius=20)
        with pytest.raises(ValueError, match=r"'X_pca'\] is NaN or infinite in 2 cells \('cell_2', 'cell_4'\)"):
            pp.neighborhood_images(cells, use_rep="X_pca", radius=20)
        with pytest.raises(ValueError, match=r"adata.X is NaN or infinite in 1 cell \('cell_5.'\)"):
            pp.neighborhood_images(cells, genes=cells.var_names, radius=20)


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (
            lambda t: t.rename(columns={"x": "x_um"}),
            {},
            KeyError,
            "transcripts has no column 'x'; it has 'x_um'.* rename",
        ),
        (lambda t: t.drop(columns="sample"), {"sample_key": "sample"}, KeyError, "transcripts has no column 'sample'"),
        (lambda t: t.assign(y=np.nan), {}, ValueError, "transcripts has positions that are NaN or infinite: leave"),
        (lambda t: t.assign(gene=None), {}, ValueError, r"transcripts\['gene'\] is missing \(NaN\) in some rows"),
        (lambda t: t[:0], {}, ValueError, "transcripts has no rows: there is nothing to draw"),
        (lambda t: t.to_numpy(), {}, ValueError, "transcripts is a DataFrame, not ndarray"),
        (lambda t: t, {"genes": ["Sst"]}, KeyError, r"transcripts\['gene'\] lacks 1 gene \('Sst'\) of genes"),
        (lambda t: t, {"layer": "logged"}, ValueError, "named are layer and transcripts"),
    ],
)
def test_bad_transcripts_are_refused(cells, molecules, unchanged, change, options, error, message):
    with unchanged(cells), pytest.raises(error, match=message):
        pp.neighborhood_images(cells, transcripts=change(molecules), radius=20, **options)


def test_cells_that_all_lie_in_one_place_have_no_radius(cells, unchanged):
    cells.obsm["spatial"][:] = 1
    with unchanged(cells), pytest.raises(ValueError, match="most cells lie where so many others lie: check the posit"):
        pp.neighborhood_images(cells, cell_type_key="type", n_neighbors=5)


@pytest.mark.parametrize("function", [pp.neighborhood_images, pp.crop_images])
def test_what_is_no_anndata_of_cells_in_memory_is_refused(cells, tmp_path, function):
    with pytest.raises(TypeError, match="adata is an AnnData, not a ndarray: make one"):
        function(np.ones((3, 2)), radius=1)
    with pytest.raises(ValueError, match="The AnnData has no cells"):
        function(cells[:0].copy(), radius=1)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    with pytest.raises(ValueError, match=r"A view of a backed AnnData cannot be written to: call .to_memory\(\)"):
        function(backed[:20], radius=1)
    backed.file.close()


def test_import_leaves_torch_alone():
    heavy = ("torch", "pyro", "scanpy", "matplotlib")
    code = f"import sys, scvae.pp; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- Real cells --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cortex():
    if not OSMFISH.exists():
        pytest.skip("real data are not here")
    return anndata.read_h5ad(OSMFISH)


@pytest.mark.parametrize(("blur", "expected"), [(1.0, 0.10), (0.0, 0.43)])
def test_blur_makes_images_of_mouse_cortex_that_can_be_turned(cortex, blur, expected):
    """The numbers of the docstring."""
    options = {"cell_type_key": "cell_type", "n_neighbors": 30, "blur": blur}
    angles = np.random.default_rng(0).uniform(-np.pi, np.pi, cortex.n_obs)
    turned = drawn(cortex, angles=angles, **options)
    error = resampled(drawn(cortex, **options), angles, order=1) - turned
    assert np.linalg.norm(error) / np.linalg.norm(turned) == pytest.approx(expected, abs=0.01)


def test_neighbourhoods_of_mouse_cortex_hold_the_neighbours_of_each_type(cortex):
    images = drawn(cortex, cell_type_key="cell_type", n_neighbors=30)
    assert images.shape == (4530, 6, 28, 28)
    assert np.median(images.sum((1, 2, 3)).round()) in (29, 30, 31)
    assert (images.sum((2, 3)).round(3) % 1 == 0).all()
    own = np.take_along_axis(images.sum((2, 3)), cortex.obs["cell_type"].cat.codes.to_numpy(int)[:, None], 1)[:, 0]
    chance = (cortex.obs["cell_type"].value_counts(normalize=True) ** 2).sum()
    assert own.sum() / images.sum() > 1.2 * chance  # types keep together in the cortex


# ---- Crops -------------------------------------------------------------------------------------------------


def cut(adata, *arguments, **options):
    adata = adata.copy()
    pp.crop_images(adata, *arguments, **options)
    return adata.obsm["crop"]


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(256, size=(100, 120, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [7, 8])
def test_a_crop_at_a_pixel_is_a_slice(cells, picture, size):
    shift = (size % 2 - 1) / 2  # an even square is centred between pixels
    corner = np.random.default_rng(0).integers((0, 0), (120 - size, 100 - size), (60, 2))
    cells.obsm["spatial"] = corner + size // 2 + shift
    crops = cut(cells, picture, radius=size / 2, size=size)
    assert crops.shape == (60, 3, size, size)
    for crop, (x, y) in zip(crops, corner, strict=True):
        expected = picture[y : y + size, x : x + size].transpose(2, 0, 1) / 255
        np.testing.assert_allclose(crop, expected, atol=1e-6)


def test_scale_is_pixels_per_unit(cells, picture):
    cells.obsm["spatial"] = np.random.default_rng(0).uniform((0, 0), (119, 99), (60, 2))
    crops = cut(cells, picture, radius=10, size=14)
    cells.obsm["spatial"] = cells.obsm["spatial"] * 4
    np.testing.assert_allclose(cut(cells, picture, radius=40, size=14, scale=0.25), crops, atol=1e-6)


def test_between_pixels_it_is_bilinear_and_zero_outside(cells, picture):
    cells.obsm["spatial"] = here = np.random.default_rng(0).uniform((0, 0), (119, 99), (60, 2))
    crops = cut(cells, picture[..., 0], radius=4, size=20)  # enlarged
    offsets = (np.arange(20) - 9.5) * 0.4
    for crop, (x, y) in zip(crops[:, 0], here, strict=True):
        rows, columns = np.meshgrid(y + offsets, x + offsets, indexing="ij")
        padded = np.pad(picture[..., 0] / 255, 6)
        expected = ndimage.map_coordinates(padded, [rows + 6, columns + 6], order=1)
        np.testing.assert_allclose(crop, expected, atol=1e-6)


def test_shrunk_it_is_the_mean_over_what_a_pixel_covers(cells, picture):
    cells.obsm["spatial"] = np.tile([59.5, 44.5], (60, 1))
    (crop,) = cut(cells[:1], picture, radius=40, size=16)
    expected = (picture[5:85, 20:100] / 255).reshape(16, 5, 16, 5, 3).mean((1, 3)).transpose(2, 0, 1)
    np.testing.assert_allclose(crop, expected, atol=1e-6)


def test_what_lies_beyond_the_border_is_zero(cells):
    cells.obsm["spatial"] = np.tile([0.0, 9.0], (60, 1))  # centre of the lower left pixel of ten by ten
    crop = cut(cells, np.ones((10, 10)), radius=2.5, size=5)[0, 0]
    expected = np.zeros((5, 5))
    expected[:3, 2:] = 1
    np.testing.assert_array_equal(crop, expected)
    cells.obsm["spatial"][:5] = 1e6
    assert not cut(cells, np.ones((10, 10)), radius=2.5, size=5)[:5].any()


@pytest.mark.parametrize("convert", [
    lambda x: x.astype(np.float32) / 255,
    lambda x: (x.astype(np.uint16) * 257),
    lambda x: (x.astype(">u2") * 257).astype(">u2"),
    lambda x: (x / 255).tolist(),
    lambda x: np.asfortranarray(x),
], ids=["float", "uint16", "big endian", "list", "Fortran order"])  # fmt: skip
def test_any_kind_of_picture_gives_the_same_crops(cells, picture, convert):
    crops = cut(cells, picture, radius=9, size=10)
    assert 0 <= crops.min() <= crops.max() <= 1
    np.testing.assert_allclose(cut(cells, convert(picture), radius=9, size=10), crops, atol=1e-6)


def test_a_picture_on_disk_is_read_piece_by_piece(cells, tmp_path, peak_memory):
    big = np.lib.format.open_memmap(tmp_path / "big.npy", "w+", np.uint8, (4000, 4000))
    big[:100, :100] = 255
    with peak_memory() as peak:
        crops = cut(cells, big, radius=5, size=10)
    assert peak() < 4e6
    assert crops.max() == 1


def stored(**libraries):
    return {
        name: {"images": {"hires": picture}, "scalefactors": {"tissue_hires_scalef": scale}}
        for name, (picture, scale) in libraries.items()
    }


def test_stored_pictures_are_found_with_their_scale(cells, picture, tmp_path):
    cells.uns["spatial"] = stored(left=(picture, 0.5))
    np.testing.assert_array_equal(cut(cells, radius=20), cut(cells, picture, radius=20, scale=0.5))
    np.testing.assert_array_equal(cut(cells, radius=20, scale=1), cut(cells, picture, radius=20))
    pp.crop_images(cells, radius=20)
    assert cells.uns["crop"]["params"] == {"image": "hires", "size": 28, "spatial_key": "spatial"}
    assert cells.uns["crop"]["channels"].tolist() == ["0", "1", "2"]
    assert cells.uns["crop"]["pixel_size"] == 40 / 28
    cells.write_h5ad(tmp_path / "cells.h5ad")
    read = anndata.read_h5ad(tmp_path / "cells.h5ad")
    np.testing.assert_array_equal(read.obsm["crop"], cells.obsm["crop"])
    assert read.uns["crop"]["params"] == cells.uns["crop"]["params"]


def test_each_sample_is_cut_from_its_own_picture(cells, picture):
    cells.uns["spatial"] = stored(left=(picture, 0.5), right=(picture[::-1], 0.8))
    crops = cut(cells, radius=20, sample_key="sample")
    for name, pixels, scale in (("left", picture, 0.5), ("right", picture[::-1], 0.8)):
        here = (cells.obs["sample"] == name).to_numpy()
        np.testing.assert_array_equal(crops[here], cut(cells[here], pixels, radius=20, scale=scale))


@pytest.mark.parametrize(
    ("image", "options", "error", "message"),
    [
        ("hires", {}, ValueError, r"has 2 libraries \('left', 'right'\): name the column of adata.obs"),
        ("lowres", {"sample_key": "sample"}, KeyError, r"'left'\]\['images'\] has no 'lowres'; it has 'hires'. Pass"),
        ("hires", {"sample_key": "type"}, KeyError, r"'spatial'\] has no library 'glia'; it has 'left', 'right'"),
        (np.ones((9, 9)), {"sample_key": "sample"}, ValueError, "sample_key is for pictures that are stored"),
        (np.ones(9), {}, ValueError, r"The picture is of shape \(9,\): \[height, width\] or"),
        (np.ones((3, 90, 90)), {}, ValueError, r"shape \(3, 90, 90\): channels come last.*numpy.moveaxis"),
        (
            np.ones((90, 90), int),
            {},
            ValueError,
            "The picture holds int64, whose range is unknown: convert it to uint8",
        ),
        (np.full((90, 90), 7.0), {}, ValueError, "The picture has pixels outside 0 to 1, or NaN: divide it"),
        (np.full((90, 90), np.nan), {}, ValueError, "The picture has pixels outside 0 to 1, or NaN: divide it"),
        (
            np.ones((90, 90)),
            {"scale": 1e4},
            ValueError,
            r"No cell lies in the picture, which has 90 × 90 pixels.*check sc",
        ),
        (np.ones((90, 90)), {"scale": 0}, ValueError, "scale is a number above 0, not 0"),
        (
            np.ones((90, 90)),
            {"radius": -1},
            ValueError,
            "radius is a number above 0, not -1",
        ),
        (np.ones((90, 90)), {"size": 2.5}, ValueError, "size is a whole number of at least 1, not 2.5"),
        (np.ones((90, 90)), {"key_added": "spatial"}, ValueError, "key_added is 'spatial', where the input is"),
        (np.ones((90, 90)), {"spatial_key": "xy"}, KeyError, "adata.obsm has no 'xy'; it has 'spatial', 'X_pca'"),
    ],
)
def test_what_cannot_be_cut_is_refused(cells, picture, unchanged, image, options, error, message):
    cells.uns["spatial"] = stored(left=(picture, 1.0), right=(picture, 1.0))
    with unchanged(cells), pytest.raises(error, match=message):
        pp.crop_images(cells, image, **{"radius": 10, **options})


def test_pictures_that_are_not_there_or_differ_are_refused(cells, picture, unchanged):
    with unchanged(cells), pytest.raises(KeyError, match=r"adata.uns has no pictures \(no 'spatial'\).* pass an array"):
        pp.crop_images(cells, radius=10)
    cells.uns["spatial"] = stored(left=(picture, 1.0), right=(picture[..., 0], 1.0))
    with pytest.raises(ValueError, match=r"The pictures differ in their number of channels: \[1, 3\]"):
        pp.crop_images(cells, radius=10, sample_key="sample")
    del cells.uns["spatial"]["right"], cells.uns["spatial"]["left"]["scalefactors"]["tissue_hires_scalef"]
    with pytest.raises(
        KeyError, match=r"\['scalefactors'\] has no 'tissue_hires_scalef'; it has none. Pass the picture"
    ):
        pp.crop_images(cells, radius=10)


def test_many_cells_outside_are_warned_of(cells, picture):
    cells.obsm["spatial"][:7] += 1e4
    with pytest.warns(UserWarning, match="of 60 cells lie outside the picture: check scale, or leave them out"):
        cut(cells, picture, radius=10)
