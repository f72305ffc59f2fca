"""Work that is shared out: all of it done, once, whoever does it; and numbers that do not depend on who did."""

import os
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch

import scvae
import scvae.modules.nets
from scvae.inference import svi
from scvae.kernels import operations, workers
from scvae.kernels.workers import available, cuts, own_threads, share


@pytest.mark.parametrize("n", [1, 2, 3])
def test_tasks_are_each_done_once_and_before_the_call_returns(n):
    with own_threads(n):
        for n_tasks in (0, 1, 2, 7, 50):
            done = []
            share([partial(done.append, k) for k in range(n_tasks)])
            assert sorted(done) == list(range(n_tasks))


def test_workers_take_part_without_gradients_and_with_one_thread_each():
    seen, everyone = {}, threading.Barrier(3)

    def task():
        everyone.wait(60)
        seen[threading.get_ident()] = torch.get_num_threads(), torch.is_grad_enabled()

    with own_threads(3):
        share([task] * 3)
    assert list(seen.values()) == [(1, False)] * 3


def test_a_worker_that_is_held_up_holds_up_nobody_but_its_own_task():
    caller, done = threading.get_ident(), []
    rest = threading.Event()

    def task(k):
        if threading.get_ident() != caller:
            rest.wait(60)
        done.append(k)
        if len(done) == 5:
            rest.set()

    with own_threads(2):
        share([partial(task, k) for k in range(6)])
    assert sorted(done) == list(range(6))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("n", [1, 3])
def test_what_a_task_raises_is_raised_when_no_other_is_at_work(error, n):
    at_work = []

    def task(k):
        if k == 2:
            raise error("no")
        at_work.append(k)
        time.sleep(0.01)
        at_work.remove(k)

    before = torch.get_num_threads()
    with own_threads(n):
        for _ in range(5):
            with pytest.raises(error, match="no"):
                share([partial(task, k) for k in range(6)])
            assert at_work == []
        done = []
        share([partial(done.append, k) for k in range(6)])  # and the workers go on
        assert sorted(done) == list(range(6))
    assert torch.get_num_threads() == before


def test_several_threads_may_share_out_at_a_time():
    sums = [0] * 3
    with own_threads(3):

        def many(k):
            for _ in range(100):
                done = []
                share([partial(done.append, i) for i in range(5)])
                sums[k] += sum(done)

        threads = [threading.Thread(target=many, args=(k,)) for k in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sums == [1000] * 3


def test_the_callers_number_of_threads_is_restored_and_the_workers_are_gone():
    for before in (2, 1):
        torch.set_num_threads(before)
        with own_threads(3):
            assert torch.get_num_threads() == 1
            with own_threads(2):
                assert torch.get_num_threads() == 1
            assert threading.active_count() >= 3
        assert torch.get_num_threads() == before
        with pytest.raises(ZeroDivisionError), own_threads():
            _ = 1 / 0
        assert torch.get_num_threads() == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("scvae-")]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_that_was_forked_does_the_tasks_itself():
    with own_threads(3):
        child = os.fork()
        if not child:
            done = []
            share([partial(done.append, k) for k in range(6)])
            with own_threads(2):
                share([partial(done.append, k) for k in range(6)])
            os._exit(0 if sorted(done) == sorted([*range(6)] * 2) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_parts_are_even_and_as_many_as_the_work_is_worth():
    for length, work, least in ((128, 256_000, 50_000), (2000, 1, 5), (3, 10**9, 1), (10**6, 10**9, 1), (0, 0, 1)):
        parts = cuts(length, work, least)
        assert [i for part in parts for i in range(length)[part]] == list(range(length))
        assert len(parts) == 1 or work / len(parts) >= least
        assert len(parts) in (1, 2, 4, 8, 16)
    assert len(cuts(128, 256_000, 50_000)) == 4


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
    assert available(tmp_path) == expected


@pytest.mark.parametrize("shape", [(128, 128, 2000), (300, 1500, 64), (3000, 100, 96)])
@pytest.mark.parametrize("with_covariates", [False, True])
def test_large_products_and_their_gradients_are_those_of_torch(shape, with_covariates):
    torch.manual_seed(0)
    n, n_in, n_out = shape
    layers = [scvae.modules.nets.LinearWithCovariates(n_in, 3 * with_covariates, n_out) for _ in range(2)]
    x, covariates = torch.randn(n, n_in, requires_grad=True), torch.randn(n, 3) if with_covariates else None
    slopes = torch.randn(2, n, n_out)
    parameters = [x, *(p for layer in layers for p in layer.parameters())]
    assert operations.is_large(x, layers[0].main.weight)
    with own_threads(3):
        results = scvae.modules.nets.together(layers, x, covariates)
        ours = torch.autograd.grad(sum((r * s).sum() for r, s in zip(results, slopes, strict=True)), parameters)
    expected = [layer.main(x) + (covariates @ layer.covariates if with_covariates else 0) for layer in layers]
    theirs = torch.autograd.grad(sum((r * s).sum() for r, s in zip(expected, slopes, strict=True)), parameters)
    for a, b in zip((*results, *ours), (*expected, *theirs), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.detach().abs().max()))


@pytest.fixture(scope="module")
def wide():
    """Cells of genes enough for every operation to be cut."""
    adata = scvae.datasets.simulated_batches(n_cells=260, n_genes=2000, n_types=3, n_batches=2, seed=0)
    return adata[:, np.asarray(adata.X.sum(0)).ravel() > 0].copy()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"likelihood": "nb"},
        {"likelihood": "nb", "dispersion": "gene-cell"},
        {"program": "gaussian", "check_counts": False},
        {"program": "vq"},
    ],
    ids=["zinb", "nb", "gene-cell", "gaussian", "vq"],
)
def test_the_numbers_of_a_fit_do_not_depend_on_threads_and_workers(options, wide, monkeypatch):
    fits, n_shared = [], []
    monkeypatch.setattr(
        workers._Pool, "share", lambda pool, tasks, f=workers._Pool.share: n_shared.append(f(pool, tasks))
    )
    for n_threads, n in ((1, 1), (2, 3), (2, 1)):
        torch.set_num_threads(n_threads)
        with own_threads(n):
            model = scvae.fit(wide.copy(), batch_key="batch", max_epochs=3, progress=False, **options)
        assert torch.get_num_threads() == n_threads
        fits.append((model.history, model.program.state_dict()))
    assert n_shared
    (history, state), *others = fits
    for other_history, other_state in others:
        assert other_history == history
        assert all(torch.equal(other_state[name], value) for name, value in state.items())


def test_training_shares_out_by_itself_and_leaves_the_threads_as_they_were(fit, adata, monkeypatch):
    within = []
    take = svi.Step.__call__
    monkeypatch.setattr(
        svi.Step, "__call__", lambda step, *given: within.append(torch.get_num_threads()) or take(step, *given)
    )
    torch.set_num_threads(2)
    fit(adata)
    assert set(within) == {1}
    assert torch.get_num_threads() == 2
