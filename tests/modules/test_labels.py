"""Labels in the mixture prior: its density, what is learnt of labels, and what a fit makes of them."""

import json
import math

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from pyro import poutine
from scipy import special, stats

import scvae
from scvae.data.cells import Schema
from scvae.data.reading import read_cells, read_schema
from scvae.inference import evidence
from scvae.modules import priors
from scvae.modules.priors import LabelledMixturePrior, MixturePrior
from scvae.programs import PROGRAMS

PROGRAM_NAMES = ["zinb", "gaussian"]


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def labelled(adata):
    """Cells of which a third have a label, two of them a wrong one."""
    given = adata.obs["cell_type"].astype(str).to_numpy(dtype=object)
    given[np.arange(80) % 3 > 0] = "Unknown"
    adata.obs["given"] = given
    return adata


def drawn(n_latent=2, n_components=5, n_labels=3):
    """A prior with weights, tables and an error rate of all sorts, in double precision."""
    prior = LabelledMixturePrior(n_latent, n_components, n_labels=n_labels).double()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.normal_()
        prior.table.copy_(torch.rand(n_components, n_labels).double().softmax(1))
        prior.error.fill_(0.2)
    return prior.requires_grad_(False)


# ---- The density ---------------------------------------------------------------------------------------------


def test_the_joint_density_of_latent_and_label_is_the_sum_over_components_and_right_labels():
    prior = drawn()
    z = torch.randn(7, 2).double()
    weights, loc, scale = special.softmax(prior.logits.numpy()), prior.loc.numpy(), np.exp(prior.log_scale.numpy())
    for given in range(3):
        total = np.zeros(7)
        for c in range(5):
            for right in range(3):
                says = 0.8 if right == given else 0.1
                density = stats.norm.pdf(z.numpy(), loc[c], scale[c]).prod(1)
                total += weights[c] * density * prior.table[c, right].item() * says
        ours = prior(None).log_prob(z) + prior.given(z).log_prob(torch.full((7,), given))
        assert np.allclose(ours, np.log(total))


def test_probabilities_of_labels_are_those_of_bayes_and_hold_for_draws():
    prior = drawn()
    n = 400_000
    component = torch.distributions.Categorical(logits=prior.logits).sample((n,))
    z = torch.normal(prior.loc[component], prior.log_scale[component].exp())
    right = torch.distributions.Categorical(prior.table[component]).sample()
    probability = prior.probability(z)
    assert torch.allclose(probability.sum(1), torch.ones(n).double())
    for label in range(3):
        for low in (0.2, 0.3, 0.4):
            here = (probability[:, label] > low) & (probability[:, label] < low + 0.1)
            if here.sum() > 2000:
                share = (right[here] == label).double().mean()
                assert share == pytest.approx(probability[here, label].mean().item(), abs=4 / math.sqrt(here.sum()))


def test_over_a_posterior_the_probabilities_are_averaged():
    prior = drawn()
    z, std = torch.randn(4, 2).double(), 0.3 * torch.rand(4, 2).double()
    draws = z + std * torch.randn(20_000, 4, 2).double()
    expected = torch.stack([prior.probability(draws[:, i]).mean(0) for i in range(4)])
    assert torch.allclose(prior.probability(z, std), expected, atol=0.05)
    assert torch.allclose(prior.probability(z, 0 * std), prior.probability(z))


def test_a_single_label_is_certain():
    prior = drawn(n_labels=1)
    z = torch.randn(3, 2).double()
    assert torch.allclose(prior.probability(z), torch.ones(3, 1).double())
    assert torch.allclose(prior.given(z).log_prob(torch.zeros(3)), torch.zeros(3).double())


# ---- What is learnt of labels --------------------------------------------------------------------------------


def three_groups(n=600, wrong=0.1):
    """A prior with a component at each of three groups far apart, a spare one, and labels, some of which are wrong."""
    prior = LabelledMixturePrior(2, 4, n_labels=3)
    centres = torch.tensor([[0.0, 0.0], [20.0, 0.0], [0.0, 20.0], [20.0, 20.0]])
    with torch.no_grad():
        prior.loc.copy_(centres)
    right = torch.randint(3, (n,))
    z = centres[right] + torch.randn(n, 2)
    is_wrong = torch.rand(n) < wrong
    y = torch.where(is_wrong, (right + torch.randint(1, 3, (n,))) % 3, right)
    return prior, z, y, is_wrong


def test_the_rate_of_errors_is_found_and_the_components_belong_to_the_right_labels():
    prior, z, y, is_wrong = three_groups(wrong=0.15)
    prior.assign(prior.mean_responsibilities(z, torch.full_like(z, 0.1)), y)
    assert prior.error.item() == pytest.approx(is_wrong.float().mean().item(), abs=0.03)
    assert (prior.table[:3].diagonal() > 0.97).all()
    assert torch.allclose(prior.table.sum(1), torch.ones(4))


def test_a_component_without_labelled_cells_has_the_shares_of_all():
    prior, z, y, _ = three_groups()
    prior.shares.copy_(torch.tensor([0.5, 0.3, 0.2]))
    prior.assign(prior.mean_responsibilities(z, torch.full_like(z, 0.1)), y)
    assert torch.allclose(prior.table[3], prior.shares, atol=1e-3)


def test_labels_that_are_all_right_have_hardly_an_error():
    prior, z, y, _ = three_groups(wrong=0)
    prior.assign(prior.mean_responsibilities(z, torch.full_like(z, 0.1)), y)
    assert prior.error < 0.02


def test_of_a_label_that_errors_alone_bear_no_component_is_made():
    prior, z, y, _ = three_groups(wrong=0)
    y = torch.where(y == 2, 1, y)
    y[:2] = 2  # two cells, of whatever group
    prior.assign(prior.mean_responsibilities(z, torch.full_like(z, 0.1)), y)
    assert prior.probability(z).argmax(1).unique().tolist() == [0, 1]


def test_shares_and_rate_are_a_fixed_point_of_em_as_counted_one_by_one(monkeypatch):
    monkeypatch.setattr(priors, "_N_ITERATIONS", 300)
    prior, z, y, _ = three_groups(n=150, wrong=0.2)
    prior.shares.copy_(y.bincount(minlength=3) / len(y))
    r = prior.mean_responsibilities(z, torch.full_like(z, 2.0))
    prior.assign(r, y)
    table, error = prior.table.double().numpy(), prior.error.item()
    true, n_wrong = np.zeros((4, 3)), 0.0
    for cell, given in zip(r.detach().double().numpy(), y.tolist(), strict=True):
        joint = np.array(
            [[cell[c] * table[c, l] * (1 - error if l == given else error / 2) for l in range(3)] for c in range(4)]
        )
        joint /= joint.sum()
        true += joint
        n_wrong += joint.sum() - joint[:, given].sum()
    around = np.maximum(prior.overlap().detach().numpy() @ true - 0.75, 0) + 0.5 * prior.shares.numpy()
    expected = np.maximum(true - 0.75, 0) + 2 * around / around.sum(1, keepdims=True)
    assert np.allclose(table, expected / expected.sum(1, keepdims=True), atol=2e-3)
    assert error == pytest.approx((n_wrong + 1) / (150 + 10), abs=2e-3)


def test_with_a_single_component_labels_have_their_shares():
    prior, z, y, _ = three_groups()
    prior = LabelledMixturePrior(2, 1, n_labels=3)
    prior.refit(z, y)
    prior.assign(prior.responsibilities(z), y)
    assert torch.allclose(prior.probability(z[:1])[0], y.bincount().float() / len(y), atol=0.05)


def test_the_components_start_at_the_labelled_cells():
    """Of a small group that k-means alone would join to a large one, labels make a component."""
    torch.manual_seed(1)
    z = torch.cat([torch.randn(600, 2), torch.randn(20, 2) * 0.1 + torch.tensor([2.5, 2.5])])
    y = torch.full((620,), -1)
    y[:20], y[600:610] = 0, 1
    prior = LabelledMixturePrior(2, 4, n_labels=2)
    prior.refit(z, y)
    labelled = y >= 0
    prior.assign(prior.responsibilities(z[labelled]), y[labelled])
    assert (prior.probability(z[610:]).argmax(1) == 1).all()


# ---- The program ---------------------------------------------------------------------------------------------


def made(adata, name, **options):
    schema = read_schema(adata, kind=PROGRAMS[name].kind, batch_key="batch", labels_key="given")
    cells = read_cells(adata, schema, with_labels=True)
    program = PROGRAMS[name](schema, n_latent=3, n_hidden=8, prior="mixture", **options)
    program.initialise(cells)
    return program, cells


@pytest.mark.parametrize("name", PROGRAM_NAMES)
def test_the_bound_has_a_term_of_the_label_in_labelled_cells_only(labelled, name):
    program, cells = made(labelled, name)
    batch = cells.batch(torch.arange(30))
    guide = poutine.trace(program.guide).get_trace(batch)
    trace = poutine.trace(poutine.replay(program.model, guide)).get_trace(batch)
    z, prior = trace.nodes["z"]["value"], program.p_z
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        log_likelihood, _ = evidence.elbo_terms(program, batch)
        torch.manual_seed(5)
        z = poutine.trace(program.guide).get_trace(batch).nodes["z"]["value"]
    has = batch.y >= 0
    assert 0 < has.sum() < 30
    expected = prior.label_weight * prior.given(z).log_prob(batch.y.clamp(min=0))
    assert torch.allclose(log_likelihood["y"][has], expected[has], atol=1e-5)
    assert (log_likelihood["y"][~has] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAM_NAMES)
@pytest.mark.parametrize("posterior", ["normal", "full", "low_rank", "iaf", "iaf_stable"])
def test_with_all_labels_hidden_the_fit_is_the_one_without_labels(adata, fit, name, posterior):
    adata.obs["hidden"] = "Unknown"
    options = {"program": name, "prior": "mixture", "posterior": posterior, "batch_key": "batch"}
    without = fit(adata, **options).program.state_dict()
    with pytest.warns(UserWarning, match=r"adata.obs\['hidden'\] names no label"):
        hidden = fit(adata, labels_key="hidden", **options).program.state_dict()
    assert without.keys() == hidden.keys()
    assert all(torch.equal(value, hidden[key]) for key, value in without.items())


@pytest.mark.parametrize("name", PROGRAM_NAMES)
@pytest.mark.parametrize("posterior", ["normal", "iaf"])
def test_labels_and_their_probabilities_are_written(labelled, fit, name, posterior, tmp_path):
    model = fit(labelled, program=name, labels_key="given", posterior=posterior, key_added="X_here")
    labels = list(model.program.schema.labels)
    assert labels == sorted(labelled.obs["cell_type"].astype(str).unique())
    probability = labelled.obsm["X_here_label_probability"]
    assert probability.shape == (80, len(labels))
    assert np.allclose(probability.sum(1), 1, atol=1e-5)
    assert list(labelled.obs["here_label"].cat.categories) == labels
    assert (labelled.obs["here_label"].astype(str) == np.array(labels)[probability.argmax(1)]).all()
    assert np.array_equal(labelled.obs["here_label_probability"], probability.max(1))
    labelled.write_h5ad(tmp_path / "cells.h5ad")
    read = anndata.read_h5ad(tmp_path / "cells.h5ad")
    pd.testing.assert_series_equal(read.obs["here_label"], labelled.obs["here_label"])


def test_labels_are_not_needed_and_not_read_when_the_model_is_asked(labelled, fit, tmp_path):
    model = fit(labelled, labels_key="given", batch_key="batch")
    model.save(tmp_path / "model")
    read = scvae.load(tmp_path / "model")
    other = labelled.copy()
    del other.obs["given"]
    read.transform(other)
    for key in ("X_scvae", "X_scvae_label_probability"):
        assert np.array_equal(other.obsm[key], labelled.obsm[key])
    pd.testing.assert_series_equal(other.obs["scvae_label"], labelled.obs["scvae_label"])
    other.obs["given"] = "what the model has never heard of"
    assert np.array_equal(read.embed(other), model.embed(labelled))
    assert np.array_equal(read.elbo(other), model.elbo(labelled))
    order = np.random.default_rng(0).permutation(80)
    read.transform(shuffled := labelled[order].copy(), key_added="X_again")
    assert np.allclose(
        shuffled.obsm["X_again_label_probability"], other.obsm["X_scvae_label_probability"][order], atol=1e-5
    )


def test_schemas_of_models_that_were_saved_before_there_were_labels_are_read(model):
    content = json.loads(json.dumps(model.program.schema.described()))
    for field in ("labels_key", "unlabeled", "labels", "n_labelled"):
        del content[field]
    assert Schema.of(content) == model.program.schema


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAM_NAMES)
def test_labels_reach_cells_that_have_none_and_errors_are_corrected(fit, name):
    rng = np.random.default_rng(0)
    kinds = rng.integers(4, size=500)
    means = np.exp(rng.normal(size=(4, 30)))
    counts = rng.poisson(3 * means[kinds]).astype(np.float32)
    adata = anndata.AnnData(counts if name == "zinb" else np.log1p(counts))
    given = np.where(rng.random(500) < 0.2, kinds, -1)
    wrong = (given >= 0) & (rng.random(500) < 0.15)
    given[wrong] = (given[wrong] + rng.integers(1, 4, wrong.sum())) % 4
    adata.obs["given"] = pd.Series(given, index=adata.obs_names).replace(-1, np.nan).map("type {:.0f}".format)
    adata.obs.loc[given < 0, "given"] = np.nan
    model = fit(adata, program=name, labels_key="given", max_epochs=60, n_hidden=16, n_components=8)
    label = adata.obs["scvae_label"].astype(str).to_numpy()
    right = np.array([f"type {k}" for k in kinds])
    assert (label == right)[given < 0].mean() > 0.95
    assert (label == right)[wrong].mean() > 0.9
    assert model.program.p_z.error.item() == pytest.approx(wrong.sum() / (given >= 0).sum(), abs=0.08)


def test_steps_with_labels_are_replayed_from_a_recording(labelled, fit, caplog):
    with caplog.at_level("INFO", logger="scvae"):
        fit(labelled, labels_key="given", batch_key="batch", max_epochs=16)
    assert not [record for record in caplog.records if "not" in record.getMessage()]


def test_a_plain_mixture_takes_no_notice(adata, fit):
    assert type(fit(adata).program.p_z) is MixturePrior
    assert "scvae_label" not in adata.obs


# ---- What is read --------------------------------------------------------------------------------------------


def test_missing_values_the_word_for_them_and_unused_categories_are_no_labels(adata):
    column = pd.Categorical(["a", "b", None, "Unknown"] * 20, categories=["never", "b", "a", "Unknown"])
    adata.obs["given"] = column
    schema = read_schema(adata, labels_key="given")
    assert schema.labels == ("b", "a")
    assert read_cells(adata, schema, with_labels=True).y[:4].tolist() == [1, 0, -1, -1]
    assert read_cells(adata, schema).y is None
    adata.obs["given"] = pd.Series([1, 2, np.nan, 0] * 20, index=adata.obs_names)
    schema = read_schema(adata, labels_key="given", unlabeled=0)
    assert schema.labels == ("1", "2")
    assert read_cells(adata, schema, with_labels=True).y[:4].tolist() == [0, 1, -1, -1]
    assert read_schema(adata, labels_key="given", unlabeled=None).labels == ("0", "1", "2")


def test_what_makes_no_sense_is_refused_and_nothing_is_written(labelled, fit, unchanged):
    with unchanged(labelled):
        with pytest.raises(KeyError, match="adata.obs has no column 'nothing'"):
            fit(labelled, labels_key="nothing")
        with pytest.raises(ValueError, match="pass prior='mixture'"):
            fit(labelled, labels_key="given", prior="normal")
        with pytest.raises(
            ValueError, match="programs with a mixture prior, 'zinb' and 'gaussian'; 'vq' takes no labels"
        ):
            fit(labelled, program="vq", labels_key="given")
        with pytest.raises(ValueError, match="pass unlabeled='Unknown'"):
            fit(labelled, labels_key="given", unlabeled="unknown")
    labelled.obs["scvae_label"] = labelled.obs["given"]
    with unchanged(labelled), pytest.raises(ValueError, match="which the model reads: choose another"):
        fit(labelled, labels_key="scvae_label")


def test_models_with_and_without_labels_are_compared(labelled):
    configurations = {"with": {"labels_key": "given"}, "without": {}}
    table = scvae.compare(labelled, configurations, max_epochs=2, n_latent=3, n_hidden=8, n_samples=4, progress=False)
    assert len(table) == 2
