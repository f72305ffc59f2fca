"""Genes that were not measured: out of the likelihood, and shown to the encoder as what is expected of them."""

import numpy as np
import pytest
import torch

import scvae
from scvae.data.cells import Batch, Schema
from scvae.distributions import NegativeBinomial, Poisson, SparseCounts, ZeroInflatedNegativeBinomial
from scvae.modules.decoders import CountDecoder, RealDecoder

GENES = [f"g{i}" for i in range(6)]
MISSING = torch.tensor([False, True, False, False, True, False])


def cells_of(counts, missing=MISSING):
    n = len(counts)
    zero = torch.zeros(n, dtype=torch.int64)
    return Batch(SparseCounts.from_dense(counts), counts.sum(1), zero, torch.zeros(n, 0), missing=missing)


@pytest.mark.parametrize(
    ("likelihood", "family"),
    [("zinb", ZeroInflatedNegativeBinomial), ("nb", NegativeBinomial), ("poisson", Poisson)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["kernel", "torch"])
def test_the_likelihood_is_that_of_the_genes_that_were_measured(likelihood, family, dtype):
    torch.manual_seed(0)
    decoder = CountDecoder(Schema(tuple(GENES)), 2, 5, 1, likelihood, "gene").to(dtype).eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    counts = torch.poisson(torch.full((4, 6), 2.0, dtype=dtype)) * ~MISSING
    z, batch = torch.randn(4, 2, dtype=dtype), cells_of(counts)
    log_prob = decoder(z, batch.library_size, batch).log_prob(batch.counts)

    h, kept = decoder.layers(z, None), ~MISSING
    own = {"log_mean": decoder.w(h, None)[:, kept], "log_total": batch.library_size.log()}
    if likelihood != "poisson":
        own["inverse_dispersion"] = decoder.log_theta.exp()[:, kept]
    if likelihood == "zinb":
        own["gate_logits"] = decoder.pi(h, None)[:, kept]
    expected = family(**own).log_prob(counts[:, kept])
    torch.testing.assert_close(log_prob, expected, rtol=1e-5, atol=1e-5)

    slopes, wanted = (
        torch.autograd.grad(x.sum(), decoder.w.main.weight, retain_graph=True)[0] for x in (log_prob, expected)
    )
    torch.testing.assert_close(slopes, wanted, rtol=1e-4, atol=1e-4)
    assert (slopes[MISSING] == 0).all()


def test_the_likelihood_of_real_numbers_leaves_them_out():
    torch.manual_seed(0)
    decoder = RealDecoder(Schema(tuple(GENES), kind="real"), 2, 5, 1, "gene", None).eval()
    z, x, batch = torch.randn(4, 2), torch.randn(4, 6), cells_of(torch.ones(4, 6))
    of_each = torch.distributions.Normal(decoder.loc(z, batch), decoder.sigma()).log_prob(x)
    torch.testing.assert_close(decoder(z, batch).log_prob(x), of_each[:, ~MISSING].sum(-1))


@pytest.fixture(scope="module")
def trained():
    """Cells of 150 genes, those of them that a panel of 100 has, and a model that tells the types apart."""
    adata = scvae.datasets.simulated_batches(
        n_cells=600, n_genes=150, n_types=4, n_batches=2, library_size=500, type_scale=1, seed=0
    )
    model = scvae.fit(adata, batch_key="batch", n_latent=4, n_hidden=32, max_epochs=60, progress=False)
    return adata, adata[:, :100].copy(), model


def test_the_encoder_is_shown_what_is_expected_given_what_was_measured(trained):
    adata, fewer, model = trained
    batch = model._cells(fewer, missing_genes="impute").batch(torch.arange(len(fewer)))
    shown = batch.shown.dense().numpy()
    np.testing.assert_array_equal(shown[:, :100], fewer.X.toarray())
    np.testing.assert_array_equal(batch.values[:, 100:], 0)  # what was counted
    full = adata.copy()
    full.X = shown
    model.program.schema.__dict__["check_counts"] = False
    rho = model.denoise(full)
    model.program.schema.__dict__["check_counts"] = True
    expected = rho * (fewer.X.sum(1).A1 / rho[:, :100].sum(1))[:, None]
    assert np.abs(shown - expected)[:, 100:].mean() < 0.1 * expected[:, 100:].mean()  # once more changes little
    truth = adata.X[:, 100:].toarray()
    mean = truth.mean(0) * adata.X.sum(1).A1[:, None] / adata.X.sum(1).mean()
    assert np.square(shown[:, 100:] - truth).mean() < 0.8 * np.square(mean - truth).mean()


def test_cells_lie_nearer_to_where_all_genes_put_them(trained):
    adata, fewer, model = trained
    whole = model.embed(adata)
    imputed, zero = (
        np.linalg.norm(model.embed(fewer, missing_genes=m) - whole, axis=1).mean() for m in ("impute", "zero")
    )
    assert imputed < 0.85 * zero


def test_the_expression_of_what_is_missing_is_inferred(trained):
    adata, fewer, model = trained
    denoised = model.denoise(fewer, missing_genes="impute")
    assert np.allclose(denoised.sum(1), 1, atol=1e-5)
    whole, mean = model.denoise(adata)[:, 100:], model.denoise(adata)[:, 100:].mean(0)
    error, spread = np.abs(denoised[:, 100:] - whole).mean(), np.abs(whole - mean).mean()
    assert error < 0.5 * spread


def test_where_no_gene_is_missing_nothing_is_imputed(trained):
    adata, _, model = trained
    np.testing.assert_array_equal(model.embed(adata, missing_genes="impute"), model.embed(adata))
    more = adata[:, ::-1].copy()
    np.testing.assert_array_equal(model.elbo(more, missing_genes="impute"), model.elbo(more))


def test_real_numbers_that_others_tell_are_filled_in(fit):
    rng = np.random.default_rng(0)
    adata = scvae.datasets.simulated_batches(n_cells=400, n_genes=24, seed=0)
    adata.X = (np.arange(24) + 3 * rng.normal(size=(400, 1)) @ rng.normal(size=(1, 24))).astype(np.float32)
    adata.X += 0.3 * rng.normal(size=adata.shape).astype(np.float32)
    model = fit(adata, program="gaussian", max_epochs=60, n_hidden=0)
    fewer = adata[:, :16].copy()
    shown = model._cells(fewer, missing_genes="impute").batch(torch.arange(400)).shown.dense().numpy()
    np.testing.assert_array_equal(shown[:, :16], fewer.X)
    error = np.square(shown[:, 16:] - adata.X[:, 16:]).mean()
    assert error < 0.2 * adata.X[:, 16:].var(0).mean()


@pytest.mark.parametrize(
    "options",
    [
        {"library": "observed"},
        {"size_factor_key": "size"},
        {"program": "vq"},
        {"program": "gaussian"},
        {"program": "vq_gaussian"},
        {"prior": "vamp", "n_components": 4},
    ],
)
def test_every_program_takes_cells_without_some_genes_and_learns_new_batches_from_them(adata, fit, options):
    model = fit(adata, batch_key="batch", **options)
    fewer = adata[:, :16].copy()
    fewer = fewer[fewer.X.sum(1).A1 > 0].copy()
    how = {"missing_genes": "impute"}
    for answer in (model.embed(fewer, **how), model.denoise(fewer, **how), model.elbo(fewer, **how)):
        assert np.isfinite(answer).all()
    assert np.isfinite(model.log_likelihood(fewer, n_samples=2, **how)).all()
    fewer.obs["batch"] = "new"
    extended = model.extend(fewer, max_steps=20, progress=False, **how)
    assert np.isfinite(extended.embed(fewer, **how)).all()
    np.testing.assert_allclose(extended.embed(adata), model.embed(adata), atol=1e-6)
    np.testing.assert_allclose(extended.denoise(adata), model.denoise(adata), atol=1e-6)


def test_size_factors_are_of_all_genes(adata, fit):
    model = fit(adata, size_factor_key="size", likelihood="poisson", prior="normal", max_epochs=10)
    fewer = adata[:, :16].copy()
    fewer = fewer[fewer.X.sum(1).A1 > 0].copy()
    cells = model._cells(fewer, missing_genes="impute").batch(torch.arange(len(fewer)))
    z = torch.zeros(len(fewer), 3)
    rho = model.program.decode(z, cells)
    l = model.program.library(cells)
    expected = Poisson(log_mean=(l[:, None] * rho[:, :16]).log()).log_prob(torch.from_numpy(fewer.X.toarray()))
    share = rho[:, :16].sum(1)
    torch.testing.assert_close(model.program.decoder(z, l * share, cells).log_prob(cells.counts), expected)
    # and that is what the model declares
    import pyro

    with torch.no_grad():
        trace = pyro.poutine.trace(pyro.poutine.condition(model.program.model, {"z": z})).get_trace(cells)
        trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], expected)


def test_expected_counts_of_all_genes_are_not_known(trained):
    _, fewer, model = trained
    with pytest.raises(ValueError, match="library_size='cell' is of all genes of the model, and not all were measured"):
        model.denoise(fewer, missing_genes="impute", library_size="cell")
