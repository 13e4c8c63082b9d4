"""Memory that the processes of one host share: segments, the native module, objects as bytes, the message queue.

The native module is written in C11 (`native/`): `team` is who sits where and how they wait, `collective` the collectives of a group,
`ring` a byte ring with one writer and many readers, `pool` memory that is used again, `kernels` the reductions, `copy` the copies,
`module` and `door` the Python side. It knows nothing of commgraph's groups; `communicators/shm.py` is the strategy on it.
"""
