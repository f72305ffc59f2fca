"""A fitted model: what can be asked of it, and how it is saved."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch import Tensor

from scvae.boundary.containers import Files, are_files, check_anndata, views_become_copies
from scvae.boundary.keys import check_key
from scvae.boundary.options import one_of, seed_of, whole
from scvae.boundary.process import alone, device_of
from scvae.data import results
from scvae.data.cells import Batch, Cells, Schema
from scvae.data.tables import Tables
from scvae.fits import asking, denoising, generating, saved, writing
from scvae.fits.asking import CHUNK
from scvae.fits.extending import extended, with_batches
from scvae.inference import evidence, marginal
from scvae.inference.marginal import as_of
from scvae.inference.svi import Course, Training
from scvae.programs import Program

__all__ = ["Fitted", "load"]

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
        Key of ``.obsm`` under which it writes the embedding.
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
        return {**lines, "device": str(self.device), "writes to": f".obsm[{self.key_added!r}]"}

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
        return generating.n_latent_of(self.program)

    def embed(
        self,
        adata: AnnData | Files,
        *,
        give_std: bool = False,
        n_samples: int | None = None,
        memory: str | int = "2GB",
        seed: int = 0,
        batch_size: int = CHUNK,
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
            blocks = asking.blocks_of(asking.open_for(self.program, adata), self.program.schema, memory, seed)
            parts = [self.embed(block, seed=own, **how) for _, block, own in blocks]
            if give_std:
                return np.concatenate([mean for mean, _ in parts]), np.concatenate([std for _, std in parts])
            return np.concatenate(parts, axis=1 if draws else 0)

        def answer(batch: Batch) -> Tensor:
            if draws:
                return torch.stack([z.flatten(1) for z in asking.draws_of(self.program, batch, draws)], 1)
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
        batch_size: int = CHUNK,
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
        how: dict[str, Any] = {"batch_size": batch_size, "unknown_batch": unknown_batch}
        if are_files(adata):
            tables, output = asking.open_to_write(self.program, adata, output)
            self._write_files(tables, output, memory, key, missing_genes=missing_genes, **how)
            return
        if output is not None:
            raise ValueError("output belongs to cells in files; this AnnData is written to: leave output out.")
        check_anndata(adata, to_write=True)
        cells = self._cells(adata, unknown_batch=unknown_batch, missing_genes=missing_genes)
        self._write(adata, cells, key, **how)

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

        The new batches learn weights of their own and nothing else, on their own cells (:mod:`scvae.fits.extending`).
        This model is left as it is, and so are the cells: write to them with :meth:`transform` of what is returned.

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
        batch_size: int = CHUNK,
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
        expression = denoising.expression_of(self.program, genes, batch, library_size, n_samples)
        if layer_added is not None:
            writing.check_layer(layer_added, schema)

        def asked(adata: AnnData, seed: int) -> np.ndarray:
            cells = self._cells(adata, unknown_batch=unknown_batch, missing_genes=missing_genes)
            return self._each(cells, expression, seed, batch_size, unknown_batch, marginal.mean)

        if are_files(adata):
            tables, output = asking.open_to_write(self.program, adata, output)
            wanted = str(layer_added)
            if wanted in results.there_will_be(tables).layers:
                raise ValueError(f"layer_added={wanted!r}: {tables.paths[0]} has such a layer; name another.")
            blocks = asking.blocks_of(tables, schema, memory, seed)
            parts = ((first, writing.of_all_genes(asked(block, own), genes, tables)) for first, block, own in blocks)
            results.write_array(output, tables, ("layers", wanted), parts)
            return None
        result = asked(adata, seed)
        if layer_added is not None:
            layer = writing.of_all_genes(result, genes, adata)
            with views_become_copies():
                adata.layers[layer_added] = layer
        return pd.DataFrame(result, index=adata.obs_names, columns=[str(g) for g in genes]) if as_frame else result

    def reconstruct(
        self,
        adata: AnnData,
        *,
        pose: str | tuple[float, float, float] = "own",
        size: tuple[int, int] | None = None,
        batch: str | None = None,
        batch_size: int = CHUNK,
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
        code = None if batch is None else asking.batch_codes(self.program.schema, [batch])[0]
        given = None if isinstance(pose, str) else torch.from_numpy(asking.numbers("pose", pose)).to(self.device)
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
        schema = self.program.schema
        codes = range(len(schema.batches)) if batch is None else asking.batch_codes(self.program.schema, batch)
        given = asking.numbers("z", z)
        if given.ndim != 2 or given.shape[1] != self.n_latent:
            raise ValueError(f"z is of shape {given.shape}: latent vectors are wanted, [n, {self.n_latent}].")
        decoded = generating.decoded(self.program, given, codes)
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
        n = whole("n", n)
        code = None if batch is None else asking.batch_codes(self.program.schema, [batch])[0]
        return generating.generated(self.program, n, code, seed_of(seed), self.key_added)

    def elbo(
        self,
        adata: AnnData,
        *,
        n_samples: int = 1,
        seed: int = 0,
        batch_size: int = CHUNK,
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
        batch_size: int = CHUNK,
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
        saved.save(path, self.program, self.course, self.training, self.key_added, overwrite=overwrite)

    def _cells(self, adata: AnnData, schema: Schema | None = None, **how: Any) -> Cells:
        return asking.cells_for(self.program, adata, schema, **how)

    def _each(self, cells: Cells, answer: Callable[[Batch], Tensor], *how: Any) -> np.ndarray:
        return asking.ask_each(self.program, cells, answer, *how)

    def _write(self, adata: AnnData, cells: Cells, key: str | None = None, **how: Any) -> None:
        """Write everything that :func:`scvae.fit` promises to the AnnData."""
        record = writing.record_of(self.program, self.course, self.training)
        writing.write(adata, self.program, cells, self.key_added if key is None else key, record, **how)

    def _write_files(
        self, tables: Tables, output: str | Path, memory: str | int, key: str | None = None, **how: Any
    ) -> None:
        """Write everything that :func:`scvae.fit` promises to a file, a block of cells at a time."""
        record = writing.record_of(self.program, self.course, self.training)
        key = self.key_added if key is None else key
        writing.write_files(output, self.program, tables, key, record, memory, **how)

    def _write_embedding(self, source: Files, output: str | Path, key: str, memory: str | int, **how: Any) -> None:
        """Write the embedding of cells in files to a file, and nothing else."""
        tables, output = asking.open_to_write(self.program, source, output)
        blocks = asking.blocks_of(tables, self.program.schema, memory)
        parts = ((first, np.asarray(self.embed(block, **how))) for first, block, _ in blocks)
        writing.write_embedding(output, self.program, tables, key, parts)


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
    made, course, training, key_added = saved.load(path, program)
    return Fitted(made.to(where), course, training, key_added)
