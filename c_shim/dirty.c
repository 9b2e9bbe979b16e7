/* SPDX-License-Identifier: MIT
 * The dirty log: one bit per 4 KiB page that a DMA write has touched since it was last reported.
 *
 * Bits live in chunks of 128 MiB of address space (4 KiB of bits), made when a page in them is first written, so that
 * the log of a sparse address space stays small.  A chunk that was reported whole is freed.  A lost bit would
 * silently corrupt a migrated guest: if another chunk cannot be allocated, the log reports all pages as dirty from
 * then on, which is slow but right. */
#include "dirty.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define PAGE_SHIFT 12
#define CHUNK_SHIFT 27
#define CHUNK_PAGES (1u << (CHUNK_SHIFT - PAGE_SHIFT))
#define CHUNK_WORDS (CHUNK_PAGES / 64)
#define MAX_RANGES 65536
#define MAX_CHUNKS 16384 /* 64 MiB of bits: 2 TiB of dirty memory */

typedef struct chunk {
    span_node span;
    uint64_t bits[CHUNK_WORDS];
} chunk;

static void clear_tree(span_tree *tree)
{
    span_node *node;
    while ((node = tree->root)) {
        span_tree_remove(tree, node);
        free(node);
    }
}

static void clear(dirty_log *log)
{
    clear_tree(&log->ranges);
    clear_tree(&log->chunks);
    log->lost = 0;
}

void dirty_init(dirty_log *log)
{
    atomic_store(&log->on, 0);
    pthread_mutex_init(&log->lock, NULL);
    span_tree_init(&log->ranges);
    span_tree_init(&log->chunks);
    log->lost = 0;
}

void dirty_destroy(dirty_log *log)
{
    clear(log);
    pthread_mutex_destroy(&log->lock);
}

int dirty_start(dirty_log *log, const vms_range *ranges, size_t n)
{
    int rc = 0;

    if (n > MAX_RANGES)
        return -EINVAL;
    pthread_mutex_lock(&log->lock);
    if (atomic_load(&log->on))
        rc = -EBUSY;
    for (size_t i = 0; i < n && rc == 0; i++) {
        if (ranges[i].start > ranges[i].last ||
            span_tree_overlaps(&log->ranges, ranges[i].start, ranges[i].last)) {
            rc = -EINVAL;
            break;
        }
        span_node *node = calloc(1, sizeof *node);
        if (!node) {
            rc = -ENOMEM;
            break;
        }
        node->start = ranges[i].start;
        node->last = ranges[i].last;
        span_tree_insert(&log->ranges, node);
    }
    if (rc == 0)
        atomic_store(&log->on, 1);
    else if (rc != -EBUSY)
        clear_tree(&log->ranges);
    pthread_mutex_unlock(&log->lock);
    return rc;
}

int dirty_stop(dirty_log *log)
{
    int rc = 0;

    pthread_mutex_lock(&log->lock);
    if (!atomic_load(&log->on))
        rc = -EINVAL;
    atomic_store(&log->on, 0);
    clear(log);
    pthread_mutex_unlock(&log->lock);
    return rc;
}

/* Sets bits [first, last]. */
static void set_bits(uint64_t *bits, uint64_t first, uint64_t last)
{
    for (uint64_t word = first / 64; word <= last / 64; word++) {
        uint64_t mask = UINT64_MAX;
        if (word == first / 64)
            mask &= UINT64_MAX << (first % 64);
        if (word == last / 64)
            mask &= UINT64_MAX >> (63 - last % 64);
        bits[word] |= mask;
    }
}

static chunk *chunk_at(dirty_log *log, uint64_t address)
{
    span_node *node = span_tree_from(&log->chunks, address);
    if (node && node->start <= address)
        return (chunk *)node;
    chunk *fresh = log->chunks.count < MAX_CHUNKS ? calloc(1, sizeof *fresh) : NULL;
    if (!fresh)
        return NULL;
    fresh->span.start = address >> CHUNK_SHIFT << CHUNK_SHIFT;
    fresh->span.last = fresh->span.start + ((UINT64_C(1) << CHUNK_SHIFT) - 1);
    span_tree_insert(&log->chunks, &fresh->span);
    return fresh;
}

static void mark_logged(dirty_log *log, uint64_t start, uint64_t last)
{
    while (!log->lost) {
        chunk *c = chunk_at(log, start);
        if (!c) {
            log->lost = 1;
            clear_tree(&log->chunks);
            return;
        }
        uint64_t end = last < c->span.last ? last : c->span.last;
        set_bits(c->bits, (start - c->span.start) >> PAGE_SHIFT, (end - c->span.start) >> PAGE_SHIFT);
        if (end == last)
            return;
        start = end + 1;
    }
}

void dirty_add(dirty_log *log, uint64_t start, uint64_t last)
{
    pthread_mutex_lock(&log->lock);
    if (!atomic_load(&log->on)) {
        /* stopped meanwhile */
    } else if (!log->ranges.count) {
        mark_logged(log, start, last);
    } else {
        const span_node *node;
        while ((node = span_tree_from(&log->ranges, start)) && node->start <= last) {
            uint64_t from = node->start > start ? node->start : start;
            uint64_t to = node->last < last ? node->last : last;
            mark_logged(log, from, to);
            if (to == last)
                break;
            start = to + 1;
        }
    }
    pthread_mutex_unlock(&log->lock);
}

int dirty_report(dirty_log *log, uint64_t start, uint64_t size, uint64_t page_size, int keep, uint64_t *bitmap,
                 size_t words)
{
    if (page_size < 4096 || (page_size & (page_size - 1)) || !size || (start & (page_size - 1)) ||
        (size & (page_size - 1)) || start + (size - 1) < start)
        return -EINVAL;
    uint64_t pages = size / page_size;
    if (words < pages / 64 + (pages % 64 != 0))
        return -EINVAL;
    memset(bitmap, 0, words * sizeof *bitmap);

    uint64_t last = start + (size - 1), at = start;
    int rc = 0;
    pthread_mutex_lock(&log->lock);
    if (!atomic_load(&log->on))
        rc = -EINVAL;
    else if (log->lost)
        set_bits(bitmap, 0, pages - 1);
    span_node *node;
    while (rc == 0 && (node = span_tree_from(&log->chunks, at)) && node->start <= last) {
        chunk *c = (chunk *)node;
        uint64_t from = node->start > at ? node->start : at;
        uint64_t to = node->last < last ? node->last : last;
        uint64_t bit = (from - node->start) >> PAGE_SHIFT, end = (to - node->start) >> PAGE_SHIFT;
        uint64_t out = (from - start) >> PAGE_SHIFT;
        int whole = from == node->start && to == node->last;
        if (page_size == 4096 && bit % 64 == 0 && out % 64 == 0 && end % 64 == 63) {
            memcpy(bitmap + out / 64, c->bits + bit / 64, (end - bit + 1) / 8);
            if (!keep && !whole)
                memset(c->bits + bit / 64, 0, (end - bit + 1) / 8);
        } else {
            for (; bit <= end; bit++) {
                uint64_t mask = UINT64_C(1) << (bit % 64);
                if (!c->bits[bit / 64]) {
                    bit |= 63; /* nothing in this word */
                } else if (c->bits[bit / 64] & mask) {
                    uint64_t page = (node->start + (bit << PAGE_SHIFT) - start) / page_size;
                    bitmap[page / 64] |= UINT64_C(1) << (page % 64);
                    if (!keep)
                        c->bits[bit / 64] &= ~mask;
                }
            }
        }
        if (!keep && whole) {
            span_tree_remove(&log->chunks, node);
            free(node);
        }
        if (to == last)
            break;
        at = to + 1;
    }
    pthread_mutex_unlock(&log->lock);
    return rc;
}
