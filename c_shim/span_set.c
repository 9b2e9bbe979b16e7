/* SPDX-License-Identifier: MIT
 * Sets of bytes; see span_set.h. */
#include "span_set.h"

#include <stdlib.h>
#include <string.h>

void span_set_clear(span_set *set)
{
    free(set->spans);
    *set = (span_set){ 0 };
}

/* The first span whose last is `at` or beyond; set->n: none. */
static uint32_t from(const span_set *set, uint64_t at)
{
    uint32_t low = 0, high = set->n;

    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (set->spans[middle].last < at)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static void remove_at(span_set *set, uint32_t i, uint32_t n)
{
    memmove(&set->spans[i], &set->spans[i + n], (set->n - i - n) * sizeof *set->spans);
    set->n -= n;
}

/* Closes the narrowest gap, of at least two spans. */
static void close_gap(span_set *set)
{
    uint32_t best = 1;

    for (uint32_t i = 2; i < set->n; i++)
        if (set->spans[i].start - set->spans[i - 1].last < set->spans[best].start - set->spans[best - 1].last)
            best = i;
    set->spans[best - 1].last = set->spans[best].last;
    remove_at(set, best, 1);
    set->merged++;
}

/* Makes room for one more span; 0: there is no memory for it. */
static int make_room(span_set *set)
{
    if (set->n < set->room)
        return 1;
    uint32_t room = set->room ? set->room * 4 : 2;
    /* One more than may stay, as a span is inserted before a gap is closed. */
    if (room > VMS_SET_SPANS + 1)
        room = VMS_SET_SPANS + 1;
    vms_range *more = realloc(set->spans, room * sizeof *more);
    if (more) {
        set->spans = more;
        set->room = room;
        return 1;
    }
    if (set->n > 1)
        close_gap(set);
    return set->n < set->room;
}

void span_set_add(span_set *set, uint64_t start, uint64_t last)
{
    uint32_t i = from(set, start ? start - 1 : 0), n = 0;

    for (; i + n < set->n && (last == UINT64_MAX || set->spans[i + n].start <= last + 1); n++) {
        if (set->spans[i + n].start < start)
            start = set->spans[i + n].start;
        if (set->spans[i + n].last > last)
            last = set->spans[i + n].last;
    }
    if (n) {
        set->spans[i] = (vms_range){ start, last };
        remove_at(set, i + 1, n - 1);
        return;
    }
    if (!make_room(set)) { /* without memory the first span grows; if there is none, the bytes are lost */
        if (set->n) {
            if (start < set->spans[0].start)
                set->spans[0].start = start;
            if (last > set->spans[0].last)
                set->spans[0].last = last;
        }
        set->merged++;
        return;
    }
    i = from(set, start);
    memmove(&set->spans[i + 1], &set->spans[i], (set->n - i) * sizeof *set->spans);
    set->spans[i] = (vms_range){ start, last };
    if (++set->n > VMS_SET_SPANS)
        close_gap(set);
}

void span_set_split(span_set *set, uint64_t at, span_set *high)
{
    uint32_t i = from(set, at);

    for (uint32_t k = i; k < set->n; k++)
        span_set_add(high, set->spans[k].start < at ? at : set->spans[k].start, set->spans[k].last);
    high->merged += set->merged;
    if (i < set->n && set->spans[i].start < at)
        set->spans[i++].last = at - 1;
    set->n = i;
}

int span_set_gap(const span_set *a, const span_set *b, uint64_t at, uint64_t last, vms_range *gap)
{
    for (;;) {
        if (at > last)
            return 0;
        const span_set *sets[2] = { a, b };
        uint64_t covered = 0, end = last;
        int inside = 0;
        for (int s = 0; s < 2; s++) {
            uint32_t i = from(sets[s], at);
            if (i == sets[s]->n)
                continue;
            const vms_range *span = &sets[s]->spans[i];
            if (span->start <= at) {
                inside = 1;
                if (span->last > covered)
                    covered = span->last;
            } else if (span->start - 1 < end) {
                end = span->start - 1;
            }
        }
        if (!inside) {
            *gap = (vms_range){ at, end };
            return 1;
        }
        if (covered >= last)
            return 0;
        at = covered + 1;
    }
}

uint64_t span_set_bytes(const span_set *a, const span_set *b, uint64_t start, uint64_t last)
{
    uint64_t left = last - start + 1, at = start;
    vms_range gap;

    while (span_set_gap(a, b, at, last, &gap)) {
        left -= gap.last - gap.start + 1;
        if (gap.last == last)
            break;
        at = gap.last + 1;
    }
    return left;
}
