/* SPDX-License-Identifier: MIT
 * An ordered set of disjoint spans [start, last], as an intrusive treap.  Not locked.
 *
 * Priorities come from a generator seeded by the kernel, so a peer that picks the keys cannot make the
 * tree degenerate.
 */
#ifndef VMS_SPAN_TREE_H
#define VMS_SPAN_TREE_H

#include <stddef.h>
#include <stdint.h>

typedef struct span_node {
    struct span_node *left, *right;
    uint64_t start, last;
    uint32_t priority;
} span_node;

typedef struct span_tree {
    span_node *root;
    uint64_t random; /* xorshift state, never 0 */
    size_t count;
} span_tree;

void span_tree_init(span_tree *tree);
/* node->start and ->last are set and overlap nothing in the tree. */
void span_tree_insert(span_tree *tree, span_node *node);
/* The node must be in the tree. */
void span_tree_remove(span_tree *tree, span_node *node);
/* The first node, in ascending order, whose last is >= address; NULL when there is none. */
span_node *span_tree_from(const span_tree *tree, uint64_t address);

/* Whether [start, last] shares an address with a node of the tree. */
static inline int span_tree_overlaps(const span_tree *tree, uint64_t start, uint64_t last)
{
    const span_node *node = span_tree_from(tree, start);
    return node && node->start <= last;
}

#endif
