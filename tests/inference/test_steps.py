"""Steps that are recorded and replayed are the steps that would have been taken one operation at a time."""

import itertools
import logging

import pytest
import torch

from scvae.boundary.process import seeded, unchecked
from scvae.data.reading import read_cells, read_schema
from scvae.inference import recording, steps, svi
from scvae.inference.steps import Step
from scvae.inference.svi import Training, train
from scvae.programs import ZINB


class Recorder:
    """Stands in for CUDA graphs: keeps the function, and runs it when it is replayed."""

    fixed_shapes = True

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, function):
        self.recorded += 1

        def replay():
            self.replayed += 1
            function()

        return replay


@pytest.fixture
def cells(adata):
    return read_cells(adata, read_schema(adata, batch_key="batch"))


def trained(cells, capture, n_epochs=3, size=30):
    """The steps, after some epochs of them.

    Weights that matter to nothing (a bias before a batch norm) follow the rounding of their gradients: compare sums.
    """
    with seeded(0, torch.device("cpu")):
        program = ZINB(cells.schema, n_latent=3, n_hidden=8)
        program.initialise(cells)
        step = Step(program, cells, size, capture)
        step.decays.fill_(1.0)
        step.rate.fill_(1e-2)
        step.kl_weight.fill_(1.0)
        with unchecked():
            order = cells.shuffled(size, torch.arange(len(cells)), seed=0)
            for rows, n_nonzero in itertools.islice(order, n_epochs * order.n_parts):
                step(rows, n_nonzero)
    return step


def test_replayed_steps_are_those_that_are_taken_one_by_one(cells, monkeypatch):
    monkeypatch.setattr(steps, "_SLACK", 3)
    recorder = Recorder()
    step = trained(cells, recorder)
    assert torch.allclose(step.sums, trained(cells, None).sums, rtol=1e-5)
    assert step.taken == int(step.count) == 9
    assert recorder.recorded == 2  # minibatches of 27 and of 26 cells
    assert recorder.replayed == 9 - steps._WARM_UP


def test_a_minibatch_with_more_nonzeros_than_there_is_room_for_is_recorded_anew(cells, monkeypatch):
    monkeypatch.setattr(steps, "_SLACK", 1)
    recorder = Recorder()
    step = trained(cells, recorder, n_epochs=6, size=10)
    assert recorder.recorded > len(step.replays)
    assert torch.allclose(step.sums, trained(cells, None, n_epochs=6, size=10).sums, rtol=1e-5)


def test_where_recording_fails_steps_are_taken_one_by_one_and_the_log_says_so(cells, caplog):
    def capture(function):
        raise RuntimeError("operation not permitted when stream is capturing")

    with caplog.at_level(logging.INFO, "scvae"):
        step = trained(cells, capture)
    assert step.capture is None
    assert step.taken == int(step.count) == 9
    assert [r.message for r in caplog.records] == [
        "Steps are not captured as a CUDA graph (operation not permitted when stream is capturing); they are taken "
        "one by one."
    ]
    assert torch.equal(step.sums, trained(cells, None).sums)


def test_a_fault_between_two_checks_is_put_down_to_its_own_step(adata, breaking):
    cells = read_cells(adata, read_schema(adata, batch_key="batch"))
    for where, site, n_rows in (("x", "x", None), ("gradient", "gradient", 27)):
        program = breaking(cells.schema, n_latent=3, n_hidden=8, where=where)
        program.initialise(cells)
        step = Step(program, cells, 30)
        step.rate.fill_(1e-2)
        step.kl_weight.fill_(1.0)
        recent = []
        with unchecked():
            for rows, n_nonzero in itertools.islice(cells.shuffled(30, torch.arange(len(cells)), seed=0), 9):
                step(rows, n_nonzero)
                recent.append(rows)
        assert not step.finite
        fault = svi._fault(step, recent)
        assert (fault.step, fault.site) == (4, site)
        assert set(fault.rows) <= set(recent[3].tolist())
        assert n_rows in (None, len(fault.rows))


def test_adam_is_that_of_torch():
    torch.manual_seed(0)
    start, gradients = torch.randn(4, 3), torch.randn(6, 4, 3)
    ours, theirs = start.clone(), torch.nn.Parameter(start.clone())
    unused = torch.zeros(2)
    adam, other = steps._Adam([ours, unused]), torch.optim.Adam([theirs], lr=1.0)
    for i, gradient in enumerate(gradients):
        theirs.grad = gradient
        other.param_groups[0]["lr"] = 0.1 / (i + 1)
        adam.step([gradient, None], torch.tensor(0.1 / (i + 1)), torch.tensor(i + 1.0))
        other.step()
    assert torch.allclose(ours, theirs, rtol=1e-5)
    assert not unused.any()


def test_a_step_is_that_of_adam_with_decoupled_decay_and_a_prior_of_the_deviations(cells):
    start = ZINB(cells.schema, n_latent=3, n_hidden=8)
    ours, theirs = (ZINB(cells.schema, n_latent=3, n_hidden=8) for _ in range(2))
    for program in (ours, theirs):
        program.load_state_dict(start.state_dict())
    shrunk = {id(p) for p in theirs.decayed()}
    groups = [[p for p in theirs.parameters() if (id(p) in shrunk) is which] for which in (True, False)]
    other = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.5}, {"params": groups[1], "weight_decay": 0.0}], lr=0.1
    )
    step = Step(ours, cells, 30, deviation_scale=0.25)
    step.decays.fill_(0.5)
    step.rate.fill_(0.1)
    step.kl_weight.fill_(1.0)
    rows = torch.arange(30)
    with unchecked():
        with seeded(0, torch.device("cpu")):
            step(rows, 10_000)
        with seeded(0, torch.device("cpu")):
            log_likelihood, kl = steps.elbo_terms(theirs, cells.batch(rows, 10_000))
            log_prior = sum(torch.distributions.Normal(0, 0.25).log_prob(p).sum() for p in theirs.deviations())
            ((sum(kl.values()) - sum(log_likelihood.values())).mean() - log_prior / len(cells)).backward()
    other.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_captured_losses_are_those_of_steps_taken_one_by_one_statistically(adata, monkeypatch, caplog):
    cells = read_cells(adata, read_schema(adata, batch_key="batch"), device="cuda")

    def final(capture, seed):
        with seeded(seed, torch.device("cuda")):
            program = ZINB(cells.schema, n_latent=3, n_hidden=8).cuda()
            program.initialise(cells)
            monkeypatch.setattr(svi, "CudaGraphs", (lambda: recording.CudaGraphs()) if capture else (lambda: None))
            return train(program, cells, Training(40, 30), progress=False)["elbo"][-1]

    with caplog.at_level(logging.INFO, "scvae"):
        captured, plain = (torch.tensor([final(c, seed) for seed in range(8)]) for c in (True, False))
    assert caplog.records == []  # nothing fell back
    error = (captured.var() / 8 + plain.var() / 8).sqrt()
    assert abs(captured.mean() - plain.mean()) < 4 * error
    assert captured.unique().numel() == 8  # random numbers stay random
