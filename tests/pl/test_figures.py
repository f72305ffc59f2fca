"""Figures show the numbers that they are given, on the axes that they are given."""

import sys
from itertools import pairwise

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from scvae import pl
from scvae.pl.grid import grid_of


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def table(n, library="latent"):
    difference = -(np.arange(n, dtype=float) ** 1.5)
    return pd.DataFrame(
        {"difference": difference, "difference_se": 0.1 * np.arange(n), "library": library},
        index=pd.Index([f"likelihood=nb, n_latent={i}" for i in range(n)], name="configuration"),
    )


def heights(ax):
    """Vertical place of each tick label on the canvas, in pixels, by its text."""
    ax.figure.canvas.draw()
    return {label.get_text(): label.get_window_extent() for label in ax.get_yticklabels()}


@pytest.mark.parametrize("n", [1, 2, 6, 20])
def test_compare_draws_the_differences_with_the_best_on_top_and_names_that_do_not_collide(n):
    ax = pl.compare(table(n))
    (dots,) = (line for line in ax.lines if line.get_marker() == "o")
    np.testing.assert_array_equal(dots.get_xdata(), table(n)["difference"])
    boxes = list(heights(ax).values())
    assert list(heights(ax)) == list(table(n).index)
    assert all(above.y0 > below.y1 for above, below in pairwise(boxes))
    assert all(box.x0 >= 0 for box in boxes)
    assert "nats a cell" in ax.get_xlabel()


def test_compare_sets_kinds_of_library_apart():
    both = pd.concat([table(2, "observed"), table(3, "latent")])
    ax = pl.compare(both)
    assert all("(library observed)" in name for name in list(heights(ax))[:2])
    assert [line.get_ydata()[0] for line in ax.lines if list(line.get_xdata()) == [0, 1]] == [1.5]
    assert not any("library" in name for name in heights(pl.compare(table(3))))


def test_history_draws_the_validation_where_there_is_one(adata, fit):
    model = fit(adata, validation_fraction=0.2)
    ax = pl.history(model)
    training, validation = ax.lines
    np.testing.assert_array_equal(training.get_ydata(), model.history["elbo"])
    np.testing.assert_array_equal(validation.get_ydata(), model.history["validation_elbo"])
    assert ax.get_legend() is not None
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "ELBO (nats a cell)")
    ax = pl.history(fit(adata, validation_fraction=0).history)
    assert (len(ax.lines), ax.get_legend()) == (1, None)


def test_history_is_drawn_from_the_anndata_too(adata, fit):
    model = fit(adata)
    np.testing.assert_array_equal(pl.history(adata.uns["scvae"]["history"]).lines[0].get_ydata(), model.history["elbo"])


def test_they_draw_on_the_axes_given_and_never_show(monkeypatch, model):
    monkeypatch.setattr(plt, "show", lambda *_, **__: pytest.fail("it showed the figure"))
    figure, axes = plt.subplots(1, 2)
    assert pl.compare(table(3), ax=axes[0]) is axes[0]
    assert pl.history(model, ax=axes[1]) is axes[1]
    assert plt.get_fignums() == [figure.number]


def test_without_matplotlib_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"figures need matplotlib: pip install .scvae-pyro\[demo\]"):
        pl.compare(table(2))


# ---- Images ------------------------------------------------------------------------------------------------


def pixels(ax):
    (shown,) = ax.images
    return np.asarray(shown.get_array())


def tiles(picture, height, width):
    """The images that a picture is made of, from left to right and from top to bottom: its opaque parts."""
    opaque = picture[..., 3] > 0
    tops = np.flatnonzero(np.diff(np.r_[0, opaque.any(1)]) == 1)
    lefts = np.flatnonzero(np.diff(np.r_[0, opaque.any(0)]) == 1)
    return [picture[top : top + height, left : left + width, :3] for top in tops for left in lefts if opaque[top, left]]


@pytest.mark.parametrize("titled", [False, True])
def test_images_of_one_channel_are_grey_on_one_scale_row_by_row(titled):
    images = np.random.default_rng(0).uniform(0, 3, (7, 9, 12))
    titles = [f"cell {i}" for i in range(7)] if titled else None
    ax = pl.images(images, ncols=3, titles=titles)
    shown = tiles(pixels(ax), 9, 12)
    assert len(shown) == 7
    for tile, image in zip(shown, images, strict=True):
        np.testing.assert_allclose(tile, np.repeat(image[..., None] / images.max(), 3, axis=2))
    assert [text.get_text() for text in ax.texts] == (titles or [])


def test_a_channel_axis_of_one_and_tensors_are_no_different():
    images = np.random.default_rng(0).uniform(size=(5, 8, 8))
    expected = pixels(pl.images(images))
    np.testing.assert_array_equal(pixels(pl.images(images[:, None])), expected)
    np.testing.assert_array_equal(pixels(pl.images(torch.from_numpy(images))), expected)


def test_three_channels_are_red_green_and_blue():
    images = np.random.default_rng(0).uniform(size=(4, 3, 8, 8))
    for tile, image in zip(tiles(pixels(pl.images(images)), 8, 8), images / images.max(), strict=True):
        np.testing.assert_allclose(tile, image.transpose(1, 2, 0), atol=1e-12)


@pytest.mark.parametrize("n_channels", [2, 6])
def test_each_channel_has_its_hue_and_its_name(n_channels):
    images = np.eye(n_channels)[:, :, None, None] * np.ones((8, 8))
    names = [f"type {i}" for i in range(n_channels)]
    ax = pl.images(images, channels=names)
    colours = {tuple(tile[0, 0].round(6)) for tile in tiles(pixels(ax), 8, 8)}
    assert len(colours) == n_channels
    legend = ax.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == names
    assert {tuple(np.round(line.get_color(), 6)) for line in legend.get_lines()} == colours


def test_values_below_zero_and_images_that_are_empty_are_drawn():
    images = np.stack([np.full((4, 4), -1.0), np.full((4, 4), 3.0)])
    low, high = tiles(pixels(pl.images(images)), 4, 4)
    assert (low == 0).all()
    assert (high == 1).all()
    assert all((tile == 0).all() for tile in tiles(pixels(pl.images(np.zeros((3, 4, 4)))), 4, 4))


def test_the_first_images_are_drawn_on_the_axes_given():
    figure, ax = plt.subplots()
    images = np.random.default_rng(0).uniform(size=(50, 6, 6))
    assert pl.images(images, n=4, ax=ax) is ax
    assert len(tiles(pixels(ax), 6, 6)) == 4
    assert len(tiles(pixels(pl.images(images)), 6, 6)) == 40
    assert len(plt.get_fignums()) == 2
    assert figure is ax.figure


def test_a_grid_names_rows_and_columns_where_they_are():
    rows = np.random.default_rng(0).uniform(size=(2, 3, 2, 8, 8))
    ax = grid_of([rows[0], rows[1][:2]], row_labels=["data", "model"], column_labels=["0°", "90°", "180°"])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["data", "model"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0°", "90°", "180°"]
    opaque = pixels(ax)[..., 3]
    assert all(opaque[int(y), int(x)] for y in ax.get_yticks() for x in ax.get_xticks()[:2])
    assert not opaque[int(ax.get_yticks()[1]), int(ax.get_xticks()[2])]


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((5, 8), {}, r"Images of shapes \[\(8,\)\] cannot be drawn: some of one shape are wanted, \[n, H, W\] or"),
        ((0, 8, 8), {}, "cannot be drawn: some of one shape are wanted"),
        ((5, 8, 8), {"titles": ["a"]}, "There are 1 titles for 5 images: one each is wanted"),
        ((5, 2, 8, 8), {"channels": ["a"]}, "There are 1 names for 2 channels: one each is wanted"),
        ((5, 8, 8), {"n": 0}, "n is at least 1, not 0"),
        ((5, 8, 8), {"ncols": 0}, "ncols is at least 1, not 0"),
    ],
)
def test_what_is_no_grid_of_images_is_refused(shape, options, message):
    with pytest.raises(ValueError, match=message):
        pl.images(np.ones(shape), **options)
    assert plt.get_fignums() == []


def test_titles_may_be_a_column_of_obs():
    images = np.random.default_rng(0).uniform(size=(4, 5, 5))
    for titles in (np.array(["a", "b", "c", "d"]), pd.Series(["a", "b", "c", "d"])):
        assert [text.get_text() for text in pl.images(images, titles=titles).texts] == ["a", "b", "c", "d"]
