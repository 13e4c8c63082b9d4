"""A backend of torch.distributed: collectives and messages of host tensors, served by commgraph.

>>> import commgraph.torch_backend
>>> torch.distributed.init_process_group("cpu:commgraph")

Importing the module registers it. The groups are `ProcessGroup`: each holds its World, and this package holds none. What torch's front
ends can and cannot do with such a group: docs/how-to/torch-backend.md.
"""

from __future__ import annotations

import torch.distributed as dist

from commgraph.torch_backend.group import ProcessGroup, make

__all__ = ["ProcessGroup"]

# A registration is what this module is imported for; torch keeps it, and a second one of the same name changes nothing.
dist.Backend.register_backend("commgraph", make, extended_api=True, devices=["cpu"])
