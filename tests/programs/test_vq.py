"""VQ-VAE: the codebook is k-means, the gradient goes straight through, the KL is log K, and codes do not die."""

import functools
import itertools
import math

import numpy as np
import pyro
import pytest
import torch
from anndata import AnnData
from torch._subclasses.fake_tensor import FakeTensorMode

import scvae
from scvae.boundary.process import seeded
from scvae.data.reading import read_cells, read_schema
from scvae.inference import evidence
from scvae.inference.evidence import elbo_terms
from scvae.modules.codebook import Codebook, UniformCodes
from scvae.modules.em import KMeansAutoencoder
from scvae.programs import VQ, VQGaussian


@pytest.fixture(autouse=True)
def _seeded():
    with seeded(0, torch.device("cpu")):
        yield


def moving(n_codes=6, n_latent=4, n_codebooks=1, gamma=0.9, restart=False):
    codebook = Codebook(n_codes, n_latent, n_codebooks, restart=restart)
    codebook.gamma = gamma
    return codebook


# ---- The codebook ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_codebooks", [1, 2, 4])
def test_each_part_of_a_point_is_replaced_by_the_nearest_vector_of_its_own_codebook(n_codebooks):
    codebook, z = moving(n_codebooks=n_codebooks).eval(), torch.randn(50, 4)
    expected = np.zeros((50, n_codebooks), int)
    for i, c in itertools.product(range(50), range(n_codebooks)):
        part = np.split(z[i].numpy(), n_codebooks)[c]
        expected[i, c] = np.linalg.norm(codebook.codes[c].numpy() - part, axis=1).argmin()
    assert np.array_equal(codebook.nearest(z), expected)
    vectors = np.concatenate([codebook.codes[c].numpy()[expected[:, c]] for c in range(n_codebooks)], 1)
    assert np.array_equal(codebook(z), vectors)


@pytest.mark.parametrize("n_codebooks", [1, 2])
def test_the_vectors_are_moving_averages(n_codebooks):
    codebook = moving(n_codebooks=n_codebooks)
    e = codebook.codes.double().numpy()  # [C, K, d / C]
    usage, sums = np.full(e.shape[:2], 1 / 6), e / 6
    for _ in range(5):
        z = torch.randn(40, 4)
        codebook(z)
        for c, part in enumerate(np.split(z.numpy(), n_codebooks, 1)):
            k = ((part[:, None] - e[c]) ** 2).sum(-1).argmin(1)
            own = np.eye(6)[k]
            usage[c] = 0.9 * usage[c] + 0.1 * own.mean(0)
            sums[c] = 0.9 * sums[c] + 0.1 * own.T @ part / 40
        e = sums / usage[..., None]
    assert np.allclose(codebook.usage, usage, atol=1e-6)
    assert np.allclose(codebook.codes, e, atol=1e-5)


def test_without_memory_a_minibatch_of_all_points_is_a_step_of_k_means():
    codebook, z = moving(gamma=0.0), torch.randn(80, 4)
    codebook.codes[0] = z[:6]
    model = KMeansAutoencoder(z[:6].double())
    expected = model.m_step(z.double(), model.encode(z.double()))
    codebook(z)
    assert torch.allclose(codebook.codes[0].double(), expected.centres, atol=1e-5)


def test_a_vector_that_stands_for_nothing_stays_where_it_is():
    codebook, z = moving(gamma=0.0), torch.randn(80, 4)
    codebook.codes[0, 3] = 100.0
    for _ in range(3):
        codebook(z)
    assert (codebook.codes[0, 3] == 100).all()


def test_with_restarts_it_is_put_on_the_furthest_point():
    codebook, without, z = moving(restart=True), moving(), torch.randn(30, 4)
    codebook.codes[0, 2:4] = 100.0
    codebook.usage[0, 2:4] = 0.01
    without.load_state_dict(codebook.state_dict())
    furthest = z[(z - without(z)).norm(dim=1).topk(2).indices]
    codebook(z)
    assert torch.equal(codebook.codes[0, 2:4], furthest)
    assert torch.allclose(codebook.sums[0, 2:4] / codebook.usage[0, 2:4, None], furthest)
    kept = [0, 1, 4, 5]
    assert torch.equal(codebook.codes[0, kept], without.codes[0, kept])


def test_more_vectors_are_restarted_than_there_are_points():
    codebook, z = moving(restart=True), torch.randn(2, 4)
    codebook.codes[0, 1:] = 100.0
    codebook.usage[0, 1:] = 0.0
    codebook(z)
    assert {tuple(row) for row in codebook.codes[0, 1:].tolist()} == {tuple(row) for row in z.tolist()}


@pytest.mark.parametrize("n_points", [1, 3, 300])
def test_the_start_is_k_means(n_points):
    codebook, z = moving(n_codebooks=2), torch.randn(n_points, 4)
    codebook.start(z)
    for codes, part in zip(codebook.codes, z.split(2, 1), strict=True):
        code = KMeansAutoencoder(codes).encode(part)
        used = code.any(0)
        assert used.sum() == min(6, n_points)
        assert torch.allclose((code.T @ part)[used] / code.sum(0)[used].unsqueeze(1), codes[used], atol=0.05)
    assert torch.allclose(codebook.usage.sum(1), torch.ones(2))


def test_the_codebook_moves_in_training_only_and_lies_in_the_state():
    codebook, z = moving(), torch.randn(20, 4)
    before = {name: value.clone() for name, value in codebook.state_dict().items()}
    assert before.keys() == {"codes", "usage", "sums"}
    codebook.eval()(z)
    assert all(torch.equal(value, before[name]) for name, value in codebook.state_dict().items())
    codebook.train()(z)
    assert not any(torch.equal(value, before[name]) for name, value in codebook.state_dict().items())


def test_a_step_of_the_codebook_waits_for_no_number_and_has_the_same_shapes_whatever_the_points():
    codebook, z = moving(n_codebooks=2, restart=True), torch.randn(20, 4)
    with FakeTensorMode() as fake:  # tensors without numbers: whatever asks for one fails
        for name, value in list(codebook.named_buffers()):
            codebook.register_buffer(name, fake.from_tensor(value))
        assert codebook(fake.from_tensor(z)).shape == (20, 4)


def test_perplexity_is_the_number_of_vectors_that_are_used_alike():
    codebook = moving(n_codebooks=2)
    assert codebook.perplexity() == pytest.approx(6)
    codebook.usage[0] = torch.tensor([0.5, 0.5, 0, 0, 0, 0])
    codebook.usage[1] = torch.tensor([0.1, 0, 0, 0, 0, 0])
    assert codebook.perplexity() == pytest.approx((2 + 1) / 2)


@pytest.mark.parametrize("n_codebooks", [1, 2])
def test_the_prior_gives_each_vector_the_same_probability_and_all_of_them_one(n_codebooks):
    codes = torch.randn(n_codebooks, 3, 2)
    p = UniformCodes(codes)
    draws = p.expand([5000]).sample()
    vectors = torch.stack([torch.cat(parts) for parts in itertools.product(*codes)])
    assert p.log_prob(vectors).exp().sum() == pytest.approx(1)
    counts = (draws.unsqueeze(1) == vectors).all(-1).sum(0)
    assert counts.sum() == 5000
    mean = 5000 / len(vectors)
    assert (counts - mean).square().sum() / mean < 3 * len(vectors)  # chi-square


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_codes": 1}, "n_codes is a whole number of at least 2"),
        ({"n_codebooks": 2}, "cuts n_latent, 3, into equal parts"),
        ({"n_codebooks": 0}, "n_codebooks is a whole number of at least 1, not 0"),
        ({"commitment": -1.0}, "commitment is a number of at least 0"),
        ({"likelihood": "gaussian"}, "likelihood is one of 'zinb', 'nb', 'poisson'"),
    ],
)
def test_options_that_cannot_be_are_refused(adata, fit, options, message):
    with pytest.raises(ValueError, match=message):
        fit(adata, "vq", **options)


# ---- The bound ---------------------------------------------------------------------------------------------


def small(adata, kind=VQ, n_latent=4, n_codes=5, **options):
    """A program at its start, in evaluation mode, and all cells as one minibatch."""
    cells = read_cells(adata, read_schema(adata, batch_key="batch", kind=kind.kind))
    program = kind(cells.schema, n_latent=n_latent, n_codes=n_codes, n_hidden=8, **options)
    program.initialise(cells)
    return program.eval(), cells.batch(torch.arange(len(cells)))


@pytest.mark.parametrize("kind", [VQ, VQGaussian])
@pytest.mark.parametrize("n_codebooks", [1, 2])
def test_kl_is_log_k_for_each_codebook_and_the_commitment_is_no_part_of_the_bound(adata, kind, n_codebooks):
    program, batch = small(adata, kind, n_codebooks=n_codebooks)
    log_likelihood, kl = elbo_terms(program, batch)
    assert torch.allclose(kl["z"], torch.tensor(n_codebooks * math.log(5)))
    assert (log_likelihood["commitment"] == 0).all()
    expected = program.p_x(program.quantise(program.encode(batch)), batch).log_prob(program.observed(batch))
    assert torch.allclose(log_likelihood["x"], expected)
    bound = evidence.elbo(program, batch, n_samples=3)
    assert torch.allclose(bound, expected - n_codebooks * math.log(5), rtol=1e-5)
    assert torch.allclose(evidence.importance_weighted(program, batch, n_samples=3), bound, rtol=1e-5)


@pytest.mark.parametrize("kind", [VQ, VQGaussian])
def test_the_gradient_is_the_decoders_and_that_of_the_commitment(adata, kind):
    program, batch = small(adata, kind, commitment=0.7)
    z_e = program.encode(batch).detach().requires_grad_()
    e = program.quantise(z_e)
    program.encode = lambda _: z_e
    log_likelihood, kl = elbo_terms(program, batch)
    (sum(kl.values()).mean() - sum(log_likelihood.values()).mean()).backward()

    z = e.clone().requires_grad_()
    (-program.p_x(z, batch).log_prob(program.observed(batch))).mean().backward()
    assert torch.allclose(z_e.grad, z.grad + 2 * 0.7 * (z_e - e) / len(batch), rtol=1e-4, atol=1e-6)
    assert z.grad.abs().max() > 0


@torch.no_grad()
def test_the_bound_is_below_the_evidence_by_the_surprise_of_the_code_chosen(adata):
    program, batch = small(adata)
    log_joint = torch.stack(
        [program.p_x(e.expand(80, -1), batch).log_prob(batch.counts) - math.log(5) for e in program.codebook.codes[0]]
    )
    exact = log_joint.logsumexp(0)
    k = program.codebook.nearest(program.encode(batch)).T
    surprise = exact - log_joint.gather(0, k)[0]
    bound = evidence.importance_weighted(program, batch, n_samples=8)
    assert torch.allclose(bound, exact - surprise, rtol=1e-5)
    assert (bound <= exact + 1e-3).all()
    chosen_well = log_joint.argmax(0) == k[0]
    assert (surprise[chosen_well] <= math.log(5) + 1e-3).all()
    assert torch.allclose(evidence.prior_monte_carlo(program, batch, n_samples=300), exact, atol=1.0)


def test_a_factor_of_a_guide_is_a_part_of_log_q(adata):
    class Skewed(VQ):
        def guide(self, batch):
            super().guide(batch)
            with pyro.plate("again", len(batch)):
                pyro.factor("skew", torch.full((len(batch),), 3.0), has_rsample=True)

    program, batch = small(adata, Skewed)
    bound = evidence.elbo(program, batch)
    assert torch.allclose(evidence.importance_weighted(program, batch, n_samples=2), bound)
    program.guide = functools.partial(VQ.guide, program)
    assert torch.allclose(evidence.elbo(program, batch), bound + 3)


# ---- Fitted ------------------------------------------------------------------------------------------------


def real(adata):
    return AnnData(np.log1p(adata.X.toarray()), obs=adata.obs, var=adata.var)


@pytest.mark.slow
@pytest.mark.parametrize("batch_key", [None, "batch"])
@pytest.mark.parametrize(
    ("program", "options"),
    [
        ("vq", {"likelihood": "zinb"}),
        ("vq", {"likelihood": "nb", "dispersion": "gene-batch", "n_codebooks": 3}),
        ("vq", {"likelihood": "poisson", "n_layers": 0, "continuous_covariate_keys": ["age"]}),
        ("vq", {"n_layers": 2, "dropout_rate": 0.2, "encode_covariates": False, "dispersion": "gene-cell"}),
        ("vq", {"kmeans_start": False, "validation_fraction": 0.2, "categorical_covariate_keys": ["donor"]}),
        ("vq_gaussian", {}),
        ("vq_gaussian", {"n_codebooks": 3, "noise": "shared", "n_layers": 0}),
        ("vq_gaussian", {"noise": "fixed", "noise_scale": 0.5, "restart": False}),
    ],
)
def test_every_variant_is_fitted_improves_answers_and_is_saved(adata, fit, program, options, batch_key, tmp_path):
    adata = adata if program == "vq" else real(adata)
    options = {"n_codes": 8, "batch_key": batch_key, **options}
    start = fit(adata, program, max_epochs=1, learning_rate=1e-12, **options)
    model = fit(adata, program, max_epochs=15, **options)
    assert model.elbo(adata).mean() > start.elbo(adata).mean()
    assert np.isfinite(model.log_likelihood(adata, n_samples=4)).all()

    new = model.generate(20, batch=batch_key and "batch_1")
    codes = model.program.codebook.codes.numpy()
    for i, part in enumerate(np.split(new.obsm["X_scvae"], len(codes), 1)):
        assert {tuple(row) for row in part} <= {tuple(row) for row in codes[i]}
    assert new.X.sum() > 0
    if program == "vq":
        assert (new.X.data == np.rint(new.X.data)).all()
        assert np.allclose(model.denoise(adata).sum(1), 1, atol=1e-4)
    assert np.allclose(model.denoise(adata), model.denoise(adata, n_samples=2), rtol=1e-4, atol=1e-6)

    model.save(tmp_path / "model")
    loaded = scvae.load(tmp_path / "model")
    assert np.array_equal(loaded.embed(adata), model.embed(adata))
    assert np.array_equal(loaded.elbo(adata), model.elbo(adata))
    assert np.array_equal(loaded.generate(5).obsm["X_scvae"], model.generate(5).obsm["X_scvae"])
    assert loaded.history.equals(model.history)
    assert type(loaded.program) is type(model.program)


@pytest.mark.parametrize("n_codebooks", [1, 3])
def test_codes_and_both_kinds_of_latents_are_written(adata, fit, n_codebooks):
    before = set(adata.obs), set(adata.obsm)
    model = fit(adata, "vq", n_codes=6, n_codebooks=n_codebooks, key_added="X_vq")
    names = ["vq_code"] if n_codebooks == 1 else [f"vq_code_{i}" for i in range(n_codebooks)]
    assert set(adata.obs) - before[0] == set(names)
    assert set(adata.obsm) - before[1] == {"X_vq", "X_vq_std", "X_vq_quantised"}
    assert np.array_equal(adata.obsm["X_vq"], model.embed(adata))
    assert (adata.obsm["X_vq_std"] == 0).all()
    parts = np.split(adata.obsm["X_vq_quantised"], n_codebooks, 1)
    for codes, name, part in zip(model.program.codebook.codes.numpy(), names, parts, strict=True):
        assert adata.obs[name].dtype == "category"
        assert np.array_equal(codes[adata.obs[name].astype(int)], part)


def test_cells_permuted_have_the_same_codes(adata, fit):
    model = fit(adata, "vq", batch_key="batch", max_epochs=10)
    order = np.random.default_rng(0).permutation(adata.n_obs)
    assert np.allclose(model.embed(adata[order]), model.embed(adata)[order], atol=1e-5)
    assert np.array_equal(codes_of(model, adata[order]), codes_of(model, adata)[order])


def codes_of(model, adata):
    return model._each(model._cells(adata), lambda batch: model.program.per_cell(batch)["code"])


def test_the_same_seed_gives_the_same_codes(adata, fit):
    one, two, other = (fit(adata.copy(), "vq", batch_key="batch", seed=seed) for seed in (5, 5, 6))
    assert one.history.equals(two.history)
    for name, value in one.program.state_dict().items():
        assert torch.equal(value, two.program.state_dict()[name]), name
    assert not torch.equal(one.program.codebook.codes, other.program.codebook.codes)


# ---- Codes that live ---------------------------------------------------------------------------------------


@functools.cache
def types():
    """400 cells of eight types in two batches."""
    return scvae.datasets.simulated_batches(n_cells=400, n_genes=60, n_types=8, n_batches=2, type_scale=4, seed=2)


@functools.cache
def model_of_types(**options):
    options = {"batch_key": "batch", "n_codes": 32, "n_hidden": 32, **options}
    return scvae.fit(types().copy(), "vq", progress=False, **options)


def n_dead(model):
    return 32 - len(np.unique(codes_of(model, types())))


def test_with_k_means_start_and_restarts_no_code_is_dead_and_half_of_them_are_used_alike():
    model = model_of_types()
    assert n_dead(model) == 0
    perplexity = model.history["perplexity"]
    assert len(perplexity) == len(model.history["step"])
    assert perplexity.iloc[-1] >= 16
    share = np.bincount(codes_of(model, types())) / 400
    assert np.exp(-(share * np.log(share)).sum()) >= 16


def test_without_k_means_start_and_restarts_codes_are_dead():
    model = model_of_types(kmeans_start=False, restart=False, max_epochs=125)
    usual = model_of_types(max_epochs=125)
    assert n_dead(model) > 8
    assert model.history["perplexity"].iloc[-1] < usual.history["perplexity"].iloc[-1] - 4


@pytest.mark.slow
def test_restarts_alone_bring_codes_to_life():
    assert n_dead(model_of_types(kmeans_start=False)) < n_dead(model_of_types(kmeans_start=False, restart=False)) / 2


def test_codes_tell_cell_types():
    from sklearn.metrics import homogeneity_score

    assert homogeneity_score(types().obs["cell_type"], codes_of(model_of_types(), types())) > 0.9


def test_real_numbers_are_coded_as_well():
    adata = types().copy()
    adata.X = np.log1p(adata.X.toarray())
    model = scvae.fit(adata, "vq_gaussian", batch_key="batch", n_hidden=32, progress=False)
    assert adata.obs["scvae_code"].nunique() == 32
    assert model.history["perplexity"].iloc[-1] >= 16
