"""Output files of a finished run."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from commgraph.bench import page, plot, report
from commgraph.bench.plan import Plan

__all__ = ["deliver"]


def deliver(plan: Plan, runs: Sequence[report.Run]) -> None:
    """Write the files that the plan names; beside a page its picture, where matplotlib is installed.

    Raises:
        ConfigurationError: nothing can be drawn of these rows.
        OSError: a file cannot be written.
    """
    if plan.json is not None:
        report.write(runs, plan.json)
    if plan.markdown is not None:
        rows, picture = page.overview(runs), plan.markdown.with_suffix(".svg")
        drawn = bool(rows) and plot.available()
        if drawn:
            plot.draw([attrs.evolve(runs[0], rows=rows)], picture)
        plan.markdown.write_text(page.markdown(runs, picture.name if drawn else ""))
    if plan.plot is not None:
        plot.draw(runs, plan.plot)
