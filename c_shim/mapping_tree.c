/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "mapping_tree.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define NODE_SIZE 1024
#define LEAF_MAX 42
#define INNER_MAX 63
/* 63 children at least half full reach 2**52 mappings long before this. */
#define HEIGHT_MAX 16
/* Nodes come from chunks of growing size; large ones are huge pages, as else most look-ups would miss the TLB. */
#define FIRST_CHUNK (16u << 10)
#define LAST_CHUNK (2u << 20)

typedef struct leaf {
    uint64_t n;
    uint64_t start[LEAF_MAX], last[LEAF_MAX], target[LEAF_MAX];
} leaf;

typedef struct inner {
    uint64_t n;               /* children */
    uint64_t key[INNER_MAX];  /* no start in child[i] is below key[i]; key[0] is not looked at */
    void *child[INNER_MAX];
} inner;

_Static_assert(sizeof(leaf) <= NODE_SIZE && sizeof(inner) <= NODE_SIZE, "nodes are of one size");

/* The way from the root to a leaf, and the leaves beside it. */
typedef struct path {
    inner *node[HEIGHT_MAX];
    unsigned index[HEIGHT_MAX]; /* the child taken */
    leaf *at;
} path;

void mapping_tree_init(mapping_tree *tree)
{
    memset(tree, 0, sizeof *tree);
}

void mapping_tree_clear(mapping_tree *tree)
{
    while (tree->chunks) {
        void *next = *(void **)tree->chunks;
        free(tree->chunks);
        tree->chunks = next;
    }
    mapping_tree_init(tree);
}

size_t mapping_tree_bytes(const mapping_tree *tree)
{
    return tree->bytes;
}

/* How many of n ascending keys (room for `max`) are <= address.  In two steps of comparisons that do not depend on one
 * another: a binary search would wait for each guess of the branch predictor, and half of them are wrong. */
static inline unsigned upper_bound(const uint64_t *keys, uint64_t n, unsigned max, uint64_t address)
{
    unsigned eights = 0, found;

    for (unsigned i = 7; i < max; i += 8)
        eights += (i < n) & (keys[i] <= address);
    found = 8 * eights;
    for (unsigned i = 8 * eights, end = i + 8 < max ? i + 8 : max; i < end; i++)
        found += (i < n) & (keys[i] <= address);
    return found;
}

static unsigned child_of(const inner *in, uint64_t address)
{
    return upper_bound(in->key + 1, in->n - 1, INNER_MAX - 1, address);
}

static void descend(const mapping_tree *tree, uint64_t address, path *p)
{
    void *node = tree->root;

    for (unsigned level = 0; level < tree->height; level++) {
        inner *in = node;
        p->node[level] = in;
        p->index[level] = child_of(in, address);
        node = in->child[p->index[level]];
    }
    p->at = node;
    /* All its lines at once, rather than one after the other as the search comes to them. */
    for (unsigned i = 0; i < NODE_SIZE; i += 64)
        __builtin_prefetch((const uint8_t *)node + i);
}

/* The leaf before (-1) or after (+1) the path's; NULL at the ends. */
static const leaf *beside(const mapping_tree *tree, const path *p, int side)
{
    for (unsigned level = tree->height; level-- > 0;) {
        const inner *in = p->node[level];
        if (side < 0 ? p->index[level] == 0 : p->index[level] + 1 >= in->n)
            continue;
        const void *node = in->child[side < 0 ? p->index[level] - 1 : p->index[level] + 1];
        for (unsigned below = level + 1; below < tree->height; below++) {
            const inner *down = node;
            node = down->child[side < 0 ? down->n - 1 : 0];
        }
        return node;
    }
    return NULL;
}

static void get(const leaf *at, unsigned i, mapping *out)
{
    *out = (mapping){ at->start[i], at->last[i], at->target[i] };
}

int mapping_tree_from(const mapping_tree *tree, uint64_t address, mapping *out)
{
    path p;
    const leaf *at;

    if (!tree->count)
        return 0;
    descend(tree, address, &p);
    unsigned i = upper_bound(p.at->start, p.at->n, LEAF_MAX, address);
    if (i > 0) {
        if (p.at->last[i - 1] >= address) {
            get(p.at, i - 1, out);
            return 1;
        }
    } else if ((at = beside(tree, &p, -1)) && at->last[at->n - 1] >= address) {
        get(at, (unsigned)at->n - 1, out);
        return 1;
    }
    if (i < p.at->n) {
        get(p.at, i, out);
        return 1;
    }
    if ((at = beside(tree, &p, 1))) {
        get(at, 0, out);
        return 1;
    }
    return 0;
}

/* ---- insertion ---------------------------------------------------------------------------- */

static void give_node(mapping_tree *tree, void *node)
{
    *(void **)node = tree->spare;
    tree->spare = node;
    tree->n_spare++;
}

/* Sees to `wanted` free nodes, so that an insertion cannot fail half-way. */
static int set_aside(mapping_tree *tree, size_t wanted)
{
    while (tree->n_spare < wanted) {
        size_t size = tree->next_chunk ? tree->next_chunk : FIRST_CHUNK;
        uint8_t *chunk = aligned_alloc(size, size);
        if (!chunk)
            return -ENOMEM;
        if (size == LAST_CHUNK)
            madvise(chunk, size, MADV_HUGEPAGE); /* if it cannot be, it is only slower */
        else
            tree->next_chunk = size * 2;
        tree->bytes += size;
        *(void **)chunk = tree->chunks; /* the first node's room holds the list */
        tree->chunks = chunk;
        for (size_t at = size - NODE_SIZE; at; at -= NODE_SIZE)
            give_node(tree, chunk + at);
    }
    return 0;
}

static void *take_node(mapping_tree *tree)
{
    void *node = tree->spare;
    tree->spare = *(void **)node;
    tree->n_spare--;
    return node;
}

static void leaf_put(leaf *at, unsigned i, const mapping *item)
{
    size_t tail = (at->n - i) * sizeof(uint64_t);
    memmove(at->start + i + 1, at->start + i, tail);
    memmove(at->last + i + 1, at->last + i, tail);
    memmove(at->target + i + 1, at->target + i, tail);
    at->start[i] = item->start;
    at->last[i] = item->last;
    at->target[i] = item->target;
    at->n++;
}

static void inner_put(inner *in, unsigned i, uint64_t key, void *child)
{
    memmove(in->key + i + 1, in->key + i, (in->n - i) * sizeof in->key[0]);
    memmove(in->child + i + 1, in->child + i, (in->n - i) * sizeof in->child[0]);
    in->key[i] = key;
    in->child[i] = child;
    in->n++;
}

/* Where a full node is cut for an insertion at i.  Drivers map upwards or downwards in sequence: a cut at the very
 * end leaves full nodes behind. */
static unsigned cut(unsigned i, unsigned n)
{
    return i == n ? n : i == 0 ? 0 : n / 2;
}

/* Hangs `right` (no start below key) behind the path's child of each level, from the lowest inner level up. */
static void hang(mapping_tree *tree, path *p, uint64_t key, void *right)
{
    for (unsigned level = tree->height; level-- > 0;) {
        inner *in = p->node[level];
        unsigned i = p->index[level] + 1;
        if (in->n < INNER_MAX) {
            inner_put(in, i, key, right);
            return;
        }
        unsigned at = cut(i, INNER_MAX);
        inner *more = take_node(tree);
        if (at == 0)
            at = 1; /* i is at least 1 */
        more->n = INNER_MAX - at;
        memcpy(more->key, in->key + at, more->n * sizeof in->key[0]);
        memcpy(more->child, in->child + at, more->n * sizeof in->child[0]);
        in->n = at;
        if (at == INNER_MAX || i > at)
            inner_put(more, i - at, key, right);
        else
            inner_put(in, i, key, right);
        key = more->key[0];
        right = more;
    }
    inner *root = take_node(tree);
    root->n = 2;
    root->key[0] = 0;
    root->child[0] = tree->root;
    root->key[1] = key;
    root->child[1] = right;
    tree->root = root;
    tree->height++;
}

int mapping_tree_insert(mapping_tree *tree, const mapping *item)
{
    path p;
    const leaf *at;

    int rc = set_aside(tree, tree->height + 2);
    if (rc < 0)
        return rc;
    if (!tree->root) {
        leaf *first = take_node(tree);
        first->n = 0;
        tree->root = first;
    }
    descend(tree, item->start, &p);
    leaf *l = p.at;
    unsigned i = upper_bound(l->start, l->n, LEAF_MAX, item->start);
    if (i > 0) {
        if (l->last[i - 1] >= item->start)
            return -EEXIST;
    } else if ((at = beside(tree, &p, -1)) && at->last[at->n - 1] >= item->start) {
        return -EEXIST;
    }
    if (i < l->n) {
        if (l->start[i] <= item->last)
            return -EEXIST;
    } else if ((at = beside(tree, &p, 1)) && at->start[0] <= item->last) {
        return -EEXIST;
    }
    tree->count++;
    if (l->n < LEAF_MAX) {
        leaf_put(l, i, item);
        return 0;
    }
    unsigned from = cut(i, LEAF_MAX);
    leaf *right = take_node(tree);
    right->n = LEAF_MAX - from;
    memcpy(right->start, l->start + from, right->n * sizeof(uint64_t));
    memcpy(right->last, l->last + from, right->n * sizeof(uint64_t));
    memcpy(right->target, l->target + from, right->n * sizeof(uint64_t));
    l->n = from;
    if (from == LEAF_MAX || i > from)
        leaf_put(right, i - from, item);
    else
        leaf_put(l, i, item);
    hang(tree, &p, right->start[0], right);
    return 0;
}

/* ---- removal ------------------------------------------------------------------------------ */

static uint64_t *n_of(void *node)
{
    return node; /* the first member of both */
}

static void drop_child(inner *in, unsigned i)
{
    memmove(in->key + i, in->key + i + 1, (in->n - i - 1) * sizeof in->key[0]);
    memmove(in->child + i, in->child + i + 1, (in->n - i - 1) * sizeof in->child[0]);
    in->n--;
}

/* Moves all of `right` behind all of `left`; `key` is right's lower bound. */
static void join(void *left, void *right, int leaves, uint64_t key)
{
    if (leaves) {
        leaf *l = left, *r = right;
        memcpy(l->start + l->n, r->start, r->n * sizeof(uint64_t));
        memcpy(l->last + l->n, r->last, r->n * sizeof(uint64_t));
        memcpy(l->target + l->n, r->target, r->n * sizeof(uint64_t));
        l->n += r->n;
    } else {
        inner *l = left, *r = right;
        memcpy(l->key + l->n, r->key, r->n * sizeof r->key[0]);
        memcpy(l->child + l->n, r->child, r->n * sizeof r->child[0]);
        l->key[l->n] = key;
        l->n += r->n;
    }
}

/* After a removal: empty nodes go, and a sparse one joins its neighbour where there is room. */
static void settle(mapping_tree *tree, path *p)
{
    void *node = p->at;

    for (unsigned level = tree->height; level-- > 0;) {
        inner *in = p->node[level];
        unsigned i = p->index[level];
        int leaves = level + 1 == tree->height;
        uint64_t max = leaves ? LEAF_MAX : INNER_MAX;
        uint64_t n = *n_of(node);
        if (n == 0) {
            drop_child(in, i);
            give_node(tree, node);
        } else if (n < max / 4 && in->n > 1) {
            unsigned left = i + 1 < in->n ? i : i - 1;
            void *a = in->child[left], *b = in->child[left + 1];
            if (*n_of(a) + *n_of(b) > max * 3 / 4)
                return;
            join(a, b, leaves, in->key[left + 1]);
            drop_child(in, left + 1);
            give_node(tree, b);
        } else {
            return;
        }
        node = in;
    }
    while (tree->height && *n_of(tree->root) <= 1) {
        inner *root = tree->root;
        if (root->n == 0) { /* the last mapping is gone */
            tree->root = NULL;
            tree->height = 0;
        } else {
            tree->root = root->child[0];
            tree->height--;
        }
        give_node(tree, root);
    }
}

static void take_out(mapping_tree *tree, path *p, unsigned i)
{
    leaf *l = p->at;
    size_t tail = (l->n - i - 1) * sizeof(uint64_t);

    memmove(l->start + i, l->start + i + 1, tail);
    memmove(l->last + i, l->last + i + 1, tail);
    memmove(l->target + i, l->target + i + 1, tail);
    l->n--;
    tree->count--;
    settle(tree, p);
}

void mapping_tree_remove(mapping_tree *tree, uint64_t start)
{
    path p;

    descend(tree, start, &p);
    take_out(tree, &p, upper_bound(p.at->start, p.at->n, LEAF_MAX, start) - 1);
}

int mapping_tree_remove_exact(mapping_tree *tree, uint64_t start, uint64_t last)
{
    path p;

    if (!tree->count)
        return 0;
    descend(tree, start, &p);
    unsigned i = upper_bound(p.at->start, p.at->n, LEAF_MAX, start);
    if (!i || p.at->start[i - 1] != start || p.at->last[i - 1] != last)
        return 0;
    take_out(tree, &p, i - 1);
    return 1;
}

void mapping_tree_resize(mapping_tree *tree, uint64_t start, const mapping *now)
{
    path p;

    descend(tree, start, &p);
    unsigned i = upper_bound(p.at->start, p.at->n, LEAF_MAX, start) - 1;
    p.at->start[i] = now->start;
    p.at->last[i] = now->last;
    p.at->target[i] = now->target;
}
