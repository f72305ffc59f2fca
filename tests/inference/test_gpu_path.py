"""What a GPU is asked to do, shown without one: nothing that it must be waited for, and each time the same.

Three stand-ins take its place. On torch's device "meta" tensors have shapes and no values: a whole step is taken
there, by the operations that a GPU would be given, and whatever needs a value, or tensors of two devices, is refused.
On a fake CUDA device (`FakeTensorMode`) model, guide and questions run forward. And the operations that a GPU would be
given are carried out on the CPU, where their numbers are compared with those of the CPU's own.
"""

import contextlib
import copy
import functools
import itertools

import anndata
import numpy as np
import pytest
import torch
from scipy import sparse
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scvae import fitted
from scvae.boundary.process import seeded, unchecked
from scvae.data.reading import read_cells, read_schema
from scvae.data.shuffling import shuffled
from scvae.data.stored import StoredCells
from scvae.fits import generating
from scvae.inference import marginal
from scvae.inference.evidence import elbo_terms
from scvae.inference.recording import CudaGraphs, _depends_on_values
from scvae.inference.steps import _WARM_UP, Step
from scvae.kernels import operations
from scvae.programs import PROGRAMS

pytestmark = pytest.mark.slow

SIZE, ROOM = 30, 700  # cells of a minibatch, and non-zeros that it has room for

POSTERIORS = ["normal", "full", "low_rank", "iaf", "iaf_stable"]
PRIORS = ["normal", "mixture", "vamp", "labels"]
OTHERS = [
    ("zinb", {"likelihood": "nb"}),
    ("zinb", {"likelihood": "poisson", "library": "observed"}),
    ("zinb", {"dispersion": "gene-batch", "library": "size_factor", "encode_covariates": False}),
    ("zinb", {"dispersion": "gene-cell", "dropout_rate": 0.2, "likelihood": "nb"}),
    ("zinb", {"n_layers": 0, "n_decoder_layers": 0}),
    ("gaussian", {"noise": "shared", "n_hidden": 0}),
    ("gaussian", {"noise": "fixed", "noise_scale": 1.0}),
    ("vq", {}),
    ("vq", {"n_codebooks": 3, "likelihood": "poisson", "restart": False}),
    ("vq_gaussian", {}),
    ("pose", {"pixels": "gaussian", "encoder": "plain"}),
    ("pose", {"pixels": "poisson", "angle_scale": 0.3, "translate": False}),
    ("pose", {"pixels": "nb", "rotate": False}),
    ("pose", {"decoder": "coordinates", "dropout_rate": 0.2}),
    ("matrix_normal", {}),
    ("matrix_normal", {"posterior": "low_rank", "pixels": "gaussian"}),
    ("matrix_normal", {"posterior": "normal", "pixels": "poisson", "dropout_rate": 0.2}),
    ("matrix_normal", {"pixels": "nb"}),
]


def _possible(name, posterior, prior):
    return not (prior == "vamp" and posterior.startswith("iaf")) and not (name == "pose" and prior == "labels")


CASES = [
    (name, {"posterior": posterior, "prior": prior})
    for name, posterior, prior in itertools.product(["zinb", "gaussian", "pose"], POSTERIORS, PRIORS)
    if _possible(name, posterior, prior)
] + OTHERS
NAMES = [", ".join([name, *map(str, options.values())]) for name, options in CASES]
each_program = pytest.mark.parametrize(("name", "options"), CASES, ids=NAMES)


@functools.cache
def _adata():
    import scvae

    adata = scvae.datasets.simulated_batches(
        n_cells=70, n_genes=24, n_types=2, n_batches=2, library_size=50, type_scale=1, dropout=0.05, seed=3
    )
    rng = np.random.default_rng(0)
    adata.obs["size"] = adata.X.sum(1).A1 / 50
    adata.obs["label"] = rng.choice(["a", "b", "Unknown"], adata.n_obs)
    adata.obsm["unit"] = rng.uniform(size=(adata.n_obs, 8, 8)).astype(np.float32)
    adata.obsm["real"] = rng.normal(size=(adata.n_obs, 8, 8)).astype(np.float32)
    adata.obsm["counts"] = rng.poisson(1.0, size=(adata.n_obs, 8, 8)).astype(np.float32)
    return adata


def made(name, options):
    """A program that has been initialised, and the cells, on the CPU."""
    kind, options = PROGRAMS[name], {"n_latent": 3, "n_hidden": 8, **options}
    of, labels_key = kind.kind_of(options), None
    if options.get("prior") == "labels":
        options["prior"], labels_key = "mixture", "label"
    if options.get("prior") in ("mixture", "vamp"):
        options["n_components"] = 8
    schema = read_schema(
        _adata(),
        kind=of,
        image_key=of if kind.of_images else None,
        batch_key="batch",
        labels_key=labels_key,
        size_factor_key="size" if options.get("library") == "size_factor" else None,
    )
    with seeded(0, torch.device("cpu")):
        cells = read_cells(_adata(), schema, with_labels=True)
        program = kind(schema, **options)
        program.initialise(cells)
    return program, cells


def moved(cells, move):
    """Cells whose tensors were moved to another device."""
    cells = copy.copy(cells)
    for name, value in vars(cells).items():
        if isinstance(value, torch.Tensor):
            setattr(cells, name, move(value))
    cells.device = cells.offsets.device
    return cells


class Watched(TorchDispatchMode):
    """Keeps which operations were given what, and refuses what waits for a device, or mixes it with another.

    Numbers in tensors without an axis may lie on the CPU, as a kernel takes them for arguments; no tensor may be
    copied from one device to another.
    """

    def __init__(self):
        super().__init__()
        self.done = []

    @classmethod
    def _should_skip_dynamo(cls):
        return False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        is_sized = kwargs.get("output_size") is not None  # of repeat_interleave
        if (_depends_on_values(function, leaves) and not is_sized) or function in _WAIT:
            raise AssertionError(f"{function} waits for the device")
        is_copy = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        devices = {each.device.type for each in tensors if each.dim() or is_copy}
        if is_copy and kwargs.get("device") is not None:
            devices.add(torch.device(kwargs["device"]).type)
        if len(devices) > 1:
            raise AssertionError(f"{function} is given tensors of {' and '.join(sorted(devices))}")
        self.done.append((function, [_seen(leaf) for leaf in leaves]))
        if function in _ADAM and any(each.device.type == "meta" for each in tensors):
            return None  # of which torch has no shapes
        if function in _SHAPES and isinstance(args[0], FakeTensor):
            return torch.empty(_SHAPES[function](*args), device=args[0].device)
        return function(*args, **kwargs)


class Made(TorchFunctionMode):
    """Refuses to make tensors of numbers of the host on another device, to which they would be copied."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor) and result is not args[0]:
            if result.device.type != "cpu":
                raise AssertionError("a number of the host is copied to the device")
        return result


@contextlib.contextmanager
def watched():
    with Watched() as watching, Made():
        yield watching


#: Of what torch takes apart in a way that asks for a driver where it was built without CUDA.
_SHAPES = {
    torch.ops.aten._log_softmax.default: lambda x, *_: x.shape,
    torch.ops.aten.grid_sampler_2d.default: lambda x, places, *_: (*x.shape[:2], *places.shape[1:3]),
}
_WAIT = {torch.ops.aten._linalg_check_errors.default}
_ADAM = {torch.ops.aten._fused_adamw_.default, torch.ops.aten._fused_adamw_.tensor_lr}


def _seen(leaf):
    """What of an argument a captured kernel depends on: of a tensor all but its values and its place."""
    if isinstance(leaf, torch.Tensor):
        return leaf.device, leaf.dtype, tuple(leaf.shape), leaf.stride()
    return leaf


def step_of(program, cells):
    step = Step(program.train(), cells, SIZE)
    step.kl_weight.fill_(1.0)
    step.rate.fill_(1e-2)
    step.decays.fill_(1.0)
    return step


@each_program
def test_a_whole_step_neither_waits_for_the_device_nor_mixes_it_with_another(name, options):
    """Minibatch, model, guide, gradient and Adam."""
    program, cells = made(name, options)
    cells = moved(cells, lambda tensor: tensor.to("meta"))
    step = step_of(program.to("meta"), cells)
    with unchecked(), watched() as watching:
        step._take(torch.arange(SIZE, device="meta"), ROOM, SIZE, padded=True)
    done = [function for function, _ in watching.done]
    assert done.count(torch.ops.aten._fused_adamw_.tensor_lr) == 1
    assert not any("scvae" in str(function) for function in done)  # these are the operations for CPUs


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The operations that a GPU is given, on the CPU."""
    monkeypatch.setattr(operations, "are_for", lambda tensor: False)


def _minibatches(cells):
    """Cells of which there are more non-zeros in the second minibatch than in the first, and as many as fit."""
    lengths = cells.offsets.diff()
    order = lengths.argsort()
    return order[:SIZE].sort().values, order[-SIZE:].sort().values


def _everything(step):
    return [*step.program.parameters(), *step.program.buffers(), *itertools.chain(*step.adam.states)]


@each_program
def test_padded_steps_are_the_same_operations_at_the_same_places_whatever_the_cells(name, options, as_on_a_gpu):
    program, cells = made(name, options)
    step, rows, done = step_of(program, cells), torch.arange(SIZE), []
    few, many = _minibatches(cells)
    lengths = cells.offsets.diff()
    room = int(lengths[many].sum())
    assert cells.schema.kind != "counts" or int(lengths[few].sum()) < room
    with unchecked():
        step._take(rows, room, SIZE, padded=True)
        places = [tensor.data_ptr() for tensor in _everything(step)]
        for minibatch in (few, many):
            rows.copy_(minibatch)
            with watched() as watching:
                step._take(rows, room, SIZE, padded=True)
            done.append(watching.done)
    assert len(done[0]) == len(done[1]) > 100
    for one, other in zip(*done, strict=True):
        assert one == other
    assert places == [tensor.data_ptr() for tensor in _everything(step)]
    assert step.finite


@each_program
def test_a_padded_step_by_the_operations_for_a_gpu_has_the_numbers_of_the_cpu(name, options, monkeypatch):
    start, cells = made(name, options)
    few, _ = _minibatches(cells)
    n_nonzero = int(cells.offsets.diff()[few].sum())
    steps = []
    for is_padded in (False, True):
        step = step_of(copy.deepcopy(start), cells)
        if is_padded:
            monkeypatch.setattr(operations, "are_for", lambda tensor: False)
        with unchecked(), seeded(1, torch.device("cpu")):
            step._take(few, n_nonzero + 50 * is_padded, SIZE, padded=is_padded)
        steps.append(step)
    ours, theirs = steps
    for site, term in ours.terms.items():
        torch.testing.assert_close(theirs.terms[site], term, rtol=1e-4, atol=1e-3)
    largest = max(mean.abs().max() for _, mean, _ in ours.adam.states)
    for (_, mean, _), (_, other, _) in zip(ours.adam.states, theirs.adam.states, strict=True):  # of the gradients
        torch.testing.assert_close(other, mean, rtol=1e-3, atol=1e-5 * float(largest))
    for buffer, other in zip(ours.program.buffers(), theirs.program.buffers(), strict=True):
        torch.testing.assert_close(other, buffer, rtol=1e-4, atol=1e-5)


def test_there_is_room_for_any_cells_of_a_store_whatever_its_window_shows(tmp_path):
    rng = np.random.default_rng(0)
    counts = (rng.random((5000, 12)) < rng.uniform(0.05, 1, (5000, 1))) * rng.integers(1, 300, (5000, 12))
    counts[:, 0] = 1
    anndata.AnnData(sparse.csr_matrix(counts.astype(np.float32))).write_h5ad(tmp_path / "cells.h5ad")
    store = shuffled(tmp_path / "cells.h5ad")
    cells = StoredCells(store, "cpu", 100_000, batch_size=8)
    assert cells.capacity < 2500
    lengths = np.sort((counts > 0).sum(1))[::-1]
    for n in (1, 8, 300, 5000):
        assert cells.most_nonzeros(n) == lengths[:n].sum()
    units, _ = cells.split(5000, 0)
    order = cells.shuffled(8, units, 0)
    for _ in range(60):
        rows, n_nonzero = next(order)
        padded = cells.batch(rows, cells.most_nonzeros(len(rows)), padded=True)
        assert torch.equal(padded.values, cells.batch(rows, n_nonzero).values)
    order.close()


# ---- Forward on a fake CUDA device ----------------------------------------------------------------------------------

GPU = torch.device("cuda", 0)


class Indexed(TorchFunctionMode):
    """Indexes by operations, as the brackets of a fake tensor ask for a driver where torch was built without CUDA."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__getitem__:
            x, places = _sliced(*args)
            return x if places is None else torch.ops.aten.index.Tensor(x, places)
        if function is torch.Tensor.__setitem__:
            x, places = _sliced(*args[:2])
            value = args[2] if isinstance(args[2], torch.Tensor) else torch.full((), args[2], device=x.device)
            if places is None:
                return torch.ops.aten.copy_.default(x, value)
            return torch.ops.aten.index_put_.default(x, places, value)
        return function(*args, **(kwargs or {}))


def _sliced(x, index):
    """The tensor after all that is no tensor in its brackets, and the tensors, by axis; None where there are none."""
    index = index if isinstance(index, tuple) else (index,)
    n_axes = sum(each is not None and each is not ... for each in index)
    axis, places = 0, []
    for each in index:
        if each is ...:
            places += [None] * (x.dim() - n_axes)
            axis += x.dim() - n_axes
        elif each is None:
            x, axis, places = x.unsqueeze(axis), axis + 1, [*places, None]
        elif isinstance(each, int):
            x = x.select(axis, each)
        elif isinstance(each, slice):
            x = torch.ops.aten.slice.Tensor(x, axis, each.start, each.stop, each.step or 1)
            axis, places = axis + 1, [*places, None]
        elif each.dtype in (torch.bool, torch.uint8) or not each.dim():
            raise AssertionError(f"an index by {each} waits for the device")
        else:
            axis, places = axis + 1, [*places, each]
    return x, (places if any(each is not None for each in places) else None)


@pytest.fixture
def fake():
    """Within it, ``fake(module or cells)`` lies on a GPU that is not there."""
    mode = FakeTensorMode()

    def on_gpu(tensor):
        meta = tensor.detach().to("meta")
        return mode.fake_tensor_converter.from_meta_and_device(mode, meta, GPU)

    def convert(what):
        if not isinstance(what, torch.nn.Module):
            return moved(what, on_gpu)
        what = copy.deepcopy(what)
        for module in what.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = torch.nn.Parameter(on_gpu(parameter), requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = on_gpu(buffer)
        return what

    with torch.no_grad(), unchecked():
        convert.mode = mode
        yield convert


@contextlib.contextmanager
def on(mode):
    with mode, Indexed(), watched() as watching:
        yield watching


EACH_ONCE = [
    case for case in CASES if case in OTHERS or (case[0] == "zinb" and {"normal", "mixture"} & set(case[1].values()))
]


@pytest.mark.parametrize(("name", "options"), EACH_ONCE, ids=[NAMES[CASES.index(case)] for case in EACH_ONCE])
def test_model_guide_and_decoder_run_on_a_fake_gpu(name, options, fake):
    """With each posterior and prior, not with each two; as after training."""
    program, cells = made(name, options)
    program, cells = fake(program.eval()), fake(cells)
    with on(fake.mode) as watching:
        rows = torch.arange(SIZE, device=GPU)
        batch = cells.batch(rows, ROOM, padded=True)
        log_likelihood, kl = elbo_terms(program, batch)
        mean, std = program.embed(batch)
        found = [*log_likelihood.values(), *kl.values(), mean, std, program.decode(mean, batch)]
    assert all(each.device == GPU and len(each) == SIZE for each in found)
    assert not any("scvae" in str(function) for function, _ in watching.done)


def _all(model, adata):
    batches = list(model.program.schema.batches)
    model.embed(adata, give_std=True)
    model.embed(adata, n_samples=2)
    model.denoise(adata, batch=batches, genes=model.genes[:2], n_samples=2)
    if model.program.schema.kind == "counts" and not model.program.of_images:
        model.denoise(adata, library_size="cell")
    model.elbo(adata)
    model.log_likelihood(adata, n_samples=1)
    model.log_likelihood(adata, n_samples=1, method="prior")
    if model.program.of_images:
        model.reconstruct(adata, batch=batches[0])
    if model.program.name == "pose":
        model.reconstruct(adata, pose=(0.0, 0.0, 0.0), size=(5, 9))


ASKED = [
    ("zinb", {"prior": "normal"}),
    ("zinb", {"prior": "labels", "posterior": "iaf", "library": "size_factor"}),
    ("gaussian", {"prior": "vamp"}),
    ("vq", {}),
    ("vq_gaussian", {}),
    ("pose", {}),
    ("matrix_normal", {}),
]


@pytest.mark.parametrize(("name", "options"), ASKED, ids=[", ".join([n, *o.values()]) for n, o in ASKED])
def test_questions_are_answered_on_a_fake_gpu(name, options, fake, monkeypatch):
    """Also of cells of a batch that the model does not know. What the answers are made of waits for nothing."""
    program, cells = made(name, options)
    program, cells, mixes = fake(program.eval()), fake(cells), []

    def each(self, cells, answer, seed=0, batch_size=0, unknown_batch="error", mix=marginal.mean):
        with watched():
            batch = cells.batch(torch.arange(SIZE, device=GPU), ROOM)
            found = [answer(batch)]
            if mix not in mixes:
                found.append(marginal.marginal(self.program, batch, answer, mix))
                mixes.append(mix)
        assert all(each.device == GPU and each.shape == found[0].shape for each in found)
        assert len(found[0]) == SIZE
        return np.zeros(found[0].shape, np.float32)

    monkeypatch.setattr(generating, "alone", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(fitted.Fitted, "_cells", lambda *_, **__: cells)
    monkeypatch.setattr(fitted.Fitted, "_each", each)
    model = fitted.Fitted(program, None, {})
    with fake.mode, Indexed():
        _all(model, _adata())
        with watched():
            assert model.n_latent > 1  # drawn from the prior
        if options.get("prior") != "labels":  # what components are one cluster is found on the host
            with watched():
                program.per_cell(cells.batch(torch.arange(SIZE, device=GPU), ROOM))
    assert len(mixes) >= 4


# ---- On a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@each_program
def test_on_a_gpu_the_replay_of_each_program_is_the_step_taken_one_by_one(name, options, caplog, no_warning):
    program, cells = made(name, options)
    cells = moved(cells, lambda tensor: tensor.cuda())
    with caplog.at_level("INFO", "scvae"), no_warning(), unchecked(), seeded(0, cells.device):
        step = step_of(program.cuda(), cells)
        step.capture = CudaGraphs(cells.device)
        for rows, n_nonzero in [part for _ in range(_WARM_UP + 2) for part in cells.parts(SIZE)]:
            step(rows, n_nonzero)
    assert caplog.records == []
    assert step.replays  # which are kept where the outcomes are the same
    assert int(step.count) == step.taken
    assert step.finite
