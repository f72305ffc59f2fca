"""The training loop keeps its promises for any budget, and however it ends."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from anndata import read_h5ad

import scvae
from scvae.boundary.process import seeded
from scvae.data.reading import read_cells, read_schema
from scvae.inference import evidence, steps, svi
from scvae.inference.steps import Step
from scvae.inference.svi import Training, train
from scvae.programs import ZINB

DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def cells(adata):
    return read_cells(adata, read_schema(adata, batch_key="batch"))


@pytest.fixture
def program(cells):
    with seeded(0, torch.device("cpu")):
        program = ZINB(cells.schema, n_latent=2, n_hidden=8)
        program.initialise(cells)
        yield program


@pytest.fixture
def kl_weights(monkeypatch):
    """The weight of the KL at each step, read off its gradient."""
    weights = []

    def observed(program, batch):
        log_likelihood, kl = evidence.elbo_terms(program, batch)
        if torch.is_grad_enabled():
            kl["z"].register_hook(lambda gradient: weights.append(float(gradient.sum())))
        return log_likelihood, kl

    monkeypatch.setattr(steps, "elbo_terms", observed)
    return weights


@pytest.mark.parametrize("kl_weight", [1.0, 0.25])
@pytest.mark.parametrize("kl_warmup", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("max_epochs", "batch_size"), [(1, 128), (1, 32), (2, 40), (7, 16)])
def test_the_kl_warms_up_completely_in_any_budget(
    program, cells, kl_weights, max_epochs, batch_size, kl_warmup, kl_weight
):
    train(program, cells, Training(max_epochs, batch_size, kl_weight=kl_weight, kl_warmup=kl_warmup), progress=False)
    n_steps = max_epochs * math.ceil(80 / batch_size)
    assert len(kl_weights) == n_steps
    assert kl_weights[-1] == pytest.approx(kl_weight, rel=1e-5)
    steps = np.arange(1, n_steps + 1)
    expected = kl_weight * np.minimum(1, steps / max(1, kl_warmup * n_steps))
    assert np.allclose(kl_weights, expected, rtol=1e-5)


def test_every_cell_is_seen_once_an_epoch_and_held_out_ones_never(program, cells, monkeypatch):
    seen = []
    original = Step.__call__

    def step(self, rows, n_nonzero):
        seen.extend(rows.tolist())
        original(self, rows, n_nonzero)

    monkeypatch.setattr(Step, "__call__", step)
    train(program, cells, Training(3, 16, validation_fraction=0.25), progress=False)
    times = np.bincount(seen, minlength=80)
    assert sorted(set(times)) == [0, 3]
    assert (times == 0).sum() == 20


def test_history_is_of_at_most_fifty_evaluations_and_ends_with_the_last_step(program, cells):
    course = train(program, cells, Training(38, 32, validation_fraction=0.1, patience=99), progress=False)
    history = course.history
    assert history["step"].iloc[-1] == 38 * 3 == course.n_steps == course.n_planned
    assert 25 <= len(history) <= 50
    assert np.allclose(np.subtract(history["log_likelihood"], history["kl"]), history["elbo"])
    assert course.stopped == "finished"
    assert np.mean(history["elbo"].iloc[-5:]) > np.mean(history["elbo"].iloc[:5])
    assert not program.training


@pytest.mark.parametrize(
    ("per_epoch", "epochs"), [(1, 500), (6, 83), (125, 4), (400, 4), (500, 3), (782, 2), (2000, 1), (7813, 1)]
)
def test_by_default_a_number_of_steps_decides(per_epoch, epochs):
    assert Training().epochs(per_epoch) == epochs
    assert Training(max_epochs=7).epochs(per_epoch) == 7


@pytest.mark.parametrize(("per_epoch", "epochs"), [(1, 1400), (71, 20), (600, 2), (7813, 1)])
def test_a_program_may_ask_for_more_steps_of_small_data(per_epoch, epochs):
    assert Training(min_steps=1400).epochs(per_epoch) == epochs


def test_the_decay_counts_for_less_the_more_cells_there_are():
    training = Training(weight_decay=0.5)
    assert training.decay(2) == training.decay(1500) == 0.5
    assert training.decay(15_000) == pytest.approx(0.05)


def test_only_the_weights_that_a_program_names_are_shrunk(cells):
    program = ZINB(cells.schema, n_latent=2, n_hidden=4)
    names = {id(p): name for name, p in program.named_parameters()}
    assert {names[id(p)] for p in program.decayed()} == {
        *(
            f"decoder.layers.{layer}.{i}.{end}"
            for i in range(2)
            for layer, end in (("linear", "main.weight"), ("norm", "weight"))
        ),
        "decoder.w.main.weight",
        "decoder.pi.main.weight",
    }
    norms = []
    for weight_decay in (0.0, 30.0):
        torch.manual_seed(0)
        program = ZINB(cells.schema, n_latent=2, n_hidden=4)
        program.initialise(cells)
        train(program, cells, Training(max_epochs=20, batch_size=32, weight_decay=weight_decay), progress=False)
        norms.append(program.decoder.w.main.weight.norm().item())
    assert norms[1] < 0.5 * norms[0]


# ---- Early stopping ----------------------------------------------------------------------------------------


def test_early_stopping_restores_the_best_weights(program, cells, monkeypatch):
    script, states = [-9, -5, -3, -4, -3.5, -3.1, -8], []

    def validate(program, *_):
        states.append(copy.deepcopy(program.state_dict()))
        return script[len(states) - 1]

    monkeypatch.setattr(svi, "_validate", validate)
    training = Training(50, 128, validation_fraction=0.2, patience=3, kl_warmup=0)
    course = train(program, cells, training, progress=False)
    assert course.stopped == "early"
    assert course.history["validation_elbo"].tolist() == script[:6]
    weights = program.state_dict()
    assert all(torch.equal(weights[name], states[2][name]) for name in weights)
    assert not all(torch.equal(weights[name], states[5][name]) for name in weights)


def test_training_does_not_stop_before_the_kl_has_warmed_up(program, cells, monkeypatch):
    monkeypatch.setattr(svi, "_validate", lambda *_: -1.0)
    training = Training(50, 128, validation_fraction=0.2, patience=2, kl_warmup=0.5)
    assert train(program, cells, training, progress=False).n_steps == 26


def test_the_elbo_that_stops_is_not_annealed(program, cells, monkeypatch):
    order = torch.arange(80)
    monkeypatch.setattr(svi, "_split", lambda *_: (order[:20], order[20:]))
    course = train(program, cells, Training(5, 20, kl_weight=0.01, validation_fraction=0.25), progress=False)
    with seeded(0, torch.device("cpu")), torch.no_grad():
        expected = evidence.elbo(program, cells.batch(order[:20])).mean()
    assert max(course.history["validation_elbo"]) == pytest.approx(float(expected), abs=1e-3)


def test_without_held_out_cells_the_last_weights_are_kept(program, cells):
    course = train(program, cells, Training(2, 32), progress=False)
    assert "validation_elbo" not in course.history
    assert not program.training


@pytest.mark.parametrize("n", [2, 3, 5])
def test_two_cells_at_least_are_left_to_train_on(adata, fit, n):
    cells = adata[adata.X.sum(1).A1 > 100][:n].copy()
    cells.var["mask"] = cells.X.sum(0).A1 > 0
    model = fit(cells, mask_var="mask", validation_fraction=0.99)
    assert np.isfinite(model.elbo(cells)).all()
    assert ("validation_elbo" in model.history) == (n > 2)


# ---- Interrupted -------------------------------------------------------------------------------------------


def test_ctrl_c_ends_the_training_with_a_usable_model(adata, breaking, fit, tmp_path):
    model = fit(adata, breaking, batch_key="batch", where="interrupt", max_epochs=20)
    assert model.stopped == "interrupted"
    assert model.history["step"].tolist() == [2]
    assert np.array_equal(adata.obsm["X_scvae"], model.embed(adata))
    assert np.isfinite(adata.obsm["X_scvae"]).all()
    assert adata.uns["scvae"]["stopped"] == "interrupted"
    adata.write_h5ad(tmp_path / "cells.h5ad")
    model.save(tmp_path / "model")


def test_ctrl_c_before_the_first_step_leaves_a_usable_model_too(adata, fit, monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "elbo_terms", interrupt)
    model = fit(adata, validation_fraction=0.2)
    assert model.history.empty
    assert np.isfinite(model.embed(adata)).all()
    adata.write_h5ad(tmp_path / "cells.h5ad")


def test_ctrl_c_restores_the_best_weights(program, cells, monkeypatch):
    states = []

    def validate(program, *_):
        states.append(copy.deepcopy(program.state_dict()))
        if len(states) == 4:
            raise KeyboardInterrupt
        return -float(len(states))

    monkeypatch.setattr(svi, "_validate", validate)
    course = train(program, cells, Training(50, 128, validation_fraction=0.2), progress=False)
    assert course.stopped == "interrupted"
    weights = program.state_dict()
    assert all(torch.equal(weights[name], states[0][name]) for name in weights)


# ---- Quiet, and seeded -------------------------------------------------------------------------------------


def test_without_progress_nothing_is_printed(adata, fit, capfd):
    fit(adata, batch_key="batch", validation_fraction=0.1)
    assert capfd.readouterr() == ("", "")
    fit(adata, batch_key="batch", validation_fraction=0.1, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "step 6 of 6 (100%)" in err
    assert "elbo=-" in err
    assert "validation=-" in err


def test_a_seed_holds_within_its_block_only():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with seeded(7, torch.device("cpu")):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with seeded(7, torch.device("cpu")):
        assert torch.equal(torch.rand(3), inside)


def test_a_seed_for_the_cpu_leaves_other_devices_alone(monkeypatch):
    def touched(*_):
        raise AssertionError("another device was seeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", touched)
    monkeypatch.setattr(torch.cuda, "manual_seed", touched)
    with seeded(7, torch.device("cpu")):
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_a_gpu_gives_the_same_numbers_for_the_same_seed_and_leaves_its_random_state(adata, fit):
    before = torch.cuda.get_rng_state()
    one, two = (fit(adata.copy(), batch_key="batch", device="cuda", max_epochs=5) for _ in range(2))
    assert one.device.type == "cuda"
    assert np.allclose(one.embed(adata), two.embed(adata), atol=1e-3)
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_a_loss_that_is_not_finite_is_found_on_a_gpu(adata, breaking, fit, unchanged):
    with unchanged(adata), pytest.raises(svi.NonFiniteLoss, match="at step 4, site 'x'"):
        fit(adata, breaking, batch_key="batch", device="cuda", max_epochs=40)


# ---- Real cells --------------------------------------------------------------------------------------------


def test_a_short_fit_mixes_batches_of_real_cells_better_than_principal_components():
    path = DATA / "pbmc_ifnb.h5ad"
    if not path.is_file():
        pytest.skip("needs the data set pbmc_ifnb.h5ad")
    from sklearn.decomposition import PCA
    from sklearn.neighbors import NearestNeighbors

    adata = read_h5ad(path)
    adata = adata[:, adata.var["highly_variable"]].copy()
    scvae.fit(adata, batch_key="batch", max_epochs=8, progress=False)
    scaled = np.log1p(adata.X.multiply(1e4 / adata.X.sum(1)).toarray())
    batch = adata.obs["batch"].to_numpy()

    def mixing(x):
        """Fraction of a cell's 20 nearest neighbours that are of the other batch."""
        neighbours = NearestNeighbors(n_neighbors=21).fit(x).kneighbors(x, return_distance=False)[:, 1:]
        return (batch[neighbours] != batch[:, None]).mean()

    assert mixing(adata.obsm["X_scvae"]) > 1.5 * mixing(PCA(10, random_state=0).fit_transform(scaled))
