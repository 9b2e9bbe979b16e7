/* SPDX-License-Identifier: MIT */
#include "span_tree.h"

#include <sys/random.h>
#include <time.h>

void span_tree_init(span_tree *tree)
{
    tree->root = NULL;
    tree->count = 0;
    if (getrandom(&tree->random, sizeof tree->random, GRND_NONBLOCK) != (ssize_t)sizeof tree->random)
        tree->random = (uint64_t)clock() ^ (uintptr_t)tree;
    tree->random |= 1;
}

static uint32_t next_random(span_tree *tree)
{
    uint64_t x = tree->random;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    tree->random = x;
    return (uint32_t)(x >> 32);
}

void span_tree_insert(span_tree *tree, span_node *node)
{
    span_node **link = &tree->root;
    node->priority = next_random(tree);
    while (*link && (*link)->priority >= node->priority)
        link = node->start < (*link)->start ? &(*link)->left : &(*link)->right;

    /* Split the subtree below the new node into what lies before and after it. */
    span_node *rest = *link, **less = &node->left, **more = &node->right;
    *link = node;
    while (rest) {
        if (rest->start < node->start) {
            *less = rest;
            less = &rest->right;
            rest = rest->right;
        } else {
            *more = rest;
            more = &rest->left;
            rest = rest->left;
        }
    }
    *less = *more = NULL;
    tree->count++;
}

void span_tree_remove(span_tree *tree, span_node *node)
{
    span_node **link = &tree->root;
    while (*link != node)
        link = node->start < (*link)->start ? &(*link)->left : &(*link)->right;

    span_node *left = node->left, *right = node->right;
    while (left && right) {
        if (left->priority >= right->priority) {
            *link = left;
            link = &left->right;
            left = left->right;
        } else {
            *link = right;
            link = &right->left;
            right = right->left;
        }
    }
    *link = left ? left : right;
    tree->count--;
}

span_node *span_tree_from(const span_tree *tree, uint64_t address)
{
    span_node *node = tree->root, *best = NULL;
    while (node) {
        if (node->last >= address) {
            best = node;
            node = node->left;
        } else {
            node = node->right;
        }
    }
    return best;
}
