"""What the person at the terminal sees: a table that lives, or, without a terminal, a plain line a second.

Plain means ASCII without control characters, so that it reads well in a CI log. Nothing is decided here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from rich import box
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from figbridge.demo.bridge import Readings
from figbridge.demo.legacy_app import Report as LegacyReport
from figbridge.demo.new_system import Report as NewReport
from figbridge.demo.proof import Claim, Comparison

_LINE_EVERY: Final = 1.0  # seconds
_EXAMPLES: Final = 5  # differing rows that are shown


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of the story. `elapsed` and `duration` are seconds; `act` says what is going on."""

    act: str
    elapsed: float
    duration: float
    legacy: LegacyReport
    bridge: Readings
    new: NewReport
    ready: bool
    kills: int


class View:
    """Use as a context manager around the live part; `say` and the results may come at any time."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._live = Live(console=self._console, refresh_per_second=8) if self._console.is_terminal else None
        self._last_line = -_LINE_EVERY

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        """A line of the story."""
        self._console.print(text, markup=False, soft_wrap=True)

    def show(self, snapshot: Snapshot, *, last: bool = False) -> None:
        """The newest state. Call often: a terminal is refreshed at its own pace, a log gets a line a second."""
        if self._live:
            self._live.update(_panels(snapshot))
        elif last or snapshot.elapsed - self._last_line >= _LINE_EVERY:
            self._last_line = snapshot.elapsed
            self.say(line(snapshot))

    def tables(self, comparisons: Sequence[Comparison]) -> None:
        """Both sides, table by table, and examples of what differs."""
        table = Table(title="Both sides, row by row", title_justify="left", box=self._box())
        for heading in ("table", "legacy rows", "new-system rows", "differing rows"):
            table.add_column(heading, justify="left" if heading == "table" else "right")
        for it in comparisons:
            style = "red" if it.differences else "green"
            table.add_row(it.table, str(it.legacy), str(it.new), Text(str(len(it.differences)), style=style))
        self._console.print(table)
        for difference in [one for it in comparisons for one in it.differences][:_EXAMPLES]:
            self.say(f"  {ascii(difference)[1:-1]}")

    def claims(self, claims: Sequence[Claim]) -> None:
        """What was proven, sentence by sentence."""
        for claim in claims:
            mark = "[green]proven[/]" if claim.holds else "[red]FAILED[/]"
            self._console.print(f"{mark}  {escape(claim.sentence)}", soft_wrap=True)

    def _box(self) -> box.Box:
        return box.ROUNDED if self._console.is_terminal else box.ASCII


def line(snapshot: Snapshot) -> str:
    """The snapshot as one line of ASCII."""
    bridge = snapshot.bridge
    parts = [
        f"{snapshot.elapsed:5.1f} s {snapshot.act}: legacy changed {snapshot.legacy.total}",
        f"captured {bridge.captured}",
        f"published {bridge.published}",
        f"new system received {snapshot.new.received}, emitted {snapshot.new.emitted}",
        f"applied {bridge.applied}",
        f"echoes suppressed {bridge.echoes}",
        f"duplicates {bridge.duplicates + snapshot.new.duplicates}",
        f"lag {bridge.lag_seconds:.2f} s",
    ]
    return " | ".join(parts) + ("" if snapshot.ready else " | bridge is starting")


def _panels(snapshot: Snapshot) -> RenderableType:
    legacy, bridge, new = snapshot.legacy, snapshot.bridge, snapshot.new
    state = "[green]ready[/]" if snapshot.ready else "[yellow]starting[/]"
    head = f"[bold]{snapshot.act}[/]  {snapshot.elapsed:.0f} s of {snapshot.duration:.0f} s   bridge {state}"
    if snapshot.kills:
        head += f"   [red]killed {snapshot.kills} times[/]"
    return Group(
        Text.from_markup(head),
        Columns([
            _panel(
                "legacy application",
                "cyan",
                {
                    "transactions": legacy.transactions,
                    "rolled back": legacy.rolled_back,
                    "rows inserted": _of(legacy, "insert"),
                    "rows updated": _of(legacy, "update"),
                    "rows deleted": _of(legacy, "delete"),
                    "rows changed": legacy.total,
                },
            ),
            _panel(
                "figbridge",
                "magenta",
                {
                    "captured": bridge.captured,
                    "published": bridge.published,
                    "echoes suppressed": bridge.echoes,
                    "applied": bridge.applied,
                    "duplicates": bridge.duplicates,
                    "lag": f"{bridge.lag_seconds:.2f} s, {bridge.lag_bytes:,} B",
                },
            ),
            _panel(
                "new system",
                "green",
                {
                    "events received": new.received,
                    "duplicates": new.duplicates,
                    "events emitted": new.emitted,
                    "of them sent twice": new.sent - new.emitted,
                },
            ),
        ]),
    )  # fmt: skip


def _of(legacy: LegacyReport, operation: str) -> int:
    return sum(count for kind, count in legacy.changes.items() if kind.endswith(operation))


def _panel(title: str, colour: str, values: dict[str, int | str]) -> Panel:
    grid = Table.grid(padding=(0, 2))
    grid.add_column()
    grid.add_column(justify="right", min_width=8)
    for name, value in values.items():
        grid.add_row(name, f"{value:,}" if isinstance(value, int) else value)
    return Panel(grid, title=title, border_style=colour)
