"""``commgraph plan``: what a model's communication will cost on a layout, before there is a job.

Pure arithmetic: it needs neither torch nor a process. `shapes` reads a model, `step` lists the calls of one step, `strategies` says how
each call is served, `links` holds measured or given figures, and `search` compares layouts. The assumptions are listed in
docs/explanation/plan.md.
"""

from __future__ import annotations

from commgraph.plan.links import Figures, Links
from commgraph.plan.search import Device, Estimate, Workload, estimate, search
from commgraph.plan.shapes import ModelShapes
from commgraph.plan.step import StepCall, step_calls
from commgraph.plan.strategies import Cost, Placement, cost_of

__all__ = [
    "Cost",
    "Device",
    "Estimate",
    "Figures",
    "Links",
    "ModelShapes",
    "Placement",
    "StepCall",
    "Workload",
    "cost_of",
    "estimate",
    "search",
    "step_calls",
]
