/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "node_pool.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define EXTENT ((size_t)2 << 20) /* a huge page: with small ones most look-ups in a large tree would miss the TLB */
#define PER_EXTENT (EXTENT / NODE_SIZE)
#define PER_PAGE (4096 / NODE_SIZE)
#define MIN_STEP ((size_t)16384 / NODE_SIZE)

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 /* Linux 6.1; an older one says EINVAL */
#endif

void node_pool_init(node_pool *pool, vms_budget *budget)
{
    memset(pool, 0, sizeof *pool);
    pool->budget = budget;
}

void node_pool_clear(node_pool *pool)
{
    for (size_t i = 0; i < pool->n_extents; i++)
        munmap(pool->extents[i], EXTENT);
    free(pool->extents);
    budget_give(pool->budget, node_pool_bytes(pool));
    node_pool_init(pool, pool->budget);
}

size_t node_pool_bytes(const node_pool *pool)
{
    return pool->ready * NODE_SIZE;
}

/* By how many nodes a pool of n grows and shrinks, whole pages: a sixteenth, within limits. */
static size_t step(size_t n)
{
    n = n / 16 / PER_PAGE * PER_PAGE;
    return n < MIN_STEP ? MIN_STEP : n > PER_EXTENT ? PER_EXTENT : n;
}

static int add_extent(node_pool *pool)
{
    if (pool->n_extents == pool->room) {
        size_t room = pool->room ? pool->room * 2 : 1;
        uint8_t **extents = realloc(pool->extents, room * sizeof *extents);
        if (!extents)
            return -ENOMEM;
        pool->extents = extents;
        pool->room = room;
    }
    uint8_t *all = mmap(NULL, 2 * EXTENT, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED)
        return -ENOMEM;
    uint8_t *aligned = (uint8_t *)(((uintptr_t)all + EXTENT - 1) & -EXTENT);
    if (aligned > all)
        munmap(all, (size_t)(aligned - all));
    munmap(aligned + EXTENT, (size_t)(all + EXTENT - aligned));
    /* Small pages until the whole extent is in use. */
    madvise(aligned, EXTENT, MADV_NOHUGEPAGE);
    pool->extents[pool->n_extents++] = aligned;
    return 0;
}

int node_pool_reserve(node_pool *pool, size_t n)
{
    if (pool->used + n <= pool->ready)
        return 0;
    size_t before = pool->ready;
    size_t ready = (pool->used + n + PER_PAGE - 1) / PER_PAGE * PER_PAGE;
    if (ready < before + step(before))
        ready = before + step(before);
    int rc = budget_take(pool->budget, (ready - before) * NODE_SIZE);
    while (rc == 0 && pool->n_extents * PER_EXTENT < ready)
        if ((rc = add_extent(pool)) < 0)
            budget_give(pool->budget, (ready - before) * NODE_SIZE);
    if (rc < 0)
        return rc;
    pool->ready = ready;
    for (size_t i = before / PER_EXTENT; i < ready / PER_EXTENT; i++) { /* failure only costs speed */
        madvise(pool->extents[i], EXTENT, MADV_HUGEPAGE);
        if (i * PER_EXTENT < before)
            madvise(pool->extents[i], EXTENT, MADV_COLLAPSE);
    }
    return 0;
}

static void *node_at(const node_pool *pool, size_t i)
{
    return pool->extents[i / PER_EXTENT] + i % PER_EXTENT * NODE_SIZE;
}

void *node_pool_take(node_pool *pool)
{
    return node_at(pool, pool->used++);
}

void *node_pool_last(const node_pool *pool)
{
    return node_at(pool, pool->used - 1);
}

void node_pool_drop(node_pool *pool)
{
    pool->used--;
    if (pool->ready - pool->used < 2 * step(pool->used))
        return;
    size_t ready = (pool->used + step(pool->used) + PER_PAGE - 1) / PER_PAGE * PER_PAGE;
    for (size_t at = ready, end; at < pool->ready; at = end) {
        size_t i = at / PER_EXTENT;
        end = (i + 1) * PER_EXTENT < pool->ready ? (i + 1) * PER_EXTENT : pool->ready;
        madvise(pool->extents[i], EXTENT, MADV_NOHUGEPAGE);
        madvise(node_at(pool, at), (end - at) * NODE_SIZE, MADV_DONTNEED);
    }
    budget_give(pool->budget, (pool->ready - ready) * NODE_SIZE);
    pool->ready = ready;
    /* munmap() may fail at the kernel's limit of VMAs, as a hole makes one more: the address space is kept then. */
    while (pool->n_extents > (ready + PER_EXTENT - 1) / PER_EXTENT &&
           munmap(pool->extents[pool->n_extents - 1], EXTENT) == 0)
        pool->n_extents--;
}
