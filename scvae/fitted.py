"""A fitted model: what can be asked of it, and how it is saved."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData, ImplicitModificationWarning
from pyro import poutine
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from scipy import sparse
from torch import Tensor

from scvae.data.cells import Batch, Cells, Schema
from scvae.data.reading import read_cells, some
from scvae.inference import evidence
from scvae.inference.devices import device_of, seeded
from scvae.inference.evidence import unchecked
from scvae.programs import PROGRAMS, Program

__all__ = ["Fitted", "load"]

_FORMAT = 1
_FILES = ("model.json", "weights.safetensors")
_CHUNK = 1024  # cells at a time


class Fitted:
    """A fitted model; made by :func:`scvae.fit` and :func:`scvae.load`.

    Cells given to its methods are read as those that it was fitted to: the same layer, covariates and genes, genes
    matched by name. The order of the cells is kept, and the AnnData is left as it is.

    Attributes
    ----------
    program
        The generative model and its guide, a ``torch.nn.Module``.
    history
        The course of the training: see :func:`scvae.inference.svi.train`.
    training
        How it was trained: the seed, and what :class:`scvae.inference.svi.Training` lists.
    key_added
        Key of ``.obsm`` under which the embedding was written.
    """

    def __init__(
        self, program: Program, history: dict[str, list], training: dict[str, Any], key_added: str = "X_scvae"
    ) -> None:
        self.program = program.eval()
        self.history = history
        self.training = training
        self.key_added = key_added

    def __repr__(self) -> str:
        schema = self.program.schema
        return (
            f"Fitted {self.program.name!r}: {len(schema.genes)} genes, {len(schema.batches)} batch(es), "
            + ", ".join(f"{key}={value!r}" for key, value in self.program.options.items())
        )

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.program.parameters()).device

    @property
    def n_latent(self) -> int:
        """Numbers in a latent vector."""
        with seeded(0, self.device), unchecked(), torch.no_grad():
            blank = self._blank(torch.zeros(1, len(self.program.schema.widths), dtype=torch.int64, device=self.device))
            return poutine.trace(self.program.model).get_trace(blank).nodes[self.program.latent]["value"].numel()

    def embed(self, adata: AnnData, *, unknown_batch: str = "error", missing_genes: str = "error") -> np.ndarray:
        """Return the posterior mean of each cell's latent vector, ``[n_cells, n_latent]``, float32.

        Parameters
        ----------
        adata
            The cells. Genes may be in any order, and others may be among them.
        unknown_batch
            Cells of batches (or other categories) that the model has not seen: ``"error"``, or ``"ignore"``, which
            leaves the covariate out.
        missing_genes
            ``"error"``, or ``"zero"``, which takes the counts of genes that are missing for 0.

        Raises
        ------
        KeyError, ValueError
            As :func:`scvae.fit`, and for unknown batches and missing genes.
        """
        cells = self._cells(adata, unknown_batch=unknown_batch, missing_genes=missing_genes)
        return self._each(cells, lambda batch: self.program.embed(batch)[0])

    def annotate(self, adata: AnnData, *, unknown_batch: str = "error", missing_genes: str = "error") -> None:
        """Write to other cells what :func:`scvae.fit` writes to those that it is given.

        Parameters
        ----------
        adata
            The cells, to which ``.obsm``, ``.obs`` and ``.uns["scvae"]`` are written.
        unknown_batch, missing_genes
            As in :meth:`embed`.

        Raises
        ------
        KeyError, ValueError
            As :meth:`embed`. The AnnData is then as it was.
        """
        if adata.isbacked and adata.is_view:
            raise ValueError("A view of a backed AnnData cannot be written to: call .to_memory() on it first.")
        self._write(adata, self._cells(adata, unknown_batch=unknown_batch, missing_genes=missing_genes))

    def denoise(
        self,
        adata: AnnData,
        *,
        batch: str | Sequence[str] | None = None,
        genes: Sequence[str] | None = None,
        library_size: float | str = 1.0,
        n_samples: int | None = None,
        layer_added: str | None = None,
        seed: int = 0,
        unknown_batch: str = "error",
        missing_genes: str = "error",
    ) -> np.ndarray:
        """Return the expression that the model sees behind the counts, ``[n_cells, n_genes]``, float32.

        Parameters
        ----------
        adata
            The cells.
        batch
            Decode all cells as if they were of this batch; of several, the mean. By default each as of its own.
        genes
            The genes wanted, in this order, or a single one; by default all that are modelled.
        library_size
            What the expression of a cell sums to over all genes of the model: 1 gives fractions, 1e4 counts per ten
            thousand, ``"cell"`` expected counts before dropout, with the cell's own library size.
        n_samples
            Average over draws of the posterior. By default its mean is decoded, without averaging.
        layer_added
            Write the result to this layer of the AnnData too: a dense ``[n_cells, n_vars]``, with NaN for the genes
            that are not modelled or were not asked for.
        seed
            Of the draws.
        unknown_batch, missing_genes
            As in :meth:`embed`.

        Raises
        ------
        KeyError, ValueError
            As :meth:`embed`, and for a batch or gene that the model does not know.
        """
        schema = self.program.schema
        genes = schema.genes if genes is None else [genes] if isinstance(genes, str) else list(genes)
        columns = torch.tensor(_index(genes, schema.genes, "gene"), dtype=torch.int64, device=self.device)
        codes = [None] if batch is None else self._batch_codes(batch)
        if isinstance(library_size, str) and library_size != "cell":
            raise ValueError(f"library_size is a number or 'cell', not {library_size!r}.")
        if (schema.kind != "counts" or schema.image_key is not None) and library_size != 1:
            models = "real numbers" if schema.image_key is None else "images"
            raise ValueError(f"library_size belongs to models of counts; {self.program.name!r} models {models}.")
        if n_samples is not None:
            _check_positive("n_samples", n_samples)
        if layer_added is not None and (key := schema.use_rep or schema.image_key) is not None:
            raise ValueError(f"layer_added is for genes; the model reads adata.obsm[{key!r}].")
        if layer_added is not None and adata.isbacked and adata.is_view:
            raise ValueError("A view of a backed AnnData cannot be written to: call .to_memory() on it first.")

        def expression(cells: Batch) -> Tensor:
            draws = [self.program.embed(cells)[0]] if n_samples is None else self._posterior(cells, n_samples)
            total = torch.zeros(len(cells), len(columns), device=self.device)
            for code in codes:
                to = cells if code is None else _as_of(cells, code, schema)
                for z in draws:
                    total += self.program.decode(z, to)[:, columns]
            size = self.program.library(cells).unsqueeze(-1) if library_size == "cell" else float(library_size)
            return total / (len(codes) * len(draws)) * size

        cells = self._cells(adata, unknown_batch=unknown_batch, missing_genes=missing_genes)
        result = self._each(cells, expression, seed)
        if layer_added is not None:
            layer = np.full(adata.shape, np.nan, dtype=np.float32)
            place = {name: i for i, name in enumerate(map(str, genes))}
            at = np.array([place.get(name, -1) for name in adata.var_names.astype(str)])
            layer[:, at >= 0] = result[:, at[at >= 0]]
            with _own(adata):
                adata.layers[layer_added] = layer
        return result

    def reconstruct(
        self,
        adata: AnnData,
        *,
        pose: str | tuple[float, float, float] = "own",
        size: tuple[int, int] | None = None,
        batch: str | None = None,
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

        Raises
        ------
        KeyError, ValueError
            As :meth:`embed`; if the model is not one of images, or has no poses.
        """
        if not self.program.of_images:
            raise ValueError(f"reconstruct belongs to models of images; ask {self.program.name!r} to denoise.")
        if isinstance(pose, str) and pose != "own":
            raise ValueError(f"pose is 'own', or an angle and two shifts, not {pose!r}.")
        code = None if batch is None else self._batch_codes([batch])[0]
        given = None if isinstance(pose, str) else torch.tensor(pose, dtype=torch.float32, device=self.device)
        if given is not None and given.shape != (3,):
            raise ValueError(f"pose is an angle and two shifts, three numbers, not {pose!r}.")

        def images(cells: Batch) -> Tensor:
            z = self.program.embed(cells)[0]
            where = self.program.pose_of(cells) if given is None else given.expand(len(cells), -1)
            to = cells if code is None else _as_of(cells, code, self.program.schema)
            return self.program.render(z, to, where, size)

        return self._each(self._cells(adata), images)

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
        with unchecked(), torch.no_grad():
            vectors = torch.as_tensor(np.asarray(z, dtype=np.float32), device=device)
            blank = self._blank(torch.zeros(len(vectors), len(schema.widths), dtype=torch.int64, device=device))
            total = sum(self.program.decode(vectors, _as_of(blank, code, schema)) for code in codes)
        decoded = (total / len(codes)).cpu().numpy()
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
        _check_positive("n", n)
        with seeded(seed, device), unchecked(), torch.no_grad():
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
            adata.obs[key] = pd.Categorical.from_codes(codes[:, i].cpu().numpy(), list(names))
        for key, (mean, _) in schema.continuous.items():
            adata.obs[key] = mean
        return adata

    def elbo(self, adata: AnnData, *, n_samples: int = 1, seed: int = 0) -> np.ndarray:
        """Return the evidence lower bound of each cell, nats, ``[n_cells]``, estimated with `n_samples` draws."""
        _check_positive("n_samples", n_samples)
        return self._each(self._cells(adata), lambda batch: evidence.elbo(self.program, batch, n_samples), seed)

    def log_likelihood(
        self, adata: AnnData, *, n_samples: int = 256, method: str = "importance", seed: int = 0
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
        seed
            Of the draws.
        """
        estimators = {"importance": evidence.importance_weighted, "prior": evidence.prior_monte_carlo}
        if method not in estimators:
            raise ValueError(f"method is one of {', '.join(map(repr, estimators))}, not {method!r}.")
        _check_positive("n_samples", n_samples)
        estimate = estimators[method]
        return self._each(self._cells(adata), lambda batch: estimate(self.program, batch, n_samples), seed)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Save the model to a folder, as ``weights.safetensors`` and ``model.json``; see :func:`scvae.load`.

        Raises
        ------
        FileExistsError
            If `path` exists, unless `overwrite` is set and it is a saved model or an empty folder.
        """
        path = Path(path).resolve()
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists: pass overwrite=True to replace it.")
        if path.is_file() or (path.exists() and not {file.name for file in path.iterdir()} <= set(_FILES)):
            raise FileExistsError(f"{path} holds other things than a saved model: save to another folder.")
        weights = save_tensors({k: v.contiguous().cpu() for k, v in self.program.state_dict().items()})
        content = {
            "version": version("scvae-pyro"),
            "program": self.program.name,
            "options": self.program.options,
            "schema": asdict(self.program.schema),
            "history": self.history,
            "training": self.training,
            "key_added": self.key_added,
        }
        content = json.loads(json.dumps(content, default=np.generic.item))
        header = {"format": _FORMAT, "sha256": {"weights": _digest(weights), "content": _digest(_canonical(content))}}
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # complete or not at all
            new = Path(folder) / path.name
            new.mkdir()
            (new / "model.json").write_text(json.dumps({**header, "content": content}, indent=1))
            (new / "weights.safetensors").write_bytes(weights)
            if path.exists():
                shutil.move(path, Path(folder) / "old")
            shutil.move(new, path)

    def _cells(self, adata: AnnData, **how: str) -> Cells:
        return read_cells(adata, self.program.schema, device=self.device, **how)

    def _each(self, cells: Cells, answer: Callable[[Batch], Tensor], seed: int = 0) -> np.ndarray:
        """Ask something of all cells, chunk by chunk, in order."""
        result = np.empty(0)
        with seeded(seed, self.device), unchecked(), torch.no_grad():
            for rows, batch in cells.minibatches(_CHUNK):
                part = answer(batch).cpu().numpy()
                if not len(result):
                    result = np.empty((len(cells), *part.shape[1:]), dtype=part.dtype)
                result[rows.cpu().numpy()] = part
        return result

    def _posterior(self, batch: Batch, n_samples: int) -> list[Tensor]:
        name = self.program.latent
        return [poutine.trace(self.program.guide).get_trace(batch).nodes[name]["value"] for _ in range(n_samples)]

    def _batch_codes(self, names: str | Sequence[str]) -> list[int]:
        schema = self.program.schema
        if schema.batch_key is None:
            raise ValueError("The model was fitted without batch_key: it knows no batches.")
        return _index([str(names)] if np.isscalar(names) else names, schema.batches, "batch")

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

    def _write(self, adata: AnnData, cells: Cells) -> None:
        """Write everything that :func:`scvae.fit` promises to the AnnData."""

        def answers(batch: Batch) -> dict[str, Tensor]:
            mean, std = self.program.embed(batch)
            return {"": mean, "std": std, **self.program.per_cell(batch)}

        with torch.no_grad():
            first = answers(cells.batch(torch.zeros(1, dtype=torch.int64, device=cells.device)))
        widths = [part[0].numel() for part in first.values()]
        written = self._each(
            cells, lambda batch: torch.cat([p.reshape(len(p), -1) for p in answers(batch).values()], 1)
        )
        parts = np.split(written, np.cumsum(widths)[:-1], axis=1)
        obs: dict[str, Any] = {}
        obsm: dict[str, np.ndarray] = {}
        for (name, like), part in zip(first.items(), parts, strict=True):
            if like.dim() > 1:
                obsm[f"{self.key_added}_{name}" if name else self.key_added] = part.copy()
            elif like.dtype.is_floating_point:
                obs[f"scvae_{name}"] = part[:, 0]
            else:
                obs[f"scvae_{name}"] = pd.Categorical(part[:, 0].astype(int)).rename_categories(str)
        with _own(adata):
            before = adata.uns.get("scvae", {})
            for stale in before.get("obs", ()):  # of an earlier fit
                if stale in adata.obs:
                    del adata.obs[stale]
            for stale in before.get("obsm", ()) if before.get("key_added") == self.key_added else ():
                adata.obsm.pop(stale, None)
            for name, column in obs.items():
                adata.obs[name] = column
            adata.obsm.update(obsm)
            adata.uns["scvae"] = {
                "version": version("scvae-pyro"),
                "program": self.program.name,
                "key_added": self.key_added,
                "obs": np.asarray(list(obs), dtype=object),
                "obsm": np.asarray(list(obsm), dtype=object),
                "options": {k: v for k, v in self.program.options.items() if v is not None},
                "training": {k: v for k, v in self.training.items() if v is not None},
                "schema": {
                    "n_genes": len(self.program.schema.genes),
                    "batches": np.asarray(self.program.schema.batches, dtype=object),
                },
                "history": {k: np.asarray(v) for k, v in self.history.items() if k != "stopped"},
                "stopped": self.history["stopped"][0],
            }


def load(path: str | Path, *, program: type[Program] | None = None, device: str = "cpu") -> Fitted:
    """Load a model that :meth:`Fitted.save` saved. No code is run from the files.

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
        If the files were cut off or edited, are of another format, or hold another program.
    """
    where = device_of(device)
    path = Path(path)
    for name in _FILES:
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} holds no scvae model: {name} is missing.")
    weights = (path / "weights.safetensors").read_bytes()
    try:
        file = json.loads((path / "model.json").read_text())
        form = file["format"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path / 'model.json'} is damaged: it is not the JSON that scvae writes.") from None
    if form != _FORMAT:
        raise ValueError(f"{path} is in format {form}; this version of scvae reads format {_FORMAT}: update scvae.")
    content = file.get("content")
    if file.get("sha256") != {"weights": _digest(weights), "content": _digest(_canonical(content))}:
        raise ValueError(f"{path} is damaged: its contents are not those that were saved. Save the model anew.")
    kind = program or PROGRAMS.get(content["program"])
    if kind is None or kind.name != content["program"]:
        raise ValueError(f"{path} holds the program {content['program']!r}: pass its class, program=….")
    with seeded(0, torch.device("cpu")):  # the weights drawn here are replaced
        made = kind(_schema(content["schema"]), **content["options"])
    made.load_state_dict(load_tensors(weights))
    return Fitted(made.to(where), content["history"], content["training"], content["key_added"])


def _schema(content: dict[str, Any]) -> Schema:
    return Schema(
        **{
            **content,
            "genes": tuple(content["genes"]),
            "image_shape": tuple(content["image_shape"]) if content.get("image_shape") else None,
            "categories": {key: tuple(names) for key, names in content["categories"].items()},
            "continuous": {key: tuple(values) for key, values in content["continuous"].items()},
        }
    )


def _as_of(batch: Batch, code: int, schema: Schema) -> Batch:
    """Return the same cells as if they were of another batch."""
    if schema.batch_key is None:
        return batch
    covariates = batch.covariates.clone()
    covariates[:, : len(schema.batches)] = 0
    covariates[:, code] = 1
    return replace(batch, s=torch.full_like(batch.s, code), covariates=covariates)


def _index(wanted: Sequence[str], names: Sequence[str], what: str) -> list[int]:
    place = {name: i for i, name in enumerate(names)}
    unknown = [name for name in map(str, wanted) if name not in place]
    if unknown:
        raise ValueError(f"The model knows no {what} {some(unknown)}; it knows {some(names)}.")
    return [place[name] for name in map(str, wanted)]


def _check_positive(what: str, number: int) -> None:
    if number < 1:
        raise ValueError(f"{what} is at least 1, not {number}.")


@contextmanager
def _own(adata: AnnData) -> Iterator[None]:
    """Within the block, a view may become an AnnData of its own without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImplicitModificationWarning)
        yield


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
