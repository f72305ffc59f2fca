"""Cells of a store, of which a window is in memory, are to a training what cells in memory are."""

import threading
from itertools import islice

import anndata
import numpy as np
import pytest
import torch
from scipy import sparse

from scvae.boundary.process import alone
from scvae.data.cells import Cells
from scvae.data.order import n_minibatches
from scvae.data.reading import read_cells, read_schema
from scvae.data.shuffling import shuffled
from scvae.data.stored import StoredCells, cells_of
from scvae.inference.svi import NonFiniteLoss, Training, train
from scvae.programs import ZINB

HOW = {"batch_key": "batch", "labels_key": "cell_type", "unlabeled": "type_0", "size_factor_key": "size"}
HOW |= {"continuous_covariate_keys": ["age"], "categorical_covariate_keys": ["donor"]}
N, SIZE, MEMORY = 1500, 8, 10**8


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """An AnnData of 1,500 cells with all that a model may read, and its store."""
    rng = np.random.default_rng(0)
    counts = rng.negative_binomial(1, 0.4, (N, 12))
    counts[:, 0] += 1
    counts[3, 1] = 300  # more than a byte holds
    adata = anndata.AnnData(sparse.csr_matrix(counts.astype(np.float32)))
    for key, n in (("batch", 3), ("cell_type", 4), ("donor", 5)):
        adata.obs[key] = np.array([f"{key.split('_')[-1]}_{i}" for i in rng.integers(n, size=N)])
    adata.obs["size"], adata.obs["age"] = rng.uniform(0.5, 2, N), rng.normal(size=N)
    path = tmp_path_factory.mktemp("store") / "cells.h5ad"
    adata.write_h5ad(path)
    return adata, shuffled(path, kind="counts", **HOW)


@pytest.fixture
def cells(many):
    return StoredCells(many[1], "cpu", MEMORY, SIZE)


def rows_of(store, rows):
    """Rows in the file of cells of the store."""
    return store.origin(np.asarray(rows))[1]


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "scvae reads ahead"]


# ---- The order -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_ranks", [1, 3])
def test_in_each_pass_every_cell_comes_once_as_it_is_in_the_file(many, n_ranks):
    adata, store = many
    of_ranks = [StoredCells(store, "cpu", MEMORY, SIZE) for _ in range(n_ranks)]
    in_memory = read_cells(adata, read_schema(adata, **HOW), with_labels=True)
    _, units = of_ranks[0].split(100, 3)
    orders = [cells.shuffled(SIZE, units, 7, rank, n_ranks) for rank, cells in enumerate(of_ranks)]
    assert orders[0].n_windows > 1
    passes = []
    for _ in range(2):
        seen = []
        for _ in range(n_minibatches(of_ranks[0].n_in(units), SIZE)):
            n_drawn = 0
            for cells, order in zip(of_ranks, orders, strict=True):
                rows, n_nonzero = next(order)
                n_drawn += len(rows)
                assert len(rows) in order.lengths
                place = cells.origin(rows).tolist()
                seen += place
                found = cells.batch(rows, n_nonzero)
                wanted = in_memory.batch(torch.from_numpy(rows_of(store, place)))
                assert len(found.counts.values) == n_nonzero
                for name in ("values", "library_size", "s", "covariates", "size_factor", "y"):
                    assert torch.equal(getattr(found, name), getattr(wanted, name)), name
                assert torch.allclose(found.counts.log_factorial.double(), wanted.counts.log_factorial)
            assert n_drawn == order.n_drawn <= SIZE
        blocks = [range(64 * int(unit), min(64 * int(unit) + 64, N)) for unit in units]
        assert sorted(seen) == sorted(row for block in blocks for row in block)
        passes.append(seen)
    assert passes[0] != passes[1]
    for order in orders:
        order.close()
    assert not threads()


@pytest.mark.parametrize("n_drawn", [0, 1, 60, 63, 64, 65, 190])
def test_an_order_goes_on_where_it_was(many, n_drawn):
    one, other = (StoredCells(many[1], "cpu", MEMORY, SIZE) for _ in range(2))
    _, units = one.split(0, 0)
    order, again = one.shuffled(SIZE, units, 3), other.shuffled(SIZE, units, 3)
    for _ in islice(order, n_drawn):
        pass
    again.restore(order.state())
    for _ in range(70):
        (rows, n_nonzero), (others, n_others) = next(order), next(again)
        assert n_nonzero == n_others
        assert torch.equal(one.origin(rows), other.origin(others))
        assert torch.equal(one.batch(rows).values, other.batch(others).values)
    order.close()
    again.close()


def test_the_window_stays_where_it_is(cells):
    arrays = [cells.values, cells.genes, cells.offsets, cells.codes, cells.library_size, cells.log_factorial, cells.y]
    before = [array.data_ptr() for array in arrays]
    order = cells.shuffled(SIZE, cells.split(0, 0)[1], 3)
    for _ in islice(order, 400):
        pass
    order.close()
    assert [array.data_ptr() for array in arrays] == before
    assert arrays[0] is cells.values


def test_minibatches_mix_cells_of_all_blocks_in_the_window(cells):
    order = cells.shuffled(SIZE, cells.split(0, 0)[1], 3)
    n_blocks = [len(set((cells.origin(rows) // 64).tolist())) for rows, _ in islice(order, 64)]
    order.close()
    assert np.mean(n_blocks) > 4  # of eight cells, drawn from nine blocks: 5.6


# ---- What else a training asks ---------------------------------------------------------------------------------


def test_cells_that_are_held_out_are_none_of_the_others(cells):
    held_out, others = cells.split(130, 1)
    assert sorted(torch.cat([held_out, others]).tolist()) == list(range(24))
    assert cells.n_in(held_out) == 128
    assert cells.n_in(held_out) + cells.n_in(others) == N
    assert [len(part) for part in cells.split(0, 1)] == [0, 24]
    held, rows = cells.held(held_out)
    assert len(held) == len(rows) == 128
    assert cells.held(held_out.clone())[0] is held
    assert np.array_equal(held.values, cells.store.take(cells._rows(held_out.numpy())).values)


@pytest.mark.parametrize("n", [1, 64, 100, 4000])
def test_cells_are_drawn_from_the_units_alone(cells, n):
    units = torch.tensor([5, 23, 1, 2])
    some, rows = cells.sample(units, n, 4)
    assert len(some) == len(rows) == min(n, 3 * 64 + N - 23 * 64)
    allowed = cells.store.take(cells._rows(units.numpy()))
    assert set(some.library_size.tolist()) <= set(allowed.library_size.tolist())
    assert torch.equal(some.values, cells.sample(units, n, 4)[0].values)
    if n == 64:
        assert any(not torch.equal(some.library_size, cells.sample(units, n, seed)[0].library_size) for seed in (5, 6))


def test_labelled_cells_have_a_label(cells):
    units = torch.tensor([5, 23, 1, 2])
    some, rows = cells.labelled(units, 50, 4)
    assert len(some) == len(rows) == 50
    assert (some.y >= 0).all()
    everyone, _ = cells.labelled(units, 10**6, 4)
    labels = cells.store.take(cells._rows(units.numpy())).labels
    assert 0 < len(everyone) == (labels >= 0).sum() < len(labels)


def test_the_summary_is_that_of_cells_in_memory(many, cells):
    adata, _ = many
    wanted = read_cells(adata, read_schema(adata, **HOW), with_labels=True).summary
    for name, value in vars(wanted).items():
        assert torch.allclose(getattr(cells.summary, name), value, rtol=1e-6), name
    for batch in (None, 0, 2):
        for one, other in zip(cells.summary.log_library(batch), wanted.log_library(batch), strict=True):
            assert torch.allclose(one, other)
    library = np.log(adata.X.sum(1).A1)
    assert np.allclose(wanted.log_library(), [library.mean(), library.var()], rtol=1e-5)
    counts = adata.X.toarray()[adata.obs["batch"] == "batch_1"]
    assert np.allclose(wanted.moments(1), [counts.mean(0), counts.var(0)], rtol=1e-5)


def test_the_most_nonzeros_of_some_cells_are_those_of_the_densest(many, cells, monkeypatch):
    monkeypatch.setattr("scvae.data.stored._LENGTHS", 100)
    lengths = np.sort(np.diff(many[0].X.indptr))
    assert [cells.most_nonzeros(n) for n in (1, 7, 10**6)] == [lengths[-1], lengths[-7:].sum(), lengths.sum()]


# ---- Memory ----------------------------------------------------------------------------------------------------


def test_a_store_is_loaded_where_there_is_memory_for_it(many):
    _, store = many
    loaded = cells_of(store, "cpu", MEMORY, SIZE)
    assert type(loaded) is Cells
    assert len(loaded) == N
    assert type(cells_of(store, "cpu", 60_000, SIZE)) is StoredCells


def test_the_window_takes_no_more_than_its_memory(many):
    _, store = many
    for memory in (45_000, 60_000):
        cells = StoredCells(store, "cpu", memory, SIZE)
        taken = sum(tensor.nbytes for tensor in vars(cells).values() if isinstance(tensor, torch.Tensor))
        assert 2 * taken <= memory
        order = cells.shuffled(SIZE, cells.split(0, 0)[1], 3)
        assert len({row for rows, _ in islice(order, order.n_parts) for row in cells.origin(rows).tolist()}) == N
        order.close()
    with pytest.raises(ValueError, match=r"16 minibatches of 8 cells take .*: give more memory"):
        StoredCells(store, "cpu", 5000, SIZE)


# ---- Training --------------------------------------------------------------------------------------------------


def trained(cells, **options):
    with alone(0, torch.device("cpu"), gradient=True):
        program = ZINB(cells.schema, n_latent=2, n_hidden=8)
        program.initialise(cells)
        return program, train(program, cells, Training(batch_size=SIZE, **options), progress=False)


@pytest.mark.slow
def test_a_step_that_is_replayed_sees_the_cells_that_are_in_the_window(many, monkeypatch):
    program, course = trained(StoredCells(many[1], "cpu", MEMORY, SIZE), max_epochs=2)
    monkeypatch.setattr("scvae.inference.svi.Recorded", None)
    other, _ = trained(StoredCells(many[1], "cpu", MEMORY, SIZE), max_epochs=2)
    for name, value in program.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert course.n_cells == N
    assert not threads()


def test_an_error_in_reading_ends_the_training_and_the_thread(many, cells, monkeypatch):
    read, n_reads = cells.store.read, []

    def failing(*args):
        n_reads.append(1)
        if len(n_reads) > 30:
            raise ValueError("cells 64 to 128 are not what was written")
        return read(*args)

    monkeypatch.setattr(cells.store, "read", failing)
    with pytest.raises(ValueError, match="cells 64 to 128"):
        trained(cells, max_epochs=5)
    assert not threads()


def test_an_interrupted_training_ends_the_thread(cells, monkeypatch):
    draw, n_draws = type(cells).batch, []

    def interrupting(self, *args):
        n_draws.append(1)
        if len(n_draws) == 20:
            raise KeyboardInterrupt
        return draw(self, *args)

    monkeypatch.setattr("scvae.inference.svi.Recorded", None)
    monkeypatch.setattr(type(cells), "batch", interrupting)
    _, course = trained(cells, max_epochs=5)
    assert course.stopped == "interrupted"
    assert not threads()


def test_cells_at_fault_are_named_by_their_rows_in_the_store(cells):
    cells.summary.gene_sums[:] = np.nan
    with pytest.raises(NonFiniteLoss) as caught:
        trained(cells, max_epochs=1)
    assert set(caught.value.rows) <= set(range(N))
    assert not threads()
