"""Minibatches go once through all cells and hold what belongs to them."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse, special

import scvae.data.cells
from scvae.data.cells import Cells, Schema
from scvae.data.order import n_minibatches
from scvae.data.reading import read_cells, read_schema
from scvae.inference.evidence import elbo
from scvae.programs import ZINB

# ---- Minibatches -------------------------------------------------------------------------------------------


@given(n=st.integers(2, 400), size=st.integers(2, 150), data=st.data())
@settings(max_examples=60, deadline=None)
def test_minibatches_go_once_through_all_cells_in_even_parts_without_a_lone_cell(n, size, data):
    x = sparse.random(n, 5, 0.3, format="csr", random_state=n, dtype=np.float32)
    x = np.ceil(x.toarray())
    x[:, 0] = np.arange(1, n + 1)
    x = sparse.csr_matrix(x)
    cells = Cells(x.astype(np.float32), np.empty((n, 0), int), np.empty((n, 0)), Schema(tuple("abcde")))
    chosen = data.draw(st.none() | st.lists(st.integers(0, n - 1), min_size=2, unique=True).map(torch.tensor))
    seen, sizes = [], []
    for rows, batch in cells.minibatches(size, chosen):
        assert np.array_equal(batch.counts.dense().numpy(), x[rows.numpy()].toarray())
        seen += rows.tolist()
        sizes.append(len(batch))
    wanted = list(range(n)) if chosen is None else chosen.tolist()
    assert seen == wanted
    assert len(sizes) == n_minibatches(len(wanted), size)
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 2
    assert max(sizes) <= max(size, 3)


def test_a_minibatch_is_what_its_cells_are_in_the_anndata(adata):
    schema = read_schema(
        adata,
        batch_key="batch",
        categorical_covariate_keys=["donor", "batch"],
        continuous_covariate_keys=["age"],
        size_factor_key="size",
    )
    rows = torch.tensor([5, 2, 2, 40])
    batch = read_cells(adata, schema).batch(rows)
    here = adata[rows.numpy()]
    counts = here.X.toarray()
    assert np.array_equal(batch.counts.dense(), counts)
    assert np.array_equal(batch.counts.values, counts[counts > 0])
    assert np.allclose(batch.counts.log_factorial, special.gammaln(counts + 1.0).sum(1), rtol=1e-7)
    assert np.array_equal(batch.library_size, counts.sum(1))
    assert np.array_equal(batch.s, adata.obs["batch"].cat.codes.iloc[rows])
    one_hot = pd.get_dummies(adata.obs[["batch", "donor"]]).to_numpy(dtype=np.float32)[rows]
    assert np.array_equal(batch.covariates[:, :5], one_hot)
    age = (here.obs["age"] - adata.obs["age"].mean()) / adata.obs["age"].std(ddof=0)
    assert np.allclose(batch.covariates[:, 5], age, atol=1e-6)
    assert np.allclose(batch.size_factor, here.obs["size"])
    assert len(batch) == 4


@pytest.mark.parametrize("surplus", [0, 1, 57])
def test_padding_counts_for_nothing(adata, surplus):
    schema = read_schema(adata, batch_key="batch")
    cells = read_cells(adata, schema)
    rows = torch.tensor([5, 2, 79, 40])
    plain = cells.batch(rows)
    n_nonzero = len(plain.counts.values) + surplus
    padded = cells.batch(rows, n_nonzero, padded=True)
    assert len(padded.counts.values) == n_nonzero
    assert torch.equal(padded.counts.dense(), plain.counts.dense())
    assert torch.equal(padded.counts.offsets, plain.counts.offsets)
    assert torch.equal(padded.library_size, plain.library_size)
    program = ZINB(schema, n_hidden=8)
    program.initialise(cells)
    answers = []
    for batch in (plain, padded):
        program.zero_grad()
        torch.manual_seed(0)
        bound = elbo(program, batch)
        bound.sum().backward()
        gradients = {name: p.grad for name, p in program.named_parameters() if p.grad is not None}
        answers.append({"bound": bound.detach(), **gradients})
    for name, value in answers[0].items():
        assert torch.equal(answers[1][name], value), name


def test_totals_of_genes_are_the_sums_of_columns(adata):
    cells = read_cells(adata, read_schema(adata))
    rows = torch.arange(0, 80, 3)
    assert np.array_equal(cells.gene_totals(rows), adata.X[rows.numpy()].sum(0).A1)


def test_log_factorials_are_right_beyond_the_first_block(monkeypatch):
    n = (1 << 16) + 3
    x = sparse.csr_matrix(np.arange(1, n + 1, dtype=np.float32)[:, None] % 50 + 1)
    cells = Cells(x, np.empty((n, 0), int), np.empty((n, 0)), Schema(("a",)))
    assert np.allclose(cells.log_factorial, special.gammaln(x.toarray()[:, 0] + 1), atol=1e-7)


# ---- Where the counts are kept ------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_bytes", "kept_on"), [(59, "cuda"), (61, "cpu")])
def test_counts_that_would_crowd_a_gpu_are_kept_by_the_host(monkeypatch, n_bytes, kept_on):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    assert scvae.data.cells._store(torch.device("cuda"), n_bytes).type == kept_on
    assert scvae.data.cells._store(torch.device("cpu"), n_bytes).type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_a_program_cannot_tell_where_the_counts_are_kept(adata, monkeypatch):
    schema = read_schema(adata, batch_key="batch")
    here = read_cells(adata, schema, device="cuda")
    monkeypatch.setattr(scvae.data.cells, "_MAX_SHARE", 0)
    there = read_cells(adata, schema, device="cuda")
    assert here.values.is_cuda
    assert not there.values.is_cuda
    assert here.unexpressed() == there.unexpressed()
    for (_, one), (_, other) in zip(here.minibatches(32), there.minibatches(32), strict=True):
        for name in ("values", "position", "log_factorial"):
            assert torch.equal(getattr(one.counts, name), getattr(other.counts, name))
            assert getattr(other.counts, name).is_cuda
