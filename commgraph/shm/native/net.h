/* Messages between the ranks of a group over connected TCP sockets.
 *
 * The thread that waits does the work: it spins as one in shared memory does (wait.h), though for shorter, then polls the sockets. If
 * several threads wait, one of them polls for all (`polling`), and the others sleep on a condition variable. A frame is a header and its
 * bytes. Frames of one link arrive in order;
 * they pair with receives by tag. A link is read only while a receive of it is posted, so that a sender which is ahead fills the socket
 * buffers and nothing else; a frame that no receive has asked for is kept in memory only if it stands before one that a receive waits for.
 * A side that is closed in order says so by a last header, the goodbye.
 */
#ifndef COMMGRAPH_NET_H
#define COMMGRAPH_NET_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

#include "pool.h"
#include "team.h"

/* Results beside those of team.h. */
enum {
    CG_PENDING = -1,
    CG_INTERRUPTED = 16, /* a signal came, or might have come */
    CG_KNOCK = 17,       /* the descriptor `knocks` is readable */
};

typedef struct {
    uint32_t magic, tag;
    uint64_t bytes;
} cg_frame;

typedef struct cg_message {
    struct cg_message *next;
    int peer, state; /* CG_PENDING, or the result */
    int owned;       /* a frame that no receive had asked for: it was allocated here, and its data as below */
    int takes;       /* a receive of a frame of any size, whose data is memory of the pool: its owner gives it back, unless it is NULL */
    cg_frame frame;
    char *data;
    uint64_t done; /* bytes that were moved, of a send those of the header included */
} cg_message;

typedef struct {
    cg_message *first, *last;
} cg_queue;

enum { CG_HELD_BYTES = 16 * 1024 };
#define CG_MOST_BYTES ((uint64_t)1 << 40) /* of a frame: a larger one is a mistake, and nothing is allocated for it */

typedef struct {
    int fd;     /* -1: there is none */
    int error;  /* errno of a link that ended; 0 of one that the peer closed */
    int ended;  /* the peer sends no more */
    int left;   /* it has said so by a goodbye */
    int broken; /* nothing can be sent any more */
    cg_queue sending, awaited, arrived;
    cg_message *filling; /* the message whose bytes are being read: a member of `awaited` or `arrived` */
    char *held;          /* bytes that were read and not yet taken, from `begin` to `end` */
    size_t begin, end;
} cg_link;

typedef struct {
    int n, me;
    int ordered;     /* frames of one kind of tag arrive as they are waited for: another one is a mismatch */
    int64_t spin_ns; /* how long a wait spins before it polls, at least; 0: it never spins */
    int64_t recent_ns; /* the longest of the recent waits that a spin could cover */
    int knocks;      /* a descriptor whose readability ends a wait with CG_KNOCK; -1: none */
    int poke;        /* an eventfd that wakes the thread that polls */
    int polling, sleepers, closed;
    cg_link *links;
    struct pollfd *polled;
    pthread_mutex_t lock;
    pthread_cond_t moved;
    uint64_t bytes_sent;
    cg_pool *pool; /* for frames that come before they are waited for, and of any size */
} cg_net;

/* 0, or an errno. The pool lives longer than the net. */
int cg_net_begin(cg_net *net, int n, int me, int ordered, int64_t spin_ns, cg_pool *pool);
/* Closes every socket. No thread may be in a call. */
void cg_net_end(cg_net *net);
/* Takes over a connected socket that does not block. EEXIST if the peer has one. */
int cg_net_attach(cg_net *net, int peer, int fd);
int cg_net_is_linked(cg_net *net, int peer);
/* errno of a link that ended; 0 if the peer closed it, or if it has not ended. */
int cg_net_error(cg_net *net, int peer);
/* Whether the peer of a link that ended has closed its side in order; else it died, or gave up. */
int cg_net_has_left(cg_net *net, int peer);
/* Says to every peer, where no frame is halfway, that this side is going to be closed in order. Waits for nothing. */
void cg_net_say_goodbye(cg_net *net);
/* Ends every wait of this side with CG_SELF, and those of the peers with CG_LOST. From any thread. */
void cg_net_abort(cg_net *net);

/* Closes the copies of the sockets, in a forked child. Takes no lock, which a thread that is not there may hold. */
void cg_net_disown(cg_net *net);

/* Begin a message. It and its bytes stay until its state is not CG_PENDING, or cg_net_withdraw. */
void cg_net_send(cg_net *net, cg_message *message, int peer, uint32_t tag, const void *data, uint64_t bytes);
/* Lets a send go on with a copy of its bytes, which is made at `to` if some are still to be sent. Its state. */
int cg_net_keep(cg_net *net, cg_message *message, void *to);
void cg_net_receive(cg_net *net, cg_message *message, int peer, uint32_t tag, void *data, uint64_t bytes);
/* A receive of a frame of any size. */
void cg_net_take(cg_net *net, cg_message *message, int peer, uint32_t tag);
/* Takes back a receive of which nothing has come: CG_TIMEOUT. CG_PENDING if a part has, and it goes on; else its state. */
int cg_net_give_up(cg_net *net, cg_message *message);
/* Takes back messages. One of which a part was moved ends its link: what follows could not be understood. */
void cg_net_withdraw(cg_net *net, cg_message *messages, int count);

/* A call: its tag, the end of its waits on cg_clock_ns, and what is done about CG_INTERRUPTED or CG_KNOCK in the midst of one, which goes on
 * unless that returns another result than CG_OK. `pool`: for its scratch memory, where it needs any. */
typedef struct {
    uint32_t tag;
    int64_t deadline;
    int (*attend)(void *user, int why);
    void *user;
    cg_pool *pool;
} cg_net_call;

/* Called with the lock held: CG_PENDING, or the result of the wait. */
typedef int (*cg_net_ready)(void *arg, int *who);
int cg_net_wait(cg_net *net, const cg_net_call *call, cg_net_ready ready, void *arg, int *who);

/* Conditions. */
typedef struct {
    cg_message *messages;
    int count;
} cg_messages;
int cg_net_all(void *messages, int *who);
/* Waits for all of these messages; withdraws them where that fails. */
int cg_net_finish(cg_net *net, const cg_net_call *call, cg_message *messages, int count, int *who);
typedef struct {
    cg_message **messages;
    int count, found;
} cg_any_of;
int cg_net_any(void *any, int *who);

#endif
