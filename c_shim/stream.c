/* SPDX-License-Identifier: MIT
 * One socket: bulk reads into a buffer, and which message received fds belong to.
 *
 * The kernel ends a read after the data that carried fds, so they belong to a message that begins in what was just
 * read: the last one there, or the last that takes fds at all when the last one does not (a client that puts several
 * messages into one sendmsg()).
 */
#define _GNU_SOURCE
#include "stream.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "wire.h"

#define START_SIZE (64u * 1024)

int stream_init(stream *s, int fd, uint32_t fd_room)
{
    s->fd = fd;
    s->fd_room = fd_room;
    s->cap = START_SIZE;
    s->buf = malloc(s->cap);
    return s->buf ? 0 : -ENOMEM;
}

void stream_free(stream *s)
{
    for (size_t i = 0; i < s->n_held; i++)
        close_fds(&s->held[i].fd, 1);
    if (s->fd >= 0)
        close(s->fd);
    free(s->buf);
}

size_t take_fds(stream *s, uint64_t at, int *out, size_t room)
{
    size_t n = 0, kept = 0;

    for (size_t i = 0; i < s->n_held; i++) {
        if (s->held[i].at > at)
            s->held[kept++] = s->held[i];
        else if (n < room && s->held[i].at == at)
            out[n++] = s->held[i].fd;
        else
            close_fds(&s->held[i].fd, 1);
    }
    s->n_held = kept;
    return n;
}

void close_fds(const int *fds, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (fds[i] != LOST_FD)
            close(fds[i]);
}

static int takes_fds(uint16_t command)
{
    return command == CMD_DMA_MAP || command == CMD_SET_IRQS;
}

/* The position of the message that owns the fds received with the last `fresh` bytes of the buffer. */
static uint64_t owner_of_fds(const stream *s, size_t fresh)
{
    size_t skip = s->drain < available(s) ? (size_t)s->drain : available(s);
    size_t at = s->rpos + skip, last = at, last_taker = SIZE_MAX;
    int last_takes = 0;

    while (at < s->wpos) {
        header h;
        last = at;
        last_takes = 0;
        if (s->wpos - at < sizeof h)
            break;
        memcpy(&h, s->buf + at, sizeof h);
        last_takes = takes_fds(h.command);
        if (last_takes && at + h.size > s->wpos - fresh)
            last_taker = at;
        if (h.size < sizeof h || h.size > s->wpos - at)
            break;
        at += h.size;
    }
    size_t owner = s->wpos - last >= sizeof(header) && !last_takes && last_taker != SIZE_MAX ? last_taker : last;
    return s->consumed + (owner - s->rpos);
}

/* Keeps fds for the message at `owner`.  The only other message with fds is the incomplete one at the head of the
 * buffer. */
static void hold_fds(stream *s, uint64_t owner, const int *fds, size_t n)
{
    size_t has = 0;

    for (size_t i = 0; i < s->n_held; i++)
        has += s->held[i].at == owner;
    for (size_t i = 0; i < n; i++) {
        if (has < s->fd_room && s->n_held < MAX_HELD_FDS) {
            s->held[s->n_held++] = (struct held){ owner, fds[i] };
            has++;
        } else {
            close_fds(fds + i, 1); /* the message has too many already, and will be refused */
        }
    }
}

ssize_t stream_fill(stream *s, uint32_t max_message)
{
    if (s->rpos == s->wpos) {
        s->rpos = s->wpos = 0;
    } else if (s->rpos > s->cap / 2 || s->wpos == s->cap) {
        memmove(s->buf, s->buf + s->rpos, available(s));
        s->wpos -= s->rpos;
        s->rpos = 0;
    }
    if (available(s) >= sizeof(header) && !s->drain) {
        header h;
        memcpy(&h, s->buf + s->rpos, sizeof h);
        if (h.size > s->cap && h.size <= max_message) {
            uint8_t *grown = realloc(s->buf, h.size);
            if (!grown)
                return -ENOMEM;
            s->buf = grown;
            s->cap = h.size;
        }
        if (s->rpos + h.size > s->cap) {
            memmove(s->buf, s->buf + s->rpos, available(s));
            s->wpos -= s->rpos;
            s->rpos = 0;
        }
    }
    union {
        struct cmsghdr align;
        char space[CMSG_SPACE((CONTROL_FDS + 1) * sizeof(int))];
    } control;
    struct iovec iov = { s->buf + s->wpos, s->cap - s->wpos };
    /* The kernel closes the fds that find no room here. */
    struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control,
                          .msg_controllen = s->fd_room ? CMSG_LEN(s->fd_room * sizeof(int)) : 0 };
    ssize_t n = recvmsg(s->fd, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (n < 0)
        return -errno;
    s->wpos += (size_t)n;
    size_t n_fds = 0;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&msg); c; c = CMSG_NXTHDR(&msg, c)) {
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
            n_fds = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
            hold_fds(s, owner_of_fds(s, (size_t)n), (const int *)(const void *)CMSG_DATA(c), n_fds);
        }
    }
    if ((msg.msg_flags & MSG_CTRUNC) && n_fds < s->fd_room) {
        /* There was room here, so the process has reached its limit of fds. */
        int lost = LOST_FD;
        hold_fds(s, owner_of_fds(s, (size_t)n), &lost, 1);
    }
    return n;
}

static uint64_t clock_ms(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000u + (uint64_t)ts.tv_nsec / 1000000u;
}

/* Until there is room, or the socket is shut down. */
static int wait_for_room(int fd, uint64_t deadline)
{
    uint64_t now = clock_ms();
    if (now >= deadline)
        return -ETIMEDOUT;
    struct pollfd poller = { fd, POLLOUT, 0 };
    int rc = poll(&poller, 1, (int)(deadline - now));
    return rc < 0 && errno != EINTR ? -errno : 0;
}

int send_all(int fd, const struct iovec *parts, size_t n_parts, const int *fds, size_t n_fds, uint32_t ms)
{
    struct iovec iov[3];
    union {
        struct cmsghdr align;
        char space[CMSG_SPACE(CONTROL_FDS * sizeof(int))];
    } control;
    struct msghdr msg = { .msg_iov = iov, .msg_iovlen = n_parts };

    memcpy(iov, parts, n_parts * sizeof *iov);
    if (n_fds) {
        msg.msg_control = &control;
        msg.msg_controllen = CMSG_SPACE(n_fds * sizeof(int));
        struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(n_fds * sizeof(int));
        memcpy(CMSG_DATA(c), fds, n_fds * sizeof(int));
    }
    uint64_t deadline = 0;
    while (msg.msg_iovlen) {
        ssize_t n = sendmsg(fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0) {
            int rc = errno == EINTR ? 0 : -errno;
            if (rc == -EAGAIN) {
                deadline = deadline ? deadline : clock_ms() + ms;
                rc = wait_for_room(fd, deadline);
            }
            if (rc < 0)
                return rc;
            continue;
        }
        msg.msg_control = NULL; /* fds go with the first byte */
        msg.msg_controllen = 0;
        size_t left = (size_t)n;
        while (msg.msg_iovlen && left >= msg.msg_iov->iov_len) {
            left -= msg.msg_iov->iov_len;
            msg.msg_iov++;
            msg.msg_iovlen--;
        }
        if (msg.msg_iovlen) {
            msg.msg_iov->iov_base = (uint8_t *)msg.msg_iov->iov_base + left;
            msg.msg_iov->iov_len -= left;
        }
    }
    return 0;
}
