/* SPDX-License-Identifier: MIT
 * Bytes and fds of one socket; see stream.c. */
#ifndef VMS_STREAM_H
#define VMS_STREAM_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#define CONTROL_FDS 253 /* SCM_MAX_FD */
#define LOST_FD (-1)     /* in place of fds that the kernel could not give to this process */
#define MAX_HELD_FDS (2 * (CONTROL_FDS + 1))

typedef struct stream {
    int fd;
    uint8_t *buf;
    size_t cap, rpos, wpos;
    uint64_t consumed; /* stream position of buf[rpos] */
    uint64_t drain;    /* bytes of a rejected message still to be thrown away */
    struct held {
        uint64_t at; /* position of the message they came with */
        int fd;
    } held[MAX_HELD_FDS];
    size_t n_held;
    uint32_t fd_room; /* how many fds of one message are kept; the rest is closed at once */
} stream;

int stream_init(stream *s, int fd, uint32_t fd_room);
/* Closes the socket and all fds that are still held. */
void stream_free(stream *s);

static inline size_t available(const stream *s)
{
    return s->wpos - s->rpos;
}

static inline void consume(stream *s, size_t n)
{
    s->rpos += n;
    s->consumed += n;
}

/* Takes the fds of the message at `at` (and any before it) out of the held ones; returns how many were copied to
 * out, LOST_FD among them.  Those that find no room there are closed. */
size_t take_fds(stream *s, uint64_t at, int *out, size_t room);
/* LOST_FD is skipped. */
void close_fds(const int *fds, size_t n);
/* One recvmsg().  > 0: bytes; 0: end of stream; < 0: -errno. */
ssize_t stream_fill(stream *s, uint32_t max_message);
/* Sends all of at most three parts, fds with the first byte.  ETIMEDOUT: not taken within `ms`. */
int send_all(int fd, const struct iovec *parts, size_t n_parts, const int *fds, size_t n_fds, uint32_t ms);

#endif
