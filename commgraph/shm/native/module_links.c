/* LinkGroup: native calls of a group over several hosts (module_fast.c): over links alone, or where hosts have several ranks each in a step
 * in the shared memory of each host and one over links between counterparts, the ranks of one position. The messages and the steps are those
 * of communicators/tcp.py and communicators/hierarchical.py, so that ranks may take either way. */
#include "module_net.h"

#include <stdlib.h>
#include <string.h>

#include "net_reduce.h"

typedef struct {
    Calls calls;
    Net *net;     /* to all ranks, or to the counterparts: one rank a host, in the order of the hosts */
    Net *whole;   /* beside that to all ranks, for what each rank of one host exchanges with each of another one; NULL: `net` is that */
    Group *local; /* the ranks of this host; NULL: the links reach all ranks */
    int hosts, host, position; /* how many; of this rank */
    int *ranks;   /* [host * ranks of a host + position] */
    int reached; /* whether `whole` has links to all ranks of the other hosts */
    int busy;
    PyThreadState *saved;
    net_user user;
} LinkGroup;

static LinkGroup *of(Calls *calls) { return (LinkGroup *)calls; }

static int rank_at(const LinkGroup *self, int host, int position) { return self->ranks[host * self->local->calls.n + position]; }

/* Whether there are links to all ranks of the other hosts. */
static int reaches_all(LinkGroup *self) {
    const int n = self->local->calls.n;
    for (int at = 0; !self->reached && at < self->hosts * n; at++)
        if (at / n != self->host && !self->whole->linked[self->ranks[at]]) return 0;
    return self->reached = 1;
}

/* Whether there are links to all with which a gather, a barrier and the smallest all-reduce exchange messages. */
static int reaches_near(const Net *net) {
    for (int p = 0; p < net->net.n; p++)
        if (p != net->net.me && !net->linked[p] && cg_net_gathers_with(&net->net, p)) return 0;
    return 1;
}

static int is_ready(Calls *calls, int operation, int root) {
    LinkGroup *self = of(calls);
    const Net *net = self->net;
    if (operation == OP_ALL_TO_ALL && self->whole != NULL) return reaches_all(self);
    if (net->n_linked == net->net.n - 1) return 1;
    if (operation == OP_BARRIER || operation == OP_ALL_GATHER || operation == OP_ALL_REDUCE || operation == OP_ALL_REDUCE_) return reaches_near(net);
    if (operation == OP_GATHER || operation == OP_REDUCE) return root != net->net.me && net->linked[root];
    if (operation != OP_BROADCAST) return 0;
    if (self->local != NULL) {
        int host = 0;
        while (host < self->hosts && rank_at(self, host, self->position) != root) host++;
        if (host == self->hosts) return 1; /* of another position: only its counterparts use links */
        root = host;
    }
    for (int p = 0; p < net->net.n; p++)
        if (p != net->net.me && !net->linked[p] && cg_net_is_near(&net->net, root, p)) return 0;
    return 1;
}

static int is_ready_to_reduce(Calls *calls, size_t bytes) {
    const LinkGroup *self = of(calls);
    const Net *net = self->net;
    /* A rank's share, in float32 where the tensor's floats are smaller, is never more than this. */
    if (self->local != NULL) bytes = 2 * bytes / (size_t)self->local->calls.n + sizeof(double);
    for (int p = 0; net->n_linked < net->net.n - 1 && p < net->net.n; p++)
        if (p != net->net.me && !net->linked[p] && cg_net_reduces_with(&net->net, bytes, p)) return 0;
    return 1;
}

static int claim_links(Calls *calls) {
    LinkGroup *self = of(calls);
    if (self->busy) {
        PyErr_SetString(state_of((PyObject *)calls)->busy, "another call of this very group is under way: one thread at a time may use it");
        return 0;
    }
    if (!use_net(self->net)) return 0;
    if (self->whole != NULL && !use_net(self->whole)) return leave_net(self->net), 0;
    if (self->local != NULL && !claim(self->local->team)) {
        if (self->whole != NULL) leave_net(self->whole);
        return leave_net(self->net), 0;
    }
    return self->busy = 1;
}

static void unclaim_links(Calls *calls) {
    LinkGroup *self = of(calls);
    self->busy = 0;
    if (self->local != NULL) unclaim(self->local->team);
    if (self->whole != NULL) leave_net(self->whole);
    leave_net(self->net);
}

static int keeps(Calls *calls, size_t bytes) {
    (void)calls, (void)bytes;
    return 0; /* a thread of the group may be the one that the others wait for */
}

static void begin_links(Calls *calls, int keep) {
    LinkGroup *self = of(calls);
    (void)keep;
    self->user = (net_user){self->local != NULL ? &self->local->team->saved : &self->saved, self->net};
    if (self->local != NULL) begin_work(self->local->team, 0);
    else self->saved = PyEval_SaveThread();
}

static void end_links(Calls *calls) {
    LinkGroup *self = of(calls);
    if (self->local != NULL) end_work(self->local->team);
    else PyEval_RestoreThread(self->saved);
}

static int exposes(const Calls *calls) {
    const LinkGroup *self = (const LinkGroup *)calls;
    return self->local != NULL && self->local->group.exposed;
}

static int64_t end_of(const cg_call *call) { return call->deadline < 0 ? deadline_after(-call->deadline) : call->deadline; }

static cg_net_call over(LinkGroup *self, const cg_call *call, int64_t deadline) {
    return (cg_net_call){call->tag, deadline, attend_net, &self->user, self->calls.pool->pool};
}

/* A step in shared memory: each has a number of its own, as if the ranks of a host were a group. */
static cg_call inside(LinkGroup *self, const cg_call *call, int operation, int64_t deadline) {
    self->local->calls.sequence++;
    return (cg_call){.tag = call->tag, .call = call_word(&self->local->calls, operation), .deadline = deadline};
}

/* `who` of a step inside the host, or between hosts, as a rank of the group. */
static int from_inside(const LinkGroup *self, int result, int *who) {
    if (result != CG_OK && *who >= 0 && *who < self->local->calls.n) *who = rank_at(self, self->host, *who);
    return result;
}
static int from_outside(const LinkGroup *self, int result, int *who) {
    if (result != CG_OK && *who >= 0 && *who < self->hosts) *who = rank_at(self, *who, self->position);
    return result;
}

/* Over links alone. */

static int links_barrier(Calls *calls, const cg_call *call, int *who) {
    const cg_net_call over_links = over(of(calls), call, end_of(call));
    return cg_net_barrier(&of(calls)->net->net, &over_links, who);
}

static int links_all_reduce(Calls *calls, const cg_call *call, const void *from, void *to, size_t count, int dtype, int op, int in_place, int *who) {
    (void)in_place;
    const cg_net_call over_links = over(of(calls), call, end_of(call));
    return cg_net_all_reduce(&of(calls)->net->net, &over_links, from, to, count, dtype, op, who);
}

static int links_reduce_scatter(Calls *calls, const cg_call *call, const cg_block *out, void *to, int dtype, int op, int *who) {
    const cg_net_call over_links = over(of(calls), call, end_of(call));
    return cg_net_reduce_scatter(&of(calls)->net->net, &over_links, out, to, dtype, op, who);
}

static int links_gatherv(Calls *calls, const cg_call *call, const char *mine, const size_t *bytes, const cg_block *into, int root, int *who) {
    const cg_net_call over_links = over(of(calls), call, end_of(call));
    return cg_net_gatherv(&of(calls)->net->net, &over_links, mine, bytes, into, root, who);
}

static int links_all_to_allv(Calls *calls, const cg_call *call, const cg_block *out, const cg_block *into, int *who) {
    const cg_net_call over_links = over(of(calls), call, end_of(call));
    return cg_net_all_to_allv(&of(calls)->net->net, &over_links, out, into, who);
}

static int links_broadcast(Calls *calls, const cg_call *call, void *data, size_t bytes, int root, int *who) {
    const cg_net_call over_links = over(of(calls), call, end_of(call));
    return cg_net_broadcast(&of(calls)->net->net, &over_links, data, bytes, root, who);
}

/* Of `reduce` to one rank: 32 KiB as in communicators/gloo.py. */
static const cg_carrier links = {
    ~0u & ~(1u << OP_SCATTER | 1u << OP_ALL_REDUCE_BEGUN), 32 * 1024, is_ready, is_ready_to_reduce, claim_links, unclaim_links, keeps, begin_links, end_links, exposes,
    links_barrier, links_all_reduce, links_reduce_scatter, links_gatherv, links_all_to_allv, links_broadcast};

/* In two steps. */

static int both_barrier(Calls *calls, const cg_call *call, int *who) {
    LinkGroup *self = of(calls);
    const int64_t deadline = end_of(call);
    const cg_net_call between = over(self, call, deadline);
    cg_call here = inside(self, call, OP_BARRIER, deadline);
    int result = from_inside(self, cg_barrier(&self->local->group, &here, who), who);
    return result != CG_OK ? result : from_outside(self, cg_net_barrier(&self->net->net, &between, who), who);
}

static int both_broadcast(Calls *calls, const cg_call *call, void *data, size_t bytes, int root, int *who) {
    LinkGroup *self = of(calls);
    const int64_t deadline = end_of(call);
    const int n = self->local->calls.n;
    int at = 0;
    while (self->ranks[at] != root) at++;
    if (self->position == at % n) {
        const cg_net_call between = over(self, call, deadline);
        int result = from_outside(self, cg_net_broadcast(&self->net->net, &between, data, bytes, at / n, who), who);
        if (result != CG_OK) return result;
    }
    cg_block into[n];
    size_t sizes[n];
    memset(into, 0, sizeof into);
    memset(sizes, 0, sizeof sizes);
    sizes[at % n] = bytes;
    into[at % n] = (cg_block){data, 1, bytes, bytes};
    cg_call here = inside(self, call, OP_BROADCAST, deadline);
    return from_inside(self, cg_all_gatherv(&self->local->group, &here, data, sizes, into, 0, who), who);
}

/* Memory that other ranks may still access after a failure is never given back. */
static void give(const LinkGroup *self, void *scratch, int result) {
    if (scratch != NULL && (result == CG_OK || !self->local->group.exposed)) cg_pool_give(scratch);
}

static void divide(void *data, size_t count, int dtype, int by) {
    if (dtype == CG_F64)
        for (size_t i = 0; i < count; i++) ((double *)data)[i] /= by;
    else
        for (size_t i = 0; i < count; i++) ((float *)data)[i] /= (float)by;
}

/* The kind that is accumulated: 16-bit floats in float32 until the end. */
static int wide_kind(int dtype) { return cg_find_conversion(dtype) != NULL ? CG_F32 : dtype; }

static int both_all_reduce(Calls *calls, const cg_call *call, const void *from, void *to, size_t count, int dtype, int op, int in_place, int *who) {
    LinkGroup *self = of(calls);
    (void)in_place;
    const int n = self->local->calls.n, wide = wide_kind(dtype), inner = op == CG_AVG ? CG_SUM : op;
    const size_t size = cg_dtype_bytes(wide), each = count / (size_t)n, larger = count % (size_t)n;
    const cg_conversion *conversion = cg_find_conversion(dtype);
    const int64_t deadline = end_of(call);
    const size_t own = each + ((size_t)self->position < larger);
    /* The whole in the accumulated kind, and this rank's share of it, which must not lie in the input. */
    char *whole = conversion == NULL ? to : cg_pool_take(self->calls.pool->pool, count * size), *share = NULL;
    const char *input = conversion == NULL ? from : whole;
    char *scratch = input == whole ? cg_pool_take(self->calls.pool->pool, own * size) : NULL;
    int result = whole == NULL || (input == whole && scratch == NULL) ? CG_NOMEM : CG_OK;
    cg_block blocks[n];
    size_t bytes[n], at = 0;
    if (result == CG_OK) {
        if (conversion != NULL) conversion->widen((float *)whole, from, count);
        for (int p = 0; p < n; p++) {
            bytes[p] = (each + ((size_t)p < larger)) * size;
            blocks[p] = (cg_block){(char *)(uintptr_t)input + at, 1, bytes[p], bytes[p]};
            if (p == self->position) share = scratch != NULL ? scratch : whole + at;
            at += bytes[p];
        }
        cg_call here = inside(self, call, OP_REDUCE_SCATTER, deadline);
        result = from_inside(self, cg_reduce_scatter(&self->local->group, &here, blocks, share, wide, inner, who), who);
    }
    if (result == CG_OK) {
        const cg_net_call between = over(self, call, deadline);
        result = from_outside(self, cg_net_all_reduce(&self->net->net, &between, share, share, own, wide, inner, who), who);
    }
    if (result == CG_OK) {
        for (int p = 0; p < n; p++) blocks[p].base = whole + (blocks[p].base - input);
        cg_call here = inside(self, call, OP_ALL_GATHER, deadline);
        result = from_inside(self, cg_all_gatherv(&self->local->group, &here, share, bytes, blocks, 1, who), who);
    }
    if (result == CG_OK && op == CG_AVG) divide(whole, count, wide, self->calls.n);
    if (result == CG_OK && conversion != NULL) conversion->narrow(to, (const float *)whole, count);
    if (conversion != NULL) give(self, whole, result);
    give(self, scratch, result);
    return result;
}

static int both_gatherv(Calls *calls, const cg_call *call, const char *mine, const size_t *bytes, const cg_block *into, int root, int *who) {
    LinkGroup *self = of(calls);
    (void)root; /* -1: no other operation is served */
    const int n = self->local->calls.n, hosts = self->hosts;
    const int64_t deadline = end_of(call);
    /* All pieces, by position and then by host: this rank fills its column from its counterparts, and the other columns from its host. */
    size_t lengths[n], all = 0;
    for (int p = 0; p < n; p++) {
        lengths[p] = 0;
        for (int h = 0; h < hosts; h++) lengths[p] += bytes[rank_at(self, h, p)];
        all += lengths[p];
    }
    char *whole = cg_pool_take(self->calls.pool->pool, all);
    if (whole == NULL) return CG_NOMEM;
    cg_block columns[n], column[hosts];
    size_t at = 0, sizes[hosts];
    for (int p = 0; p < n; p++) {
        columns[p] = (cg_block){whole + at, 1, lengths[p], lengths[p]};
        at += lengths[p];
    }
    char *own = columns[self->position].base;
    at = 0;
    for (int h = 0; h < hosts; h++) {
        sizes[h] = bytes[rank_at(self, h, self->position)];
        column[h] = (cg_block){own + at, 1, sizes[h], sizes[h]};
        at += sizes[h];
    }
    const cg_net_call between = over(self, call, deadline);
    int result = from_outside(self, cg_net_gatherv(&self->net->net, &between, mine, sizes, column, -1, who), who);
    if (result == CG_OK) {
        cg_call here = inside(self, call, OP_ALL_GATHER, deadline);
        result = from_inside(self, cg_all_gatherv(&self->local->group, &here, own, lengths, columns, 1, who), who);
    }
    at = 0;
    for (int p = 0; p < n && result == CG_OK; p++)
        for (int h = 0; h < hosts; h++) {
            const int rank = rank_at(self, h, p);
            cg_unpack(&into[rank], whole + at, 0, bytes[rank]);
            at += bytes[rank];
        }
    give(self, whole, result);
    return result;
}

static int both_reduce_scatter(Calls *calls, const cg_call *call, const cg_block *out, void *to, int dtype, int op, int *who) {
    LinkGroup *self = of(calls);
    const int n = self->local->calls.n, hosts = self->hosts, wide = wide_kind(dtype), inner = op == CG_AVG ? CG_SUM : op;
    const cg_conversion *conversion = cg_find_conversion(dtype);
    const size_t narrow_size = cg_dtype_bytes(dtype), size = cg_dtype_bytes(wide), factor = size / narrow_size;
    const int64_t deadline = end_of(call);
    /* The pieces of each position one after the other, by host, in the accumulated kind; then this rank's column, and its piece of that. */
    size_t lengths[n], all = 0;
    for (int p = 0; p < n; p++) {
        lengths[p] = 0;
        for (int h = 0; h < hosts; h++) lengths[p] += cg_block_bytes(&out[rank_at(self, h, p)]) * factor;
        all += lengths[p];
    }
    const size_t own = cg_block_bytes(&out[self->calls.me]), column = lengths[self->position];
    char *whole = cg_pool_take(self->calls.pool->pool, all + column + own * factor + all);
    if (whole == NULL) return CG_NOMEM;
    char *mine = whole + all, *total = mine + column, *packed = total + own * factor;
    cg_block columns[n], pieces[hosts];
    size_t at = 0;
    for (int p = 0; p < n; p++) {
        columns[p] = (cg_block){whole + at, 1, lengths[p], lengths[p]};
        for (int h = 0; h < hosts; h++) {
            const cg_block *piece = &out[rank_at(self, h, p)];
            const size_t bytes = cg_block_bytes(piece);
            cg_pack(conversion == NULL ? whole + at : packed, piece, 0, bytes, 0);
            if (conversion != NULL) conversion->widen((float *)(whole + at), (const uint16_t *)packed, bytes / narrow_size);
            at += bytes * factor;
        }
    }
    cg_call here = inside(self, call, OP_REDUCE_SCATTER, deadline);
    int result = from_inside(self, cg_reduce_scatter(&self->local->group, &here, columns, mine, wide, inner, who), who);
    if (result == CG_OK) {
        at = 0;
        for (int h = 0; h < hosts; h++) {
            const size_t bytes = cg_block_bytes(&out[rank_at(self, h, self->position)]) * factor;
            pieces[h] = (cg_block){mine + at, 1, bytes, bytes};
            at += bytes;
        }
        const cg_net_call between = over(self, call, deadline);
        result = from_outside(self, cg_net_reduce_scatter(&self->net->net, &between, pieces, total, wide, inner, who), who);
    }
    if (result == CG_OK) {
        if (op == CG_AVG) divide(total, own / narrow_size, wide, self->calls.n);
        if (conversion != NULL) conversion->narrow(to, (const float *)total, own / narrow_size);
        else memcpy(to, total, own);
    }
    give(self, whole, result);
    return result;
}

/* The ranks of this host exchange in shared memory, and each with those of the other hosts over links. */
static int both_all_to_allv(Calls *calls, const cg_call *call, const cg_block *out, const cg_block *into, int *who) {
    LinkGroup *self = of(calls);
    const int n = self->local->calls.n, all = calls->n;
    const int64_t deadline = end_of(call);
    cg_block near_out[n], near_into[n], far_out[all], far_into[all];
    memcpy(far_out, out, sizeof far_out);
    memcpy(far_into, into, sizeof far_into);
    for (int p = 0; p < n; p++) {
        const int rank = rank_at(self, self->host, p);
        near_out[p] = out[rank], near_into[p] = into[rank];
        far_out[rank].rows = far_into[rank].rows = 0;
    }
    cg_call here = inside(self, call, OP_ALL_TO_ALL, deadline);
    int result = from_inside(self, cg_all_to_allv(&self->local->group, &here, near_out, near_into, who), who);
    if (result != CG_OK) return result;
    const cg_net_call between = over(self, call, deadline);
    return cg_net_all_to_allv(&self->whole->net, &between, far_out, far_into, who);
}

static const cg_carrier both = {
    1u << OP_BARRIER | 1u << OP_ALL_REDUCE | 1u << OP_ALL_REDUCE_ | 1u << OP_ALL_GATHER | 1u << OP_REDUCE_SCATTER | 1u << OP_BROADCAST |
        1u << OP_ALL_TO_ALL,
    0, is_ready, is_ready_to_reduce, claim_links, unclaim_links, keeps, begin_links, end_links, exposes,
    both_barrier, both_all_reduce, both_reduce_scatter, both_gatherv, both_all_to_allv, both_broadcast};

static PyObject *links_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    (void)kwargs;
    module_state *state = PyType_GetModuleState(type);
    PyObject *net, *pool, *local = Py_None, *hosts = NULL, *whole = NULL;
    int me = 0;
    if (state == NULL || !PyArg_ParseTuple(args, "O!O!|OO!iO!", state->net, &net, state->pool, &pool, &local, &PyList_Type, &hosts, &me, state->net, &whole))
        return NULL;
    const cg_net *way = &((Net *)net)->net;
    const int shares = local != Py_None, n_hosts = shares && hosts != NULL ? (int)PyList_Size(hosts) : way->n;
    const int each = shares ? ((Group *)local)->calls.n : 1;
    if (shares && (!PyObject_TypeCheck(local, state->group) || whole == NULL || n_hosts != way->n || ((Net *)whole)->net.n != n_hosts * each))
        return PyErr_Format(PyExc_TypeError, "LinkGroup(net, pool, group, hosts, me, whole)");
    LinkGroup *self = (LinkGroup *)allocate(type);
    if (self == NULL) return NULL;
    self->net = (Net *)Py_NewRef(net);
    self->hosts = n_hosts;
    self->host = way->me;
    if (shares) {
        self->local = (Group *)Py_NewRef(local);
        self->whole = (Net *)Py_NewRef(whole);
        self->position = self->local->calls.me;
        self->ranks = malloc(sizeof *self->ranks * (size_t)n_hosts * (size_t)each);
    }
    int fine = begin_calls(&self->calls, shares ? &both : &links, n_hosts * each, shares ? me : way->me, (Pool *)pool) && (!shares || self->ranks != NULL);
    for (int h = 0; fine && shares && h < n_hosts; h++) {
        PyObject *ranks = PyList_GetItem(hosts, h);
        if (!PyList_Check(ranks) || PyList_Size(ranks) != each) {
            PyErr_Format(PyExc_ValueError, "host %d has not %d ranks", h, each);
            fine = 0;
        }
        for (int p = 0; fine && p < each; p++) {
            long rank = PyLong_AsLong(PyList_GetItem(ranks, p));
            fine = rank >= 0 && rank < n_hosts * each;
            if (!fine && !PyErr_Occurred()) PyErr_Format(PyExc_ValueError, "rank %ld of %d", rank, n_hosts * each);
            self->ranks[h * each + p] = (int)rank;
        }
    }
    if (fine && !PyErr_Occurred()) return (PyObject *)self;
    Py_DECREF((PyObject *)self);
    return PyErr_Occurred() ? NULL : PyErr_NoMemory();
}

static void links_dealloc(PyObject *object) {
    LinkGroup *self = (LinkGroup *)object;
    Py_XDECREF((PyObject *)self->net);
    Py_XDECREF((PyObject *)self->whole);
    Py_XDECREF((PyObject *)self->local);
    free(self->ranks);
    end_calls(&self->calls);
    free_object(object);
}

static PyObject *get_busy(PyObject *object, void *closure) {
    (void)closure;
    return PyBool_FromLong(((LinkGroup *)object)->busy);
}

static PyGetSetDef links_getset[] = {CALLS_GETSET, {"busy", get_busy, NULL, "whether a native call is under way", NULL}, {0}};
static PyType_Slot links_slots[] = {
    {Py_tp_doc, "LinkGroup(net, pool, group=None, hosts=None, me=0, whole=None)\n--\n\nNative calls over links; with a group in shared memory on each of several hosts, "
                "whose ranks are listed by host, those of rank `me`. `net` then reaches its counterparts, and `whole` all ranks."},
    {Py_tp_new, links_new}, {Py_tp_dealloc, links_dealloc}, {Py_tp_getset, links_getset}, {0}};
PyType_Spec link_group_spec = {"commgraph.shm._native.LinkGroup", sizeof(LinkGroup), 0, Py_TPFLAGS_DEFAULT, links_slots};
