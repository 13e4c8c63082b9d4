"""Memory that the processes of one host share: segments, the native module, objects as bytes, the message queue.

The native module is written in C11 (`native/`):

- `team` and `wait`: the members of a segment, and how they wait for each other (spin, yield, futex); `cores`: ranks that nobody pinned;
- `steps`, `collective`, `reduce`, `pipelined`: the steps of a call, collectives that move data, those that reduce, exchanges of two ranks;
- `ring`, `any_ring`, `zero_copy`: byte rings with one writer and many readers, waits for several, the rendezvous of large messages;
- `cma`, `nontemporal`, `copy`, `kernels`, `pool`: cross-memory attach, the choice of stores, copies, reductions, memory that is used again;
- `module*`: the Python side.

It knows nothing of commgraph's groups; `communicators/shm.py` is the strategy on it.
"""
