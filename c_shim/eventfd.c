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
#include <pthread.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define RING 32 /* completions that may be unread */

/* One context for the process, which the kernel frees at its end: io_destroy() of one takes some 30 ms (a grace period
 * of RCU), and the system has a limit for all.  A signal is complete when the lock is free again, so that no function's
 * signals take room from another's. */
static struct {
    pthread_mutex_t lock;
    pthread_once_t once;
    aio_context_t aio; /* 0: not yet */
    int source;        /* an empty file, or -1 */
} signals = { .lock = PTHREAD_MUTEX_INITIALIZER, .once = PTHREAD_ONCE_INIT, .source = -1 };

int eventfd_take(int fd)
{
    uint64_t value;
    struct iovec iov = { &value, sizeof value };

    return preadv2(fd, &iov, 1, -1, RWF_NOWAIT) == (ssize_t)sizeof value;
}

/* A context belongs to an address space: after fork() the child needs its own. */
static void before_fork(void)
{
    pthread_mutex_lock(&signals.lock);
}

static void in_parent(void)
{
    pthread_mutex_unlock(&signals.lock);
}

static void in_child(void)
{
    signals.aio = 0;
    pthread_mutex_unlock(&signals.lock);
}

static void watch_forks(void)
{
    pthread_atfork(before_fork, in_parent, in_child);
}

static int start_aio(void)
{
    if (signals.source < 0 && (signals.source = memfd_create("vmodel-signal", MFD_CLOEXEC)) < 0)
        return -errno;
    return !signals.aio && syscall(SYS_io_setup, RING, &signals.aio) < 0 ? -errno : 0;
}

static int submit(int eventfd)
{
    struct iocb request = {
        .aio_lio_opcode = IOCB_CMD_PREAD,
        .aio_fildes = (uint32_t)signals.source, /* empty: the read completes at once */
        .aio_flags = IOCB_FLAG_RESFD,
        .aio_resfd = (uint32_t)eventfd,
    };
    struct iocb *requests[] = { &request };

    return syscall(SYS_io_submit, signals.aio, 1, requests) == 1 ? 0 : -errno;
}

int eventfd_signal(int eventfd)
{
    pthread_once(&signals.once, watch_forks);
    pthread_mutex_lock(&signals.lock);
    int rc = start_aio();
    if (rc == 0) {
        rc = submit(eventfd);
        if (rc == -EAGAIN) {
            struct io_event done[RING];
            struct timespec now = { 0, 0 };
            while (syscall(SYS_io_getevents, signals.aio, 0, RING, done, &now) == RING)
                ;
            rc = submit(eventfd);
        }
    }
    int started = signals.aio != 0;
    pthread_mutex_unlock(&signals.lock);
    if (!started) {
        /* This system has no AIO left: a write() that may block, see docs/robustness.md. */
        uint64_t one = 1;
        rc = write(eventfd, &one, sizeof one) < 0 && errno != EAGAIN ? -errno : 0;
    }
    return rc;
}
