"""Several processes train the model that one would train, all of them the same, and end together."""

import importlib.util
import os
import socket
import subprocess
import sys
import textwrap
from contextlib import closing
from multiprocessing.connection import Listener
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch

import scvae
from scvae.boundary import ranks
from scvae.boundary.process import device_of, seeded, unchecked
from scvae.boundary.ranks import Ranks
from scvae.data.reading import read_cells, read_schema
from scvae.data.shuffling import shuffled
from scvae.data.stored import cells_of
from scvae.inference import svi
from scvae.modules.posteriors import POSTERIORS
from scvae.modules.priors import PRIORS
from scvae.programs import ZINB

WORKER = Path(__file__).with_name("one_of_several.py")
_spec = importlib.util.spec_from_file_location("one_of_several", WORKER)
one = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(one)

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
    pytest.mark.slow,
]

#: Every program, and with those that have a choice every posterior and prior.
FITS = [
    *({"program": "zinb", "posterior": name, "prior": "normal"} for name in POSTERIORS),
    *({"program": "gaussian", "posterior": name, "prior": "mixture", "n_components": 4} for name in POSTERIORS),
    *({"program": "zinb", "prior": name} for name in PRIORS if name != "normal"),
    {"program": "gaussian", "prior": "vamp", "n_components": 4},
    {"program": "zinb", "labels_key": "label"},
    {"program": "vq", "n_codes": 8},
    {"program": "vq_gaussian", "n_codes": 8, "n_codebooks": 3},
    {"program": "pose", "n_layers": 1},
    {"program": "matrix_normal"},
]


def name_of(options):
    return "-".join(str(value) for value in options.values())


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class Several:
    """Processes that wait for what they are to do together."""

    def __init__(self, n):
        self.n = n
        with Listener(("127.0.0.1", 0), authkey=b"tests") as listener:
            environment = os.environ | {
                "WORLD_SIZE": str(n),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free_port()),
                "OMP_NUM_THREADS": "1",
            }
            command = [sys.executable, str(WORKER), str(listener.address[1])]
            self.processes = [subprocess.Popen(command, env=environment | {"RANK": str(k)}) for k in range(n)]
            found = [listener.accept() for _ in range(n)]
        self.connections = [each for _, each in sorted((each.recv(), each) for each in found)]

    def __call__(self, name, **options):
        """What each of them returns, or raises."""
        for each in self.connections:
            each.send((name, options))
        return [each.recv() for each in self.connections]

    def close(self):
        for each in self.connections:
            each.send(None)
        for process in self.processes:
            process.wait(30)


@pytest.fixture(scope="module")
def started():
    """Processes by their number, started once."""
    found = {}
    yield found
    for each in found.values():
        each.close()


@pytest.fixture(params=[2, 3])
def several(request, started):
    if request.param not in started:
        started[request.param] = Several(request.param)
    return started[request.param]


#: Fits that several processes are asked for: all of two, and of three a few.
ASKED = pytest.mark.parametrize(
    ("several", "options"),
    [pytest.param(n, fit, id=f"{n}-{name_of(fit)}") for n, fits in ((2, FITS), (3, FITS[::4])) for fit in fits],
    indirect=["several"],
)


@ASKED
def test_all_processes_have_the_same_model_after_a_hundred_steps(several, options):
    first, *others = several("fitted", **options)
    assert first["steps"] == 100, first
    assert not first["log"]  # steps are replayed from a recording
    for other in others:
        assert other["digest"] == first["digest"]
        assert str(other["history"]) == str(first["history"])


@ASKED
def test_several_processes_take_the_steps_that_one_takes_with_all_their_cells(several, options):
    options = {name: value for name, value in options.items() if name != "labels_key"}
    alone = one.stepped(0, **options)
    for found in several("stepped", **options):
        assert found.keys() == alone.keys()
        for name, value in found.items():
            scale = np.abs(alone[name]).max() if name == "sums" else 1
            assert np.abs(value - alone[name]).max() <= 1e-4 * scale, name


def test_what_is_recorded_is_what_is_written(several):
    recorded, eager = several("fitted"), several("fitted", eager=True)
    assert {each["digest"] for each in recorded} == {each["digest"] for each in eager}
    assert len({each["digest"] for each in recorded}) == 1


def test_processes_draw_noise_of_their_own_and_start_alike(several):
    found = several("start")
    assert len({noise for _, noise in found}) == several.n
    assert len({digest for digest, _ in found}) == 1


def test_a_cell_without_a_finite_loss_ends_all_and_is_named(several):
    for row in (3, 50):
        found = several("broken", row=row)
        assert {each["message"] for each in found} == {found[0]["message"]}
        assert f"({one.data().obs_names[row]!r})" in found[0]["message"]
        assert all(each["rows"] == [row] for each in found)
        assert {len({*each["steps"]}) for each in found} == {1}  # no step is taken after it


def test_a_run_is_taken_up_again_by_all(several):
    assert several("taken_up", at=17, until=40) == [(True, several.n)] * several.n


def test_what_processes_agree_on(several):
    mean = (several.n - 1) / 2
    for rank, found in enumerate(several("agreements")):
        assert found["rank"] == rank
        assert found["first"] == [[0.0] * 3, 0, [True, True]]
        assert found["means"] == [[[mean] * 2] * 2, [2 * mean]]
        assert found["agreed"] == [True, False]
        assert [each["text"] for each in found["gathered"]] == ["ä" * k for k in range(several.n)]


def test_alone_a_process_agrees_with_itself():
    values = [torch.arange(3.0)]
    ranks.ALONE.copy_first(values)
    ranks.ALONE.average(values)
    assert values[0].tolist() == [0, 1, 2]
    assert ranks.ALONE.gathered({"a": 1}) == [{"a": 1}]
    assert ranks.ALONE.agreed(True)
    assert not ranks.ALONE.agreed(False)
    assert ranks.joined(*values)[0] is values[0]


@pytest.mark.parametrize(("n", "size", "n_ranks"), [(80, 32, 2), (80, 32, 3), (41, 10, 4), (9, 8, 2)])
def test_every_cell_comes_once_in_a_pass_over_all_processes(n, size, n_ranks):
    shares = [one.rows_of_a_pass(rank, n_ranks, n, size) for rank in range(n_ranks)]
    whole = one.rows_of_a_pass(0, 1, n, size)
    for (rows, n_drawn), *parts in zip(whole, *shares, strict=True):
        assert [row for part, _ in parts for row in part] == rows
        assert {drawn for _, drawn in parts} == {n_drawn} == {len(rows)}


@pytest.mark.parametrize("n_ranks", [1, 2, 3])
def test_every_cell_of_a_file_comes_once_in_a_pass_over_all_processes(n_ranks, tmp_path):
    one.data(n=83).write_h5ad(tmp_path / "cells.h5ad")
    shares = [one.rows_of_a_pass(rank, n_ranks, 83, 32, tmp_path / "cells.h5ad") for rank in range(n_ranks)]
    assert sorted(row for share in shares for rows, _ in share for row in rows) == list(range(83))
    for parts in zip(*shares, strict=True):
        assert {drawn for _, drawn in parts} == {sum(len(rows) for rows, _ in parts)}


def test_the_checksum_of_cells_in_a_file_is_of_all_of_them_and_of_nothing_else(tmp_path):
    """What is in the window, and what was in that memory before, does not matter."""
    digests = []
    for name, last in (("cells", 0), ("same", 0), ("other", 1)):
        adata = one.data(n=600)
        adata.X = adata.X.toarray()
        adata.X[-1, 0] += last
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
        store = shuffled(tmp_path / f"{name}.h5ad", check_counts=True)
        digests.append(cells_of(store, "cpu", 200_000, 16).digest())
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def test_one_process_makes_the_store_of_a_file_for_all(several, tmp_path):
    one.data().write_h5ad(tmp_path / "cells.h5ad")
    found = several("making_one_store", path=str(tmp_path / "cells.h5ad"))
    assert len({digest for digest, _ in found}) == 1
    assert [made for _, made in found] == [[0], *[[]] * (several.n - 1)]


def test_the_end_of_a_process_is_told_to_the_others(several):
    found = several("lost")
    assert str(found[1]) == "This one cannot go on."
    assert type(found[0]) is RuntimeError
    assert str(found[0]).startswith("Another process of the training has ended")


def test_what_processes_were_not_given_alike_is_refused_in_all(several):
    for unlike, what in (("cells", "the cells, by a checksum"), ("seed", "the seed")):
        found = several("fitted", unlike=unlike)
        assert len({str(each) for each in found}) == 1
        assert type(found[0]) is ValueError
        assert f"were not given the same: {what} (" in str(found[0])


def test_a_share_of_one_cell_is_refused(several):
    for each in several("fitted", batch_size=2 * several.n - 1):
        assert type(each) is ValueError
        assert f"shared by {several.n} processes: each takes two cells at least" in str(each)
    assert all(each["steps"] == 3 for each in several("fitted", batch_size=3 * several.n, n_steps=3))


def torchrun(folder, *arguments, code=None, n=2, restarts=0):
    """Run the command line, or a script, in several processes; what they say, and the exit code."""
    where = [str(folder / "script.py")] if code else ["-m", "scvae"]
    if code:
        (folder / "script.py").write_text(textwrap.dedent(code))
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={n}", f"--max-restarts={restarts}"]
    command += ["--master-port", str(free_port()), *where, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)


SMALL = ["--batch-key", "batch", "--max-epochs", 20, "--batch-size", 32, "--n-latent", 3, "--option", "n_hidden=8"]


@pytest.mark.parametrize("several", [2], indirect=True)
def test_the_command_line_ends_as_if_no_process_had_been_killed(several, tmp_path):
    """All are started again, go on from the last checkpoint, and speak and write once."""
    one.data().write_h5ad(tmp_path / "cells.h5ad")
    code = """
    import os, signal
    from scvae.__main__ import main
    from scvae.inference import svi

    advance = svi.Run.advance

    def killed(run, pace):
        advance(run, pace)
        if run.step.taken == 40 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)

    svi.Run.advance = killed
    main()
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(code))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    command += ["--master-port", str(free_port()), "script.py", "fit", "cells.h5ad", "--batch-key", "batch"]
    command += ["--max-epochs", "20", "--batch-size", "32", "--n-latent", "3", "--option", "n_hidden=8"]
    command += ["--checkpoint", "checkpoints", "--checkpoint-minutes", "0.00001", "--resume"]
    command += ["--model", "model", "--output", "out.h5ad"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr
    assert done.stdout.splitlines() == ["model: model", 'embedding: .obsm["X_scvae"] in out.h5ad']
    said = done.stderr.splitlines()
    assert sum(line.startswith("scvae: zinb, 84 cells") for line in said) == 2  # before and after
    assert sum(line.startswith("scvae: the training goes on from step ") for line in said) == 1
    assert scvae.load(tmp_path / "model").course.n_steps == 60
    undisturbed = several("embedded", max_epochs=20, batch_size=32, n_latent=3, n_hidden=8)
    embedding = anndata.read_h5ad(tmp_path / "out.h5ad").obsm["X_scvae"]
    assert {each.tobytes() for each in undisturbed} == {embedding.tobytes()}


def test_what_is_not_shared_is_refused_in_several_processes(monkeypatch, adata):
    for name in ranks._ENVIRONMENT:
        monkeypatch.setenv(name, "2")
    with pytest.raises(ValueError, match="scvae.tune is the work of one process"):
        scvae.tune(adata)


ON_GPU = pytest.param(
    "cuda", "nccl", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), ON_GPU])
def test_a_group_of_one_process_takes_the_steps_of_one_without_a_group(adata, monkeypatch, device, backend):
    """With the exchange in the recording, or in the CUDA graph; and the same noise."""
    monkeypatch.setattr(svi.Run, "_draw_own_noise", lambda run: None)
    where = torch.device(device)
    cells = read_cells(adata, read_schema(adata, batch_key="batch"), device=where)

    def trained(ranks):
        with seeded(0, where), unchecked():
            program = ZINB(cells.schema, n_latent=3, n_hidden=8).to(where)
            program.initialise(cells)
            program.train()
            training = svi.Training(batch_size=32, min_steps=40, max_steps=40)
            run = svi.Run(program, cells, training, ranks=ranks)
            with closing(run):
                for _ in range(30):
                    run.advance(svi.Fixed())
        assert run.step.capture is not None
        assert run.step.replays
        return run.history

    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        group = torch.distributed.group.WORLD.group_name
        history = trained(Ranks(0, 1, where, group))
    finally:
        torch.distributed.destroy_process_group()
    tolerance = 0 if device == "cpu" else 1e-3  # there no sum is the same twice
    for mine, its in zip(history, trained(ranks.ALONE), strict=True):
        assert mine["elbo"] == pytest.approx(its["elbo"], rel=tolerance, abs=0)


@pytest.fixture
def one_of_two(monkeypatch):
    """The second of two processes on a machine with GPUs, as torchrun tells it."""
    told = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    return monkeypatch


def test_each_process_has_a_gpu_of_its_own(one_of_two):
    assert device_of("auto") == device_of("cuda") == torch.device("cuda:1")
    assert device_of("cuda:0") == torch.device("cuda:0")
    assert device_of("cpu") == torch.device("cpu")
    one_of_two.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="Process 1 of this machine has no GPU of its own, torch sees 1"):
        device_of("auto")
    one_of_two.delenv("MASTER_ADDR")  # whoever set the others, it was not torchrun
    assert device_of("auto") == torch.device("cuda")
