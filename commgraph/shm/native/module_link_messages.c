/* The fast path of messages over links. As in module_messages.c a method returns None, with nothing sent or read, if an argument is not plain
 * or there is no link; the messages are those of communicators/tcp_transport.py, so that the two ranks of one may take different paths. */
#include "module_messages.h"
#include "module_net.h"

#include <string.h>

/* The links, if there is one to that rank; NULL with or without an error. */
static Net *net_of(PyObject *self, PyObject *net, PyObject *rank, int *peer) {
    if (!PyObject_TypeCheck(net, state_of(self)->net)) return PyErr_SetString(PyExc_TypeError, "a Net is needed"), NULL;
    Net *found = (Net *)net;
    long number = PyLong_AsLong(rank);
    if (PyErr_Occurred() || found->closing || number < 0 || number >= found->net.n || !found->linked[number]) return NULL;
    *peer = (int)number;
    return found;
}

/* A tensor to be sent, and its tag, whose lane is claimed. */
typedef struct {
    view v;
    uint32_t tag;
    uint64_t number;
} given;

/* 1; 0, with or without an error, if it is not plain. */
static int parse_given(Messages *messages, PyObject *x, PyObject *lane, given *g) {
    int label;
    uint32_t digest;
    if (!label_of(lane, &label) || view_tensor(messages->tensors, x, &g->v) <= 0 || !message_digest(messages, &g->v, label, &digest) ||
        !claim_lane(messages, lane, &g->number))
        return 0;
    g->tag = make_tag(MESSAGE, g->number, digest);
    return 1;
}

/* Likewise of one to be received. */
static int claim_awaited(Messages *messages, const awaited *a, PyObject *lane, uint32_t *tag, uint64_t *number) {
    int label;
    uint32_t digest;
    if (!label_of(lane, &label) || !message_digest(messages, &a->v, label, &digest) || !claim_lane(messages, lane, number)) return 0;
    *tag = make_tag(MESSAGE, *number, digest);
    return 1;
}

static void drop(const awaited *a) {
    if (a->out == NULL) cg_pool_give(a->memory);
}

PyObject *messages_send_linked(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    Messages *messages = (Messages *)self;
    if (nargs != 6) return PyErr_Format(PyExc_TypeError, "send_linked(net, x, dst, lane, timeout, record)");
    int peer;
    Net *net = net_of(self, args[0], args[2], &peer);
    GroupRecord *record;
    int64_t timeout;
    given g;
    if (net == NULL || !record_of(self, args[5], &record) || is_unwatched(messages->tensors) <= 0 || parse_timeout(self, args[4], messages->timeout_ns, &timeout) <= 0 ||
        !parse_given(messages, args[1], args[3], &g))
        return not_handled();
    waiting me;
    cg_net_call call;
    cg_message message;
    int who = net->net.me, result = -1;
    recording written;
    record_message(&written, record, args[3], "send", NULL, &g.v, NULL);
    if (begin_wait(net, &me, &call, deadline_after(timeout))) {
        cg_net_send(&net->net, &message, peer, g.tag, g.v.data, g.v.bytes);
        result = cg_net_finish(&net->net, &call, &message, 1, &who);
        end_wait(net, &me);
    }
    end_recording(&written, result == CG_OK ? ENTRY_DONE : ENTRY_FAILED);
    unclaim_lane(messages, args[3], result < 0 ? -1 : (int64_t)g.number);
    if (result == CG_OK) return Py_NewRef(Py_True);
    return result < 0 ? NULL : raise_stopped(self, result, who);
}

PyObject *messages_recv_linked(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    Messages *messages = (Messages *)self;
    if (nargs != 8) return PyErr_Format(PyExc_TypeError, "recv_linked(net, size, kind, out, src, lane, timeout, record)");
    int peer;
    Net *net = net_of(self, args[0], args[4], &peer);
    GroupRecord *record;
    awaited a;
    if (net == NULL || !record_of(self, args[7], &record) || messages->tensors->exchange == NULL || is_unwatched(messages->tensors) <= 0 ||
        !parse_awaited(messages, net->pool, args[1], args[2], args[3], args[6], &a))
        return not_handled();
    uint32_t tag;
    uint64_t number;
    waiting me;
    cg_net_call call;
    cg_message message;
    int who = net->net.me, result = -1;
    if (claim_awaited(messages, &a, args[5], &tag, &number)) {
        recording written;
        record_message(&written, record, args[5], "recv", NULL, &a.v, NULL);
        if (begin_wait(net, &me, &call, a.deadline)) {
            cg_net_receive(&net->net, &message, peer, tag, a.memory, a.v.bytes);
            result = cg_net_finish(&net->net, &call, &message, 1, &who);
            end_wait(net, &me);
        }
        end_recording(&written, result == CG_OK ? ENTRY_DONE : ENTRY_FAILED);
        unclaim_lane(messages, args[5], result < 0 ? -1 : (int64_t)number);
    }
    if (result == CG_OK) return received(messages, &a);
    drop(&a);
    return result < 0 ? NULL : raise_stopped(self, result, who);
}

PyObject *messages_swap_linked(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    Messages *messages = (Messages *)self;
    if (nargs != 11) return PyErr_Format(PyExc_TypeError, "swap_linked(net, x, dst, size, kind, out, src, there, here, timeout, record)");
    int dst, src;
    GroupRecord *record;
    Net *net = net_of(self, args[0], args[2], &dst), *same = net == NULL ? NULL : net_of(self, args[0], args[6], &src);
    awaited a;
    given g;
    if (same == NULL || !record_of(self, args[10], &record) || messages->tensors->exchange == NULL || is_unwatched(messages->tensors) <= 0 ||
        !parse_awaited(messages, net->pool, args[3], args[4], args[5], args[9], &a))
        return not_handled();
    if (!parse_given(messages, args[1], args[7], &g)) {
        drop(&a);
        return not_handled();
    }
    uint32_t tag;
    uint64_t number;
    waiting me;
    cg_net_call call;
    cg_message both[2];
    int who = net->net.me, result = -1;
    if (claim_awaited(messages, &a, args[8], &tag, &number)) {
        recording sent, came;
        record_message(&sent, record, args[7], "sendrecv", NULL, &g.v, NULL);
        record_message(&came, record, args[8], "sendrecv", NULL, &a.v, NULL);
        if (begin_wait(net, &me, &call, a.deadline)) {
            cg_net_receive(&net->net, &both[0], src, tag, a.memory, a.v.bytes);
            cg_net_send(&net->net, &both[1], dst, g.tag, g.v.data, g.v.bytes);
            result = cg_net_finish(&net->net, &call, both, 2, &who);
            end_wait(net, &me);
        }
        end_recording(&sent, result == CG_OK ? ENTRY_DONE : ENTRY_FAILED);
        end_recording(&came, result == CG_OK ? ENTRY_DONE : ENTRY_FAILED);
        unclaim_lane(messages, args[8], result < 0 ? -1 : (int64_t)number);
    }
    unclaim_lane(messages, args[7], result < 0 ? -1 : (int64_t)g.number);
    if (result == CG_OK) return received(messages, &a);
    drop(&a);
    return result < 0 ? NULL : raise_stopped(self, result, who);
}

PyObject *messages_offer_linked(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    Messages *messages = (Messages *)self;
    if (nargs != 6) return PyErr_Format(PyExc_TypeError, "offer_linked(net, x, dst, lane, operation, record)");
    int peer;
    Net *net = net_of(self, args[0], args[2], &peer);
    GroupRecord *record;
    given g;
    if (net == NULL || !record_of(self, args[5], &record) || is_unwatched(messages->tensors) <= 0 || !parse_given(messages, args[1], args[3], &g)) return not_handled();
    Late *late = (Late *)allocate(state_of(self)->late);
    Block *copy = late == NULL ? NULL : take_block(self, net->pool, g.v.bytes);
    waiting me;
    cg_net_call call;
    int state = CG_PENDING, begun = 0;
    recording written;
    record_message(&written, record, args[3], NULL, args[4], &g.v, NULL);
    if (copy != NULL) {
        late->net = (Net *)Py_NewRef((PyObject *)net);
        late->owner = (PyObject *)copy;
    }
    if (copy != NULL && begin_wait(net, &me, &call, 0)) {
        begun = 1;
        cg_net_send(&net->net, &late->message, peer, g.tag, g.v.data, g.v.bytes);
        state = cg_net_keep(&net->net, &late->message, copy->base);
        end_wait(net, &me);
    }
    /* Late: what is left of it is sent by another thread, and the call is done. */
    end_recording(&written, begun && (state == CG_OK || state == CG_PENDING) ? ENTRY_DONE : ENTRY_FAILED);
    unclaim_lane(messages, args[3], begun ? (int64_t)g.number : -1);
    if (begun && state == CG_PENDING) return (PyObject *)late;
    Py_XDECREF((PyObject *)late);
    if (!begun) return NULL;
    return state == CG_OK ? Py_NewRef(Py_True) : raise_stopped(self, state, peer);
}
