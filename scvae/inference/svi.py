"""The one training loop."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Annotated, ClassVar

import pandas as pd
import torch
from torch import Tensor

from scvae.boundary.options import Fraction, NonNegative, Options, Positive, Range, Whole
from scvae.boundary.process import unchecked
from scvae.data.cells import Cells, n_minibatches
from scvae.inference.pace import pace_of
from scvae.inference.progress import Progress
from scvae.inference.recording import Capture, CudaGraphs, Recorded
from scvae.inference.shrinkage import LearntDecays, bound_and_slopes
from scvae.inference.steps import Part, Step
from scvae.programs.program import Program

__all__ = ["Course", "NonFiniteLoss", "Training", "train"]


@dataclass(frozen=True)
class Training(Options):
    """How a program is trained; the defaults were chosen by experiment (``tests/benchmarks/defaults.md``).

    The learning rate rises, stays level, and falls to nothing over the last 30 % of the steps. Unless `max_epochs`
    fixes the number of steps, the level stretch ends when the bound of held-out cells has stopped rising beyond its
    noise. The cells that are held out until then join the others for the fall, so that all are trained on.

    Parameters
    ----------
    max_epochs
        Passes through the cells. By default the data decide, between `min_steps` and `max_steps`.
    batch_size
        Cells in a minibatch, at most.
    learning_rate
        Of Adam, while it is level.
    weight_decay
        Rate, relative to the learning rate, at which the weights named by :meth:`~scvae.programs.Program.decayed`
        shrink at the start, for 1,500 cells or fewer; beyond, it is inversely proportional to their number. From there
        on the rates are learnt on the held-out cells, one for each matrix (:mod:`scvae.inference.shrinkage`); without
        such cells they stay.
    deviation_scale
        Standard deviation of the Gaussian prior of the weights by which batches and other covariates act,
        :meth:`~scvae.programs.Program.deviations`: of the logarithm of the expression, where they act on it. What a
        few cells say of a gene in a batch is held back by it, what many cells say is not.
    kl_weight
        Weight of the KL terms once warmed up; 1 is the ELBO. Below 1, cell types lie further apart and the model
        generalises less well; evidence is always computed with weight 1.
    kl_warmup
        Over which that weight rises from nothing to `kl_level`; a fraction of the steps, of the fewest where their
        number is not fixed.
    kl_level
        What part of that weight the terms have while the learning rate is level; it is whole at the end of the fall.
        The latents of cells of different types are then less drawn to the components of the prior.
    validation_fraction
        Of the cells, held out while the rate is level, at most 512 of them; with 0 the rates of decay stay as they are,
        and the bound of the training cells tells when to stop.
    patience
        Evaluations whose mean must exceed that of as many earlier ones, or else the rate falls.
    min_steps, max_steps
        Steps at least and at most where `max_epochs` is not given.
    """

    max_epochs: Whole | None = None
    batch_size: Annotated[int, Range(2)] = 128
    learning_rate: Positive = 1e-2
    weight_decay: NonNegative = 1.2
    deviation_scale: Positive = 0.5
    kl_weight: NonNegative = 1.0
    kl_warmup: Annotated[float, Range(0, 1)] = 0.15
    kl_level: Annotated[float, Range(0, 1)] = 0.5
    validation_fraction: Fraction = 0.1
    patience: Whole = 12
    min_steps: Whole = 1000
    max_steps: Whole = 3000

    full_decay_cells: ClassVar[int] = 1500
    n_evaluations: ClassVar[int] = 40  # in the fewest steps
    max_validation_cells: ClassVar[int] = 512
    risen_at: ClassVar[float] = 0.05  # fractions of the fewest steps
    settled_at: ClassVar[tuple[float, ...]] = (0.025, 0.075, 0.15)
    max_settling_cells: ClassVar[int] = 2048
    max_assigned_cells: ClassVar[tuple[int, int]] = (1024, 65536)  # with labels: at an evaluation, and at the last one
    level: ClassVar[float] = 0.7  # of all steps are taken before the rate falls
    #: In the fall the noise of large steps goes, which shrinks too: the rates of decay make up for it.
    decay_in_fall: ClassVar[float] = 2.0

    def decay(self, n_cells: int) -> float:
        """Return the rate of the weight decay to start with, for so many training cells."""
        return self.weight_decay * min(1.0, self.full_decay_cells / n_cells)

    def rate(self, taken: int, fewest: int, fall: int | None, until: int) -> float:
        """Return the learning rate of the step after so many, where it falls from the step `fall` to `until`."""
        rise = min(1.0, (taken + 1) / max(1.0, self.risen_at * fewest))
        fallen = 0.0 if fall is None or taken < fall else (taken - fall) / (until - fall)
        return self.learning_rate * rise * (1 + math.cos(math.pi * fallen)) / 2

    def kl(self, taken: int, fewest: int, fall: int | None, until: int) -> float:
        """Return the weight of the KL terms in the step after so many."""
        rise = min(1.0, (taken + 1) / max(1.0, self.kl_warmup * fewest))
        fallen = 0.0 if fall is None or taken < fall else (taken + 1 - fall) / (until - fall)
        return self.kl_weight * rise * (self.kl_level + (1 - self.kl_level) * fallen)

    def n_held_out(self, n_cells: int) -> int:
        """Return how many of so many cells are held out while the rate is level."""
        return min(round(self.validation_fraction * n_cells), self.max_validation_cells, n_cells - 2)

    def n_steps(self, per_epoch: int) -> tuple[int, int]:
        """Return the fewest and the most steps, when a pass has `per_epoch` of them."""
        if self.max_epochs is not None:
            return self.max_epochs * per_epoch, self.max_epochs * per_epoch
        return self.min_steps, max(self.min_steps, self.max_steps)


@dataclass(frozen=True, eq=False)
class Course:
    """How a training went.

    Parameters
    ----------
    history
        A row for each evaluation: ``step``, ``elbo``, ``log_likelihood``, ``kl`` and, with cells held out,
        ``validation_elbo``, in nats per cell, the training ones averaged since the evaluation before; ``weight_decay``,
        the geometric mean of the rates at which the weights of z shrink; and what the program monitors, by name. In the
        fall of the learning rate no cells are held out, and ``validation_elbo`` is NaN.
    stopped
        Why the training ended: ``"converged"``, as the bound had stopped rising; ``"finished"``, after all the steps
        that were planned; or ``"interrupted"`` (Ctrl-C).
    n_cells
        How many cells there were, those held out counted in.
    n_steps, n_planned
        Steps that were taken, and those that were to be taken, at most where the data decide.
    seconds
        That it took.
    """

    history: pd.DataFrame
    stopped: str
    n_cells: int
    n_steps: int
    n_planned: int
    seconds: float


class NonFiniteLoss(FloatingPointError):
    """The loss was NaN or infinite: at which step, at which site, in which cells (their rows)."""

    def __init__(self, step: int, site: str, rows: list[int]) -> None:
        super().__init__(f"The loss is not finite at step {step}, site {site!r}, in the cells {rows[:5]}.")
        self.step, self.site, self.rows = step, site, rows


def train(
    program: Program, cells: Cells, training: Training, *, parts: Sequence[Part] = (), progress: bool = True
) -> Course:
    """Maximise the ELBO by stochastic gradient ascent.

    Ctrl-C ends the training with the weights as they are. With `parts` these alone are learnt: the networks are as
    after training (batch norm, dropout), and nothing else of the program changes.

    Returns
    -------
    Course
        The history, and why the training ended.

    Raises
    ------
    NonFiniteLoss
        If the loss is NaN or infinite; the weights are then of no use.
    """
    start = perf_counter()
    held_out, rows = _split(cells, training)
    everyone = torch.cat([held_out, rows])
    fewest, most = training.n_steps(n_minibatches(len(rows), training.batch_size))
    every = -(-fewest // training.n_evaluations)
    settling = set() if parts else {round(fraction * fewest) for fraction in training.settled_at}
    check_every = 1 if cells.device.type == "cpu" else 50  # each check waits for the device

    capture: Capture | None = None  # counts that the host keeps for a GPU are copied step by step
    if cells.device.type == "cpu":
        capture = Recorded
    elif cells.values.is_cuda:
        capture = CudaGraphs()
    step = Step(program, cells, min(training.batch_size, len(cells)), capture, training.deviation_scale, parts)
    step.decays.fill_(training.decay(len(cells)))
    decays = LearntDecays(step.decays)
    recent: deque[Tensor] = deque(maxlen=check_every + 1)  # the cells of the last steps
    history: list[dict[str, float]] = []
    fall = (
        None if fewest < most else min(round(training.level * most), most - 1)
    )  # the step at which the rate begins to fall
    until, stopped = most, "finished"
    bounds: list[float] = []
    shown: dict[str, str] = {}

    bar = Progress(total=fewest, disable=not progress)
    sizes = {len(part) for some in (rows, everyone) for part in some.tensor_split(n_minibatches(len(some), step.size))}
    program.train(not parts)
    with unchecked(), bar, pace_of(program, cells, sizes) as pace:
        source = _forever(cells, training.batch_size, rows)
        try:
            while step.taken < until:
                if step.taken == fall:
                    source = _forever(cells, training.batch_size, everyone)
                    if len(held_out):
                        step.decays.mul_(training.decay_in_fall)
                step.rate.fill_(training.rate(step.taken, fewest, fall, until))
                step.kl_weight.fill_(training.kl(step.taken, fewest, fall, until))
                part, n_nonzero = next(source)
                pace(partial(step, part, n_nonzero))
                recent.append(part)
                bar.update()
                evaluate = step.taken % every == 0 or step.taken == until
                settle = step.taken in settling
                if (evaluate or settle or step.taken % check_every == 0) and not step.finite:
                    raise _fault(step, recent)
                if (evaluate or settle) and not _is_finite([*program.parameters(), *program.buffers()]):
                    raise _fault(step, recent)
                if settle:
                    with pace.steady():
                        _settle(program, cells, rows[torch.randperm(len(rows))[: training.max_settling_cells]])
                if not evaluate:
                    continue
                if cells.y is not None:
                    used = rows if fall is None or step.taken < fall else everyone
                    n_assigned = training.max_assigned_cells[step.taken == until]
                    with pace.steady():
                        _assign_labels(program, cells, used[cells.y[used] >= 0], n_assigned)
                since = step.taken - (history[-1]["step"] if history else 0)
                log_likelihood, kl = (step.sums / since).tolist()
                step.sums.zero_()
                row = {"step": step.taken, "elbo": log_likelihood - kl, "log_likelihood": log_likelihood, "kl": kl}
                shown["elbo"] = f"{row['elbo']:.1f}"
                if len(held_out):
                    row["validation_elbo"] = math.nan
                    if fall is None or step.taken < fall:
                        with pace.steady():
                            row["validation_elbo"], slopes = bound_and_slopes(program, cells, held_out, step.shrunk)
                        if step.taken >= training.settled_at[1] * fewest:
                            decays.update(slopes)
                        shown["validation"] = f"{row['validation_elbo']:.1f}"
                if step.shrunk:
                    row["weight_decay"] = float(step.decays.log().mean().exp())
                history.append(row | {name: float(value) for name, value in program.monitored().items()})
                bounds.append(row.get("validation_elbo", row["elbo"]))
                bar.set_postfix(shown)
                if fall is None:
                    bar.total = max(fewest, round(step.taken / training.level))
                    if step.taken >= training.level * fewest and _has_stopped(bounds, training.patience):
                        fall, stopped = step.taken, "converged"
                    elif step.taken >= training.level * most:
                        fall = step.taken
                    if fall is not None:
                        until = bar.total = round(fall / training.level)
        except KeyboardInterrupt:
            stopped = "interrupted"
    if not _is_finite(step.parameters):
        raise _fault(step, recent)
    program.eval()
    table = pd.DataFrame(history, columns=list(history[0] if history else _COLUMNS))
    return Course(table, stopped, len(cells), step.taken, until, perf_counter() - start)


_COLUMNS = ("step", "elbo", "log_likelihood", "kl")  # of every history


def _is_finite(parameters: Sequence[Tensor]) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in parameters)


def _has_stopped(bounds: Sequence[float], n: int) -> bool:
    """Whether the mean of the last `n` bounds exceeds that of no `n` before by more than its error."""
    if len(bounds) < 2 * n:
        return False
    last = bounds[-n:]
    error = statistics.stdev(last) / math.sqrt(n) if n > 1 else 0.0
    best = max(statistics.fmean(bounds[i : i + n]) for i in range(len(bounds) - 2 * n + 1))
    return statistics.fmean(last) <= best + error


def _split(cells: Cells, training: Training) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(cells)).to(cells.device)
    n = training.n_held_out(len(cells))
    return order[:n], order[n:]


def _forever(cells: Cells, size: int, rows: Tensor) -> Iterator[tuple[Tensor, int]]:
    while True:
        yield from cells.parts(size, rows, shuffle=True)


@torch.no_grad()
def _settle(program: Program, cells: Cells, rows: Tensor) -> None:
    program.eval()
    program.settle(cells, rows)
    program.train()


@torch.no_grad()
def _assign_labels(program: Program, cells: Cells, rows: Tensor, most: int) -> None:
    if len(rows) > most:
        rows = rows[torch.randperm(len(rows))[:most].to(rows.device)]
    if len(rows):
        program.eval()
        program.assign_labels(cells, rows)
        program.train()


def _fault(step: Step, recent: Sequence[Tensor]) -> NonFiniteLoss:
    """Say where the loss first was not finite, given the cells of the last steps.

    Where a whole minibatch is at fault, the weights were not finite any more: the gradient of the step before spoilt
    them.
    """
    if step.finite:
        return NonFiniteLoss(step.taken, "gradient", recent[-1].tolist())
    number = int(step.seen)
    before = step.taken - number  # steps since
    rows = recent[-1 - before]
    for site, term in step.terms.items():
        wrong = ~torch.isfinite(term[: len(rows)])
        if wrong.all() and before + 1 < len(recent):
            return NonFiniteLoss(number - 1, "gradient", recent[-2 - before].tolist())
        if wrong.any():
            return NonFiniteLoss(number, site, rows[wrong].tolist())
    return NonFiniteLoss(number, "gradient", rows.tolist())
