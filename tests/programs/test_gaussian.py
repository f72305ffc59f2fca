"""The Gaussian program: what it reads, its likelihood and noise, and its linear case beside the closed form."""

import functools
import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import torch
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse, stats
from scipy.linalg import subspace_angles

import scvae
from scvae.data.cells import Schema
from scvae.data.reading import read_cells, read_schema
from scvae.inference import evidence
from scvae.modules.decoders import RealDecoder
from scvae.programs import Gaussian


@functools.cache
def _real():
    """80 cells of two batches, 12 features of negative and positive values, a tenth of them zero."""
    rng = np.random.default_rng(0)
    batch = np.arange(80) % 2
    x = rng.normal(size=(80, 2)) @ rng.normal(size=(2, 12)) + rng.normal(size=(2, 12))[batch]
    x = (x + 0.5 * rng.normal(size=x.shape)) * rng.uniform(0.5, 2, 12)
    x[rng.random(x.shape) < 0.1] = 0
    adata = AnnData(x.astype(np.float32))
    adata.obs_names = [f"cell_{i}" for i in range(80)]
    adata.var_names = [f"gene_{i}" for i in range(12)]
    adata.obs["batch"] = pd.Categorical([f"batch_{k}" for k in batch])
    return adata


@pytest.fixture
def real():
    return _real().copy()


@pytest.fixture
def fit(fit):
    return functools.partial(fit, program="gaussian")


# ---- What it reads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("cast", [sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array, np.asarray])
def test_any_matrix_of_real_numbers_is_read_as_the_same_numbers(real, fit, cast, dtype):
    real.X = real.X.astype(np.float16).astype(np.float32)  # numbers that all these types hold
    expected = fit(real).embed(real)
    if dtype == np.float16 and cast is not np.asarray:
        pytest.skip("scipy has no sparse matrix of half precision")
    cells = AnnData(cast(real.X.astype(dtype)), obs=real.obs, var=real.var)
    assert np.array_equal(fit(cells).embed(cells), expected)


def test_integers_and_layers_are_read_too(real, fit):
    real.layers["whole"] = np.rint(real.X).astype(np.int64)
    model = fit(real, layer="whole")
    assert np.isfinite(model.elbo(real)).all()
    assert (real.layers["whole"] < 0).any()
    new = model.generate(5)
    assert np.array_equal(new.layers["whole"], new.X)
    assert np.isfinite(model.embed(new)).all()


def test_values_are_those_of_the_matrix(real):
    cells = read_cells(real, read_schema(real, kind="real"))
    assert np.array_equal(cells.batch(torch.arange(80)).values, real.X)
    mean, variance = cells.summary.moments()
    assert np.allclose(mean, real.X.mean(0), atol=1e-6)
    assert np.allclose(variance, real.X.var(0), rtol=1e-5)
    by_batch = read_cells(real, read_schema(real, kind="real", batch_key="batch")).summary
    for k, name in enumerate(real.obs["batch"].cat.categories):
        assert np.allclose(by_batch.moments(k)[1], real.X[real.obs["batch"] == name].var(0), rtol=1e-5)


def test_log_normalised_counts_are_fitted(adata, fit):
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    model = fit(adata, batch_key="batch")
    assert np.isfinite(model.elbo(adata)).all()
    assert model.denoise(adata).shape == adata.shape


def test_a_cell_of_zeros_is_a_cell_like_others(real, fit):
    real.X[3] = 0
    assert np.isfinite(fit(real).elbo(real)).all()


@pytest.mark.parametrize("cast", [sparse.csr_matrix, np.asarray], ids=["csr", "dense"])
def test_values_that_are_missing_are_named(real, fit, unchanged, cast):
    real.X[3, 5] = np.nan
    real.X[7, 2] = np.inf
    real.X = cast(real.X)
    message = r"adata.X holds NaN or infinite values, 2 of them, the first: nan in cell 'cell_3', gene 'gene_5'; inf in"
    with unchanged(real), pytest.raises(ValueError, match=message) as caught:
        fit(real)
    assert str(caught.value).endswith("Fill them in, or leave those cells out.")


# ---- An entry of .obsm -------------------------------------------------------------------------------------


def as_array(real):
    return real.X.copy(), [f"protein_{i}" for i in range(12)]


def as_frame(real):
    names = [f"CD{i}" for i in range(12)]
    return pd.DataFrame(real.X, index=real.obs_names, columns=names), names


def as_frame_of_numbered_columns(real):
    return pd.DataFrame(real.X, index=real.obs_names), [str(i) for i in range(12)]


def as_sparse(real):
    return sparse.csr_matrix(real.X), [f"protein_{i}" for i in range(12)]


@pytest.mark.parametrize("form", [as_array, as_frame, as_frame_of_numbered_columns, as_sparse])
def test_an_entry_of_obsm_is_modelled_in_place_of_the_genes(real, fit, form, tmp_path):
    values, names = form(real)
    expected = fit(real.copy(), batch_key="batch")
    cells = AnnData(np.ones((80, 3)), obs=real.obs, obsm={"protein": values})
    model = fit(cells, use_rep="protein", batch_key="batch")
    assert list(model.program.schema.genes) == names
    assert np.array_equal(cells.obsm["X_scvae"], expected.embed(real))
    model.save(tmp_path / "model")
    loaded = scvae.load(tmp_path / "model")
    assert np.array_equal(loaded.embed(cells[::-1]), expected.embed(real[::-1]))
    assert np.array_equal(loaded.denoise(cells, genes=names[3]), expected.denoise(real, genes="gene_3"))
    new = loaded.generate(6, batch="batch_0")
    assert list(new.var_names) == names
    assert new.obsm["protein"].shape == (6, 12)
    assert np.array_equal(loaded.embed(new), expected.embed(expected.generate(6, batch="batch_0")))
    with pytest.raises(ValueError, match=r"layer_added is for genes; the model reads adata.obsm\['protein'\]"):
        loaded.denoise(cells, layer_added="denoised")


def test_columns_of_a_table_are_matched_by_name(real, fit):
    frame, names = as_frame(real)
    cells = AnnData(np.ones((80, 3)), obs=real.obs, obsm={"protein": frame})
    model = fit(cells, use_rep="protein")
    cells.obsm["protein"] = frame[names[::-1]].assign(other=1.0)
    assert np.array_equal(model.embed(cells), cells.obsm["X_scvae"])
    cells.obsm["protein"] = frame[names[2:]]
    with pytest.raises(ValueError, match=r"lacks 2 genes \('CD0', 'CD1'\) of the 12"):
        model.embed(cells)
    assert np.isfinite(model.embed(cells, missing_genes="zero")).all()


def test_an_array_of_another_width_lacks_columns(real, fit):
    real.obsm["X_pca"] = real.X[:, :5]
    model = fit(real, use_rep="X_pca")
    real.obsm["X_pca"] = real.X[:, :3]
    with pytest.raises(ValueError, match=r"lacks 2 genes \('X_pca_3', 'X_pca_4'\) of the 5"):
        model.embed(real)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (None, KeyError, "adata.obsm has no 'rep'; it has none"),
        (
            np.ones((80, 2, 3)),
            ValueError,
            r"adata.obsm\['rep'\] is of shape \(80, 2, 3\): a table of cells by features",
        ),
        (np.ones((80, 0)), ValueError, r"adata.obsm\['rep'\] has no columns"),
        (pd.DataFrame({"a": ["x"] * 80}), ValueError, r"adata.obsm\['rep'\] is not numeric"),
        (pd.DataFrame([[1.0, 2]] * 80, columns=["a", "a"]), ValueError, r"adata.obsm\['rep'\] has repeats, 'a'"),
        (np.where(np.eye(80, 3) > 0, np.nan, 1), ValueError, r"obsm\['rep'\] holds NaN .* cell 'cell_0', gene 'rep_0'"),
    ],
)
def test_an_entry_of_obsm_that_cannot_be_modelled_is_refused(real, fit, unchanged, values, error, message):
    if values is not None:
        real.obsm["rep"] = values.set_index(real.obs_names) if isinstance(values, pd.DataFrame) else values
    with unchanged(real), pytest.raises(error, match=message):
        fit(real, use_rep="rep")


def test_counts_in_an_entry_of_obsm_are_for_the_programs_of_counts(adata):
    adata.obsm["panel"] = adata.X.toarray()[:, :10] + 1
    model = scvae.fit(adata, use_rep="panel", max_epochs=2, progress=False)
    new = model.generate(7)
    assert np.array_equal(new.obsm["panel"], new.X.toarray())


# ---- Batches -----------------------------------------------------------------------------------------------


def test_what_a_batch_does_is_left_out_of_the_latent_space():
    rng = np.random.default_rng(0)
    batch = np.arange(300) % 2
    z = rng.normal(size=(300, 2))
    shift = 3 * rng.normal(size=(2, 20))
    x = z @ rng.normal(size=(2, 20)) + shift[batch] + 0.5 * rng.normal(size=(300, 20))
    adata = AnnData(x.astype(np.float32), obs=pd.DataFrame({"batch": batch.astype(str)}, index=map(str, range(300))))
    explained = {}
    for key in (None, "batch"):
        model = scvae.fit(adata, "gaussian", batch_key=key, n_latent=3, max_epochs=80, progress=False)
        latent = adata.obsm["X_scvae"]
        distance = latent[batch == 0].mean(0) - latent[batch == 1].mean(0)
        explained[key] = np.linalg.norm(distance) / np.linalg.norm(latent.std(0))
    assert explained["batch"] < 0.2 < 1 < explained[None]
    as_of = [model.denoise(adata, batch=name).mean(0) for name in ("0", "1")]
    assert np.corrcoef(as_of[1] - as_of[0], shift[1] - shift[0])[0, 1] > 0.97


def test_the_decoder_starts_at_the_mean_of_each_batch(real):
    cells = read_cells(real, read_schema(real, kind="real", batch_key="batch"))
    program = Gaussian(cells.schema, n_latent=2, n_hidden=8).eval()
    program.initialise(cells)
    with torch.no_grad():
        mean = program.decode(torch.zeros(80, 2), cells.batch(torch.arange(80))).numpy()
    for k in (0, 1):
        rows = np.arange(80) % 2 == k
        assert np.allclose(mean[rows], real.X[rows].mean(0), atol=0.3 * real.X.std(0).max())
        assert np.corrcoef(mean[rows][0], real.X[rows].mean(0))[0, 1] > 0.95


# ---- Likelihood and noise ----------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["gene", "shared", "fixed"])
def test_the_reconstruction_term_is_the_whole_log_density(real, fit, noise):
    """With the constant, in the units of the data."""
    options = {"noise_scale": 0.7} if noise == "fixed" else {}
    model = fit(real, noise=noise, **options)
    cells = read_cells(real, model.program.schema)
    batch = cells.batch(torch.arange(80))
    sigma = model.program.decoder.sigma().detach().double().numpy()
    assert sigma.shape == ((12,) if noise == "gene" else (1,))
    if noise == "fixed":
        assert sigma == pytest.approx(0.7)
    with torch.no_grad():
        torch.manual_seed(0)
        z = evidence._traces(model.program, batch)[0].nodes["z"]["value"]
        loc = model.program.decode(z, batch).double().numpy()
        torch.manual_seed(0)
        log_likelihood, _ = evidence.elbo_terms(model.program, batch)
    expected = stats.norm.logpdf(real.X, loc, sigma).sum(1)
    assert np.allclose(log_likelihood["x"], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("noise", ["gene", "shared"])
def test_noise_that_is_learnt_approaches_that_of_the_data(noise):
    rng = np.random.default_rng(1)
    true = np.array([0.3, 0.6, 1.2] * 6) if noise == "gene" else np.full(18, 0.6)
    x = rng.normal(size=(600, 2)) @ rng.normal(size=(2, 18)) + true * rng.normal(size=(600, 18))
    options = {"n_latent": 2, "n_hidden": 0, "max_epochs": 150, "kl_level": 1.0}
    model = scvae.fit(AnnData(x.astype(np.float32)), "gaussian", noise=noise, progress=False, **options)
    assert np.allclose(model.program.decoder.sigma().detach(), true if noise == "gene" else 0.6, rtol=0.15)


def test_noise_that_is_fixed_stays(real, fit):
    model = fit(real, noise="fixed", noise_scale=0.3, max_epochs=10)
    assert model.program.decoder.sigma().item() == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": "cell"}, "noise is one of 'gene', 'shared', 'fixed', not 'cell'"),
        ({"noise": "fixed"}, "noise='fixed' and noise_scale=…, its standard deviation, go together: give both or nei"),
        ({"noise_scale": 1.0}, "go together"),
        ({"noise": "fixed", "noise_scale": 0.0}, "noise_scale is a number above 0, or None, not 0.0"),
        ({"noise": "fixed", "noise_scale": -1}, "noise_scale is a number above 0, or None, not -1"),
        ({"noise": "fixed", "noise_scale": float("nan")}, "noise_scale is a number above 0, or None, not nan"),
    ],
)
def test_noise_that_makes_no_sense_is_refused(real, fit, unchanged, options, message):
    with unchanged(real), pytest.raises(ValueError, match=message):
        fit(real, **options)


@pytest.mark.parametrize("noise", ["gene", "shared"])
def test_a_constant_gene_does_no_harm(real, fit, noise):
    expected = fit(real, noise=noise, max_epochs=10).elbo(real).mean() / 12
    for value in (0, 3.3, -1e4):
        cells = real.copy()
        cells.X[:, 4] = value
        model = fit(cells, noise=noise, max_epochs=10)
        assert np.isfinite(model.elbo(cells)).all()
        assert abs(model.elbo(cells).mean() / 12 - expected) < 1
        assert np.allclose(model.denoise(cells)[:, 4], value, atol=0.1)
        before = model.embed(cells)
        cells.X[:, 4] += 0.5  # in other cells it may vary
        assert np.isfinite(model.elbo(cells)).all()
        assert np.abs(model.embed(cells) - before).max() < 1


def test_a_matrix_that_does_not_vary_at_all_is_fitted(fit):
    cells = AnnData(np.full((40, 5), 2.5, dtype=np.float32))
    assert np.isfinite(fit(cells).elbo(cells)).all()


def test_a_gene_that_outweighs_all_others_is_fitted(fit):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 12_000)).astype(np.float32)
    x[:, 0] *= 1e5
    cells = AnnData(x)
    model = fit(cells)
    assert np.isfinite(model.elbo(cells)).all()
    assert model.program.decoder.sigma()[0].item() == pytest.approx(x[:, 0].std(), rel=0.1)


def decoder_of(x, **options):
    adata = AnnData(x)
    cells = read_cells(adata, read_schema(adata, kind="real"))
    decoder = RealDecoder(cells.schema, 2, 4, 1, **{"noise": "gene", "noise_scale": None, **options})
    decoder.start(cells)
    return decoder


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    n_genes=st.integers(1, 30),
    log_unit=st.floats(-3, 5),
    spread=st.floats(0, 3),
    noise=st.sampled_from(["gene", "shared"]),
)
def test_the_noise_starts_at_the_size_of_what_there_is(seed, n_genes, log_unit, spread, noise):
    rng = np.random.default_rng(seed)
    x = 10**log_unit * rng.normal(size=(50, n_genes)) * np.exp(spread * rng.normal(size=n_genes))
    decoder = decoder_of(x, noise=noise)
    expected = x.std(0) if noise == "gene" else np.sqrt(x.var(0).mean())
    unit = np.sqrt(x.var(0).mean())
    assert np.allclose(decoder.sigma().detach(), expected + 1e-3 * unit, rtol=2e-3, atol=2e-3 * unit)
    values = decoder.standardised(torch.tensor(x, dtype=torch.float32)).double().numpy()
    varies = x.std(0) > 3e-3 * unit
    assert np.allclose(values.mean(0), 0, atol=1e-3)
    assert np.allclose(values.std(0)[varies], 1, rtol=1e-3)


@pytest.mark.parametrize("noise", ["gene", "shared"])
def test_the_units_of_the_data_only_shift_the_evidence(real, fit, noise):
    models = {}
    for factor in (1, 1024):  # which rounds nothing
        cells = real.copy()
        cells.X = real.X * factor
        models[factor] = (fit(cells, noise=noise, batch_key="batch"), cells)
    (one, cells), (other, scaled) = models.values()
    assert np.allclose(one.embed(cells), other.embed(scaled), atol=1e-3)
    assert np.allclose(1024 * one.denoise(cells), other.denoise(scaled), rtol=1e-3, atol=1)
    assert np.allclose(one.elbo(cells) - 12 * np.log(1024), other.elbo(scaled), atol=0.05)


def test_covariates_go_into_the_encoder_only_if_so_asked_for(real, fit):
    other = real.copy()
    other.obs["batch"] = np.roll(real.obs["batch"], 1)
    for n_hidden in (0, 8):
        for encode_covariates in (False, True):
            model = fit(real, batch_key="batch", n_hidden=n_hidden, encode_covariates=encode_covariates)
            assert np.allclose(model.embed(other), model.embed(real), atol=1e-6) != encode_covariates


# ---- Its linear case: probabilistic principal component analysis ---------------------------------------------


def closed_form(x, d):
    """Log likelihood a cell at its maximum, W and sigma (Tipping and Bishop 1999, equations 4, 7 and 8)."""
    n_genes = x.shape[1]
    values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
    values, vectors = values[::-1], vectors[:, ::-1]
    variance = values[d:].mean()
    w = vectors[:, :d] * np.sqrt(values[:d] - variance)
    log_det = np.log(values[:d]).sum() + (n_genes - d) * np.log(variance)
    return -(n_genes * np.log(2 * np.pi) + log_det + n_genes) / 2, w, np.sqrt(variance)


def simulated():
    rng = np.random.default_rng(0)
    z, loadings = rng.normal(size=(1000, 3)), rng.normal(size=(30, 3)) * [3, 2, 1]
    return (z @ loadings.T + 5 * rng.normal(size=30) + 0.7 * rng.normal(size=(1000, 30))).astype(np.float32)


@functools.cache
def blood_cells():
    """Log-normalised real cells: the 200 most variable genes, and 50 principal components of all."""
    adata = scvae.datasets.pbmc68k()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sc.pp.normalize_total(adata, target_sum=1e4)
        sc.pp.log1p(adata)
        sc.pp.pca(adata, n_comps=50)
    x = adata.X.toarray()
    return x[:, np.argsort(-x.var(0))[:200]], adata.obsm["X_pca"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("x", "d", "options"),
    [
        # A posterior a tenth as wide as the noise, and correlated, takes a family that can be.
        (simulated, 3, {"posterior": "full", "learning_rate": 0.03}),
        (simulated, 3, {"posterior": "iaf"}),  # with longer steps some seeds end elsewhere, on some processors
        (lambda: blood_cells()[0], 5, {}),
        (lambda: blood_cells()[1], 5, {}),
    ],
    ids=["simulated", "simulated, IAF", "genes", "principal components"],
)
def test_the_linear_program_is_probabilistic_pca(x, d, options):
    x = x()
    log_likelihood, w, sigma = closed_form(x.astype(np.float64), d)
    adata = AnnData(x)
    model = scvae.fit(
        adata, "gaussian", n_latent=d, n_hidden=0, noise="shared", batch_size=128, progress=False, **options
    )
    reached = model.log_likelihood(adata, n_samples=256).mean()
    assert reached == pytest.approx(log_likelihood, rel=0.005)
    assert model.elbo(adata, n_samples=8).mean() < log_likelihood
    decoder = model.program.decoder
    loadings = (decoder.scale.unsqueeze(1) * decoder.f.main.weight).detach().double().numpy()
    assert np.degrees(subspace_angles(loadings, w)).max() < 5
    assert decoder.sigma().item() == pytest.approx(sigma, rel=0.02)


def test_the_evidence_of_the_linear_program_at_the_closed_form_is_the_closed_form():
    """In the units of the data, although the decoder answers for standardised values."""
    x = simulated()
    log_likelihood, w, sigma = closed_form(x.astype(np.float64), 3)
    adata = AnnData(x)
    cells = read_cells(adata, read_schema(adata, kind="real"))
    program = Gaussian(cells.schema, n_latent=3, n_hidden=0, noise="shared", posterior="full").eval()
    program.initialise(cells)
    decoder, q_z = program.decoder, program.q_z
    precision = w.T @ w + sigma**2 * np.eye(3)
    tril = sigma * np.linalg.cholesky(np.linalg.inv(precision))
    with torch.no_grad():
        for parameter in program.parameters():
            parameter.zero_()
        decoder.f.main.weight.copy_(torch.tensor(w) / decoder.scale.unsqueeze(1))
        decoder.raw_noise.copy_(torch.tensor(np.log(np.expm1(sigma / decoder.unit.item() - 1e-3))))
        q_z.loc.weight.copy_(torch.tensor(np.linalg.solve(precision, w.T)) * decoder.scale)
        q_z.scale.bias.copy_(torch.tensor(np.log(np.expm1(np.diag(tril) - 1e-4))))
        q_z.off_diagonal.bias.copy_(torch.tensor(tril[np.tril_indices(3, -1)]))
        batch = cells.batch(torch.arange(len(cells)))
        torch.manual_seed(0)
        assert evidence.importance_weighted(program, batch, 2).mean().item() == pytest.approx(log_likelihood, abs=1e-3)
        assert evidence.elbo(program, batch, 200).mean().item() == pytest.approx(log_likelihood, abs=0.02)


def test_training_leaves_the_weights_of_a_linear_decoder_unshrunk(real):
    schema = Schema(tuple(map(str, range(12))), kind="real")
    assert Gaussian(schema, n_hidden=0).decayed() == []
    program = Gaussian(schema, n_layers=1)
    names = {id(p): name for name, p in program.named_parameters()}
    decayed = {names[id(p)] for p in program.decayed()}
    assert decayed == {"decoder.layers.linear.0.main.weight", "decoder.layers.norm.0.weight", "decoder.f.main.weight"}


def test_what_it_wrote_survives_the_file(real, fit, tmp_path):
    fit(real, batch_key="batch", prior="mixture", n_components=3)
    real.write_h5ad(tmp_path / "cells.h5ad")
    read = anndata.read_h5ad(tmp_path / "cells.h5ad")
    assert np.array_equal(read.obsm["X_scvae"], real.obsm["X_scvae"])
    assert read.uns["scvae"]["program"] == "gaussian"
