/* SPDX-License-Identifier: MIT
 * Eventfds that a client has as well: signalled and read without ever waiting.
 *
 * O_NONBLOCK is a flag of the open file description, which the client shares: it can clear it at any time, fill the
 * counter, and a write() of ours would sleep for as long as the client likes.  To ask poll() first is a race.  What the
 * kernel itself does to an eventfd (eventfd_signal(): KVM's irqfd, vhost, completions of AIO) never waits: a full
 * counter stays full.  So a signal is the completion of an empty read by AIO, which is complete when io_submit()
 * returns.  Reading has RWF_NOWAIT (Linux 5.8), which counts whatever the flags of the description are.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/aio_abi.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "func.h"

#define RING 32 /* completions that may lie there unread */

int eventfd_take(int fd)
{
    uint64_t value;
    struct iovec iov = { &value, sizeof value };

    return preadv2(fd, &iov, 1, -1, RWF_NOWAIT) == (ssize_t)sizeof value;
}

static int start_aio(vms_func *func)
{
    if (func->aio_source < 0 && (func->aio_source = memfd_create("vmodel-signal", MFD_CLOEXEC)) < 0)
        return -errno;
    return !func->aio && syscall(SYS_io_setup, RING, &func->aio) < 0 ? -errno : 0;
}

static int submit(vms_func *func, int eventfd)
{
    struct iocb request = {
        .aio_lio_opcode = IOCB_CMD_PREAD,
        .aio_fildes = (uint32_t)func->aio_source, /* empty: it ends at once */
        .aio_flags = IOCB_FLAG_RESFD,
        .aio_resfd = (uint32_t)eventfd,
    };
    struct iocb *requests[] = { &request };

    return syscall(SYS_io_submit, func->aio, 1, requests) == 1 ? 0 : -errno;
}

int vms_signal(vms_func *func, int eventfd)
{
    pthread_mutex_lock(&func->signal_lock);
    int rc = start_aio(func);
    if (rc == 0) {
        rc = submit(func, eventfd);
        if (rc == -EAGAIN) {
            struct io_event done[RING];
            struct timespec now = { 0, 0 };
            while (syscall(SYS_io_getevents, func->aio, 0, RING, done, &now) == RING)
                ;
            rc = submit(func, eventfd);
        }
    } else {
        /* No AIO here: as good as it can be, see docs/robustness.md. */
        uint64_t one = 1;
        rc = write(eventfd, &one, sizeof one) < 0 && errno != EAGAIN ? -errno : 0;
    }
    pthread_mutex_unlock(&func->signal_lock);
    return rc;
}

void signals_end(vms_func *func)
{
    if (func->aio)
        syscall(SYS_io_destroy, func->aio);
    if (func->aio_source >= 0)
        close(func->aio_source);
    pthread_mutex_destroy(&func->signal_lock);
}
