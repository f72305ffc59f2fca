"""Progress is a bar where it can be seen, a line now and then elsewhere, and nothing where nobody listens."""

import io
import sys
from types import SimpleNamespace

import pytest

from scvae.inference import progress
from scvae.inference.progress import Progress, quiet, say


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.now)
    return clock


def test_a_log_has_a_line_at_most_every_tenth_and_every_ten_seconds(clock, capsys):
    for seconds, n_lines in ((0.001, 1), (0.1, 10), (10, 10), (1, 10)):  # a step
        clock.now = 0.0
        with Progress(total=100) as bar:
            for i in range(100):
                clock.now += seconds
                bar.update()
                bar.set_postfix({"elbo": f"{-i}.5"})
        out, err = capsys.readouterr()
        lines = err.splitlines()
        assert out == ""
        assert "\r" not in err
        assert len(lines) <= n_lines
        assert lines[-1] == f"scvae: step 100 of 100 (100%), elbo=-99.5, {100 * seconds:.0f} s"
    assert lines[0] == "scvae: step 10 of 100 (10%), elbo=-8.5, 10 s"


def test_long_work_has_a_line_every_ten_minutes(clock, capsys):
    with Progress(total=100_000) as bar:
        for _ in range(40):
            clock.now += 60
            bar.update()
    assert len(capsys.readouterr().err.splitlines()) == 5


def test_standard_error_may_be_a_stand_in(monkeypatch):
    written = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=written.append, flush=lambda: None))
    with Progress(total=2) as bar:
        bar.update(2)
    assert "".join(written) == "scvae: step 2 of 2 (100%), 0 s\n"


def test_work_that_ends_early_says_where(capsys):
    def work():
        with Progress(total=3400) as bar:
            bar.update(589)
            bar.update("not a number")

    with pytest.raises(TypeError, match="unsupported operand"):
        work()
    assert capsys.readouterr().err == "scvae: step 589 of 3,400 (17%), 0 s\n"
    Progress(total=3400).close()  # before the first step something was wrong, which is said by itself
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    for item in (bar := Progress(["a", "b"], desc="fits", unit="fit")):
        bar.set_postfix_str(item)
        say("a line")
    shown = terminal.getvalue()
    assert "2/2" in shown
    assert "a line\n" in shown
    assert "\r" in shown


def test_the_length_of_the_work_may_become_known_on_the_way(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(total=10) as bar:
        bar.update(5)
        bar.total = 40
        assert bar.total == 40
        bar.update(5)
    assert "10/40" in terminal.getvalue()


def test_a_notebook_has_a_bar(monkeypatch):
    made = []
    shell = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr(progress, "tqdm", lambda **how: made.append(how))
    Progress(total=3)
    assert made[0]["total"] == 3
    shell.config.clear()  # IPython in a shell whose standard error is a file
    Progress(total=3)
    assert len(made) == 1


def test_what_is_quiet_shows_nothing_and_counts_all_the_same(monkeypatch, capsys):
    with quiet():
        bar = Progress(range(3))
        assert list(bar) == [0, 1, 2]
        say("a line")
        with quiet(False):
            say("heard")
    with Progress(total=3, disable=True) as other:
        other.update(3)
    assert (bar.n, other.n) == (3, 3)
    assert capsys.readouterr() == ("", "heard\n")
    monkeypatch.setattr(sys, "stderr", None)  # of a program without a window of text
    assert list(Progress(range(3))) == [0, 1, 2]
    say("a line")


def test_a_log_that_is_closed_does_not_stop_the_work(monkeypatch):
    closed = io.StringIO()
    monkeypatch.setattr(sys, "stderr", closed)
    bar = Progress(total=2)
    closed.close()
    with bar, Progress(total=1):
        bar.update(2)
    assert bar.n == 2


def test_an_iteration_that_is_left_is_closed(capsys):
    for item in Progress(range(5), unit="fit"):
        if item == 2:
            break
    assert capsys.readouterr().err == "scvae: fit 2 of 5 (40%), 0 s\n"
