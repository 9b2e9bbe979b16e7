/* SPDX-License-Identifier: MIT
 * Linear probing; entries that follow a freed one move up, so that none is marked as deleted. */
#include "page_uses.h"

#include <stdlib.h>

void page_uses_clear(page_uses *uses)
{
    free(uses->slot);
    *uses = (page_uses){ 0 };
}

static size_t home(const page_uses *uses, uint64_t page)
{
    return (size_t)((page * UINT64_C(0x9E3779B97F4A7C15)) >> 32) & (uses->slots - 1);
}

/* The entry of this page, or the free one where it belongs. */
static page_use *find(const page_uses *uses, uint64_t page)
{
    size_t i = home(uses, page);

    while (uses->slot[i].page && uses->slot[i].page != page)
        i = (i + 1) & (uses->slots - 1);
    return &uses->slot[i];
}

/* At least half of the entries stay free. */
static int grow(page_uses *uses)
{
    if (uses->slots && uses->count < uses->slots / 2)
        return 1;
    if (uses->count >= PAGE_USES_MOST)
        return 0;
    page_uses more = { .slots = uses->slots ? uses->slots * 2 : 256, .count = uses->count };
    more.slot = calloc(more.slots, sizeof *more.slot);
    if (!more.slot)
        return 0;
    for (size_t i = 0; i < uses->slots; i++)
        if (uses->slot[i].page)
            *find(&more, uses->slot[i].page) = uses->slot[i];
    free(uses->slot);
    *uses = more;
    return 1;
}

int page_uses_add(page_uses *uses, uint64_t page, int writable, void *mapping, page_use *before)
{
    page_use *use = uses->slots ? find(uses, page + 1) : NULL;

    *before = (page_use){ 0 };
    if (!use || !use->page) {
        if (!grow(uses))
            return 0;
        use = find(uses, page + 1);
        use->page = page + 1;
        uses->count++;
    }
    *before = *use;
    use->mappings++;
    use->writable += writable != 0;
    use->latest = mapping;
    return 1;
}

void page_uses_drop(page_uses *uses, uint64_t page, int writable, const void *mapping)
{
    page_use *use = uses->slots ? find(uses, page + 1) : NULL;

    if (!use || !use->page)
        return;
    if (use->latest == mapping)
        use->latest = NULL;
    use->writable -= writable && use->writable;
    if (--use->mappings)
        return;
    size_t hole = (size_t)(use - uses->slot), mask = uses->slots - 1;
    for (size_t i = (hole + 1) & mask; uses->slot[i].page; i = (i + 1) & mask) {
        /* It may move to the hole unless its home lies between them. */
        if (((i - home(uses, uses->slot[i].page)) & mask) >= ((i - hole) & mask)) {
            uses->slot[hole] = uses->slot[i];
            hole = i;
        }
    }
    uses->slot[hole] = (page_use){ 0 };
    uses->count--;
}
