/* SPDX-License-Identifier: MIT
 * Blocking until a socket, vms_wake(), a watched eventfd, a deadline or a signal. */
#define _GNU_SOURCE
#include "sleep.h"

#include <errno.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>

#include "eventfd.h"

/* A guest that waits for the effect of a doorbell goes on within microseconds, and waking up takes longer than that:
 * after a sleep as short as that, the next one begins with a busy-poll of this many nanoseconds. */
#define POLL_FIRST 4000u
#define POLL_MOST 64000u

uint64_t now_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* On a single CPU the peer could not run during a busy-poll. */
static int has_cpus(void)
{
    cpu_set_t set;

    return sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) > 1;
}

/* ppoll() with a deadline, which busy-polls briefly before it blocks. */
static int sleep_until(vms_func *func, struct pollfd *fds, size_t n, uint64_t deadline)
{
    uint64_t start = now_ns(), now = start, end = start + func->poll_ns;
    int rc, polling;

    do {
        polling = now < end && now < deadline;
        uint64_t left = polling || deadline <= now ? 0 : deadline - now;
        struct timespec ts = { (time_t)(left / 1000000000u), (long)(left % 1000000000u) };
        rc = ppoll(fds, n, !polling && deadline == UINT64_MAX ? NULL : &ts, NULL);
        now = now_ns();
    } while (!rc && polling);
    if (now - start > POLL_MOST)
        func->poll_ns = 0;
    else if (now > end && rc > 0 && func->poll_ns < POLL_MOST)
        func->poll_ns = func->poll_ns ? 2 * func->poll_ns : has_cpus() ? POLL_FIRST : 0;
    return rc;
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
    int rc = sleep_until(func, fds, total, deadline);
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
            if (fds[i].revents & POLLIN && eventfd_take(fds[i].fd)) {
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
