/* SPDX-License-Identifier: MIT
 * Eventfds shared with a client: signalled and read without blocking.
 *
 * O_NONBLOCK is a flag of the open file description, which the client shares: it can clear it at any time, fill the
 * counter, and our write() would block for as long as the client likes.  Calling poll() first is a race.  The
 * kernel's own eventfd_signal() (KVM's irqfd, vhost, completions of AIO) never blocks: a full counter stays full.  So
 * a signal is the completion of an empty read by AIO, which is complete when io_submit() returns.  Reading has
 * RWF_NOWAIT (Linux 5.8), which counts whatever the flags of the description are.
 */
#define _GNU_SOURCE
#include "eventfd.h"

#include <errno.h>
#include <linux/aio_abi.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define RING 32 /* completions that may be unread */

int eventfd_take(int fd)
{
    uint64_t value;
    struct iovec iov = { &value, sizeof value };

    return preadv2(fd, &iov, 1, -1, RWF_NOWAIT) == (ssize_t)sizeof value;
}

static int start_aio(signaller *s)
{
    if (s->source < 0 && (s->source = memfd_create("vmodel-signal", MFD_CLOEXEC)) < 0)
        return -errno;
    return !s->aio && syscall(SYS_io_setup, RING, &s->aio) < 0 ? -errno : 0;
}

static int submit(signaller *s, int eventfd)
{
    struct iocb request = {
        .aio_lio_opcode = IOCB_CMD_PREAD,
        .aio_fildes = (uint32_t)s->source, /* empty: the read completes at once */
        .aio_flags = IOCB_FLAG_RESFD,
        .aio_resfd = (uint32_t)eventfd,
    };
    struct iocb *requests[] = { &request };

    return syscall(SYS_io_submit, s->aio, 1, requests) == 1 ? 0 : -errno;
}

void signaller_init(signaller *s)
{
    pthread_mutex_init(&s->lock, NULL);
    s->aio = 0;
    s->source = -1;
}

int signaller_send(signaller *s, int eventfd)
{
    pthread_mutex_lock(&s->lock);
    int rc = start_aio(s);
    if (rc == 0) {
        rc = submit(s, eventfd);
        if (rc == -EAGAIN) {
            struct io_event done[RING];
            struct timespec now = { 0, 0 };
            while (syscall(SYS_io_getevents, s->aio, 0, RING, done, &now) == RING)
                ;
            rc = submit(s, eventfd);
        }
    } else {
        /* This kernel has no AIO: a write() that may block, see docs/robustness.md. */
        uint64_t one = 1;
        rc = write(eventfd, &one, sizeof one) < 0 && errno != EAGAIN ? -errno : 0;
    }
    pthread_mutex_unlock(&s->lock);
    return rc;
}

void signaller_destroy(signaller *s)
{
    if (s->aio)
        syscall(SYS_io_destroy, s->aio);
    if (s->source >= 0)
        close(s->source);
    pthread_mutex_destroy(&s->lock);
}
