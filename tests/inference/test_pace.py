"""The number of threads of a training follows what is measured, and no number of a fit depends on it."""

import os

import numpy as np
import pytest
import torch

import scvae
from scvae.inference import pace, svi
from scvae.inference.pace import Fixed, Pace, cores
from scvae.modules.nets import BatchNorm, Linear, LinearWithCovariates, product_of


class Machine:
    """A clock on which steps take as long as the machine makes them."""

    def __init__(self, seconds):
        self.now, self.worked, self.seconds, self.taken = 0.0, 0.0, seconds, []

    def step(self):
        n = torch.get_num_threads()
        seconds, share = self.seconds(n, len(self.taken))
        self.now, self.worked = self.now + seconds, self.worked + share * seconds
        self.taken.append(n)

    def run(self, n_steps, is_same=lambda: True, most=2):
        taker = Pace(most, is_same, clock=lambda: self.now, work=lambda: self.worked)
        for _ in range(n_steps):
            taker(self.step)
        return self.taken


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_where_two_threads_are_faster_they_are_taken():
    taken = Machine(lambda n, _: (10 / n, 1.0)).run(500)
    assert taken.count(2) > 450
    assert taken[:10] == [1] * 10


def test_where_one_thread_is_faster_it_is_taken():
    taken = Machine(lambda n, _: (10 * n, 1.0)).run(500)
    assert taken.count(2) < 25


def test_where_others_want_the_cores_more_threads_are_not_even_tried():
    asked = []
    taken = Machine(lambda n, _: (10 if n == 1 else 1000, 0.4)).run(500, is_same=lambda: asked.append(1) or True)
    assert set(taken) == {1}
    assert not asked


def test_it_notices_within_two_steps_that_others_want_the_cores_and_later_that_they_do_not():
    def seconds(n, k):
        crowded = 100 <= k < 400
        return (10, 0.4 if crowded else 1.0) if n == 1 else (1000 if crowded else 5, 1.0)

    taken = Machine(seconds).run(2000)
    assert taken[99] == 2
    assert taken[100:400].count(2) == 2
    assert taken[1000:].count(2) > 900


def test_where_the_steps_are_not_the_same_one_thread_remains():
    assert set(Machine(lambda n, _: (10 / n, 1.0)).run(300, is_same=lambda: False)) == {1}
    assert set(Machine(lambda n, _: (10 / n, 1.0)).run(300, most=1)) == {1}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "50000 100000"}, 1),
        ({"proc/self/cgroup": "0::/not/here\n", "sys/fs/cgroup/cpu.max": "300000 100000"}, 3),
        (
            {
                "proc/self/cgroup": "3:memory:/x\n2:cpu,cpuacct:/a\n",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "400000\n",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": "2:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            8,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "nonsense"}, 8),
    ],
)
def test_cores_are_those_of_the_affinity_and_of_the_quota(files, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cores(tmp_path) == expected


# ---- The same numbers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide():
    """Cells of genes enough for every operation to be shared by threads, in minibatches of an odd number."""
    adata = scvae.datasets.simulated_batches(n_cells=351, n_genes=2001, n_types=3, n_batches=2, seed=0)
    return adata[:, np.asarray(adata.X.sum(0)).ravel() > 0].copy()


OPTIONS = {
    "zinb": {},
    "nb": {"likelihood": "nb", "library": "observed"},
    "poisson": {"likelihood": "poisson"},
    "gene-cell": {"dispersion": "gene-cell"},
    "gene-batch": {"dispersion": "gene-batch"},
    "vamp": {"prior": "vamp"},
    "iaf": {"posterior": "iaf"},
    "full": {"posterior": "full"},
    "validation": {"validation_fraction": 0.2, "dropout_rate": 0.1},
    "large minibatches": {"batch_size": 351},
    "gaussian": {"program": "gaussian", "check_counts": False},
    "vq": {"program": "vq"},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_fit_is_the_same_in_one_thread_in_two_and_in_now_one_now_two(options, wide, monkeypatch):
    def fitted(n, take=None):
        torch.set_num_threads(n)
        if take is not None:
            monkeypatch.setattr(Pace, "_note", take)
        cells = wide.copy()
        model = scvae.fit(cells, batch_key="batch", max_epochs=12, progress=False, **options)
        assert torch.get_num_threads() == n
        return model, cells

    monkeypatch.setattr(pace, "cores", lambda: 2)
    monkeypatch.setattr("scvae.inference.steps._WARM_UP", 1)  # so that most steps are replayed
    (one, cells_of_one), *others = [
        fitted(1),
        fitted(2, lambda self, *_: setattr(self, "n", 2 if self.may_share else 1)),
        fitted(2, lambda self, *_: setattr(self, "n", 3 - self.n if self.may_share else 1)),
    ]
    for other, cells in others:
        assert other.history.equals(one.history)
        state = other.program.state_dict()
        assert all(torch.equal(state[name], value) for name, value in one.program.state_dict().items())
        assert np.array_equal(cells.obsm["X_scvae"], cells_of_one.obsm["X_scvae"])


def test_questions_of_many_cells_follow_what_is_measured_too_and_are_the_same(adata, fit, monkeypatch):
    model = fit(adata, batch_key="batch")
    torch.set_num_threads(1)
    expected = model.embed(adata, batch_size=5)
    seen = []
    monkeypatch.setattr(pace, "cores", lambda: 2)
    monkeypatch.setattr(
        Pace, "_note", lambda self, *_: seen.append(self.n) or setattr(self, "n", 3 - self.n if self.may_share else 1)
    )
    torch.set_num_threads(2)
    assert np.array_equal(model.embed(adata, batch_size=5), expected)
    assert len(seen) == 16
    assert torch.get_num_threads() == 2


def test_trying_the_steps_out_changes_nothing(wide, monkeypatch):
    monkeypatch.setattr(pace, "cores", lambda: 2)
    found = {}

    def ask(self, *_):
        before = {name: value.clone() for name, value in found["program"].state_dict().items()}
        training = found["program"].training
        random = torch.get_rng_state()
        self.may_share  # noqa: B018  asks once
        assert torch.equal(torch.get_rng_state(), random)
        after = found["program"].state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert found["program"].training == training

    train = svi.train
    monkeypatch.setattr(
        "scvae.fitting.train", lambda program, *a, **k: found.update(program=program) or train(program, *a, **k)
    )
    monkeypatch.setattr(Pace, "_note", ask)
    torch.set_num_threads(2)
    scvae.fit(wide.copy(), "vq", max_epochs=1, progress=False)


def test_threads_are_as_they_were_after_a_fit_that_fails(adata, breaking, fit, monkeypatch):
    monkeypatch.setattr(pace, "cores", lambda: 2)
    torch.set_num_threads(2)
    with pytest.raises(FloatingPointError):
        fit(adata, breaking, batch_key="batch", where="x")
    assert torch.get_num_threads() == 2


def test_programs_of_images_keep_the_threads_that_there_are(adata, fit, monkeypatch):
    adata.obsm["image"] = np.random.default_rng(0).uniform(size=(80, 8, 8)).astype(np.float32)
    seen = []
    monkeypatch.setattr(pace, "cores", lambda: 2)
    monkeypatch.setattr(Fixed, "__call__", lambda self, step: seen.append(torch.get_num_threads()) or step())
    torch.set_num_threads(4)
    fit(adata, "pose", image_key="image")
    assert set(seen) == {2}
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize(("n", "n_in", "n_out"), [(7, 5, 3), (117, 128, 2001), (64, 1501, 20), (1030, 30, 16)])
def test_products_in_order_are_products(n, n_in, n_out):
    torch.manual_seed(0)
    x = torch.randn(n, n_in, dtype=torch.double, requires_grad=True)
    weight = torch.randn(n_out, n_in, dtype=torch.double, requires_grad=True)
    slope = torch.randn(n, n_out, dtype=torch.double)
    ours, theirs = product_of(x, weight), x @ weight.T
    assert torch.allclose(ours, theirs)
    for a, b in zip(*(torch.autograd.grad((out * slope).sum(), (x, weight)) for out in (ours, theirs)), strict=True):
        assert torch.allclose(a, b)


@pytest.mark.parametrize("n", [3, 7, 10, 11, 31])
def test_narrow_layers_are_the_same_in_any_number_of_threads(n):
    torch.manual_seed(0)
    to, by = Linear(128, n), LinearWithCovariates(n, n, 128)
    x, covariates = torch.randn(127, 128, requires_grad=True), torch.randn(127, n)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        out = by(to(x), covariates)
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, *to.parameters(), *by.parameters()])])
    assert all(map(torch.equal, *found))


def test_covariates_add_to_a_layer():
    torch.manual_seed(0)
    layer = LinearWithCovariates(5, 3, 40).double()
    x, covariates = torch.randn(9, 5).double(), torch.randn(9, 3).double()
    expected = x @ layer.main.weight.T + layer.main.bias + covariates @ layer.covariates
    assert torch.allclose(layer(x, covariates), expected)
    slopes = [
        torch.autograd.grad(out.square().sum(), list(layer.parameters())) for out in (layer(x, covariates), expected)
    ]
    for a, b in zip(*slopes, strict=True):
        assert torch.allclose(a, b)


@pytest.mark.parametrize("training", [True, False])
def test_batch_normalisation_is_that_of_torch(training):
    torch.manual_seed(0)
    x = torch.randn(37, 12, requires_grad=True)
    ours, theirs = BatchNorm(12, eps=1e-3), torch.nn.BatchNorm1d(12, eps=1e-3)
    found = []
    for norm in (ours, theirs):
        norm.load_state_dict({**norm.state_dict(), "weight": torch.linspace(1, 2, 12), "bias": torch.ones(12)})
        norm.train(training)
        out = norm(x)
        found.append([out, *torch.autograd.grad(out.square().sum(), (x, norm.weight, norm.bias))])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.allclose(a, b)
