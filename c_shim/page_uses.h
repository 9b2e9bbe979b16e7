/* SPDX-License-Identifier: MIT
 * How many live mappings each page of guest memory is in: a hash table, up to PAGE_USES_MOST pages.  Not locked. */
#ifndef VMS_PAGE_USES_H
#define VMS_PAGE_USES_H

#include <stddef.h>
#include <stdint.h>

#define PAGE_USES_MOST 262144u

typedef struct page_use {
    uint64_t page; /* its number + 1; 0: free */
    uint32_t mappings, writable;
    void *latest; /* mapping; NULL: it has ended */
} page_use;

typedef struct page_uses {
    page_use *slot; /* a power of two of them; NULL: none yet */
    size_t slots, count;
} page_uses;

void page_uses_clear(page_uses *uses);
/* Another mapping has the page: its entry as it was before in *before (no mappings: none).  0: there is no room. */
int page_uses_add(page_uses *uses, uint64_t page, int writable, void *mapping, page_use *before);
/* The mapping has ended.  The page may have had no room. */
void page_uses_drop(page_uses *uses, uint64_t page, int writable, const void *mapping);

#endif
