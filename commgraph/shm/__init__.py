"""Memory that the processes of one host share: segments, the native module, objects as bytes, the message queue.

The native module is written in C11 (`native/`): `team` is who sits where and how they wait, `steps` what the calls of a group are made of,
`collective` what moves and `reduce` what is reduced in such calls, `relay` how two ranks do both, `stores` how memory is written, `ring` a
byte ring with one writer and many readers, `handover` its large messages, `pool` memory that is used again, `reach` the memory of another
process, `kernels` the reductions, `copy` the copies, `module` and `door` the Python side. It knows nothing of commgraph's groups;
`communicators/shm.py` is the strategy on it.
"""
