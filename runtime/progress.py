"""Progress of long stages, as bars on stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Bars on stderr, from the first task on: an error before it stays the only line."""
    bar = Progress(
        TextColumn("{task.description:<9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
    try:
        yield bar
    finally:
        if bar.live.is_started:
            bar.stop()


def advance_of(bar: Progress) -> Callable[[str, int, int], None]:
    """A bar for each stage, begun when the stage first reports."""
    tasks: dict[str, TaskID] = {}

    def advance(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            bar.start()
            tasks[stage] = bar.add_task(stage, total=total)
        bar.advance(tasks[stage], done)

    return advance
