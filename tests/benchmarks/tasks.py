"""One measurement in a process of its own: ``python tests/benchmarks/tasks.py TASK JSON`` prints its figures as JSON.

The tasks of the peers (``scvi_step``, ``scvi_epochs``, ``harmony``, ``score``) want an environment with scvi-tools,
scanpy, harmonypy and scib-metrics; the others want scvae.
"""

from __future__ import annotations

import json
import logging
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import torch

from data import N_GENES, simulated

warnings.simplefilter("ignore")
N_HIDDEN, N_LATENT, N_CELLS = 128, 10, 128  # the architecture that is compared: one layer, minibatches of 128
N_EPOCHS = 5  # of which the median is taken, after a first one
SAME = dict(
    n_layers=1, library="observed", encode_covariates=False, n_hidden=N_HIDDEN, n_latent=N_LATENT, prior="normal"
)


def peak_above(before: int) -> int:
    """Bytes of resident memory at its highest since `resident` was called."""
    return int(_status("VmHWM")) - before


def resident() -> int:
    """Bytes of resident memory; the mark of the highest is set back to it."""
    Path("/proc/self/clear_refs").write_text("5")
    return int(_status("VmRSS"))


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


# ---- The floor -----------------------------------------------------------------------------------------------


def floor(device: str = "cpu", n_cells: int = N_CELLS) -> dict[str, float]:
    """Time of a step's matrix products, forward and backward, and of a fused Adam, and of nothing else."""
    where = torch.device(device)
    x = torch.randn(n_cells, N_GENES, device=where)
    shapes = dict(encode=(N_HIDDEN, N_GENES), z=(2 * N_LATENT, N_HIDDEN), decode=(N_HIDDEN, N_LATENT))
    shapes |= dict(rho=(N_GENES, N_HIDDEN), pi=(N_GENES, N_HIDDEN))
    weights = {name: torch.nn.Parameter(torch.randn(shape, device=where) / 50) for name, shape in shapes.items()}
    biases = [torch.nn.Parameter(torch.zeros(shape[0], device=where)) for shape in shapes.values()]
    parameters = [*weights.values(), *biases, torch.nn.Parameter(torch.zeros(N_GENES, device=where))]
    d_rho, d_pi = torch.randn(2, n_cells, N_GENES, device=where)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    adam = torch.optim.Adam(parameters, lr=1e-4, fused=True)
    w = {name: weight.detach() for name, weight in weights.items()}

    def step() -> None:
        h = x @ w["encode"].T
        z = (h @ w["z"].T)[:, :N_LATENT]
        g = z @ w["decode"].T
        g @ w["rho"].T, g @ w["pi"].T
        d_g = d_rho @ w["rho"] + d_pi @ w["pi"]
        d_rho.T @ g, d_pi.T @ g, d_g.T @ z
        d_h = (d_g @ w["decode"]).repeat(1, 2) @ w["z"]
        d_h.T @ x
        adam.step()

    return {"step_ms": _median_ms(step, device)}


def _median_ms(step: object, device: str, n: int = 600) -> float:
    seconds = []
    for _ in range(n):
        start = time.perf_counter()
        step()
        wait(device)
        seconds.append(time.perf_counter() - start)
    return 1e3 * float(np.median(seconds[n // 10 :]))


# ---- A step and an epoch -------------------------------------------------------------------------------------


def step(options: dict | None = None, device: str = "cpu", n_cells: int = 10_000, batch_size: int = N_CELLS) -> dict:
    """Time of a step of ours in a long training, and the memory that training adds to the data."""
    adata = simulated(n_cells)
    before = resident()
    times = _times_of_steps(adata, N_EPOCHS + 1, SAME if options is None else options, device, batch_size)
    memory = torch.cuda.max_memory_allocated() if device != "cpu" else peak_above(before)
    return _times(times, -(-n_cells // batch_size), device) | {"peak_mb": memory / 1e6}


def gpu_epoch(n_cells: int = 1_000_000, device: str = "cuda", batch_size: int = N_CELLS) -> dict:
    """Time of an epoch with default settings, and percent of the last one during which the GPU was at work."""
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop-ms=100"]
    samples: list[subprocess.Popen] = []

    def watch(n_taken: int) -> None:
        if n_taken == N_EPOCHS * -(-n_cells // batch_size):
            samples.append(subprocess.Popen(query, stdout=subprocess.PIPE, text=True))

    times = _times_of_steps(simulated(n_cells), N_EPOCHS + 1, {}, device, batch_size, watch)
    samples[0].terminate()
    percent = [float(line.split()[0]) for line in samples[0].communicate()[0].splitlines()]
    return {
        "epoch_s": _times(times, -(-n_cells // batch_size), device)["epoch_s"],
        "busy_percent": float(np.mean(percent)),
    }


def _times_of_steps(
    adata: anndata.AnnData,
    n_epochs: int,
    options: dict,
    device: str,
    batch_size: int,
    watch: Callable[[int], None] = lambda n_taken: None,
) -> list[float]:
    """Train our model for so many epochs; return when each step ended."""
    from scvae.boundary.process import device_of, seeded
    from scvae.data.reading import read_cells, read_schema
    from scvae.inference import svi
    from scvae.programs import ZINB

    where = device_of(device)
    with seeded(0, where):
        schema = read_schema(adata, batch_key="batch")
        cells = read_cells(adata, schema, device=where)
        program = ZINB(schema, **options).to(where)
        program.initialise(cells)
        n_steps, times = -(-adata.n_obs // batch_size), []

        class Clock(svi.Progress):
            def update(self, n: int = 1) -> None:
                if (len(times) + 1) % n_steps == 0:
                    wait(device)
                times.append(time.perf_counter())
                watch(len(times))

        svi.Progress = Clock
        svi.train(program, cells, svi.Training(max_epochs=n_epochs, batch_size=batch_size), progress=False)
        wait(device)
    return times


def scvi_step(device: str = "cpu", n_cells: int = 10_000, batch_size: int = N_CELLS) -> dict:
    """Time of a step of scvi-tools with its defaults, and the memory that training adds to the data."""
    adata = simulated(n_cells)
    before = resident()
    times = _scvi_times(adata, N_EPOCHS + 1, device, batch_size, "batch", train_size=1.0)
    memory = torch.cuda.max_memory_allocated() if device != "cpu" else peak_above(before)
    return _times(times, -(-n_cells // batch_size), device) | {"peak_mb": memory / 1e6}


def _times(times: list[float], n_steps: int, device: str) -> dict[str, float]:
    """Time of a step and of an epoch, medians after the first epoch, from when each step ended.

    On a GPU, which steps do not wait for, the time of a step is that of an epoch by its steps.
    """
    epoch = float(np.median(np.diff(times[n_steps - 1 :: n_steps])))
    step = epoch / n_steps if device != "cpu" else float(np.median(np.diff(times[n_steps - 1 :])))
    return {"step_ms": 1e3 * step, "epoch_s": epoch}


def _scvi_times(
    adata: anndata.AnnData, n: int, device: str, batch_size: int, batch_key: str | None, **options: float
) -> list[float]:
    """Train scvi-tools' model for so many epochs; return when each step ended."""
    import lightning.pytorch as lightning
    import scvi

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("scvi").setLevel(logging.ERROR)
    times: list[float] = []

    class Clock(lightning.Callback):
        def on_train_batch_end(self, trainer: lightning.Trainer, *_: object) -> None:
            if trainer.is_last_batch:
                wait(device)
            times.append(time.perf_counter())

    scvi.settings.seed = 0
    scvi.model.SCVI.setup_anndata(adata, batch_key=batch_key)
    model = scvi.model.SCVI(adata, n_hidden=N_HIDDEN, n_latent=N_LATENT, n_layers=1)
    options |= dict(accelerator="cpu" if device == "cpu" else "gpu", callbacks=[Clock()], enable_progress_bar=False)
    model.train(n, batch_size=batch_size, **options)
    return times


# ---- Time to quality -----------------------------------------------------------------------------------------


def _split(path: str) -> tuple[anndata.AnnData, anndata.AnnData, str | None]:
    adata = anndata.read_h5ad(path)
    adata = adata[:, adata.var["highly_variable"].to_numpy()].copy()
    batch_key = "batch" if "batch" in adata.obs and adata.obs["batch"].nunique() > 1 else None
    train, test = (adata[(adata.obs["split"] == part).to_numpy()].copy() for part in ("train", "test"))
    return train, test, batch_key


def quality(path: str, target: float, library: str = "observed") -> dict:
    """Seconds of a default ``scvae.fit`` until the test likelihood is above `target`, and until it ends.

    The weights are copied every 10 steps while the clock stands still, and judged afterwards.
    """
    import scvae
    from scvae.inference import svi
    from scvae.programs import ZINB

    train, test, batch_key = _split(path)
    programs, copies, pause = [], [], [0.0]
    initialise = ZINB.initialise

    def remember(program: ZINB, cells: object) -> None:
        programs.append(program)
        initialise(program, cells)

    class Watch(svi.Progress):
        def update(self, n: int = 1) -> None:
            self.n += n
            if self.n % 10 == 0:
                now = time.perf_counter()
                state = {name: value.clone() for name, value in programs[0].state_dict().items()}
                copies.append((now - start - pause[0], state))
                pause[0] += time.perf_counter() - now

    ZINB.initialise, svi.Progress = remember, Watch
    start = time.perf_counter()
    fitted = scvae.fit(train, batch_key=batch_key, library=library, progress=False)
    total = time.perf_counter() - start - pause[0]
    final = float(fitted.log_likelihood(test, n_samples=256).mean())
    for seconds, state in copies:
        fitted.program.load_state_dict(state)
        # the ELBO is below the likelihood and cheap: only where it comes near does the latter have to be asked
        if fitted.elbo(test, n_samples=1).mean() < target - 15:
            continue
        if (reached := float(fitted.log_likelihood(test, n_samples=256).mean())) >= target:
            return {"reached_s": seconds, "reached": reached, "fit_s": total, "final": final}
    return {"reached_s": float("inf"), "reached": final, "fit_s": total, "final": final}


def scvi_training(path: str, n_epochs: int = 20) -> dict:
    """Seconds of a default training of scvi-tools: its number of epochs, times the median epoch of a few."""
    train, _, batch_key = _split(path)
    times = _scvi_times(train, n_epochs, "cpu", N_CELLS, batch_key)
    epoch = _times(times, len(times) // n_epochs, "cpu")["epoch_s"]
    return {"training_s": epoch * min(round(20_000 / train.n_obs * 400), 400)}


# ---- Beside other programs -----------------------------------------------------------------------------------


def fit(path: str) -> dict:
    """Seconds of a default ``scvae.fit``, embedding included, and of its training alone."""
    import scvae
    from scvae.inference import svi

    train, _, batch_key = _split(path)
    times: list[float] = []

    class Clock(svi.Progress):
        def update(self, n: int = 1) -> None:
            times.append(time.perf_counter())

    svi.Progress = Clock
    start = time.perf_counter()
    scvae.fit(train, batch_key=batch_key, progress=False)
    return {"seconds": time.perf_counter() - start, "training_s": times[-1] - times[0]}


def scvi_fit(path: str, n_epochs: int) -> dict:
    """Seconds of a few epochs of scvi-tools, and of the steps alone."""
    train, _, batch_key = _split(path)
    start = time.perf_counter()
    times = _scvi_times(train, n_epochs, "cpu", N_CELLS, batch_key)
    return {"seconds": time.perf_counter() - start, "training_s": times[-1] - times[0]}


# ---- Integration of many cells -------------------------------------------------------------------------------


def integrate(n_cells: int, output: str, device: str = "auto") -> dict:
    """Seconds of ``scvae.fit`` with its defaults, embedding included."""
    import scvae

    adata = simulated(n_cells)
    start = time.perf_counter()
    scvae.fit(adata, batch_key="batch", device=device, progress=False)
    seconds = time.perf_counter() - start
    np.save(output, adata.obsm["X_scvae"])
    return {"seconds": seconds}


def harmony(n_cells: int, output: str) -> dict:
    """Seconds of normalisation, principal components and Harmony, all with their defaults."""
    import harmonypy
    import scanpy as sc

    adata = simulated(n_cells)
    start = time.perf_counter()
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)
    sc.pp.pca(adata)
    result = harmonypy.run_harmony(adata.obsm["X_pca"], adata.obs, "batch", verbose=False)
    seconds = time.perf_counter() - start
    embedding = np.asarray(result.Z_corr)
    np.save(output, embedding if len(embedding) == n_cells else embedding.T)
    return {"seconds": seconds}


def score(n_cells: int, embedding: str, n_scored: int = 10_000) -> dict:
    """Integration score of the first cells."""
    from integration import score

    obs = simulated(n_cells).obs.iloc[:n_scored].astype(str)
    return score(np.load(embedding)[:n_scored], obs["cell_type"].to_numpy(), obs["batch"].to_numpy())


# ---- Growth --------------------------------------------------------------------------------------------------


def growth(n_cells: int, device: str = "cpu", batch_size: int = N_CELLS) -> dict:
    """Time a cell of an epoch, memory added by a fit, time of embedding."""
    import scvae

    adata = simulated(n_cells)
    counts = adata.X.data.nbytes + adata.X.indices.nbytes + adata.X.indptr.nbytes
    scvae.fit(
        adata[:2000].copy(), batch_key="batch", max_epochs=1, device=device, progress=False
    )  # wakes the libraries
    before = resident()
    start = time.perf_counter()
    fitted = scvae.fit(adata, batch_key="batch", max_epochs=1, batch_size=batch_size, device=device, progress=False)
    fit = time.perf_counter() - start
    memory = peak_above(before)
    before = resident()
    start = time.perf_counter()
    fitted.embed(adata)
    embed = time.perf_counter() - start
    return {
        "fit_s": fit,
        "us_a_cell": 1e6 * fit / n_cells,
        "added_mb": memory / 1e6,
        "counts_mb": counts / 1e6,
        "embed_s": embed,
        "embed_added_mb": peak_above(before) / 1e6,
    }


if __name__ == "__main__":
    task, arguments = sys.argv[1], json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
    figures = globals()[task](**arguments)
    figures["process_peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(json.dumps(figures))
