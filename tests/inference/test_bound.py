"""ELBO ≤ importance-weighted bound ≤ evidence, and the posterior that the weights imply is the true one."""

import copy
import functools

import numpy as np
import pytest
import torch
from pyro import poutine
from pyro.distributions import LogNormal, Normal
from pyro.poutine.messenger import Messenger
from scipy import special, stats

from scvae.data.cells import Batch, Schema
from scvae.distributions import SparseCounts
from scvae.inference import evidence
from scvae.programs.zinb import ZINB

pytestmark = pytest.mark.slow

LIBRARIES = ["observed", "latent"]
GUIDES = ["untrained", "fitted", "wide"]
LATENTS = [("observed", "z"), ("latent", "z"), ("latent", "l")]


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        yield


# ---- A model small enough to integrate ---------------------------------------------------------------------


def minibatch(s, counts=None, library_size=None):
    """Cells of the batches `s`; the library size is their total if it is not given."""
    if counts is None:
        library_size = torch.ones(len(s))
    else:
        library_size = counts.sum(-1) if library_size is None else library_size
        counts = SparseCounts.from_dense(counts)
    return Batch(counts, library_size, s, torch.nn.functional.one_hot(s, 2).float())


def take(batch, rows):
    """Some of the cells, or some cells again and again."""
    return minibatch(batch.s[rows], batch.counts.dense()[rows], batch.library_size[rows])


def simulate(program, n):
    """Cells drawn from the model itself, and their true latents by name, each ``[n]``.

    The rare empty cell is left out, which changes no posterior: whether a cell is empty is read off its counts.
    """
    s = torch.arange(n) % 2
    sites = poutine.trace(program.model).get_trace(minibatch(s)).nodes
    counts = sites["x"]["value"]
    kept = counts.sum(-1) > 0
    truth = {"z": sites["z"]["value"].squeeze(-1)[kept], "l": sites["l"]["value"][kept]}
    library_size = truth["l"] if program.options["library"] == "observed" else None
    return minibatch(s[kept], counts[kept], library_size), truth


@functools.cache
def small_program(library, guide):
    """One latent dimension, eight genes, two batches, fixed random weights.

    The guide is as it comes, or briefly fitted, or that but wide: better to draw from, of a lower ELBO.
    """
    if guide == "wide":
        program = copy.deepcopy(small_program(library, "fitted"))
        program.guide = Altered("z", widen)(Altered("l", widen)(program.guide))
        return program
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(1)
        schema = Schema(tuple("abcdefgh"), batch_key="s", categories={"s": ("0", "1")}, continuous={})
        program = ZINB(schema, n_latent=1, n_hidden=32, n_layers=1, library=library, prior="normal").eval()
        with torch.no_grad():
            set_decoder(program)
            program.m[:2] = torch.tensor([6.0, 5.5])
            program.v[:2] = torch.tensor([0.3, 0.5])
        if guide == "fitted":
            fit_guide(program)
        return program.requires_grad_(False)


def set_decoder(program):
    """Make the decoder smooth enough for posteriors with one mode, and steep enough for narrow ones."""
    for name, parameter in program.decoder.named_parameters():
        is_matrix = parameter.dim() == 2
        random = (0.17 if is_matrix else 0.4) * torch.randn(parameter.shape)
        if name.startswith("layers.linear") and is_matrix:
            from_z = torch.linspace(-0.8, 0.8, len(parameter)).unsqueeze(1)
            parameter.copy_(torch.full_like(parameter, 1.5) if "covariates" in name else from_z)
        elif name.startswith("layers.linear"):
            parameter.zero_()
        elif name.startswith(("w", "pi")) and is_matrix:
            parameter.copy_(random - random.mean(1, keepdim=True))
        elif name.startswith(("w", "pi")):
            parameter.copy_(random - (2.5 if name.startswith("pi") else 0))
        elif name == "log_theta":
            parameter.copy_(0.5 + random)


class Altered(Messenger):
    """Change one site of a model or guide on its way into the bounds."""

    def __init__(self, site, change):
        super().__init__()
        self.site, self.change = site, change

    def _pyro_sample(self, message):
        if message["name"] == self.site:
            self.change(message)


def widen(message, factor=1.3):
    q = message["fn"]
    if isinstance(q, LogNormal):
        message["fn"] = LogNormal(q.loc, factor * q.scale)
    else:
        message["fn"] = Normal(q.base_dist.loc, factor * q.base_dist.scale).to_event(1)


def fit_guide(program, n_cells=20_000, n_steps=1000):
    """Maximise the ELBO over the guide alone, on cells drawn from the model."""
    cells, _ = simulate(program, n_cells)
    modules = [program.encoder, program.q_z, program.of_l]
    optimiser = torch.optim.Adam([p for m in modules for p in m.parameters()], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, n_steps)
    for _ in range(n_steps):
        optimiser.zero_grad()
        loss = -evidence.elbo(program, take(cells, torch.randint(len(cells), (256,)))).mean()
        loss.backward()
        optimiser.step()
        schedule.step()


def log_zinb(x, log_mean, theta, gate):
    """Log density of each entry, by SciPy."""
    log_nb = stats.nbinom.logpmf(x, theta, theta / (theta + np.exp(log_mean)))
    dropout = special.expit(gate)
    return np.where(x == 0, np.log(dropout + (1 - dropout) * np.exp(log_nb)), np.log(1 - dropout) + log_nb)


def exact_evidence(program, batch, n_z=801, n_l=201):
    """``log p(x)`` of each cell by the trapezoidal rule over z, or over z and log l."""
    z = np.linspace(-7, 7, n_z)
    log_prior_z = stats.norm.logpdf(z) + np.log(z[1] - z[0])
    result = []
    for x, total, s in zip(
        batch.counts.dense().double().numpy(), batch.library_size.numpy(), batch.s.tolist(), strict=True
    ):
        at = minibatch(torch.full((n_z,), s))
        d = program.decoder(torch.tensor(z, dtype=torch.float32).unsqueeze(-1), torch.ones(n_z), at)
        log_rho, gate = d.log_mean.double().numpy(), d.gate_logits.double().numpy()  # [n_z, G]
        theta = d.inverse_dispersion.double().numpy().reshape(-1)  # [G]
        if program.options["library"] == "observed":
            log_l, log_prior_l = np.log(total)[None], np.zeros(1)
        else:
            m, sd = program.m[s].item(), program.v[s].sqrt().item()
            log_l = np.linspace(m - 7 * sd, m + 7 * sd, n_l)
            log_prior_l = stats.norm.logpdf(log_l, m, sd) + np.log(log_l[1] - log_l[0])
        log_joint = log_zinb(x, log_rho[:, None] + log_l[:, None], theta, gate[:, None]).sum(-1)  # [n_z, n_l]
        result.append(special.logsumexp(log_joint + log_prior_z[:, None] + log_prior_l))
    return np.array(result)


@functools.cache
def cells_and_evidence(library, n=12):
    """A dozen cells, and their exact evidence."""
    program = small_program(library, "untrained")  # the same decoder as the fitted one
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(2)
        batch, _ = simulate(program, n)
        return batch, exact_evidence(program, batch)


def repeated(estimate, program, batch, n_repeats, **kwargs):
    """An estimate of each cell many times over, ``[n_repeats, n]``."""
    n = len(batch)
    return estimate(program, take(batch, torch.arange(n).repeat(n_repeats)), **kwargs).view(-1, n).double().numpy()


def mean_and_error(values):
    return values.mean(0), values.std(0, ddof=1) / np.sqrt(len(values))


# ---- The bounds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_quadrature_has_converged(library):
    batch, exact = cells_and_evidence(library)
    coarse = exact_evidence(small_program(library, "untrained"), batch, n_z=201, n_l=81)
    assert coarse == pytest.approx(exact, abs=1e-3)


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_the_elbo_is_below_the_importance_weighted_bound_and_that_below_the_evidence(library, guide):
    program = small_program(library, guide)
    batch, exact = cells_and_evidence(library)
    mean, error = mean_and_error(repeated(evidence.elbo, program, batch, 1000, n_samples=4))
    bounds, errors = [mean], [error]
    for k in (1, 4, 16, 64):
        mean, error = mean_and_error(repeated(evidence.importance_weighted, program, batch, 1000, n_samples=k))
        bounds.append(mean)
        errors.append(error)
    bounds, margin = np.array(bounds), 4 * np.array(errors)
    assert bounds[0] == pytest.approx(bounds[1], abs=(margin[0] + margin[1]).max())  # one sample is the ELBO
    assert (bounds <= exact + margin).all()
    assert (np.diff(bounds, axis=0) >= -(margin[1:] + margin[:-1])).all()
    assert (np.diff(bounds.mean(1))[1:] > 0).all()
    if guide == "wide":
        assert bounds[-1].mean() == pytest.approx(exact.mean(), abs=0.02)


ESTIMATES = [evidence.importance_weighted, evidence.prior_monte_carlo]


@pytest.mark.parametrize("library", LIBRARIES)
def test_importance_weights_and_plain_draws_from_the_prior_average_to_the_evidence(library):
    program = small_program(library, "wide")
    batch, exact = cells_and_evidence(library)
    ratios = [np.exp(repeated(estimate, program, batch, 1000, n_samples=50) - exact) for estimate in ESTIMATES]
    means, errors = zip(*map(mean_and_error, ratios), strict=True)
    for mean, error in zip(means, errors, strict=True):
        assert (abs(mean - 1) < 4.5 * error).all()
    assert errors[0].max() < 0.05
    assert np.median(errors[1]) > np.sqrt(2) * np.median(errors[0])  # the prior's draws vary more


# ---- The divergences ---------------------------------------------------------------------------------------


def monte_carlo_kl(program, batch, site, n=100_000):
    """``E_q [log q - log p]`` of each cell and its standard error, in NumPy, from the guide's parameters."""
    h = program.encode(batch)
    loc, scale = program.q_z.moments(h) if site == "z" else program.q_log_l(h, batch)
    loc, scale = (v.reshape(-1).double().numpy() for v in (loc, scale))
    value = np.random.default_rng(0).normal(loc, scale, (n, len(loc)))
    if site == "z":
        difference = stats.norm.logpdf(value, loc, scale) - stats.norm.logpdf(value)
    else:
        value, m, sd = np.exp(value), program.m[batch.s].numpy(), program.v[batch.s].sqrt().numpy()
        difference = stats.lognorm.logpdf(value, scale, scale=np.exp(loc))
        difference -= stats.lognorm.logpdf(value, sd, scale=np.exp(m))
    return mean_and_error(difference)


@pytest.mark.parametrize("guide", ["untrained", "fitted"])
@pytest.mark.parametrize(("library", "site"), LATENTS)
def test_the_divergence_in_closed_form_is_that_of_monte_carlo(library, site, guide):
    program = small_program(library, guide)
    batch, _ = cells_and_evidence(library)
    _, kl = evidence.elbo_terms(program, batch)
    assert set(kl) == ({"z", "l"} if library == "latent" else {"z"})
    mean, error = monte_carlo_kl(program, batch, site)
    assert (abs(kl[site].numpy() - mean) < 4.5 * error).all()


@pytest.mark.parametrize(("library", "site"), LATENTS)
def test_a_divergence_without_closed_form_is_drawn(library, site, monkeypatch):
    def no_closed_form(q, p):
        raise NotImplementedError

    program = small_program(library, "fitted")
    batch, _ = cells_and_evidence(library)
    closed_form = evidence.elbo_terms(program, batch)[1][site].numpy()
    monkeypatch.setattr(evidence, "kl_divergence", no_closed_form)
    draws = repeated(lambda *args: evidence.elbo_terms(*args)[1][site], program, batch, 10_000)
    mean, error = mean_and_error(draws)
    assert error.min() > 0
    assert (abs(mean - closed_form) < 4.5 * error).all()


@pytest.mark.parametrize(("library", "site"), LATENTS)
def test_an_elbo_that_lacks_a_divergence_exceeds_the_evidence(library, site, monkeypatch):
    program, (batch, exact) = small_program(library, "fitted"), cells_and_evidence(library)
    right = evidence.kl_divergence
    monkeypatch.setattr(
        evidence, "kl_divergence", lambda q, p: right(q, p) * (isinstance(q, LogNormal) != (site == "l"))
    )
    mean, error = mean_and_error(repeated(evidence.elbo, program, batch, 1000))
    assert (mean - exact).mean() > 10 * np.sqrt((error**2).mean() / len(error))


@pytest.mark.parametrize(("library", "site"), LATENTS)
def test_a_divergence_the_wrong_way_round_is_not_that_of_monte_carlo(library, site, monkeypatch):
    program = small_program(library, "fitted")  # with the right divergence, whichever test comes first
    batch, _ = cells_and_evidence(library)
    mean, error = monte_carlo_kl(program, batch, site)
    right = evidence.kl_divergence
    monkeypatch.setattr(evidence, "kl_divergence", lambda q, p: right(p, q))
    assert (abs(evidence.elbo_terms(program, batch)[1][site].numpy() - mean) > 10 * error).all()


# ---- Calibration by simulation -----------------------------------------------------------------------------


class LogNormalWithoutJacobian(LogNormal):
    """The density of log l, taken for that of l."""

    def log_prob(self, value):
        return super().log_prob(value) + value.log()


def leave_out(message):
    message["scale"] = 0.0


def forget_jacobian(message):
    message["fn"] = LogNormalWithoutJacobian(message["fn"].loc, message["fn"].scale)


@functools.cache
def replicates(library, n=1000):
    program = small_program(library, "wide")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        return simulate(program, n)


def of_interest(program, batch, z, l):
    """Quantities that are ranked, each ``[n, …]``.

    Ranks of z alone do not notice that its prior was left out: intervals that hold for every fixed z hold on
    average too. Ranks of its distance from the prior's mean do (Modrák et al. 2023, Bayesian Analysis).
    """
    if program.options["library"] == "observed":
        return {"z": z, "|z|": z.abs()}
    m = program.m[batch.s].view(-1, *[1] * (l.dim() - 1))
    return {"z": z, "|z|": z.abs(), "l": l, "|log l - m|": (l.log() - m).abs()}


def calibration(program, n_proposals, n_draws=19):
    """P values that the truth ranks uniformly among importance-resampled draws from the posterior."""
    batch, truth = replicates(program.options["library"])
    weights, draws = [], {"z": [], "l": []}
    for _ in range(n_proposals):
        q, p = evidence._traces(program, batch)
        weights.append(evidence._log_weight(q, p))
        for site in draws:
            draws[site].append(q.nodes[site]["value"].view(-1) if site in q.nodes else truth[site])
    weights = torch.stack(weights, -1).softmax(-1)  # [n, n_proposals]
    assert (1 / weights.square().sum(-1)).median() > 2 * n_draws  # effective number of proposals
    chosen = weights.multinomial(n_draws, replacement=True)
    draws = {site: torch.stack(values, -1).gather(1, chosen) for site, values in draws.items()}  # [n, n_draws]
    true = of_interest(program, batch, **truth)
    p_values = {}
    for name, values in of_interest(program, batch, **draws).items():
        ranks = (values < true[name].unsqueeze(-1)).sum(-1)
        p_values[name] = stats.chisquare(torch.bincount(ranks, minlength=n_draws + 1).numpy()).pvalue
    return p_values


@pytest.mark.parametrize("library", LIBRARIES)
def test_true_latents_rank_uniformly_among_draws_from_their_posterior(library):
    p_values = calibration(small_program(library, "wide"), n_proposals=1000)
    assert min(p_values.values()) > 0.01, p_values


@pytest.mark.parametrize(
    ("library", "site", "side", "change"),
    [
        ("observed", "z", "model", leave_out),
        ("observed", "z", "guide", leave_out),
        ("latent", "z", "model", leave_out),
        ("latent", "z", "guide", leave_out),
        ("latent", "l", "model", leave_out),
        ("latent", "l", "guide", leave_out),
        ("latent", "l", "model", forget_jacobian),
        ("latent", "l", "guide", forget_jacobian),
    ],
)
def test_calibration_notices_a_density_that_is_broken(library, site, side, change, monkeypatch):
    program = small_program(library, "wide")
    monkeypatch.setattr(program, side, Altered(site, change)(getattr(program, side)))
    p_values = calibration(program, n_proposals=300)
    assert min(p for name, p in p_values.items() if site in name) < 1e-4, p_values
