/* Records on rings (module_ring.c), as native calls put and get them. */
#ifndef COMMGRAPH_MODULE_RING_H
#define COMMGRAPH_MODULE_RING_H

#include "recorder.h"

enum { TENSORS = 1, OBJECT = 2, DICT = 3 }; /* kinds of records, as in commgraph/shm/mailbox.py, and of messages: FAMILY_* */

/* Puts a record on a ring that was claimed; a part is a buffer, or (address, bytes) of memory that the caller keeps alive. -1 with an error
 * set, else the result. */
int put_parts(Ring *ring, uint32_t kind, uint64_t meta, PyObject *parts, int64_t deadline, uint64_t posted, recording *written, int *who);
/* The parts of the next record of a ring that was claimed, which is then ring->ring.record: a list, the first part as bytes, the others as
 * Blocks. NULL with an error set, where the next call goes on reading. `*result`: how the wait ended. */
PyObject *next_parts(Ring *ring, int64_t deadline, unsigned long long posted, int *result);
/* The parts of the next record; NULL with an error set, after which the call can be made again. `is_its`: whether they are those that the call has
 * asked for, if they are of its kind; NULL: they are. */
PyObject *get_parts(Ring *ring, int64_t timeout_ns, uint64_t posted, const told_call *told, int (*is_its)(PyObject *), uint32_t *kind, uint64_t *meta);
/* Bytes of the record that was read last; of a dict without its description. */
uint64_t size_of_record(const Ring *ring);

#endif
