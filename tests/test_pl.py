"""Figures show the numbers that they are given, on the axes that they are given."""

import sys
from itertools import pairwise

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from scvae import pl


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
    ax = pl.history(fit(adata).history)
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
