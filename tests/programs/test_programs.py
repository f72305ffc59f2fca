"""Every program with every posterior and prior: it is fitted, improves and answers; what makes no sense is refused."""

import re

import anndata
import numpy as np
import pandas as pd
import pytest

import scvae
from scvae.modules.posteriors import POSTERIORS
from scvae.modules.priors import PRIORS
from scvae.programs import PROGRAMS

#: The programs with a continuous latent vector, which take every posterior and prior.
PROGRAM_NAMES = ["zinb", "gaussian"]
COMBINATIONS = [
    (program, posterior, prior)
    for program in PROGRAM_NAMES
    for posterior in POSTERIORS
    for prior in PRIORS
    if not (prior == "vamp" and posterior.startswith("iaf"))
] + [("vq", None, None), ("vq_gaussian", None, None)]
#: Of them, those that tell what is wrong with one program, posterior or prior.
EACH_ONCE = [
    ("zinb", "normal", "mixture"),
    ("zinb", "full", "vamp"),
    ("gaussian", "low_rank", "mixture"),
    ("gaussian", "iaf", "normal"),
    ("zinb", "iaf_stable", "normal"),
    ("vq", None, None),
    ("vq_gaussian", None, None),
]


@pytest.fixture
def cells_for(adata):
    """``cells_for(program)``: the simulated cells as the program wants them, counts or real numbers."""

    def prepare(program):
        cells = adata.copy()
        if PROGRAMS[program].kind == "real":
            rng = np.random.default_rng(0)
            effect = rng.normal(size=(2, cells.n_vars))[cells.obs["batch"].cat.codes]
            signal = rng.normal(size=(80, 2)) @ rng.normal(size=(2, cells.n_vars))
            cells.X = (3 + 2 * signal + effect + rng.normal(size=cells.shape)).astype(np.float32)
        return cells

    return prepare


@pytest.fixture
def refused(fit, unchanged):
    """``refused(adata, error, message, **options)``: fit fails with that message and leaves the AnnData alone."""

    def check(adata, error, message, **options):
        with unchanged(adata), pytest.raises(error) as caught:
            fit(adata, **options)
        assert re.search(message, str(caught.value.args[0])), caught.value.args[0]

    return check


@pytest.mark.parametrize(
    ("program", "posterior", "prior"),
    [pytest.param(*each, marks=[] if each in EACH_ONCE else pytest.mark.slow) for each in COMBINATIONS],
)
def test_every_program_with_every_posterior_and_prior(cells_for, fit, program, posterior, prior, tmp_path):
    adata = cells_for(program)
    options = {"program": program, "batch_key": "batch"}
    if posterior is not None:
        options |= {"posterior": posterior, "prior": prior}
    if prior in ("mixture", "vamp"):
        options["n_components"] = 4
    start = fit(adata, max_epochs=1, learning_rate=1e-12, **options)
    model = fit(adata, max_epochs=20, learning_rate=0.03, **options)

    # It improves, and its bounds are in order.
    elbo = model.elbo(adata, n_samples=8)
    assert elbo.mean() > start.elbo(adata, n_samples=8).mean() + 1
    assert model.log_likelihood(adata, n_samples=32).mean() > elbo.mean() - 1e-3

    # It embeds.
    assert adata.obsm["X_scvae"].shape == adata.obsm["X_scvae_std"].shape == (80, 3)
    assert np.isfinite(adata.obsm["X_scvae"]).all()
    assert (adata.obsm["X_scvae_std"] > 0).all() == (posterior is not None)  # what is quantised is certain
    assert np.allclose(model.embed(adata), adata.obsm["X_scvae"], atol=1e-6)
    assert ("scvae_cluster" in adata.obs) == ("X_scvae_cluster_probability" in adata.obsm) == (prior == "mixture")

    # It is saved and loaded.
    model.save(tmp_path / "model")
    loaded = scvae.load(tmp_path / "model")
    assert loaded.program.options == model.program.options
    assert np.array_equal(loaded.embed(adata), model.embed(adata))
    assert np.array_equal(loaded.elbo(adata, n_samples=2), model.elbo(adata, n_samples=2))

    # It generates cells that it can take itself.
    new = loaded.generate(30, batch="batch_1", seed=1)
    assert np.isfinite(new.obsm["X_scvae"]).all()
    new = new[np.asarray(new.X.sum(1)).ravel() > 0].copy() if model.program.kind == "counts" else new
    assert set(new.obs["batch"]) == {"batch_1"}
    assert np.isfinite(loaded.elbo(new)).all()

    # It denoises, at the mean and by draws.
    for n_samples in (None, 20):
        denoised = loaded.denoise(adata, n_samples=n_samples)
        assert denoised.shape == adata.shape
        assert np.isfinite(denoised).all()
        if model.program.kind == "counts":
            assert np.allclose(denoised.sum(1), 1, atol=1e-5)
    as_of = [loaded.denoise(adata, batch=batch) for batch in ("batch_0", "batch_1")]
    assert not np.allclose(*as_of)
    assert np.allclose(loaded.denoise(adata, batch=["batch_0", "batch_1"]), np.mean(as_of, 0), atol=1e-5)

    # What it wrote survives the file.
    adata.write_h5ad(tmp_path / "cells.h5ad")
    read = anndata.read_h5ad(tmp_path / "cells.h5ad")
    for key in adata.obsm:
        assert np.array_equal(read.obsm[key], adata.obsm[key])
    assert read.uns["scvae"]["options"].get("posterior") == posterior
    if prior == "mixture":
        pd.testing.assert_series_equal(read.obs["scvae_cluster"], adata.obs["scvae_cluster"])


@pytest.mark.parametrize("posterior", POSTERIORS)
@pytest.mark.parametrize("program", PROGRAM_NAMES)
def test_a_fit_can_be_repeated_with_every_posterior(cells_for, fit, program, posterior):
    one, other = cells_for(program), cells_for(program)
    for adata in (one, other):
        fit(adata, program=program, posterior=posterior)
    assert np.array_equal(one.obsm["X_scvae"], other.obsm["X_scvae"])


@pytest.mark.parametrize("program", PROGRAM_NAMES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": "vamp", "posterior": "iaf"}, "inverting its flow, .*Take prior='mixture', or posterior='full'"),
        ({"prior": "vamp", "posterior": "iaf_stable"}, "posterior='iaf_stable' can only do by inverting its flow"),
        (
            {"prior": "normal", "n_components": 5},
            "n_components says nothing about prior='normal': it belongs to 'mixture' and 'vamp'",
        ),
        ({"prior": "mixture", "n_components": 0}, "n_components is a whole number of at least 1, or None, not 0"),
        ({"prior": "vamp", "n_components": -1}, "n_components is a whole number of at least 1, or None, not -1"),
        ({"flow_depth": 3}, "flow_depth says nothing about posterior='normal': it belongs to 'iaf' and 'iaf_stable'"),
        ({"posterior": "full", "flow_width": 64}, "flow_width says nothing about posterior='full'"),
        ({"posterior": "iaf", "flow_depth": 0}, "flow_depth is a whole number of at least 1, or None, not 0"),
        ({"posterior": "iaf", "flow_width": 2}, "flow_width is at least n_latent, 3, not 2"),
        ({"posterior": "iaf", "n_latent": 1}, "posterior='iaf' bends one dimension by .* n_latent of at least 2"),
        ({"posterior": "student"}, "posterior is one of 'normal', 'full', 'low_rank', 'iaf', 'iaf_stable', not 'stu"),
        ({"prior": "flat"}, "prior is one of 'normal', 'mixture', 'vamp', not 'flat'"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(cells_for, refused, program, options, message):
    refused(cells_for(program), ValueError, message, program=program, **options)


@pytest.mark.parametrize("program", PROGRAM_NAMES)
def test_one_component_and_one_dimension_will_do(cells_for, fit, program):
    adata = cells_for(program)
    for posterior in ("normal", "full", "low_rank"):
        for prior in ("mixture", "vamp"):
            fit(adata, program=program, posterior=posterior, prior=prior, n_components=1, n_latent=1)
            assert np.isfinite(adata.obsm["X_scvae"]).all()
            assert "scvae_cluster" not in adata.obs or (adata.obs["scvae_cluster"] == "0").all()
    fit(adata, program=program, posterior="iaf", n_latent=2, flow_depth=1, flow_width=2)
    assert np.isfinite(adata.obsm["X_scvae"]).all()


@pytest.mark.parametrize(
    "options",
    [{"library": "observed"}, {"likelihood": "nb"}, {"dispersion": "gene-cell"}],
)
def test_an_option_of_counts_is_refused_by_a_program_of_real_numbers(cells_for, refused, options):
    (name,) = options
    message = rf"'{name}'\. Options of the program 'gaussian': n_latent, n_hidden, .*noise.*; of the training: max_epo"
    refused(cells_for("gaussian"), TypeError, message, program="gaussian", **options)


def test_size_factors_are_refused_by_a_program_of_real_numbers(cells_for, refused):
    message = "size_factor_key belongs to models of counts; 'gaussian' models real numbers"
    refused(cells_for("gaussian"), ValueError, message, program="gaussian", size_factor_key="size")


def test_a_library_size_is_refused_by_a_program_of_real_numbers(cells_for, fit, unchanged):
    adata = cells_for("gaussian")
    model = fit(adata, program="gaussian")
    for library_size in ("cell", 1e4):
        message = "library_size belongs to models of counts; 'gaussian' models real numbers"
        with unchanged(adata), pytest.raises(ValueError, match=message):
            model.denoise(adata, library_size=library_size)


@pytest.mark.parametrize("options", [{"layer": "counts"}, {"mask_var": "few"}])
def test_a_representation_takes_the_place_of_layer_and_genes(cells_for, refused, options):
    adata = cells_for("gaussian")
    adata.obsm["X_pca"] = np.random.default_rng(0).normal(size=(80, 4))
    adata.var["few"] = np.arange(adata.n_vars) < 3
    message = "use_rep takes the place of layer and mask_var: pass it, or them"
    refused(adata, ValueError, message, program="gaussian", use_rep="X_pca", **options)
