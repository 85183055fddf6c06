import io
import re

import pytest
from rich.console import Console

from sparsetrain.training.events import (
    CheckpointSaved,
    EvalDone,
    Event,
    Notice,
    PhaseStarted,
    RunFinished,
    RunStarted,
    StepDone,
)
from sparsetrain.training.formatting import duration, percent, quantity, scaled, step_figures
from sparsetrain.training.progress import ProgressDisplay

TOTAL_TOKENS = 100_000
ESCAPE = "\x1b"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Watched:
    """A display, what it wrote, and the clock it reads."""

    def __init__(self, file: io.StringIO, width: int) -> None:
        self.file, self.clock = file, Clock()
        terminal = file.isatty()
        self.console = Console(file=file, force_terminal=terminal, width=width, height=25, _environ={"TERM": "xterm"})
        self.display = ProgressDisplay(self.console, clock=self.clock)

    def show(self, *events: Event) -> None:
        for event in events:
            self.display(event)

    @property
    def text(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.file.getvalue())

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @property
    def picture(self) -> str:
        """What the live display shows now."""
        paper = Console(file=io.StringIO(), width=self.console.width)
        paper.print(self.display._view._draw())
        return paper.file.getvalue()


@pytest.fixture
def log():
    watched = Watched(io.StringIO(), width=80)
    with watched.display:
        yield watched


@pytest.fixture(params=[80, 120], ids=["80-columns", "120-columns"])
def terminal(request):
    watched = Watched(Terminal(), width=request.param)
    with watched.display:
        yield watched


def run_started(**changes: object) -> RunStarted:
    facts = {
        "name": "demo",
        "folder": "runs/demo",
        "num_parameters": 3_420_160,
        "total_tokens": TOTAL_TOKENS,
        "world_size": 2,
        "device": "torch, replicated over 2 ranks, bf16, cpu",
        "matmul_peak_flops": 190e9,
    }
    return RunStarted(**{**facts, **changes})


def phase_started(index: int = 0, name: str = "sparse") -> PhaseStarted:
    return PhaseStarted(name, index, 2, 500 * index, 500, TOTAL_TOKENS // 2, f"summary of {name}")


def step(number: int, **changes: object) -> StepDone:
    row = {
        "step": number,
        "tokens": 100 * number,
        "loss": 2.3456,
        "lr": 5.2e-4,
        "grad_norm": 0.61,
        "tokens_per_s": 23_123.4,
        "mfu": 0.412,
        "density": 0.582,
    }
    return StepDone("sparse", {**row, **changes})


def evaluation(number: int, when: str = "during", phase: str = "sparse", bits: float = 3.464) -> EvalDone:
    return EvalDone(phase, number, when, loss=2.401, bits_per_byte=bits, num_tokens=4096)


# --- plain lines ---------------------------------------------------------------------------------------------------


def test_log_has_one_line_without_control_codes_for_each_kind_of_event(log):
    log.show(
        run_started(),
        phase_started(),
        evaluation(0, "start"),
        step(1),
        CheckpointSaved(1, "runs/demo/checkpoints/1", 0.31),
        Notice("compiling: the first step takes a minute or more"),
        Notice("memory is short", "warning"),
    )
    log.clock.now += 75
    log.show(RunFinished({}))
    assert log.lines == [
        "demo: 3.42M parameters · 100k tokens · torch, replicated over 2 ranks, bf16, cpu at 190 GFLOP/s · runs/demo",
        "phase 1 of 2, sparse: summary of sparse",
        "held out at step 0: 3.464 bits/byte · loss 2.401 · perplexity 11.0",
        "step 1 (0 %): loss 2.346, tok/s 23.1k, MFU 41.2 %, density 0.582, lr 5.2e-04, grad norm 0.61",
        "checkpoint at step 1 (0.3 s)",
        "compiling: the first step takes a minute or more",
        "warning: memory is short",
        "finished: 100 tokens in 1:15",
    ]
    assert ESCAPE not in log.file.getvalue()


def test_log_lines_are_not_wrapped_or_read_as_markup(log):
    message = "[bold] glob *.weight[0] " + "matches nothing " * 20
    log.show(Notice(message))
    assert log.lines == [message]


def step_numbers(watched: Watched) -> list[int]:
    return [int(line.split()[1]) for line in watched.lines if line.startswith("step ")]


def test_log_shows_a_step_for_every_fiftieth_of_a_fast_run_and_the_last(log):
    log.show(run_started(), phase_started(), *(step(number) for number in range(1, 1001)))
    assert step_numbers(log) == [1, *range(20, 1001, 20)]


def test_log_shows_a_step_every_ten_seconds_of_a_slow_run(log):
    log.show(run_started(total_tokens=10**9), phase_started())
    for number in range(1, 41):
        log.clock.now += 2.5
        log.show(step(number))
    assert step_numbers(log) == [1, *range(5, 41, 4)]


def test_log_of_a_long_run_grows_with_its_logarithm(log):
    log.show(run_started(total_tokens=10**12), phase_started())
    for number in range(1, 10_001):
        log.clock.now += 60
        log.show(step(number))
    assert 100 < len(step_numbers(log)) < 400


def test_time_left_follows_the_pace_of_the_run(log):
    log.show(run_started(), phase_started())
    for number in range(1, 501):
        log.clock.now += 1
        log.show(step(number))
    assert "left" not in next(line for line in log.lines if line.startswith("step 1 "))
    assert log.lines[-1].startswith("step 500 ")
    assert log.lines[-1].endswith("8:20 left")


def test_resumed_run_says_so_and_measures_its_pace_anew(log):
    log.show(run_started(), phase_started(), step(1))
    log.clock.now += 3600
    log.show(run_started(resumed_from_step=400), phase_started(), step(401))
    log.clock.now += 20
    log.show(step(421))
    assert log.lines[-4].endswith("runs/demo · resumed from step 400")
    assert log.lines[-1].endswith("9:39 left")


def test_notice_is_shown_once(log):
    log.show(Notice("one"), Notice("one"), Notice("two", "warning"), Notice("two"), Notice("one"))
    assert log.lines == ["one", "warning: two"]


@pytest.mark.parametrize("value", [float("nan"), None, "missing"], ids=["nan", "null", "missing"])
def test_figure_that_is_not_there_is_a_dash(log, value):
    row = step(1, loss=value, mfu=value, tokens_per_s=value)
    if value == "missing":
        for key in ("loss", "mfu", "tokens_per_s"):
            del row.row[key]
    log.show(run_started(), row)
    assert "loss –, tok/s –, MFU –, density 0.582" in log.lines[-1]


def test_data_is_reported_at_the_beginning_the_end_and_now_and_then(log):
    for megabytes in range(0, 41, 2):
        log.clock.now += 1
        log.display.data_progress("tokenize", megabytes * 10**6, 40 * 10**6)
    log.display.data_progress("count", 5, None)
    assert log.lines == [
        "data, tokenize: 0 B of 40 MB",
        "data, tokenize: 20 MB of 40 MB",
        "data, tokenize: 40 MB of 40 MB",
        "data, count: 5 B",
    ]


def test_forced_colours_do_not_make_a_pipe_a_terminal():
    pipe = io.StringIO()
    with ProgressDisplay(Console(file=pipe, force_terminal=True, width=80)) as display:
        display(run_started())
        display(step(1))
    assert ESCAPE not in pipe.getvalue()
    assert pipe.getvalue().count("\n") == 2


# --- live display --------------------------------------------------------------------------------------------------


def test_live_display_shows_phase_bar_figures_and_last_evaluation(terminal):
    terminal.show(run_started(), phase_started(), evaluation(0, "start"), step(100))
    terminal.clock.now += 50
    terminal.show(evaluation(120, bits=3.1), CheckpointSaved(150, "x", 0.3), step(200))
    lines = terminal.picture.splitlines()
    assert max(map(len, lines)) <= terminal.console.width
    assert re.fullmatch(r" phase 1 of 2  sparse +6:40 left ", lines[1])
    assert re.fullmatch(r" ━+ +20 % ", lines[2].replace("╸", "━").replace("╺", "━"))
    assert lines[3].strip() == "step 200 · 20k of 100k tokens · checkpoint at step 150"
    assert lines[5].split() == ["loss", "tok/s", "MFU", "density", "lr", "grad", "norm"]
    assert lines[6].split() == ["2.346", "23.1k", "41.2", "%", "0.582", "5.2e-04", "0.61"]
    assert lines[8].strip() == "held out  3.100 bits/byte · loss 2.401 · perplexity 11.0 · step 120"


def test_live_display_prints_each_lasting_line_once(terminal):
    terminal.show(
        run_started(),
        Notice("[warning] once", "warning"),
        Notice("[warning] once", "warning"),
        phase_started(),
        evaluation(0, "start", bits=8.0),
        step(1),
        evaluation(500, "end", bits=2.5),
    )
    for line in (
        "3.42M parameters",
        "! [warning] once",
        "summary of sparse",
        "sparse  held-out text 8.000 → 2.500 bits",
    ):
        assert terminal.text.count(line) == 1


def test_phase_without_first_evaluation_ends_with_its_last_alone(terminal):
    terminal.show(run_started(), phase_started(), step(1), evaluation(500, "end", bits=2.5))
    assert "sparse  held-out text 2.500 bits/byte" in terminal.text


def test_live_display_says_what_it_waits_for(terminal):
    assert "starting" in terminal.picture
    terminal.display.data_progress("tokenize", 12_300_000, 45_000_000)
    assert "data, tokenize" in terminal.picture
    assert "12.3 MB of 45 MB" in terminal.picture
    terminal.show(run_started())
    terminal.clock.now += 12
    assert "first step  0:12" in terminal.picture


def test_live_display_counts_skipped_steps(terminal):
    terminal.show(run_started(), phase_started(), step(3, bad_steps=2, loss=None))
    assert "· 2 skipped" in terminal.picture


def test_live_display_is_gone_when_the_run_has_finished():
    terminal = Watched(Terminal(), width=80)
    with terminal.display:
        terminal.show(run_started(), phase_started(), step(1000), RunFinished({}))
    assert terminal.picture.strip() == ""
    assert "finished: 100k tokens in 0:00" in terminal.text


def test_interrupt_leaves_the_last_picture_and_the_cursor():
    terminal = Watched(Terminal(), width=80)

    def train() -> None:
        with terminal.display:
            terminal.show(run_started(), phase_started(), step(7))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    written = terminal.file.getvalue()
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")  # shown again, for good
    assert "step 7 · " in terminal.text[-900:]
    assert written.endswith("\n\x1b[?25h")


# --- figures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (42.4, "0:42"),
        (59.6, "1:00"),
        (725, "12:05"),
        (11525, "3:12:05"),
        (356400, "4 d 3 h"),
        (-1, "0:00"),
    ],
    ids=str,
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (9.5, "9.50"),
        (999.4, "999"),
        (999.9, "1.00k"),
        (23123, "23.1k"),
        (5.0135e6, "5.01M"),
        (2e15, "2P"),
    ],
    ids=str,
)
def test_scaled(value, text):
    assert scaled(value) == text


def test_quantity_and_percent():
    assert (quantity(12.34e6, "B"), quantity(5, "B"), percent(0.4119), percent(0.5, 0)) == (
        "12.3 MB",
        "5 B",
        "41.2 %",
        "50 %",
    )


def test_step_figures_have_the_same_labels_whatever_is_missing():
    assert [label for label, _ in step_figures({})] == [label for label, _ in step_figures(step(1).row)]
    assert {value for _, value in step_figures({})} == {"–"}
