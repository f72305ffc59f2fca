"""A fitted model: what can be asked of it, and how it is saved."""

from __future__ import annotations

import html
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData, ImplicitModificationWarning
from pyro import poutine
from safetensors.torch import save as save_tensors
from scipy import sparse
from torch import Tensor

from scvae.boundary.containers import are_files, check_anndata
from scvae.boundary.keys import check_free, check_key, own_keys, stem_of
from scvae.boundary.models import read_model, write_model
from scvae.boundary.options import Range, bytes_of, one_of, real, seed_of, whole
from scvae.boundary.process import alone, device_of, seed_from
from scvae.data import results
from scvae.data.categories import name_of
from scvae.data.cells import Batch, Cells, Schema
from scvae.data.reading import read_cells, some
from scvae.data.tables import Tables, open_tables
from scvae.extending import extended, with_batches
from scvae.inference import evidence, marginal
from scvae.inference.completion import completed
from scvae.inference.marginal import Mix, as_of
from scvae.inference.pace import pace_of
from scvae.inference.progress import Progress
from scvae.inference.svi import Course, Training
from scvae.programs import Program
from scvae.saved import content_of, model_of

__all__ = ["Fitted", "check_writable", "load"]

#: Cells in files: the path of one, or several paths.
Files = str | Path | Sequence[str | Path]

_CHUNK = 1024  # cells at a time, by default
_MIN_STEPS = 200  # of an extension


class Fitted:
    """A fitted model; made by :func:`scvae.fit` and :func:`scvae.load`.

    Cells given to its methods are read as those that it was fitted to: the same layer, covariates and genes, genes
    matched by name. The order of the cells is kept, and the AnnData is left as it is, but for :meth:`transform` and
    ``layer_added``. All of them take these arguments:

    unknown_batch
        What to do with cells of batches (or other categories) that the model has not seen: ``"error"``; ``"ignore"``,
        which leaves the covariate out; or ``"marginal"``, for batches only, which takes such cells as of all known
        batches, weighed by how likely each makes the cell (:mod:`scvae.inference.marginal`). To learn the new batches,
        :meth:`extend` the model.
    missing_genes
        What to do where genes of the model are missing: ``"error"``; ``"zero"``, which takes their counts for 0; or
        ``"impute"``, which takes them as not measured. Their likelihood is then left out, and that of counts is of
        fractions of what was measured, while the encoder is shown what is expected of them given what was
        (:mod:`scvae.inference.completion`).
    batch_size
        Cells that are computed at a time.
    memory
        Of cells in files: how much memory they may take at a time, such as ``"500MB"``.
    seed
        Of the draws, where there are any.

    They raise ``TypeError``, ``KeyError`` and ``ValueError`` as :func:`scvae.fit` does, and for unknown batches,
    missing genes, and arguments that are out of their range.

    Attributes
    ----------
    program
        The generative model and its guide, a ``torch.nn.Module``.
    course
        How the training went, a :class:`scvae.inference.svi.Course`: history, steps, seconds.
    training
        How it was trained: the seed, and what :class:`scvae.inference.svi.Training` lists.
    key_added
        Key of ``.obsm`` under which the embedding was written.
    """

    def __init__(self, program: Program, course: Course, training: dict[str, Any], key_added: str = "X_scvae") -> None:
        self.program = program.eval()
        self.course = course
        self.training = training
        self.key_added = key_added

    def __repr__(self) -> str:
        return "\n    ".join(f"{name}: {text}" if name else text for name, text in self._described().items())

    def _repr_html_(self) -> str:
        title, *rows = self._described().items()
        cells = "".join(
            f"<tr><td style='text-align: left'>{html.escape(name)}</td>"
            f"<td style='text-align: left'>{html.escape(text)}</td></tr>"
            for name, text in rows
        )
        return f"<table><caption style='text-align: left'>{html.escape(title[1])}</caption>{cells}</table>"

    def _described(self) -> dict[str, str]:
        """Return what the model is, line by line; the first has no name."""
        schema, course = self.program.schema, self.course
        features = "pixels" if schema.image_key is not None else "genes" if schema.use_rep is None else "features"
        size = f"{course.n_cells:,} cells × {len(schema.genes):,} {features}"
        if schema.batch_key is not None:
            key = list(schema.batch_key) if isinstance(schema.batch_key, tuple) else schema.batch_key
            size += f", {len(schema.batches)} batch{'es' * (len(schema.batches) > 1)} of {key!r}"
        usual = Training(**self.program.defaults).as_dict()
        changed = {
            **self.program.changed_options(),
            **{name: value for name, value in self.training.items() if usual.get(name, 0) != value},
        }
        steps = f"{course.n_steps:,} of {course.n_planned:,} steps in {course.seconds:.1f} s, {course.stopped}"
        lines = {
            "": f"Fitted {self.program.name!r}: {size}",
            "options": ", ".join(f"{name}={value!r}" for name, value in changed.items()) or "defaults",
            "training": steps,
        }
        if len(self.history):
            lines["final ELBO"] = f"{self.history['elbo'].iloc[-1]:,.1f} nats a cell"
        return {**lines, "device": str(self.device), "written to": f".obsm[{self.key_added!r}]"}

    @property
    def history(self) -> pd.DataFrame:
        """The course of the training, a row for each evaluation: see :class:`scvae.inference.svi.Course`."""
        return self.course.history

    @property
    def stopped(self) -> str:
        """Why the training ended: ``"converged"``, ``"finished"`` or ``"interrupted"``."""
        return self.course.stopped

    @property
    def genes(self) -> list[str]:
        """Names of the genes (or other features) that are modelled."""
        return list(self.program.schema.genes)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.program.parameters()).device

    @property
    def n_latent(self) -> int:
        """Numbers in a latent vector."""
        with alone(0, self.device):
            blank = self._blank(torch.zeros(1, len(self.program.schema.widths), dtype=torch.int64, device=self.device))
            return poutine.trace(self.program.model).get_trace(blank).nodes[self.program.latent]["value"].numel()

    def embed(
        self,
        adata: AnnData | Files,
        *,
        give_std: bool = False,
        n_samples: int | None = None,
        memory: str | int = "2GB",
        seed: int = 0,
        batch_size: int = _CHUNK,
        unknown_batch: str = "error",
        missing_genes: str = "error",
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Return the posterior mean of each cell's latent vector, ``[n_cells, n_latent]``, float32.

        Parameters
        ----------
        adata
            The cells, or the path of a file of them, or of several. Genes may be in any order, and others may be among
            them.
        give_std
            Return the posterior standard deviation too: two arrays, mean and standard deviation.
        n_samples
            Return so many draws of the posterior in place of its mean, ``[n_samples, n_cells, n_latent]``.
        memory, seed, batch_size, unknown_batch, missing_genes
            As above.
        """
        if n_samples is not None and give_std:
            raise ValueError("give_std belongs to the posterior mean, n_samples gives draws: pass one of them.")
        draws = 0 if n_samples is None else whole("n_samples", n_samples)
        how: dict[str, Any] = {"batch_size": batch_size, "unknown_batch": unknown_batch, "missing_genes": missing_genes}
        if are_files(adata):
            how |= {"give_std": give_std, "n_samples": n_samples}
            parts = [
                self.embed(block, seed=own, **how) for _, block, own in self._blocks(self._tables(adata), memory, seed)
            ]
            if give_std:
                return np.concatenate([mean for mean, _ in parts]), np.concatenate([std for _, std in parts])
            return np.concatenate(parts, axis=1 if draws else 0)

        def answer(batch: Batch) -> Tensor:
            if draws:
                return torch.stack([z.flatten(1) for z in self._posterior(batch, draws)], 1)
            return torch.stack(self.program.embed(batch), 1) if give_std else self.program.embed(batch)[0]

        cells = self._cells(adata, unknown_batch=unknown_batch, missing_genes=missing_genes)
        mix = marginal.chosen if draws else marginal.moments if give_std else marginal.mean
        result = self._each(cells, answer, seed, batch_size, unknown_batch, mix)
        if draws:
            return np.ascontiguousarray(result.swapaxes(0, 1))
        return (result[:, 0].copy(), result[:, 1].copy()) if give_std else result

    def transform(
        self,
        adata: AnnData | Files,
        *,
        output: str | Path | None = None,
        memory: str | int = "2GB",
        key_added: str | None = None,
        batch_size: int = _CHUNK,
        unknown_batch: str = "error",
        missing_genes: str = "error",
    ) -> None:
        """Write to other cells what :func:`scvae.fit` writes to those that it is given.

        Parameters
        ----------
        adata
            The cells, to which ``.obsm``, ``.obs`` and ``.uns`` are written; after an error they are as they were. Or
            the path of a file of them, or of several, which are left as they are.
        output
            Of files: the ``.h5ad`` or ``.zarr`` to which is written, as :func:`scvae.fit` does.
        key_added
            Key of ``.obsm`` to write to; by default that of the fit.
        memory, batch_size, unknown_batch, missing_genes
            As above.
        """
        key = self.key_added if key_added is None else check_key("key_added", key_added)
        if are_files(adata):
            tables, output = self._opened(adata, output)
            self._write_files(tables, output, key, memory, batch_size, unknown_batch, missing_genes)
            return
        if output is not None:
            raise ValueError("output belongs to cells in files; this AnnData is written to: leave output out.")
        check_anndata(adata, to_write=True)
        cells = self._cells(adata, unknown_batch=unknown_batch, missing_genes=missing_genes)
        self._write(adata, cells, key, batch_size, unknown_batch)

    def extend(
        self,
        query: AnnData,
        *,
        batch_key: str | Sequence[str] | None = None,
        max_steps: int = 600,
        batch_size: int = 128,
        learning_rate: float = 1e-2,
        deviation_scale: float = 0.5,
        missing_genes: str = "error",
        seed: int = 0,
        progress: bool = True,
    ) -> Fitted:
        """Return a model that knows the batches of other cells too; what it says of known batches remains.

        The new batches learn weights of their own and nothing else, on their own cells (:mod:`scvae.extending`). This
        model is left as it is, and so are the cells: write to them with :meth:`transform` of what is returned.

        Parameters
        ----------
        query
            Cells of new batches, at least two. Those of known batches among them are left alone.
        batch_key
            Column of ``query.obs`` that holds the batches, or several; by default that of the model, in which the model
            that is returned looks for them in any case.
        max_steps
            Steps at most. They end earlier when the bound of held-out cells has stopped rising.
        batch_size, learning_rate, deviation_scale
            As in :class:`scvae.inference.svi.Training`. The smaller `deviation_scale`, the more a new batch is held to
            the mean of the known batches.
        missing_genes
            As above.
        seed
            Makes it repeatable.
        progress
            Whether to show a progress bar.

        Returns
        -------
        Fitted
            The model. Its `course` and `training` are those of the new batches.

        Raises
        ------
        ValueError
            If the model was fitted without batches, or knows all of those of the cells.
        scvae.inference.svi.NonFiniteLoss
            If the loss becomes NaN or infinite.

        Examples
        --------
        >>> import scvae
        >>> adata = scvae.datasets.simulated_batches(n_cells=300, n_genes=50, n_batches=3, seed=0)
        >>> is_new = adata.obs["batch"] == "batch_2"
        >>> model = scvae.fit(adata[~is_new].copy(), batch_key="batch", max_epochs=2, progress=False)
        >>> query = adata[is_new].copy()
        >>> model.extend(query, max_steps=50, progress=False).transform(query)
        >>> query.obsm["X_scvae"].shape == (query.n_obs, 20)
        True
        """
        seed, most = seed_of(seed), whole("max_steps", max_steps)
        training = Training(
            batch_size=batch_size,
            learning_rate=learning_rate,
            deviation_scale=deviation_scale,
            min_steps=min(most, _MIN_STEPS),
            max_steps=most,
            kl_warmup=0.0,
            kl_level=1.0,
        )
        larger, of_query, is_new = with_batches(query, self.program.schema, batch_key)
        cells = self._cells(query[is_new], of_query, missing_genes=missing_genes)
        program, course = extended(self.program, larger, cells, training, seed, progress)
        return Fitted(program, course, {"seed": seed, **training.as_dict()}, self.key_added)

    def denoise(
        self,
        adata: AnnData | Files,
        *,
        batch: str | Sequence[str] | None = None,
        genes: Sequence[str] | None = None,
        library_size: float | str = 1.0,
        n_samples: int | None = None,
        as_frame: bool = False,
        layer_added: str | None = None,
        output: str | Path | None = None,
        memory: str | int = "2GB",
        seed: int = 0,
        batch_size: int = _CHUNK,
        unknown_batch: str = "error",
        missing_genes: str = "error",
    ) -> np.ndarray | pd.DataFrame | None:
        """Return the expression that the model sees behind the counts, ``[n_cells, n_genes]``, float32.

        Parameters
        ----------
        adata
            The cells, or the path of a file of them, or of several.
        batch
            Decode all cells as if they were of this batch; of several, the mean. By default each as of its own.
        genes
            The genes wanted, in this order, or a single one; by default all that are modelled.
        library_size
            What the expression of a cell sums to over all genes of the model: 1 gives fractions, 1e4 counts per ten
            thousand, ``"cell"`` expected counts before dropout, with the cell's own library size.
        n_samples
            Average over draws of the posterior. By default its mean is decoded, without averaging.
        as_frame
            Return a DataFrame, with the names of cells and genes.
        layer_added
            Write the result to this layer of the AnnData too: a dense ``[n_cells, n_vars]``, with NaN for the genes
            that are not modelled or were not asked for.
        output
            Of files: an ``.h5ad`` or ``.zarr`` that becomes a copy of the file of the cells, with the result in the
            layer `layer_added`, written a block of cells at a time; nothing is returned then.
        memory, seed, batch_size, unknown_batch, missing_genes
            As above.
        """
        if are_files(adata):
            if output is None or layer_added is None or as_frame:
                raise ValueError(
                    "Of cells in files the result is written to a layer of a file: output=…, layer_added=…."
                )
        else:
            check_anndata(adata, to_write=layer_added is not None)
            if output is not None:
                raise ValueError("output belongs to cells in files: leave it out, and write the AnnData afterwards.")
        schema = self.program.schema
        genes = schema.genes if genes is None else [genes] if isinstance(genes, str) else list(genes)
        columns = torch.tensor(_index(genes, schema.genes, "gene"), dtype=torch.int64, device=self.device)
        codes = [None] if batch is None else self._batch_codes(batch)
        if isinstance(library_size, str):
            if library_size != "cell":
                raise ValueError(f"library_size is a number above 0 or 'cell', not {library_size!r}.")
        else:
            library_size = real("library_size", library_size, Range(0, open_least=True))
        if (schema.kind != "counts" or schema.image_key is not None) and library_size != 1:
            models = "real numbers" if schema.image_key is None else "images"
            raise ValueError(f"library_size belongs to models of counts; {self.program.name!r} models {models}.")
        n_samples = None if n_samples is None else whole("n_samples", n_samples)
        if layer_added is not None:
            check_key("layer_added", layer_added)
            if (key := schema.use_rep or schema.image_key) is not None:
                raise ValueError(f"layer_added is for genes; the model reads adata.obsm[{key!r}].")
            if layer_added == schema.layer:
                raise ValueError(
                    f"layer_added={layer_added!r} would overwrite the layer that the model reads: choose another."
                )

        def expression(cells: Batch) -> Tensor:
            draws = [self.program.embed(cells)[0]] if n_samples is None else self._posterior(cells, n_samples)
            total = torch.zeros(len(cells), len(columns), device=self.device)
            for code in codes:
                to = cells if code is None else as_of(cells, code, schema)
                for z in draws:
                    total += self.program.decode(z, to)[:, columns]
            size = self.program.library(cells).unsqueeze(-1) if library_size == "cell" else float(library_size)
            return total / (len(codes) * len(draws)) * size

        def asked(adata: AnnData, seed: int) -> np.ndarray:
            cells = self._cells(adata, unknown_batch=unknown_batch, missing_genes=missing_genes)
            if cells.missing is not None and library_size == "cell":
                raise ValueError(
                    "library_size='cell' is of all genes of the model, and not all were measured: give a number, or "
                    "pass missing_genes='zero'."
                )
            return self._each(cells, expression, seed, batch_size, unknown_batch, marginal.mean)

        if are_files(adata):
            tables, output = self._opened(adata, output)
            wanted = str(layer_added)
            if wanted in results.there_will_be(tables).layers:
                raise ValueError(f"layer_added={wanted!r}: {tables.paths[0]} has such a layer; name another.")
            blocks = self._blocks(tables, memory, seed)
            parts = ((first, of_all_genes(asked(block, own), genes, tables)) for first, block, own in blocks)
            results.write_array(output, tables, ("layers", wanted), parts)
            return None
        result = asked(adata, seed)
        if layer_added is not None:
            layer = of_all_genes(result, genes, adata)
            with _own(adata):
                adata.layers[layer_added] = layer
        return pd.DataFrame(result, index=adata.obs_names, columns=[str(g) for g in genes]) if as_frame else result

    def reconstruct(
        self,
        adata: AnnData,
        *,
        pose: str | tuple[float, float, float] = "own",
        size: tuple[int, int] | None = None,
        batch: str | None = None,
        batch_size: int = _CHUNK,
        unknown_batch: str = "error",
        missing_genes: str = "error",
    ) -> np.ndarray:
        """Return what a model of images makes of each cell's image, ``[n_cells, channels, height, width]``, float32.

        Parameters
        ----------
        adata
            The cells.
        pose
            ``"own"``: as each lies. Or an angle in radians, from the x axis (to the right) to the y axis (downwards),
            and a shift of the centre of mass from the centre of the image, in pixels of the data, in these directions:
            all cells in that pose; ``(0, 0, 0)`` is as the model has them upright. Of the program ``"pose"`` only.
        size
            Height and width in pixels of what is returned, which shows the same field at another resolution; by default
            those of the data. Of the program ``"pose"`` only.
        batch
            Decode all cells as if they were of this batch; by default each as of its own.
        batch_size, unknown_batch, missing_genes
            As above.

        Raises
        ------
        ValueError
            If the model is not one of images, or has no poses.
        """
        if not self.program.of_images:
            raise ValueError(f"reconstruct belongs to models of images; ask {self.program.name!r} to denoise.")
        if isinstance(pose, str) and pose != "own":
            raise ValueError(f"pose is 'own', or an angle and two shifts, not {pose!r}.")
        if size is not None:
            given_size = np.ravel(size).tolist()
            if len(given_size) != 2:
                raise ValueError(f"size is a height and a width, not {size!r}.")
            size = (whole("size", given_size[0]), whole("size", given_size[1]))
        code = None if batch is None else self._batch_codes([batch])[0]
        given = None if isinstance(pose, str) else torch.from_numpy(_numbers("pose", pose)).to(self.device)
        if given is not None and given.shape != (3,):
            raise ValueError(f"pose is an angle and two shifts, three numbers, not {pose!r}.")

        def images(cells: Batch) -> Tensor:
            z = self.program.embed(cells)[0]
            where = self.program.pose_of(cells) if given is None else given.expand(len(cells), -1)
            to = cells if code is None else as_of(cells, code, self.program.schema)
            return self.program.render(z, to, where, size)

        cells = self._cells(adata, unknown_batch=unknown_batch, missing_genes=missing_genes)
        return self._each(cells, images, 0, batch_size, unknown_batch, marginal.likeliest)

    def decode(self, z: np.ndarray, *, batch: str | Sequence[str] | None = None) -> np.ndarray:
        """Return the expression, or the image, that latent vectors stand for, ``[n, n_genes]``, float32.

        Parameters
        ----------
        z
            Latent vectors, ``[n, n_latent]``, such as :meth:`embed` returns.
        batch
            Of which batch; of several, and by default of all, the mean.

        Returns
        -------
        numpy.ndarray
            Of counts, fractions that sum to one; of images, expected pixels, ``[n, channels, height, width]``.

        Raises
        ------
        ValueError
            If the model does not know the batch.
        """
        schema, device = self.program.schema, self.device
        codes = range(len(schema.batches)) if batch is None else self._batch_codes(batch)
        given = _numbers("z", z)
        if given.ndim != 2 or given.shape[1] != self.n_latent:
            raise ValueError(f"z is of shape {given.shape}: latent vectors are wanted, [n, {self.n_latent}].")
        parts = []
        with alone(0, device):
            for vectors in torch.from_numpy(given).to(device).split(_CHUNK):
                blank = self._blank(torch.zeros(len(vectors), len(schema.widths), dtype=torch.int64, device=device))
                total = sum(self.program.decode(vectors, as_of(blank, code, schema)) for code in codes)
                parts.append((total / len(codes)).cpu().numpy())
        decoded = np.concatenate(parts) if parts else np.empty((0, len(schema.genes)), np.float32)
        return decoded.reshape(len(decoded), *schema.channels) if self.program.of_images else decoded

    def generate(self, n: int, *, batch: str | None = None, seed: int = 0) -> AnnData:
        """Draw new cells from the prior.

        Parameters
        ----------
        n
            How many, at least 1.
        batch
            Of which batch; by default each cell's is drawn, all being equally likely, and so are the other categorical
            covariates. Continuous covariates are at their mean.
        seed
            Of the draws.

        Returns
        -------
        AnnData
            Counts (CSR), or real numbers, in ``.X`` and in the layer or the entry of ``.obsm`` that the model reads, if
            it does; covariates in ``.obs``; the latent vectors in ``.obsm[key_added]``. Cells without a single count
            may be among them.

        Raises
        ------
        ValueError
            If the model does not know the batch.
        """
        schema, device = self.program.schema, self.device
        n = whole("n", n)
        with alone(seed_of(seed), device):
            codes = torch.empty(n, len(schema.widths), dtype=torch.int64, device=device)
            for i, width in enumerate(schema.widths):
                codes[:, i] = torch.randint(width, (n,), device=device)
            if batch is not None:
                (codes[:, 0],) = self._batch_codes([batch])
            counts, latents = [], []
            for part in codes.split(_CHUNK):
                trace = poutine.trace(self.program.model).get_trace(self._blank(part))
                drawn = trace.nodes["x"]["value"].cpu().numpy()
                counts.append(sparse.csr_matrix(drawn) if schema.kind == "counts" else drawn)
                latents.append(trace.nodes[self.program.latent]["value"].cpu().numpy())
        matrix = sparse.vstack(counts, format="csr") if schema.kind == "counts" else np.concatenate(counts)
        latent = np.concatenate(latents).reshape(n, -1)
        if schema.image_key is not None:
            images = (matrix.toarray() if schema.kind == "counts" else matrix).reshape((n, *(schema.image_shape or ())))
            adata = AnnData(shape=(n, 0), obsm={schema.image_key: images, self.key_added: latent})
        else:
            adata = AnnData(matrix, obsm={self.key_added: latent})
            adata.var_names = list(schema.genes)
        if schema.use_rep is not None:
            dense = matrix.toarray() if schema.kind == "counts" else matrix
            adata.obsm[schema.use_rep] = pd.DataFrame(dense, index=adata.obs_names, columns=list(schema.genes))
        if schema.layer is not None:
            adata.layers[schema.layer] = adata.X
        for i, (key, names) in enumerate(schema.categories.items()):
            of_cells = codes[:, i].cpu().numpy()
            for j, column in enumerate(key if isinstance(key, tuple) else [key]):
                own = [name[j] if isinstance(key, tuple) else name for name in names]
                adata.obs[column] = pd.Categorical(np.asarray(own, dtype=object)[of_cells], list(dict.fromkeys(own)))
        for key, (mean, _) in schema.continuous.items():
            adata.obs[key] = mean
        return adata

    def elbo(
        self,
        adata: AnnData,
        *,
        n_samples: int = 1,
        seed: int = 0,
        batch_size: int = _CHUNK,
        unknown_batch: str = "error",
        missing_genes: str = "error",
    ) -> np.ndarray:
        """Return the evidence lower bound of each cell, nats, ``[n_cells]``, estimated with `n_samples` draws."""
        n_samples = whole("n_samples", n_samples)
        cells = self._cells(adata, unknown_batch=unknown_batch, missing_genes=missing_genes)

        def answer(batch: Batch) -> Tensor:
            return evidence.elbo(self.program, batch, n_samples)

        return self._each(cells, answer, seed, batch_size, unknown_batch, marginal.evidence)

    def log_likelihood(
        self,
        adata: AnnData,
        *,
        n_samples: int = 256,
        method: str = "importance",
        seed: int = 0,
        batch_size: int = _CHUNK,
        unknown_batch: str = "error",
        missing_genes: str = "error",
    ) -> np.ndarray:
        r"""Return an estimate of :math:`\log p(x \mid s)` of each cell, nats, ``[n_cells]``.

        Parameters
        ----------
        adata
            The cells.
        n_samples
            Draws per cell.
        method
            ``"importance"``: weighted draws from the guide (Burda et al. 2016, equation 8), a lower bound in
            expectation that tightens with `n_samples`. ``"prior"``: plain Monte Carlo over the prior, for comparison.
        seed, batch_size, unknown_batch, missing_genes
            As above.
        """
        estimators = {"importance": evidence.importance_weighted, "prior": evidence.prior_monte_carlo}
        estimate, n_samples = estimators[one_of("method", method, estimators)], whole("n_samples", n_samples)
        cells = self._cells(adata, unknown_batch=unknown_batch, missing_genes=missing_genes)

        def answer(batch: Batch) -> Tensor:
            return estimate(self.program, batch, n_samples)

        return self._each(cells, answer, seed, batch_size, unknown_batch, marginal.evidence)

    def loadings(self, *, ranked: bool = False) -> pd.DataFrame:
        r"""Return what each latent dimension does to each gene; of models with a linear decoder.

        Parameters
        ----------
        ranked
            Return a row for each dimension and gene in the place of a table: ``dimension``, ``gene`` and ``loading``,
            those of a dimension by falling absolute value.

        Returns
        -------
        pandas.DataFrame
            ``[n_genes, n_latent]``, the columns ``z0``, ``z1``, …: of counts, the change of the log expression, nats a
            unit of the dimension, against the mean gene; of real numbers, the change of the value. Of the signs and the
            order of the dimensions nothing is meant. A fit writes them to ``.varm[key_added + "_loadings"]``.

        Raises
        ------
        ValueError
            If the decoder has hidden layers.

        References
        ----------
        Svensson, Gayoso, Yosef and Pachter 2020, Bioinformatics 36:3418.

        Examples
        --------
        >>> import scvae
        >>> adata = scvae.datasets.simulated_batches(n_cells=200, n_genes=50, seed=0)
        >>> model = scvae.fit(adata, n_decoder_layers=0, n_latent=4, max_epochs=2, progress=False)
        >>> model.loadings().shape, adata.varm["X_scvae_loadings"].shape
        ((50, 4), (50, 4))
        """
        with alone(0, self.device):
            found = self.program.gene_loadings()
        if found is None:
            raise ValueError(
                "The decoder of this model is not linear, so that its genes have no loadings: fit the program 'zinb' "
                "or 'vq' with n_decoder_layers=0, or 'gaussian' with n_layers=0."
            )
        values = found.cpu().numpy()
        table = pd.DataFrame(values, pd.Index(self.genes, name="gene"), [f"z{i}" for i in range(values.shape[1])])
        if not ranked:
            return table
        order = np.argsort(-np.abs(values), axis=0, kind="stable")
        parts = [pd.DataFrame({"dimension": z, "loading": table[z].iloc[order[:, i]]}) for i, z in enumerate(table)]
        return pd.concat(parts).reset_index()[["dimension", "gene", "loading"]]

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Save the model to a folder, as ``model.json`` and a file of weights; see :func:`scvae.load`.

        At every instant the folder holds the model that was there or this one, whatever happens meanwhile.

        Parameters
        ----------
        path
            The folder. Of a symbolic link, the folder that it leads to.
        overwrite
            Whether a model that is there may be replaced.

        Raises
        ------
        FileExistsError
            If `path` exists, unless `overwrite` is set and it is a saved model or an empty folder.
        OSError
            If it cannot be written. What was there is as it was.
        """
        weights = save_tensors({k: v.contiguous().cpu() for k, v in self.program.state_dict().items()})
        content = {
            "version": version("scvae-pyro"),
            **content_of(self.program, self.course, self.training, self.key_added),
        }
        content = json.loads(json.dumps(content, default=np.generic.item))
        write_model(path, content, weights, overwrite=overwrite)

    def _cells(self, adata: AnnData, schema: Schema | None = None, **how: Any) -> Cells:
        with alone(0, self.device):
            cells = read_cells(adata, schema or self.program.schema, device=self.device, **how)
            if cells.missing is not None:
                cells.complete = partial(completed, self.program)
            return cells

    def _tables(self, source: Files) -> Tables:
        schema = self.program.schema
        if (key := schema.use_rep or schema.image_key) is not None:
            raise ValueError(f"The model reads adata.obsm[{key!r}]: read the file with anndata first.")
        return open_tables(source, schema.layer)

    def _opened(self, source: Files, output: str | Path | None) -> tuple[Tables, str | Path]:
        """Open files of cells, and check the file to which their results are to be written."""
        tables = self._tables(source)
        if output is None:
            raise ValueError("Results of cells in files are written to a file: name it, output='….h5ad'.")
        results.check_output(output, tables)
        return tables, output

    def _blocks(self, tables: Tables, memory: str | int, seed: int = 0) -> Iterator[tuple[int, AnnData, int]]:
        """Go through cells in files; yield the row of the first of some, the cells, and a seed of their own."""
        for first, block in results.blocks_of(tables, self.program.schema, bytes_of("memory", memory)):
            yield first, block, seed if first == 0 else seed_from(seed_of(seed), first)

    def _each(
        self,
        cells: Cells,
        answer: Callable[[Batch], Tensor],
        seed: int = 0,
        batch_size: int = _CHUNK,
        unknown_batch: str = "error",
        mix: Mix = marginal.mean,
    ) -> np.ndarray:
        """Ask something of all cells, so many at a time, in order; `mix` makes one of the answers as of each batch."""
        seed, batch_size = seed_of(seed), whole("batch_size", batch_size)
        result = np.empty(0)
        rows = torch.arange(len(cells), device=cells.device)
        parts = [(rows, answer)]
        if unknown_batch == "marginal":
            is_known = cells.schema.batch_of(cells.codes) >= 0
            parts = [
                (rows[is_known], answer),
                (rows[~is_known], lambda batch: marginal.marginal(self.program, batch, answer, mix)),
            ]
        sizes = {min(batch_size, len(of_part)) for of_part, _ in parts if len(of_part)}
        with alone(seed, self.device), pace_of(self.program, cells, sizes) as pace:
            for of_part, ask in parts:
                for rows, batch in cells.minibatches(batch_size, of_part) if len(of_part) else ():
                    part = pace(partial(ask, batch)).cpu().numpy()
                    if not len(result):
                        result = np.empty((len(cells), *part.shape[1:]), dtype=part.dtype)
                    result[rows.cpu().numpy()] = part
        return result

    def _posterior(self, batch: Batch, n_samples: int) -> list[Tensor]:
        name = self.program.latent
        return [poutine.trace(self.program.guide).get_trace(batch).nodes[name]["value"] for _ in range(n_samples)]

    def _batch_codes(self, names: Any) -> list[int]:
        schema = self.program.schema
        if schema.batch_key is None:
            raise ValueError("The model was fitted without batch_key: it knows no batches.")
        is_one = np.isscalar(names) or (isinstance(schema.batch_key, tuple) and name_of(names) in schema.batches)
        wanted = [names] if is_one else list(names)
        if not wanted:
            raise ValueError("batch is empty: name one, or leave it out.")
        return _index(wanted, schema.batches, "batch")

    def _blank(self, codes: Tensor) -> Batch:
        """Cells without counts, of given categories, with all else at its mean."""
        schema, n = self.program.schema, len(codes)
        continuous = torch.zeros(n, len(schema.continuous), device=codes.device)
        return Batch(
            None,
            torch.ones(n, device=codes.device),
            schema.batch_of(codes),
            schema.covariates(codes, continuous),
        )

    def _write(
        self,
        adata: AnnData,
        cells: Cells,
        key: str | None = None,
        batch_size: int = _CHUNK,
        unknown_batch: str = "error",
    ) -> None:
        """Write everything that :func:`scvae.fit` promises to the AnnData."""
        key = self.key_added if key is None else key
        first = check_writable(adata, self.program, cells, key)
        obs, obsm = _by_place(first, self._all(cells, first, key, batch_size, unknown_batch))
        columns = self._columns(obs, first, key)
        varm = self._varm(key, adata)
        with _own(adata):
            stale = own_keys(adata, key)
            for name in stale["obs"]:
                if name in adata.obs:
                    del adata.obs[name]
            for name in stale["obsm"]:
                adata.obsm.pop(name, None)
            for name, column in columns.items():
                adata.obs[name] = column
            adata.obsm.update({name: part.copy() for name, part in obsm.items()})
            for name in stale["varm"]:
                adata.varm.pop(name, None)
            adata.varm.update(varm)
            adata.uns[stem_of(key)] = self._record(key, obs, obsm, varm)

    def _write_files(
        self,
        tables: Tables,
        output: str | Path,
        key: str,
        memory: str | int,
        batch_size: int = _CHUNK,
        unknown_batch: str = "error",
        missing_genes: str = "error",
        progress: bool = False,
    ) -> None:
        """Write everything that :func:`scvae.fit` promises to a file, a block of cells at a time."""
        how: dict[str, Any] = {"unknown_batch": unknown_batch, "missing_genes": missing_genes}
        _, block, _ = next(self._blocks(tables, memory))
        first = check_writable(results.there_will_be(tables), self.program, self._cells(block, **how), key)

        def fill(file: results.Results) -> None:
            for place, names in own_keys(file, key).items():
                for name in names:
                    file.remove(place, name)
            obs: dict[str, list[np.ndarray]] = {}
            arrays: dict[str, Any] = {}
            with Progress(total=tables.n_obs, desc="scvae: embedding", unit="cell", disable=not progress) as bar:
                for start, block, _ in self._blocks(tables, memory):
                    cells = self._cells(block, **how)
                    of_obs, of_obsm = _by_place(first, self._all(cells, first, key, batch_size, unknown_batch))
                    for name, column in of_obs.items():
                        obs.setdefault(name, []).append(column.copy())
                    for name, part in of_obsm.items():
                        if name not in arrays:
                            arrays[name] = file.array("obsm", name, part.shape[1])
                        arrays[name][start : start + len(part)] = part
                    bar.update(len(cells))
            columns = self._columns({name: np.concatenate(parts) for name, parts in obs.items()}, first, key)
            varm = self._varm(key, tables)
            for place, found in (("obs", columns), ("varm", varm)):
                for name, value in found.items():
                    file.put(place, name, value)
            file.put("uns", stem_of(key), self._record(key, columns, arrays, varm))

        results.write(output, tables, fill)

    def _write_embedding(self, source: Files, output: str | Path, key: str, memory: str | int, **how: Any) -> None:
        """Write the embedding of cells in files to a file, and nothing else."""
        tables, output = self._opened(source, output)
        read = {"obsm": [self.program.schema.use_rep]}
        check_free(results.there_will_be(tables), key, obsm=[key], read=read)
        parts = ((first, np.asarray(self.embed(block, **how))) for first, block, _ in self._blocks(tables, memory))
        results.write_array(output, tables, ("obsm", key), parts)

    def _all(
        self, cells: Cells, first: dict[tuple[str, str], Tensor], key: str, batch_size: int, unknown_batch: str
    ) -> list[np.ndarray]:
        """Return all that is written of each cell, part by part as in `first`, each ``[n, width]``."""
        widths = [part[0].numel() for part in first.values()]

        def answer(batch: Batch) -> Tensor:
            return torch.cat([part.reshape(len(part), -1) for part in _written(self.program, batch, key).values()], 1)

        def mix(answers: Iterable[Tensor], weights: Tensor) -> Tensor:
            latent, others = torch.stack(list(answers)).tensor_split([2 * widths[0]], -1)
            latent = marginal.moments(latent.unflatten(-1, (2, -1)), weights).flatten(1)
            return torch.cat([latent, marginal.likeliest(others, weights)], 1)

        return np.split(self._each(cells, answer, 0, batch_size, unknown_batch, mix), np.cumsum(widths)[:-1], axis=1)

    def _columns(
        self, obs: dict[str, np.ndarray], first: dict[tuple[str, str], Tensor], key: str
    ) -> dict[str, np.ndarray | pd.Categorical]:
        """Return columns of ``.obs`` as they are written: whole numbers as categories."""
        columns: dict[str, np.ndarray | pd.Categorical] = {}
        for name, values in obs.items():
            if first["obs", name].dtype.is_floating_point:
                columns[name] = values
            elif name == f"{stem_of(key)}_label":
                columns[name] = pd.Categorical.from_codes(values.astype(int), list(self.program.schema.labels))
            else:
                columns[name] = pd.Categorical(values.astype(int)).rename_categories(str)
        return columns

    def _varm(self, key: str, adata: AnnData | Tables) -> dict[str, np.ndarray]:
        """Return what is written of each gene, ``[n_vars, k]``."""
        return {
            f"{key}_{name}": of_all_genes(values.T.cpu().numpy(), self.genes, adata).T.copy()
            for name, values in _of_genes(self.program).items()
        }

    def _record(self, key: str, obs: Iterable[str], obsm: Iterable[str], varm: Iterable[str]) -> dict[str, Any]:
        """Return the record of the model in ``.uns``, with the names of what is written elsewhere."""
        return {
            "version": version("scvae-pyro"),
            "program": self.program.name,
            "key_added": key,
            "obs": np.asarray(list(obs), dtype=object),
            "obsm": np.asarray(list(obsm), dtype=object),
            "varm": np.asarray(list(varm), dtype=object),
            "options": {k: v for k, v in self.program.options.items() if v is not None},
            "training": {k: v for k, v in self.training.items() if v is not None},
            "schema": {
                "n_genes": len(self.program.schema.genes),
                "batches": np.asarray(self.program.schema.batches, dtype=object),
            },
            "history": {name: column.to_numpy() for name, column in self.history.items()},
            "stopped": self.stopped,
        }


def _by_place(
    first: dict[tuple[str, str], Tensor], parts: list[np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return what is written of each cell to ``.obs``, ``[n]``, and to ``.obsm``, ``[n, width]``, by name."""
    by_name = dict(zip(first, parts, strict=True))
    obs = {name: part[:, 0] for (place, name), part in by_name.items() if place == "obs"}
    return obs, {name: part for (place, name), part in by_name.items() if place == "obsm"}


def check_writable(adata: AnnData, program: Program, cells: Cells, key: str) -> dict[tuple[str, str], Tensor]:
    """Check that what a program says of each cell can be written under a key; return what it says of the first one.

    The names of the result are those of :func:`_written`.

    Raises
    ------
    ValueError
        If that would overwrite what the model reads, or something of the user's.
    """
    was = program.training
    with alone(0, cells.device):
        first = _written(program.eval(), cells.batch(torch.zeros(1, dtype=torch.int64, device=cells.device)), key)
    program.train(was)
    names: dict[str, list[str]] = {"obs": [], "obsm": []}
    for place, name in first:
        names[place].append(name)
    schema = program.schema
    read: dict[str, list[Any]] = {"obs": schema.columns, "obsm": [schema.use_rep, schema.image_key]}
    varm = [f"{key}_{name}" for name in _of_genes(program)]
    check_free(adata, key, names["obs"], names["obsm"], varm, read=read)
    return first


def _written(program: Program, batch: Batch, key: str) -> dict[tuple[str, str], Tensor]:
    """Return what is written of each cell, by where it is, ``obs`` or ``obsm``, and its name there."""
    mean, std = program.embed(batch)
    found = {"": mean, "std": std, **program.per_cell(batch)}
    written = {_place(name, part, key): part for name, part in found.items()}
    if "label_probability" in found:
        written["obs", f"{stem_of(key)}_label_probability"] = found["label_probability"].amax(-1)
    return written


def _of_genes(program: Program) -> dict[str, Tensor]:
    """Return what is written of each gene, by name, ``[n_genes, k]``."""
    found = program.gene_loadings() if program.schema.use_rep is None and program.schema.image_key is None else None
    return {} if found is None else {"loadings": found}


def of_all_genes(values: np.ndarray, genes: Sequence[Any], adata: AnnData | Tables) -> np.ndarray:
    """Return ``[n, n_vars]`` of ``[n, n_genes]``: NaN for the genes of the AnnData that are not among `genes`."""
    result = np.full((len(values), adata.n_vars), np.nan, dtype=np.float32)
    place = {name: i for i, name in enumerate(map(str, genes))}
    at = np.array([place.get(name, -1) for name in adata.var_names.astype(str)])
    result[:, at >= 0] = values[:, at[at >= 0]]
    return result


def _place(name: str, like: Tensor, key: str) -> tuple[str, str]:
    """Return where something is written, ``obs`` or ``obsm``, and under which name."""
    if like.dim() > 1:
        return "obsm", f"{key}_{name}" if name else key
    return "obs", f"{stem_of(key)}_{name}"


def load(path: str | Path, *, program: type[Program] | None = None, device: str = "cpu") -> Fitted:
    """Load a model that :meth:`scvae.Fitted.save` saved. No code is run from the files.

    Parameters
    ----------
    path
        The folder.
    program
        The class, if it is one of your own.
    device
        Where the model is to compute: ``"cpu"``, ``"cuda"``, …, or ``"auto"``, a GPU if there is one.

    Raises
    ------
    FileNotFoundError
        If the folder or a file in it is missing.
    ValueError
        If the files were cut off or edited, are of another format, hold another program, or what was never saved.
    """
    where = device_of(device)
    made, course, training, key_added = model_of(path, *read_model(path), program)
    return Fitted(made.to(where), course, training, key_added)


def _index(wanted: Sequence[Any], names: Sequence[str], what: str) -> list[int]:
    place = {name: i for i, name in enumerate(names)}
    unknown = [name for name in map(name_of, wanted) if name not in place]
    if unknown:
        raise ValueError(f"The model knows no {what} {some(unknown)}; it knows {some(names)}.")
    return [place[name] for name in map(name_of, wanted)]


def _numbers(what: str, values: Any) -> np.ndarray:
    """Return an array of finite numbers in single precision."""
    try:
        numbers = np.array(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float32)
    except (TypeError, ValueError):
        raise ValueError(f"{what} is of numbers, not {values!r}.") from None
    if not np.isfinite(numbers).all():
        raise ValueError(f"{what} has NaN or infinite numbers.")
    return numbers


@contextmanager
def _own(adata: AnnData) -> Iterator[None]:
    """Within the block, a view may become an AnnData of its own without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImplicitModificationWarning)
        yield
