/* SPDX-License-Identifier: MIT
 * What ends a sleep: sockets, vms_wake(), watched eventfds, a deadline, a signal. */
#define _GNU_SOURCE
#include "sleep.h"

#include <errno.h>
#include <time.h>
#include <unistd.h>

uint64_t now_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

int wait_for(vms_func *func, struct pollfd *fds, size_t n, uint64_t deadline, uint32_t *reason,
                    uint16_t *cookie)
{
    uint16_t cookies[MAX_WATCHES];
    size_t total = n;

    fds[total++] = (struct pollfd){ func->wake_fd, POLLIN, 0 };
    if (__atomic_load_n(&func->n_watches, __ATOMIC_RELAXED)) {
        pthread_mutex_lock(&func->watch_lock);
        for (unsigned i = 0; i < func->n_watches; i++) {
            cookies[i] = func->watches[i].cookie;
            fds[total++] = (struct pollfd){ func->watches[i].fd, POLLIN, 0 };
        }
        pthread_mutex_unlock(&func->watch_lock);
    }
    struct timespec ts, *timeout = NULL;
    if (deadline != UINT64_MAX) {
        uint64_t now = now_ns(), left = deadline > now ? deadline - now : 0;
        ts = (struct timespec){ (time_t)(left / 1000000000u), (long)(left % 1000000000u) };
        timeout = &ts;
    }
    int rc = ppoll(fds, total, timeout, NULL);
    if (rc < 0 && errno != EINTR)
        return -errno;
    uint64_t value;
    if (rc <= 0) {
        *reason = rc < 0 ? VMS_EXIT_WAKE : VMS_EXIT_TIMEOUT; /* a signal: let Python run its handlers */
    } else if (fds[n].revents) {
        if (read(func->wake_fd, &value, sizeof value) < 0 && errno != EAGAIN)
            return -errno;
        *reason = VMS_EXIT_WAKE;
    } else {
        *reason = 0;
        for (size_t i = n + 1; i < total; i++) {
            if (fds[i].revents & POLLIN && read(fds[i].fd, &value, sizeof value) == (ssize_t)sizeof value) {
                *reason = VMS_EXIT_EVENT;
                *cookie = cookies[i - n - 1];
                break;
            }
        }
    }
    return 0;
}

int vms_idle(vms_func *func, int listener, uint64_t deadline_ns, uint16_t *cookie)
{
    struct pollfd fds[MAX_WATCHES + 2] = { { listener, POLLIN, 0 } };
    uint32_t reason;

    int rc = wait_for(func, fds, 1, deadline_ns, &reason, cookie);
    if (rc < 0)
        return rc;
    if (reason)
        return (int)reason;
    return fds[0].revents ? VMS_EXIT_COMMAND : VMS_EXIT_WAKE;
}
