/* The links of a group, as Python has them. */
#ifndef COMMGRAPH_MODULE_NET_H
#define COMMGRAPH_MODULE_NET_H

#include "module.h"

#include "net.h"

typedef struct {
    PyObject_HEAD
    cg_net net;
    Pool *pool;
    PyObject *on_knock; /* called without arguments when the descriptor `knocks` is readable, and refers to no Net; NULL: nothing is watched */
    char *linked;       /* whether a peer has a link, or had one, and how many have: known without the lock of `net` */
    int n_linked;
    int users; /* threads in a call */
    int closing;
} Net;

/* A thread in a call, which has released the interpreter: `user` of a cg_net_call, whose `attend` is attend_net. */
typedef struct {
    PyThreadState **saved;
    Net *net;
} net_user;

/* A message that may be waited for several times. */
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

int attend_net(void *of, int why);
/* Between the two the links stay, though they may be closed. 0 with an error set if they are closed. */
int use_net(Net *self);
void leave_net(Net *self);
/* Between the two the interpreter is released, and waits end at the deadline. 0 with an error set if the links are closed. */
int begin_wait(Net *self, waiting *me, cg_net_call *call, int64_t deadline);
void end_wait(Net *self, waiting *me);

#endif
