"""Models of Hugging Face's transformers on injected contexts, by the plans that transformers has for them.

``parallelize(model, ctx)`` cuts a model in place; ``from_checkpoint`` builds one of which each rank reads its part alone.
"""

from commgraph.integrations.transformers.loading import from_checkpoint
from commgraph.integrations.transformers.parallel import parallelize
from commgraph.integrations.transformers.replicated import check_replicated

__all__ = ["check_replicated", "from_checkpoint", "parallelize"]
