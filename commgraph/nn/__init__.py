"""Model layers whose parameters lie cut on the ranks of a group. Each takes its `ParallelContext` when it is made; nothing is ambient.

``functional`` has the collectives that gradients pass through; ``load_full_state_dict`` and ``full_state_dict`` translate between the
checkpoint of an unsharded model and the ranks' shares; ``rebind`` moves a model to another context of the same layout.
"""

from commgraph.nn import functional
from commgraph.nn.checkpoint import save_checkpoint
from commgraph.nn.embedding import ParallelLMHead, VocabParallelEmbedding
from commgraph.nn.experts import ExpertParallelMLP
from commgraph.nn.gradients import clip_grad_norm_, total_grad_norm
from commgraph.nn.layer import ParallelLayer
from commgraph.nn.linear import ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from commgraph.nn.local_shards import LocalShards
from commgraph.nn.places import NameMapping
from commgraph.nn.rebind import rebind
from commgraph.nn.sharded_state import (
    ShardedParameter,
    load_sharded_optimizer_state_dict,
    load_sharded_state_dict,
    sharded_optimizer_state_dict,
    sharded_parameters,
    sharded_state_dict,
)
from commgraph.nn.shards import Cut, Piece
from commgraph.nn.state import LoadReport, full_state_dict, load_full_state_dict

__all__ = [
    "ColumnParallelLinear",
    "Cut",
    "ExpertParallelMLP",
    "LoadReport",
    "LocalShards",
    "MergedColumnParallelLinear",
    "NameMapping",
    "ParallelLMHead",
    "ParallelLayer",
    "Piece",
    "QKVParallelLinear",
    "RowParallelLinear",
    "ShardedParameter",
    "VocabParallelEmbedding",
    "clip_grad_norm_",
    "full_state_dict",
    "functional",
    "load_full_state_dict",
    "load_sharded_optimizer_state_dict",
    "load_sharded_state_dict",
    "rebind",
    "save_checkpoint",
    "sharded_optimizer_state_dict",
    "sharded_parameters",
    "sharded_state_dict",
    "total_grad_norm",
]
