"""A sample of the mutants of saved models and stores, and thirty rounds of the soak."""

import importlib.util
import json
import os
import warnings
from pathlib import Path

import pytest
import strangers

import scvae
from scvae.data.shuffling import shuffled

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return strangers.models(tmp_path_factory.mktemp("models"))


def sampled(tmp_path, numbers, make, load, expected, numbers_of):
    """Judge some mutants, and return what became of each; one that was not signed is never another."""
    outcomes = []
    for number in numbers:
        folder = tmp_path / str(number)
        folder.mkdir()
        what = make(number, folder)
        outcome, *_ = strangers.judged(load, folder, expected(number), numbers_of)
        assert outcome != "other" or what.startswith("signed"), (number, what)
        outcomes.append((what, outcome))
    return outcomes


def test_mutants_of_a_model_are_refused_or_the_same(tmp_path, bases):
    expected = [strangers.numbers_of(scvae.load(base)) for base in bases]
    outcomes = sampled(
        tmp_path,
        range(10**6, 10**6 + 300),
        lambda number, folder: strangers.mutant(number, bases[number % len(bases)], folder),
        scvae.load,
        lambda number: expected[number % len(bases)],
        strangers.numbers_of,
    )
    assert {what for what, _ in outcomes} == {each.__name__ for each in strangers.MUTATIONS}
    assert {outcome for _, outcome in outcomes} == {"error", "same", "other"}


def test_mutants_of_a_store_are_refused_or_the_same(tmp_path):
    cells = strangers.cells()
    cells.obsm.clear()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    how = {"batch_key": "batch", "continuous_covariate_keys": ["age"], "labels_key": "label"}
    shuffled(tmp_path / "cells.h5ad", store=tmp_path / "store", **how).close()
    expected = strangers.read_store(tmp_path / "store")
    outcomes = sampled(
        tmp_path,
        range(10**6, 10**6 + 300),
        lambda number, folder: strangers.store_mutant(number, tmp_path / "store", folder),
        strangers.read_store,
        lambda _: expected,
        lambda read: read,
    )
    assert {outcome for _, outcome in outcomes} >= {"error", "same"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_hidden": 10**9}, "larger than its file of weights"),
        ({"n_latent": 2**31}, "larger than its file of weights"),
        ({"n_layers": 10**9}, "larger than its file of weights"),
        ({"n_layers": 1}, "its weights"),
        ({"n_hidden": -1}, "n_hidden is a whole number"),
        ({"n_hidden": "many"}, "n_hidden is a whole number"),
        ({"n_hiden": 4}, "n_hiden"),
    ],
)
def test_options_that_are_not_those_of_the_weights_are_refused(tmp_path, bases, changes, message):
    description, weights = strangers.files_of(bases[0])
    content = json.loads(description)["content"]
    content["options"] |= changes
    strangers.sign(tmp_path, content, weights)
    with pytest.raises(ValueError, match=f"holds no model that scvae saved: .*{message}"):
        scvae.load(tmp_path)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are only counted on Linux")
def test_thirty_fits_saves_and_loads_leave_nothing_behind(tmp_path):
    spec = importlib.util.spec_from_file_location("soak", Path(__file__).parent / "benchmarks" / "soak.py")
    soak = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(soak)
    adata = scvae.datasets.simulated_batches(n_cells=60, n_genes=12, n_batches=2, library_size=100, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(4):  # what is kept for later is made
            soak.once(adata, tmp_path, i)
        before = soak.held()
        for i in range(30):
            soak.once(adata, tmp_path, i)
        after = soak.held()
    for name in ("open files", "threads", "tensors"):
        assert after[name] <= before[name], name
