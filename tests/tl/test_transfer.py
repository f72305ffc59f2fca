"""Labels carried over from a reference: the right ones, with probabilities and sets that mean what they say."""

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

import scvae
from scvae.tl.transfer import _at_most, _conformal, _distances, _folds, _thresholds


class Latent:
    """In the place of a model: the latent space is ``.obsm["z"]``, and posteriors have a standard deviation of 0.1."""

    def embed(self, adata, *, give_std=False, **how):
        z = np.asarray(adata.obsm["z"], np.float32)
        return (z, np.full_like(z, 0.1)) if give_std else z


def cells(rng, n_cells, centres, n_dimensions=4, prefix="cell"):
    """Cells about centres along the first axes, with their type."""
    of = np.repeat(list(centres), list(n_cells))
    z = rng.normal(size=(len(of), n_dimensions)) * 0.5
    z[:, :2] += [centres[name] for name in of]
    obs = pd.DataFrame({"type": of}, index=[f"{prefix}_{i}" for i in range(len(of))])
    return anndata.AnnData(obs=obs, obsm={"z": z})


CENTRES = {"a": (0, 0), "b": (4, 0), "c": (0, 4)}


@pytest.fixture
def reference():
    return cells(np.random.default_rng(0), [200, 60, 30], CENTRES)


@pytest.fixture
def query():
    return cells(np.random.default_rng(1), [20, 20, 20], CENTRES, prefix="new")


def transfer(reference, query, **options):
    return scvae.tl.transfer_labels(Latent(), reference, query, "type", **options)


# ---- What is written ---------------------------------------------------------------------------------------


def test_labels_of_types_that_lie_apart_are_right(reference, query):
    table = transfer(reference, query)
    assert (table["label"].astype(str) == query.obs["type"]).mean() > 0.95
    assert table.loc[table["label"].astype(str) == query.obs["type"], "probability"].median() > 0.95


def test_what_is_written_is_what_is_returned(reference, query):
    before = query.copy()
    table = transfer(reference, query, key_added="here")
    assert table.index.equals(query.obs_names)
    assert list(table) == ["label", "probability", "score", "out_of_reference", "n_labels"]
    pd.testing.assert_series_equal(query.obs["here"], table["label"], check_names=False)
    for name in list(table)[1:]:
        pd.testing.assert_series_equal(query.obs[f"here_{name}"], table[name], check_names=False)
    probability, is_in = query.obsm["here_probability"], query.obsm["here_set"]
    np.testing.assert_allclose(probability.sum(1), 1, rtol=1e-6)
    np.testing.assert_array_equal(table["label"].cat.codes, probability.argmax(1))
    np.testing.assert_allclose(table["probability"], probability.max(1))
    np.testing.assert_array_equal(table["n_labels"], is_in.sum(1))
    np.testing.assert_array_equal(table["out_of_reference"], ~is_in.any(1))
    np.testing.assert_array_equal(table["out_of_reference"], table["score"] > 1)
    record = query.uns["here"]
    assert record["params"]["coverage"] == 0.9
    assert list(record["labels"]) == ["a", "b", "c"]
    assert list(record["n_cells"]) == [200, 60, 30]
    assert (record["thresholds"] > 0).all()
    assert set(query.obs) - set(before.obs) == {"here", *(f"here_{name}" for name in list(table)[1:])}
    assert set(query.obsm) - set(before.obsm) == {"here_probability", "here_set"}
    assert set(query.uns) == {"here"}


def test_it_survives_a_file_and_a_second_call_replaces_the_first(reference, query, tmp_path):
    transfer(reference, query)
    again = transfer(reference, query, coverage=0.5)
    query.write_h5ad(tmp_path / "query.h5ad")
    read = anndata.read_h5ad(tmp_path / "query.h5ad")
    pd.testing.assert_series_equal(read.obs["transferred"], query.obs["transferred"])
    np.testing.assert_array_equal(read.obsm["transferred_set"], query.obsm["transferred_set"])
    np.testing.assert_array_equal(read.obs["transferred_out_of_reference"], again["out_of_reference"])
    assert read.uns["transferred"]["params"]["coverage"] == 0.5


def test_the_reference_is_left_alone_and_the_seed_decides(reference, query, unchanged, process_unchanged):
    with unchanged(reference), process_unchanged():
        one, two, other = (transfer(reference, query.copy(), seed=seed) for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(one, two)
    assert not np.array_equal(one["score"], other["score"])


# ---- Sets and what is out of the reference -----------------------------------------------------------------


@pytest.mark.parametrize("coverage", [0.8, 0.95])
def test_each_label_is_in_the_sets_of_its_cells_as_often_as_promised(coverage):
    rng = np.random.default_rng(0)
    hits, n = np.zeros(3), np.zeros(3)
    for _ in range(20):
        reference = cells(rng, [150, 60, 40], {"a": (0, 0), "b": (1, 0), "c": (0, 2)})  # which overlap
        reference.obsm["z"] *= [1, 10, 0.1, 1]  # in no units
        query = cells(rng, [50, 50, 50], {"a": (0, 0), "b": (1, 0), "c": (0, 2)}, prefix="new")
        query.obsm["z"] *= [1, 10, 0.1, 1]
        transfer(reference, query, coverage=coverage)
        code = query.obs["type"].astype("category").cat.codes.to_numpy()
        hits += np.bincount(code, query.obsm["transferred_set"][np.arange(150), code])
        n += np.bincount(code)
    assert (np.abs(hits / n - coverage) < 0.035).all()


def test_cells_of_no_label_are_out_of_the_reference(reference, query):
    far = cells(np.random.default_rng(2), [40], {"d": (4, 4)}, prefix="far")
    table = transfer(reference, far)
    assert table["out_of_reference"].mean() > 0.95
    assert (table["n_labels"] == 0).mean() > 0.95
    assert table["label"].notna().all()  # the likeliest, nonetheless
    assert transfer(reference, query)["out_of_reference"].mean() < 0.2


def test_units_of_the_latent_space_do_not_matter(reference, query):
    table = transfer(reference, query.copy())

    class Scaled(Latent):
        def embed(self, adata, *, give_std=False, **how):
            answer = super().embed(adata, give_std=give_std)
            return tuple(1000 * part for part in answer) if give_std else 1000 * answer

    other = scvae.tl.transfer_labels(Scaled(), reference, query, "type")
    np.testing.assert_allclose(other["score"], table["score"], rtol=1e-3)
    np.testing.assert_allclose(other["probability"], table["probability"], rtol=1e-3)


def test_dimensions_that_say_nothing_do_not_count(reference, query):
    """Where the posterior is the prior, its mean hardly varies, and yet differs a little in a new batch."""

    class Collapsed(Latent):
        def embed(self, adata, *, give_std=False, **how):
            z, std = super().embed(adata, give_std=True)
            shift = 0.1 if adata.obs_names[0].startswith("new") else 0.0
            z = np.concatenate([z, np.full((len(z), 5), shift) + 0.01 * z[:, :1]], 1)
            std = np.concatenate([std, np.ones((len(z), 5))], 1).astype(np.float32)
            return (z, std) if give_std else z

    table = scvae.tl.transfer_labels(Collapsed(), reference, query, "type")
    assert table["out_of_reference"].mean() < 0.2


def test_the_distance_is_that_of_mahalanobis_with_the_mean_variance_of_the_posteriors():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(5000, 3)) @ rng.normal(size=(3, 3))
    std = np.full((5000, 3), 0.5)
    new = rng.normal(size=(7, 3))
    found = _distances(z, std, np.zeros(5000, int), 2, new)
    inverse = np.linalg.inv(np.cov(z.T, bias=True) + 0.25 * np.eye(3))
    difference = new - z.mean(0)
    expected = np.sqrt(np.einsum("ij,jk,ik->i", difference, inverse, difference))
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-4)
    assert np.isinf(found[:, 1]).all()


def test_a_threshold_is_the_quantile_that_holds_for_one_more():
    scores = np.arange(1.0, 20.0)  # 19 of them: the 18th of 20 places
    assert _conformal(scores, 0.9) == pytest.approx(18)
    assert _conformal(scores[:8], 0.9) == np.inf  # 9 is not enough for 0.9, whatever they are
    assert _conformal(scores[:9], 0.9) == pytest.approx(9)
    assert _conformal(scores[:14], 0.9) == pytest.approx(13.5)  # between two
    own = np.concatenate([np.arange(1.0, 100.0), [500.0, np.inf]])
    codes = np.repeat([0, 1], [99, 2])
    thresholds = _thresholds(own, codes, 2, 0.9)
    assert thresholds[0] == pytest.approx(90)
    assert thresholds[1] == _conformal(own[:100], 0.9)


@pytest.mark.parametrize("n_cells", [9, 10, 13, 18, 19, 40])
def test_the_coverage_is_that_which_was_asked_for_with_few_cells_too(n_cells):
    rng = np.random.default_rng(n_cells)
    scores, one_more = (np.sqrt(rng.chisquare(10, (20000, n))) for n in (n_cells, 1))
    thresholds = np.quantile(scores, 0.9, axis=1, method="weibull")
    np.testing.assert_allclose(thresholds[:5], [_conformal(row, 0.9) for row in scores[:5]])
    assert (one_more[:, 0] <= thresholds).mean() == pytest.approx(0.9, abs=0.013)  # 0.91 to 0.95 rounded up


# ---- Few cells, missing labels, categories without cells ---------------------------------------------------


def test_cells_without_a_label_are_left_out(reference, query):
    with_nan = reference.copy()
    with_nan.obs["type"] = with_nan.obs["type"].where(np.arange(290) % 3 > 0)
    only = reference[np.arange(290) % 3 > 0].copy()
    pd.testing.assert_frame_equal(transfer(with_nan, query.copy()), transfer(only, query))


def test_categories_without_cells_cannot_win(reference, query):
    reference.obs["type"] = pd.Categorical(reference.obs["type"], ["z", "c", "a", "b", "none"])
    table = transfer(reference, query)
    assert table["label"].cat.categories.tolist() == ["c", "a", "b"]
    assert query.obsm["transferred_probability"].shape == (60, 3)


@pytest.mark.parametrize("n_few", [1, 2, 5])
def test_a_label_of_few_cells_is_carried_over_and_does_not_swallow_what_is_new(query, n_few):
    rng = np.random.default_rng(0)
    few = cells(rng, [200, 60, n_few], CENTRES)
    table = transfer(few, query)
    is_few = (query.obs["type"] == "c").to_numpy()
    assert (table["label"][is_few] == "c").mean() > 0.7
    assert np.isfinite(query.uns["transferred"]["thresholds"]).all()
    far = cells(np.random.default_rng(2), [40], {"d": (8, 8)}, prefix="far")
    assert transfer(few, far)["out_of_reference"].mean() > 0.9


def test_a_single_label_is_certain_and_can_be_out_of_reach(reference, query):
    only = reference[reference.obs["type"] == "a"].copy()
    table = transfer(only, query)
    assert (table["label"] == "a").all()
    assert (table["probability"] == 1).all()
    assert table["out_of_reference"][(query.obs["type"] == "b").to_numpy()].mean() > 0.9


def test_a_single_cell_will_do(reference, query):
    table = transfer(reference[:1].copy(), query)
    assert (table["label"] == "a").all()


def test_thresholds_come_from_the_cells_that_the_model_has_not_seen():
    """Cells that it has seen lie further apart; of others, those near their label would all be in its set."""
    rng = np.random.default_rng(2)
    seen, unseen = cells(rng, [300, 300, 300], CENTRES), cells(rng, [200, 200, 200], CENTRES, prefix="unseen")
    query = cells(rng, [300, 300, 300], CENTRES, prefix="new")
    centres = np.array([CENTRES[name] for name in seen.obs["type"]])
    seen.obsm["z"][:, :2] = centres + 2 * (seen.obsm["z"][:, :2] - centres)
    reference = anndata.concat([seen, unseen])
    reference.obs["unseen"] = np.arange(1500) >= 900

    def coverage(**options):
        table = transfer(reference, query, **options)
        own = list(query.obs["transferred"].cat.categories)
        in_set = query.obsm["transferred_set"][np.arange(900), [own.index(name) for name in query.obs["type"]]]
        assert len(table) == 900
        return in_set.mean()

    assert coverage() > 0.95
    assert coverage(unseen_key="unseen") == pytest.approx(0.9, abs=0.04)
    assert query.uns["transferred"]["params"]["unseen_key"] == "unseen"


def test_so_many_cells_of_a_label_are_looked_at_and_folds_are_even(monkeypatch):
    monkeypatch.setattr("scvae.tl.transfer._MOST", 50)
    codes = np.repeat([0, 1], [500, 20])
    rows, kept = _at_most(np.arange(520), codes, np.random.default_rng(0))
    assert np.bincount(kept).tolist() == [50, 20]
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(codes[rows], kept)
    assert 100 < rows[:50].mean() < 400  # not the first ones
    fold = _folds(kept, np.random.default_rng(0))
    assert pd.crosstab(kept, fold).to_numpy().tolist() == [[3] * 10 + [2] * 10, [1] * 20]


# ---- With a model ------------------------------------------------------------------------------------------


def test_labels_are_carried_over_to_a_batch_that_was_mapped():
    adata = scvae.datasets.simulated_batches(n_cells=600, n_genes=60, n_types=3, n_batches=3, library_size=300, seed=0)
    is_new = (adata.obs["batch"] == "batch_2").to_numpy()
    reference, query = adata[~is_new].copy(), adata[is_new].copy()
    model = scvae.fit(reference, batch_key="batch", n_latent=4, n_hidden=32, max_epochs=40, progress=False)
    extended = model.extend(query, progress=False)
    for which, how in ((extended, {}), (model, {"unknown_batch": "marginal"})):
        table = scvae.tl.transfer_labels(which, reference, query, "cell_type", **how)
        assert (table["label"].astype(str) == query.obs["cell_type"].astype(str)).mean() > 0.8  # of 60 genes


# ---- What is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"labels_key": "kind"}, KeyError, "reference.obs has no column 'kind'; it has 'type'"),
        ({"unseen_key": "unseen"}, KeyError, "reference.obs has no column 'unseen'; it has 'type'"),
        (
            {"unseen_key": "type"},
            ValueError,
            "unseen_key='type' names a column of .* in reference.obs: it has to be true",
        ),
        ({"coverage": 1.0}, ValueError, "coverage is a number above 0 and below 1, not 1.0"),
        ({"coverage": 0}, ValueError, "coverage is a number above 0 and below 1, not 0"),
        ({"seed": -1}, ValueError, "seed is a whole number from 0"),
        ({"key_added": "type"}, ValueError, r"key_added='type' would overwrite query.obs\['type'\], which no earlier"),
        ({"key_added": ""}, ValueError, "key_added is empty"),
    ],
)
def test_what_is_not_an_option_is_refused(reference, query, unchanged, options, error, message):
    options = {"labels_key": "type", **options}
    with unchanged(query), pytest.raises(error, match=message):
        scvae.tl.transfer_labels(Latent(), reference, query, **options)


def test_what_a_user_has_under_a_name_is_not_overwritten(reference, query, unchanged):
    query.obs["transferred_score"] = 1.0
    with unchanged(query), pytest.raises(ValueError, match=r"would overwrite query.obs\['transferred_score'\]"):
        transfer(reference, query)


@pytest.mark.parametrize("which", ["reference", "query"])
def test_a_message_about_cells_says_which_of_the_two_they_are(fit, which):
    adata = scvae.datasets.simulated_batches(n_cells=40, n_genes=10, n_types=2, seed=0)
    model = fit(adata.copy())
    pair = {"reference": adata.copy(), "query": adata.copy()}

    def said(error, message):
        with pytest.raises(error, match=message):
            scvae.tl.transfer_labels(model, pair["reference"], pair["query"], "cell_type")

    pair[which].X = adata.X * 0.5
    said(ValueError, rf"^{which}\.X holds values that are not whole")
    pair[which] = adata[:, 1:].copy()
    said(ValueError, rf"^The {which} lacks 1 gene")
    pair[which] = "cells.h5ad"
    said(TypeError, rf"^{which} is an AnnData, not a str")


def test_a_reference_without_labels_is_refused(reference, query, unchanged):
    reference.obs["type"] = np.nan
    with unchanged(query), pytest.raises(ValueError, match=r"reference.obs\['type'\] is missing \(NaN\) in all cells"):
        transfer(reference, query)


def test_a_reference_without_a_cell_that_was_not_seen_is_refused(reference, query, unchanged):
    reference.obs["unseen"] = False
    with (
        unchanged(query),
        pytest.raises(ValueError, match=r"reference.obs\['unseen'\] is true of no cell with a label"),
    ):
        transfer(reference, query, unseen_key="unseen")


def test_false_flags_are_within_chance(reference):
    """A mistake in the folds would show as far too many or too few."""
    rng = np.random.default_rng(5)
    query = cells(rng, [300, 300, 300], CENTRES, prefix="new")
    n_out = int(transfer(reference, query)["out_of_reference"].sum())
    assert binom(900, 0.03).ppf(0.001) < n_out < binom(900, 0.17).ppf(0.999)
