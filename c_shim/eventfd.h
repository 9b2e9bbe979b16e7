/* SPDX-License-Identifier: MIT
 * Eventfds shared with a client; see eventfd.c. */
#ifndef VMS_EVENTFD_H
#define VMS_EVENTFD_H

#include <pthread.h>

/* The AIO context for one function's signals. */
typedef struct signaller {
    pthread_mutex_t lock;
    unsigned long aio; /* aio_context_t; 0: not yet */
    int source;        /* an empty file, or -1 */
} signaller;

void signaller_init(signaller *s);
void signaller_destroy(signaller *s);
/* Adds 1 to a counter, full or not; never waits.  -errno. */
int signaller_send(signaller *s, int eventfd);
/* Resets a counter to 0; returns whether it was not 0.  Never blocks. */
int eventfd_take(int fd);

#endif
