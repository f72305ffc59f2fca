"""What is compiled: series beside mpmath, minibatches beside SciPy, and compilation where nothing can be kept on disk.

The log density is tested in ``test_counts.py``, beside the other ways to compute it.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
from mpmath import mp, mpf
from scipy import sparse

from scvae.kernels import loops

REALS = {
    "single": (
        np.float32,
        loops._exp,
        lambda x: loops._sum_of_logs(np.array([x])),
        loops._log1p,
    ),
    "double": (np.float64, loops._exp_double, loops._log_double, loops._log1p_double),
}


@pytest.mark.parametrize("precision", REALS)
def test_exponential_and_logarithm_are_right_to_a_few_roundings(precision):
    real, exp, log, log1p = REALS[precision]
    limits = np.finfo(real)
    rng = np.random.default_rng(0)
    ends = np.log(limits.tiny), np.log(limits.max) - np.log(4)
    exponents = np.append(rng.uniform(*ends, 500), [0, 1, -1, 1e-9]).astype(real)
    positive = np.exp(exponents.astype(np.longdouble)).astype(real)
    with mp.workdps(40):
        for ours, theirs, at in ((exp, mp.exp, exponents), (log, mp.log, positive), (log1p, mp.log1p, positive)):
            for x in at:
                exact = theirs(mpf(float(x)))
                error = abs(mpf(float(ours(x))) - exact)
                least = mpf(float(limits.eps)) if theirs is mp.log else 0  # of log 1.0000001, whose argument is rounded
                assert error <= 4 * float(limits.eps) * abs(exact) + least, (ours, x)


@pytest.mark.parametrize("precision", REALS)
def test_far_out_they_are_zero_or_infinite_and_what_is_no_number_stays_none(precision):
    real, exp, _, log1p = REALS[precision]
    assert exp(real(-1e5)) < 1e-37
    assert exp(real(1e5)) == np.inf
    assert np.isnan(exp(real("nan")))
    assert np.isnan(log1p(real("nan")))
    assert np.isfinite(log1p(real("inf")))
    assert log1p(real(0)) == 0


def random_matrix():
    rng = np.random.default_rng(0)
    return sparse.csr_array(np.where(rng.random((30, 12)) < 0.3, rng.random((30, 12)), 0).astype(np.float32))


@pytest.mark.parametrize("index", [np.int32, np.int64])
def test_rows_of_a_matrix_are_those_that_scipy_takes(index):
    matrix = random_matrix()
    rows = np.array([3, 0, 29, 3, 17])
    arrays = matrix.data, matrix.indices.astype(index), matrix.indptr.astype(np.int64), rows
    values, cell, gene, offsets = loops.take_rows(*arrays)
    dense = np.zeros((5, 12), np.float32)
    dense[cell, gene] = values
    assert np.array_equal(dense, matrix.toarray()[rows])
    assert (np.diff(cell) >= 0).all()
    assert np.array_equal(offsets, np.searchsorted(cell, range(6)))
    assert [len(part) for part in loops.take_rows(*arrays[:3], rows[:0])] == [0, 0, 0, 1]
    for wrong in (30, -1):
        with pytest.raises(IndexError, match="row is asked for that there is not"):
            loops.take_rows(*arrays[:3], np.array([0, wrong]))


def test_logarithms_are_added_up_whatever_there_are_of_them():
    rng = np.random.default_rng(0)
    for n in (0, 1, 127, 128, 129, 2000):
        for x in (rng.uniform(0.5, 1, n), np.full(n, 1.4142), np.full(n, 0.7072), np.exp(rng.uniform(-80, 80, n))):
            x = x.astype(np.float32)
            exact = np.log(x.astype(np.float64))
            assert loops._sum_of_logs(x) == pytest.approx(exact.sum(), abs=1e-7 * (n + np.abs(exact).sum()))
    assert np.isnan(loops._sum_of_logs(np.array([1, np.nan, 2], np.float32)))


def test_columns_of_a_matrix_are_those_of_scipy():
    matrix = random_matrix()
    columns, offsets = matrix.indices.astype(np.int64), matrix.indptr.astype(np.int64)
    expected = matrix.tocsc()
    for ours, theirs in zip(
        loops.by_column(columns, offsets, matrix.data, 12),
        (expected.indptr, expected.indices, expected.data),
        strict=True,
    ):
        assert np.array_equal(ours, theirs)
    with pytest.raises(IndexError, match="column that there is not"):
        loops.by_column(columns, offsets, matrix.data, 11)


def test_where_nothing_can_be_kept_on_disk_it_is_compiled_all_the_same(monkeypatch):
    njit = loops.njit

    def refuse(*, cache=False, **settings):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**settings)

    monkeypatch.setattr(loops, "njit", refuse)
    assert loops._kept(lambda x: x + 1)(1) == 2


@pytest.mark.parametrize("cause", [KeyboardInterrupt(), SystemExit(143), None])
def test_what_is_raised_while_results_are_handed_over_is_raised(monkeypatch, cause):
    def broken(_):
        inner, outer = SystemError("returned a result with an exception set"), SystemError("again")
        inner.__cause__, outer.__cause__ = cause, inner
        raise outer

    monkeypatch.setattr(loops, "njit", lambda **_: lambda function: function)
    with pytest.raises(SystemError if cause is None else type(cause)):
        loops._kept(broken)(1)


def test_whether_loops_are_compiled_is_told_by_what_is_kept_on_disk(tmp_path):
    code = "from scvae.kernels import loops; print(loops.are_compiled())"
    fit = (
        "import scvae; a = scvae.datasets.simulated_batches(20, 8, seed=0); "
        "scvae.fit(a, n_latent=2, n_hidden=4, max_epochs=1, device='cpu')"
    )

    def run(code):
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)

    assert run(code).stdout.strip() == "False"
    first = run(fit).stderr
    assert "scvae: compiling, once after an installation" in first
    assert first.count("scvae: zinb, 20 cells × 8 genes, on cpu") == 1
    assert run(code).stdout.strip() == "True"
    assert "compiling" not in run(fit).stderr
