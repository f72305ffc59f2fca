"""The training loop keeps its promises for any budget, and however it ends."""

import math
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from anndata import AnnData, read_h5ad

import scvae
from scvae.boundary import signals
from scvae.boundary.process import seeded
from scvae.data.reading import read_cells, read_schema
from scvae.inference import evidence, steps, svi
from scvae.inference.shrinkage import LearntDecays, bound_and_slopes
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
    training = Training(max_epochs, batch_size, kl_weight=kl_weight, kl_warmup=kl_warmup, validation_fraction=0)
    train(program, cells, training, progress=False)
    n_steps = max_epochs * math.ceil(80 / batch_size)
    assert len(kl_weights) == n_steps
    assert kl_weights[-1] == pytest.approx(kl_weight, rel=1e-5)
    steps = np.arange(1, n_steps + 1)
    level = min(round(0.7 * n_steps), n_steps - 1)
    expected = kl_weight * np.minimum(1, steps / max(1, kl_warmup * n_steps))
    expected *= (1 + np.maximum(0, (steps - level) / (n_steps - level))) / 2
    assert np.allclose(kl_weights, expected, rtol=1e-5)


def test_every_cell_is_seen_once_an_epoch_and_held_out_ones_when_the_rate_falls(program, cells, monkeypatch):
    seen = []
    original = Step.__call__

    def step(self, rows, n_nonzero, n_cells):
        seen.append(rows.tolist())
        original(self, rows, n_nonzero, n_cells)

    monkeypatch.setattr(Step, "__call__", step)
    train(program, cells, Training(10, 15, validation_fraction=0.25), progress=False)
    level, fall = (np.bincount(np.concatenate(part), minlength=80) for part in (seen[:28], seen[28:]))
    assert sorted(set(level)) == [0, 7]  # 60 cells, four minibatches
    assert (level == 0).sum() == 20
    assert set(fall) == {2}  # 80 cells, six minibatches


def test_history_has_some_forty_evaluations_and_ends_with_the_last_step(program, cells):
    course = train(program, cells, Training(38, 32), progress=False)
    history = course.history
    assert history["step"].iloc[-1] == 38 * 3 == course.n_steps == course.n_planned
    assert 25 <= len(history) <= 50
    assert np.allclose(np.subtract(history["log_likelihood"], history["kl"]), history["elbo"])
    assert course.stopped == "finished"
    assert np.mean(history["elbo"].iloc[-5:]) > np.mean(history["elbo"].iloc[:5])
    held_out = history["step"] < 0.7 * course.n_steps
    assert (history["validation_elbo"].notna() == held_out).all()
    assert not program.training


def test_the_rate_rises_is_level_and_falls(program, cells, monkeypatch):
    rates, weights = [], []
    original = Step.__call__

    def step(self, *args):
        rates.append(float(self.rate))
        weights.append(float(self.kl_weight))
        original(self, *args)

    monkeypatch.setattr(Step, "__call__", step)
    training = Training(100, 128, learning_rate=0.02, kl_weight=3.0, kl_warmup=0.2, kl_level=0.4)
    train(program, cells, training, progress=False)
    rates, weights = np.array(rates), np.array(weights)
    assert np.allclose(rates[:5], 0.02 * np.arange(1, 6) / 5)
    assert np.allclose(rates[5:70], 0.02)
    assert np.allclose(rates[70:], 0.01 * (1 + np.cos(np.pi * np.arange(30) / 30)))
    assert np.allclose(weights[:20], 1.2 * np.arange(1, 21) / 20)
    assert np.allclose(weights[20:70], 1.2)
    assert np.allclose(weights[70:], 1.2 + 1.8 * np.arange(1, 31) / 30)


def scripted(monkeypatch, bounds):
    """Let the bounds of the held-out cells be these."""
    bounds = iter(bounds)
    monkeypatch.setattr(svi, "bound_and_slopes", lambda *a: (next(bounds), torch.zeros(len(a[3]))))


def test_the_level_stretch_ends_when_the_bound_stops_rising_beyond_its_noise(program, cells, monkeypatch):
    rising = [-10 / (k + 1) for k in range(60)]
    scripted(monkeypatch, [*rising, *[-0.1 + 0.02 * (-1) ** k for k in range(40)]])
    training = Training(batch_size=40, min_steps=40, max_steps=1000, patience=5)
    course = train(program, cells, training, progress=False)
    assert course.stopped == "converged"
    n_level = course.history["validation_elbo"].notna().sum()
    assert 60 < n_level <= 70
    assert course.n_steps == course.n_planned == round(n_level / 0.7)


def test_a_bound_that_always_rises_is_followed_to_the_last_step(program, cells, monkeypatch):
    scripted(monkeypatch, range(1000))
    course = train(program, cells, Training(batch_size=40, min_steps=20, max_steps=90, patience=2), progress=False)
    assert (course.stopped, course.n_steps) == ("finished", 90)


def test_a_bound_that_never_rises_is_followed_for_the_fewest_steps(program, cells, monkeypatch):
    scripted(monkeypatch, [-float(k) for k in range(1000)])
    course = train(program, cells, Training(batch_size=40, min_steps=50, patience=2), progress=False)
    assert (course.stopped, course.n_steps) == ("converged", round(36 / 0.7))  # at an evaluation, every two steps


def test_without_held_out_cells_the_bound_of_the_training_cells_decides(program, cells):
    training = Training(batch_size=40, min_steps=50, max_steps=2000, patience=3, validation_fraction=0)
    course = train(program, cells, training, progress=False)
    assert course.stopped == "converged"
    assert 50 <= course.n_steps < 2000
    assert "validation_elbo" not in course.history
    assert not program.training


def test_whether_a_bound_has_stopped_rising():
    assert not svi._has_stopped([1, 2, 3], 2)
    assert not svi._has_stopped([1, 2, 3, 4], 2)
    assert svi._has_stopped([3, 4, 3, 4], 2)
    assert svi._has_stopped([1, 2, 9, 9, 1, 2, 3, 4], 2)
    assert svi._has_stopped([1, 1], 1)
    assert not svi._has_stopped([1, 2], 1)


# ---- Decay ------------------------------------------------------------------------------------------------


def test_the_slopes_are_those_of_finite_differences(program, cells):
    rows = torch.arange(30)
    weights = [*program.decayed(), *program.deviations()]
    with torch.no_grad():
        for matrix in weights:
            matrix.add_(0.1 * torch.randn_like(matrix))
    bound, slopes = bound_and_slopes(program, cells, rows, weights)
    with seeded(0, torch.device("cpu")), torch.no_grad():
        program.eval()
        assert bound == pytest.approx(float(evidence.elbo(program, cells.batch(rows)).mean()), rel=1e-5)
    for matrix, slope in zip(weights, slopes.tolist(), strict=True):
        around = []
        for scale in (1.1, 1 / 1.1):
            before = matrix.detach().clone()
            with torch.no_grad():
                matrix.mul_(scale)
            around.append(-bound_and_slopes(program, cells, rows, weights)[0])
            with torch.no_grad():
                matrix.copy_(before)
        assert slope == pytest.approx((around[0] - around[1]) / (2 * np.log(1.1)), rel=0.05, abs=2e-3)


def test_rates_of_decay_follow_the_slopes():
    rates = torch.tensor([1.0, 1.0, 0.0])
    learnt = LearntDecays(rates)
    for k in range(10):
        learnt.update(torch.tensor([2.0, -3e-4, (-1.0) ** k]))
    assert learnt.rates is rates
    assert rates.tolist() == pytest.approx([np.exp(1.5), np.exp(-1.5), 1e-3], rel=0.3)
    for _ in range(200):
        learnt.update(torch.tensor([2.0, -3e-4, 0.0]))
    assert rates[:2].tolist() == pytest.approx([20, 1e-3])


@pytest.mark.slow
def test_what_batches_add_is_held_back_where_it_is_noise_and_kept_where_it_is_not():
    """Two batches of the same kind of cells: differences of genes are noise, unless they are planted."""

    def difference(scale, **options):
        rng = np.random.default_rng(0)
        planted = scale * rng.normal(size=(2, 100))
        batch = rng.integers(2, size=300)
        adata = AnnData(rng.poisson(2 * np.exp(planted)[batch]).astype(np.float32))
        adata.obs["batch"] = batch.astype(str)
        options |= {"n_latent": 2, "n_hidden": 16, "min_steps": 1000, "max_steps": 1000, "progress": False}
        model = scvae.fit(adata, batch_key="batch", **options)
        zero, one = (np.log(model.denoise(adata, batch=name)).mean(0) for name in "01")
        return one - zero, planted[1] - planted[0]

    wide, narrow = (np.std(difference(0.0, deviation_scale=scale)[0]) for scale in (10.0, 0.05))
    assert narrow < 0.8 * wide
    found, planted = difference(1.0)
    slope, _ = np.polyfit(planted, found, 1)
    assert slope == pytest.approx(1, abs=0.1)
    assert np.corrcoef(planted, found)[0, 1] > 0.98


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
        training = Training(max_epochs=20, batch_size=32, weight_decay=weight_decay, validation_fraction=0)
        train(program, cells, training, progress=False)
        norms.append(program.decoder.w.main.weight.norm().item())
    assert norms[1] < 0.5 * norms[0]


# ---- Held-out cells ----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("where", ["_evaluate", "advance"])
def test_ctrl_c_within_a_step_waits_until_the_step_is_done(adata, monkeypatch, where):
    real, seen = getattr(svi.Run, where), []

    def interrupted(self, *rest):
        seen.append(self.step.taken)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)  # here a handler would be called
            seen.append("went on")
        return real(self, *rest)

    monkeypatch.setattr(svi.Run, where, interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        model = scvae.fit(adata, batch_key="batch", n_latent=2, n_hidden=8, validation_fraction=0.2, progress=False)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert model.stopped == "interrupted"
    assert seen[-1] == "went on"
    assert model.course.n_steps == (3 if where == "advance" else seen[2])
    assert np.array_equal(adata.obsm["X_scvae"], model.embed(adata))


def test_a_handler_of_the_callers_is_called_after_the_step(adata, unchanged, monkeypatch):
    real, seen = svi.Run.advance, []

    def ended(self, pace):
        if self.step.taken == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        real(self, pace)
        seen.append(self.step.taken)

    def stop(number, _):
        raise SystemExit(128 + number)

    monkeypatch.setattr(svi.Run, "advance", ended)
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with unchanged(adata), pytest.raises(SystemExit, match="143"):
            scvae.fit(adata, batch_key="batch", n_latent=2, n_hidden=8, max_epochs=50, progress=False)
        assert signal.getsignal(signal.SIGTERM) is stop
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [1, 2, 3]


def test_a_handler_that_returns_is_called_once_in_a_step_that_takes_long(adata, monkeypatch):
    monkeypatch.setattr(signals, "_PATIENCE", 0.05)
    real, handled = svi.Run.advance, []

    def slow(self, pace):
        if self.step.taken == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)
            assert handled == [signal.SIGTERM]
        real(self, pace)

    monkeypatch.setattr(svi.Run, "advance", slow)
    before = signal.signal(signal.SIGTERM, lambda number, _: handled.append(number))
    try:
        model = scvae.fit(adata, batch_key="batch", n_latent=2, n_hidden=8, max_epochs=5, progress=False)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert model.stopped == "finished"
    assert handled == [signal.SIGTERM]


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
