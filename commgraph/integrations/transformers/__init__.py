"""Models of Hugging Face's transformers on injected contexts, by the plans that transformers has for them.

``parallelize(model, ctx)`` cuts a model in place; ``from_checkpoint`` builds one of which each rank reads its part alone.
"""

from commgraph.integrations.transformers.parallel import parallelize

__all__ = ["parallelize"]
