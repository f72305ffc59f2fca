"""The program of latent maps: against Monte Carlo, its bounds in order, and all that a program promises, on images."""

import re

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from pyro import poutine
from torch.distributions import kl_divergence

import scvae
from scvae.data.cells import Batch, Schema
from scvae.data.reading import read_cells
from scvae.inference import evidence
from scvae.modules.pixels import PIXELS
from scvae.programs import MatrixNormalVAE

POSTERIORS = ["matrix_normal", "low_rank", "normal"]
OPTIONS = {"program": "matrix_normal", "image_key": "image", "n_layers": 2}


def images_of(pixels="bernoulli", shape=(8, 12), n=60, seed=0):
    """Cells with images of a bright bar that lies higher or lower, of two batches of which one is brighter."""
    rng = np.random.default_rng(seed)
    *_, height, width = shape
    rows = rng.integers(1, height - 2, n)
    batch = np.arange(n) % 2
    bar = np.abs(np.arange(height) - rows[:, None]) <= 1  # [n, H]
    mean = np.broadcast_to(0.1 + 0.6 * bar[:, :, None] + 0.2 * batch[:, None, None], (n, height, width))
    if len(shape) == 3:
        mean = np.stack([mean, *([mean[:, ::-1]] * (shape[0] - 1))], 1)
    if pixels == "bernoulli":
        images = rng.random(mean.shape) < mean
    elif pixels == "gaussian":
        images = 5 + 3 * (mean + 0.2 * rng.normal(size=mean.shape))
    else:
        images = rng.poisson(4 * mean)
    obs = pd.DataFrame({"batch": pd.Categorical(batch.astype(str))}, index=[f"cell_{i}" for i in range(n)])
    return AnnData(obs=obs, obsm={"image": images.astype(np.float32)})


@pytest.fixture
def refused(fit, unchanged):
    """``refused(adata, error, message, **options)``: fit fails with that message and leaves the AnnData alone."""

    def check(adata, error, message, **options):
        with unchanged(adata), pytest.raises(error) as caught:
            fit(adata, **{**OPTIONS, **options})
        assert re.search(message, str(caught.value.args[0])), caught.value.args[0]

    return check


def untrained(posterior="matrix_normal", shape=(8, 12), n_latent=3, seed=0, repeats=1, **options):
    """A program whose posterior is not the prior's, and five cells for it, each repeated."""
    adata = images_of(shape=shape)
    schema = scvae.data.reading.read_schema(adata, kind="unit", image_key="image")
    cells = read_cells(adata, schema)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        program = MatrixNormalVAE(schema, posterior=posterior, n_latent=n_latent, n_hidden=8, n_layers=2, **options)
        program.initialise(cells)
    with torch.no_grad():
        program.head.weight *= 2
    return program.eval(), cells.batch(torch.arange(5).repeat(repeats))


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


# ---- The mathematics ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("posterior", "numbers"),
    [
        ("matrix_normal", lambda d1, d2: d1 * d2 + d1 + d2),
        ("low_rank", lambda d1, d2: 2 * (d1 + d2)),
        ("normal", lambda d1, d2: 2 * d1 * d2),
    ],
)
@pytest.mark.parametrize(
    ("shape", "maps"), [((28, 28), (7, 7)), ((8, 12), (2, 3)), ((9, 5), (3, 2)), ((2, 7, 1), (2, 1))]
)
def test_the_encoder_says_as_many_numbers_as_the_family_has(posterior, numbers, shape, maps):
    schema = Schema(tuple(map(str, range(int(np.prod(shape))))), kind="unit", image_key="image", image_shape=shape)
    program = MatrixNormalVAE(schema, posterior=posterior, n_latent=5, n_hidden=4, n_layers=2)
    assert (program.d1, program.d2) == maps
    assert program.head.out_features == 5 * numbers(*maps)
    if maps[0] == maps[1]:  # as in the paper
        d = maps[0]
        assert program.head.out_features == 5 * {"matrix_normal": d**2 + 2 * d, "low_rank": 4 * d}.get(
            posterior, 2 * d**2
        )
    a = program.decoder(torch.zeros(4, 5, *maps), torch.zeros(4, 0))
    assert a.shape == (4, *schema.channels[:1], schema.channels[1] * schema.channels[2])


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_the_posterior_is_of_its_family(posterior):
    program, batch = untrained(posterior)
    with torch.no_grad():
        mean, std = (part.view(5, 3, 2, 3) for part in program.embed(batch))
    rank = torch.linalg.matrix_rank(mean, rtol=1e-4)
    assert (rank == (1 if posterior == "low_rank" else 2)).all()
    ratio = std[:, :, 0] / std[:, :, 1]  # the same in all columns if rows and columns have scales of their own
    assert torch.allclose(ratio, ratio[..., :1].expand_as(ratio), rtol=1e-4) == (posterior != "normal")


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_draws_have_the_moments_that_embed_gives(posterior):
    program, batch = untrained(posterior, repeats=4000)
    with torch.no_grad():
        draws = poutine.trace(program.guide).get_trace(batch).nodes["F"]["value"].view(4000, 5, -1)
        mean, std = (part[:5] for part in program.embed(batch))
    assert torch.allclose(draws.mean(0), mean, atol=0.06)
    assert torch.allclose(draws.std(0), std, rtol=0.08)


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_the_prior_is_standard_normal(posterior):
    program, _ = untrained(posterior)
    F = torch.randn(7, 3, 2, 3)
    assert torch.allclose(program.p_F().log_prob(F), torch.distributions.Normal(0, 1).log_prob(F).sum((1, 2, 3)))


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_the_divergence_in_closed_form_is_that_of_draws(posterior):
    program, batch = untrained(posterior)
    with torch.no_grad():
        q, p = program.q_F(batch), program.p_F()
        draws = q.sample((20_000,))
        estimates = q.log_prob(draws) - p.log_prob(draws)
        _, kl = evidence.elbo_terms(program, batch)
    assert kl["F"].shape == (5,)
    error = estimates.std(0) / len(draws) ** 0.5
    assert ((kl["F"] - estimates.mean(0)).abs() < 5 * error).all()
    if posterior != "normal":  # the paper's formula
        M, (row, col) = q.mean, (q.base_dist.row_scale**2, q.base_dist.col_scale**2)
        traces = row.sum(-1) * col.sum(-1) + M.square().sum((-2, -1)) - 2 * 3
        written_out = (traces - 3 * row.log().sum(-1) - 2 * col.log().sum(-1)).sum(-1) / 2
        assert torch.allclose(kl["F"], written_out, rtol=1e-4)
        assert torch.allclose(kl["F"], kl_divergence(q, p))


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_the_elbo_is_that_of_draws_alone(posterior):
    program, batch = untrained(posterior, repeats=3000)
    with torch.no_grad():
        closed = evidence.elbo(program, batch).view(3000, 5)
        drawn = evidence.importance_weighted(program, batch, n_samples=1).view(3000, 5)
    error = (closed.var(0) + drawn.var(0)).sqrt() / len(closed) ** 0.5
    assert ((closed.mean(0) - drawn.mean(0)).abs() < 5 * error).all()


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_the_bounds_are_in_order(fit, posterior):
    adata = images_of()
    model = fit(adata, **{**OPTIONS, "max_epochs": 10}, posterior=posterior)
    elbo, *weighted = (
        model.elbo(adata, n_samples=64).mean(),
        model.log_likelihood(adata, n_samples=16).mean(),
        model.log_likelihood(adata, n_samples=256).mean(),
    )
    assert elbo < weighted[0] < weighted[1]


def test_a_place_in_a_map_keeps_its_meaning_when_maps_are_given_flat():
    program, batch = untrained()
    F = torch.randn(5, 3, 2, 3)
    with torch.no_grad():
        assert torch.equal(program.decode(F, batch), program.decode(F.flatten(1), batch))


def test_the_decoder_starts_near_the_mean_image():
    for pixels in PIXELS:
        adata = images_of(pixels, n=500)
        model = scvae.fit(
            adata,
            **OPTIONS,
            pixels=pixels,
            max_epochs=1,
            learning_rate=1e-12,
            progress=False,
        )
        mean = adata.obsm["image"].mean(0).ravel()
        start = model.denoise(adata).mean(0)
        assert np.corrcoef(start, mean)[0, 1] > 0.9, pixels


# ---- The promises of a program -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("pixels", PIXELS)
@pytest.mark.parametrize("posterior", POSTERIORS)
def test_it_is_fitted_and_answers(fit, posterior, pixels, tmp_path):
    adata = images_of(pixels)
    options = {**OPTIONS, "posterior": posterior, "pixels": pixels, "batch_key": "batch"}
    start = fit(adata, **{**options, "max_epochs": 1, "learning_rate": 1e-12})
    model = fit(adata, **{**options, "max_epochs": 30})
    assert model.elbo(adata, n_samples=8).mean() > start.elbo(adata, n_samples=8).mean() + 1

    # It embeds: three maps of 2 x 3.
    assert adata.obsm["X_scvae"].shape == adata.obsm["X_scvae_std"].shape == (60, 18)
    assert np.isfinite(adata.obsm["X_scvae"]).all()
    assert (adata.obsm["X_scvae_std"] > 0).all()
    assert np.allclose(model.embed(adata), adata.obsm["X_scvae"], atol=1e-5)

    # It is saved and loaded.
    model.save(tmp_path / "model")
    loaded = scvae.load(tmp_path / "model")
    assert loaded.program.options == model.program.options
    assert np.array_equal(loaded.embed(adata), model.embed(adata))
    assert np.array_equal(loaded.elbo(adata, n_samples=2), model.elbo(adata, n_samples=2))

    # It generates images that it can take itself.
    new = loaded.generate(30, batch="1", seed=1)
    assert new.obsm["image"].shape == (30, 8, 12)
    assert new.obsm["X_scvae"].shape == (30, 18)
    assert set(new.obs["batch"]) == {"1"}
    assert np.isfinite(loaded.elbo(new)).all()

    # It denoises, at the mean and by draws, and as of another batch.
    for n_samples in (None, 20):
        denoised = loaded.denoise(adata, n_samples=n_samples)
        assert denoised.shape == (60, 96)
        assert np.isfinite(denoised).all()
    as_of = [loaded.denoise(adata, batch=batch) for batch in ("0", "1")]
    assert not np.allclose(*as_of)
    assert np.allclose(loaded.denoise(adata, batch=["0", "1"]), np.mean(as_of, 0), atol=1e-4)

    # It shows images: what it makes of a cell, and what maps stand for.
    images = loaded.reconstruct(adata)
    assert images.shape == (60, 1, 8, 12)
    assert np.allclose(images.reshape(60, -1), loaded.denoise(adata), atol=1e-4)
    assert loaded.n_latent == 18
    assert np.allclose(loaded.decode(adata.obsm["X_scvae"]).reshape(60, -1), np.mean(as_of, 0), atol=1e-3)

    # What it wrote survives the file.
    adata.write_h5ad(tmp_path / "cells.h5ad")
    read = anndata.read_h5ad(tmp_path / "cells.h5ad")
    for key in adata.obsm:
        assert np.array_equal(read.obsm[key], adata.obsm[key])
    assert read.uns["scvae"]["options"]["posterior"] == posterior


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_a_fit_can_be_repeated(fit, posterior):
    one, other = images_of(), images_of()
    for adata in (one, other):
        fit(adata, **OPTIONS, posterior=posterior, batch_key="batch", dropout_rate=0.1)
    assert np.array_equal(one.obsm["X_scvae"], other.obsm["X_scvae"])


@pytest.mark.parametrize("shape", [(8, 8), (2, 8, 12), (3, 7, 5), (8, 1), (1, 4)])
def test_images_of_any_size_and_several_channels(fit, shape):
    adata = images_of("gaussian", shape, n=20) if min(shape[-2:]) > 3 else None
    if adata is None:
        adata = AnnData(obsm={"image": np.random.default_rng(0).normal(size=(20, *shape)).astype(np.float32)})
    model = fit(adata, **OPTIONS, pixels="gaussian")
    assert model.denoise(adata).shape == (20, np.prod(shape))
    assert model.generate(3).obsm["image"].shape == (3, *shape)
    assert np.isfinite(model.elbo(adata)).all()


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_two_cells_will_do(fit, posterior):
    adata = images_of(n=2)
    model = fit(adata, **OPTIONS, posterior=posterior)
    assert np.isfinite(model.elbo(adata)).all()
    assert model.embed(adata[:1]).shape == (1, 18)


def test_one_map_and_one_channel_will_do(fit):
    adata = images_of()
    fit(adata, **{**OPTIONS, "n_latent": 1, "n_hidden": 1, "n_layers": 4})
    assert adata.obsm["X_scvae"].shape == (60, 1)


def test_covariates_of_every_kind(fit):
    adata = images_of()
    adata.obs["donor"] = pd.Categorical(np.random.default_rng(0).choice(["ada", "bob"], 60))
    adata.obs["age"] = np.linspace(20, 60, 60)
    keys = {"batch_key": "batch", "categorical_covariate_keys": ["donor"], "continuous_covariate_keys": ["age"]}
    for encode_covariates in (True, False):
        model = fit(adata, **OPTIONS, **keys, encode_covariates=encode_covariates)
        other = adata.copy()
        other.obs["age"] += 30.0
        assert np.allclose(model.embed(adata), model.embed(other)) != encode_covariates
        assert not np.allclose(model.denoise(adata), model.denoise(other))


def test_batches_are_told_by_their_covariate_and_not_by_the_maps(fit):
    adata = images_of("gaussian", n=300)
    model = fit(adata, **{**OPTIONS, "max_epochs": 40}, pixels="gaussian", batch_key="batch")
    difference = model.denoise(adata, batch="1") - model.denoise(adata, batch="0")
    assert abs(difference.mean() - 0.6) < 0.15  # 3 times 0.2, as the images were made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"posterior": "full"}, "posterior is one of 'matrix_normal', 'low_rank', 'normal', not 'full'"),
        ({"pixels": "beta"}, "pixels is one of 'bernoulli', 'gaussian', 'poisson', 'nb', not 'beta'"),
        ({"n_latent": 0}, "n_latent is a whole number of at least 1, not 0"),
        ({"n_hidden": 0}, "n_hidden is a whole number of at least 1, not 0"),
        ({"n_layers": 0}, "n_layers is a whole number of at least 1, not 0"),
        ({"n_layers": 5}, "n_layers=5: images of 8 x 12 pixels can be halved 4 times"),
        ({"image_key": None}, "'matrix_normal' models images: name the key of adata.obsm"),
        ({"size_factor_key": "batch"}, "size_factor_key belongs to models of counts; 'matrix_normal' models images"),
    ],
)
def test_options_that_make_no_sense_are_refused(refused, options, message):
    refused(images_of(), ValueError, message, **options)


@pytest.mark.parametrize("options", [{"prior": "mixture"}, {"flow_depth": 2}, {"likelihood": "nb"}])
def test_options_of_other_programs_are_refused(refused, options):
    (name,) = options
    message = (
        rf"'{name}'.*\. Options of the program 'matrix_normal': n_latent, .*posterior.*; of the training: max_epochs"
    )
    refused(images_of(), TypeError, message, **options)


def test_images_that_the_likelihood_cannot_be_of_are_refused(refused):
    refused(
        images_of("gaussian"),
        ValueError,
        "holds values outside 0 to 1, .*or model other pixels, pixels=",
        pixels="bernoulli",
    )
    refused(images_of("gaussian"), ValueError, "holds values that are not whole numbers", pixels="nb")


@pytest.mark.parametrize("asked", [{"pose": (0.0, 0.0, 0.0)}, {"size": (16, 24)}])
def test_it_has_neither_poses_nor_other_sizes(fit, asked):
    adata = images_of()
    model = fit(adata, **OPTIONS)
    with pytest.raises(ValueError, match="'matrix_normal' knows its images in one pose and one size"):
        model.reconstruct(adata, **asked)


def test_a_minibatch_without_images_is_drawn_with_its_covariates():
    program, _ = untrained()
    blank = Batch(None, torch.ones(4), torch.zeros(4, dtype=torch.int64), torch.zeros(4, 0))
    trace = poutine.trace(program.model).get_trace(blank)
    assert trace.nodes["F"]["value"].shape == (4, 3, 2, 3)
    assert trace.nodes["x"]["value"].shape == (4, 96)
