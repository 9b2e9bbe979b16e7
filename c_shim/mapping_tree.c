/* SPDX-License-Identifier: MIT */
#include "mapping_tree.h"

#include <errno.h>
#include <string.h>

#define LEAF_MAX 42
#define LEAF_MIN (LEAF_MAX / 2)
#define INNER_MAX 63
#define INNER_MIN (INNER_MAX / 2)
#define HEIGHT_MAX 10 /* see mapping_tree.h: 2 * 31^9 * 21 mappings are 2^50, and one more level needs 2^54.9 */

/* The header of both kinds of nodes. */
typedef struct header {
    uint32_t n;     /* children or mappings */
    uint32_t level; /* 0: a leaf */
} header;

typedef struct leaf {
    header head;
    uint64_t start[LEAF_MAX], last[LEAF_MAX], target[LEAF_MAX];
} leaf;

typedef struct inner {
    header head;
    uint64_t key[INNER_MAX]; /* key[0] means nothing */
    void *child[INNER_MAX];
} inner;

_Static_assert(sizeof(leaf) <= NODE_SIZE && sizeof(inner) <= NODE_SIZE, "nodes are of one size");

/* The way from the root to a leaf. */
typedef struct path {
    inner *node[HEIGHT_MAX];
    unsigned index[HEIGHT_MAX]; /* the child taken */
    leaf *at;
} path;

void mapping_tree_init(mapping_tree *tree, vms_budget *budget)
{
    memset(tree, 0, sizeof *tree);
    node_pool_init(&tree->nodes, budget);
}

void mapping_tree_clear(mapping_tree *tree)
{
    node_pool_clear(&tree->nodes);
    mapping_tree_init(tree, tree->nodes.budget);
}

size_t mapping_tree_bytes(const mapping_tree *tree)
{
    return node_pool_bytes(&tree->nodes);
}

/* How many of n ascending keys (room for `max`) are <= address.  In two steps of comparisons that do not depend on one
 * another: a binary search would wait for each guess of the branch predictor, and half of them are wrong. */
static inline unsigned upper_bound(const uint64_t *keys, unsigned n, unsigned max, uint64_t address)
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
    return upper_bound(in->key + 1, in->head.n - 1, INNER_MAX - 1, address);
}

/* How many of the leaf's mappings start at or before the address. */
static unsigned place_in(const leaf *at, uint64_t address)
{
    return upper_bound(at->start, at->head.n, LEAF_MAX, address);
}

/* Fetches all cache lines of a node at once instead of one by one as the search reaches them. */
static inline void prefetch(const void *node)
{
    for (unsigned i = 0; i < NODE_SIZE; i += 64)
        __builtin_prefetch((const uint8_t *)node + i);
}

static void descend(const mapping_tree *tree, uint64_t address, path *p)
{
    void *node = tree->root;

    for (unsigned level = 0; level < tree->height; level++) {
        inner *in = node;
        p->node[level] = in;
        p->index[level] = child_of(in, address);
        node = in->child[p->index[level]];
        prefetch(node);
    }
    p->at = node;
}

/* The lowest level of the path that has a child behind the one taken; -1: the leaf is the last. */
static int fork_behind(const mapping_tree *tree, const path *p)
{
    for (unsigned level = tree->height; level-- > 0;)
        if (p->index[level] + 1 < p->node[level]->head.n)
            return (int)level;
    return -1;
}

static const leaf *first_leaf(const void *node)
{
    while (((const header *)node)->level)
        node = ((const inner *)node)->child[0];
    return node;
}

static void get(const leaf *at, unsigned i, mapping *out)
{
    *out = (mapping){ at->start[i], at->last[i], at->target[i] };
}

int mapping_tree_find(const mapping_tree *tree, uint64_t address, mapping *out)
{
    const void *node = tree->root;

    if (!tree->count)
        return 0;
    for (unsigned level = tree->height; level > 0; level--) {
        const inner *in = node;
        node = in->child[child_of(in, address)];
        prefetch(node);
    }
    const leaf *at = node;
    unsigned i = place_in(at, address);
    if (!i || at->last[i - 1] < address)
        return 0;
    get(at, i - 1, out);
    return 1;
}

int mapping_tree_from(const mapping_tree *tree, uint64_t address, mapping *out)
{
    path p;

    if (!tree->count)
        return 0;
    descend(tree, address, &p);
    unsigned i = place_in(p.at, address);
    if (i > 0 && p.at->last[i - 1] >= address)
        i--;
    if (i < p.at->head.n) {
        get(p.at, i, out);
        return 1;
    }
    int level = fork_behind(tree, &p);
    if (level < 0)
        return 0;
    get(first_leaf(p.node[level]->child[p.index[level] + 1]), 0, out);
    return 1;
}

/* Updates the key above the leaf after its first start has changed (invariant 2). */
static void first_changed(const mapping_tree *tree, path *p)
{
    for (unsigned level = tree->height; level-- > 0;)
        if (p->index[level]) {
            p->node[level]->key[p->index[level]] = p->at->start[0];
            return;
        }
}

/* ---- parts of nodes ----------------------------------------------------------------------- */

/* Moves n mappings; the places may overlap. */
static void leaf_move(leaf *to, unsigned at, const leaf *from, unsigned i, unsigned n)
{
    memmove(to->start + at, from->start + i, n * sizeof(uint64_t));
    memmove(to->last + at, from->last + i, n * sizeof(uint64_t));
    memmove(to->target + at, from->target + i, n * sizeof(uint64_t));
}

static void inner_move(inner *to, unsigned at, const inner *from, unsigned i, unsigned n)
{
    memmove(to->key + at, from->key + i, n * sizeof from->key[0]);
    memmove(to->child + at, from->child + i, n * sizeof from->child[0]);
}

static void leaf_put(leaf *at, unsigned i, const mapping *item)
{
    leaf_move(at, i + 1, at, i, at->head.n - i);
    at->start[i] = item->start;
    at->last[i] = item->last;
    at->target[i] = item->target;
    at->head.n++;
}

static void inner_put(inner *in, unsigned i, uint64_t key, void *child)
{
    inner_move(in, i + 1, in, i, in->head.n - i);
    in->key[i] = key;
    in->child[i] = child;
    in->head.n++;
}

/* Moves entries between neighbours of one level until `left` has n; `key` is the first start below `right`.  Returns
 * the new first start, if `right` has any entries. */
static uint64_t share(void *left, void *right, unsigned n, uint64_t key)
{
    header *a = left, *b = right;
    unsigned more;

    if (a->level) {
        inner *l = left, *r = right;
        r->key[0] = key;
        if (n > a->n) {
            more = n - a->n;
            inner_move(l, a->n, r, 0, more);
            inner_move(r, 0, r, more, b->n - more);
            b->n -= more;
        } else {
            more = a->n - n;
            inner_move(r, more, r, 0, b->n);
            inner_move(r, 0, l, n, more);
            b->n += more;
        }
        a->n = n;
        return r->key[0];
    }
    leaf *l = left, *r = right;
    if (n > a->n) {
        more = n - a->n;
        leaf_move(l, a->n, r, 0, more);
        leaf_move(r, 0, r, more, b->n - more);
        b->n -= more;
    } else {
        more = a->n - n;
        leaf_move(r, more, r, 0, b->n);
        leaf_move(r, 0, l, n, more);
        b->n += more;
    }
    a->n = n;
    return r->start[0];
}

static void *new_node(mapping_tree *tree, unsigned level)
{
    header *node = node_pool_take(&tree->nodes);
    *node = (header){ .level = level };
    return node;
}

/* ---- insertion ---------------------------------------------------------------------------- */

/* How many of a full node's entries stay when one more comes to place i: both get at least max / 2. */
static unsigned keep(unsigned i, unsigned max)
{
    return i <= max / 2 ? max / 2 : max - max / 2;
}

/* Hangs `right` (the first start below it is key) behind the path's child of each level, from the lowest up. */
static void hang(mapping_tree *tree, path *p, uint64_t key, void *right)
{
    for (unsigned level = tree->height; level-- > 0;) {
        inner *in = p->node[level];
        unsigned i = p->index[level] + 1;
        if (in->head.n < INNER_MAX) {
            inner_put(in, i, key, right);
            return;
        }
        unsigned stay = keep(i, INNER_MAX);
        inner *more = new_node(tree, in->head.level);
        share(in, more, stay, 0);
        if (i > INNER_MAX / 2)
            inner_put(more, i - stay, key, right);
        else
            inner_put(in, i, key, right);
        key = more->key[0];
        right = more;
    }
    inner *root = new_node(tree, ++tree->height);
    root->head.n = 2;
    root->child[0] = tree->root;
    root->key[1] = key;
    root->child[1] = right;
    tree->root = root;
}

/* Moves mappings of a full leaf into a neighbour; returns whether that made room.  Drivers map upwards or downwards in
 * sequence: at such an end the neighbour is filled before the leaf is split, so that leaves stay full. */
static int make_room(path *p, unsigned height, unsigned i)
{
    leaf *l = p->at;

    if (!height || (i != 0 && i != LEAF_MAX))
        return 0;
    inner *in = p->node[height - 1];
    unsigned index = p->index[height - 1];
    if (i == LEAF_MAX && index > 0) {
        leaf *before = in->child[index - 1];
        unsigned room = LEAF_MAX - before->head.n;
        if (!room)
            return 0;
        in->key[index] = share(before, l, LEAF_MAX, in->key[index]);
        return 1;
    }
    if (i == 0 && index + 1 < in->head.n) {
        leaf *behind = in->child[index + 1];
        unsigned room = LEAF_MAX - behind->head.n;
        if (!room)
            return 0;
        in->key[index + 1] = share(l, behind, LEAF_MAX - room, in->key[index + 1]);
        return 1;
    }
    return 0;
}

int mapping_tree_insert(mapping_tree *tree, const mapping *item)
{
    path p;

    if (!tree->root) {
        int rc = node_pool_reserve(&tree->nodes, 1);
        if (rc < 0)
            return rc;
        tree->root = new_node(tree, 0);
    }
    descend(tree, item->start, &p);
    leaf *l = p.at;
    unsigned i = place_in(l, item->start);
    if (i > 0 && l->last[i - 1] >= item->start)
        return -EEXIST;
    if (i < l->head.n) {
        if (l->start[i] <= item->last)
            return -EEXIST;
    } else {
        int level = fork_behind(tree, &p);
        if (level >= 0 && p.node[level]->key[p.index[level] + 1] <= item->last)
            return -EEXIST;
    }
    if (l->head.n == LEAF_MAX && make_room(&p, tree->height, i) && i)
        i = l->head.n;
    if (l->head.n < LEAF_MAX) {
        leaf_put(l, i, item); /* i == 0 in the first leaf only, which has no key */
        tree->count++;
        return 0;
    }
    /* A leaf, an inner node on each level, a root. */
    int rc = node_pool_reserve(&tree->nodes, tree->height + 2);
    if (rc < 0)
        return rc;
    unsigned stay = keep(i, LEAF_MAX);
    leaf *right = new_node(tree, 0);
    share(l, right, stay, 0);
    if (i > LEAF_MAX / 2)
        leaf_put(right, i - stay, item);
    else
        leaf_put(l, i, item);
    hang(tree, &p, right->start[0], right);
    tree->count++;
    return 0;
}

/* ---- removal ------------------------------------------------------------------------------ */

/* Frees nodes that have left the tree: the pool's last nodes are moved into their places (invariant 4). */
static void release(mapping_tree *tree, void **gone, unsigned n)
{
    while (n) {
        void *last = node_pool_last(&tree->nodes);
        unsigned i = n - 1;
        while (i && gone[i] != last)
            i--;
        if (gone[i] != last) { /* in use */
            uint64_t start = first_leaf(last)->start[0];
            void **link = &tree->root;
            while (*link != last) {
                inner *in = *link;
                link = &in->child[child_of(in, start)];
            }
            *link = memcpy(gone[0], last, NODE_SIZE);
            i = 0;
        }
        gone[i] = gone[--n];
        node_pool_drop(&tree->nodes);
    }
}

/* After a removal from the path's leaf: a node that is less than half full gets entries of a neighbour, or joins it. */
static void settle(mapping_tree *tree, path *p)
{
    void *gone[HEIGHT_MAX + 1];
    unsigned n_gone = 0;

    for (unsigned level = tree->height; level-- > 0;) {
        inner *in = p->node[level];
        unsigned index = p->index[level];
        unsigned max = level + 1 == tree->height ? LEAF_MAX : INNER_MAX;
        if (((header *)in->child[index])->n >= max / 2)
            break;
        unsigned left = index ? index - 1 : 0;
        void *a = in->child[left], *b = in->child[left + 1];
        unsigned both = ((header *)a)->n + ((header *)b)->n;
        if (both > max) {
            in->key[left + 1] = share(a, b, both / 2, in->key[left + 1]);
            break;
        }
        share(a, b, both, in->key[left + 1]);
        gone[n_gone++] = b;
        inner_move(in, left + 1, in, left + 2, in->head.n - left - 2);
        in->head.n--;
    }
    header *root = tree->root;
    if (tree->height ? root->n == 1 : root->n == 0) {
        gone[n_gone++] = root;
        tree->root = tree->height ? ((inner *)tree->root)->child[0] : NULL;
        tree->height -= tree->height > 0;
    }
    release(tree, gone, n_gone);
}

static void take_out(mapping_tree *tree, path *p, unsigned i)
{
    leaf *l = p->at;

    leaf_move(l, i, l, i + 1, l->head.n - i - 1);
    l->head.n--;
    tree->count--;
    if (!i && l->head.n)
        first_changed(tree, p);
    if (l->head.n < LEAF_MIN)
        settle(tree, p);
}

void mapping_tree_remove(mapping_tree *tree, uint64_t start)
{
    path p;

    descend(tree, start, &p);
    take_out(tree, &p, place_in(p.at, start) - 1);
}

int mapping_tree_remove_exact(mapping_tree *tree, uint64_t start, uint64_t last)
{
    path p;

    if (!tree->count)
        return 0;
    descend(tree, start, &p);
    unsigned i = place_in(p.at, start);
    if (!i || p.at->start[i - 1] != start || p.at->last[i - 1] != last)
        return 0;
    take_out(tree, &p, i - 1);
    return 1;
}

/* ---- resize and split --------------------------------------------------------------------- */

void mapping_tree_resize(mapping_tree *tree, uint64_t start, const mapping *now)
{
    path p;

    descend(tree, start, &p);
    unsigned i = place_in(p.at, start) - 1;
    p.at->start[i] = now->start;
    p.at->last[i] = now->last;
    p.at->target[i] = now->target;
    if (!i)
        first_changed(tree, &p);
}

int mapping_tree_split(mapping_tree *tree, const mapping *head, const mapping *tail)
{
    int rc = node_pool_reserve(&tree->nodes, tree->height + 2);
    if (rc < 0)
        return rc;
    mapping_tree_resize(tree, head->start, head);
    return mapping_tree_insert(tree, tail); /* 0: there is room in the tree and in the pool */
}

/* ---- invariants --------------------------------------------------------------------------- */

typedef struct census {
    uint64_t end; /* the last address seen */
    size_t mappings, nodes;
} census;

static int check_below(const mapping_tree *tree, const void *node, unsigned level, census *seen)
{
    const header *head = node;
    const leaf *l = node;
    const inner *in = node;
    uint32_t min = node == tree->root ? (level ? 2 : 1) : level ? INNER_MIN : LEAF_MIN;

    seen->nodes++;
    if (head->level != level || head->n < min || head->n > (level ? INNER_MAX : LEAF_MAX))
        return -EIO;
    for (unsigned i = 0; i < head->n; i++) {
        if (level) {
            if (i && in->key[i] != first_leaf(in->child[i])->start[0])
                return -EIO;
            if (check_below(tree, in->child[i], level - 1, seen) < 0)
                return -EIO;
        } else {
            if (l->last[i] < l->start[i] || (seen->mappings && l->start[i] <= seen->end))
                return -EIO;
            seen->end = l->last[i];
            seen->mappings++;
        }
    }
    return 0;
}

int mapping_tree_check(const mapping_tree *tree)
{
    census seen = { 0 };
    const node_pool *nodes = &tree->nodes;

    if (tree->height > HEIGHT_MAX || !tree->root != !tree->count)
        return -EIO;
    if (tree->root && check_below(tree, tree->root, tree->height, &seen) < 0)
        return -EIO;
    if (seen.mappings != tree->count || seen.nodes != nodes->used || nodes->used > nodes->ready ||
        mapping_tree_bytes(tree) > seen.nodes * NODE_SIZE * 9 / 8 + POOL_SLACK)
        return -EIO;
    return 0;
}
