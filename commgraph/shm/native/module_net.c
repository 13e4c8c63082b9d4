/* Net: the TCP links of one group. Late: a receive that may be waited for several times. */
#include "module_net.h"

#include <errno.h>
#include <stdlib.h>

#include "net_reduce.h"

typedef struct {
    PyObject_HEAD
    cg_message message;
    Net *net;
    PyObject *owner; /* keeps the memory of the message */
} Late;

typedef struct {
    PyThreadState *saved;
    net_user user;
} waiting;

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

static int begin_wait(Net *self, waiting *me, cg_net_call *call, long long timeout_ns) {
    if (!use_net(self)) return 0;
    me->user = (net_user){&me->saved, self};
    *call = (cg_net_call){.deadline = deadline_after(timeout_ns), .attend = attend_net, .user = &me->user};
    me->saved = PyEval_SaveThread();
    return 1;
}

static void end_wait(Net *self, waiting *me) {
    PyEval_RestoreThread(me->saved);
    leave_net(self);
}

static PyObject *net_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    (void)kwargs;
    int n, rank, ordered;
    long long spin_ns;
    if (!PyArg_ParseTuple(args, "iipL", &n, &rank, &ordered, &spin_ns)) return NULL;
    if (n < 2 || n > 1 << 20 || rank < 0 || rank >= n || spin_ns < 0) return PyErr_Format(PyExc_ValueError, "rank %d of %d, spin_ns=%lld", rank, n, spin_ns);
    Net *self = (Net *)allocate(type);
    if (self == NULL) return NULL;
    self->linked = calloc((size_t)n, 1);
    int error = self->linked == NULL ? ENOMEM : cg_net_begin(&self->net, n, rank, ordered, spin_ns);
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
    if (begun == count && begin_wait(self, &me, &call, timeout_ns)) {
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
    if (!begin_wait(self, &me, &call, timeout_ns)) return NULL;
    call.tag = tag;
    call.pool = ((Pool *)pool)->pool;
    int result = cg_net_all_reduce(&self->net, &call, (void *)(uintptr_t)from, (void *)(uintptr_t)to, (size_t)count, dtype, op, &who);
    end_wait(self, &me);
    return result == CG_OK ? Py_NewRef(Py_None) : raise_stopped(of, result, who);
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
    if (held == NULL || !begin_wait(self, &me, &call, timeout_ns)) {
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
    {"watch", net_watch, METH_VARARGS, "watch(fd, on_knock)\n--\n\nEvery wait calls on_knock() while fd is readable."},
    {"exchange", net_exchange, METH_VARARGS, "exchange(sends, receives, timeout_ns)\n--\n\nLists of (peer, tag, address, bytes), all at once."},
    {"all_reduce", net_all_reduce, METH_VARARGS, "all_reduce(tag, timeout_ns, from, to, count, dtype, op, pool)\n--\n\n"},
    {"receive_later", net_receive_later, METH_VARARGS, "receive_later(peer, tag, address, bytes, owner)\n--\n\nA receive, for first_of."},
    {"first_of", net_first_of, METH_VARARGS, "first_of(receives, timeout_ns)\n--\n\nIndex of one that has ended; -1: none in time."},
    {"abort", net_abort, METH_NOARGS, "abort()\n--\n\nEnds every wait, here and on the peers; from any thread."},
    {"disown", net_disown, METH_NOARGS, "disown()\n--\n\nCloses the copies of the links, in a forked child."},
    {"close", net_close, METH_NOARGS, "close()\n--\n\nCloses every link."},
    {0}};
static PyType_Slot net_slots[] = {
    {Py_tp_doc, "Net(n, me, ordered, spin_ns)\n--\n\nThe TCP links of rank `me` of n to the others. `ordered`: messages of a kind arrive as they are waited for."},
    {Py_tp_new, net_new}, {Py_tp_dealloc, net_dealloc},
    {Py_tp_methods, net_methods}, {Py_tp_getset, net_getset}, {0}};
PyType_Spec net_spec = {"commgraph.shm._native.Net", sizeof(Net), 0, Py_TPFLAGS_DEFAULT, net_slots};

static PyType_Slot late_slots[] = {{Py_tp_doc, "A receive that was begun; see Net.receive_later."}, {Py_tp_dealloc, late_dealloc}, {0}};
PyType_Spec late_spec = {"commgraph.shm._native.Late", sizeof(Late), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, late_slots};
