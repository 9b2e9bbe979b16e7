/* SPDX-License-Identifier: MIT
 * What kind of file a client has sent; see backing.c. */
#ifndef VMS_BACKING_H
#define VMS_BACKING_H

#include <stdint.h>
#include <sys/types.h>

/* What a client has sent. */
typedef struct backing {
    dev_t dev;
    ino_t ino;
    uint64_t size; /* of the file */
    uint64_t page; /* page size (huge pages) */
} backing;

/* EINVAL: no regular file; EOPNOTSUPP: its file system may block us forever. */
int backing_of(int fd, backing *out);

#endif
