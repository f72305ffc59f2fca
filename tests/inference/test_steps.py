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


def trained(cells, capture, n_epochs=12, size=30):
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


def test_replayed_steps_are_those_that_are_taken_one_by_one(cells):
    recorder = Recorder()
    step = trained(cells, recorder)
    assert torch.allclose(step.sums, trained(cells, None).sums, rtol=1e-5)
    assert step.taken == int(step.count) == 36
    assert recorder.recorded == 2  # minibatches of 27 and of 26 cells
    assert recorder.replayed == 36 - 2 * steps._WARM_UP


def test_nothing_is_captured_twice_as_there_is_room_for_the_cells_with_most_nonzeros(cells):
    recorder = Recorder()
    step = trained(cells, recorder, n_epochs=12, size=10)
    assert recorder.recorded == len(step.replays) == 1
    assert torch.allclose(step.sums, trained(cells, None, n_epochs=12, size=10).sums, rtol=1e-5)
    longest = cells.offsets.diff().sort(descending=True)
    assert cells.most_nonzeros(10) == int(longest.values[:10].sum())
    assert len(cells.batch(longest.indices[:10], cells.most_nonzeros(10), padded=True).counts.values)


def test_where_recording_fails_steps_are_taken_one_by_one_and_the_log_says_so(cells, caplog):
    def capture(function):
        raise RuntimeError("operation not permitted when stream is capturing")

    capture.fixed_shapes = True
    with caplog.at_level(logging.INFO, "scvae"):
        step = trained(cells, capture)
    assert step.capture is None
    assert step.taken == int(step.count) == 36
    assert [r.message for r in caplog.records] == [
        "Steps are not captured as a CUDA graph (operation not permitted when stream is capturing); they are taken "
        "one by one."
    ]
    assert torch.allclose(step.sums, trained(cells, None).sums, rtol=1e-5)


class Altered(Recorder):
    """Replays something else than what was recorded."""

    def __init__(self, replay):
        super().__init__()
        self.replay = replay

    def __call__(self, function):
        super().__call__(function)
        return lambda: self.replay(function)


def nothing(take):
    pass


def twice(take):
    take()
    take()


def other_cells(take):
    rows, *others = take.args
    type(take)(take.func, rows.flip(0).roll(1), *others, **take.keywords)()


def other_draws(take):
    torch.rand(1)
    take()


def without_the_statistics(take):
    buffers = list(take.func.__self__.program.buffers())
    before = [buffer.clone() for buffer in buffers]
    take()
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)


def without_the_last_matrix(take):
    adam = take.func.__self__.adam
    (parameter, *moments) = adam.states[-1]
    before = [each.detach().clone() for each in (parameter, *moments)]
    take()
    with torch.no_grad():
        for each, value in zip((parameter, *moments), before, strict=True):
            each.copy_(value)


def an_error_half_way(take):
    take()
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize(
    ("replay", "what"),
    [
        (nothing, "weights, gradients, squares of gradients, statistics, bounds and counts"),
        (twice, "counts"),
        (other_cells, "gradients"),
        (other_draws, "bounds"),
        (without_the_statistics, "statistics"),
        (without_the_last_matrix, "gradients and squares of gradients"),
    ],
)
def test_a_replay_that_is_another_step_is_undone_and_steps_are_taken_one_by_one(cells, replay, what):
    with pytest.warns(UserWarning, match=f"a step that is replayed as a CUDA graph leaves other .*{what}.* than the"):
        step = trained(cells, Altered(replay))
    assert step.capture is None
    assert not step.replays
    assert step.taken == int(step.count) == 36
    assert torch.allclose(step.sums, trained(cells, None).sums, rtol=1e-5)


def test_a_replay_that_fails_is_undone(cells, caplog):
    with caplog.at_level(logging.INFO, "scvae"):
        step = trained(cells, Altered(an_error_half_way))
    assert step.capture is None
    assert "illegal memory access" in caplog.text
    assert torch.allclose(step.sums, trained(cells, None).sums, rtol=1e-5)


def test_a_replay_may_add_up_in_another_order(cells, no_warning):
    """As atomic additions do, each time they run."""

    def rounded(take):
        take()
        step = take.func.__self__
        for _, mean, square in step.adam.states:
            mean += 1e-6 * step.adam.states[0][1].abs().max() * torch.randn_like(mean)
            square.mul_(1 + 1e-6)

    with no_warning():
        step = trained(cells, Altered(rounded))
    assert len(step.replays) == 2


def test_a_loss_that_is_not_finite_is_no_fault_of_the_replay(adata, breaking, no_warning):
    cells = read_cells(adata, read_schema(adata, batch_key="batch"))
    program = breaking(cells.schema, n_latent=3, n_hidden=8)
    program.initialise(cells)
    step = Step(program, cells, 30, Recorder())
    step.kl_weight.fill_(1.0)
    with no_warning(), unchecked():
        for rows, n_nonzero in [part for _ in range(12) for part in cells.parts(30)]:
            step(rows, n_nonzero)
    assert not step.finite
    assert step.capture is not None
    assert step.replays


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
    gradients = gradients.mT.contiguous().mT  # lies in memory column by column, as the gradient of a transpose may
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
            monkeypatch.setattr(svi, "CudaGraphs", recording.CudaGraphs if capture else (lambda device: None))
            return train(program, cells, Training(40, 30), progress=False).history["elbo"].iloc[-1]

    with caplog.at_level(logging.INFO, "scvae"):
        captured, plain = (torch.tensor([final(c, seed) for seed in range(8)]) for c in (True, False))
    assert caplog.records == []  # nothing fell back
    error = (captured.var() / 8 + plain.var() / 8).sqrt()
    assert abs(captured.mean() - plain.mean()) < 4 * error
    assert captured.unique().numel() == 8  # random numbers stay random
