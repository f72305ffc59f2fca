"""What is replayed from a recording is what the function would have done, to the last bit; or it is not replayed."""

import contextlib
import logging
import types
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import scvae
from scvae.inference import svi
from scvae.inference.recording import CudaGraphs, Recorded


@pytest.fixture
def logged(caplog):
    with caplog.at_level(logging.INFO, "scvae"):
        yield caplog


class Regression:
    """Steps of gradient descent, with draws, in-place changes, views and running statistics."""

    def __init__(self, device="cpu"):
        torch.manual_seed(0)
        self.calls = 0
        self.x, self.y = torch.randn(50, 4, device=device), torch.randn(50, device=device)
        self.rows = torch.arange(10, device=device)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Dropout(0.5), nn.Linear(8, 1))
        self.net.to(device)
        self.total = torch.zeros((), device=device)

    def __call__(self):
        self.calls += 1
        x = self.x[self.rows]
        noise = torch.empty_like(x).normal_()
        x = (x + 0.1 * noise).t().contiguous().t()
        loss = ((self.net(x).squeeze(-1).exp() - self.y[self.rows]) ** 2).mean()
        parameters = list(self.net.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.data -= 0.01 * gradient
        self.total += loss.detach()

    def state(self):
        return [self.total, *self.net.state_dict().values()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_replay_does_what_the_function_does():
    plain, recorded = Regression(), Regression()
    replay = Recorded(recorded)
    for function, object_ in ((plain, plain), (replay, recorded)):
        torch.manual_seed(1)
        for _ in range(20):
            object_.rows.copy_(torch.randperm(50)[:10])
            function()
    assert equal(plain.state(), recorded.state())
    assert recorded.calls == 2  # was recorded twice
    assert plain.calls == 20


def test_tensors_of_other_lengths_are_handed_on():
    """A row of a ragged matrix, of which two are never of one length."""
    values, ends, row, total = torch.randn(55), torch.arange(11).cumsum(0), torch.zeros(1, dtype=torch.int64), []
    torch.library.define("scvae_test::row", "(Tensor values, Tensor ends, Tensor row) -> Tensor")
    torch.library.impl(
        "scvae_test::row", "cpu", lambda values, ends, row: values[ends[row[0]] : ends[row[0] + 1]].clone()
    )
    sums = torch.zeros(10)

    def add():
        part = torch.ops.scvae_test.row(values, ends, row)
        sums.index_add_(0, row, part.exp().sum().unsqueeze(0))
        total.append(len(part))

    replay = Recorded(add)
    for k in range(10):
        row.fill_(k)
        replay()
    assert torch.allclose(sums, torch.stack([values[ends[k] : ends[k + 1]].exp().sum() for k in range(10)]))
    assert len(total) == 2


def test_a_slice_that_was_the_whole_is_not_always_the_whole():
    rows, ends, total = torch.zeros(1, dtype=torch.int64), torch.tensor([2, 2, 2, 5]), torch.zeros(())
    torch.library.define("scvae_test::ones", "(Tensor ends, Tensor rows) -> Tensor")
    torch.library.impl("scvae_test::ones", "cpu", lambda ends, rows: torch.ones(int(ends[rows[0]])))

    def add():
        total.add_(torch.ops.scvae_test.ones(ends, rows)[:3].sum())

    replay = Recorded(add)
    for k in range(4):
        rows.fill_(k)
        replay()
    assert total == 2 + 2 + 2 + 3


def counts_calls(body):
    """A function that is called each time, as it cannot be replayed; how often it was, and what it made."""
    result = torch.zeros(())
    calls = []

    def function():
        calls.append(None)
        body(len(calls), result)

    replay = Recorded(function)
    for _ in range(6):
        replay()
    return len(calls), result


def a_number(k, result):
    result.add_(k)


def a_tensor_of_a_number(k, result):
    result.add_(torch.tensor(float(k)))


def another_operation(k, result):
    result.add_(1) if k == 2 else result.mul_(1)


def more_operations(k, result):
    for _ in range(k):
        result.add_(1)


def a_value(k, result):
    if result.item() < 100:
        result.add_(1)


def a_comparison(k, result):
    if torch.equal(result, torch.zeros(())) or k:
        result.add_(1)


def a_size(k, result):
    result.add_(torch.ops.scvae_test.size(result.exp()))


torch.library.define("scvae_test::size", "(Tensor x) -> int")
torch.library.impl("scvae_test::size", "cpu", lambda x: x.numel())


def a_mask(k, result):
    x = torch.ones(4).mul(2)
    result.add_(x[x > 1].sum())


def numpy_at_work(k, result):
    x = torch.ones(3).exp()
    result.add_(torch.from_numpy(x.numpy()[1:]).sum())


def numbers_of_numpy(k, result):
    result.add_(torch.from_numpy(np.random.default_rng(k).normal(size=3)).sum())


def a_shape(k, result):
    result.add_(torch.ones(k).sum())


@pytest.mark.parametrize(
    "body",
    [
        a_number,
        a_tensor_of_a_number,
        another_operation,
        more_operations,
        a_value,
        a_comparison,
        a_size,
        a_mask,
        numpy_at_work,
        numbers_of_numpy,
        a_shape,
    ],
)
def test_what_cannot_be_replayed_is_called_and_the_log_says_so(body, logged):
    n_calls, result = counts_calls(body)
    assert n_calls == 6
    assert "Steps are not replayed from a recording: " in logged.text
    expected = torch.zeros(())
    for k in range(1, 7):
        body(k, expected)
    assert torch.equal(result, expected)


def test_an_error_in_a_replay_is_the_error_of_the_operation():
    rows, x, total = torch.zeros(1, dtype=torch.int64), torch.arange(3.0), torch.zeros(1)

    def function():
        total.add_(x[rows])

    replay = Recorded(function)
    for k in range(3):
        rows.fill_(k)
        replay()
    assert total == 3
    rows.fill_(3)
    with pytest.raises(IndexError, match="out of bounds"):
        replay()


def test_recording_and_replay_hold_no_tensor_longer_than_it_is_needed():
    alive, most = weakref.WeakSet(), []
    torch.library.define("scvae_test::step", "(Tensor x) -> Tensor")

    @torch.library.impl("scvae_test::step", "cpu")
    def step(x):
        result = x + 1
        alive.add(result)
        most.append(len(alive))
        return result

    total = torch.zeros(3)

    def function():
        x = total
        for _ in range(5):
            x = torch.ops.scvae_test.step(x)
        total.copy_(x)

    replay = Recorded(function)
    for _ in range(3):
        replay()
    assert total.tolist() == [15.0] * 3
    assert max(most) == 2  # what is made, and what it is made of


PROGRAMS = {
    "zinb": {},
    "nb, gene-cell": {"likelihood": "nb", "dispersion": "gene-cell", "dropout_rate": 0.2},
    "poisson, observed": {"likelihood": "poisson", "library": "observed", "prior": "normal"},
    "gene-batch": {"dispersion": "gene-batch", "n_layers": 0},
    "full": {"posterior": "full", "prior": "vamp", "n_components": 3},
    "low rank": {"posterior": "low_rank"},
    "iaf": {"posterior": "iaf"},
    "stable iaf": {"posterior": "iaf_stable", "prior": "normal"},
    "gaussian": {"program": "gaussian", "check_counts": False},
    "gaussian, linear": {"program": "gaussian", "noise": "shared", "n_layers": 0},
    "vq": {"program": "vq"},
    "vq_gaussian": {"program": "vq_gaussian"},
    "pose": {"program": "pose", "image_key": "images", "n_latent": 2},
    "matrix_normal": {"program": "matrix_normal", "image_key": "images"},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", PROGRAMS.values(), ids=PROGRAMS.keys())
def test_programs_are_trained_the_same_by_replays(options, adata, monkeypatch):
    adata.obsm["images"] = np.random.default_rng(0).uniform(size=(adata.n_obs, 8, 8)).astype(np.float32)
    options = {"batch_key": "batch", "max_epochs": 12, "batch_size": 30, "progress": False, **options}
    recorded = []
    monkeypatch.setattr(svi, "Recorded", lambda function: recorded.append(Recorded(function)) or recorded[-1])
    svi.Recorded.fixed_shapes = False
    replayed = scvae.fit(adata, **options)
    assert all(r.run.__name__ == "replay" for r in recorded)
    monkeypatch.setattr(svi, "Recorded", None)
    plain = scvae.fit(adata, **options)
    assert replayed.history.equals(plain.history)
    assert equal(replayed.program.state_dict().values(), plain.program.state_dict().values())


# ---- CUDA graphs, with a stand-in for torch.cuda --------------------------------------------------------------------


class FakeCuda:
    """What of ``torch.cuda`` a recording asks for, and in what order; a recording that breaks off ends as torch's."""

    def __init__(self):
        self.asked, self.current, self.mode, self.is_broken = [], "default stream", 0, False
        self.default_generators = [self, self]

    def device(self, device):
        self.asked.append(f"device {torch.device(device).index if isinstance(device, torch.device) else device}")
        return contextlib.nullcontext()

    def current_device(self):
        return 1

    def Stream(self):
        return "side stream"

    def graph_pool_handle(self):
        return "pool"

    def current_stream(self):
        return self.current

    def set_stream(self, stream):
        self.current = stream

    def get_rng_state(self):
        return torch.zeros(16, dtype=torch.uint8)

    def graphsafe_set_state(self, generator):
        self.asked.append(f"random numbers as {generator}")

    def synchronize(self):
        self.asked.append("synchronize")

    def CUDAGraph(self):
        return types.SimpleNamespace(replay=lambda: self.asked.append("replay"))

    def get_sync_debug_mode(self):
        return self.mode

    def set_sync_debug_mode(self, mode):
        self.mode = mode

    @contextlib.contextmanager
    def graph(self, graph, *, pool, stream, capture_error_mode):
        self.asked.append(f"graph in {pool} on {stream}, {capture_error_mode}")
        self.current = stream
        try:
            yield
        finally:
            if self.is_broken:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            self.current = "default stream"


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(torch, "cuda", fake)
    monkeypatch.setattr(torch, "Generator", lambda device: types.SimpleNamespace(set_state=lambda state: None))
    monkeypatch.setattr(
        torch._C, "_cuda_endAllocateToPool", lambda *given: fake.asked.append(("end", *given)), raising=False
    )
    return fake


def test_a_graph_is_recorded_on_its_own_gpu_and_stream_while_waiting_is_an_error(cuda, process_unchanged):
    capture = CudaGraphs(torch.device("cuda", 1))
    modes = []
    for _ in range(2):
        capture(lambda: modes.append(cuda.mode))()
    assert modes == ["error", "error"]
    assert cuda.mode == 0
    assert cuda.current == "default stream"
    each = ["device 1", "synchronize", "graph in pool on side stream, thread_local", "replay"]
    assert cuda.asked == ["device 1", *each, *each]


@pytest.mark.parametrize("is_broken", [False, True])
def test_after_a_recording_that_failed_the_gpu_is_as_before(cuda, is_broken):
    def waits():
        raise RuntimeError("called a synchronizing CUDA operation")

    capture = CudaGraphs(torch.device("cuda", 1))
    cuda.is_broken = is_broken
    with pytest.raises(RuntimeError, match="previous error during capture" if is_broken else "synchronizing"):
        capture(waits)
    assert cuda.mode == 0
    assert cuda.current == "default stream"
    assert cuda.asked[-2].startswith("random numbers as ")
    assert cuda.asked[-1] == ("end", 1, "pool")
