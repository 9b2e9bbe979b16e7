/* SPDX-License-Identifier: MIT
 * An ordered set of disjoint mappings [start, last] -> target, as a B+ tree.  Not locked.
 *
 * A domain may hold a million 4 KiB mappings, and a miss in the IOTLB looks one up: a binary tree would touch
 * twenty cache lines that are not in the cache, this touches three or four. */
#ifndef VMS_MAPPING_TREE_H
#define VMS_MAPPING_TREE_H

#include <stddef.h>
#include <stdint.h>

typedef struct mapping {
    uint64_t start, last; /* IOVA, inclusive */
    uint64_t target;      /* GPA of start; protection in its low 12 bits, as all is 4 KiB aligned */
} mapping;

typedef struct mapping_tree {
    void *root;
    unsigned height; /* levels of inner nodes above the leaves */
    size_t count;
    void *chunks; /* memory for nodes; goes back to the system with the tree */
    size_t bytes, next_chunk;
    void *spare; /* free nodes */
    size_t n_spare;
} mapping_tree;

void mapping_tree_init(mapping_tree *tree);
void mapping_tree_clear(mapping_tree *tree);
/* EEXIST: overlap; ENOMEM.  Nothing has changed then. */
int mapping_tree_insert(mapping_tree *tree, const mapping *item);
/* The first mapping, in ascending order, whose last is >= address; 0 when there is none. */
int mapping_tree_from(const mapping_tree *tree, uint64_t address, mapping *out);
/* Removes the mapping that starts there; it must be in the tree. */
void mapping_tree_remove(mapping_tree *tree, uint64_t start);
/* Removes the mapping [start, last]; 0 when there is none with these very ends. */
int mapping_tree_remove_exact(mapping_tree *tree, uint64_t start, uint64_t last);
/* Gives the mapping that starts at `start` other ends, between its neighbours. */
void mapping_tree_resize(mapping_tree *tree, uint64_t start, const mapping *now);
/* Bytes of memory that the tree takes. */
size_t mapping_tree_bytes(const mapping_tree *tree);

#endif
