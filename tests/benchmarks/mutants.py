"""Mutants of saved models, stores and checkpoints: ``python tests/benchmarks/mutants.py --n 100000 --of models``.

Each is read by ``scvae.load``, in this process, and must be refused by an error of the package's own or give the same
numbers; mutants whose checksums were made right again may be another model, of finite weights, which is then asked to
embed cells. None may end the process, take more than a second of the processor, or 200 MiB of memory beyond what was
held. The mutations are those of ``tests/strangers.py``; a mutant is found again by its number.
"""

from __future__ import annotations

import argparse
import faulthandler
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

import strangers

import scvae
from scvae.data.shuffling import shuffled
from scvae.inference import svi
from scvae.inference.svi import NonFiniteLoss, Run


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--n", type=int, default=100_000)
    options.add_argument("--first", type=int, default=0)
    options.add_argument("--of", choices=("models", "stores", "checkpoints"), default="models")
    given = options.parse_args()
    warnings.simplefilter("ignore")
    faulthandler.enable()
    start = time.perf_counter()
    outcomes: Counter[tuple[str, str]] = Counter()
    seconds, taken, failed = [0.0], [0], 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        root, cells = Path(name), strangers.cells()
        bases, mutant, load, numbers_of, errors = {"models": models, "stores": stores, "checkpoints": checkpoints}[
            given.of
        ](root)
        expected = [numbers_of(load(base)) for base in bases]
        for number in range(given.first, given.first + given.n):
            folder, i, what = root / "mutant", number % len(bases), "?"
            folder.mkdir()
            faulthandler.dump_traceback_later(300, exit=True)  # a hang ends the run
            try:
                what = mutant(number, bases[i], folder)
                outcome, *cost = strangers.judged(load, folder, expected[i], numbers_of, errors)
                assert outcome != "other" or what.startswith("signed"), "other numbers"
                if given.of == "models" and outcome == "other" and number % 5 == 0:
                    embed(folder, cells)
                outcomes[what, outcome] += 1
                seconds.append(cost[0])
                taken.append(cost[1])
            except Exception as error:
                failed += 1
                print(
                    f"mutant {number} of {bases[i].name}, {what}: {type(error).__name__}: {str(error)[:300]}",
                    flush=True,
                )
            faulthandler.cancel_dump_traceback_later()
            shutil.rmtree(folder)
    print("| mutation | refused | the same numbers | others |\n| --- | --- | --- | --- |")
    for each in sorted({what for what, _ in outcomes}):
        row = [outcomes[each, outcome] for outcome in ("error", "same", "other")]
        print(f"| {each} | {' | '.join(f'{n:,}' for n in row)} |")
    print(
        f"\n{given.n:,} mutants in {time.perf_counter() - start:,.0f} s, {failed} of them at fault; the slowest took "
        f"{max(seconds):.2f} s of the processor, the largest {max(taken) / 2**20:.0f} MiB."
    )


def models(root: Path) -> tuple:
    """Return saved models, and how a mutant is made, loaded and compared, and refused."""
    return strangers.models(root), strangers.mutant, scvae.load, strangers.numbers_of, (ValueError, FileNotFoundError)


def stores(root: Path) -> tuple:
    """Return a store of cells, and the like."""
    cells = strangers.cells()
    cells.obsm.clear()
    cells.write_h5ad(root / "cells.h5ad")
    how = {"batch_key": "batch", "continuous_covariate_keys": ["age"], "labels_key": "label"}
    shuffled(root / "cells.h5ad", store=root / "store", **how).close()
    errors = (ValueError, FileNotFoundError)
    return [root / "store"], strangers.store_mutant, strangers.read_store, lambda read: read, errors


def checkpoints(root: Path) -> tuple:
    """Return the checkpoints of a training that was interrupted, and the like."""
    cells = strangers.cells()
    options = {"batch_key": "batch", "n_latent": 2, "n_hidden": 4, "min_steps": 60, "max_steps": 60, "batch_size": 32}
    advance, times = Run.advance, count()

    def interrupted(self, pace):
        if self.step.taken == 52:
            raise KeyboardInterrupt
        advance(self, pace)

    def load(folder: Path) -> scvae.Fitted:
        # To record a step takes longer than to take these few, so it is done in one of ten; the numbers are the same.
        with patch.object(svi, "Recorded", None) if next(times) % 10 else nullcontext():
            return scvae.fit(cells.copy(), checkpoint=folder, resume=True, progress=False, **options)

    with patch.object(Run, "advance", interrupted):
        scvae.fit(cells.copy(), checkpoint=root / "kept", checkpoint_minutes=1e-9, progress=False, **options)
    kept = root / "interrupted"
    shutil.copytree(root / "kept", kept)
    shutil.copytree(kept, root / "again")
    whole = strangers.numbers_of(load(root / "again"))[0]  # which writes checkpoints of its own

    def numbers_of(model):
        return whole if model is None else strangers.numbers_of(model)[0]

    errors = (ValueError, FileNotFoundError, NonFiniteLoss)
    return (
        [kept],
        strangers.checkpoint_mutant,
        lambda folder: None if folder == kept else load(folder),
        numbers_of,
        errors,
    )


def embed(folder: Path, cells) -> None:
    """Ask a model for the embedding; it may refuse the cells."""
    try:
        scvae.load(folder).embed(cells, unknown_batch="ignore", missing_genes="zero")
    except (ValueError, KeyError):
        pass


if __name__ == "__main__":
    main()
