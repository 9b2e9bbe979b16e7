/* SPDX-License-Identifier: MIT
 * An ordered set of disjoint mappings [start, last] -> target, as a B+ tree.  Not locked.
 *
 * A domain may hold a million 4 KiB mappings, and a miss in the IOTLB looks one up: a binary tree would touch
 * twenty cache lines that are not in the cache, this touches a few, at once.
 *
 * Invariants, after every operation; mapping_tree_check() verifies them:
 *
 *   1. Mappings do not overlap, and ascend in each leaf and from leaf to leaf.
 *   2. In an inner node, key[i] IS the first start below child[i], for i > 0.
 *   3. All leaves are at one depth.  Each node but the root is at least half full; an inner root has two children.
 *   4. The nodes of the tree are those of its pool: none is free.
 *
 * What follows:
 *
 *   - The mapping that an address lies in is in the leaf to which the keys lead (1, 2): what lies before key[i] also
 *     ends before it.
 *   - Height: a tree with h levels of inner nodes has at least 2 * INNER_MIN^(h-1) * LEAF_MIN mappings (3).  There
 *     are at most 2^52, as all is 4 KiB aligned, so h <= 10.
 *   - Memory: at most NODE_SIZE / LEAF_MIN * (1 + 1/30) = 51 bytes a mapping in nodes (3), and with what the pool
 *     keeps ready (4) 57 bytes, and POOL_SLACK for all; whatever was done in whatever order. */
#ifndef VMS_MAPPING_TREE_H
#define VMS_MAPPING_TREE_H

#include <stddef.h>
#include <stdint.h>

#include "node_pool.h"

typedef struct mapping {
    uint64_t start, last; /* IOVA, inclusive */
    uint64_t target;      /* GPA of start; protection in its low 12 bits, as all is 4 KiB aligned */
} mapping;

typedef struct mapping_tree {
    void *root;
    unsigned height; /* levels of inner nodes above the leaves */
    size_t count;
    node_pool nodes;
} mapping_tree;

/* Its memory is taken from `budget`, which has to outlive it; NULL: from the system only. */
void mapping_tree_init(mapping_tree *tree, vms_budget *budget);
void mapping_tree_clear(mapping_tree *tree);
/* EEXIST: overlap; ENOMEM.  Nothing has changed then. */
int mapping_tree_insert(mapping_tree *tree, const mapping *item);
/* The mapping that the address lies in; 0 when there is none. */
int mapping_tree_find(const mapping_tree *tree, uint64_t address, mapping *out);
/* The first mapping, in ascending order, whose last is >= address; 0 when there is none. */
int mapping_tree_from(const mapping_tree *tree, uint64_t address, mapping *out);
/* Removes the mapping that starts there; it must be in the tree. */
void mapping_tree_remove(mapping_tree *tree, uint64_t start);
/* Removes the mapping [start, last]; 0 when there is none with these very ends. */
int mapping_tree_remove_exact(mapping_tree *tree, uint64_t start, uint64_t last);
/* Gives the mapping that starts at `start` other ends, between its neighbours. */
void mapping_tree_resize(mapping_tree *tree, uint64_t start, const mapping *now);
/* Replaces the mapping that starts where `head` does by its two parts.  ENOMEM: nothing has changed. */
int mapping_tree_split(mapping_tree *tree, const mapping *head, const mapping *tail);
/* Bytes of memory that the tree takes. */
size_t mapping_tree_bytes(const mapping_tree *tree);
/* For tests: 0, or -EIO when an invariant does not hold.  Looks at every mapping. */
int mapping_tree_check(const mapping_tree *tree);

#endif
