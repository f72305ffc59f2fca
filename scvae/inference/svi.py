"""The one training loop."""

from __future__ import annotations

import copy
import math
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
from scvae.boundary.process import seeded, unchecked
from scvae.data.cells import Cells, n_minibatches
from scvae.inference.evidence import elbo_terms
from scvae.inference.pace import pace_of
from scvae.inference.progress import Progress
from scvae.inference.recording import Capture, CudaGraphs, Recorded
from scvae.inference.steps import Step
from scvae.programs.program import Program

__all__ = ["Course", "NonFiniteLoss", "Training", "train"]


@dataclass(frozen=True)
class Training(Options):
    """How a program is trained; the defaults were chosen by experiment (``tests/benchmarks/defaults.md``).

    Parameters
    ----------
    max_epochs
        Passes through the training cells. By default a number of steps decides: four passes, but at least `min_steps`
        and at most 1,500 steps, and at least one pass.
    batch_size
        Cells in a minibatch, at most.
    learning_rate
        Of Adam, at its peak: it rises over the first tenth of the steps and falls to nothing along a cosine.
    weight_decay
        Rate, relative to the learning rate, at which the weights named by :meth:`~scvae.programs.Program.decayed`
        shrink (Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization, ICLR). It stands for a Gaussian prior
        on them, which counts for less the more cells there are: beyond 1,500 training cells the rate is inversely
        proportional to their number.
    kl_weight
        Weight of the KL terms once warmed up; 1 is the ELBO. Below 1, cell types lie further apart and the model
        generalises less well; evidence is always computed with weight 1.
    kl_warmup
        Fraction of all steps over which that weight rises to its value, from nothing.
    validation_fraction
        Of the cells, held out to measure the ELBO (un-annealed, with weight 1); 0 trains on all of them.
    patience
        Evaluations without a better validation ELBO after which training stops. There are at most 50 in a whole
        training.
    min_steps
        Steps at least, for which small data are passed through more often, where `max_epochs` is not given.
    """

    max_epochs: Whole | None = None
    batch_size: Annotated[int, Range(2)] = 128
    learning_rate: Positive = 1e-2
    weight_decay: NonNegative = 1.2
    kl_weight: NonNegative = 1.0
    kl_warmup: Annotated[float, Range(0, 1)] = 0.3
    validation_fraction: Fraction = 0.0
    patience: Whole = 10
    min_steps: Whole = 500

    default_epochs: ClassVar[int] = 4
    max_steps: ClassVar[int] = 1500
    full_decay_cells: ClassVar[int] = 1500
    n_evaluations: ClassVar[int] = 50
    max_validation_cells: ClassVar[int] = 2048
    settled_at: ClassVar[tuple[float, ...]] = (0.05, 0.15, 0.3)  # fractions of the steps
    max_settling_cells: ClassVar[int] = 2048

    def decay(self, n_cells: int) -> float:
        """Return the rate of the weight decay for so many training cells."""
        return self.weight_decay * min(1.0, self.full_decay_cells / n_cells)

    def epochs(self, per_epoch: int) -> int:
        """Return how many passes to make, when a pass has `per_epoch` steps."""
        if self.max_epochs is not None:
            return self.max_epochs
        n_steps = max(min(self.default_epochs * per_epoch, self.max_steps), self.min_steps)
        return max(1, round(n_steps / per_epoch))

    def learning_rates(self, n_steps: int) -> Tensor:
        """Return the learning rate at each step, ``[n_steps]``: up along a cosine for a tenth of them, then down."""
        t = torch.arange(n_steps, dtype=torch.float64) / n_steps
        rise, fall = (t / 0.1).clamp(max=1), ((t - 0.1) / 0.9).clamp(min=0)
        rise, fall = (1 - torch.cos(torch.pi * rise)) / 2, (1 + torch.cos(torch.pi * fall)) / 2
        return (self.learning_rate * (0.04 + 0.96 * rise) * fall).float()

    def kl_weights(self, n_steps: int) -> Tensor:
        """Return the weight of the KL terms at each step, ``[n_steps]``."""
        t = torch.arange(1, n_steps + 1, dtype=torch.float64) / max(1.0, self.kl_warmup * n_steps)
        return (self.kl_weight * t.clamp(max=1)).float()


@dataclass(frozen=True, eq=False)
class Course:
    """How a training went.

    Parameters
    ----------
    history
        A row for each evaluation: ``step``, ``elbo``, ``log_likelihood``, ``kl`` and, with validation,
        ``validation_elbo``, in nats per cell, the training ones averaged since the evaluation before; and what the
        program monitors, by name.
    stopped
        Why the training ended: ``"finished"``, ``"early"`` or ``"interrupted"`` (Ctrl-C).
    n_cells
        How many cells there were, those held out counted in.
    n_steps, n_planned
        Steps that were taken, and those that were to be taken at most.
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


def train(program: Program, cells: Cells, training: Training, *, progress: bool = True) -> Course:
    """Maximise the ELBO by stochastic gradient ascent, and leave the program with the best weights found.

    Ctrl-C ends the training as an early stop does.

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
    per_epoch = n_minibatches(len(rows), training.batch_size)
    n_steps = per_epoch * training.epochs(per_epoch)
    every = -(-n_steps // training.n_evaluations)
    settling = {round(fraction * n_steps) for fraction in training.settled_at}
    check_every = 1 if cells.device.type == "cpu" else 50  # each check waits for the device

    capture: Capture | None = None  # counts that the host keeps for a GPU are copied step by step
    if cells.device.type == "cpu":
        capture = Recorded
    elif cells.values.is_cuda:
        capture = CudaGraphs()
    decay = training.decay(len(rows))
    step = Step(program, cells, decay, training.learning_rates(n_steps), training.kl_weights(n_steps), capture)
    recent: deque[Tensor] = deque(maxlen=check_every + 1)  # the cells of the last steps
    history: dict[str, list] = {"step": [], "elbo": [], "log_likelihood": [], "kl": []}
    if len(held_out):
        history["validation_elbo"] = []
    best, best_state, waited = -math.inf, None, 0
    stopped = "finished"

    bar = Progress(total=n_steps, disable=not progress)
    sizes = {len(part) for part in rows.tensor_split(per_epoch)}
    program.train()
    with unchecked(), bar, pace_of(program, cells, sizes) as pace:
        try:
            for part, n_nonzero in _forever(cells, training.batch_size, rows):
                pace(partial(step, part, n_nonzero))
                recent.append(part)
                bar.update()
                evaluate = step.taken % every == 0 or step.taken == n_steps
                if (evaluate or step.taken in settling or step.taken % check_every == 0) and not step.finite:
                    raise _fault(step, recent)
                if step.taken in settling:
                    with pace.steady():
                        _settle(program, cells, rows[torch.randperm(len(rows))[: training.max_settling_cells]])
                if not evaluate:
                    continue
                with pace.steady():
                    validation = _validate(program, cells, held_out) if len(held_out) else None
                mean_log_likelihood, mean_kl = (step.sums / (step.taken - (history["step"] or [0])[-1])).tolist()
                step.sums.zero_()
                history["step"].append(step.taken)
                history["elbo"].append(mean_log_likelihood - mean_kl)
                history["log_likelihood"].append(mean_log_likelihood)
                history["kl"].append(mean_kl)
                for name, value in program.monitored().items():
                    history.setdefault(name, []).append(float(value))
                shown = {"elbo": f"{history['elbo'][-1]:.1f}"}
                if validation is not None:
                    history["validation_elbo"].append(validation)
                    shown["validation"] = f"{validation:.1f}"
                    waited += 1
                    if validation > best:
                        best, best_state, waited = validation, copy.deepcopy(program.state_dict()), 0
                bar.set_postfix(shown)
                if step.taken == n_steps:
                    break
                if waited >= training.patience and step.taken > training.kl_warmup * n_steps:
                    stopped = "early"
                    break
        except KeyboardInterrupt:
            stopped = "interrupted"
    if best_state is not None:
        program.load_state_dict(best_state)
    if not all(parameter.isfinite().all() for parameter in step.parameters):
        raise _fault(step, recent)
    program.eval()
    return Course(pd.DataFrame(history), stopped, len(cells), step.taken, n_steps, perf_counter() - start)


def _split(cells: Cells, training: Training) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(cells)).to(cells.device)
    n = min(round(training.validation_fraction * len(cells)), training.max_validation_cells, len(cells) - 2)
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
def _validate(program: Program, cells: Cells, rows: Tensor) -> float:
    """Un-annealed ELBO, nats per cell, with the same draws each time and apart from those of the training."""
    program.eval()
    total = torch.zeros((), device=cells.device)
    with seeded(0, cells.device):
        for _, batch in cells.minibatches(1024, rows):
            log_likelihood, kl = elbo_terms(program, batch)
            total += (sum(log_likelihood.values()) - sum(kl.values())).sum()
    program.train()
    return float(total) / len(rows)


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
