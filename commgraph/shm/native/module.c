#define _GNU_SOURCE
#include "recorder.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static struct PyModuleDef module_def;

module_state *state_of(PyObject *self) { return PyType_GetModuleState(Py_TYPE(self)); }

int64_t deadline_after(int64_t timeout_ns) {
    int64_t now = cg_clock_ns();
    if (timeout_ns < 0) timeout_ns = 0; /* a negative deadline would count from the begin of the wait */
    return timeout_ns > INT64_MAX - now ? INT64_MAX : now + timeout_ns;
}

uint64_t call_word(const Calls *calls, int operation) { return calls->sequence ? (calls->sequence - 1) << 8 | (uint64_t)operation : 0; }

int parse_timeout(PyObject *self, PyObject *value, int64_t standard_ns, int64_t *ns) {
    if (value == Py_None) {
        *ns = standard_ns;
        return 1;
    }
    PyObject *total = NULL;
    if (!PyFloat_CheckExact(value) && !PyLong_CheckExact(value)) {
        module_state *state = state_of(self);
        if (!PyObject_TypeCheck(value, state->timedelta)) return 0;
        value = total = PyObject_CallMethodObjArgs(value, state->total_seconds, NULL);
        if (total == NULL) return -1;
    }
    double seconds = PyFloat_AsDouble(value);
    Py_XDECREF(total);
    if (seconds == -1.0 && PyErr_Occurred()) {
        PyErr_Clear(); /* a number beyond a double */
        return 0;
    }
    if (!(seconds > 0 && seconds < 1e9)) return 0; /* the general path raises, or limits it */
    *ns = (int64_t)(seconds * 1e9);
    return 1;
}

/* Probes the first and the last byte, which are asked for by the system call that other ranks would read them by: EFAULT, not a signal. */
int is_memory(const void *data, size_t bytes) {
    if (bytes == 0) return 1;
    char here[2];
    if (bytes <= PTRDIFF_MAX && (uintptr_t)data <= UINTPTR_MAX - bytes) {
        struct iovec to = {here, 2}, from[2] = {{(void *)(uintptr_t)data, 1}, {(char *)(uintptr_t)data + bytes - 1, 1}};
        if (process_vm_readv(getpid(), &to, 1, from, 2, 0) == 2 || errno == ENOSYS || errno == EPERM) return 1;
    }
    PyErr_Format(PyExc_ValueError, "%zu bytes at %p are no memory of this process", bytes, data);
    return 0;
}

int fits(const Segment *segment, Py_ssize_t offset, size_t bytes) {
    return offset >= 0 && bytes <= segment->bytes && (size_t)offset <= segment->bytes - bytes;
}

PyObject *not_handled(void) { return PyErr_Occurred() ? NULL : Py_NewRef(Py_None); }

uint32_t make_tag(uint32_t kind, uint64_t number, uint32_t digest) { return kind << 28 | ((digest ^ (uint32_t)number * 0x9E3779B1u) & 0xFFFFFFF); }

/* Threads that wake up together would all request the interpreter, and get it through one futex after the other, each of which takes longer
 * than most of them hold it. Threads of one process therefore take turns: a thread that has returned from a wait keeps the turn until its
 * next wait. The others spin, or yield if they are on its core, for TURN_NS at most: the thread may compute for long. */
#define TURN_NS 50000

static void take_turn(Team *self) {
    if (!cg_team_has_same_process(&self->team)) return;
    uintptr_t me = (uintptr_t)pthread_self(), holder = 0;
    const int64_t patience = cg_clock_ns() + TURN_NS;
    while (!atomic_compare_exchange_weak_explicit(&self->turn->thread, &holder, me, memory_order_relaxed, memory_order_relaxed)) {
        if (holder != 0 && cg_clock_ns() > patience) {
            atomic_store_explicit(&self->turn->thread, me, memory_order_relaxed);
            break;
        }
        holder = 0;
        if (atomic_load_explicit(&self->turn->core, memory_order_relaxed) == sched_getcpu()) sched_yield();
        else for (int i = 0; i < 10; i++) cg_pause();
    }
    atomic_store_explicit(&self->turn->core, sched_getcpu(), memory_order_relaxed);
}

static void release_interpreter(Team *self) {
    if (self->before_release != NULL) self->before_release(self->releasing);
    self->saved = PyEval_SaveThread();
    uintptr_t me = (uintptr_t)pthread_self();
    atomic_compare_exchange_strong_explicit(&self->turn->thread, &me, 0, memory_order_relaxed, memory_order_relaxed);
}

static void take_interpreter(Team *self) {
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

int claim(Team *team) {
    if (*team->disowned) return raise_stopped((PyObject *)team, CG_SELF, team->team.me), 0;
    if (!team->busy) return team->busy = 1;
    PyErr_SetString(state_of((PyObject *)team)->busy, "another call of this very group or queue is under way: one thread at a time may use it");
    return 0;
}

void unclaim(Team *team) { team->busy = 0; }

void begin_work(Team *team, int keep) {
    team->brief = keep;
    if (!keep) release_interpreter(team);
}

void end_work(Team *team) {
    if (!team->brief) take_interpreter(team);
}

/* A call of same-process ranks never keeps the interpreter: it ends only after the other threads have had it. They copy and reduce
 * meanwhile. */
int keeps_interpreter(Team *team, size_t bytes) { return bytes <= BRIEF && !cg_team_has_same_process(&team->team); }

static int enter_keeping(Team *team, int keep) {
    if (!claim(team)) return 0;
    begin_work(team, keep);
    return 1;
}

int enter(Team *team) { return enter_keeping(team, 0); }

int enter_for(Team *team, size_t bytes) { return enter_keeping(team, keeps_interpreter(team, bytes)); }

void leave(Team *team) {
    end_work(team);
    unclaim(team);
}

static void pause_interpreter(cg_team *team) {
    Team *self = team->user;
    if (self->brief) release_interpreter(self);
}

static void resume_interpreter(cg_team *team) {
    Team *self = team->user;
    if (self->brief) take_interpreter(self);
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

void free_object(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

PyObject *allocate(PyTypeObject *type) { return ((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0); }

/* Segment: a mapping of a file descriptor. */

static PyObject *segment_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    (void)kwargs;
    int fd;
    Py_ssize_t bytes;
    if (!PyArg_ParseTuple(args, "in", &fd, &bytes)) return NULL;
    if (bytes <= 0) return PyErr_Format(PyExc_ValueError, "a segment of %zd bytes", bytes);
    struct stat found;
    if (fstat(fd, &found)) return PyErr_SetFromErrno(PyExc_OSError);
    if (!S_ISREG(found.st_mode) || bytes > found.st_size) /* an access beyond its end would be a SIGBUS */
        return PyErr_Format(PyExc_ValueError, "a segment of %zd bytes: descriptor %d has %lld", bytes, fd, (long long)found.st_size);
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

/* Reads every page, so that a later access causes no page fault. */
static PyObject *segment_populate(PyObject *self, PyObject *unused) {
    (void)unused;
    Segment *segment = (Segment *)self;
    Py_BEGIN_ALLOW_THREADS
    for (size_t at = 0; at < segment->bytes; at += 4096) (void)*(volatile char *)(segment->base + at);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyGetSetDef segment_getset[] = {{"address", segment_address, NULL, "address at which it is mapped", NULL}, {0}};
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

Block *take_block(PyObject *self, Pool *pool, size_t bytes) {
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

Block *block_over(PyObject *self, void *memory, size_t bytes) {
    Block *block = (Block *)allocate(state_of(self)->block);
    if (block == NULL) {
        cg_pool_give(memory);
        return NULL;
    }
    block->bytes = (Py_ssize_t)bytes;
    block->base = memory;
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
    int n, me, sharing;
    if (!PyArg_ParseTuple(args, "Oniii", &segment, &offset, &n, &me, &sharing)) return NULL;
    module_state *state = PyType_GetModuleState(type);
    if (state == NULL || !PyObject_TypeCheck(segment, state->segment)) return PyErr_Format(PyExc_TypeError, "a Segment is needed");
    if (me < 0 || me >= n || offset < 0 || offset % CG_LINE || !fits((Segment *)segment, offset, (size_t)n * sizeof(cg_member)))
        return PyErr_Format(PyExc_ValueError, "member %d of %d at %zd does not fit into the segment", me, n, offset);
    Team *self = (Team *)allocate(type);
    if (self == NULL) return NULL;
    int error = cg_team_join(&self->team, (cg_member *)(((Segment *)segment)->base + offset), n, me, sharing);
    if (error) {
        Py_DECREF(self);
        return error == EBUSY ? PyErr_Format(PyExc_ValueError, "member %d of %d has joined already", me, n) : PyErr_NoMemory();
    }
    Py_INCREF(segment);
    self->segment = (Segment *)segment;
    self->turn = &state->turn;
    self->disowned = &self->is_disowned;
    self->team.pause = pause_interpreter;
    self->team.resume = resume_interpreter;
    self->team.interrupted = interrupted;
    self->team.user = self;
    return (PyObject *)self;
}

Team *new_view(module_state *state, Team *of, cg_bell *bell, cg_bell *theirs) {
    Team *self = (Team *)allocate(state->team);
    if (self == NULL) return NULL;
    if (cg_team_view(&self->team, &of->team, bell, theirs)) {
        Py_DECREF(self);
        PyErr_NoMemory();
        return NULL;
    }
    self->team.user = self;
    self->turn = of->turn;
    self->disowned = of->disowned;
    self->of = (Team *)Py_NewRef((PyObject *)of);
    self->segment = (Segment *)Py_NewRef((PyObject *)of->segment);
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
    if (!*((Team *)self)->disowned) cg_team_close(&((Team *)self)->team, failed);
    Py_RETURN_NONE;
}

static PyObject *team_disown(PyObject *self, PyObject *unused) {
    (void)unused;
    *((Team *)self)->disowned = 1;
    Py_RETURN_NONE;
}

static PyObject *team_state(PyObject *self, PyObject *arg) {
    long member = PyLong_AsLong(arg);
    Team *team = (Team *)self;
    if (member < 0 || member >= team->team.n) return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_IndexError, "member %ld", member);
    return PyLong_FromUnsignedLong(atomic_load_explicit(&team->team.members[member].state, memory_order_acquire));
}

static PyObject *team_lost(PyObject *self, PyObject *unused) {
    (void)unused;
    Team *team = (Team *)self;
    int who = -1;
    /* A thread that waits checks for itself, through the same descriptors; none can begin a wait while this thread holds the interpreter. */
    int result = team->busy ? CG_OK : cg_team_lost(&team->team, &who);
    return result == CG_OK ? Py_NewRef(Py_None) : Py_BuildValue("(ii)", result, who);
}

static PyObject *team_unpost(PyObject *self, PyObject *unused) {
    (void)unused;
    Team *team = (Team *)self;
    atomic_store_explicit(&team->team.members[team->team.me].posted, 0, memory_order_release);
    Py_RETURN_NONE;
}

static PyObject *team_spins(PyObject *self, PyObject *unused) {
    (void)unused;
    return PyBool_FromLong(((Team *)self)->team.spin_ns > 0);
}

static PyMethodDef team_methods[] = {
    {"close", team_close, METH_VARARGS, "close(failed=False)\n--\n\nCloses this side and wakes every member; from any thread."},
    {"disown", team_disown, METH_NOARGS, "disown()\n--\n\nRefuses every call and leaves the memory alone: for the copies of a forked child."},
    {"state", team_state, METH_O, "state(member)\n--\n\n0 empty, 1 joined, 2 closed, 3 failed."},
    {"lost", team_lost, METH_NOARGS, "lost()\n--\n\n(code, member) of one that left or died, as in Stopped; None: there is none, or a thread waits and checks."},
    {"unpost", team_unpost, METH_NOARGS, "unpost()\n--\n\nUndoes that the last call was posted."},
    {"spins", team_spins, METH_NOARGS, "spins()\n--\n\nWhether a wait spins before it sleeps: each rank has a core."},
    {0}};
static PyType_Slot team_slots[] = {
    {Py_tp_doc, "Team(segment, offset, n, me, sharing)\n--\n\nMember `me` of n, in memory that all have mapped. `sharing`: how many ranks may run on a core of this one's, itself included."},
    {Py_tp_new, team_new}, {Py_tp_dealloc, team_dealloc}, {Py_tp_methods, team_methods}, {0}};
static PyType_Spec team_spec = {"commgraph.shm._native.Team", sizeof(Team), 0, Py_TPFLAGS_DEFAULT, team_slots};

/* The module. */

static PyObject *module_layout(PyObject *module, PyObject *args) {
    (void)module;
    int n;
    Py_ssize_t slot_bytes;
    if (!PyArg_ParseTuple(args, "in", &n, &slot_bytes)) return NULL;
    if (!is_group(n, slot_bytes)) return PyErr_Format(PyExc_ValueError, "no group of %d ranks has slots of %zd bytes", n, slot_bytes);
    return Py_BuildValue("(nn)", (Py_ssize_t)(sizeof(cg_member) * (size_t)n), (Py_ssize_t)cg_group_bytes(n, (size_t)slot_bytes));
}

static PyObject *module_ring_bytes(PyObject *module, PyObject *args) {
    (void)module;
    int n_readers;
    Py_ssize_t capacity;
    if (!PyArg_ParseTuple(args, "in", &n_readers, &capacity)) return NULL;
    if (n_readers < 0 || capacity < 0 || capacity > MOST_BYTES) return PyErr_Format(PyExc_ValueError, "no ring has %d readers and %zd bytes", n_readers, capacity);
    return PyLong_FromSize_t(cg_ring_bytes(n_readers, (size_t)capacity));
}

/* Rounds float32 as the kernels do, NaN included, of which torch makes several. */
static PyObject *module_narrow(PyObject *module, PyObject *args) {
    (void)module;
    int dtype;
    unsigned long long to, from;
    Py_ssize_t count;
    if (!PyArg_ParseTuple(args, "iKKn", &dtype, &to, &from, &count)) return NULL;
    const cg_conversion *conversion = cg_find_conversion(dtype);
    if (conversion == NULL || count < 0 || count > MOST_BYTES) return PyErr_Format(PyExc_ValueError, "%zd elements of kind %d", count, dtype);
    if (!is_memory((void *)(uintptr_t)from, (size_t)count * 4) || !is_memory((void *)(uintptr_t)to, (size_t)count * 2)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    conversion->narrow((void *)(uintptr_t)to, (const void *)(uintptr_t)from, (size_t)count);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyMethodDef module_methods[] = {
    {"narrow", module_narrow, METH_VARARGS, "narrow(dtype, to, from, count)\n--\n\nRounds float32 at an address to bfloat16 or float16 at another."},
    {"group_layout", module_layout, METH_VARARGS, "group_layout(n, slot_bytes)\n--\n\nBytes of n members, and of a group's memory."},
    {"any_ring", module_any_ring, METH_VARARGS, "any_ring(rings, timeout_ns)\n--\n\nIndex of a ring that has a record; -1: none in time."},
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
        add_type(module, &state->tensors, &tensors_spec) < 0 || add_type(module, &state->fast, &fast_spec) < 0 ||
        add_type(module, &state->messages, &messages_spec) < 0 || add_type(module, &state->net, &net_spec) < 0 ||
        add_type(module, &state->late, &late_spec) < 0 || add_type(module, &state->link_group, &link_group_spec) < 0 ||
        add_type(module, &state->recorder, &recorder_spec) < 0 || add_type(module, &state->group_record, &group_record_spec) < 0)
        return -1;
    state->requires_grad = PyUnicode_InternFromString("requires_grad");
    state->is_neg = PyUnicode_InternFromString("is_neg");
    state->version = PyUnicode_InternFromString("_version");
    state->total_seconds = PyUnicode_InternFromString("total_seconds");
    PyObject *times = PyImport_ImportModule("datetime");
    state->timedelta = times == NULL ? NULL : (PyTypeObject *)PyObject_GetAttrString(times, "timedelta");
    Py_XDECREF(times);
    if (state->timedelta == NULL) return -1;
    static const struct {
        const char *name;
        int value;
    } numbers[] = {
        {"OP_ALL_GATHER", OP_ALL_GATHER}, {"OP_GATHER", OP_GATHER}, {"OP_BROADCAST", OP_BROADCAST},
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
    Py_VISIT(state->tensors);
    Py_VISIT(state->fast);
    Py_VISIT(state->messages);
    Py_VISIT(state->net);
    Py_VISIT(state->late);
    Py_VISIT(state->link_group);
    Py_VISIT(state->recorder);
    Py_VISIT(state->group_record);
    Py_VISIT(state->timedelta);
    return 0;
}

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT, .m_name = "_native", .m_doc = "Shared memory between the ranks of one host.", .m_size = sizeof(module_state),
    .m_methods = module_methods, .m_slots = module_slots, .m_traverse = module_traverse};

PyMODINIT_FUNC PyInit__native(void);
PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&module_def); }
