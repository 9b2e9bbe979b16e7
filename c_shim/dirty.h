/* SPDX-License-Identifier: MIT
 * A dirty log: which 4 KiB pages have been written to; one for a function's memory (GPA) and for each domain (IOVA). */
#ifndef VMS_DIRTY_H
#define VMS_DIRTY_H

#include <pthread.h>
#include <stdatomic.h>

#include "span_tree.h"
#include "vmshim.h"

typedef struct dirty_log {
    _Atomic int on;
    pthread_mutex_t lock; /* innermost */
    span_tree ranges;     /* empty: all is logged */
    span_tree chunks;
    int lost;             /* some writes are not in chunks: all pages are reported as dirty until the log is stopped */
} dirty_log;

void dirty_init(dirty_log *log);
void dirty_destroy(dirty_log *log);
/* As vms_dirty_start(), _stop(), _report(). */
int dirty_start(dirty_log *log, const vms_range *ranges, size_t n);
int dirty_stop(dirty_log *log);
int dirty_report(dirty_log *log, uint64_t start, uint64_t size, uint64_t page_size, int keep, uint64_t *bitmap,
                 size_t words);

void dirty_add(dirty_log *log, uint64_t start, uint64_t last);

/* Notes a write to [start, last] if logging is on. */
static inline void dirty_mark(dirty_log *log, uint64_t start, uint64_t last)
{
    if (atomic_load_explicit(&log->on, memory_order_acquire))
        dirty_add(log, start, last);
}

#endif
