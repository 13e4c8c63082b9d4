"""Where a finished run goes besides the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from commgraph.bench import page, plot, report
from commgraph.bench.plan import Plan

__all__ = ["deliver"]


def deliver(plan: Plan, runs: Sequence[report.Run]) -> None:
    """Writes the files that the plan names.

    Raises:
        ConfigurationError: nothing can be drawn of these rows.
        OSError: a file cannot be written.
    """
    if plan.json is not None:
        report.write(runs, plan.json)
    if plan.markdown is not None:
        plan.markdown.write_text(page.markdown(runs))
    if plan.plot is not None:
        plot.draw(runs, plan.plot)
