/* SPDX-License-Identifier: MIT
 * DMA windows: created by the client's DMA_MAP, removed by DMA_UNMAP. */
#define _GNU_SOURCE
#include "guest_memory.h"

#include <errno.h>
#include <stdlib.h>

#define PAGE_MASK ((uint64_t)4095)

int vms_memory_create(vms_files *files, uint32_t max_windows, vms_memory **out)
{
    vms_memory *memory = calloc(1, sizeof *memory);
    if (!memory)
        return -ENOMEM;
    memory->files = files;
    files_ref(files);
    atomic_store(&memory->refs, 1);
    memory->max_windows = max_windows;
    memory->max_held = VMS_MAX_MAPPINGS;
    memory->max_bytes = VMS_MAX_BYTES;
    pthread_mutex_init(&memory->lock, NULL);
    pthread_mutex_init(&memory->listeners_lock, NULL);
    span_tree_init(&memory->windows);
    dirty_init(&memory->dirty);
    *out = memory;
    return 0;
}

void vms_memory_destroy(vms_memory *memory)
{
    if (!memory || atomic_fetch_sub(&memory->refs, 1) != 1)
        return;
    uint64_t removed;
    vms_memory_unmap_all(memory, &removed);
    dirty_destroy(&memory->dirty);
    pthread_mutex_destroy(&memory->lock);
    pthread_mutex_destroy(&memory->listeners_lock);
    vms_files_destroy(memory->files);
    free(memory);
}

int vms_memory_limit(vms_memory *memory, uint32_t max_mappings, uint64_t max_bytes)
{
    pthread_mutex_lock(&memory->lock);
    memory->max_held = max_mappings;
    memory->max_bytes = max_bytes;
    pthread_mutex_unlock(&memory->lock);
    return 0;
}

void memory_ref(vms_memory *memory)
{
    atomic_fetch_add(&memory->refs, 1);
}

const window *memory_find(const vms_memory *memory, uint64_t gpa)
{
    const span_node *node = span_tree_from(&memory->windows, gpa);
    return node && node->start <= gpa ? (const window *)node : NULL;
}

static int check_range(uint64_t gpa, uint64_t size)
{
    if (!size || ((gpa | size) & PAGE_MASK) || gpa + (size - 1) < gpa)
        return -EINVAL;
    return 0;
}

/* ---- what a client takes of the process's address space ---------------------------------------- */

/* The largest mapping that the limit still allows, in bytes. */
static uint64_t room_left(vms_memory *memory)
{
    pthread_mutex_lock(&memory->lock);
    uint64_t room = memory->held_bytes < memory->max_bytes ? memory->max_bytes - memory->held_bytes : 0;
    if (memory->held >= memory->max_held)
        room = 0;
    pthread_mutex_unlock(&memory->lock);
    return room;
}

static holding **holding_of(vms_memory *memory, const mapped_file *file)
{
    holding **link = &memory->holdings;
    while (*link && (*link)->file != file)
        link = &(*link)->next;
    return link;
}

/* Counts one more window in this mapping; consumes *fresh if it is the first one.  Under memory->lock. */
static int hold(vms_memory *memory, mapped_file *file, holding **fresh)
{
    holding *held = *holding_of(memory, file);

    if (!held) {
        if (memory->held >= memory->max_held || memory->held_bytes > memory->max_bytes ||
            file_size(file) > memory->max_bytes - memory->held_bytes)
            return -ENOSPC;
        held = *fresh;
        *fresh = NULL;
        *held = (holding){ .next = memory->holdings, .file = file };
        memory->holdings = held;
        memory->held++;
        memory->held_bytes += file_size(file);
    }
    held->windows++;
    return 0;
}

/* Counts one window less.  Under memory->lock. */
static void unhold(vms_memory *memory, const mapped_file *file)
{
    holding **link = holding_of(memory, file), *held = *link;

    if (--held->windows)
        return;
    *link = held->next;
    memory->held--;
    memory->held_bytes -= file_size(file);
    free(held);
}

/* ---- windows --------------------------------------------------------------------------------- */

/* Puts the window in its place.  Under memory->lock. */
static int insert(vms_memory *memory, window *win, holding **fresh)
{
    if (span_tree_overlaps(&memory->windows, win->span.start, win->span.last))
        return -EEXIST;
    if (memory->windows.count >= memory->max_windows)
        return -ENOSPC;
    int rc = win->file ? hold(memory, win->file, fresh) : 0;
    if (rc == 0)
        span_tree_insert(&memory->windows, &win->span);
    return rc;
}

int vms_memory_map(vms_memory *memory, uint64_t gpa, uint64_t size, uint32_t prot, int fd, uint64_t offset)
{
    int rc = check_range(gpa, size);
    if (rc < 0)
        return rc;
    if (!prot || (prot & ~(VMS_PROT_READ | VMS_PROT_WRITE)))
        return -EINVAL;

    window *win = calloc(1, sizeof *win);
    holding *fresh = fd >= 0 ? calloc(1, sizeof *fresh) : NULL;
    if (!win || (fd >= 0 && !fresh)) {
        free(win);
        free(fresh);
        return -ENOMEM;
    }
    win->span.start = gpa;
    win->span.last = gpa + (size - 1);
    win->prot = prot;
    win->offset = fd >= 0 ? offset : 0;
    if (fd >= 0)
        rc = file_get(memory->files, fd, offset, size, prot, room_left(memory), &win->file);
    if (rc == 0) {
        pthread_mutex_lock(&memory->lock);
        rc = insert(memory, win, &fresh);
        pthread_mutex_unlock(&memory->lock);
    }
    if (rc < 0) {
        if (win->file)
            file_put(win->file);
        free(win);
    }
    free(fresh);
    return rc;
}

/* Waits until nobody uses the windows in [start, last], which have just left the tree, then frees them. */
static void release(vms_memory *memory, uint64_t start, uint64_t last, span_node *removed)
{
    pthread_mutex_lock(&memory->listeners_lock);
    for (memory_listener *listener = memory->listeners; listener; listener = listener->next)
        listener->removed(listener, start, last);
    pthread_mutex_unlock(&memory->listeners_lock);

    while (removed) {
        window *win = (window *)removed;
        removed = removed->right;
        if (win->file) {
            pthread_mutex_lock(&memory->lock);
            unhold(memory, win->file);
            pthread_mutex_unlock(&memory->lock);
            file_put(win->file);
        }
        free(win);
    }
}

/* Removes the windows in [start, last] from the tree; none of them may cross an end. */
static uint64_t remove_span(vms_memory *memory, uint64_t start, uint64_t last, span_node **removed)
{
    span_node *node;
    uint64_t bytes = 0;

    while ((node = span_tree_from(&memory->windows, start)) && node->start <= last) {
        span_tree_remove(&memory->windows, node);
        bytes += node->last - node->start + 1;
        node->right = *removed;
        *removed = node;
    }
    return bytes;
}

int vms_memory_unmap(vms_memory *memory, uint64_t gpa, uint64_t size, uint64_t *removed_bytes)
{
    span_node *removed = NULL;
    uint64_t last = gpa + (size - 1);

    *removed_bytes = 0;
    int rc = check_range(gpa, size);
    if (rc < 0)
        return rc;
    pthread_mutex_lock(&memory->lock);
    const span_node *first = span_tree_from(&memory->windows, gpa);
    const span_node *tail = span_tree_from(&memory->windows, last);
    if ((first && first->start < gpa) || (tail && tail->start <= last && tail->last > last))
        rc = -EINVAL;
    else
        *removed_bytes = remove_span(memory, gpa, last, &removed);
    pthread_mutex_unlock(&memory->lock);
    if (removed)
        release(memory, gpa, last, removed);
    return rc;
}

int vms_memory_unmap_all(vms_memory *memory, uint64_t *removed_bytes)
{
    span_node *removed = NULL;

    pthread_mutex_lock(&memory->lock);
    *removed_bytes = remove_span(memory, 0, UINT64_MAX, &removed);
    pthread_mutex_unlock(&memory->lock);
    if (removed)
        release(memory, 0, UINT64_MAX, removed);
    return 0;
}

size_t vms_memory_count(vms_memory *memory)
{
    pthread_mutex_lock(&memory->lock);
    size_t count = memory->windows.count;
    pthread_mutex_unlock(&memory->lock);
    return count;
}

size_t vms_memory_list(vms_memory *memory, uint64_t gpa, vms_window *out, size_t room)
{
    size_t n = 0;

    pthread_mutex_lock(&memory->lock);
    for (const span_node *node = span_tree_from(&memory->windows, gpa); node && n < room;) {
        const window *win = (const window *)node;
        out[n++] = (vms_window){ node->start, node->last, win->offset, win->prot, win->file != NULL };
        node = node->last == UINT64_MAX ? NULL : span_tree_from(&memory->windows, node->last + 1);
    }
    pthread_mutex_unlock(&memory->lock);
    return n;
}

void memory_listen(vms_memory *memory, memory_listener *listener)
{
    pthread_mutex_lock(&memory->listeners_lock);
    listener->next = memory->listeners;
    memory->listeners = listener;
    pthread_mutex_unlock(&memory->listeners_lock);
}

void memory_unlisten(vms_memory *memory, memory_listener *listener)
{
    pthread_mutex_lock(&memory->listeners_lock);
    memory_listener **link = &memory->listeners;
    while (*link != listener)
        link = &(*link)->next;
    *link = listener->next;
    pthread_mutex_unlock(&memory->listeners_lock);
}

/* ---- words of tables, for the walkers ------------------------------------------------------- */

/* The word at gpa, under memory->lock; NULL where there is none. */
static uint64_t *word_at(vms_memory *memory, uint64_t gpa, uint32_t prot, const window **found)
{
    const window *win = gpa & 7 ? NULL : memory_find(memory, gpa);
    if (!win || !win->file || (win->prot & prot) != prot)
        return NULL;
    *found = win;
    return (uint64_t *)(void *)file_at(win->file, win->offset + (gpa - win->span.start));
}

static int within_file(const window *win, uint64_t gpa)
{
    return win->offset + (gpa - win->span.start) + 8 <= atomic_load(&win->file->good);
}

int memory_load64(vms_memory *memory, uint64_t gpa, uint64_t *value)
{
    const window *win;
    int rc = -EFAULT;

    /* Under the lock the window cannot go, nor its file. */
    pthread_mutex_lock(&memory->lock);
    const uint64_t *word = word_at(memory, gpa, VMS_PROT_READ, &win);
    if (word && within_file(win, gpa)) {
        *value = __atomic_load_n(word, __ATOMIC_ACQUIRE);
        if (within_file(win, gpa)) /* else the file has shrunk under the load */
            rc = 0;
    }
    pthread_mutex_unlock(&memory->lock);
    return rc;
}

uint64_t memory_count_words(vms_memory *memory, uint64_t gpa, uint64_t size, uint64_t least, uint64_t most)
{
    uint64_t found = 0, last = gpa + (size - 1), n;

    gpa = (gpa + 7) & ~UINT64_C(7);
    pthread_mutex_lock(&memory->lock);
    for (; gpa + 7 > gpa && gpa + 7 <= last; gpa += n) {
        const window *win = memory_find(memory, gpa);
        uint64_t offset;
        n = 8;
        if (!win || !win->file)
            break;
        n = (win->span.last < last ? win->span.last : last) - gpa + 1;
        offset = win->offset + (gpa - win->span.start);
        n &= ~UINT64_C(7);
        if (!n || offset + n > atomic_load(&win->file->good))
            break;
        const uint64_t *word = (const uint64_t *)(const void *)file_at(win->file, offset);
        for (uint64_t i = 0; i < n / 8; i++) {
            uint64_t value = __atomic_load_n(&word[i], __ATOMIC_RELAXED);
            found += value >= least && value <= most;
        }
    }
    pthread_mutex_unlock(&memory->lock);
    return found;
}

int memory_cas64(vms_memory *memory, uint64_t gpa, uint64_t expected, uint64_t desired)
{
    const window *win;
    int rc = -EFAULT;

    pthread_mutex_lock(&memory->lock);
    uint64_t *word = word_at(memory, gpa, VMS_PROT_READ | VMS_PROT_WRITE, &win);
    if (word && within_file(win, gpa)) {
        int done = __atomic_compare_exchange_n(word, &expected, desired, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
        if (within_file(win, gpa))
            rc = done ? 0 : -EAGAIN;
    }
    pthread_mutex_unlock(&memory->lock);
    if (rc == 0)
        dirty_mark(&memory->dirty, gpa, gpa + 7);
    return rc;
}

/* ---- the log of writes --------------------------------------------------------------------- */

int vms_dirty_start(vms_memory *memory, const vms_range *ranges, size_t n)
{
    return dirty_start(&memory->dirty, ranges, n);
}

int vms_dirty_stop(vms_memory *memory)
{
    return dirty_stop(&memory->dirty);
}

int vms_dirty_report(vms_memory *memory, uint64_t gpa, uint64_t size, uint64_t page_size, uint64_t *bitmap,
                     size_t words)
{
    return dirty_report(&memory->dirty, gpa, size, page_size, 0, bitmap, words);
}
