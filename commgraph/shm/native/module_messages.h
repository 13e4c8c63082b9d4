/* The fast path of messages: through rings (module_messages.c) and over links (module_link_messages.c). */
#ifndef COMMGRAPH_MODULE_MESSAGES_H
#define COMMGRAPH_MODULE_MESSAGES_H

#include "recorder.h"

enum { MESSAGE = 1 };    /* as in commgraph/communicators/tags.py */
enum { ANY_RANK = -1 };  /* as in commgraph/coordinator/pending.py */

typedef struct {
    int kind;
    uint64_t shape; /* of it and the label: hash_shape */
    uint32_t digest;
} known_kind;

typedef struct {
    PyObject_HEAD
    Tensors *tensors;
    PyObject *digest; /* (kind, shape, label) -> int: commgraph.communicators.tags.digest */
    int64_t timeout_ns; /* of calls without a timeout of their own */
    PyObject *counts;   /* a dict: how many messages there were, by lane */
    PyObject *claims;   /* a dict: the lanes in which a call is under way (commgraph/coordinator/turns.py) */
    uint64_t sent;      /* bytes through rings */
    known_kind known[CACHED];
} Messages;

/* A tensor to be received. */
typedef struct {
    view v;
    PyObject *out; /* to be filled; NULL: memory of the pool is */
    char *memory;
    int64_t deadline;
} awaited;

/* The digest of a message with this label, of a tensor like v. 0 with an error set. */
int message_digest(Messages *messages, const view *v, int label, uint32_t *digest);
/* The label of a lane's messages. 0 with an error set. */
int label_of(PyObject *lane, int *label);
/* Claims a lane, and gives the number of its next message. 0 with an error set: Busy, if another call is under way in it. */
int claim_lane(Messages *messages, PyObject *lane, uint64_t *number);
/* Ends the claim of a lane; `number`: that of the message that came or went, -1 if there was none. */
void unclaim_lane(Messages *messages, PyObject *lane, int64_t number);
/* Begins the entry of a message in that lane, of a tensor like v; `record`: NULL where nothing is recorded. `operation`: a literal, or NULL and
 * `named` is a str. `team`: as for begin_recording. */
void record_message(recording *r, GroupRecord *record, PyObject *lane, const char *operation, PyObject *named, const view *v, Team *team);
/* Reads what is asked for, and takes memory where no `out` is given. 1; 0, with or without an error, if it is not plain. */
int parse_awaited(Messages *messages, Pool *pool, PyObject *size, PyObject *kind, PyObject *out, PyObject *timeout, awaited *a);
/* The tensor that came. NULL with an error set. */
PyObject *received(Messages *messages, const awaited *a);

PyObject *messages_send_linked(PyObject *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *messages_recv_linked(PyObject *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *messages_swap_linked(PyObject *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *messages_offer_linked(PyObject *self, PyObject *const *args, Py_ssize_t nargs);

#endif
