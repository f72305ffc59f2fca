"""Figures of analyses show the numbers that they are given, and every figure is drawn, shown and saved alike."""

import inspect

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")
from matplotlib import pyplot as plt

import scvae
from scvae import pl


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def scores():
    columns = ["leiden_ari", "transfer", "cilisi", "total_knn"]
    rows = {"a": [0.2, 0.3, 0.4, 0.3], "PCA": [0.1, 0.9, np.nan, 0.2], "b": [1, 0.8, -0.001, 0.9]}
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


# ---- What is drawn -----------------------------------------------------------------------------------------


def test_latent_draws_pairs_below_and_spreads_on_the_diagonal(adata):
    panels = pl.latent(adata, use_rep="latent", color="cell_type", dimensions=[2, 0])
    assert panels.shape == (2, 2)
    (dots,) = panels[1, 0].collections
    drawn = np.asarray(dots.get_offsets())
    expected = adata.obsm["latent"][:, [2, 0]]
    np.testing.assert_allclose(drawn[np.lexsort(drawn.T)], expected[np.lexsort(expected.T)])
    assert (panels[1, 0].get_xlabel(), panels[1, 0].get_ylabel()) == ("z2", "z0")
    counts = [patch.get_data().values.sum() for patch in panels[0, 0].patches]
    assert counts[::2] == adata.obs["cell_type"].value_counts(sort=False).tolist()
    assert not panels[0, 1].axison
    assert [text.get_text() for text in panels[0, 1].get_legend().get_texts()] == list(
        adata.obs["cell_type"].cat.categories
    )


def test_latent_colours_are_scanpys_where_there_are_some_and_numbers_have_a_scale(adata):
    adata.uns["cell_type_colors"] = ["#ff0000", "#0000ff"]
    panels = pl.latent(adata, use_rep="latent", color="cell_type", dimensions=[0, 1])
    colours = np.unique(panels[1, 0].collections[0].get_facecolors(), axis=0)
    np.testing.assert_array_equal(colours, [[0, 0, 1, 1], [1, 0, 0, 1]])
    panels = pl.latent(adata, use_rep="latent", color="age", dimensions=[0, 1])
    shown = panels[1, 0].collections[0].get_array()
    np.testing.assert_allclose(np.sort(shown), np.sort(adata.obs["age"]))


def test_latent_takes_the_clusters_of_the_fit_and_the_widest_dimensions(adata, fit):
    fit(adata, n_latent=6, key_added="X_mine", prior="mixture")
    panels = pl.latent(adata, use_rep="X_mine")
    assert panels[0, 3].get_legend().get_title().get_text() == "mine_cluster"
    widest = np.argsort(-adata.obsm["X_mine"].astype(float).var(0), kind="stable")[:4]
    assert [panel.get_xlabel() for panel in panels[3]] == [f"z{i}" for i in widest]
    assert pl.latent(adata, use_rep="latent")[0, 1].get_legend() is None


def test_denoised_draws_counts_over_what_is_expected_and_their_means(adata, model):
    genes = model.genes[3:5]
    panels = pl.denoised(model, adata, genes)
    assert [panel.get_title() for panel in panels] == genes
    expected = model.denoise(adata, genes=genes, library_size="cell")
    for i, panel in enumerate(panels):
        drawn = np.expm1(np.asarray(panel.collections[0].get_offsets()))
        np.testing.assert_allclose(drawn[:, 0], expected[:, i], rtol=1e-5)
        counts = adata[:, genes[i]].X.toarray()[:, 0]
        np.testing.assert_allclose(drawn[:, 1].round(), counts)
        (means,) = (line for line in panel.lines if line.get_marker() == "o")
        np.testing.assert_allclose(np.expm1(means.get_ydata()).mean(), counts.mean(), rtol=1e-5)
    assert len(pl.denoised(model, adata, genes[0])) == 1


def test_loadings_draws_the_largest_of_each_dimension(adata, fit):
    model = fit(adata, n_decoder_layers=0)
    panels = pl.loadings(model, dimensions=[2, 0], n_genes=5)
    assert [panel.get_title() for panel in panels] == ["z2", "z0"]
    column = model.loadings()["z2"]
    largest = column.loc[column.abs().nlargest(5).index].sort_values(ascending=False)
    assert [label.get_text() for label in panels[0].get_yticklabels()] == list(largest.index)
    np.testing.assert_allclose([bar.get_width() for bar in panels[0].patches], largest)
    assert len(pl.loadings(model)) == 3


def test_posterior_check_draws_residuals_zeros_variances_and_held_out_counts(adata, model):
    check = scvae.tl.posterior_check(model, adata, n_samples=2)
    panels = pl.posterior_check(check)
    assert len(panels) == 4
    *worst, everything = panels[0].patches[-4:]
    n_cells, n_genes = adata.n_obs, adata.n_vars
    for patch, (_, row) in zip(worst, check.pit.iterrows(), strict=False):
        np.testing.assert_allclose(patch.get_data().values, row / n_cells * 20)
    np.testing.assert_allclose(everything.get_data().values, check.pit.sum() / (n_cells * n_genes) * 20)
    for panel, what in ((panels[1], "zeros"), (panels[2], "variance")):
        drawn = np.asarray(panel.collections[0].get_offsets())
        np.testing.assert_allclose(drawn, check.genes[[f"{what}_expected", what]])
    names = [text.get_text() for text in panels[0].get_legend().get_texts()]
    assert names == [*check.genes.index[:3], "all genes"]


def test_scores_are_written_best_first_with_controls_below(adata):
    ax = pl.integration_scores(scores())
    assert [label.get_text() for label in ax.get_yticklabels()] == ["b", "a", "PCA"]
    texts = [text.get_text() for text in ax.texts]
    assert {"1.00", "0.00", "0.90", "–", "Label\ntransfer", "Biology kept", "Batches\nmixed", "Totals"} <= set(texts)
    assert "-0.00" not in texts
    radii = [patch.radius for patch in ax.patches if hasattr(patch, "radius")]
    assert max(radii) == radii[0] == pytest.approx(0.46)  # of 1, in the first row
    with pytest.raises(ValueError, match="none of the columns"):
        pl.integration_scores(pd.DataFrame({"other": [1.0]}))


def test_what_cannot_be_drawn_is_refused(adata, model, fit):
    with pytest.raises(ValueError, match="dimensions are from 0 to 4, not"):
        pl.latent(adata, use_rep="latent", dimensions=[5])
    with pytest.raises(KeyError, match="adata.obs has no column 'none'"):
        pl.latent(adata, use_rep="latent", color="none")
    with pytest.raises(ValueError, match="The model knows no gene"):
        pl.denoised(model, adata, "none")
    with pytest.raises(ValueError, match="models of the counts of genes, which 'gaussian'"):
        pl.denoised(fit(adata, "gaussian"), adata, model.genes[0])
    with pytest.raises(ValueError, match="not linear"):
        pl.loadings(model)
    assert plt.get_fignums() == []


# ---- Every figure ------------------------------------------------------------------------------------------


@pytest.fixture
def figures(adata, fit, model, tmp_path):
    """Every figure as a function of `ax`, `show` and `save`."""
    adata.obsm["image"] = np.random.default_rng(0).uniform(size=(80, 8, 8)).astype(np.float32)
    images = scvae.fit(adata.copy(), "pose", image_key="image", n_latent=2, max_epochs=1, progress=False)
    linear = fit(adata.copy(), n_decoder_layers=0)
    check = scvae.tl.posterior_check(model, adata, n_samples=2)
    table = pd.DataFrame({"difference": [0.0], "difference_se": [0.1], "library": ["latent"]}, index=["a"])
    different = scvae.tl.differential(model, adata, "cell_type", n_mock=5, progress=False)
    tuned = scvae.tune(
        adata.copy(), {"n_latent=5": {"n_latent": 5}}, max_epochs=1, n_samples=2, progress=False, n_hidden=8
    )
    return {
        "compare": lambda **how: pl.compare(table, **how),
        "denoised": lambda **how: pl.denoised(model, adata, model.genes[:2], **how),
        "history": lambda **how: pl.history(model, **how),
        "images": lambda **how: pl.images(adata.obsm["image"], n=4, **how),
        "integration_scores": lambda **how: pl.integration_scores(scores(), **how),
        "latent": lambda **how: pl.latent(adata, use_rep="latent", dimensions=[0, 1], **how),
        "loadings": lambda **how: pl.loadings(linear, n_genes=3, **how),
        "poses": lambda **how: pl.poses(images, adata, n=2, n_angles=2, **how),
        "posterior_check": lambda **how: pl.posterior_check(check, **how),
        "reconstructions": lambda **how: pl.reconstructions(images, adata, n=2, **how),
        "traversal": lambda **how: pl.traversal(images, n=2, **how),
        "tuning": lambda **how: pl.tuning(tuned, **how),
        "volcano": lambda **how: pl.volcano(different, "type_0", **how),
    }


def test_every_figure_is_drawn_where_it_is_told_saved_and_shown_when_asked(figures, monkeypatch, tmp_path):
    shown = []
    monkeypatch.setattr(plt, "show", lambda *_, **__: shown.append(True))
    for name, draw in figures.items():
        figure, (left, right) = plt.subplots(1, 2)
        path = tmp_path / f"{name}.png"
        drawn = np.atleast_1d(draw(ax=right, save=path)).ravel()
        assert all(panel.figure is figure for panel in drawn), name
        assert drawn[0] is right or set(right.child_axes) >= set(drawn), name
        assert not left.has_data(), name
        assert path.read_bytes().startswith(b"\x89PNG"), name
        assert shown == [], name
        draw(show=True)
        assert shown.pop(), name
        with pytest.raises(ValueError, match=r"save is the name of a file with the ending of a picture, .* 'x.none'"):
            draw(save="x.none")
        plt.close("all")
    assert {path.suffix for path in tmp_path.iterdir()} == {".png"}
    assert set(figures) == set(pl.__all__)


def test_every_function_of_pl_takes_them_by_name():
    for name in pl.__all__:
        parameters = inspect.signature(getattr(pl, name)).parameters
        assert {"ax", "show", "save"} <= set(parameters), name
        assert parameters["show"].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters["save"].default is None
