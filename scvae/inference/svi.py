"""The one training loop."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Annotated, Any, ClassVar

import pandas as pd
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from scvae.boundary.options import Fraction, NonNegative, Options, Positive, Range, Whole
from scvae.boundary.process import seed_from, seeded, unchecked
from scvae.boundary.ranks import ALONE, Ranks
from scvae.boundary.signals import watched
from scvae.data.cells import Cells
from scvae.data.order import Shuffled, n_minibatches
from scvae.inference.checkpoints import Checkpoints
from scvae.inference.pace import Fixed, Pace, pace_of
from scvae.inference.progress import Progress, say
from scvae.inference.recording import Capture, CudaGraphs, Recorded
from scvae.inference.shrinkage import LearntDecays, bound_and_slopes
from scvae.inference.steps import Part, Step
from scvae.programs.program import Program

__all__ = ["Course", "NonFiniteLoss", "Run", "Training", "train"]

#: What a run draws, each by a seed of its own: which cells are held out, their order while the rate is level and while
#: it falls, the cells to settle on, those with labels, and the noise of the latents.
_SPLIT, _LEVEL, _FALL, _SETTLE, _LABELS, _NOISE = range(6)
_COLUMNS = ("step", "elbo", "log_likelihood", "kl")  # of every history


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
    program: Program,
    cells: Cells,
    training: Training,
    *,
    parts: Sequence[Part] = (),
    ranks: Ranks = ALONE,
    progress: bool = True,
    checkpoints: Checkpoints | None = None,
) -> Course:
    """Maximise the ELBO by stochastic gradient ascent.

    Ctrl-C ends the training with the weights as they are. With `parts` these alone are learnt: the networks are as
    after training (batch norm, dropout), and nothing else of the program changes. With `ranks` several processes train
    together, and all have the same program in the end; the first one shows the progress. With `checkpoints` the
    training goes on from the newest of them, if there is one and that was asked for, and writes them.

    Returns
    -------
    Course
        The history, and why the training ended.

    Raises
    ------
    NonFiniteLoss
        If the loss is NaN or infinite; the weights are then of no use.
    ValueError
        If a process would have a single cell of a minibatch, or the processes have not been given the same.
    scvae.boundary.signals.Suspended
        If a signal ended it, and there are checkpoints.
    """
    run = Run(program, cells, training, parts, ranks)
    shows = progress and ranks.rank == 0
    if checkpoints is not None:
        checkpoints.begin(run)
        if shows and run.step.taken:
            say(f"scvae: the training goes on from step {run.step.taken:,}")
    bar = Progress(total=run.expected, initial=run.step.taken, disable=not shows)
    program.train(not parts)
    watching = watched(None) if checkpoints is None else nullcontext(checkpoints.signals)
    with unchecked(), bar, closing(run), pace_of(program, cells, run.lengths) as pace:
        try:
            with watching as signals, signals.put_off():
                while run.step.taken < run.until:
                    run.advance(pace)
                    bar.update()
                    bar.total = run.expected
                    if run.has_news:
                        bar.set_postfix(run.news)
                    if checkpoints is None:
                        signals.act()
                    elif not checkpoints.goes_on(run):
                        run.stopped = "interrupted"
                        break
                else:
                    if checkpoints is not None:
                        checkpoints.end(run)
        except KeyboardInterrupt:
            if ranks.n > 1:  # the others may be at another step
                raise
            run.stopped = "interrupted"
    run.agree()
    run.check()
    program.eval()
    return run.course()


class Run:
    """A training, step by step, which can be taken up again where it was.

    What is drawn of the cells (those held out, the order, those that the program settles on) depends on the seed and on
    the step alone, and is the same in every process; what a step draws, the noise of the latents, is drawn from torch's
    random numbers.

    Parameters
    ----------
    program, cells, training
        What is trained, on what, and how.
    parts
        All that is learnt, where that is not the whole program.
    ranks
        The processes that train together.

    Raises
    ------
    ValueError
        If a process would have a single cell of a minibatch, or the processes have not been given the same.
    """

    def __init__(
        self,
        program: Program,
        cells: Cells,
        training: Training,
        parts: Sequence[Part] = (),
        ranks: Ranks = ALONE,
    ) -> None:
        self.program, self.cells, self.training, self.ranks = program, cells, training, ranks
        self.started = perf_counter()
        self.seed = int(torch.randint(2**62, ()))
        self._split()
        self.n_held_out = cells.n_in(self.held_out)
        self.fewest, self.most = training.n_steps(n_minibatches(cells.n_in(self.units), training.batch_size))
        self.evaluate_every = -(-self.fewest // training.n_evaluations)
        self.settling = set() if parts else {round(fraction * self.fewest) for fraction in training.settled_at}
        self.check_every = 1 if cells.device.type == "cpu" else 50  # each check waits for the device
        capture: Capture | None = None  # counts that the host keeps for a GPU are copied step by step
        if cells.device.type == "cpu":
            capture = Recorded
        elif cells.values.is_cuda:
            capture = CudaGraphs(cells.device)
        size = min(training.batch_size, len(cells))
        self.step = Step(program, cells, size, capture, training.deviation_scale, parts, ranks)
        self.step.decays.fill_(training.decay(len(cells)))
        self.decays = LearntDecays(self.step.decays)
        #: The cells of the last steps.
        self.recent: deque[Tensor] = deque(maxlen=self.check_every + 1)
        self.history: list[dict[str, float]] = []
        self.bounds: list[float] = []
        #: The step at which the rate begins to fall, once that is known, and the last step.
        self.fall = None if self.fewest < self.most else min(round(training.level * self.most), self.most - 1)
        self.until, self.stopped = self.most, "finished"
        self.news: dict[str, str] = {}
        self.has_news = False
        self._join()
        self.source = self._shuffled()

    @property
    def expected(self) -> int:
        """How many steps there will be, as far as is known."""
        if self.fall is not None:
            return self.until
        return max(self.fewest, round(self.step.taken / self.training.level))

    @property
    def is_falling(self) -> bool:
        """Whether the rate falls in the next step: the cells that were held out are then trained on too."""
        return self.fall is not None and self.step.taken >= self.fall

    def _split(self) -> None:
        """Hold out some cells, in units of them: single cells, or blocks of a store."""
        n_held_out = self.training.n_held_out(len(self.cells))
        self.held_out, self.units = self.cells.split(n_held_out, seed_from(self.seed, _SPLIT))
        self.everyone = torch.cat([self.held_out, self.units])

    @property
    def lengths(self) -> set[int]:
        """Cells that a step may have, in this process."""
        return self._lengths(self.ranks.rank)

    def _lengths(self, rank: int) -> set[int]:
        size, units = self.step.size, (self.units, self.everyone)
        return {n for each in units for n in self.cells.shuffled(size, each, 0, rank, self.ranks.n).lengths}

    def _join(self) -> None:
        """Let all processes start alike, with noise of their own; refuse where they could not."""
        if self.ranks.group is None:
            return
        self.ranks.check_same(_facts(self.program, self.cells, self.training, self.seed))
        if min(self._lengths(self.ranks.n - 1)) < 2:
            raise ValueError(
                f"Minibatches (batch_size={self.training.batch_size}, of {len(self.cells)} cells) cannot be shared by "
                f"{self.ranks.n} processes: each takes two cells at least. Pass a larger batch_size, or start fewer "
                "processes."
            )
        self.ranks.copy_first([*self.program.parameters(), *self.program.buffers()])
        self._draw_own_noise()

    def _draw_own_noise(self) -> None:
        """Seed the noise of the latents of this process, which would be that of the others."""
        seed = seed_from(self.seed, _NOISE, self.ranks.rank, self.step.taken)
        torch.default_generator.manual_seed(seed)
        if self.cells.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def agree(self) -> None:
        """Let all processes have the same numbers again.

        The statistics of batch normalisation, which each follows in its own cells, are averaged. Everything else is the
        same but for the rounding of unlike processors.
        """
        self.ranks.average(_statistics(self.program))
        self.ranks.copy_first(
            [*self.program.parameters(), *self.program.buffers(), *self.step.state().values(), *self.decays.moments]
        )

    def advance(self, pace: Pace | Fixed) -> None:
        """Take a step, and do what is due after it.

        Raises
        ------
        NonFiniteLoss
            If the loss is NaN or infinite.
        """
        step, training = self.step, self.training
        if step.taken == self.fall:
            self.source.close()
            self.source = self._shuffled()
            if self.n_held_out:
                step.decays.mul_(training.decay_in_fall)
        step.rate.fill_(training.rate(step.taken, self.fewest, self.fall, self.until))
        step.kl_weight.fill_(training.kl(step.taken, self.fewest, self.fall, self.until))
        rows, n_nonzero = next(self.source)
        pace(partial(step, rows, n_nonzero, self.source.n_drawn))
        self.recent.append(self.cells.origin(rows))
        evaluate = step.taken % self.evaluate_every == 0 or step.taken == self.until
        settle = step.taken in self.settling
        if (evaluate or settle or step.taken % self.check_every == 0) and not step.finite:
            raise _fault(self.step, self.recent, self.ranks)
        if evaluate or settle:
            self.agree()
            self.check()
        self.has_news = evaluate
        with pace.steady() if evaluate or settle else nullcontext():
            if settle:
                self._settle()
            if evaluate:
                self._evaluate()

    def check(self) -> None:
        """Refuse weights that are not finite.

        Raises
        ------
        NonFiniteLoss
            If they are not.
        """
        if not _is_finite([*self.program.parameters(), *self.program.buffers()]):
            raise _fault(self.step, self.recent, self.ranks)

    def _shuffled(self) -> Shuffled:
        """Return the order of the cells that are trained on at this step."""
        seed = seed_from(self.seed, _FALL if self.is_falling else _LEVEL)
        units = self.everyone if self.is_falling else self.units
        return self.cells.shuffled(self.step.size, units, seed, self.ranks.rank, self.ranks.n)

    def _settle(self) -> None:
        """Let the program adapt to what some of the training cells have become."""
        seed = seed_from(self.seed, _SETTLE, self.step.taken)
        cells, rows = self.cells.sample(self.units, self.training.max_settling_cells, seed)
        self._show(cells, rows, self.program.settle, seed)

    def _assign_labels(self) -> None:
        """Let the program see which of its components the cells with a label are of."""
        seed = seed_from(self.seed, _LABELS, self.step.taken)
        n, n_at_the_end = self.training.max_assigned_cells
        n = n_at_the_end if self.step.taken == self.until else n
        cells, rows = self.cells.labelled(self.everyone if self.is_falling else self.units, n, seed)
        if len(rows):
            self._show(cells, rows, self.program.assign_labels, seed)

    @torch.no_grad()
    def _show(self, cells: Cells, rows: Tensor, look: Callable[[Cells, Tensor], object], seed: int) -> None:
        """Let the program look at some cells, as it is after training."""
        self.program.eval()
        with seeded(seed, cells.device):
            look(cells, rows)
        self.program.train()
        self.agree()

    def _evaluate(self) -> None:
        """Add a row to the history, learn the rates of decay, and see whether the bound still rises."""
        step, training = self.step, self.training
        if self.cells.y is not None:
            self._assign_labels()
        since = step.taken - (self.history[-1]["step"] if self.history else 0)
        log_likelihood, kl = (step.sums / since).tolist()
        step.sums.zero_()
        row = {"step": step.taken, "elbo": log_likelihood - kl, "log_likelihood": log_likelihood, "kl": kl}
        self.news["elbo"] = f"{row['elbo']:.1f}"
        if self.n_held_out:
            row["validation_elbo"] = math.nan
            if not self.is_falling:
                cells, rows = self.cells.held(self.held_out)
                row["validation_elbo"], slopes = bound_and_slopes(self.program, cells, rows, step.shrunk)
                self.ranks.copy_first([slopes])
                if step.taken >= training.settled_at[1] * self.fewest:
                    self.decays.update(slopes)
                self.news["validation"] = f"{row['validation_elbo']:.1f}"
        if step.shrunk:
            row["weight_decay"] = float(step.decays.log().mean().exp())
        row |= {name: float(value) for name, value in self.program.monitored().items()}
        row = self.ranks.gathered(row)[0]
        self.history.append(row)
        self.bounds.append(row.get("validation_elbo", row["elbo"]))
        if self.fall is None:
            if step.taken >= training.level * self.fewest and _has_stopped(self.bounds, training.patience):
                self.fall, self.stopped = step.taken, "converged"
            elif step.taken >= training.level * self.most:
                self.fall = step.taken
            if self.fall is not None:
                self.until = round(self.fall / training.level)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return all that the rest of the training depends on, for :meth:`restore`: what JSON holds, and tensors.

        Several processes have to ask for it after the same step; it is the same in all.
        """
        content = {
            "seed": self.seed,
            "taken": self.step.taken,
            "history": self.history,
            "bounds": self.bounds,
            "fall": self.fall,
            "until": self.until,
            "stopped": self.stopped,
            "news": self.news,
            "seconds": perf_counter() - self.started,
            "order": self.source.state(),
        }
        tensors = {f"own.{name}": self.ranks.stacked(value) for name, value in self._own().items()}
        for name, of in (
            ("program", self.program.state_dict()),
            ("step", self.step.state()),
            ("decays", self.decays.state()),
        ):
            tensors |= {f"{name}.{key}": value for key, value in of.items()}
        return content, tensors

    def restore(self, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on where a training of the same program, cells and settings was.

        Raises
        ------
        ValueError
            If it never was there.
        """
        fall, until = content["fall"], content["until"]
        is_within = isinstance(until, int) and int(tensors["step.count"]) <= until <= self.most
        if not is_within or not (fall is None or (isinstance(fall, int) and 0 <= fall < until)):
            raise ValueError(f"its training falls from step {fall!r} to {until!r}, and has {self.most:,} at most")

        def of(name: str) -> dict[str, Tensor]:
            return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}

        for name in ("seed", "fall", "until", "stopped"):
            setattr(self, name, content[name])
        self.history = [dict(row) for row in content["history"]]
        self.bounds, self.news = list(content["bounds"]), dict(content["news"])
        self.started = perf_counter() - content["seconds"]
        self._split()
        self.program.load_state_dict(of("program"))
        self.step.restore(of("step"))
        self.decays.restore(of("decays"))
        self.source.close()
        self.source = self._shuffled()
        self.source.restore(content["order"])
        self._restore_own(of("own"))

    def _own(self) -> dict[str, Tensor]:
        """Return what differs from process to process."""
        own = {"random.cpu": torch.get_rng_state()}
        if self.cells.device.type == "cuda":
            own["random.cuda"] = torch.cuda.get_rng_state(self.cells.device)
        return own | {f"statistic.{k}": value for k, value in enumerate(_statistics(self.program))}

    def _restore_own(self, own: Mapping[str, Tensor]) -> None:
        """Go on with what each of the processes had; where there were more or fewer, with other noise."""
        if len(own["random.cpu"]) != self.ranks.n:
            self._draw_own_noise()
            for k, statistic in enumerate(_statistics(self.program)):
                statistic.copy_(own[f"statistic.{k}"].mean(0))
            return
        torch.set_rng_state(own["random.cpu"][self.ranks.rank].clone().cpu())  # of a part, torch would crash
        if self.cells.device.type == "cuda":
            torch.cuda.set_rng_state(own["random.cuda"][self.ranks.rank].clone().cpu(), self.cells.device)
        for k, statistic in enumerate(_statistics(self.program)):
            statistic.copy_(own[f"statistic.{k}"][self.ranks.rank])

    def course(self) -> Course:
        """Return how the training went."""
        table = pd.DataFrame(self.history, columns=list(self.history[0] if self.history else _COLUMNS))
        seconds = perf_counter() - self.started
        return Course(table, self.stopped, len(self.cells), self.step.taken, self.until, seconds)

    def close(self) -> None:
        """Let go of what is held for the next step."""
        self.source.close()


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


def _statistics(program: Program) -> list[Tensor]:
    """Return what batch normalisation knows of all cells."""
    norms = [each for each in program.modules() if isinstance(each, _BatchNorm)]
    return [each for norm in norms for each in (norm.running_mean, norm.running_var) if each is not None]


def _facts(program: Program, cells: Cells, training: Training, seed: int) -> dict[str, Any]:
    """Return what has to be the same in all processes, by what it is called."""
    known = repr(replace(cells.schema, continuous={}))  # whose means may differ by rounding
    return {
        "the number of cells": len(cells),
        "the number of genes": cells.n_genes,
        "the genes and keys, by a checksum": hashlib.sha256(known.encode()).hexdigest(),
        "the cells, by a checksum": cells.digest(exactly=False),
        "the program": f"{program.name} {program.options}",
        "the training": str(training),
        "the seed": seed,
    }


def _fault(step: Step, recent: Sequence[Tensor], ranks: Ranks = ALONE) -> NonFiniteLoss:
    """Say where the loss first was not finite, given the cells of the last steps; the same in all processes.

    Where a whole minibatch is at fault, the weights were not finite any more: the gradient of the step before spoilt
    them.
    """
    number = int(step.seen)
    before = 0 if step.finite else step.taken - number  # steps since
    last = [rows.tolist() for rows in [*recent][: len(recent) - before][-2:]]
    terms = {site: (~term[: len(last[-1])].isfinite()).tolist() for site, term in step.terms.items()}
    shares = ranks.gathered([last, terms])
    *earlier, rows = ([row for share, _ in shares for row in share[k]] for k in range(len(last)))
    if step.finite:
        return NonFiniteLoss(step.taken, "gradient", rows)
    for site in terms:
        wrong = [each for _, share in shares for each in share[site]]
        if all(wrong) and earlier:
            return NonFiniteLoss(number - 1, "gradient", earlier[0])
        if any(wrong):
            return NonFiniteLoss(number, site, [row for row, is_wrong in zip(rows, wrong, strict=True) if is_wrong])
    return NonFiniteLoss(number, "gradient", rows)
