/* SPDX-License-Identifier: MIT
 * A set of bytes, as ascending spans [start, last] in a bounded array.  Exact as long as VMS_SET_SPANS spans are enough;
 * then the narrowest gap is closed, and `merged` counts that: so the set may hold too much, never too little.
 * Not locked. */
#ifndef VMS_SPAN_SET_H
#define VMS_SPAN_SET_H

#include <stddef.h>
#include <stdint.h>

#include "vmshim.h"

typedef struct span_set {
    vms_range *spans;
    uint32_t n, room, merged;
} span_set;

void span_set_clear(span_set *set);
/* Adds [start, last]. */
void span_set_add(span_set *set, uint64_t start, uint64_t last);
/* Moves what begins at `at` or lies beyond to `high`, which is empty. */
void span_set_split(span_set *set, uint64_t at, span_set *high);
/* How many bytes of [start, last] are in a, or in b. */
uint64_t span_set_bytes(const span_set *a, const span_set *b, uint64_t start, uint64_t last);
/* The first span, from `at` on, that is in neither; 0: there is none up to `last`. */
int span_set_gap(const span_set *a, const span_set *b, uint64_t at, uint64_t last, vms_range *gap);

#endif
