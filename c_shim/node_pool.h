/* SPDX-License-Identifier: MIT
 * Memory for the nodes of one tree, without holes: the nodes in use are always the first ones.  Not locked.
 *
 * So memory shrinks with the number of nodes, in whatever order they are freed.  The caller that frees a node moves the
 * last one into its place.  At any time bytes <= used * NODE_SIZE * 9/8 + POOL_SLACK. */
#ifndef VMS_NODE_POOL_H
#define VMS_NODE_POOL_H

#include <stddef.h>
#include <stdint.h>

#include "budget.h"

#define NODE_SIZE 1024
#define POOL_SLACK (64u << 10)

typedef struct node_pool {
    vms_budget *budget;  /* bytes are taken from it; kept by the pool's owner */
    uint8_t **extents;   /* of 2 MiB each, as address space; memory is there for the first `ready` nodes */
    size_t n_extents, room;
    size_t used, ready; /* nodes */
} node_pool;

void node_pool_init(node_pool *pool, vms_budget *budget);
/* Gives all memory back. */
void node_pool_clear(node_pool *pool);
/* Allocates memory for n more nodes.  -ENOMEM: the budget or the system has none. */
int node_pool_reserve(node_pool *pool, size_t n);
/* One of the reserved nodes, not initialised. */
void *node_pool_take(node_pool *pool);
/* The last one in use. */
void *node_pool_last(const node_pool *pool);
/* Takes the last one out of use. */
void node_pool_drop(node_pool *pool);
/* Bytes of memory that it takes. */
size_t node_pool_bytes(const node_pool *pool);

#endif
