"""What several test files need: small data, quick fits, programs of a user's own, ways to show that nothing changed."""

import contextlib
import functools
import random
import tracemalloc
import warnings
from collections.abc import Mapping

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from scipy import sparse

import scvae
from scvae.distributions import Poisson
from scvae.programs import ZINB, Program


@pytest.fixture(autouse=True)
def _one_thread():
    """Sums depend on the number of threads, which neighbour graphs (numba) change for the whole process."""
    torch.set_num_threads(1)


@functools.cache
def _simulated():
    """80 cells of two batches, with covariates of every kind, and no cell or gene that is empty."""
    adata = scvae.datasets.simulated_batches(
        n_cells=80, n_genes=24, n_types=2, n_batches=2, library_size=50, type_scale=1, dropout=0.05, seed=3
    )
    rng = np.random.default_rng(0)
    adata.obs["donor"] = pd.Categorical(rng.choice(["ada", "bob", "eve"], adata.n_obs))
    adata.obs["age"] = rng.normal(40, 10, adata.n_obs)
    adata.obs["size"] = adata.X.sum(1).A1 / 50
    adata.obs["dye"] = "red"
    adata.layers["counts"] = adata.X.copy()
    adata.uns["note"] = {"nested": [1, 2], "array": np.arange(3)}
    return adata


@pytest.fixture
def adata():
    return _simulated().copy()


@pytest.fixture(scope="session")
def no_warning():
    """Every warning is an error, but for what anndata's own use of pandas brings about."""

    @contextlib.contextmanager
    def context():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", category=DeprecationWarning, module="anndata")
            yield

    return context


@pytest.fixture(scope="session")
def fit():
    """``scvae.fit`` in a few hundredths of a second."""
    return functools.partial(scvae.fit, progress=False, max_epochs=2, batch_size=32, n_latent=3, n_hidden=8)


@pytest.fixture(scope="session")
def model(fit):
    """A model of the simulated cells with a batch key, that tests only read."""
    return fit(_simulated().copy(), batch_key="batch")


@pytest.fixture
def model_of_all_covariates(adata, fit):
    """A model of the layer of counts with every kind of covariate."""
    return fit(
        adata,
        batch_key="batch",
        categorical_covariate_keys=["donor"],
        continuous_covariate_keys=["age"],
        layer="counts",
        key_added="X_here",
        n_layers=2,
    )


class PoissonFactors(Program):
    """A program of a user's own: Poisson counts, a linear decoder, no batches."""

    name = "poisson_factors"

    def __init__(self, schema, *, n_latent=2, spread=1.0):
        super().__init__(schema, n_latent=n_latent, spread=spread)
        self.n_latent, self.spread = n_latent, spread
        self.encoder = torch.nn.Linear(len(schema.genes), 2 * n_latent)
        self.decoder = torch.nn.Linear(n_latent, len(schema.genes))

    def initialise(self, cells):
        with torch.no_grad():
            self.decoder.bias.copy_((cells.summary.gene_sums.sum(0) + 1).log())

    def model(self, batch):
        with pyro.plate("cells", len(batch)):
            zero = batch.library_size.new_zeros(len(batch), self.n_latent)
            z = pyro.sample("z", pyro.distributions.Normal(zero, self.spread).to_event(1))
            log_mean = self.decode(z, batch).log() + batch.library_size.log().unsqueeze(-1)
            pyro.sample("x", Poisson(log_mean=log_mean), obs=batch.counts)

    def guide(self, batch):
        with pyro.plate("cells", len(batch)):
            pyro.sample("z", pyro.distributions.Normal(*self.embed(batch)).to_event(1))

    def embed(self, batch):
        loc, log_scale = self.encoder(batch.counts.dense().log1p()).chunk(2, -1)
        return loc, log_scale.exp()

    def decode(self, z, batch):
        return self.decoder(z).softmax(-1)


class BreakingZINB(ZINB):
    """ZINB whose loss breaks after three steps: NaN in the cells of the second batch, or in the gradient only."""

    name = "breaking"

    def __init__(self, schema, *, where="x", **options):
        super().__init__(schema, **options)
        self.options["where"] = where
        self.where, self.step = where, 0
        self.decoder.register_forward_pre_hook(self.spoil)

    def model(self, batch):
        self.step += 1
        if self.step > 3 and self.where == "interrupt":
            raise KeyboardInterrupt
        super().model(batch)

    def spoil(self, decoder, given):
        z, l, batch = given
        if self.step > 3 and self.where == "x":
            l = l.masked_fill(batch.s == 1, torch.nan)
        if self.step > 3 and self.where == "gradient":
            l = l + (0 * z[:, 0]).abs().sqrt()
        return z, l, batch


@pytest.fixture(scope="session")
def poisson_factors():
    return PoissonFactors


@pytest.fixture(scope="session")
def breaking():
    return BreakingZINB


def _raw(x):
    """The very numbers of a matrix, in the order in which they are stored."""
    if sparse.issparse(x):
        return type(x).__name__, x.shape, *((a.dtype.str, a.tobytes()) for a in (x.data, x.indices, x.indptr))
    if isinstance(x, np.ndarray):
        return x.dtype.str, x.shape, x.tolist() if x.dtype == object else x.tobytes()
    if isinstance(x, Mapping):
        return {key: _raw(value) for key, value in x.items()}
    return repr(x)


def _state(adata):
    return {
        "X": _raw(adata.X),
        "layers": {key: _raw(adata.layers[key]) for key in adata.layers},
        "obsm": {key: _raw(adata.obsm[key]) for key in adata.obsm},
        "varm": {key: _raw(adata.varm[key]) for key in adata.varm},
        "obsp": list(adata.obsp),
        "uns": _raw(dict(adata.uns)),
        "is_view": adata.is_view,
    }


@pytest.fixture(scope="session")
def unchanged():
    """``with unchanged(adata):`` fails if the block changes anything at all in the AnnData."""

    @contextlib.contextmanager
    def context(adata):
        before, obs, var = _state(adata), adata.obs.copy(), adata.var.copy()
        yield
        assert _state(adata) == before
        pd.testing.assert_frame_equal(adata.obs, obs)
        pd.testing.assert_frame_equal(adata.var, var)

    return context


@pytest.fixture(scope="session")
def process_unchanged():
    """``with process_unchanged():`` fails if random states, Pyro's parameters or switches differ after the block."""

    def state():
        numpy_state = np.random.get_state()  # noqa: NPY002
        return {
            "torch": torch.get_rng_state().tolist(),
            "numpy": (numpy_state[1].tolist(), *numpy_state[2:]),
            "random": random.getstate(),
            "parameters": {name: value.tolist() for name, value in pyro.get_param_store().items()},
            "validation": [x.is_validation_enabled() for x in (pyro.distributions, pyro.infer, pyro.poutine)],
            "validate_args": torch.distributions.Distribution._validate_args,
            "gradient": torch.is_grad_enabled(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "dtype": torch.get_default_dtype(),
            "threads": torch.get_num_threads(),
        }

    @contextlib.contextmanager
    def context():
        before = state()
        yield
        assert state() == before

    return context


@pytest.fixture
def peak_memory():
    """``with peak_memory() as peak:`` then ``peak()``: bytes that Python and NumPy held at most in the block."""

    @contextlib.contextmanager
    def context():
        tracemalloc.start()
        result = []
        try:
            yield lambda: result[0]
            result.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()

    return context
