"""The order of a training: every cell once in a pass, dealt among processes, taken up at any place."""

from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from scvae.data.cells import Cells, Schema
from scvae.data.order import n_minibatches


def some_cells(n):
    counts = sparse.csr_matrix(np.arange(1, n + 1, dtype=np.float32)[:, None] % [[2, 3, 5]])
    counts.eliminate_zeros()
    return Cells(counts, np.empty((n, 0), int), np.empty((n, 0)), Schema(tuple("abc")))


@given(n=st.integers(4, 200), size=st.integers(2, 70), n_ranks=st.integers(1, 3), seed=st.integers(0, 2**62))
@settings(max_examples=40, deadline=None)
def test_in_each_pass_every_cell_comes_once_whichever_process_has_it(n, size, n_ranks, seed):
    cells = some_cells(n)
    rows = torch.arange(1, n)
    orders = [cells.shuffled(size, rows, seed, rank, n_ranks) for rank in range(n_ranks)]
    passes = []
    for _ in range(2):
        seen = []
        for _ in range(n_minibatches(n - 1, size)):
            shares = [next(order) for order in orders]
            for share, n_nonzero in shares:
                assert n_nonzero == int((cells.offsets[share + 1] - cells.offsets[share]).sum())
            lengths = [len(share) for share, _ in shares]
            assert max(lengths) - min(lengths) <= 1
            assert sum(lengths) <= max(size, 3)
            assert all(length in order.lengths for length, order in zip(lengths, orders, strict=True))
            seen += [row for share, _ in shares for row in share.tolist()]
        assert sorted(seen) == rows.tolist()
        passes.append(seen)
    if n > 20:
        assert passes[0] != passes[1]


@pytest.mark.parametrize("n_drawn", [0, 1, 3, 4, 5, 9])
def test_an_order_goes_on_where_it_was(n_drawn):
    cells = some_cells(50)
    order = cells.shuffled(13, torch.arange(50), seed=3)
    list(islice(order, n_drawn))
    other = cells.shuffled(13, torch.arange(50), seed=3)
    other.restore(order.state())
    for (rows, n_nonzero), (others, n_others) in islice(zip(order, other, strict=True), 9):
        assert torch.equal(rows, others)
        assert n_nonzero == n_others


def test_the_order_leaves_the_random_numbers_of_torch_as_they_are():
    before = torch.get_rng_state()
    cells = some_cells(20)
    next(cells.shuffled(5, torch.arange(20), seed=1))
    cells.split(4, 1)
    cells.sample(torch.arange(20), 7, 2)
    assert torch.equal(before, torch.get_rng_state())


def test_cells_are_split_and_drawn_at_random():
    cells = some_cells(200)
    held_out, others = cells.split(30, 0)
    assert sorted([*held_out.tolist(), *others.tolist()]) == list(range(200))
    assert len(held_out) == 30
    assert not torch.equal(held_out, cells.split(30, 1)[0])
    _, drawn = cells.sample(others, 20, 0)
    assert len(set(drawn.tolist())) == 20
    assert set(drawn.tolist()) <= set(others.tolist())
