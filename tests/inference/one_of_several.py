"""A process that trains together with others, and answers what a test asks of it: ``python one_of_several.py PORT``."""

import hashlib
import json
import logging
import os
import sys
import time
from multiprocessing.connection import Client

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

import scvae
from scvae.boundary.process import seeded, unchecked
from scvae.boundary.ranks import ranks_of
from scvae.data import shuffling
from scvae.data.reading import read_cells, read_schema
from scvae.data.shuffling import shuffled
from scvae.data.stored import cells_of
from scvae.inference import svi
from scvae.inference.recording import Recorded
from scvae.inference.steps import Step
from scvae.inference.svi import NonFiniteLoss, Run, Training
from scvae.programs import PROGRAMS, ZINB

CPU = torch.device("cpu")


def data(program="zinb", n=84):
    """Cells of two batches, as the program wants them: counts, real numbers or images."""
    adata = scvae.datasets.simulated_batches(
        n_cells=n, n_genes=24, n_types=2, n_batches=2, library_size=50, type_scale=1, dropout=0.05, seed=3
    )
    rng = np.random.default_rng(0)
    adata.obs["label"] = np.where(np.arange(n) % 3, adata.obs["cell_type"].astype(str), "Unknown")
    if PROGRAMS[program].kind == "real":
        adata.X = (3 + rng.normal(size=(n, 3)) @ rng.normal(size=(3, 24))).astype(np.float32)
    if PROGRAMS[program].of_images:
        rows = rng.integers(1, 7, n)
        mean = 0.1 + 0.8 * (np.abs(np.arange(8) - rows[:, None]) <= 1)[:, :, None] * np.ones((1, 1, 8))
        images = rng.random(mean.shape) < mean
        obs = pd.DataFrame({"batch": pd.Categorical((np.arange(n) % 2).astype(str))}, index=adata.obs_names)
        return AnnData(obs=obs, obsm={"image": images.astype(np.float32)})
    return adata


def keys(program):
    return {"image_key": "image"} if PROGRAMS[program].of_images else {"batch_key": "batch"}


class Broken(ZINB):
    """ZINB that cannot say anything of the cells with one library size, once it has taken so many steps."""

    name = "broken"

    def __init__(self, schema, *, library_size=0.0, after=5, **options):
        super().__init__(schema, **options)
        self.options |= {"library_size": library_size, "after": after}
        self.wrong, self.after, self.n = library_size, after, 0
        self.decoder.register_forward_pre_hook(self.spoil)

    def spoil(self, decoder, given):
        z, l, batch = given
        self.n += self.training
        if self.training and self.n > self.after:
            l = l.masked_fill(batch.library_size == self.wrong, torch.nan)
        return z, l, batch


def fitted(rank, program="zinb", unlike=(), eager=False, n_steps=100, n=84, **options):
    """What a fit gives: a digest of all numbers, and the history."""
    torch.set_num_threads(1)
    adata = data(program, n)
    options = {"batch_size": 32, "n_latent": 3, "min_steps": n_steps, "max_steps": n_steps} | keys(program) | options
    options |= {"n_hidden": 8} if program not in ("pose", "matrix_normal") else {"n_layers": 2}
    if rank and unlike == "cells":
        adata = adata[::-1].copy()
    if rank and unlike == "seed":
        options["seed"] = 1
    logged = Log()
    if eager:
        svi.Recorded = Eager
    try:
        model = scvae.fit(adata, program, progress=False, device="cpu", **options)
    finally:
        svi.Recorded = Recorded
        logging.getLogger("scvae").removeHandler(logged)
    numbers = [*model.program.state_dict().values(), torch.tensor(adata.obsm["X_scvae"])]
    digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in numbers)).hexdigest()
    return {
        "digest": digest,
        "history": model.history.to_dict("list"),
        "log": logged.lines,
        "steps": model.course.n_steps,
    }


class Eager:
    """Stands in for a recording: what is written is done each time."""

    fixed_shapes = False

    def __init__(self, function):
        self.function = function

    def __call__(self):
        self.function()


class Log(logging.Handler):
    def __init__(self):
        super().__init__(logging.INFO)
        self.lines = []
        logging.getLogger("scvae").setLevel(logging.INFO)
        logging.getLogger("scvae").addHandler(self)

    def emit(self, record):
        self.lines.append(record.getMessage())


def broken(rank, row):
    """The error of a fit that fails in one cell, its step and the last one, and how long that took until the end."""
    adata = data()
    adata.X = adata.X.toarray()
    adata.X[row, 0] += 1000
    advance, started = Run.advance, []

    def timed(run, pace):
        started.append(time.monotonic())
        advance(run, pace)

    Run.advance = timed
    try:
        scvae.fit(
            adata,
            Broken,
            progress=False,
            batch_key="batch",
            batch_size=32,
            n_hidden=8,
            library_size=float(adata.X[row].sum()),
        )
    except NonFiniteLoss as error:
        seconds = time.monotonic() - started[-1]
        return {"message": str(error), "rows": error.rows, "steps": [error.step, len(started)], "seconds": seconds}
    finally:
        Run.advance = advance


class Still(TorchDispatchMode):
    """What is drawn is the same number, for every cell, in one process and in several."""

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # to skip torch's compiler, torch would load it, for seconds

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in function.tags and function is not torch.ops.aten.dropout.default:
            result.fill_(0.5 if result.is_floating_point() else 0)
        return result


def stepped(rank, program="zinb", n_steps=40, size=32, rate=1e-3, **options):
    """All numbers after some steps without noise, by name; with statistics of the batch normalisation that stay."""
    torch.set_num_threads(1)
    adata = data(program)
    options = (
        {"n_latent": 3} | ({"n_hidden": 8} if program not in ("pose", "matrix_normal") else {"n_layers": 2}) | options
    )
    with seeded(0, CPU), unchecked(), ranks_of(CPU) as ranks:
        cells = read_cells(adata, read_schema(adata, kind=PROGRAMS[program].kind_of(options), **keys(program)))
        made = PROGRAMS[program](cells.schema, **options)
        made.initialise(cells)
        step = Step(made, cells, size, ranks=ranks)
        step.decays.fill_(1.0)
        step.rate.fill_(rate)
        step.kl_weight.fill_(1.0)
        for module in made.modules():
            if isinstance(module, _BatchNorm):
                module.eval().train = lambda mode=True: None
        order = cells.shuffled(size, torch.arange(len(cells)), 0, ranks.rank, ranks.n)
        with Still():
            for _ in range(n_steps):
                step(*next(order), order.n_drawn)
        return {name: value.numpy() for name, value in made.state_dict().items()} | {"sums": step.sums.numpy()}


def taken_up(rank, at, until):
    """Digests of a run that is taken up again where it was, and of the same run without that."""
    torch.set_num_threads(1)
    adata = data()
    training = Training(min_steps=60, max_steps=60, batch_size=32)

    def start(ranks):
        cells = read_cells(adata, read_schema(adata, batch_key="batch"))
        program = ZINB(cells.schema, n_latent=3, n_hidden=8, prior="mixture")
        program.initialise(cells)
        program.train()
        return Run(program, cells, training, ranks=ranks)

    def go_on(run, until):
        while run.step.taken < until:
            run.advance(svi.Fixed())
        return [value.clone() for value in run.program.state_dict().values()], run.history

    with seeded(0, CPU), unchecked(), ranks_of(CPU) as ranks:
        run = start(ranks)
        go_on(run, at)
        content, tensors = run.state()
        content = json.loads(json.dumps(content))
        tensors = {name: value.clone() for name, value in tensors.items()}
        whole = go_on(run, until)
        torch.manual_seed(5)
        other = start(ranks)
        other.restore(content, tensors)
        again = go_on(other, until)
        assert str(again[1]) == str(whole[1])
        return all(map(torch.equal, again[0], whole[0])), len(tensors["own.random.cpu"])


def start(rank):
    """What the processes start with: a digest of the program, and of the noise that is drawn next."""
    adata = data()
    with seeded(0, CPU), ranks_of(CPU) as ranks:
        cells = read_cells(adata, read_schema(adata, batch_key="batch"))
        program = ZINB(cells.schema, n_latent=3, n_hidden=8)
        if rank:
            program.v.add_(1)  # as if it had been started by another processor
        Run(program, cells, Training(batch_size=32), ranks=ranks)
        return str([value.tolist() for value in program.state_dict().values()]), torch.randn(2).tolist()[0]


def embedded(rank, **options):
    """The latent coordinates that a fit writes."""
    adata = data()
    scvae.fit(adata, batch_key="batch", progress=False, device="cpu", **options)
    return adata.obsm["X_scvae"]


def agreements(rank):
    """What the processes agree on, of this and that."""
    with ranks_of(CPU) as ranks:
        values = [torch.full((3,), float(rank)), torch.tensor(rank), torch.tensor([rank == 0, True])]
        ranks.copy_first(values)
        means = [torch.full((2, 2), float(rank)), torch.tensor([2.0 * rank])]
        ranks.average(means)
        return {
            "rank": ranks.rank,
            "first": [value.tolist() for value in values],
            "means": [value.tolist() for value in means],
            "agreed": [ranks.agreed(rank == 1), ranks.agreed(False)],
            "gathered": ranks.gathered({"rank": rank, "text": "ä" * rank, "nan": float("nan")}),
        }


def rows_of_a_pass(rank, n_ranks, n, size, path=None):
    """What the processes see of the cells in a pass; of cells in memory, or of a file of them."""
    adata = data(n=n)
    if path is None:
        cells = read_cells(adata, read_schema(adata))
        units = torch.arange(n)
    else:
        cells = cells_of(shuffled(path, check_counts=True), CPU, 200_000, size)
        units = torch.cat(cells.split(0, 0))
    order = cells.shuffled(size, units, 0, rank, n_ranks)
    found = []
    for _ in range(order.n_parts):
        rows, _ = next(order)
        found.append((cells.origin(rows).tolist(), order.n_drawn))
    order.close()
    return found


def lost(rank):
    """What becomes of a process when another one ends."""
    with ranks_of(CPU) as ranks:
        if rank:
            raise ValueError("This one cannot go on.")
        ranks.gathered(None)


def making_one_store(rank, path):
    """Fit to a file of cells, of which one process makes the store."""
    made = []
    write = shuffling._write
    shuffling._write = lambda *arguments: (made.append(rank), write(*arguments))
    try:
        model = scvae.fit(
            path, batch_key="batch", n_hidden=8, max_epochs=2, batch_size=32, progress=False, device="cpu"
        )
    finally:
        shuffling._write = write
    values = model.program.state_dict().values()
    digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in values)).hexdigest()
    return digest, made


def main():
    rank = int(os.environ["RANK"])
    with Client(("127.0.0.1", int(sys.argv[1])), authkey=b"tests") as test:
        test.send(rank)
        while (asked := test.recv()) is not None:
            name, options = asked
            try:
                test.send(globals()[name](rank, **options))
            except Exception as error:
                test.send(error)


if __name__ == "__main__":
    main()
