/* SPDX-License-Identifier: MIT
 * Eventfds shared with a client; see eventfd.c. */
#ifndef VMS_EVENTFD_H
#define VMS_EVENTFD_H

/* Adds 1 to a counter, full or not; never waits.  Any thread.  -errno. */
int eventfd_signal(int eventfd);
/* Resets a counter to 0; returns whether it was not 0.  Never blocks. */
int eventfd_take(int fd);

#endif
