/* Net: the TCP links of one group. Late: a receive that may be waited for several times. */
#include "module_net.h"

#include <errno.h>
#include <stdlib.h>

#include "net_reduce.h"

int attend_net(void *of, int why) {
    net_user *self = of;
    PyEval_RestoreThread(*self->saved);
    int raised;
    if (why == CG_KNOCK && self->net->on_knock != NULL) {
        PyObject *done = PyObject_CallNoArgs(self->net->on_knock);
        raised = done == NULL;
        Py_XDECREF(done);
    } else {
        raised = PyErr_CheckSignals() != 0;
    }
    *self->saved = PyEval_SaveThread();
    return raised ? CG_SIGNAL : CG_OK;
}

int use_net(Net *self) {
    if (self->closing) return raise_stopped((PyObject *)self, CG_SELF, self->net.me), 0;
    self->users++;
    Py_INCREF((PyObject *)self);
    return 1;
}

void leave_net(Net *self) {
    self->users--;
    if (self->users == 0 && self->closing) cg_net_end(&self->net);
    Py_DECREF((PyObject *)self);
}

int begin_wait(Net *self, waiting *me, cg_net_call *call, int64_t deadline) {
    if (!use_net(self)) return 0;
    me->user = (net_user){&me->saved, self};
    *call = (cg_net_call){.deadline = deadline, .attend = attend_net, .user = &me->user};
    me->saved = PyEval_SaveThread();
    return 1;
}

void end_wait(Net *self, waiting *me) {
    PyEval_RestoreThread(me->saved);
    leave_net(self);
}

static PyObject *net_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    (void)kwargs;
    int n, rank, ordered;
    long long spin_ns;
    PyObject *pool;
    module_state *state = PyType_GetModuleState(type);
    if (state == NULL || !PyArg_ParseTuple(args, "iipLO!", &n, &rank, &ordered, &spin_ns, state->pool, &pool)) return NULL;
    if (n < 2 || n > 1 << 20 || rank < 0 || rank >= n || spin_ns < 0) return PyErr_Format(PyExc_ValueError, "rank %d of %d, spin_ns=%lld", rank, n, spin_ns);
    Net *self = (Net *)allocate(type);
    if (self == NULL) return NULL;
    self->linked = calloc((size_t)n, 1);
    int error = self->linked == NULL ? ENOMEM : cg_net_begin(&self->net, n, rank, ordered, spin_ns, ((Pool *)pool)->pool);
    self->pool = (Pool *)Py_NewRef(pool);
    if (error) {
        Py_DECREF((PyObject *)self);
        errno = error;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    return (PyObject *)self;
}

static void net_dealloc(PyObject *of) {
    Net *self = (Net *)of;
    if (self->net.links != NULL) cg_net_end(&self->net);
    free(self->linked);
    Py_XDECREF((PyObject *)self->pool);
    Py_XDECREF(self->on_knock);
    free_object(of);
}

static int is_peer(const Net *self, int peer) {
    if (peer >= 0 && peer < self->net.n && peer != self->net.me) return 1;
    PyErr_Format(PyExc_ValueError, "peer %d: rank %d of %d", peer, self->net.me, self->net.n);
    return 0;
}

static PyObject *net_attach(PyObject *of, PyObject *args) {
    Net *self = (Net *)of;
    int peer, fd;
    if (!PyArg_ParseTuple(args, "ii", &peer, &fd) || !is_peer(self, peer)) return NULL;
    if (self->closing) return raise_stopped(of, CG_SELF, self->net.me);
    int error = cg_net_attach(&self->net, peer, fd);
    if (!error) {
        self->linked[peer] = 1;
        self->n_linked++;
        Py_RETURN_NONE;
    }
    errno = error;
    return PyErr_SetFromErrno(PyExc_OSError);
}

/* Whether all peers of a sequence of ranks have one. */
static PyObject *net_are_linked(PyObject *of, PyObject *arg) {
    Net *self = (Net *)of;
    if (self->closing || self->n_linked == self->net.n - 1) Py_RETURN_TRUE;
    Py_ssize_t count = PySequence_Size(arg);
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *item = PySequence_GetItem(arg, i);
        long peer = item == NULL ? -1 : PyLong_AsLong(item);
        Py_XDECREF(item);
        if (PyErr_Occurred() || !is_peer(self, (int)peer)) return NULL;
        if (!self->linked[peer]) Py_RETURN_FALSE;
    }
    return count < 0 ? NULL : Py_NewRef(Py_True);
}

static PyObject *net_is_linked(PyObject *of, PyObject *arg) {
    Net *self = (Net *)of;
    long peer = PyLong_AsLong(arg);
    if (peer == -1 && PyErr_Occurred()) return NULL;
    if (!is_peer(self, (int)peer)) return NULL;
    return PyBool_FromLong(self->closing || self->linked[peer]);
}

static PyObject *net_error(PyObject *of, PyObject *arg) {
    Net *self = (Net *)of;
    long peer = PyLong_AsLong(arg);
    if (peer == -1 && PyErr_Occurred()) return NULL;
    if (!is_peer(self, (int)peer)) return NULL;
    return PyLong_FromLong(self->net.links == NULL ? 0 : cg_net_error(&self->net, (int)peer));
}

static PyObject *net_has_left(PyObject *of, PyObject *arg) {
    Net *self = (Net *)of;
    long peer = PyLong_AsLong(arg);
    if (peer == -1 && PyErr_Occurred()) return NULL;
    if (!is_peer(self, (int)peer)) return NULL;
    return PyBool_FromLong(self->net.links != NULL && cg_net_has_left(&self->net, (int)peer));
}

static PyObject *net_watch(PyObject *of, PyObject *args) {
    Net *self = (Net *)of;
    PyObject *on_knock;
    int fd;
    if (!PyArg_ParseTuple(args, "iO", &fd, &on_knock)) return NULL;
    PyObject *before = self->on_knock;
    self->on_knock = Py_NewRef(on_knock);
    Py_XDECREF(before);
    self->net.knocks = fd;
    Py_RETURN_NONE;
}

static PyObject *net_abort(PyObject *of, PyObject *unused) {
    (void)unused;
    Net *self = (Net *)of;
    if (self->net.links != NULL) cg_net_abort(&self->net);
    Py_RETURN_NONE;
}

static PyObject *net_close(PyObject *of, PyObject *unused) {
    Net *self = (Net *)of;
    if (self->net.links != NULL) cg_net_say_goodbye(&self->net);
    PyObject *done = net_abort(of, unused);
    self->closing = 1;
    if (self->users == 0) cg_net_end(&self->net);
    Py_CLEAR(self->on_knock);
    return done;
}

static PyObject *net_disown(PyObject *of, PyObject *unused) {
    (void)unused;
    Net *self = (Net *)of;
    self->closing = 1;
    if (self->net.links != NULL) cg_net_disown(&self->net);
    Py_RETURN_NONE;
}

/* Begins the messages of a list of (peer, tag, address, bytes). How many were begun; fewer than there are with an error set. */
static Py_ssize_t begin_all(Net *self, PyObject *list, cg_message *messages, int receive) {
    Py_ssize_t count = PyList_Size(list);
    for (Py_ssize_t i = 0; i < count; i++) {
        int peer;
        unsigned int tag;
        unsigned long long address;
        Py_ssize_t bytes;
        if (!PyArg_ParseTuple(PyList_GetItem(list, i), "iIKn", &peer, &tag, &address, &bytes) || !is_peer(self, peer)) return i;
        if (bytes < 0) {
            PyErr_Format(PyExc_ValueError, "%zd bytes", bytes);
            return i;
        }
        if (receive) cg_net_receive(&self->net, &messages[i], peer, tag, (void *)(uintptr_t)address, (uint64_t)bytes);
        else cg_net_send(&self->net, &messages[i], peer, tag, (void *)(uintptr_t)address, (uint64_t)bytes);
    }
    return count;
}

enum { FEW = 16 };

static PyObject *net_exchange(PyObject *of, PyObject *args) {
    Net *self = (Net *)of;
    PyObject *sends, *receives;
    long long timeout_ns;
    if (!PyArg_ParseTuple(args, "O!O!L", &PyList_Type, &sends, &PyList_Type, &receives, &timeout_ns)) return NULL;
    if (self->closing) return raise_stopped(of, CG_SELF, self->net.me);
    Py_ssize_t n_receives = PyList_Size(receives), count = n_receives + PyList_Size(sends);
    cg_message few[FEW], *messages = count <= FEW ? few : PyMem_Malloc(sizeof *messages * (size_t)count);
    if (messages == NULL) return PyErr_NoMemory();
    Py_ssize_t begun = begin_all(self, receives, messages, 1);
    if (begun == n_receives) begun += begin_all(self, sends, messages + n_receives, 0);
    int result = CG_SIGNAL, who = self->net.me;
    waiting me;
    cg_net_call call;
    if (begun == count && begin_wait(self, &me, &call, deadline_after(timeout_ns))) {
        cg_messages all = {messages, (int)count};
        result = cg_net_wait(&self->net, &call, cg_net_all, &all, &who);
        if (result != CG_OK) cg_net_withdraw(&self->net, messages, (int)begun);
        end_wait(self, &me);
    } else if (self->net.links != NULL) {
        cg_net_withdraw(&self->net, messages, (int)begun);
    }
    if (messages != few) PyMem_Free(messages);
    return result == CG_OK ? Py_NewRef(Py_None) : raise_stopped(of, result, who);
}

static PyObject *net_all_reduce(PyObject *of, PyObject *args) {
    Net *self = (Net *)of;
    unsigned int tag;
    long long timeout_ns;
    unsigned long long from, to;
    Py_ssize_t count;
    int dtype, op, who = self->net.me;
    PyObject *pool;
    if (!PyArg_ParseTuple(args, "ILKKniiO!", &tag, &timeout_ns, &from, &to, &count, &dtype, &op, state_of(of)->pool, &pool)) return NULL;
    if (count < 0 || dtype < 0 || dtype >= CG_DTYPES || op < 0 || op >= CG_OPS || cg_find_kernel(dtype, op) == NULL)
        return PyErr_Format(PyExc_ValueError, "%zd elements of kind %d, op %d", count, dtype, op);
    waiting me;
    cg_net_call call;
    if (!begin_wait(self, &me, &call, deadline_after(timeout_ns))) return NULL;
    call.tag = tag;
    call.pool = ((Pool *)pool)->pool;
    int result = cg_net_all_reduce(&self->net, &call, (void *)(uintptr_t)from, (void *)(uintptr_t)to, (size_t)count, dtype, op, &who);
    end_wait(self, &me);
    return result == CG_OK ? Py_NewRef(Py_None) : raise_stopped(of, result, who);
}

/* The ranks with which an all-reduce of so many bytes exchanges messages, nearest first. */
static PyObject *net_reduces_with(PyObject *of, PyObject *arg) {
    Net *self = (Net *)of;
    size_t bytes = PyLong_AsSize_t(arg);
    PyObject *peers = PyErr_Occurred() ? NULL : PyList_New(0);
    for (int i = 1; peers != NULL && i < self->net.n; i++) {
        int p = (self->net.me + i) % self->net.n;
        if (!cg_net_reduces_with(&self->net, bytes, p)) continue;
        PyObject *peer = PyLong_FromLong(p);
        if (peer == NULL || PyList_Append(peers, peer) < 0) Py_CLEAR(peers);
        Py_XDECREF(peer);
    }
    return peers;
}

/* Sends a frame for each of a list of buffers to each of a list of peers, the first one with a tag and the others with another. */
static PyObject *net_send_parts(PyObject *of, PyObject *args) {
    Net *self = (Net *)of;
    PyObject *peers, *parts, *done = NULL;
    unsigned int tag, rest;
    long long timeout_ns;
    if (!PyArg_ParseTuple(args, "O!IIO!L", &PyList_Type, &peers, &tag, &rest, &PyTuple_Type, &parts, &timeout_ns)) return NULL;
    Py_ssize_t n_peers = PyList_Size(peers), n_parts = PyTuple_Size(parts), held = 0;
    cg_message few[FEW], *messages = n_peers * n_parts <= FEW ? few : PyMem_Malloc(sizeof *messages * (size_t)(n_peers * n_parts));
    Py_buffer one[FEW], *views = n_parts <= FEW ? one : PyMem_Malloc(sizeof *views * (size_t)n_parts);
    int count = 0, result = CG_SIGNAL, who = self->net.me;
    if (messages == NULL || views == NULL) PyErr_NoMemory();
    else
        while (held < n_parts && PyObject_GetBuffer(PyTuple_GetItem(parts, held), &views[held], PyBUF_SIMPLE) == 0) held++;
    waiting me;
    cg_net_call call;
    if (!PyErr_Occurred() && begin_wait(self, &me, &call, deadline_after(timeout_ns))) {
        int wrong = 0;
        PyEval_RestoreThread(me.saved);
        for (Py_ssize_t p = 0; p < n_peers && !wrong; p++) {
            long peer = PyLong_AsLong(PyList_GetItem(peers, p));
            wrong = PyErr_Occurred() || !is_peer(self, (int)peer);
            for (Py_ssize_t i = 0; i < n_parts && !wrong; i++)
                cg_net_send(&self->net, &messages[count++], (int)peer, i == 0 ? tag : rest, views[i].buf, (uint64_t)views[i].len);
        }
        me.saved = PyEval_SaveThread();
        if (!wrong) result = cg_net_finish(&self->net, &call, messages, count, &who);
        else cg_net_withdraw(&self->net, messages, count);
        end_wait(self, &me);
        if (!wrong) done = result == CG_OK ? Py_NewRef(Py_None) : raise_stopped(of, result, who);
    }
    while (held > 0) PyBuffer_Release(&views[--held]);
    if (views != one) PyMem_Free(views);
    if (messages != few) PyMem_Free(messages);
    return done;
}

/* The frame of any size with that tag, as a Block; None if none began to come in time. One that has begun has `rest_ns` more. */
static PyObject *net_take(PyObject *of, PyObject *args) {
    Net *self = (Net *)of;
    int peer, who = self->net.me;
    unsigned int tag;
    long long timeout_ns, rest_ns;
    if (!PyArg_ParseTuple(args, "iILL", &peer, &tag, &timeout_ns, &rest_ns) || !is_peer(self, peer)) return NULL;
    waiting me;
    cg_net_call call;
    if (!begin_wait(self, &me, &call, deadline_after(timeout_ns))) return NULL;
    cg_message message;
    cg_net_take(&self->net, &message, peer, tag);
    cg_messages all = {&message, 1};
    int result = cg_net_wait(&self->net, &call, cg_net_all, &all, &who), begun = 1;
    if (result == CG_TIMEOUT) {
        result = cg_net_give_up(&self->net, &message);
        begun = result != CG_TIMEOUT;
        if (result == CG_PENDING) {
            call.deadline = deadline_after(rest_ns);
            result = cg_net_wait(&self->net, &call, cg_net_all, &all, &who);
        }
    }
    if (result != CG_OK) {
        cg_net_withdraw(&self->net, &message, 1);
        if (message.data != NULL) cg_pool_give(message.data);
    }
    end_wait(self, &me);
    if (result == CG_OK) return (PyObject *)block_over(of, message.data, message.frame.bytes);
    return begun ? raise_stopped(of, result, who) : Py_NewRef(Py_None);
}

/* Frames of these sizes with one tag, as a list of Blocks. */
static PyObject *net_take_all(PyObject *of, PyObject *args) {
    Net *self = (Net *)of;
    int peer, who = self->net.me;
    unsigned int tag;
    long long timeout_ns;
    PyObject *sizes;
    if (!PyArg_ParseTuple(args, "iIO!L", &peer, &tag, &PyList_Type, &sizes, &timeout_ns) || !is_peer(self, peer)) return NULL;
    Py_ssize_t count = PyList_Size(sizes), made = 0;
    PyObject *blocks = PyList_New(0);
    cg_message *messages = PyMem_Malloc(sizeof *messages * (size_t)(count ? count : 1));
    if (messages == NULL) PyErr_NoMemory();
    for (; blocks != NULL && messages != NULL && made < count; made++) {
        size_t bytes = PyLong_AsSize_t(PyList_GetItem(sizes, made));
        PyObject *block = PyErr_Occurred() ? NULL : (PyObject *)take_block(of, self->pool, bytes);
        if (block == NULL || PyList_Append(blocks, block) < 0) {
            Py_XDECREF(block);
            break;
        }
        Py_DECREF(block);
    }
    int result = CG_SIGNAL;
    waiting me;
    cg_net_call call;
    if (blocks != NULL && !PyErr_Occurred() && begin_wait(self, &me, &call, deadline_after(timeout_ns))) {
        PyEval_RestoreThread(me.saved);
        for (Py_ssize_t i = 0; i < count; i++) {
            Block *block = (Block *)PyList_GetItem(blocks, i);
            cg_net_receive(&self->net, &messages[i], peer, tag, block->base, (uint64_t)block->bytes);
        }
        me.saved = PyEval_SaveThread();
        result = cg_net_finish(&self->net, &call, messages, (int)count, &who);
        end_wait(self, &me);
        if (result != CG_OK) raise_stopped(of, result, who);
    }
    PyMem_Free(messages);
    if (result == CG_OK) return blocks;
    Py_XDECREF(blocks);
    return NULL;
}

static PyObject *net_receive_later(PyObject *of, PyObject *args) {
    Net *self = (Net *)of;
    int peer;
    unsigned int tag;
    unsigned long long address;
    Py_ssize_t bytes;
    PyObject *owner;
    if (!PyArg_ParseTuple(args, "iIKnO", &peer, &tag, &address, &bytes, &owner) || !is_peer(self, peer)) return NULL;
    if (bytes < 0) return PyErr_Format(PyExc_ValueError, "%zd bytes", bytes);
    if (self->closing) return raise_stopped(of, CG_SELF, self->net.me);
    Late *late = (Late *)allocate(state_of(of)->late);
    if (late == NULL) return NULL;
    late->net = (Net *)Py_NewRef(of);
    late->owner = Py_NewRef(owner);
    cg_net_receive(&self->net, &late->message, peer, tag, (void *)(uintptr_t)address, (uint64_t)bytes);
    return (PyObject *)late;
}

/* Waits for one of several: its index, -1 if none came in time. */
static PyObject *net_first_of(PyObject *of, PyObject *args) {
    Net *self = (Net *)of;
    PyObject *lates;
    long long timeout_ns;
    if (!PyArg_ParseTuple(args, "O!L", &PyList_Type, &lates, &timeout_ns)) return NULL;
    int count = (int)PyList_Size(lates), who = self->net.me;
    cg_message **messages = PyMem_Malloc(sizeof *messages * (size_t)(count ? count : 1));
    if (messages == NULL) return PyErr_NoMemory();
    for (int i = 0; i < count; i++) {
        PyObject *late = PyList_GetItem(lates, i);
        if (!PyObject_TypeCheck(late, state_of(of)->late) || ((Late *)late)->net != self) {
            PyMem_Free(messages);
            return PyErr_Format(PyExc_TypeError, "first_of(receives of this group, timeout_ns)");
        }
        messages[i] = &((Late *)late)->message;
    }
    waiting me;
    cg_net_call call;
    cg_any_of any = {messages, count, -1};
    PyObject *held = PyList_GetSlice(lates, 0, count); /* the caller's list may be changed meanwhile */
    if (held == NULL || !begin_wait(self, &me, &call, deadline_after(timeout_ns))) {
        Py_XDECREF(held);
        PyMem_Free(messages);
        return NULL;
    }
    int result = cg_net_wait(&self->net, &call, cg_net_any, &any, &who);
    end_wait(self, &me);
    Py_DECREF(held);
    PyMem_Free(messages);
    if (result == CG_OK) return PyLong_FromLong(any.found);
    return result == CG_TIMEOUT ? PyLong_FromLong(-1) : raise_stopped(of, result, who);
}

static PyObject *net_bytes_sent(PyObject *of, void *closure) {
    (void)closure;
    return PyLong_FromUnsignedLongLong(((Net *)of)->net.bytes_sent);
}

static void late_dealloc(PyObject *of) {
    Late *late = (Late *)of;
    if (late->net != NULL && late->net->net.links != NULL) cg_net_withdraw(&late->net->net, &late->message, 1);
    Py_XDECREF((PyObject *)late->net);
    Py_XDECREF(late->owner);
    free_object(of);
}

static PyGetSetDef net_getset[] = {{"bytes_sent", net_bytes_sent, NULL, "bytes of the messages that were sent", NULL}, {0}};
static PyMethodDef net_methods[] = {
    {"attach", net_attach, METH_VARARGS, "attach(peer, fd)\n--\n\nTakes over a connected socket that does not block."},
    {"are_linked", net_are_linked, METH_O, "are_linked(peers)\n--\n\nWhether each of these peers has a link, or had one."},
    {"is_linked", net_is_linked, METH_O, "is_linked(peer)\n--\n\nWhether the peer has a link, or had one."},
    {"error", net_error, METH_O, "error(peer)\n--\n\nerrno with which the peer's link ended; 0 if it was closed, or lives."},
    {"has_left", net_has_left, METH_O, "has_left(peer)\n--\n\nWhether the peer of a link that ended has closed its side in order."},
    {"watch", net_watch, METH_VARARGS, "watch(fd, on_knock)\n--\n\nEvery wait calls on_knock() while fd is readable."},
    {"exchange", net_exchange, METH_VARARGS, "exchange(sends, receives, timeout_ns)\n--\n\nLists of (peer, tag, address, bytes), all at once."},
    {"all_reduce", net_all_reduce, METH_VARARGS, "all_reduce(tag, timeout_ns, from, to, count, dtype, op, pool)\n--\n\n"},
    {"reduces_with", net_reduces_with, METH_O, "reduces_with(bytes)\n--\n\nRanks with which an all_reduce of a tensor of so many bytes exchanges messages."},
    {"send_parts", net_send_parts, METH_VARARGS, "send_parts(peers, tag, rest, parts, timeout_ns)\n--\n\nA tuple of buffers, each as a frame: the first with `tag`."},
    {"take", net_take, METH_VARARGS, "take(peer, tag, timeout_ns, rest_ns)\n--\n\nA frame of any size, as a Block; None: none began to come in time."},
    {"take_all", net_take_all, METH_VARARGS, "take_all(peer, tag, sizes, timeout_ns)\n--\n\nFrames of these sizes, as a list of Blocks."},
    {"receive_later", net_receive_later, METH_VARARGS, "receive_later(peer, tag, address, bytes, owner)\n--\n\nA receive, for first_of."},
    {"first_of", net_first_of, METH_VARARGS, "first_of(receives, timeout_ns)\n--\n\nIndex of one that has ended; -1: none in time."},
    {"abort", net_abort, METH_NOARGS, "abort()\n--\n\nEnds every wait, here and on the peers; from any thread."},
    {"disown", net_disown, METH_NOARGS, "disown()\n--\n\nCloses the copies of the links, in a forked child."},
    {"close", net_close, METH_NOARGS, "close()\n--\n\nSays goodbye, and closes every link."},
    {0}};
static PyType_Slot net_slots[] = {
    {Py_tp_doc, "Net(n, me, ordered, spin_ns, pool)\n--\n\nThe TCP links of rank `me` of n to the others. `ordered`: messages of a kind arrive as they are waited for."},
    {Py_tp_new, net_new}, {Py_tp_dealloc, net_dealloc},
    {Py_tp_methods, net_methods}, {Py_tp_getset, net_getset}, {0}};
PyType_Spec net_spec = {"commgraph.shm._native.Net", sizeof(Net), 0, Py_TPFLAGS_DEFAULT, net_slots};

static PyType_Slot late_slots[] = {{Py_tp_doc, "A receive that was begun; see Net.receive_later."}, {Py_tp_dealloc, late_dealloc}, {0}};
PyType_Spec late_spec = {"commgraph.shm._native.Late", sizeof(Late), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, late_slots};
