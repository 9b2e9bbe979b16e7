/* SPDX-License-Identifier: MIT
 * One function's DMA windows and its dirty log; see guest_memory.c. */
#ifndef VMS_GUEST_MEMORY_H
#define VMS_GUEST_MEMORY_H

#include <pthread.h>
#include <stdatomic.h>

#include "dirty.h"
#include "files.h"
#include "span_tree.h"
#include "vmshim.h"

typedef struct window {
    span_node span; /* first: a span_node * is a window * */
    mapped_file *file;
    uint64_t offset;
    uint32_t prot;
} window;

/* A mapping that this memory's windows are in, however many. */
typedef struct holding {
    struct holding *next;
    mapped_file *file;
    uint64_t windows;
} holding;

/* Embedded in each object that caches windows. */
typedef struct memory_listener {
    struct memory_listener *next; /* under memory->listeners_lock */
    /* The windows in [start, last] have been removed: drops what is cached of them, and returns when no access through
     * them is under way.  Called under memory->listeners_lock alone. */
    void (*removed)(struct memory_listener *listener, uint64_t start, uint64_t last);
} memory_listener;

struct vms_memory {
    vms_files *files;
    uint32_t max_windows;
    _Atomic unsigned refs; /* its creator's, its requesters', channels' and pins' */
    pthread_mutex_t lock; /* windows.  Taken inside a requester's lock, never around it. */
    span_tree windows;
    holding *holdings;    /* under lock */
    uint32_t held, max_held;
    uint64_t held_bytes, max_bytes; /* of address space */

    pthread_mutex_t listeners_lock; /* Taken before a requester's lock. */
    memory_listener *listeners;

    dirty_log dirty;
};

void memory_ref(vms_memory *memory);
/* The window at gpa, or NULL, under memory->lock. */
const window *memory_find(const vms_memory *memory, uint64_t gpa);
/* One naturally aligned 8-byte word, as hardware that walks tables reads it; EFAULT where there is no file. */
int memory_load64(vms_memory *memory, uint64_t gpa, uint64_t *value);
/* How many aligned words of [gpa, gpa + size) are from `least` to `most`; 0 where there is no file. */
uint64_t memory_count_words(vms_memory *memory, uint64_t gpa, uint64_t size, uint64_t least, uint64_t most);
/* Compare-and-swap of a word.  EAGAIN: it is not `expected`; EFAULT: as above. */
int memory_cas64(vms_memory *memory, uint64_t gpa, uint64_t expected, uint64_t desired);

/* listener->removed is set. */
void memory_listen(vms_memory *memory, memory_listener *listener);
void memory_unlisten(vms_memory *memory, memory_listener *listener);

#endif
