"""What a terminal shows while a study runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from gptnorm.format import duration_text, value_text

if TYPE_CHECKING:
    from gptnorm.study.cell import Cell
    from gptnorm.train.result import Result


class Display:
    """A line for each run that has ended; on a terminal a bar below, and a line for each that goes on.

    The time left is that of the runs known so far at the pace so far: a search may ask for more.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._steps: dict[str, int] = {}
        self._costs: dict[str, float] = {}
        """Of one step."""
        self._names: dict[str, tuple[str, str]] = {}
        self._reached: dict[str, int] = {}
        self._now: dict[str, str] = {}
        self._over: set[str] = set()
        self._progress = _Bar(
            TextColumn("{task.fields[cells]}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("spent{task.fields[left]}"),
            console=console,
        )

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._task = self._progress.add_task("", total=None, cells=self._count(), left="")
            self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.running.clear()
        self._progress.stop()

    def add(self, cells: list[Cell]) -> None:
        """More to come."""
        for cell in cells:
            steps = cell.config.train.steps
            self._steps[cell.folder] = steps
            self._costs[cell.folder] = cell.cost / steps
            self._names[cell.folder] = run_name(cell)
        self._show()

    def running(self, latest: dict[str, tuple[int, float]]) -> None:
        """Moves the bar to what the workers last said: the step and the loss, by the runs' folders."""
        # The last words of a run may come after its end.
        latest = {folder: said for folder, said in latest.items() if folder not in self._over}
        self._reached |= {folder: step for folder, (step, _) in latest.items()}
        for folder, (step, loss) in latest.items():
            who, where = self._names[folder]
            self._now[folder] = f"{who}  step {step} of {self._steps[folder]}, loss {loss:.2f}  {where}"
        self._show()

    def finished(self, cell: Cell, result: Result) -> None:
        """Counts a cell and says how it ended."""
        self._over.add(cell.folder)
        self._now.pop(cell.folder, None)
        self._reached[cell.folder] = self._steps[cell.folder]
        who, where = self._names[cell.folder]
        ended = f"{result.val_loss:.4f}" if result.val_loss is not None else f"diverged at step {result.step}"
        line = f"{self._count()}  {who}  {ended}  ({result.seconds:.0f} s)  {where}".rstrip()
        self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)
        self._show()

    def _show(self) -> None:
        if not self._console.is_terminal:
            return
        self._progress.running[:] = self._now.values()
        total, done = self._weigh(self._steps), self._weigh(self._reached)
        spent = self._progress.tasks[0].elapsed
        left = f", {duration_text(spent * (total / done - 1))} left" if spent and done else ""
        self._progress.update(self._task, total=total, completed=done, cells=self._count(), left=left)

    def _weigh(self, steps: dict[str, int]) -> float:
        return sum(self._costs[name] * count for name, count in steps.items())

    def _count(self) -> str:
        return f"{len(self._over)}/{len(self._steps)} runs"


class _Bar(Progress):
    """A bar, and lines below it that are cut where the terminal ends."""

    def __init__(self, *columns: TextColumn | BarColumn | TimeElapsedColumn, console: Console) -> None:
        self.running: list[str] = []
        super().__init__(*columns, console=console)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield from (Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in self.running)


def run_name(cell: Cell) -> tuple[str, str]:
    """Strategy, rate and seed, and what else sets the run apart, each setting without its table."""
    settings = dict((*cell.setup.place, *cell.setup.variant))
    short = [key.rpartition(".")[2] for key in settings]
    heads = short if len(set(short)) == len(short) else list(settings)
    where = ", ".join(f"{head} {value_text(value)}" for head, value in zip(heads, settings.values(), strict=True))
    return f"{cell.strategy}  lr {cell.lr:g}  seed {cell.seed}", cell.rung.label if cell.rung else where
