/* SPDX-License-Identifier: MIT
 * One vfio-user connection: bytes in, replies and exits out.
 *
 * Whole messages are parsed in order from the bytes that stream.c has received.  Replies are collected, and sent
 * before any call that may block.  A channel belongs to the thread that calls vms_enter(); only vms_wake() and
 * vms_chan_shutdown() may come from others.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "func.h"
#include "guest_memory.h"
#include "stream.h"
#include "vmshim.h"
#include "sleep.h"
#include "wire.h"

#define HANDSHAKE_SIZE (64u * 1024)
#define TX_SIZE (64u * 1024)

struct vms_chan {
    vms_func *func;
    vms_memory *memory;
    uint32_t max_xfer, peer_xfer, max_fds, send_ms;
    int open;
    int dead; /* errno of a failed send */
    _Atomic int stopped; /* vms_chan_shutdown() was called */
    _Atomic int twin_fd; /* as twin.fd, for other threads */
    stream main, twin;
    uint8_t tx[TX_SIZE];
    size_t tx_len;
    uint8_t *reply_data; /* room for a read of more than 8 bytes */
    struct {
        int kind; /* 0, VMS_EXIT_READ or VMS_EXIT_WRITE */
        uint16_t id, command;
        int posted;
        access_head head;
    } pending;
    size_t multi_done; /* entries of the WRITE_MULTI at the head of the buffer that are done */
    int out_fds[CONTROL_FDS + 1];
    vms_run run;
};

/* ---- sending ------------------------------------------------------------------------------ */

static void flush(vms_chan *chan)
{
    if (chan->tx_len && !chan->dead) {
        struct iovec iov = { chan->tx, chan->tx_len };
        int rc = send_all(chan->main.fd, &iov, 1, NULL, 0, chan->send_ms);
        if (rc < 0)
            chan->dead = -rc;
    }
    chan->tx_len = 0;
}

static void put(vms_chan *chan, const void *bytes, size_t n)
{
    if (!n)
        return;
    if (chan->tx_len + n > TX_SIZE)
        flush(chan);
    if (n > TX_SIZE) {
        struct iovec iov = { (void *)(uintptr_t)bytes, n };
        int rc = chan->dead ? 0 : send_all(chan->main.fd, &iov, 1, NULL, 0, chan->send_ms);
        if (rc < 0)
            chan->dead = -rc;
        return;
    }
    memcpy(chan->tx + chan->tx_len, bytes, n);
    chan->tx_len += n;
}

static void put_reply(vms_chan *chan, uint16_t id, uint16_t command, uint32_t error, const void *a, size_t a_len,
                      const void *b, size_t b_len)
{
    header h = { id, command, (uint32_t)sizeof h, TYPE_REPLY, 0 };
    if (error) {
        h.flags |= FLAG_ERROR;
        h.error = error;
        put(chan, &h, sizeof h);
        return;
    }
    h.size += (uint32_t)(a_len + b_len);
    put(chan, &h, sizeof h);
    put(chan, a, a_len);
    put(chan, b, b_len);
}

/* Replies to a command: success (error 0) or an error. */
static void answer(vms_chan *chan, const header *h, int error, const void *a, size_t a_len)
{
    if (error)
        chan->func->stats.rejected++;
    if (!(h->flags & FLAG_NO_REPLY))
        put_reply(chan, h->id, h->command, (uint32_t)error, a, a_len, NULL, 0);
}

/* ---- commands the shim serves -------------------------------------------------------------- */

static uint64_t little(const uint8_t *bytes, size_t n)
{
    uint64_t value = 0;
    memcpy(&value, bytes, n);
    return value;
}

/* The region of a well-formed access, else NULL and *error. */
static const region *check_access(vms_chan *chan, const access_head *a, int write, int *error)
{
    const region *r = a->region < VMS_REGIONS ? &chan->func->regions[a->region] : NULL;

    if (!r || !a->count || a->count > chan->max_xfer || !region_has(r, a->offset, a->count)) {
        *error = EINVAL;
        return NULL;
    }
    if (write && !r->writable) {
        *error = EPERM;
        return NULL;
    }
    return r;
}

uint64_t vms_key(uint32_t region, uint64_t offset, uint32_t count)
{
    if (offset >> 56 || count > 15)
        return 0;
    return (uint64_t)region << 60 | (uint64_t)count << 56 | offset;
}

/* What an exit has as an access's key. */
static uint64_t key_of(const region *r, const access_head *a)
{
    return region_refuses(r, a->offset, a->count) ? 0 : vms_key(a->region, a->offset, a->count);
}

static void leave_pending(vms_chan *chan, int kind, const header *h, const region *r, const access_head *a)
{
    vms_run *run = &chan->run;

    chan->pending.kind = kind;
    chan->pending.id = h->id;
    chan->pending.command = h->command;
    chan->pending.posted = (h->flags & FLAG_NO_REPLY) != 0;
    chan->pending.head = *a;
    run->reason = (uint32_t)kind;
    run->posted = (uint32_t)chan->pending.posted;
    run->id = h->id;
    run->command = h->command;
    run->error = 0;
    run->region = a->region;
    run->offset = a->offset;
    run->count = a->count;
    run->key = key_of(r, a);
    run->value = 0;
    run->len = a->count;
}

static int do_read(vms_chan *chan, const header *h, const uint8_t *body, size_t len)
{
    access_head a;
    int error = EINVAL;
    const region *r = NULL;

    if (len == sizeof a) {
        memcpy(&a, body, sizeof a);
        r = check_access(chan, &a, 0, &error);
    }
    if (!r) {
        answer(chan, h, error, NULL, 0);
        return 0;
    }
    chan->func->stats.reads++;
    uint8_t small[8];
    uint8_t *data = a.count <= sizeof small ? small : chan->reply_data;
    if (region_try_read(r, a.offset, data, a.count)) {
        chan->func->stats.served++;
        if (!(h->flags & FLAG_NO_REPLY))
            put_reply(chan, h->id, h->command, 0, &a, sizeof a, data, a.count);
        return 0;
    }
    leave_pending(chan, VMS_EXIT_READ, h, r, &a);
    chan->run.data = chan->reply_data;
    memset(chan->reply_data, r->fill, a.count);
    return 1;
}

static void batch(vms_chan *chan, const region *r, const access_head *a, const uint8_t *data)
{
    chan->run.accesses[chan->run.n_accesses++] =
        (vms_access){ a->offset, little(data, a->count), key_of(r, a), a->region, a->count };
}

/* Whether the batch takes no further write: behind one to config space, which may switch a region on or off, it is not
 * known which are refused. */
static int batch_is_full(const vms_chan *chan)
{
    size_t n = chan->run.n_accesses;
    return n == VMS_BATCH || (n && chan->run.accesses[n - 1].region == VMS_CONFIG);
}

/* 1: leaves an exit; 0: done; -1: a batch is open and this write has to come after it. */
static int do_write(vms_chan *chan, const header *h, const uint8_t *body, size_t len)
{
    access_head a;
    int error = EINVAL;
    const region *r = NULL;

    if (len >= sizeof a) {
        memcpy(&a, body, sizeof a);
        if (len - sizeof a == a.count)
            r = check_access(chan, &a, 1, &error);
    }
    if (!r) {
        if (chan->run.n_accesses)
            return -1;
        answer(chan, h, error, NULL, 0);
        return 0;
    }
    const uint8_t *data = body + sizeof a;
    int posted = (h->flags & FLAG_NO_REPLY) != 0;
    if (region_try_write(r, a.offset, data, a.count, chan->run.n_accesses != 0)) {
        chan->func->stats.writes++;
        chan->func->stats.served++;
        if (!posted)
            put_reply(chan, h->id, h->command, 0, &a, sizeof a, NULL, 0);
        return 0;
    }
    if (posted && a.count <= 8) {
        /* Behind an open batch even a plain write goes to Python: order counts. */
        chan->func->stats.writes++;
        batch(chan, r, &a, data);
        return batch_is_full(chan);
    }
    if (chan->run.n_accesses)
        return -1;
    chan->func->stats.writes++;
    leave_pending(chan, VMS_EXIT_WRITE, h, r, &a);
    chan->run.data = (uint8_t *)(uintptr_t)data;
    chan->run.value = a.count <= 8 ? little(data, a.count) : 0;
    return 1;
}

/* REGION_WRITE_MULTI.  Resumes at chan->multi_done.  1: an exit, call again; 0: the message is done. */
static int do_multi(vms_chan *chan, const header *h, const uint8_t *body, size_t len)
{
    uint64_t n;
    int error = 0;

    if (len < sizeof n) {
        answer(chan, h, EINVAL, NULL, 0);
        return 0;
    }
    memcpy(&n, body, sizeof n);
    if (n > (len - sizeof n) / sizeof(multi_entry) || n * sizeof(multi_entry) != len - sizeof n) {
        answer(chan, h, EINVAL, NULL, 0);
        return 0;
    }
    while (chan->multi_done < n) {
        multi_entry e;
        memcpy(&e, body + sizeof n + chan->multi_done * sizeof e, sizeof e);
        access_head a = { e.offset, e.region, e.count };
        const region *r = NULL;
        if (e.count > sizeof e.data)
            error = EINVAL;
        else
            r = check_access(chan, &a, 1, &error);
        if (!r)
            break;
        if (batch_is_full(chan))
            return 1;
        chan->multi_done++;
        chan->func->stats.writes++;
        if (region_try_write(r, a.offset, e.data, a.count, chan->run.n_accesses != 0))
            chan->func->stats.served++;
        else
            batch(chan, r, &a, e.data);
    }
    if (chan->run.n_accesses)
        return 1; /* Python first; the reply follows when we come back */
    answer(chan, h, error, &n, sizeof n);
    chan->multi_done = 0;
    return 0;
}

static void do_dma_map(vms_chan *chan, const header *h, const uint8_t *body, size_t len, const int *fds, size_t n_fds)
{
    dma_map_body m;
    int rc = -EINVAL;

    if (len == sizeof m && n_fds <= 1) {
        memcpy(&m, body, sizeof m);
        if (m.argsz >= sizeof m && (n_fds || !m.offset))
            rc = vms_memory_map(chan->memory, m.address, m.size, m.flags, n_fds ? fds[0] : -1, m.offset);
    }
    answer(chan, h, -rc, NULL, 0);
}

static void do_dma_unmap(vms_chan *chan, const header *h, const uint8_t *body, size_t len)
{
    dma_unmap_body m;
    uint64_t removed;
    int rc = -EINVAL;

    if (len == sizeof m) {
        memcpy(&m, body, sizeof m);
        if (m.argsz < sizeof m)
            rc = -EINVAL;
        else if (m.flags == UNMAP_FLAG_ALL && !m.address && !m.size)
            rc = vms_memory_unmap_all(chan->memory, &removed);
        else if (m.flags == 0)
            rc = vms_memory_unmap(chan->memory, m.address, m.size, &removed);
    }
    answer(chan, h, -rc, &m, sizeof m);
}

/* ---- parsing ------------------------------------------------------------------------------- */

static int command_exit(vms_chan *chan, const header *h, uint8_t *body, size_t len, size_t n_fds)
{
    vms_run *run = &chan->run;

    run->reason = (h->flags & TYPE_MASK) == TYPE_REPLY ? VMS_EXIT_REPLY : VMS_EXIT_COMMAND;
    run->posted = (h->flags & FLAG_NO_REPLY) != 0;
    run->id = h->id;
    run->command = h->command;
    run->error = run->reason != VMS_EXIT_REPLY || !(h->flags & FLAG_ERROR) ? 0 : h->error ? (int32_t)h->error : EIO;
    run->data = body;
    run->len = len;
    run->fds = chan->out_fds;
    run->n_fds = n_fds;
    return 1;
}

static int closed(vms_chan *chan, int error)
{
    chan->run.reason = VMS_EXIT_CLOSED;
    chan->run.error = error;
    return 1;
}

static int has_lost(const int *fds, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (fds[i] == LOST_FD)
            return 1;
    return 0;
}

/* Parses the bytes received.  1: an exit is ready; 0: more bytes are needed. */
static int parse(vms_chan *chan, stream *s)
{
    uint32_t max_message = chan->open ? chan->max_xfer + 64 : HANDSHAKE_SIZE;
    header h;

    for (;;) {
        if (s->drain) {
            size_t n = s->drain < available(s) ? (size_t)s->drain : available(s);
            consume(s, n);
            s->drain -= n;
            if (s->drain)
                return 0;
            take_fds(s, s->consumed - 1, NULL, 0);
        }
        if (available(s) < sizeof h)
            break;
        memcpy(&h, s->buf + s->rpos, sizeof h);
        uint32_t type = h.flags & TYPE_MASK;
        if (h.size < sizeof h) {
            if (chan->run.n_accesses)
                break;
            if (s == &chan->main && type == TYPE_COMMAND) {
                h.flags &= ~FLAG_NO_REPLY;
                answer(chan, &h, EINVAL, NULL, 0);
                flush(chan);
            }
            return closed(chan, EPROTO);
        }
        if (h.size > max_message || type > TYPE_REPLY || (s == &chan->twin && type != TYPE_REPLY)) {
            if (chan->run.n_accesses)
                break;
            if (type == TYPE_REPLY || s == &chan->twin)
                return closed(chan, EPROTO); /* a reply gets no error reply */
            answer(chan, &h, EINVAL, NULL, 0);
            s->drain = h.size;
            continue;
        }
        if (available(s) < h.size)
            break;

        uint8_t *body = s->buf + s->rpos + sizeof h;
        size_t len = h.size - sizeof h;
        int hot = chan->open && type == TYPE_COMMAND;
        if (hot && h.command == CMD_REGION_WRITE) {
            int rc = do_write(chan, &h, body, len);
            if (rc < 0)
                break;
            take_fds(s, s->consumed, NULL, 0);
            consume(s, h.size);
            chan->func->stats.messages++;
            if (rc)
                break;
            continue;
        }
        if (chan->run.n_accesses)
            break;
        if (hot && h.command == CMD_WRITE_MULTI && do_multi(chan, &h, body, len))
            break;

        size_t n_fds = take_fds(s, s->consumed, chan->out_fds, CONTROL_FDS + 1);
        consume(s, h.size);
        chan->func->stats.messages++;
        if (n_fds > chan->max_fds && !(hot && h.command == CMD_WRITE_MULTI)) {
            close_fds(chan->out_fds, n_fds);
            if (type == TYPE_COMMAND)
                answer(chan, &h, EINVAL, NULL, 0);
            continue;
        }
        if (type == TYPE_COMMAND && has_lost(chan->out_fds, n_fds) && !(hot && h.command == CMD_WRITE_MULTI)) {
            /* Python refuses it, and logs that: without its fds it would be another message. */
            close_fds(chan->out_fds, n_fds);
            command_exit(chan, &h, body, len, 0);
            chan->run.error = EMFILE;
            return 1;
        }
        if (type == TYPE_REPLY) {
            close_fds(chan->out_fds, n_fds); /* no reply to a command of ours carries any */
            n_fds = 0;
        }
        if (!hot)
            return command_exit(chan, &h, body, len, n_fds);
        switch (h.command) {
        case CMD_REGION_READ:
            close_fds(chan->out_fds, n_fds);
            if (do_read(chan, &h, body, len))
                return 1;
            break;
        case CMD_WRITE_MULTI:
            close_fds(chan->out_fds, n_fds);
            break;
        case CMD_DMA_MAP:
            do_dma_map(chan, &h, body, len, chan->out_fds, n_fds);
            close_fds(chan->out_fds, n_fds);
            break;
        case CMD_DMA_UNMAP:
            close_fds(chan->out_fds, n_fds);
            do_dma_unmap(chan, &h, body, len);
            break;
        default:
            return command_exit(chan, &h, body, len, n_fds);
        }
    }
    if (chan->run.n_accesses) {
        chan->run.reason = VMS_EXIT_POSTED;
        return 1;
    }
    return chan->pending.kind != 0;
}

/* ---- public ------------------------------------------------------------------------------- */

int vms_chan_create(vms_func *func, vms_memory *memory, int socket, uint32_t max_xfer, uint32_t max_fds,
                    uint32_t send_ms, vms_chan **out)
{
    if (max_xfer < 4096 || max_xfer > (1u << 30) || max_fds > CONTROL_FDS || send_ms > INT32_MAX)
        return -EINVAL;
    vms_chan *chan = calloc(1, sizeof *chan);
    if (!chan)
        return -ENOMEM;
    chan->func = func;
    chan->memory = memory;
    func_ref(func);
    memory_ref(memory);
    chan->max_xfer = max_xfer;
    chan->max_fds = max_fds;
    chan->send_ms = send_ms;
    chan->twin.fd = chan->main.fd = chan->twin_fd = -1;
    chan->reply_data = malloc(max_xfer);
    if (!chan->reply_data || stream_init(&chan->main, -1, max_fds + 1) < 0) {
        vms_chan_destroy(chan);
        return -ENOMEM;
    }
    chan->main.fd = socket;
    *out = chan;
    return 0;
}

void vms_chan_destroy(vms_chan *chan)
{
    if (!chan)
        return;
    stream_free(&chan->main);
    stream_free(&chan->twin);
    vms_memory_destroy(chan->memory);
    vms_func_destroy(chan->func);
    free(chan->reply_data);
    free(chan);
}

vms_run *vms_chan_run(vms_chan *chan)
{
    return &chan->run;
}

int vms_chan_open(vms_chan *chan, uint32_t peer_xfer, int twin)
{
    if (chan->open)
        return -EALREADY;
    if (twin >= 0) {
        int rc = stream_init(&chan->twin, twin, 0);
        if (rc < 0) {
            chan->twin.fd = -1;
            return rc;
        }
        /* Pairs with vms_chan_shutdown(): one of the two sees the other's store. */
        chan->twin_fd = twin;
        if (chan->stopped)
            shutdown(twin, SHUT_RDWR);
    }
    chan->peer_xfer = peer_xfer;
    chan->open = 1;
    return 0;
}

static void complete(vms_chan *chan)
{
    vms_run *run = &chan->run;
    int error = run->error;
    const access_head *a = &chan->pending.head;

    if (error)
        chan->func->stats.rejected++;
    if (!chan->pending.posted) {
        const void *data = a->count <= 8 ? (const void *)&run->value : (const void *)chan->reply_data;
        size_t len = chan->pending.kind == VMS_EXIT_READ ? a->count : 0;
        put_reply(chan, chan->pending.id, chan->pending.command, (uint32_t)error, a, sizeof *a, data, len);
    }
    chan->pending.kind = 0;
}

int vms_complete(vms_chan *chan)
{
    if (chan->pending.kind)
        complete(chan);
    flush(chan);
    return 0;
}

static int enter(vms_chan *chan, uint64_t deadline)
{
    vms_run *run = &chan->run;
    stream *streams[2] = { &chan->main, &chan->twin };
    uint32_t max_message = chan->open ? chan->max_xfer + 64 : HANDSHAKE_SIZE;

    for (int busy = 0;; busy = 1) {
        for (int i = 0; i < 2; i++)
            if (streams[i]->fd >= 0 && parse(chan, streams[i]))
                return 0;
        flush(chan);
        if (chan->dead) {
            closed(chan, chan->dead);
            return 0;
        }
        /* A client that never pauses, or keeps signalling an eventfd, must not delay timers. */
        if (busy && deadline != UINT64_MAX && now_ns() >= deadline) {
            run->reason = VMS_EXIT_TIMEOUT;
            return 0;
        }

        struct pollfd fds[MAX_WATCHES + 3] = { { chan->main.fd, POLLIN, 0 }, { chan->twin.fd, POLLIN, 0 } };
        uint32_t reason;
        int rc = wait_for(chan->func, fds, 2, deadline, &reason, &run->id);
        if (rc < 0)
            return rc;
        if (reason) {
            run->reason = reason;
            return 0;
        }
        for (int i = 0; i < 2; i++) {
            if (streams[i]->fd < 0 || !fds[i].revents)
                continue;
            ssize_t n = stream_fill(streams[i], max_message);
            if (n == 0) {
                closed(chan, available(streams[i]) || streams[i]->drain ? ECONNRESET : 0);
                return 0;
            }
            if (n < 0 && n != -EAGAIN && n != -EINTR) {
                closed(chan, (int)-n);
                return 0;
            }
        }
    }
}

int vms_enter(vms_chan *chan, uint64_t deadline_ns)
{
    if (chan->pending.kind)
        complete(chan);
    chan->run.n_accesses = 0;
    chan->run.n_fds = 0;
    int rc = enter(chan, deadline_ns);
    flush(chan);
    chan->func->stats.exits++;
    return rc < 0 ? rc : (int)chan->run.reason;
}

int vms_reply(vms_chan *chan, uint16_t id, uint16_t command, uint32_t error, const void *payload, size_t len,
              const int *fds, size_t n_fds)
{
    if (error)
        chan->func->stats.rejected++;
    if (!n_fds) {
        put_reply(chan, id, command, error, payload, len, NULL, 0);
        return 0;
    }
    if (n_fds > CONTROL_FDS)
        return -EINVAL;
    flush(chan);
    if (chan->dead)
        return 0;
    header h = { id, command, (uint32_t)(sizeof h + len), TYPE_REPLY, 0 };
    struct iovec iov[2] = { { &h, sizeof h }, { (void *)(uintptr_t)payload, len } };
    int rc = send_all(chan->main.fd, iov, 2, fds, n_fds, chan->send_ms);
    if (rc < 0)
        chan->dead = -rc;
    return 0;
}

int vms_command(vms_chan *chan, uint16_t id, uint16_t command, const void *head, size_t head_len, const void *data,
                size_t len)
{
    int fd = chan->twin.fd >= 0 ? chan->twin.fd : chan->main.fd;

    if (len > chan->peer_xfer || head_len > 64)
        return -EINVAL;
    flush(chan);
    if (chan->dead)
        return -chan->dead;
    header h = { id, command, (uint32_t)(sizeof h + head_len + len), TYPE_COMMAND, 0 };
    struct iovec iov[3] = { { &h, sizeof h },
                            { (void *)(uintptr_t)head, head_len },
                            { (void *)(uintptr_t)data, len } };
    int rc = send_all(fd, iov, 3, NULL, 0, chan->send_ms);
    if (rc < 0)
        chan->dead = -rc;
    return rc;
}

int vms_chan_shutdown(vms_chan *chan)
{
    chan->stopped = 1;
    int twin = chan->twin_fd;
    if (twin >= 0)
        shutdown(twin, SHUT_RDWR);
    return shutdown(chan->main.fd, SHUT_RDWR) < 0 ? -errno : 0;
}
