#define _GNU_SOURCE
#include "net.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "wait.h"

enum {
    MAGIC = 0x6D636731,          /* "1gcm" */
    GOODBYE = MAGIC + 1,         /* of a header without bytes, after which nothing comes */
    KIND_SHIFT = 28,             /* of a tag: commgraph.communicators.tags */
    LARGE = 64 * 1024,           /* bytes to be moved from which a wait does not spin: each look at the socket would delay what comes */
    UNANSWERED = 4,              /* sends of the same bytes, or probes, without an answer, of a host that has vanished */
    VANISHED_MS = 12 * 1000,     /* for so long (commgraph/communicators/endpoint.py has the other limit, of 15 s) */
    LONGEST_SPIN_NS = 50 * 1000, /* twice it is worse where ranks share cores with others, as those of simulated hosts do */
    SLICE_NS = 100 * 1000 * 1000 /* longest sleep between two checks for signals */
};

static void append(cg_queue *queue, cg_message *message) {
    message->next = NULL;
    if (queue->last != NULL) queue->last->next = message;
    else queue->first = message;
    queue->last = message;
}

static int take_out(cg_queue *queue, cg_message *message) {
    cg_message *before = NULL;
    for (cg_message *m = queue->first; m != NULL; before = m, m = m->next) {
        if (m != message) continue;
        if (before != NULL) before->next = m->next;
        else queue->first = m->next;
        if (queue->last == m) queue->last = before;
        return 1;
    }
    return 0;
}

static void free_owned(cg_message *message) {
    if (message->data != NULL) cg_pool_give(message->data);
    free(message);
}

/* Gives every message of a queue that result. */
static void settle(cg_queue *queue, int state) {
    for (cg_message *m = queue->first; m != NULL; m = m->next) m->state = state;
    *queue = (cg_queue){NULL, NULL};
}

/* Ends both directions. Frames that have arrived whole stay. */
static void end_link(cg_link *link, int error, int state) {
    if (link->fd >= 0) {
        link->error = error;
        close(link->fd);
    }
    link->fd = -1;
    link->ended = link->broken = 1;
    if (link->filling != NULL && link->filling->owned) {
        take_out(&link->arrived, link->filling);
        free_owned(link->filling);
    }
    link->filling = NULL;
    settle(&link->sending, state);
    settle(&link->awaited, state);
}

int cg_net_begin(cg_net *net, int n, int me, int ordered, int64_t spin_ns, cg_pool *pool) {
    *net = (cg_net){.n = n, .me = me, .ordered = ordered, .spin_ns = spin_ns, .knocks = -1, .poke = -1, .pool = pool};
    net->links = calloc((size_t)n, sizeof *net->links);
    net->polled = calloc((size_t)n + 2, sizeof *net->polled);
    net->poke = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (net->links == NULL || net->polled == NULL || net->poke < 0) {
        int error = net->poke < 0 ? errno : ENOMEM;
        free(net->links);
        free(net->polled);
        if (net->poke >= 0) close(net->poke);
        net->links = NULL;
        return error;
    }
    for (int p = 0; p < n; p++) net->links[p].fd = -1;
    pthread_mutex_init(&net->lock, NULL);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&net->moved, &monotonic);
    pthread_condattr_destroy(&monotonic);
    return 0;
}

void cg_net_end(cg_net *net) {
    if (net->links == NULL) return;
    for (int p = 0; p < net->n; p++) {
        cg_link *link = &net->links[p];
        end_link(link, 0, CG_SELF);
        while (link->arrived.first != NULL) {
            cg_message *m = link->arrived.first;
            take_out(&link->arrived, m);
            free_owned(m);
        }
        free(link->held);
    }
    free(net->links);
    free(net->polled);
    net->links = NULL;
    close(net->poke);
    pthread_cond_destroy(&net->moved);
    pthread_mutex_destroy(&net->lock);
}

int cg_net_attach(cg_net *net, int peer, int fd) {
    char *held = malloc(CG_HELD_BYTES);
    if (held == NULL) return ENOMEM;
    pthread_mutex_lock(&net->lock);
    cg_link *link = &net->links[peer];
    int error = net->closed ? EPIPE : link->fd >= 0 || link->ended ? EEXIST : 0;
    if (!error) *link = (cg_link){.fd = fd, .held = held};
    pthread_mutex_unlock(&net->lock);
    if (error) free(held);
    return error;
}

int cg_net_is_linked(cg_net *net, int peer) {
    pthread_mutex_lock(&net->lock);
    int linked = net->links[peer].fd >= 0 || net->links[peer].ended;
    pthread_mutex_unlock(&net->lock);
    return linked;
}

int cg_net_error(cg_net *net, int peer) {
    pthread_mutex_lock(&net->lock);
    int error = net->links[peer].error;
    pthread_mutex_unlock(&net->lock);
    return error;
}

void cg_net_say_goodbye(cg_net *net) {
    const cg_frame frame = {GOODBYE, 0, 0};
    pthread_mutex_lock(&net->lock);
    for (int p = 0; p < net->n && !net->closed; p++) {
        cg_link *link = &net->links[p];
        if (link->fd < 0 || link->broken || link->sending.first != NULL) continue;
        if (send(link->fd, &frame, sizeof frame, MSG_NOSIGNAL | MSG_DONTWAIT) < (ssize_t)sizeof frame) link->broken = 1;
    }
    pthread_mutex_unlock(&net->lock);
}

/* Whether the bytes that were not taken end with a goodbye. After an error of a send it may lie there unread. */
static int ends_with_goodbye(const cg_link *link) {
    char bytes[sizeof(cg_frame) + CG_HELD_BYTES];
    size_t held = link->end - link->begin, some = held < sizeof(cg_frame) ? held : sizeof(cg_frame);
    if (some > 0) memcpy(bytes, link->held + link->end - some, some);
    ssize_t more = link->fd < 0 ? 0 : recv(link->fd, bytes + some, CG_HELD_BYTES, MSG_PEEK | MSG_DONTWAIT);
    if (more > 0) some += (size_t)more;
    cg_frame last = {0, 0, 0};
    if (some >= sizeof last) memcpy(&last, bytes + some - sizeof last, sizeof last);
    return last.magic == GOODBYE && last.tag == 0 && last.bytes == 0;
}

int cg_net_has_left(cg_net *net, int peer) {
    pthread_mutex_lock(&net->lock);
    cg_link *link = &net->links[peer];
    int left = link->left || (link->filling == NULL && ends_with_goodbye(link));
    pthread_mutex_unlock(&net->lock);
    return left;
}

static void poke(cg_net *net) {
    uint64_t one = 1;
    if (net->polling && write(net->poke, &one, sizeof one) < 0) { /* it is readable already */
    }
}

void cg_net_abort(cg_net *net) {
    pthread_mutex_lock(&net->lock);
    net->closed = 1;
    for (int p = 0; p < net->n; p++) {
        cg_link *link = &net->links[p];
        /* The thread that polls may use the descriptor: closed is it by cg_net_end. */
        if (link->fd >= 0) shutdown(link->fd, SHUT_RDWR);
        settle(&link->sending, CG_SELF);
        if (link->filling != NULL && !link->filling->owned) link->filling = NULL;
        settle(&link->awaited, CG_SELF);
        link->ended = link->broken = 1;
    }
    poke(net);
    pthread_cond_broadcast(&net->moved);
    pthread_mutex_unlock(&net->lock);
}

void cg_net_disown(cg_net *net) {
    for (int p = 0; p < net->n; p++) {
        cg_link *link = &net->links[p];
        if (link->fd >= 0) close(link->fd);
        link->fd = -1;
        link->ended = link->broken = 1;
        link->sending = link->awaited = (cg_queue){NULL, NULL};
        link->filling = NULL;
    }
    net->closed = 1;
    pthread_mutex_init(&net->lock, NULL);
}

/* Writes what is queued. 1 if bytes were moved. */
static int push(cg_net *net, cg_link *link) {
    int moved = 0;
    while (link->sending.first != NULL && link->fd >= 0) {
        cg_message *m = link->sending.first;
        struct iovec parts[2];
        int count = 0;
        if (m->done < sizeof m->frame) parts[count++] = (struct iovec){(char *)&m->frame + m->done, sizeof m->frame - m->done};
        uint64_t at = m->done < sizeof m->frame ? 0 : m->done - sizeof m->frame;
        if (m->frame.bytes > at) parts[count++] = (struct iovec){m->data + at, m->frame.bytes - at};
        struct msghdr header = {.msg_iov = parts, .msg_iovlen = (size_t)count};
        ssize_t sent = sendmsg(link->fd, &header, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0) {
            if (errno == EINTR) continue;
            if (errno == EAGAIN || errno == EWOULDBLOCK) return moved;
            /* What the peer had sent before it left can still be read. */
            link->error = errno;
            link->broken = 1;
            settle(&link->sending, CG_LOST);
            return 1;
        }
        moved = 1;
        m->done += (uint64_t)sent;
        if (m->done == sizeof m->frame + m->frame.bytes) {
            take_out(&link->sending, m);
            m->state = CG_OK;
            net->bytes_sent += m->frame.bytes;
        }
    }
    return moved;
}

static void finish(cg_link *link, cg_message *m) {
    link->filling = NULL;
    if (!m->owned) take_out(&link->awaited, m);
    m->state = CG_OK;
}

/* Finds the receive for the frame whose header is at the begin of the held bytes, or memory for it. */
static void open_frame(cg_net *net, cg_link *link) {
    cg_frame frame;
    memcpy(&frame, link->held + link->begin, sizeof frame);
    link->begin += sizeof frame;
    if (frame.magic == GOODBYE) {
        link->left = 1;
        end_link(link, 0, net->closed ? CG_SELF : CG_LOST);
        return;
    }
    if (frame.magic != MAGIC) {
        end_link(link, EBADMSG, CG_LOST);
        return;
    }
    cg_message *found = NULL;
    for (cg_message *m = link->awaited.first; m != NULL && found == NULL; m = m->next)
        if (m->frame.tag == frame.tag) found = m;
    int differs = frame.bytes > CG_MOST_BYTES || (found != NULL && !found->takes && found->frame.bytes != frame.bytes);
    for (cg_message *m = link->awaited.first; net->ordered && found == NULL && m != NULL; m = m->next)
        differs |= m->frame.tag >> KIND_SHIFT == frame.tag >> KIND_SHIFT;
    if (differs) {
        end_link(link, EBADMSG, CG_MISMATCH);
        return;
    }
    if (found == NULL) {
        found = calloc(1, sizeof *found);
        char *data = found == NULL ? NULL : cg_pool_take(net->pool, frame.bytes);
        if (data == NULL) {
            free(found);
            end_link(link, ENOMEM, CG_NOMEM);
            return;
        }
        *found = (cg_message){.owned = 1, .state = CG_PENDING, .frame = frame, .data = data};
        append(&link->arrived, found);
    } else if (found->takes) {
        found->data = cg_pool_take(net->pool, frame.bytes);
        if (found->data == NULL) {
            end_link(link, ENOMEM, CG_NOMEM);
            return;
        }
        found->frame.bytes = frame.bytes;
    }
    link->filling = found;
    if (frame.bytes == 0) finish(link, found);
}

/* Reads while a receive is posted. 1 if bytes were moved, or the link ended. */
static int pull(cg_net *net, cg_link *link) {
    int moved = 0;
    while (link->fd >= 0 && (link->filling != NULL || link->awaited.first != NULL)) {
        size_t have = link->end - link->begin;
        cg_message *m = link->filling;
        if (m == NULL && have >= sizeof(cg_frame)) {
            open_frame(net, link);
            moved = 1;
            continue;
        }
        uint64_t rest = m == NULL ? 0 : m->frame.bytes - m->done;
        if (m != NULL && have > 0) {
            size_t some = have < rest ? have : rest;
            memcpy(m->data + m->done, link->held + link->begin, some);
            link->begin += some;
            m->done += some;
            moved = 1;
            if (m->done == m->frame.bytes) finish(link, m);
            continue;
        }
        ssize_t got;
        if (rest >= CG_HELD_BYTES) {
            /* What has come of the message, and the next header, behind which more bytes may follow that need no copy. */
            struct iovec parts[2] = {{m->data + m->done, rest}, {link->held, sizeof(cg_frame)}};
            struct msghdr into = {.msg_iov = parts, .msg_iovlen = 2};
            link->begin = link->end = 0;
            got = recvmsg(link->fd, &into, MSG_DONTWAIT);
        } else {
            int only_header = m == NULL && link->awaited.first != NULL && link->awaited.first->frame.bytes >= CG_HELD_BYTES;
            memmove(link->held, link->held + link->begin, have);
            link->begin = 0, link->end = have;
            got = recv(link->fd, link->held + have, (only_header ? sizeof(cg_frame) : CG_HELD_BYTES) - have, MSG_DONTWAIT);
        }
        if (got > 0) {
            moved = 1;
            if (rest < CG_HELD_BYTES) {
                link->end += (size_t)got;
                continue;
            }
            uint64_t some = (uint64_t)got < rest ? (uint64_t)got : rest;
            link->end = (size_t)((uint64_t)got - some);
            m->done += some;
            if (m->done == m->frame.bytes) finish(link, m);
            continue;
        }
        if (got < 0 && errno == EINTR) continue;
        if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return moved;
        end_link(link, got == 0 ? link->error : errno, net->closed ? CG_SELF : CG_LOST);
        return 1;
    }
    return moved;
}

static void begin_message(cg_message *m, int peer, uint32_t tag, void *data, uint64_t bytes) {
    *m = (cg_message){.peer = peer, .state = CG_PENDING, .frame = {MAGIC, tag, bytes}, .data = data};
}

void cg_net_send(cg_net *net, cg_message *m, int peer, uint32_t tag, const void *data, uint64_t bytes) {
    begin_message(m, peer, tag, (void *)data, bytes);
    pthread_mutex_lock(&net->lock);
    cg_link *link = &net->links[peer];
    if (net->closed || link->broken || link->fd < 0) {
        m->state = net->closed ? CG_SELF : CG_LOST;
    } else {
        append(&link->sending, m);
        push(net, link);
        if (m->state == CG_PENDING) poke(net);
    }
    pthread_mutex_unlock(&net->lock);
}

int cg_net_keep(cg_net *net, cg_message *m, void *to) {
    pthread_mutex_lock(&net->lock);
    if (m->state == CG_PENDING) m->data = memcpy(to, m->data, m->frame.bytes);
    int state = m->state;
    pthread_mutex_unlock(&net->lock);
    return state;
}

static void begin_receive(cg_net *net, cg_message *m) {
    const int peer = m->peer;
    const uint32_t tag = m->frame.tag;
    pthread_mutex_lock(&net->lock);
    cg_link *link = &net->links[peer];
    cg_message *earlier = link->arrived.first;
    while (earlier != NULL && earlier->frame.tag != tag) earlier = earlier->next;
    if (earlier != NULL && !m->takes && earlier->frame.bytes != m->frame.bytes) {
        m->state = CG_MISMATCH;
    } else if (earlier != NULL) {
        if (m->takes) {
            m->frame.bytes = earlier->frame.bytes;
            m->data = earlier->data;
            earlier->data = NULL;
        } else {
            memcpy(m->data, earlier->data, earlier->done);
        }
        m->done = earlier->done;
        take_out(&link->arrived, earlier);
        if (link->filling == earlier) {
            append(&link->awaited, m);
            link->filling = m;
            poke(net);
        } else {
            m->state = CG_OK;
        }
        free_owned(earlier);
    } else if (net->closed || link->ended || link->fd < 0) {
        m->state = net->closed ? CG_SELF : CG_LOST;
    } else {
        append(&link->awaited, m);
        poke(net);
    }
    pthread_mutex_unlock(&net->lock);
}

void cg_net_receive(cg_net *net, cg_message *m, int peer, uint32_t tag, void *data, uint64_t bytes) {
    begin_message(m, peer, tag, data, bytes);
    begin_receive(net, m);
}

void cg_net_take(cg_net *net, cg_message *m, int peer, uint32_t tag) {
    begin_message(m, peer, tag, NULL, 0);
    m->takes = 1;
    begin_receive(net, m);
}

int cg_net_give_up(cg_net *net, cg_message *m) {
    pthread_mutex_lock(&net->lock);
    cg_link *link = &net->links[m->peer];
    if (m->state == CG_PENDING && m->done == 0 && link->filling != m) {
        take_out(&link->awaited, m);
        m->state = CG_TIMEOUT;
    }
    int state = m->state;
    pthread_mutex_unlock(&net->lock);
    return state;
}

void cg_net_withdraw(cg_net *net, cg_message *messages, int count) {
    pthread_mutex_lock(&net->lock);
    for (int i = 0; i < count; i++) {
        cg_message *m = &messages[i];
        if (m->state != CG_PENDING) continue;
        cg_link *link = &net->links[m->peer];
        int halfway = link->filling == m || (m->done > 0 && link->sending.first == m);
        if (!take_out(&link->sending, m)) take_out(&link->awaited, m);
        if (halfway) {
            if (link->filling == m) link->filling = NULL;
            if (link->fd >= 0) shutdown(link->fd, SHUT_RDWR);
            link->ended = link->broken = 1;
            settle(&link->sending, CG_LOST);
            settle(&link->awaited, CG_LOST);
        }
        m->state = CG_SELF;
    }
    pthread_mutex_unlock(&net->lock);
}

static int move(cg_net *net) {
    int moved = 0;
    for (int p = 0; p < net->n; p++) {
        cg_link *link = &net->links[p];
        if (link->fd < 0) continue;
        if (link->sending.first != NULL) moved |= push(net, link);
        if (link->awaited.first != NULL || link->filling != NULL) moved |= pull(net, link);
    }
    return moved;
}

/* Whether a message is under way that takes longer than a spin. */
static int moves_much(const cg_net *net) {
    for (int p = 0; p < net->n; p++) {
        const cg_message *out = net->links[p].sending.first, *in = net->links[p].filling;
        if (in == NULL) in = net->links[p].awaited.first;
        if ((out != NULL && out->frame.bytes + sizeof out->frame - out->done > LARGE) || (in != NULL && in->frame.bytes - in->done > LARGE)) return 1;
    }
    return 0;
}

/* Ends the links whose host has vanished: it answers neither data, nor probes of a full buffer. The kernel's own limit for that
 * (TCP_USER_TIMEOUT) would end the link of a living rank, too, that does not read for so long, as one that computes. Where nothing is under
 * way, keepalive does it. */
static void end_vanished(cg_net *net) {
#ifdef TCP_INFO
    for (int p = 0; p < net->n; p++) {
        cg_link *link = &net->links[p];
        struct tcp_info info;
        socklen_t length = sizeof info;
        if (link->fd < 0 || getsockopt(link->fd, IPPROTO_TCP, TCP_INFO, &info, &length) != 0) continue;
        if ((info.tcpi_retransmits >= UNANSWERED || info.tcpi_probes >= UNANSWERED) && info.tcpi_last_ack_recv >= VANISHED_MS)
            end_link(link, ETIMEDOUT, CG_LOST);
    }
#endif
}

/* Sleeps until a socket is ready; the lock is released meanwhile. The result of the wait, or CG_PENDING. */
static int sleep_on_sockets(cg_net *net, int64_t deadline) {
    int count = 0;
    for (int p = 0; p < net->n; p++) {
        cg_link *link = &net->links[p];
        short events = (short)((link->sending.first != NULL ? POLLOUT : 0) | (link->awaited.first != NULL || link->filling != NULL ? POLLIN : 0));
        if (link->fd >= 0 && events) net->polled[count++] = (struct pollfd){link->fd, events, 0};
    }
    net->polled[count++] = (struct pollfd){net->poke, POLLIN, 0};
    int knocks = net->knocks >= 0 ? count : -1;
    if (knocks >= 0) net->polled[count++] = (struct pollfd){net->knocks, POLLIN, 0};
    int64_t left = deadline - cg_clock_ns();
    int shortened = left > SLICE_NS;
    if (left < 0) left = 0;
    if (shortened) left = SLICE_NS;
    struct timespec patience = {left / 1000000000, left % 1000000000};
    pthread_mutex_unlock(&net->lock);
    int ready = ppoll(net->polled, (nfds_t)count, &patience, NULL), error = errno;
    pthread_mutex_lock(&net->lock);
    if (ready < 0) return error == EINTR ? CG_INTERRUPTED : CG_NOMEM;
    if (ready == 0) {
        end_vanished(net);
        return shortened ? CG_INTERRUPTED : CG_PENDING;
    }
    uint64_t pokes;
    if (net->polled[knocks >= 0 ? count - 2 : count - 1].revents && read(net->poke, &pokes, sizeof pokes) < 0) { /* another one took it */
    }
    return knocks >= 0 && net->polled[knocks].revents ? CG_KNOCK : CG_PENDING;
}

static int attend(cg_net *net, const cg_net_call *call, int why) {
    pthread_mutex_unlock(&net->lock);
    int result = call->attend(call->user, why);
    pthread_mutex_lock(&net->lock);
    return result;
}

int cg_net_wait(cg_net *net, const cg_net_call *call, cg_net_ready ready, void *arg, int *who) {
    int result;
    int64_t spin_until = 0, began = 0, spin = net->spin_ns;
    int looked = 0;
    const int64_t deadline = call->deadline;
    pthread_mutex_lock(&net->lock);
    if (spin > 0 && 2 * net->recent_ns > spin) spin = 2 * net->recent_ns < LONGEST_SPIN_NS ? 2 * net->recent_ns : LONGEST_SPIN_NS;
    for (;;) {
        result = ready(arg, who);
        if (result != CG_PENDING) break;
        int64_t now = cg_clock_ns();
        if (began == 0) began = now;
        if (now >= deadline) {
            /* One look at the sockets: a wait of no time finds what has come. */
            if (!net->polling && !looked && move(net)) {
                looked = 1;
                continue;
            }
            result = CG_TIMEOUT;
            break;
        }
        if (net->polling) {
            int64_t until = deadline - now > SLICE_NS ? now + SLICE_NS : deadline;
            struct timespec at = {until / 1000000000, until % 1000000000};
            net->sleepers++;
            int slept = pthread_cond_timedwait(&net->moved, &net->lock, &at);
            net->sleepers--;
            if (slept != ETIMEDOUT || (result = attend(net, call, CG_INTERRUPTED)) == CG_OK) continue;
            break;
        }
        net->polling = 1;
        int stop = CG_PENDING;
        if (move(net)) {
            spin_until = 0;
        } else {
            if (spin_until == 0) spin_until = moves_much(net) ? now : now + spin;
            if (now < spin_until) {
                pthread_mutex_unlock(&net->lock);
                for (int i = 0; i < 20; i++) cg_pause();
                pthread_mutex_lock(&net->lock);
            } else {
                stop = sleep_on_sockets(net, deadline);
            }
        }
        net->polling = 0;
        if (net->sleepers > 0) pthread_cond_broadcast(&net->moved);
        if (stop != CG_PENDING && (result = stop == CG_NOMEM ? stop : attend(net, call, stop)) != CG_OK) break;
    }
    if (net->sleepers > 0) pthread_cond_broadcast(&net->moved);
    if (result == CG_OK && began != 0 && net->spin_ns > 0) {
        const int64_t lasted = cg_clock_ns() - began;
        net->recent_ns -= net->recent_ns / 8;
        if (lasted <= LONGEST_SPIN_NS && lasted > net->recent_ns) net->recent_ns = lasted;
    }
    pthread_mutex_unlock(&net->lock);
    return result;
}

int cg_net_all(void *arg, int *who) {
    cg_messages *all = arg;
    int pending = 0;
    for (int i = 0; i < all->count; i++) {
        cg_message *m = &all->messages[i];
        if (m->state == CG_OK) continue;
        *who = m->peer;
        if (m->state != CG_PENDING) return m->state;
        pending = 1;
    }
    return pending ? CG_PENDING : CG_OK;
}

int cg_net_any(void *arg, int *who) {
    cg_any_of *any = arg;
    for (int i = 0; i < any->count; i++) {
        cg_message *m = any->messages[i];
        if (m->state == CG_PENDING) continue;
        *who = m->peer;
        any->found = i;
        return m->state;
    }
    return CG_PENDING;
}

int cg_net_finish(cg_net *net, const cg_net_call *call, cg_message *messages, int count, int *who) {
    cg_messages all = {messages, count};
    int result = cg_net_wait(net, call, cg_net_all, &all, who);
    if (result != CG_OK) cg_net_withdraw(net, messages, count);
    return result;
}
