"""The live display of a run on a terminal: a few quiet lines that are redrawn in place."""

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from sparsetrain.training.events import EvalDone, Event, Notice, PhaseStarted, RunFinished, RunStarted
from sparsetrain.training.formatting import duration, percent, scaled, step_figures
from sparsetrain.training.progress_state import (
    ProgressState,
    describe_data,
    describe_end,
    describe_evaluation,
    describe_run,
)

_REFRESHES_PER_S = 4
_MARGIN = (0, 1)


class LiveView:
    """Redraws phase, bar and figures; what stays true is printed once, above."""

    def __init__(self, console: Console, state: ProgressState) -> None:
        self._console = console
        self._state = state
        self._spinner = Spinner("dots", style="cyan")
        self._live = Live(console=console, get_renderable=self._draw, refresh_per_second=_REFRESHES_PER_S)

    def start(self) -> None:
        """Hide the cursor and begin to redraw."""
        self._live.start()

    def stop(self) -> None:
        """Leave the last picture and give the terminal back."""
        self._live.stop()

    def show(self, event: Event) -> None:
        """Print what is worth keeping; everything else shows at the next redraw."""
        match event:
            case RunStarted():
                self._print(f"[bold]{escape(event.name)}[/]  {escape(describe_run(event))}")
            case PhaseStarted():
                self._print(f"[bold]{escape(event.name)}[/]  [dim]{escape(event.summary)}[/]")
            case EvalDone(when="end"):
                self._print(f"[bold]{escape(event.phase)}[/]  {self._outcome(event)}")
            case Notice(level="warning"):
                self._print(f"[yellow]! {escape(event.message)}[/]")
            case Notice():
                self._print(escape(event.message))
            case RunFinished():
                self._print(escape(describe_end(self._state)))
            case _:
                pass

    def _outcome(self, event: EvalDone) -> str:
        before = self._state.evaluation_at_start
        if before is None or before.phase != event.phase:
            return f"held-out text {event.bits_per_byte:.3f} bits/byte"
        return f"held-out text {before.bits_per_byte:.3f} → {event.bits_per_byte:.3f} bits/byte"

    def _print(self, markup: str) -> None:
        self._console.print(Padding(Text.from_markup(markup), _MARGIN))

    def _draw(self) -> RenderableType:
        state = self._state
        if state.is_finished:
            return Text()
        if state.data is not None:
            return Padding(self._data(), (1, 1))
        if state.run is None or state.step is None:
            waiting = "starting" if state.run is None else "first step"
            self._spinner.update(text=Text(f"{waiting}  {duration(state.clock() - state.began)}", style="dim"))
            return Padding(self._spinner, (1, 1))
        lines = [self._heading(), self._bar(), self._position(), Text(), self._figures()]
        if state.evaluation is not None:
            lines.append(self._held_out(state.evaluation))
        return Padding(Group(*lines), (1, 1))

    def _data(self) -> RenderableType:
        assert self._state.data is not None
        data = self._state.data
        grid = Table.grid(padding=(0, 2), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(justify="right", no_wrap=True)
        bar = ProgressBar(total=data.total, completed=data.done, pulse=data.total is None, complete_style="cyan")
        grid.add_row(f"data, {data.stage}", bar, Text(describe_data(data), style="dim"))
        return grid

    def _heading(self) -> RenderableType:
        phase, left = self._state.phase, self._state.seconds_left
        title = Text()
        if phase is not None:
            title.append(f"phase {phase.index + 1} of {phase.num_phases}  ", style="dim")
            title.append(phase.name, style="bold")
        return _two_ends(title, Text("" if left is None else f"{duration(left)} left"))

    def _bar(self) -> RenderableType:
        bar = ProgressBar(
            total=1.0, completed=self._state.share_done, complete_style="cyan", finished_style="cyan", style="grey30"
        )
        return _two_ends(bar, Text(percent(self._state.share_done, 0)), stretch=True)

    def _position(self) -> Text:
        state = self._state
        assert state.run is not None
        assert state.step is not None
        text = Text(f"step {state.step.row['step']}", style="dim")
        text.append(f" · {scaled(state.tokens)} of {scaled(state.run.total_tokens)} tokens")
        if state.checkpoint is not None:
            text.append(f" · checkpoint at step {state.checkpoint.step}")
        if state.step.row.get("bad_steps"):
            text.append(f" · {state.step.row['bad_steps']} skipped", style="yellow")
        return text

    def _figures(self) -> Table:
        assert self._state.step is not None
        figures = step_figures(self._state.step.row)
        table = Table.grid(padding=(0, 2))
        for _ in figures:
            table.add_column(min_width=9, no_wrap=True)
        table.add_row(*(Text(label, style="dim") for label, _ in figures))
        table.add_row(*(Text(value, style="bold") for _, value in figures))
        return table

    def _held_out(self, event: EvalDone) -> Text:
        figure, _, rest = describe_evaluation(event).partition(" ")
        return Text.assemble(("\nheld out  ", "dim"), (figure, "bold"), (f" {rest} · step {event.step}", "dim"))


def _two_ends(left: RenderableType, right: Text, *, stretch: bool = False) -> Table:
    grid = Table.grid(padding=(0, 2) if stretch else 0, expand=True)
    grid.add_column(ratio=1)
    grid.add_column(justify="right", no_wrap=True, min_width=5)
    grid.add_row(left, right)
    return grid
