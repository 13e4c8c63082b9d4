"""The operators ``torch.ops.commgraph.*``: the operations of a `GroupCoordinator` as torch operators.

A coordinator calls them where torch traces or intercepts (torch.compile, torch.export, fake tensors, a dispatch mode). Their argument is
the coordinator itself, an opaque object to torch: it becomes an input of a graph, which therefore serves every group of the same size, and
no table of groups by name exists. `commgraph.coordinator.operators` declares them from the operations, once coordinators are known to
torch.
"""
