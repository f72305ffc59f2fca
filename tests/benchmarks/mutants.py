"""Mutants of saved models: ``python tests/benchmarks/mutants.py --n 100000``.

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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import strangers

import scvae


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--n", type=int, default=100_000)
    options.add_argument("--first", type=int, default=0)
    given = options.parse_args()
    warnings.simplefilter("ignore")
    faulthandler.enable()
    start = time.perf_counter()
    outcomes: Counter[tuple[str, str]] = Counter()
    seconds, taken, failed = [0.0], [0], 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        root, cells = Path(name), strangers.cells()
        bases = strangers.models(root)
        expected = [strangers.numbers_of(scvae.load(base)) for base in bases]
        for number in range(given.first, given.first + given.n):
            folder, i, what = root / "mutant", number % len(bases), "?"
            folder.mkdir()
            faulthandler.dump_traceback_later(300, exit=True)  # a hang ends the run
            try:
                what = strangers.mutant(number, bases[i], folder)
                outcome, *cost = strangers.judged(scvae.load, folder, expected[i])
                assert outcome != "other" or what.startswith("signed"), "other numbers"
                if outcome == "other" and number % 5 == 0:
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
    print("| mutation | refused | the same numbers | another model |\n| --- | --- | --- | --- |")
    for each in strangers.MUTATIONS:
        row = [outcomes[each.__name__, outcome] for outcome in ("error", "same", "other")]
        print(f"| {each.__name__} | {' | '.join(f'{n:,}' for n in row)} |")
    print(
        f"\n{given.n:,} mutants in {time.perf_counter() - start:,.0f} s, {failed} of them at fault; the slowest took "
        f"{max(seconds):.2f} s of the processor, the largest {max(taken) / 2**20:.0f} MiB."
    )


def embed(folder: Path, cells) -> None:
    """Ask a model for the embedding; it may refuse the cells."""
    try:
        scvae.load(folder).embed(cells, unknown_batch="ignore", missing_genes="zero")
    except (ValueError, KeyError):
        pass


if __name__ == "__main__":
    main()
