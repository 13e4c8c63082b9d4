#include "module.h"

#include "dlpack.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <string.h>
#include <sys/mman.h>

static struct PyModuleDef module_def;

module_state *state_of(PyObject *self) { return PyType_GetModuleState(Py_TYPE(self)); }

int64_t deadline_after(int64_t timeout_ns) {
    int64_t now = cg_clock_ns();
    return timeout_ns > INT64_MAX - now ? INT64_MAX : now + timeout_ns;
}

uint64_t call_word(const Group *group, int operation) { return (group->sequence ? group->sequence - 1 : 0) << 8 | (uint64_t)operation; }

/* Threads that wake up together would all ask for the interpreter, and be handed it by one futex after the other, each of which takes
 * longer than what most of them want to do. So those of one process take turns: who has come back from a wait keeps the turn until its next one,
 * and the others yield. Whoever has it may be long about something else, so patience is short. */
#define TURN_NS 50000

static void take_turn(Team *self) {
    if (!cg_team_is_crew(&self->team)) return;
    uintptr_t me = (uintptr_t)pthread_self(), nobody = 0;
    const int64_t patience = cg_clock_ns() + TURN_NS;
    while (!atomic_compare_exchange_weak_explicit(self->turn, &nobody, me, memory_order_relaxed, memory_order_relaxed)) {
        if (nobody != 0 && cg_clock_ns() > patience) {
            atomic_store_explicit(self->turn, me, memory_order_relaxed);
            return;
        }
        nobody = 0;
        sched_yield();
    }
}

static void let_go(Team *self) {
    self->saved = PyEval_SaveThread();
    uintptr_t me = (uintptr_t)pthread_self();
    atomic_compare_exchange_strong_explicit(self->turn, &me, 0, memory_order_relaxed, memory_order_relaxed);
}

static void take_back(Team *self) {
    take_turn(self);
    PyEval_RestoreThread(self->saved);
}

static int interrupted(cg_team *team) {
    Team *self = team->user;
    PyEval_RestoreThread(self->saved);
    int raised = PyErr_CheckSignals() != 0;
    self->saved = PyEval_SaveThread();
    return raised;
}

static int claim(Team *team) {
    if (!team->busy) return team->busy = 1;
    PyErr_SetString(state_of((PyObject *)team)->busy, "another thread is in a call of this very group or queue: one thread at a time may use it");
    return 0;
}

int enter(Team *team) {
    if (!claim(team)) return 0;
    team->brief = 0;
    let_go(team);
    return 1;
}

int enter_briefly(Team *team) {
    /* Among threads of one process nobody's call is over before another had the interpreter: they copy and reduce meanwhile. */
    if (cg_team_is_crew(&team->team)) return enter(team);
    if (!claim(team)) return 0;
    team->brief = 1;
    return 1;
}

void leave(Team *team) {
    if (!team->brief) take_back(team);
    team->busy = 0;
}

static void pause_interpreter(cg_team *team) {
    Team *self = team->user;
    if (self->brief) let_go(self);
}

static void resume_interpreter(cg_team *team) {
    Team *self = team->user;
    if (self->brief) take_back(self);
}

PyObject *raise_stopped(PyObject *self, int code, int who) {
    if (code == CG_SIGNAL) return NULL; /* the handler has raised already */
    if (code == CG_NOMEM) return PyErr_NoMemory();
    PyObject *args = Py_BuildValue("(ii)", code, who);
    if (args != NULL) {
        PyErr_SetObject(state_of(self)->stopped, args);
        Py_DECREF(args);
    }
    return NULL;
}

static void free_object(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyObject *allocate(PyTypeObject *type) { return ((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0); }

/* Segment: a mapping of a file descriptor. */

static PyObject *segment_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    (void)kwargs;
    int fd;
    Py_ssize_t bytes;
    if (!PyArg_ParseTuple(args, "in", &fd, &bytes)) return NULL;
    if (bytes <= 0) return PyErr_Format(PyExc_ValueError, "a segment of %zd bytes", bytes);
    void *base = mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (base == MAP_FAILED) return PyErr_SetFromErrno(PyExc_OSError);
    Segment *self = (Segment *)allocate(type);
    if (self == NULL) {
        munmap(base, (size_t)bytes);
        return NULL;
    }
    self->base = base;
    self->bytes = (size_t)bytes;
    return (PyObject *)self;
}

static void segment_dealloc(PyObject *self) {
    Segment *segment = (Segment *)self;
    if (segment->base != NULL) munmap(segment->base, segment->bytes);
    free_object(self);
}

static int segment_buffer(PyObject *self, Py_buffer *view, int flags) {
    Segment *segment = (Segment *)self;
    return PyBuffer_FillInfo(view, self, segment->base, (Py_ssize_t)segment->bytes, 0, flags);
}

static PyObject *segment_address(PyObject *self, void *closure) {
    (void)closure;
    return PyLong_FromVoidPtr(((Segment *)self)->base);
}

/* Touches every page, so that first use finds them in place. */
static PyObject *segment_populate(PyObject *self, PyObject *unused) {
    (void)unused;
    Segment *segment = (Segment *)self;
    Py_BEGIN_ALLOW_THREADS
    for (size_t at = 0; at < segment->bytes; at += 4096) (void)*(volatile char *)(segment->base + at);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyGetSetDef segment_getset[] = {{"address", segment_address, NULL, "where it is mapped", NULL}, {0}};
static PyMethodDef segment_methods[] = {{"populate", segment_populate, METH_NOARGS, "populate()\n--\n\nMaps every page now."}, {0}};
static PyType_Slot segment_slots[] = {
    {Py_tp_doc, "Segment(fd, nbytes)\n--\n\nShared memory behind a descriptor, mapped; a writable buffer. Unmapped when the last reference goes."},
    {Py_tp_new, segment_new}, {Py_tp_dealloc, segment_dealloc}, {Py_bf_getbuffer, segment_buffer},
    {Py_tp_getset, segment_getset}, {Py_tp_methods, segment_methods}, {0}};
static PyType_Spec segment_spec = {"commgraph.shm._native.Segment", sizeof(Segment), 0, Py_TPFLAGS_DEFAULT, segment_slots};

/* Pool and Block: memory that is used again. */

static PyObject *pool_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    (void)kwargs;
    Py_ssize_t keep;
    if (!PyArg_ParseTuple(args, "n", &keep)) return NULL;
    Pool *self = (Pool *)allocate(type);
    if (self == NULL) return NULL;
    self->pool = cg_pool_new((size_t)keep);
    if (self->pool == NULL) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static void pool_dealloc(PyObject *self) {
    if (((Pool *)self)->pool != NULL) cg_pool_drop(((Pool *)self)->pool);
    free_object(self);
}

static Block *take_block(PyObject *self, Pool *pool, size_t bytes) {
    Block *block = (Block *)allocate(state_of(self)->block);
    if (block == NULL) return NULL;
    block->bytes = (Py_ssize_t)bytes;
    block->base = cg_pool_take(pool->pool, bytes);
    if (block->base == NULL) {
        Py_DECREF(block);
        PyErr_NoMemory();
        return NULL;
    }
    return block;
}

static PyObject *pool_take(PyObject *self, PyObject *arg) {
    size_t bytes = PyLong_AsSize_t(arg);
    if (bytes == (size_t)-1 && PyErr_Occurred()) return NULL;
    return (PyObject *)take_block(self, (Pool *)self, bytes);
}

static PyMethodDef pool_methods[] = {{"take", pool_take, METH_O, "take(nbytes)\n--\n\nA Block of uninitialised memory."}, {0}};
static PyType_Slot pool_slots[] = {
    {Py_tp_doc, "Pool(keep)\n--\n\nMemory that is used again; keeps up to `keep` bytes that are not in use."},
    {Py_tp_new, pool_new}, {Py_tp_dealloc, pool_dealloc}, {Py_tp_methods, pool_methods}, {0}};
static PyType_Spec pool_spec = {"commgraph.shm._native.Pool", sizeof(Pool), 0, Py_TPFLAGS_DEFAULT, pool_slots};

static void block_dealloc(PyObject *self) {
    if (((Block *)self)->base != NULL) cg_pool_give(((Block *)self)->base);
    free_object(self);
}

static int block_buffer(PyObject *self, Py_buffer *view, int flags) {
    return PyBuffer_FillInfo(view, self, ((Block *)self)->base, ((Block *)self)->bytes, 0, flags);
}

static Py_ssize_t block_length(PyObject *self) { return ((Block *)self)->bytes; }

static PyType_Slot block_slots[] = {
    {Py_tp_doc, "Memory of a Pool, a writable buffer; given back when the last reference goes."},
    {Py_tp_dealloc, block_dealloc}, {Py_bf_getbuffer, block_buffer}, {Py_sq_length, block_length}, {0}};
static PyType_Spec block_spec = {"commgraph.shm._native.Block", sizeof(Block), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                                 block_slots};

/* Team. */

static PyObject *team_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    (void)kwargs;
    PyObject *segment;
    Py_ssize_t offset;
    int n, me, crowd;
    if (!PyArg_ParseTuple(args, "Oniii", &segment, &offset, &n, &me, &crowd)) return NULL;
    module_state *state = PyType_GetModuleState(type);
    if (state == NULL || !PyObject_TypeCheck(segment, state->segment)) return PyErr_Format(PyExc_TypeError, "a Segment is needed");
    if (me < 0 || me >= n || offset < 0 || offset % CG_LINE || (size_t)offset + (size_t)n * sizeof(cg_seat) > ((Segment *)segment)->bytes)
        return PyErr_Format(PyExc_ValueError, "seat %d of %d at %zd does not fit into the segment", me, n, offset);
    Team *self = (Team *)allocate(type);
    if (self == NULL) return NULL;
    int error = cg_team_join(&self->team, (cg_seat *)(((Segment *)segment)->base + offset), n, me, crowd);
    if (error) {
        Py_DECREF(self);
        return error == EBUSY ? PyErr_Format(PyExc_ValueError, "seat %d of %d is taken", me, n) : PyErr_NoMemory();
    }
    Py_INCREF(segment);
    self->segment = (Segment *)segment;
    self->turn = &state->turn;
    self->team.pause = pause_interpreter;
    self->team.resume = resume_interpreter;
    self->team.interrupted = interrupted;
    self->team.user = self;
    return (PyObject *)self;
}

/* A further view for a ring between two. */
static Team *new_view(module_state *state, Team *of, cg_bell *bell, cg_bell *theirs) {
    Team *self = (Team *)allocate(state->team);
    if (self == NULL) return NULL;
    if (cg_team_view(&self->team, &of->team, bell, theirs)) {
        Py_DECREF(self);
        PyErr_NoMemory();
        return NULL;
    }
    self->team.user = self;
    self->turn = of->turn;
    self->of = (Team *)Py_NewRef(of);
    self->segment = (Segment *)Py_NewRef(of->segment);
    return self;
}

static void team_dealloc(PyObject *self) {
    Team *team = (Team *)self;
    if (team->of != NULL) cg_team_leave_view(&team->team, &team->of->team);
    else cg_team_leave(&team->team);
    Py_XDECREF((PyObject *)team->of);
    Py_XDECREF((PyObject *)team->segment);
    free_object(self);
}

static PyObject *team_close(PyObject *self, PyObject *args) {
    int failed = 0;
    if (!PyArg_ParseTuple(args, "|p", &failed)) return NULL;
    cg_team_close(&((Team *)self)->team, failed);
    Py_RETURN_NONE;
}

static PyObject *team_state(PyObject *self, PyObject *arg) {
    long seat = PyLong_AsLong(arg);
    Team *team = (Team *)self;
    if (seat < 0 || seat >= team->team.n) return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_IndexError, "seat %ld", seat);
    return PyLong_FromUnsignedLong(atomic_load_explicit(&team->team.seats[seat].state, memory_order_acquire));
}

static PyObject *team_lost(PyObject *self, PyObject *unused) {
    (void)unused;
    Team *team = (Team *)self;
    int who = -1;
    /* A thread that waits looks by itself, through the same descriptors; none can begin to while this one holds the interpreter. */
    int result = team->busy ? CG_OK : cg_team_lost(&team->team, &who);
    return result == CG_OK ? Py_NewRef(Py_None) : Py_BuildValue("(ii)", result, who);
}

static PyObject *team_unpost(PyObject *self, PyObject *unused) {
    (void)unused;
    Team *team = (Team *)self;
    atomic_store_explicit(&team->team.seats[team->team.me].posted, 0, memory_order_release);
    Py_RETURN_NONE;
}

static PyMethodDef team_methods[] = {
    {"close", team_close, METH_VARARGS, "close(failed=False)\n--\n\nLeaves for good and wakes everybody; from any thread."},
    {"state", team_state, METH_O, "state(seat)\n--\n\n0 empty, 1 taken, 2 left, 3 left after an error."},
    {"lost", team_lost, METH_NOARGS, "lost()\n--\n\n(code, seat) of one that left or died, as in Stopped; None: nobody, or a thread waits and looks."},
    {"unpost", team_unpost, METH_NOARGS, "unpost()\n--\n\nTakes back that the call last begun was begun."},
    {0}};
static PyType_Slot team_slots[] = {
    {Py_tp_doc, "Team(segment, offset, n, me, crowd)\n--\n\nA seat among n, in memory that all have mapped. `crowd`: how many of them share the cores here."},
    {Py_tp_new, team_new}, {Py_tp_dealloc, team_dealloc}, {Py_tp_methods, team_methods}, {0}};
static PyType_Spec team_spec = {"commgraph.shm._native.Team", sizeof(Team), 0, Py_TPFLAGS_DEFAULT, team_slots};

/* Group. */

static PyObject *group_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    (void)kwargs;
    PyObject *team, *pool, *tensor_type, *exchange, *describe;
    Py_ssize_t offset, slot_bytes;
    long long timeout;
    if (!PyArg_ParseTuple(args, "OOnnLOOO", &team, &pool, &offset, &slot_bytes, &timeout, &tensor_type, &exchange, &describe)) return NULL;
    module_state *state = PyType_GetModuleState(type);
    if (state == NULL || !PyObject_TypeCheck(team, state->team) || !PyObject_TypeCheck(pool, state->pool) || !PyType_Check(tensor_type))
        return PyErr_Format(PyExc_TypeError, "Group(team, pool, offset, slot_bytes, timeout_ns, tensor_type, exchange, describe)");
    cg_team *view = &((Team *)team)->team;
    if (offset % 4096 || slot_bytes % 4096 || (size_t)offset + cg_group_bytes(view->n, (size_t)slot_bytes) > ((Team *)team)->segment->bytes)
        return PyErr_Format(PyExc_ValueError, "a group at %zd with slots of %zd bytes does not fit into the segment", offset, slot_bytes);
    const dl_exchange *api = NULL;
    if (exchange != Py_None) {
        api = PyCapsule_GetPointer(exchange, "dlpack_exchange_api");
        if (api == NULL) return NULL;
        if (api->version.major != 1 || api->view_of_object == NULL) api = NULL; /* then tensors come by their addresses */
    }
    Group *self = (Group *)allocate(type);
    if (self == NULL) return NULL;
    self->regions = PyList_New(0);
    cg_group_join(&self->group, view, ((Team *)team)->segment->base + offset, (size_t)slot_bytes);
    self->team = (Team *)Py_NewRef(team);
    self->pool = (Pool *)Py_NewRef(pool);
    self->tensor_type = (PyTypeObject *)Py_NewRef(tensor_type);
    self->describe = Py_NewRef(describe);
    self->exchange = api;
    self->timeout_ns = timeout;
    self->enabled = 1;
    return (PyObject *)self;
}

static int group_traverse(PyObject *self, visitproc visit, void *arg) {
    Group *group = (Group *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(group->describe);
    Py_VISIT(group->regions);
    return 0;
}

static int group_clear(PyObject *self) {
    Py_CLEAR(((Group *)self)->describe);
    return 0;
}

static void group_dealloc(PyObject *self) {
    PyObject_GC_UnTrack(self);
    Group *group = (Group *)self;
    cg_group_leave(&group->group);
    Py_XDECREF((PyObject *)group->team);
    Py_XDECREF((PyObject *)group->pool);
    Py_XDECREF(group->regions);
    Py_XDECREF((PyObject *)group->tensor_type);
    Py_XDECREF(group->describe);
    free_object(self);
}

static PyObject *finished(Group *group, int result, int who) {
    if (result == CG_OK) return Py_NewRef(Py_None);
    group->enabled = 0;
    return raise_stopped((PyObject *)group, result, who);
}

static PyObject *group_barrier(PyObject *self, PyObject *args) {
    Group *group = (Group *)self;
    unsigned long tag;
    long long timeout;
    if (!PyArg_ParseTuple(args, "kL", &tag, &timeout)) return NULL;
    cg_call call = {(uint32_t)tag, call_word(group, OP_BARRIER), deadline_after(timeout)};
    int who = 0;
    if (!enter(group->team)) return NULL;
    int result = cg_barrier(&group->group, &call, &who);
    leave(group->team);
    return finished(group, result, who);
}

static PyObject *group_all_reduce(PyObject *self, PyObject *args) {
    Group *group = (Group *)self;
    unsigned long tag;
    long long timeout;
    unsigned long long from, to;
    Py_ssize_t count;
    int dtype, op, in_place;
    if (!PyArg_ParseTuple(args, "kLKKniip", &tag, &timeout, &from, &to, &count, &dtype, &op, &in_place)) return NULL;
    if (dtype < 0 || dtype >= CG_DTYPES || op < 0 || op >= CG_OPS || cg_find_kernel(dtype, op) == NULL)
        return PyErr_Format(PyExc_ValueError, "no kernel for dtype %d and op %d", dtype, op);
    cg_call call = {(uint32_t)tag, call_word(group, in_place ? OP_ALL_REDUCE_ : OP_ALL_REDUCE), deadline_after(timeout)};
    int who = 0;
    if (!enter(group->team)) return NULL;
    int result = cg_all_reduce(&group->group, &call, (void *)(uintptr_t)from, (void *)(uintptr_t)to, (size_t)count, dtype, op, in_place, &who);
    leave(group->team);
    return finished(group, result, who);
}

/* A sequence of n blocks (address, rows, row, pitch); None for one that is not wanted. */
static int parse_blocks(PyObject *sequence, cg_block *blocks, int n) {
    if (PySequence_Size(sequence) != n) {
        if (!PyErr_Occurred()) PyErr_Format(PyExc_ValueError, "%d blocks are needed", n);
        return 0;
    }
    for (int i = 0; i < n; i++) {
        PyObject *item = PySequence_GetItem(sequence, i);
        if (item == NULL) return 0;
        memset(&blocks[i], 0, sizeof blocks[i]);
        unsigned long long base = 0;
        Py_ssize_t rows = 0, row = 0, pitch = 0;
        int fine = item == Py_None || PyArg_ParseTuple(item, "Knnn", &base, &rows, &row, &pitch);
        Py_DECREF(item);
        if (!fine) return 0;
        blocks[i] = (cg_block){(char *)(uintptr_t)base, (size_t)rows, (size_t)row, (size_t)pitch};
    }
    return 1;
}

static PyObject *group_share(PyObject *self, PyObject *args) {
    Group *group = (Group *)self;
    unsigned long tag;
    long long timeout;
    unsigned long long mine;
    int operation;
    PyObject *sizes, *blocks;
    if (!PyArg_ParseTuple(args, "ikLKOO", &operation, &tag, &timeout, &mine, &sizes, &blocks)) return NULL;
    int n = group->group.n;
    cg_block into[n];
    size_t bytes[n];
    if (!parse_blocks(blocks, into, n)) return NULL;
    if (PySequence_Size(sizes) != n) return PyErr_Format(PyExc_ValueError, "%d sizes are needed", n);
    for (int i = 0; i < n; i++) {
        PyObject *item = PySequence_GetItem(sizes, i);
        bytes[i] = item == NULL ? 0 : PyLong_AsSize_t(item);
        Py_XDECREF(item);
        if (PyErr_Occurred()) return NULL;
    }
    cg_call call = {(uint32_t)tag, call_word(group, operation), deadline_after(timeout)};
    int who = 0;
    if (!enter(group->team)) return NULL;
    int result = cg_share(&group->group, &call, (char *)(uintptr_t)mine, bytes, into, &who);
    leave(group->team);
    return finished(group, result, who);
}

static PyObject *group_trade(PyObject *self, PyObject *args) {
    Group *group = (Group *)self;
    unsigned long tag;
    long long timeout;
    PyObject *sends, *receives;
    if (!PyArg_ParseTuple(args, "kLOO", &tag, &timeout, &sends, &receives)) return NULL;
    int n = group->group.n;
    cg_block out[n], into[n];
    if (!parse_blocks(sends, out, n) || !parse_blocks(receives, into, n)) return NULL;
    cg_call call = {(uint32_t)tag, call_word(group, OP_ALL_TO_ALL), deadline_after(timeout)};
    int who = 0;
    if (!enter(group->team)) return NULL;
    int result = cg_trade(&group->group, &call, out, into, &who);
    leave(group->team);
    return finished(group, result, who);
}

static PyObject *group_reduce_scatter(PyObject *self, PyObject *args) {
    Group *group = (Group *)self;
    unsigned long tag;
    long long timeout;
    PyObject *sends;
    unsigned long long to;
    int dtype, op;
    if (!PyArg_ParseTuple(args, "kLOKii", &tag, &timeout, &sends, &to, &dtype, &op)) return NULL;
    if (dtype < 0 || dtype >= CG_DTYPES || op < 0 || op >= CG_OPS || cg_find_kernel(dtype, op) == NULL)
        return PyErr_Format(PyExc_ValueError, "no kernel for dtype %d and op %d", dtype, op);
    cg_block out[group->group.n];
    if (!parse_blocks(sends, out, group->group.n)) return NULL;
    cg_call call = {(uint32_t)tag, call_word(group, OP_REDUCE_SCATTER), deadline_after(timeout)};
    int who = 0;
    if (!enter(group->team)) return NULL;
    int result = cg_reduce_scatter(&group->group, &call, out, (void *)(uintptr_t)to, dtype, op, &who);
    leave(group->team);
    return finished(group, result, who);
}

static PyObject *group_ping_pong(PyObject *self, PyObject *args) {
    Group *group = (Group *)self;
    unsigned long tag;
    long long timeout;
    int rounds;
    if (!PyArg_ParseTuple(args, "kLi", &tag, &timeout, &rounds)) return NULL;
    cg_call call = {(uint32_t)tag, call_word(group, OP_BARRIER), deadline_after(timeout)};
    int who = 0;
    double ns = 0;
    if (!enter(group->team)) return NULL;
    int result = cg_ping_pong(&group->group, &call, rounds, &ns, &who);
    leave(group->team);
    if (result == CG_OK) return PyFloat_FromDouble(ns);
    return finished(group, result, who);
}

static PyObject *group_reach(PyObject *self, PyObject *args) {
    Group *group = (Group *)self;
    unsigned long tag;
    long long timeout;
    if (!PyArg_ParseTuple(args, "kL", &tag, &timeout)) return NULL;
    cg_call call = {(uint32_t)tag, call_word(group, OP_BARRIER), deadline_after(timeout)};
    int who = 0;
    if (!enter(group->team)) return NULL;
    int result = cg_group_reach(&group->group, &call, &who);
    leave(group->team);
    return finished(group, result, who);
}

static PyObject *get_reaches(PyObject *self, void *closure) {
    (void)closure;
    return PyBool_FromLong(((Group *)self)->group.reach_from != 0);
}

static PyObject *group_add_region(PyObject *self, PyObject *args) {
    Group *group = (Group *)self;
    PyObject *segment;
    Py_ssize_t offset, stride, bytes;
    if (!PyArg_ParseTuple(args, "Onnn", &segment, &offset, &stride, &bytes)) return NULL;
    if (!PyObject_TypeCheck(segment, state_of(self)->segment)) return PyErr_Format(PyExc_TypeError, "a Segment is needed");
    if ((size_t)offset + (size_t)(group->group.n - 1) * (size_t)stride + (size_t)bytes > ((Segment *)segment)->bytes)
        return PyErr_Format(PyExc_ValueError, "the region does not fit into its segment");
    if (PyList_Append(group->regions, segment) < 0) return NULL;
    int error = cg_group_add_region(&group->group, ((Segment *)segment)->base + offset, (size_t)stride, (size_t)bytes);
    if (error == ENOSPC) return PyErr_Format(PyExc_RuntimeError, "a group has at most %d shared tensors", CG_MAX_REGIONS);
    return error ? PyErr_NoMemory() : Py_NewRef(Py_None);
}

/* Notes: what a rank says about its last call, once the ranks differ. */

static PyObject *group_post_note(PyObject *self, PyObject *arg) {
    Group *group = (Group *)self;
    char *text;
    Py_ssize_t length;
    if (PyBytes_AsStringAndSize(arg, &text, &length) < 0) return NULL;
    if (length > CG_NOTE_BYTES - 4) length = CG_NOTE_BYTES - 4;
    char *note = group->group.notes + (size_t)group->group.me * CG_NOTE_BYTES;
    memcpy(note + 4, text, (size_t)length);
    atomic_store_explicit((_Atomic uint32_t *)(void *)note, (uint32_t)length, memory_order_release);
    Py_RETURN_NONE;
}

static PyObject *group_read_note(PyObject *self, PyObject *arg) {
    Group *group = (Group *)self;
    long rank = PyLong_AsLong(arg);
    if (rank < 0 || rank >= group->group.n) return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_IndexError, "rank %ld", rank);
    char *note = group->group.notes + (size_t)rank * CG_NOTE_BYTES;
    uint32_t length = atomic_load_explicit((_Atomic uint32_t *)(void *)note, memory_order_acquire);
    if (length == 0 || length > CG_NOTE_BYTES - 4) Py_RETURN_NONE;
    return PyBytes_FromStringAndSize(note + 4, (Py_ssize_t)length);
}

/* Bytes that each rank said to send to and to expect from each, in the call last begun: a list of (out, in) per rank. */
static PyObject *group_pairs(PyObject *self, PyObject *unused) {
    (void)unused;
    cg_group *g = &((Group *)self)->group;
    PyObject *all = PyList_New(0);
    for (int rank = 0; all != NULL && rank < g->n; rank++) {
        PyObject *both = PyList_New(0);
        for (int side = 0; both != NULL && side < 2; side++) {
            uint64_t *row = cg_pair_row(g, rank, side == 0 ? CG_OUT : CG_IN);
            for (int p = 0; p < g->n; p++) {
                PyObject *number = PyLong_FromUnsignedLongLong(row[p]);
                if (number == NULL || PyList_Append(both, number) < 0) Py_CLEAR(both);
                Py_XDECREF(number);
                if (both == NULL) break;
            }
        }
        if (both == NULL || PyList_Append(all, both) < 0) Py_CLEAR(all);
        Py_XDECREF(both);
    }
    return all;
}

#define PROPERTY_UINT(name, field)                                                   \
    static PyObject *get_##name(PyObject *self, void *closure) {                     \
        (void)closure;                                                               \
        return PyLong_FromUnsignedLongLong((unsigned long long)((Group *)self)->field); \
    }                                                                                \
    static int set_##name(PyObject *self, PyObject *value, void *closure) {          \
        (void)closure;                                                               \
        if (value == NULL) return PyErr_SetString(PyExc_AttributeError, #name), -1;  \
        unsigned long long number = PyLong_AsUnsignedLongLong(value);                \
        if (PyErr_Occurred()) return -1;                                             \
        ((Group *)self)->field = number;                                             \
        return 0;                                                                    \
    }
PROPERTY_UINT(sequence, sequence)
PROPERTY_UINT(enabled, enabled)
PROPERTY_UINT(held, held)
PROPERTY_UINT(bytes_sent, group.bytes_sent)

static PyObject *get_way(PyObject *self, void *closure) {
    (void)closure;
    return PyLong_FromLong(((Group *)self)->group.way);
}
static int set_way(PyObject *self, PyObject *value, void *closure) {
    (void)closure;
    long way = value == NULL ? -1 : PyLong_AsLong(value);
    if (PyErr_Occurred()) return -1;
    ((Group *)self)->group.way = (int)way;
    return 0;
}

static PyGetSetDef group_getset[] = {
    {"sequence", get_sequence, set_sequence, "calls begun", NULL},
    {"enabled", get_enabled, set_enabled, "whether the short way is open", NULL},
    {"held", get_held, set_held, "whether the short way waits for calls that were begun before", NULL},
    {"bytes_sent", get_bytes_sent, set_bytes_sent, "bytes given to the others", NULL},
    {"reaches", get_reaches, NULL, "whether the ranks may read each other's memory", NULL},
    {"way", get_way, set_way, "how slots are written: 0 plain, 1 streaming, -1 by measurement", NULL},
    {0}};
static PyMethodDef group_methods[] = {
    {"barrier", group_barrier, METH_VARARGS, "barrier(tag, timeout_ns)\n--\n\n"},
    {"all_reduce", group_all_reduce, METH_VARARGS, "all_reduce(tag, timeout_ns, from, to, count, dtype, op, in_place)\n--\n\n"},
    {"share", group_share, METH_VARARGS, "share(operation, tag, timeout_ns, mine, bytes, into)\n--\n\n"},
    {"trade", group_trade, METH_VARARGS, "trade(tag, timeout_ns, out, into)\n--\n\n"},
    {"reduce_scatter", group_reduce_scatter, METH_VARARGS, "reduce_scatter(tag, timeout_ns, out, to, dtype, op)\n--\n\n"},
    {"ping_pong", group_ping_pong, METH_VARARGS, "ping_pong(tag, timeout_ns, rounds)\n--\n\nNanoseconds, one way."},
    {"add_region", group_add_region, METH_VARARGS, "add_region(segment, offset, stride, bytes)\n--\n\n"},
    {"post_note", group_post_note, METH_O, "post_note(text)\n--\n\n"},
    {"read_note", group_read_note, METH_O, "read_note(rank)\n--\n\n"},
    {"reach", group_reach, METH_VARARGS, "reach(tag, timeout_ns)\n--\n\nFinds out whether the ranks may read each other's memory."},
    {"pairs", group_pairs, METH_NOARGS, "pairs()\n--\n\n"},
    {0}};
static PyType_Slot group_slots[] = {
    {Py_tp_doc, "Group(team, pool, offset, slot_bytes, timeout_ns, tensor_type, exchange, describe)\n--\n\nCollectives of a team."},
    {Py_tp_new, group_new}, {Py_tp_dealloc, group_dealloc}, {Py_tp_traverse, group_traverse}, {Py_tp_clear, group_clear},
    {Py_tp_methods, group_methods}, {Py_tp_getset, group_getset}, {0}};
static PyType_Spec group_spec = {"commgraph.shm._native.Group", sizeof(Group), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, group_slots};

/* Ring. */

typedef struct {
    PyObject_HEAD
    cg_ring ring;
    Team *team;
    Pool *pool;
    PyObject *parts; /* of the record that is being read, a list; and how far the last of them is */
    size_t done;
} Ring;

static PyObject *ring_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    (void)kwargs;
    PyObject *team, *pool;
    Py_ssize_t offset, capacity;
    int writer, first_reader, n_readers, collective, private;
    if (!PyArg_ParseTuple(args, "OOniiinpp", &team, &pool, &offset, &writer, &first_reader, &n_readers, &capacity, &collective, &private))
        return NULL;
    module_state *state = PyType_GetModuleState(type);
    if (state == NULL || !PyObject_TypeCheck(team, state->team) || !PyObject_TypeCheck(pool, state->pool))
        return PyErr_Format(PyExc_TypeError, "Ring(team, pool, offset, writer, first_reader, n_readers, capacity, collective, private)");
    if (offset % CG_LINE || capacity < 1024 || (size_t)offset + cg_ring_bytes(n_readers, (size_t)capacity) > ((Team *)team)->segment->bytes)
        return PyErr_Format(PyExc_ValueError, "a ring of %zd bytes at %zd does not fit into the segment", capacity, offset);
    if (private && n_readers != 1) return PyErr_Format(PyExc_ValueError, "a ring with %d readers cannot be private to two", n_readers);
    Ring *self = (Ring *)allocate(type);
    if (self == NULL) return NULL;
    char *memory = ((Team *)team)->segment->base + offset;
    int writes = ((Team *)team)->team.me == writer;
    self->team = private ? new_view(state, (Team *)team, cg_ring_bell(memory, writes), cg_ring_bell(memory, !writes)) : (Team *)Py_NewRef(team);
    if (self->team == NULL) {
        Py_DECREF(self);
        return NULL;
    }
    self->pool = (Pool *)Py_NewRef(pool);
    cg_ring_join(&self->ring, &self->team->team, memory, writer, first_reader, n_readers, (size_t)capacity);
    self->ring.collective = collective;
    self->ring.private = private;
    return (PyObject *)self;
}

static void ring_dealloc(PyObject *self) {
    Ring *ring = (Ring *)self;
    cg_ring_leave(&ring->ring);
    Py_XDECREF(ring->parts);
    Py_XDECREF((PyObject *)ring->team);
    Py_XDECREF((PyObject *)ring->pool);
    free_object(self);
}

enum { FEW_PARTS = 8 };

/* put(kind, meta, parts, timeout_ns, posted): a part is a buffer, or (address, bytes) of memory that the caller keeps alive. */
static PyObject *ring_put(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    Ring *ring = (Ring *)self;
    if (nargs != 5) return PyErr_Format(PyExc_TypeError, "put(kind, meta, parts, timeout_ns, posted)");
    unsigned long kind = PyLong_AsUnsignedLong(args[0]);
    unsigned long long meta = PyLong_AsUnsignedLongLong(args[1]), posted = PyLong_AsUnsignedLongLong(args[4]);
    int64_t timeout = PyLong_AsLongLong(args[3]);
    if (PyErr_Occurred()) return NULL;
    Py_ssize_t n = PyTuple_Size(args[2]);
    if (n < 0) return NULL;
    cg_part few[FEW_PARTS], *parts = few;
    Py_buffer few_views[FEW_PARTS], *views = few_views;
    if (n > FEW_PARTS) {
        parts = PyMem_Malloc(sizeof *parts * (size_t)n);
        views = PyMem_Malloc(sizeof *views * (size_t)n);
    }
    Py_ssize_t held = 0;
    int who = 0, result = CG_NOMEM, entered = 0;
    if (parts != NULL && views != NULL) {
        for (; held < n; held++) {
            PyObject *item = PyTuple_GetItem(args[2], held);
            views[held].obj = NULL; /* nothing to be released */
            if (PyTuple_Check(item)) {
                unsigned long long address;
                Py_ssize_t bytes;
                if (!PyArg_ParseTuple(item, "Kn", &address, &bytes)) break;
                parts[held] = (cg_part){(void *)(uintptr_t)address, (size_t)bytes};
                continue;
            }
            /* PyBUF_SIMPLE: contiguous bytes, or an error */
            if (PyObject_GetBuffer(item, &views[held], PyBUF_SIMPLE) < 0) break;
            parts[held] = (cg_part){views[held].buf, (size_t)views[held].len};
        }
        if (held == n && enter(ring->team)) {
            entered = 1;
            if (posted) atomic_store_explicit(&ring->team->team.seats[ring->team->team.me].posted, posted, memory_order_release);
            result = cg_ring_put(&ring->ring, (uint32_t)kind, meta, parts, (uint32_t)n, deadline_after(timeout), &who);
            leave(ring->team);
        }
    }
    for (Py_ssize_t i = 0; i < held; i++) PyBuffer_Release(&views[i]);
    if (n > FEW_PARTS) {
        PyMem_Free(parts);
        PyMem_Free(views);
    }
    if (!entered && PyErr_Occurred()) return NULL;
    return result == CG_OK ? Py_NewRef(Py_None) : raise_stopped(self, result, who);
}

/* Waits for a record; (kind, meta, sizes). */
static int wait_next(Ring *ring, int64_t deadline, unsigned long long posted, int *who) {
    if (posted) atomic_store_explicit(&ring->team->team.seats[ring->team->team.me].posted, posted, memory_order_release);
    return cg_ring_next(&ring->ring, deadline, who);
}

static PyObject *ring_peek(PyObject *self, PyObject *args) {
    Ring *ring = (Ring *)self;
    long long timeout;
    unsigned long long posted;
    if (!PyArg_ParseTuple(args, "LK", &timeout, &posted)) return NULL;
    int who = 0;
    if (!enter(ring->team)) return NULL;
    int result = wait_next(ring, deadline_after(timeout), posted, &who);
    leave(ring->team);
    if (result != CG_OK) return raise_stopped(self, result, who);
    const cg_record *record = &ring->ring.record;
    PyObject *sizes = PyTuple_New(record->n_parts);
    for (uint32_t i = 0; sizes != NULL && i < record->n_parts; i++) {
        PyObject *size = PyLong_FromUnsignedLongLong(ring->ring.sizes[i]);
        if (size == NULL || PyTuple_SetItem(sizes, i, size) < 0) Py_CLEAR(sizes);
    }
    if (sizes == NULL) return NULL;
    return Py_BuildValue("(kKN)", (unsigned long)record->kind, (unsigned long long)record->meta, sizes);
}

/* Where the next part is to be read to: bytes for the first, which is a pickle, a Block for the others. */
static char *new_part(Ring *ring, PyObject **part) {
    size_t index = (size_t)PyList_Size(ring->parts), bytes = (size_t)ring->ring.sizes[index];
    if (index == 0) {
        *part = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)bytes);
        return *part == NULL ? NULL : PyBytes_AsString(*part);
    }
    Block *block = take_block((PyObject *)ring, ring->pool, bytes);
    *part = (PyObject *)block;
    return block == NULL ? NULL : block->base;
}

/* get(timeout_ns, posted): (kind, meta, first part as bytes, the others as Blocks ...) */
static PyObject *ring_get(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    Ring *ring = (Ring *)self;
    if (nargs != 2) return PyErr_Format(PyExc_TypeError, "get(timeout_ns, posted)");
    int64_t timeout = PyLong_AsLongLong(args[0]);
    unsigned long long posted = PyLong_AsUnsignedLongLong(args[1]);
    if (PyErr_Occurred()) return NULL;
    int64_t deadline = deadline_after(timeout);
    int who = 0;
    for (;;) {
        if (ring->parts == NULL) {
            if (!enter(ring->team)) return NULL;
            int result = wait_next(ring, deadline, posted, &who);
            leave(ring->team);
            if (result != CG_OK) return raise_stopped(self, result, who);
            ring->parts = PyList_New(0);
            ring->done = 0;
            if (ring->parts == NULL) return NULL;
        }
        int result = CG_OK;
        for (uint32_t n = ring->ring.record.n_parts; result == CG_OK;) {
            Py_ssize_t have = PyList_Size(ring->parts);
            PyObject *part = have ? PyList_GetItem(ring->parts, have - 1) : NULL; /* borrowed */
            char *memory;
            if (have == 0 || ring->done == ring->ring.sizes[have - 1]) {
                if ((uint32_t)have == n) break;
                memory = new_part(ring, &part);
                if (memory == NULL) return NULL;
                int failed = PyList_Append(ring->parts, part) < 0;
                Py_DECREF(part); /* the list holds it */
                if (failed) return NULL;
                have++;
                ring->done = 0;
            } else {
                memory = have == 1 ? PyBytes_AsString(part) : ((Block *)part)->base;
            }
            if (!enter(ring->team)) return NULL;
            result = cg_ring_read(&ring->ring, memory, (size_t)ring->ring.sizes[have - 1], &ring->done, deadline, &who);
            leave(ring->team);
        }
        if (result == CG_OK) break;
        if (result != CG_RESTART) return raise_stopped(self, result, who);
        Py_CLEAR(ring->parts);
    }
    cg_ring_finish(&ring->ring);
    PyObject *parts = ring->parts;
    ring->parts = NULL;
    return Py_BuildValue("(kKN)", (unsigned long)ring->ring.record.kind, (unsigned long long)ring->ring.record.meta, parts);
}

static PyObject *ring_reading(PyObject *self, void *closure) {
    (void)closure;
    return PyBool_FromLong(((Ring *)self)->parts != NULL);
}

/* take(timeout_ns, [(address, bytes), ...]): reads the parts of the record that `peek` found to memory of the caller's. */
static PyObject *ring_take(PyObject *self, PyObject *args) {
    Ring *ring = (Ring *)self;
    long long timeout;
    PyObject *targets;
    if (!PyArg_ParseTuple(args, "LO", &timeout, &targets)) return NULL;
    int64_t deadline = deadline_after(timeout);
    Py_ssize_t n = PySequence_Size(targets);
    if (n < 0) return NULL;
    if (!ring->ring.in_record || (uint32_t)n != ring->ring.record.n_parts) return PyErr_Format(PyExc_ValueError, "another number of parts");
    int result = CG_OK, who = 0;
    for (Py_ssize_t i = 0; i < n && result == CG_OK; i++) {
        PyObject *target = PySequence_GetItem(targets, i);
        unsigned long long address;
        Py_ssize_t bytes;
        int fine = target != NULL && PyArg_ParseTuple(target, "Kn", &address, &bytes);
        Py_XDECREF(target);
        if (!fine) return NULL;
        if ((uint64_t)bytes != ring->ring.sizes[i]) return PyErr_Format(PyExc_ValueError, "part %zd has another size", i);
        size_t done = 0;
        if (!enter(ring->team)) return NULL;
        result = cg_ring_read(&ring->ring, (void *)(uintptr_t)address, (size_t)bytes, &done, deadline, &who);
        leave(ring->team);
    }
    if (result != CG_OK) return raise_stopped(self, result, who);
    cg_ring_finish(&ring->ring);
    Py_RETURN_NONE;
}

static PyObject *ring_leave_out(PyObject *self, PyObject *arg) {
    cg_ring *ring = &((Ring *)self)->ring;
    long reader = PyLong_AsLong(arg);
    if (reader < 0 || reader >= ring->n_readers) return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_IndexError, "reader %ld", reader);
    return PyBool_FromLong(cg_ring_leave_out(ring, (int)reader));
}

static PyMethodDef ring_methods[] = {
    {"put", (PyCFunction)(void (*)(void))ring_put, METH_FASTCALL, "put(kind, meta, parts, timeout_ns, posted)\n--\n\nWrites a record."},
    {"get", (PyCFunction)(void (*)(void))ring_get, METH_FASTCALL, "get(timeout_ns, posted)\n--\n\n(kind, meta, parts) of the next record."},
    {"peek", ring_peek, METH_VARARGS, "peek(timeout_ns, posted)\n--\n\n(kind, meta, sizes) of the next record, which stays."},
    {"take", ring_take, METH_VARARGS, "take(timeout_ns, targets)\n--\n\nReads the parts of the record that was peeked at."},
    {"leave_out", ring_leave_out, METH_O, "leave_out(reader)\n--\n\nGoes on without a reader that has not sat down; False if it has."},
    {0}};
static PyGetSetDef ring_getset[] = {{"reading", ring_reading, NULL, "whether a `get` ended halfway: it goes on, and nothing else can", NULL}, {0}};
static PyType_Slot ring_slots[] = {
    {Py_tp_doc, "Ring(team, pool, offset, writer, first_reader, n_readers, capacity, collective, private)\n--\n\nRecords from one seat to others; `private`: to "
                "one, with a view of its own, so that a thread may use it while another is in a call of the team."},
    {Py_tp_new, ring_new}, {Py_tp_dealloc, ring_dealloc}, {Py_tp_methods, ring_methods}, {Py_tp_getset, ring_getset}, {0}};
static PyType_Spec ring_spec = {"commgraph.shm._native.Ring", sizeof(Ring), 0, Py_TPFLAGS_DEFAULT, ring_slots};

/* The module. */

static PyObject *module_layout(PyObject *module, PyObject *args) {
    (void)module;
    int n;
    Py_ssize_t slot_bytes;
    if (!PyArg_ParseTuple(args, "in", &n, &slot_bytes)) return NULL;
    return Py_BuildValue("(nn)", (Py_ssize_t)(sizeof(cg_seat) * (size_t)n), (Py_ssize_t)cg_group_bytes(n, (size_t)slot_bytes));
}

static PyObject *module_ring_bytes(PyObject *module, PyObject *args) {
    (void)module;
    int n_readers;
    Py_ssize_t capacity;
    if (!PyArg_ParseTuple(args, "in", &n_readers, &capacity)) return NULL;
    return PyLong_FromSize_t(cg_ring_bytes(n_readers, (size_t)capacity));
}

static PyMethodDef module_methods[] = {
    {"group_layout", module_layout, METH_VARARGS, "group_layout(n, slot_bytes)\n--\n\nBytes of the seats of n, and of a group's memory."},
    {"ring_bytes", module_ring_bytes, METH_VARARGS, "ring_bytes(n_readers, capacity)\n--\n\n"},
    {0}};

static int add_type(PyObject *module, PyTypeObject **slot, PyType_Spec *spec) {
    *slot = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
    return *slot == NULL ? -1 : PyModule_AddType(module, *slot);
}

static int module_exec(PyObject *module) {
    module_state *state = PyModule_GetState(module);
    PyObject *home = PyImport_ImportModule("commgraph.shm.stopped");
    state->stopped = home == NULL ? NULL : PyObject_GetAttrString(home, "Stopped");
    state->busy = home == NULL ? NULL : PyObject_GetAttrString(home, "Busy");
    Py_XDECREF(home);
    if (state->stopped == NULL || state->busy == NULL) return -1;
    if (add_type(module, &state->segment, &segment_spec) < 0 || add_type(module, &state->pool, &pool_spec) < 0 ||
        add_type(module, &state->block, &block_spec) < 0 || add_type(module, &state->team, &team_spec) < 0 ||
        add_type(module, &state->group, &group_spec) < 0 || add_type(module, &state->ring, &ring_spec) < 0 ||
        add_type(module, &state->door, &door_spec) < 0)
        return -1;
    state->requires_grad = PyUnicode_InternFromString("requires_grad");
    state->is_neg = PyUnicode_InternFromString("is_neg");
    state->is_inference = PyUnicode_InternFromString("is_inference");
    static const struct {
        const char *name;
        int value;
    } numbers[] = {
        {"OP_ALL_GATHER", OP_ALL_GATHER}, {"OP_GATHER", OP_GATHER}, {"OP_BROADCAST", OP_BROADCAST}, {"OP_OBJECT", OP_OBJECT},
    };
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (PyModule_AddIntConstant(module, numbers[i].name, numbers[i].value) < 0) return -1;
    return PyModule_AddStringConstant(module, "isa", cg_kernel_isa());
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, module_exec}, {0}};
static int module_traverse(PyObject *module, visitproc visit, void *arg) {
    module_state *state = PyModule_GetState(module);
    Py_VISIT(state->stopped);
    Py_VISIT(state->busy);
    Py_VISIT(state->segment);
    Py_VISIT(state->pool);
    Py_VISIT(state->block);
    Py_VISIT(state->team);
    Py_VISIT(state->group);
    Py_VISIT(state->ring);
    Py_VISIT(state->door);
    return 0;
}

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT, .m_name = "_native", .m_doc = "Shared memory between the ranks of one host.", .m_size = sizeof(module_state),
    .m_methods = module_methods, .m_slots = module_slots, .m_traverse = module_traverse};

PyMODINIT_FUNC PyInit__native(void);
PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&module_def); }
