"""What the encoders of counts take: the depth of a cell is none of it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from anndata import AnnData
from scipy import sparse

import scvae
from scvae.data.reading import read_cells, read_schema
from scvae.distributions import SparseCounts
from scvae.modules.inputs import log_normalised


@pytest.fixture
def batch(adata):
    return read_cells(adata, read_schema(adata, batch_key="batch")).batch(torch.arange(20))


def test_they_are_fractions_of_the_total_on_a_logarithmic_scale(adata, batch):
    counts = adata.X[:20].toarray()
    expected = np.log1p(0.3 * 500 * counts / counts.sum(1, keepdims=True))
    found = log_normalised(batch, torch.tensor(500.0).log())
    np.testing.assert_allclose(found.dense(), expected, rtol=1e-5)
    assert (found.gene == batch.counts.gene).all()


def test_repeats_that_pad_a_minibatch_count_for_nothing(batch):
    counts = batch.counts
    last = torch.full((7,), len(batch), dtype=counts.cell.dtype)
    padded = replace(
        counts,
        values=torch.cat([counts.values, counts.values[-1].expand(7)]),
        cell=torch.cat([counts.cell, last]),
        gene=torch.cat([counts.gene, counts.gene[-1].expand(7)]),
        padded=True,
        row_offsets=None,
    )
    log_total = torch.tensor(6.0)
    found = log_normalised(replace(batch, counts=padded), log_total)
    assert torch.equal(found.values[:-7], log_normalised(batch, log_total).values)
    assert found.values.isfinite().all()


def test_genes_that_were_filled_in_count_for_the_total(batch):
    filled = batch.values + 1
    found = log_normalised(replace(batch, completed=SparseCounts.from_dense(filled)), torch.tensor(6.0))
    expected = (0.3 * filled * torch.tensor(6.0).exp() / filled.sum(1, keepdim=True)).log1p()
    torch.testing.assert_close(found.dense(), expected)


@pytest.mark.parametrize("program", ["zinb", "vq"])
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_cells_that_differ_by_their_depth_alone_have_one_place(adata, program, layers):
    model = scvae.fit(
        adata, program, batch_key="batch", n_latent=3, n_hidden=16, n_layers=layers, max_epochs=3, progress=False
    )
    deeper = adata.copy()
    deeper.X = deeper.X * 7
    np.testing.assert_allclose(model.embed(deeper), model.embed(adata), atol=1e-4)


def test_cells_of_a_tenth_of_the_depth_are_mapped_nearly_as_well():
    """No cell of the fit had such a depth; an encoder that is shown counts as they are loses a tenth of the cells."""
    adata = scvae.datasets.simulated_batches(
        n_cells=1200, n_genes=200, n_types=4, n_batches=2, library_size=2000, seed=0
    )
    reference, query = adata[:900].copy(), adata[900:].copy()
    model = scvae.fit(reference, batch_key="batch", max_epochs=40, progress=False)

    def accuracy(counts):
        cells = AnnData(sparse.csr_matrix(counts), query.obs, query.var)
        table = scvae.tl.transfer_labels(model, reference, cells, "cell_type")
        return (table["label"].astype(str) == query.obs["cell_type"].astype(str)).mean()

    counts = query.X.toarray().astype(int)
    thinned = np.random.default_rng(0).binomial(counts, 0.1)
    assert accuracy(counts) > 0.88
    assert accuracy(thinned) > accuracy(counts) - 0.06
