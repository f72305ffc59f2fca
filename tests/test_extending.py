"""New batches for a fitted model: they learn, and what the model says of the batches that it knew remains."""

import anndata
import numpy as np
import pytest
import torch

import scvae
from scvae.modules.decoders import deviations_of

KEYS = {"categorical_covariate_keys": ["donor"], "continuous_covariate_keys": ["age"]}
MODELS = {
    "zinb": {},
    "all covariates": {**KEYS, "layer": "counts"},
    "encoder without covariates": {"encode_covariates": False},
    "observed library": {"library": "observed"},
    "size factors": {"size_factor_key": "size"},
    "gene-batch": {"dispersion": "gene-batch", "likelihood": "nb"},
    "gene-cell": {"dispersion": "gene-cell", **KEYS},
    "poisson": {"likelihood": "poisson"},
    "linear": {"n_layers": 0},
    "full": {"posterior": "full"},
    "low_rank": {"posterior": "low_rank"},
    "iaf": {"posterior": "iaf"},
    "iaf_stable": {"posterior": "iaf_stable"},
    "normal": {"prior": "normal"},
    "vamp": {"prior": "vamp", "n_components": 4, **KEYS},
    "dropout": {"dropout_rate": 0.2},
    "gaussian": {"program": "gaussian", **KEYS},
    "linear gaussian": {"program": "gaussian", "n_hidden": 0, **KEYS},
    "gaussian, encoder without covariates": {"program": "gaussian", "encode_covariates": False},
    "gaussian, iaf": {"program": "gaussian", "posterior": "iaf"},
    "gaussian, vamp": {"program": "gaussian", "prior": "vamp", "n_components": 4, **KEYS},
    "vq": {"program": "vq"},
    "vq_gaussian": {"program": "vq_gaussian"},
    "pose": {"program": "pose", "image_key": "image", **KEYS},
    "pose of coordinates": {"program": "pose", "image_key": "image", "decoder": "coordinates"},
    "matrix_normal": {"program": "matrix_normal", "image_key": "image", "n_layers": 2, **KEYS},
}


@pytest.fixture
def query(adata):
    """40 cells of two batches that the model does not know, which differ in depth."""
    query = adata[:40].copy()
    query.obs["batch"] = np.repeat(["fresh", "other"], [15, 25])
    query.X[15:] = query.X[15:] * 3
    query.layers["counts"] = query.X.copy()
    return query


@pytest.fixture
def answers():
    """What a model writes of cells, and what it decodes of them."""

    def ask(model, adata):
        cells = adata.copy()
        for name in [name for name in cells.obs if name.startswith("scvae")]:
            del cells.obs[name]
        cells.obsm = {key: value for key, value in cells.obsm.items() if not key.startswith("X_scvae")}
        model.transform(cells, key_added="X_scvae_again")
        written = {name: cells.obs[name] for name in cells.obs if name.startswith("scvae_again")}
        written |= {key: cells.obsm[key] for key in cells.obsm if key.startswith("X_scvae_again")}
        written["rho"] = model.denoise(cells) if not model.program.of_images else model.reconstruct(cells)
        written["elbo"] = model.elbo(cells)
        return written

    return ask


@pytest.mark.slow
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_nothing_of_the_reference_moves_and_the_new_batches_learn(
    adata, query, fit, answers, unchanged, options, tmp_path
):
    for cells in (adata, query):
        cells.obsm["image"] = np.random.default_rng(0).uniform(size=(len(cells), 8, 8)).astype(np.float32)
    model = fit(adata, batch_key="batch", **options)
    before, weights = answers(model, adata), {k: v.clone() for k, v in model.program.state_dict().items()}
    with unchanged(query):
        extended = model.extend(query, max_steps=40, learning_rate=0.03, progress=False)

    # The reference
    after = answers(extended, adata)
    assert after.keys() == before.keys()
    for name in before:
        if before[name].dtype == "category":
            assert after[name].equals(before[name])
        else:
            np.testing.assert_allclose(after[name], before[name], atol=1e-6, rtol=1e-6, err_msg=name)
    assert all(torch.equal(value, weights[name]) for name, value in model.program.state_dict().items())

    # The new batches
    assert extended.program.schema.batches == ("batch_0", "batch_1", "fresh", "other")
    start = model.extend(query, max_steps=1, learning_rate=1e-12, progress=False)
    assert extended.elbo(query, n_samples=20).mean() > start.elbo(query, n_samples=20).mean() + 0.01
    assert all(parameter.requires_grad for parameter in extended.program.parameters())

    # The file
    extended.save(tmp_path / "model")
    loaded = scvae.load(tmp_path / "model")
    for name, value in answers(extended, query).items():
        np.testing.assert_array_equal(answers(loaded, query)[name], value)


def test_weights_of_a_new_batch_start_at_the_mean_of_the_known_ones(adata, query, fit):
    model = fit(adata, batch_key="batch", dispersion="gene-batch", **KEYS)
    extended = model.extend(query, max_steps=1, learning_rate=1e-12, progress=False)
    old, new = (deviations_of(each.program) for each in (model, extended))
    assert len(new) == len(old) > 4
    for a, b in zip([*old, model.program.decoder.log_theta], [*new, extended.program.decoder.log_theta], strict=True):
        assert len(b) == len(a) + 2
        torch.testing.assert_close(b[2:4], a[:2].mean(0).expand(2, -1))
        assert torch.equal(b[:2], a[:2])
        assert torch.equal(b[4:], a[2:])


def test_the_smaller_the_scale_of_their_prior_the_nearer_they_stay(adata, query, model):
    moved = []
    for scale in (0.01, 0.5):
        extended = model.extend(query, max_steps=100, deviation_scale=scale, progress=False)
        offsets = extended.program.decoder.w.covariates.detach()
        moved.append(float((offsets[2:] - offsets[:2].mean(0)).square().mean().sqrt()))
    assert moved[0] < 0.02 < moved[1]


@pytest.mark.parametrize("program", ["zinb", "vq"])
def test_the_prior_of_the_library_size_is_that_of_their_own_cells(adata, query, fit, program):
    model = fit(adata, program=program, batch_key="batch")
    extended = model.extend(query, max_steps=1, progress=False).program
    log_l = np.log(query.X.sum(1).A1)
    for k, own in ((2, log_l[:15]), (3, log_l[15:])):
        assert float(extended.m[k]) == pytest.approx(own.mean(), abs=1e-5)
        assert float(extended.v[k]) == pytest.approx(own.var(), abs=1e-5)
    assert torch.equal(extended.m[[0, 1, 4]], model.program.m)
    assert torch.equal(extended.v[[0, 1, 4]], model.program.v)


def test_an_effect_of_a_new_batch_is_learnt(fit):
    adata = scvae.datasets.simulated_batches(n_cells=600, n_genes=40, n_types=2, n_batches=2, library_size=300, seed=1)
    query = adata[:200].copy()
    query.obs["batch"] = "new"
    model = fit(adata[200:].copy(), batch_key="batch", max_epochs=40)
    lost = query.copy()
    lost.X = lost.X.multiply(np.arange(40) >= 5).tocsr()  # five genes that this batch never has
    extended = model.extend(lost, progress=False)
    as_of_new = extended.denoise(query, batch="new")[:, :5].mean()
    as_of_known = extended.denoise(query, batch=["batch_0", "batch_1"])[:, :5].mean()
    assert as_of_new < 0.3 * as_of_known


def test_cells_of_known_batches_in_the_query_are_left_alone(adata, query, model):
    both = anndata.concat([adata, query], index_unique="-")
    extended, other = (model.extend(each, max_steps=10, progress=False) for each in (query, both))
    assert extended.course.n_cells == other.course.n_cells == 40
    assert np.array_equal(extended.embed(query), other.embed(query))


def test_a_model_can_be_extended_again(adata, query, model):
    once = model.extend(query[:15], max_steps=10, progress=False)
    twice = once.extend(query, max_steps=10, progress=False)
    assert twice.program.schema.batches == ("batch_0", "batch_1", "fresh", "other")
    assert twice.course.n_cells == 25
    assert np.allclose(twice.embed(query[:15]), once.embed(query[:15]), atol=1e-6)
    assert np.allclose(twice.embed(adata), model.embed(adata), atol=1e-6)


def test_the_same_seed_gives_the_same_model_and_the_process_is_left_alone(query, model, process_unchanged):
    with process_unchanged():
        one, two, other = (model.extend(query, max_steps=10, seed=s, progress=False).embed(query) for s in (0, 0, 1))
    assert np.array_equal(one, two)
    assert not np.allclose(one, other)


def test_batches_may_be_in_another_column_of_the_query(query, model):
    expected = model.extend(query, max_steps=10, progress=False)
    moved = query.copy()
    moved.obs["run"] = moved.obs.pop("batch")
    extended = model.extend(moved, batch_key="run", max_steps=10, progress=False)
    assert extended.program.schema == expected.program.schema
    assert np.array_equal(extended.embed(query), expected.embed(query))


def test_batches_of_several_columns(adata, query, fit):
    model = fit(adata, batch_key=["batch", "donor"])
    extended = model.extend(query, max_steps=5, progress=False)
    n_known = len(model.program.schema.batches)
    assert extended.program.schema.batches[:n_known] == model.program.schema.batches
    assert "fresh / ada" in extended.program.schema.batches
    assert np.allclose(extended.embed(adata), model.embed(adata), atol=1e-6)
    with pytest.raises(ValueError, match=r"batch_key names 1 columns; the model has 2, \('batch', 'donor'\)"):
        model.extend(query, batch_key="batch")


def test_the_model_says_what_it_is(query, model):
    extended = model.extend(query, max_steps=10, progress=False)
    assert repr(extended).startswith("Fitted 'zinb': 40 cells × 24 genes, 4 batches of 'batch'")
    assert extended.training["seed"] == 0
    assert extended.key_added == model.key_added


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (lambda q: q, {"batch_key": "plate"}, KeyError, "adata.obs has no column 'plate'"),
        (
            lambda q: q,
            {"batch_key": ["batch", "donor"]},
            ValueError,
            "batch_key names 2 columns; the model has 1, 'bat",
        ),
        (lambda q: q, {"max_steps": 0}, ValueError, "max_steps is a whole number of at least 1, not 0"),
        (lambda q: q, {"learning_rate": -1}, ValueError, "learning_rate is a number above 0, not -1"),
        (lambda q: q[:1], {}, ValueError, r"Only one cell is of a new batch.*unknown_batch='marginal'"),
        (lambda q: q[:, :20], {}, ValueError, "The AnnData lacks 4 genes"),
        (lambda q: q.X, {}, TypeError, "adata is an AnnData, not a csr_matrix"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused(query, model, change, options, error, message):
    with pytest.raises(error, match=message):
        model.extend(change(query), progress=False, **options)


def test_a_model_that_has_nothing_to_learn_says_so(adata, query, model, fit, poisson_factors):
    with pytest.raises(ValueError, match="knows all batches of these cells, it has 'batch_0', 'batch_1'.*transform"):
        model.extend(adata)
    with pytest.raises(ValueError, match="fitted without batch_key: .* there is nothing to learn"):
        fit(adata).extend(query)
    own = scvae.fit(adata, poisson_factors, batch_key="batch", max_epochs=1, progress=False)
    with pytest.raises(ValueError, match="'poisson_factors' has no weights of single batches"):
        own.extend(query)
    model_of_donors = fit(adata, batch_key="batch", categorical_covariate_keys=["donor"])
    with pytest.raises(ValueError, match="batch_key='donor' is another covariate of the model"):
        model_of_donors.extend(query, batch_key="donor")
    query.obs["batch"] = query.obs["batch"].where(query.obs["batch"] != "other")
    with pytest.raises(ValueError, match=r"adata.obs\['batch'\] is missing \(NaN\) in 25 cells"):
        model.extend(query)
