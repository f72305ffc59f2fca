"""What a fitted model answers: embedding, denoised expression, new cells, the bound and the evidence."""

import numpy as np
import pandas as pd
import pyro
import pytest
from scipy import sparse

import scvae
from scvae.programs import PROGRAMS


@pytest.mark.parametrize("name", ["embed", "denoise", "elbo", "log_likelihood"])
def test_shapes_are_documented(name):
    assert "``[n_cells" in getattr(scvae.Fitted, name).__doc__


def test_answers_have_the_shapes_that_are_documented(adata, model):
    assert model.embed(adata).shape == (80, 3)
    assert model.denoise(adata).shape == (80, 24)
    assert model.denoise(adata, genes=["gene_1", "gene_0"]).shape == (80, 2)
    assert model.elbo(adata).shape == (80,)
    assert model.log_likelihood(adata, n_samples=2).shape == (80,)
    assert model.embed(adata).dtype == model.denoise(adata).dtype == np.float32


def test_a_model_says_what_it_is(model):
    assert repr(model).splitlines()[0] == "Fitted 'zinb': 80 cells × 24 genes, 2 batches of 'batch'"
    assert "options: n_latent=3, n_hidden=8, " in repr(model)
    assert f"training: 6 of 6 steps in {model.course.seconds:.1f} s, finished" in repr(model)
    assert f"final ELBO: {model.history['elbo'].iloc[-1]:.1f} nats a cell" in repr(model)
    assert "device: cpu" in repr(model)
    assert repr(model).endswith("writes to: .obsm['X_scvae']")  # not that it did
    assert "<td style='text-align: left'>n_latent=3" in model._repr_html_()


# ---- Denoised expression -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_samples", [None, 3])
@pytest.mark.parametrize("batch", [None, "batch_1", ["batch_0", "batch_1"]])
def test_denoised_fractions_sum_to_one(adata, model, batch, n_samples):
    fractions = model.denoise(adata, batch=batch, n_samples=n_samples)
    assert (fractions > 0).all()
    assert np.allclose(fractions.sum(1), 1, atol=1e-5)
    assert np.allclose(
        model.denoise(adata, batch=batch, n_samples=n_samples, library_size=1e4), 1e4 * fractions, rtol=1e-5
    )


def test_cells_are_decoded_as_of_their_own_batch_or_of_another(adata, model):
    own = model.denoise(adata)
    as_of = {batch: model.denoise(adata, batch=batch) for batch in ("batch_0", "batch_1")}
    is_first = (adata.obs["batch"] == "batch_0").to_numpy()[:, None]
    assert np.allclose(own, np.where(is_first, as_of["batch_0"], as_of["batch_1"]), rtol=1e-5)
    assert not np.allclose(as_of["batch_0"], as_of["batch_1"], rtol=1e-2)
    both = model.denoise(adata, batch=["batch_0", "batch_1"])
    assert np.allclose(both, (as_of["batch_0"] + as_of["batch_1"]) / 2, rtol=1e-5)


def test_a_batch_whose_name_is_a_number_may_be_named_by_it(adata, fit):
    adata.obs["plate"] = [1, 2] * 40
    model = fit(adata, batch_key="plate")
    assert np.array_equal(model.denoise(adata, batch=2), model.denoise(adata, batch="2"))
    assert np.array_equal(model.denoise(adata, batch=[1, 2]), model.denoise(adata, batch=["1", "2"]))


def test_genes_come_in_the_order_asked_for(adata, model):
    everything = pd.DataFrame(model.denoise(adata), columns=adata.var_names)
    wanted = ["gene_9", "gene_2", "gene_9"]
    for genes in (wanted, tuple(wanted), np.array(wanted), pd.Index(wanted)):
        assert np.array_equal(model.denoise(adata, genes=genes), everything[wanted])
    assert np.array_equal(model.denoise(adata, genes="gene_9"), everything[["gene_9"]])


def test_with_the_cells_own_library_size_it_is_expected_counts(adata, fit, model):
    observed = fit(adata, batch_key="batch", library="observed")
    assert np.allclose(observed.denoise(adata, library_size="cell").sum(1), adata.X.sum(1).A1, rtol=1e-5)
    fit(adata, batch_key="batch")
    assert np.allclose(model.denoise(adata, library_size="cell").sum(1), adata.obs["scvae_library"], rtol=1e-5)


def test_samples_are_averaged(adata, model):
    few, many = (
        np.stack([model.denoise(adata, n_samples=n, seed=seed) for seed in (1, 2)]).astype(np.float64) for n in (1, 64)
    )
    assert np.abs(many[0] - many[1]).mean() < 0.3 * np.abs(few[0] - few[1]).mean()


def test_the_result_is_written_to_a_layer_with_nan_where_there_is_none(adata, fit):
    adata.var["highly_variable"] = ~adata.var_names.isin(["gene_3", "gene_20"])
    model = fit(adata)
    modelled = adata.var["highly_variable"].to_numpy()
    result = model.denoise(adata, layer_added="denoised")
    assert np.array_equal(adata.layers["denoised"][:, modelled], result)
    assert np.isnan(adata.layers["denoised"][:, ~modelled]).all()
    some = model.denoise(adata, genes=["gene_5", "gene_0", "gene_5"], layer_added="some")
    assert np.array_equal(adata.layers["some"][:, [5, 0, 5]], some)
    assert np.isnan(adata.layers["some"]).sum() == 80 * 22
    reordered = adata[:, ::-1].copy()
    reordered.var_names = ["new" if name == "gene_1" else name for name in reordered.var_names]
    keep = reordered.X.sum(1).A1 > 0
    reordered = reordered[keep].copy()
    result = model.denoise(reordered, layer_added="denoised", missing_genes="zero")
    there = [name for name in model.program.schema.genes if name != "gene_1"]
    written = pd.DataFrame(reordered.layers["denoised"], columns=reordered.var_names)
    assert np.array_equal(written[there], pd.DataFrame(result, columns=model.program.schema.genes)[there])
    assert written[["new", "gene_3", "gene_20"]].isna().all(axis=None)


# ---- New cells ---------------------------------------------------------------------------------------------


def test_generated_cells_are_counts_of_the_genes_and_batches_of_the_model(adata, fit):
    model = fit(adata, batch_key="batch", prior="normal")
    new = model.generate(1500)
    assert new.shape == (1500, 24)
    assert isinstance(new.X, sparse.csr_matrix)
    assert new.var_names.tolist() == adata.var_names.tolist()
    assert (new.X.data > 0).all()
    assert (new.X.data == np.rint(new.X.data)).all()
    assert new.obsm["X_scvae"].shape == (1500, 3)
    assert np.allclose(new.obsm["X_scvae"].mean(0), 0, atol=0.15)
    assert np.allclose(new.obsm["X_scvae"].std(0), 1, atol=0.1)
    assert new.obs["batch"].cat.categories.tolist() == ["batch_0", "batch_1"]
    assert 600 < (new.obs["batch"] == "batch_0").sum() < 900
    assert set(model.generate(50, batch="batch_1").obs["batch"]) == {"batch_1"}


def test_generated_cells_have_the_library_sizes_of_their_batch(adata, fit):
    adata.obs["deep"] = pd.cut(adata.X.sum(1).A1, 2, labels=["no", "yes"])
    model = fit(adata, batch_key="deep")
    shallow, deep = (np.median(model.generate(300, batch=batch).X.sum(1).A1) for batch in ("no", "yes"))
    assert deep > 1.5 * shallow


def test_generated_cells_can_be_embedded(adata, model_of_all_covariates):
    new = model_of_all_covariates.generate(50)
    assert set(new.obs["donor"]) == {"ada", "bob", "eve"}
    assert np.allclose(new.obs["age"], adata.obs["age"].mean())
    new = new[new.X.sum(1).A1 > 0].copy()
    assert np.isfinite(model_of_all_covariates.embed(new)).all()


def test_a_model_without_covariates_generates_cells(adata, fit):
    new = fit(adata, key_added="X_here").generate(5)
    assert new.obs.empty
    assert list(new.obsm) == ["X_here"]


# ---- The bound and the evidence ----------------------------------------------------------------------------


def test_the_elbo_is_below_the_importance_weighted_likelihood(adata, model):
    elbo = model.elbo(adata, n_samples=32)
    tight, tighter = (model.log_likelihood(adata, n_samples=n).mean() for n in (4, 256))
    assert elbo.mean() < tight < tighter


def test_more_samples_steady_the_elbo(adata, model):
    few, many = (np.subtract(*(model.elbo(adata, n_samples=n, seed=seed) for seed in (1, 2))).std() for n in (1, 32))
    assert many < 0.5 * few


def test_the_guide_is_a_better_proposal_than_the_prior(adata, fit):
    model = fit(adata, batch_key="batch", library="observed", prior="normal", max_epochs=60, weight_decay=0)
    guide, prior = (model.log_likelihood(adata, n_samples=2, method=method) for method in ("importance", "prior"))
    assert prior.mean() < guide.mean()


# ---- A program of a user's own -----------------------------------------------------------------------------


def test_a_program_of_ones_own_is_fitted_saved_and_loaded(adata, poisson_factors, tmp_path):
    model = scvae.fit(adata, poisson_factors, n_latent=2, max_epochs=20, progress=False, spread=2.0)
    assert adata.obsm["X_scvae"].shape == (80, 2)
    assert "scvae_library" not in adata.obs
    assert adata.uns["scvae"]["program"] == "poisson_factors"
    untrained = scvae.fit(adata.copy(), poisson_factors, max_epochs=1, progress=False, learning_rate=1e-9)
    assert model.elbo(adata).mean() > untrained.elbo(adata).mean()
    assert model.generate(4).shape == (4, 24)
    assert np.allclose(model.denoise(adata, n_samples=2).sum(1), 1, atol=1e-5)
    assert np.allclose(model.denoise(adata, library_size="cell").sum(1), adata.X.sum(1).A1, rtol=1e-5)
    model.save(tmp_path / "model")
    loaded = scvae.load(tmp_path / "model", program=poisson_factors)
    assert isinstance(loaded.program, poisson_factors)
    assert loaded.program.options == {"n_latent": 2, "spread": 2.0}
    assert np.array_equal(loaded.embed(adata), model.embed(adata))


def test_a_program_of_ones_own_can_be_registered(adata, poisson_factors, monkeypatch, tmp_path):
    monkeypatch.setitem(PROGRAMS, "poisson_factors", poisson_factors)
    model = scvae.fit(adata, "poisson_factors", n_latent=2, max_epochs=1, progress=False)
    model.save(tmp_path / "model")
    assert np.array_equal(scvae.load(tmp_path / "model").embed(adata), model.embed(adata))


def test_a_guide_whose_divergence_has_no_closed_form_will_do(adata, poisson_factors):
    class HeavyTails(poisson_factors):
        def guide(self, batch):
            with pyro.plate("cells", len(batch)):
                pyro.sample("z", pyro.distributions.StudentT(8.0, *self.embed(batch)).to_event(1))

    start = scvae.fit(adata, HeavyTails, n_latent=2, max_epochs=1, progress=False, learning_rate=1e-9)
    model = scvae.fit(adata, HeavyTails, n_latent=2, max_epochs=30, progress=False)
    elbo = model.elbo(adata, n_samples=16).mean()
    assert start.elbo(adata, n_samples=16).mean() < elbo < model.log_likelihood(adata, n_samples=64).mean()


def test_its_unknown_options_are_answered_by_its_own(adata, poisson_factors):
    with pytest.raises(TypeError, match="Options of the program 'poisson_factors': n_latent, spread; of the training"):
        scvae.fit(adata, poisson_factors, n_hidden=3)


def test_its_own_type_errors_are_not_disguised(adata, poisson_factors):
    with pytest.raises(TypeError, match="(?s)^((?!Options).)*$"):
        scvae.fit(adata, poisson_factors, n_latent="two", progress=False)
