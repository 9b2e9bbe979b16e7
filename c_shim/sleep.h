/* SPDX-License-Identifier: MIT
 * Sleeping until something happens; see sleep.c. */
#ifndef VMS_SLEEP_H
#define VMS_SLEEP_H

#include <poll.h>

#include "func.h"

uint64_t now_ns(void);
/* Polls fds[0..n) plus the function's wake and watch fds, for which fds has room for MAX_WATCHES + 1 more.  Sets
 * *reason to WAKE, EVENT (and *cookie), TIMEOUT, or 0 when one of the n is ready.  poll() passes over an fd of -1. */
int wait_for(vms_func *func, struct pollfd *fds, size_t n, uint64_t deadline, uint32_t *reason, uint16_t *cookie);

#endif
