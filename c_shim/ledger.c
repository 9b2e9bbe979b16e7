/* SPDX-License-Identifier: MIT
 * What is mapped for devices, and what they do with it.
 *
 * Nothing that happens is taken from its message: a map, an unmap or an invalidation only says where to look, and what is
 * mapped there is read from the domain, under the ledger's lock.  So events may arrive twice (two requesters of one domain) or
 * late, and a guest may invalidate more than it has changed. */
#define _GNU_SOURCE
#include "ledger.h"

#include <errno.h>
#include <stdlib.h>
#include <time.h>

#include "page_uses.h"
#include "span_set.h"

/* Words that look like addresses of a 64-bit kernel: in the upper half, and no small negative number. */
#define POINTER_LEAST UINT64_C(0xFFFF000000000000)
#define POINTER_MOST UINT64_C(0xFFFFFFFFFEFFFFFF)
/* Pages of a mapping that are looked for in others, and bytes of it that are searched for pointers. */
#define PAGES_INDEXED 256u
#define BYTES_SEARCHED (UINT64_C(256) << 10)
#define PAGE_SIZE UINT64_C(4096)

typedef struct record {
    span_node span; /* first: a span_node * is a record * */
    struct record *newer, *older; /* of the live ones, by id */
    vms_use use;
    span_set read, written;
    uint32_t indexed; /* of its first pages in ledger->pages */
} record;

struct ledger_space {
    ledger_space *next;
    vms_ledger *ledger;
    vms_domain *domain; /* as long as attached > 0 */
    vms_memory *memory; /* by which its GPAs are read; a reference */
    uint32_t who, pasid, attached;
    int notified;
    span_tree live;
};

struct vms_ledger {
    pthread_mutex_t lock; /* all below */
    unsigned refs;        /* its creator's and its requesters' */
    uint64_t last_id, n_ended, n_incidents;
    ledger_space *spaces;
    record *newest, *oldest;
    record *ended[VMS_LEDGER_ENDED]; /* number n is at n modulo the size */
    vms_incident incident[VMS_LEDGER_INCIDENTS];
    page_uses pages;
    vms_ledger_totals totals;
};

static uint64_t clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static uint64_t size_of(const record *r)
{
    return r->span.last - r->span.start + 1;
}

static unsigned order_of(uint64_t bytes)
{
    uint64_t pages = (bytes - 1) / PAGE_SIZE + 1;
    unsigned order = pages < 2 ? 0 : 64 - (unsigned)__builtin_clzll(pages - 1);
    return order < VMS_ORDERS ? order : VMS_ORDERS - 1;
}

static uint64_t pointers_in(const ledger_space *space, uint64_t gpa, uint64_t bytes)
{
    return memory_count_words(space->memory, gpa, bytes, POINTER_LEAST, POINTER_MOST);
}

/* ---- records -------------------------------------------------------------------------------- */

static void record_free(record *r)
{
    if (!r)
        return;
    span_set_clear(&r->read);
    span_set_clear(&r->written);
    free(r);
}

/* Enters the first pages of a record; the first that another live one has, too, makes both twins. */
static void index_pages(vms_ledger *ledger, record *r, int look_for_twins)
{
    uint64_t pages = size_of(r) / PAGE_SIZE;
    int writable = (r->use.prot & VMS_PROT_WRITE) != 0;

    for (r->indexed = 0; r->indexed < pages && r->indexed < PAGES_INDEXED; r->indexed++) {
        page_use before;
        if (!page_uses_add(&ledger->pages, r->use.gpa / PAGE_SIZE + r->indexed, writable, r, &before))
            return;
        if (!look_for_twins || !before.mappings || (!writable && !before.writable) || (r->use.flags & VMS_USE_TWIN))
            continue;
        ledger->totals.twins++;
        r->use.flags |= VMS_USE_TWIN;
        record *other = before.latest;
        if (other) {
            other->use.flags |= VMS_USE_TWIN;
            other->use.twin = r->span.start;
            r->use.twin = other->span.start;
        }
    }
}

static void unindex_pages(vms_ledger *ledger, record *r)
{
    for (; r->indexed; r->indexed--)
        page_uses_drop(&ledger->pages, r->use.gpa / PAGE_SIZE + r->indexed - 1, (r->use.prot & VMS_PROT_WRITE) != 0, r);
}

static void link_live(vms_ledger *ledger, record *r)
{
    r->older = ledger->newest;
    r->newer = NULL;
    *(r->older ? &r->older->newer : &ledger->oldest) = r;
    ledger->newest = r;
    ledger->totals.live++;
    ledger->totals.live_bytes += size_of(r);
    if (ledger->totals.live > ledger->totals.most_live)
        ledger->totals.most_live = ledger->totals.live;
}

static void unlink_live(vms_ledger *ledger, record *r)
{
    *(r->newer ? &r->newer->older : &ledger->newest) = r->older;
    *(r->older ? &r->older->newer : &ledger->oldest) = r->newer;
    ledger->totals.live--;
    ledger->totals.live_bytes -= size_of(r);
}

/* A live record with this span, which overlaps none; NULL: there is no room. */
static record *enter(ledger_space *space, uint64_t start, uint64_t last, uint64_t gpa, uint32_t prot, uint32_t flags)
{
    vms_ledger *ledger = space->ledger;
    record *r = ledger->totals.live < VMS_LEDGER_LIVE ? calloc(1, sizeof *r) : NULL;

    if (!r) {
        ledger->totals.unrecorded++;
        return NULL;
    }
    r->span.start = start;
    r->span.last = last;
    r->use = (vms_use){ .id = ++ledger->last_id, .gpa = gpa, .prot = prot, .pasid = space->pasid, .who = space->who,
                        .flags = flags };
    span_tree_insert(&space->live, &r->span);
    link_live(ledger, r);
    return r;
}

static int was_here(const vms_ledger *ledger, const record *r)
{
    uint64_t first = ledger->n_ended < VMS_LEDGER_ENDED ? 0 : ledger->n_ended - VMS_LEDGER_ENDED;

    for (uint64_t n = ledger->n_ended; n-- > first;) {
        const record *old = ledger->ended[n % VMS_LEDGER_ENDED];
        if (r->use.mapped - old->use.ended > VMS_REUSE_NS)
            return 0; /* those before it ended earlier */
        if (old->span.start <= r->span.last && r->span.start <= old->span.last)
            return 1;
    }
    return 0;
}

/* Counts a record whose span is final. */
static void count_mapped(ledger_space *space, record *r)
{
    vms_ledger *ledger = space->ledger;
    uint64_t bytes = size_of(r);

    r->use.mapped = clock_ns();
    ledger->totals.mapped++;
    ledger->totals.mapped_bytes += bytes;
    ledger->totals.learnt += (r->use.flags & VMS_USE_LEARNT) != 0;
    ledger->totals.reused += (uint64_t)was_here(ledger, r);
    r->use.pointers = pointers_in(space, r->use.gpa, bytes < BYTES_SEARCHED ? bytes : BYTES_SEARCHED);
    ledger->totals.pointers += r->use.pointers;
    index_pages(ledger, r, 1);
}

/* The pointers in bytes that were never touched. */
static uint64_t exposed(const ledger_space *space, const record *r)
{
    uint64_t found = 0, at = r->span.start, last = r->span.last;
    vms_range gap;

    if (last - at >= BYTES_SEARCHED)
        last = at + (BYTES_SEARCHED - 1);
    while (span_set_gap(&r->read, &r->written, at, last, &gap)) {
        found += pointers_in(space, r->use.gpa + (gap.start - r->span.start), gap.last - gap.start + 1);
        if (gap.last == last)
            break;
        at = gap.last + 1;
    }
    return found;
}

/* What a record says of itself, with what follows from it. */
static vms_use described(const record *r)
{
    vms_use use = r->use;

    use.start = r->span.start;
    use.last = r->span.last;
    use.touched = span_set_bytes(&r->read, &r->written, r->span.start, r->span.last);
    if (r->read.merged || r->written.merged)
        use.flags |= VMS_USE_INEXACT;
    return use;
}

/* The bytes of whole pages that were never touched. */
static uint64_t spare_pages(const record *r)
{
    uint64_t bytes = 0, at = r->span.start;
    vms_range gap;

    while (span_set_gap(&r->read, &r->written, at, r->span.last, &gap)) {
        uint64_t first = (gap.start + (PAGE_SIZE - 1)) / PAGE_SIZE, end_page = (gap.last - (PAGE_SIZE - 1)) / PAGE_SIZE;
        if (gap.last - gap.start >= PAGE_SIZE - 1 && end_page >= first)
            bytes += (end_page - first + 1) * PAGE_SIZE;
        if (gap.last == r->span.last)
            break;
        at = gap.last + 1;
    }
    return bytes;
}

/* Counts what an ended record was used for. */
static void count_use(ledger_space *space, record *r)
{
    vms_ledger_totals *totals = &space->ledger->totals;
    uint32_t used = (r->use.read != 0) | (uint32_t)(r->use.written != 0) << 1, prot = r->use.prot - 1;
    int is_long = r->use.ended - r->use.mapped >= VMS_LONG_NS;
    unsigned order = order_of(size_of(r));

    if (is_long)
        r->use.flags |= VMS_USE_LONG;
    r->use.exposed_pointers = exposed(space, r);
    totals->uses[is_long][prot][used][order]++;
    if (!used)
        return;
    totals->bytes[is_long][prot][order] += size_of(r);
    totals->touched[is_long][prot][order] += span_set_bytes(&r->read, &r->written, r->span.start, r->span.last);
    totals->exposed_pointers[is_long] += r->use.exposed_pointers;
    uint64_t spare = spare_pages(r);
    if (spare) {
        r->use.flags |= VMS_USE_TOO_LARGE;
        totals->too_large[is_long]++;
        totals->too_large_bytes[is_long] += spare;
    }
}

/* It is not mapped any more. */
static void end(ledger_space *space, record *r, uint32_t flags)
{
    vms_ledger *ledger = space->ledger;

    unlink_live(ledger, r);
    unindex_pages(ledger, r);
    span_tree_remove(&space->live, &r->span);
    r->use.ended = clock_ns();
    r->use.flags |= flags;
    ledger->totals.ended++;
    if (flags & VMS_USE_DETACHED)
        ledger->totals.detached++;
    else
        count_use(space, r);
    record **place = &ledger->ended[ledger->n_ended++ % VMS_LEDGER_ENDED];
    record_free(*place);
    *place = r;
}

/* Cuts a live record in two before `at`; returns the upper part; NULL: no room, and nothing is changed. */
static record *split(ledger_space *space, record *r, uint64_t at)
{
    vms_ledger *ledger = space->ledger;
    uint64_t last = r->span.last, gpa = r->use.gpa + (at - r->span.start);

    unindex_pages(ledger, r);
    ledger->totals.live_bytes -= last - at + 1;
    r->span.last = at - 1;
    record *upper = enter(space, at, last, gpa, r->use.prot, r->use.flags);
    if (!upper) {
        r->span.last = last;
        ledger->totals.live_bytes += last - at + 1;
    } else {
        uint64_t id = upper->use.id;
        upper->use = r->use;
        upper->use.id = id;
        upper->use.gpa = gpa;
        span_set_split(&r->read, at, &upper->read);
        span_set_split(&r->written, at, &upper->written);
        /* What was moved belongs to the part that has the bytes: as near as the spans tell. */
        if (!upper->read.n)
            upper->use.read = 0;
        else if (!r->read.n)
            r->use.read = 0;
        if (!upper->written.n)
            upper->use.written = 0;
        else if (!r->written.n)
            r->use.written = 0;
        index_pages(ledger, upper, 0);
        ledger->totals.mapped++; /* two mappings by now */
    }
    index_pages(ledger, r, 0);
    return upper;
}

/* ---- what is mapped ------------------------------------------------------------------------- */

/* Compares the part of a live record in [start, last] with the domain; ends what is not so any more. */
static void check(ledger_space *space, record *r, uint64_t start, uint64_t last, uint32_t *steps)
{
    uint64_t at = r->span.start > start ? r->span.start : start;
    uint64_t until = r->span.last < last ? r->span.last : last;

    for (;;) {
        translation t;
        int rc = domain_next(space->domain, at, until, &t, steps);
        if (rc == -EAGAIN)
            return;
        if (rc == 0 && t.start <= at && t.gpa + (at - t.start) == r->use.gpa + (at - r->span.start) &&
            t.prot == r->use.prot) {
            if (t.last >= until)
                return;
            at = t.last + 1;
            continue;
        }
        /* Gone up to where something is mapped, or up to the end of what is mapped otherwise. */
        uint64_t gone = rc < 0 ? until : t.start > at ? t.start - 1 : t.last;
        if (gone > until)
            gone = until;
        record *part = r, *rest = NULL;
        if (at > r->span.start)
            part = split(space, r, at);
        if (part && gone < part->span.last)
            rest = split(space, part, gone + 1);
        if (part && (rest || gone == part->span.last))
            end(space, part, 0);
        if (!rest || gone >= until)
            return;
        r = rest;
        at = gone + 1;
    }
}

/* Enters what is mapped in [start, last], and not known. */
static void enter_mapped(ledger_space *space, uint64_t start, uint64_t last, uint32_t *steps)
{
    record *open = NULL; /* may still grow: entries of tables that follow each other are one mapping */

    for (;;) {
        translation t;
        if (domain_next(space->domain, start, last, &t, steps) < 0)
            break;
        /* It may begin before what was asked for: then up to there some of it may be known. */
        uint64_t at = t.start;
        const span_node *known = span_tree_from(&space->live, at);
        while (known && known->start <= at && known->last < start) {
            at = known->last + 1;
            known = span_tree_from(&space->live, at);
        }
        if (known && known->start <= at) {
            if (known->last >= last)
                break;
            start = known->last + 1;
            continue;
        }
        uint64_t to = known && known->start <= t.last ? known->start - 1 : t.last;
        uint64_t gpa = t.gpa + (at - t.start);
        if (open && space->domain->kind == VMS_DOMAIN_TABLE && open->span.last + 1 == at && open->use.prot == t.prot &&
            open->use.gpa + size_of(open) == gpa) {
            space->ledger->totals.live_bytes += to - at + 1;
            open->span.last = to;
        } else {
            if (open)
                count_mapped(space, open);
            open = enter(space, at, to, gpa, t.prot, 0);
            if (!open)
                break;
        }
        if (to >= last)
            break;
        start = to + 1;
    }
    if (open)
        count_mapped(space, open);
}

static void look(ledger_space *space, uint64_t start, uint64_t last)
{
    uint32_t steps = VMS_LEDGER_WALKS;
    uint64_t at;

    /* Domains map in pages, whatever a guest invalidates. */
    start &= -PAGE_SIZE;
    last |= PAGE_SIZE - 1;
    at = start;

    for (;;) {
        record *r = (record *)span_tree_from(&space->live, at);
        if (!r || r->span.start > last)
            break;
        uint64_t end_of = r->span.last;
        check(space, r, start, last, &steps);
        if (end_of >= last)
            break;
        at = end_of + 1;
    }
    if (space->notified)
        enter_mapped(space, start, last, &steps);
    if (!steps)
        space->ledger->totals.unwalked++;
}

void ledger_changed(ledger_space *space, uint64_t start, uint64_t last, int flushed)
{
    pthread_mutex_lock(&space->ledger->lock);
    space->ledger->totals.flushes += flushed != 0;
    look(space, start, last);
    pthread_mutex_unlock(&space->ledger->lock);
}

void ledger_accessed(ledger_space *space, uint64_t iova, uint64_t n, uint32_t access, uint64_t gpa, uint32_t who)
{
    vms_ledger *ledger = space->ledger;
    uint64_t last = iova + (n - 1);

    pthread_mutex_lock(&ledger->lock);
    for (uint64_t at = iova;;) {
        record *r = (record *)span_tree_from(&space->live, at);
        int known = r && r->span.start <= at && r->use.gpa + (at - r->span.start) == gpa + (at - iova);
        if (!known) {
            uint32_t steps = 4; /* more than are needed for a page that is mapped */
            translation t;
            uint64_t page = at & -PAGE_SIZE;
            if (r && r->span.start <= at)
                check(space, r, page, page | (PAGE_SIZE - 1), &steps);
            steps = 1;
            /* By a stale translation: what it leads to is not mapped. */
            if (domain_next(space->domain, at, at, &t, &steps) < 0 || t.gpa + (at - t.start) != gpa + (at - iova))
                break;
            if (span_tree_overlaps(&space->live, t.start, t.last))
                t = (translation){ .start = page, .last = page | (PAGE_SIZE - 1), .gpa = t.gpa + (page - t.start),
                                   .prot = t.prot };
            if (ledger->totals.live >= VMS_LEDGER_LIVE || span_tree_overlaps(&space->live, t.start, t.last))
                break;
            r = enter(space, t.start, t.last, t.gpa, t.prot, VMS_USE_LEARNT);
            if (!r)
                break;
            count_mapped(space, r);
        }
        uint64_t to = r->span.last < last ? r->span.last : last;
        r->use.last_use = clock_ns();
        if (!r->use.first_use) {
            r->use.first_use = r->use.last_use;
            r->use.who = who;
        }
        r->use.released = 0;
        if (access & VMS_PROT_READ) {
            span_set_add(&r->read, at, to);
            r->use.read += to - at + 1;
        }
        if (access & VMS_PROT_WRITE) {
            span_set_add(&r->written, at, to);
            r->use.written += to - at + 1;
        }
        if (to == last)
            break;
        at = to + 1;
    }
    pthread_mutex_unlock(&ledger->lock);
}

/* ---- life ----------------------------------------------------------------------------------- */

int vms_ledger_create(vms_ledger **out)
{
    vms_ledger *ledger = calloc(1, sizeof *ledger);
    if (!ledger)
        return -ENOMEM;
    pthread_mutex_init(&ledger->lock, NULL);
    ledger->refs = 1;
    *out = ledger;
    return 0;
}

void ledger_ref(vms_ledger *ledger)
{
    pthread_mutex_lock(&ledger->lock);
    ledger->refs++;
    pthread_mutex_unlock(&ledger->lock);
}

void vms_ledger_destroy(vms_ledger *ledger)
{
    if (!ledger)
        return;
    pthread_mutex_lock(&ledger->lock);
    unsigned left = --ledger->refs;
    pthread_mutex_unlock(&ledger->lock);
    if (left)
        return;
    for (size_t i = 0; i < VMS_LEDGER_ENDED; i++)
        record_free(ledger->ended[i]);
    page_uses_clear(&ledger->pages);
    pthread_mutex_destroy(&ledger->lock);
    free(ledger);
}

ledger_space *ledger_attached(vms_ledger *ledger, vms_domain *domain, vms_memory *memory, uint32_t who, uint32_t pasid,
                              int notified)
{
    if (domain->kind != VMS_DOMAIN_PAGING && domain->kind != VMS_DOMAIN_TABLE)
        return NULL;
    pthread_mutex_lock(&ledger->lock);
    ledger_space *space = ledger->spaces;
    while (space && space->domain != domain)
        space = space->next;
    if (space) {
        space->attached++;
    } else if ((space = calloc(1, sizeof *space))) {
        *space = (ledger_space){ .next = ledger->spaces, .ledger = ledger, .domain = domain, .memory = memory, .who = who,
                                 .pasid = pasid, .attached = 1, .notified = notified || domain->kind == VMS_DOMAIN_PAGING };
        span_tree_init(&space->live);
        memory_ref(memory);
        domain_watch(domain, 1);
        ledger->spaces = space;
        ledger->refs++;
        look(space, 0, UINT64_MAX);
    }
    pthread_mutex_unlock(&ledger->lock);
    return space;
}

void ledger_detached(ledger_space *space)
{
    vms_ledger *ledger = space->ledger;

    pthread_mutex_lock(&ledger->lock);
    int gone = !--space->attached;
    if (gone) {
        while (space->live.root)
            end(space, (record *)space->live.root, VMS_USE_DETACHED);
        ledger_space **link = &ledger->spaces;
        while (*link != space)
            link = &(*link)->next;
        *link = space->next;
    }
    pthread_mutex_unlock(&ledger->lock);
    if (!gone)
        return;
    domain_watch(space->domain, 0);
    vms_memory_destroy(space->memory);
    free(space);
    vms_ledger_destroy(ledger);
}

/* ---- what is read of it --------------------------------------------------------------------- */

int vms_ledger_released(vms_ledger *ledger)
{
    uint64_t now = clock_ns();

    pthread_mutex_lock(&ledger->lock);
    ledger->totals.released++;
    for (record *r = ledger->oldest; r; r = r->newer)
        if (!r->use.released)
            r->use.released = now;
    pthread_mutex_unlock(&ledger->lock);
    return 0;
}

size_t vms_ledger_live(vms_ledger *ledger, uint64_t id, vms_use *out, size_t room)
{
    size_t n = 0;

    pthread_mutex_lock(&ledger->lock);
    record *r = ledger->newest;
    while (r && r->use.id > id)
        r = r->older;
    for (r = r ? r->newer : ledger->oldest; r && n < room; r = r->newer)
        out[n++] = described(r);
    pthread_mutex_unlock(&ledger->lock);
    return n;
}

size_t vms_ledger_ended(vms_ledger *ledger, uint64_t *number, vms_use *out, size_t room)
{
    size_t n = 0;

    pthread_mutex_lock(&ledger->lock);
    if (ledger->n_ended > VMS_LEDGER_ENDED && *number < ledger->n_ended - VMS_LEDGER_ENDED)
        *number = ledger->n_ended - VMS_LEDGER_ENDED;
    for (; n < room && *number < ledger->n_ended; ++*number)
        out[n++] = described(ledger->ended[*number % VMS_LEDGER_ENDED]);
    pthread_mutex_unlock(&ledger->lock);
    return n;
}

size_t vms_ledger_spans(vms_ledger *ledger, uint64_t id, int written, vms_range *out, size_t room)
{
    size_t n = 0;

    pthread_mutex_lock(&ledger->lock);
    record *r = ledger->newest;
    while (r && r->use.id != id)
        r = r->older;
    for (uint64_t i = ledger->n_ended; !r && i > 0 && ledger->n_ended - i < VMS_LEDGER_ENDED; i--)
        if (ledger->ended[(i - 1) % VMS_LEDGER_ENDED]->use.id == id)
            r = ledger->ended[(i - 1) % VMS_LEDGER_ENDED];
    const span_set *set = r ? written ? &r->written : &r->read : NULL;
    for (; set && n < set->n && n < room; n++)
        out[n] = set->spans[n];
    pthread_mutex_unlock(&ledger->lock);
    return n;
}

/* The mapping that an address is in, or was in last, in the domain of `space`, or, where that is gone, in any. */
static vms_use met(const vms_ledger *ledger, const ledger_space *space, uint64_t iova)
{
    if (space) {
        const span_node *node = span_tree_from(&space->live, iova);
        if (node && node->start <= iova)
            return described((const record *)node);
    }
    for (uint64_t i = ledger->n_ended; i > 0 && ledger->n_ended - i < VMS_LEDGER_ENDED; i--) {
        const record *r = ledger->ended[(i - 1) % VMS_LEDGER_ENDED];
        if (r->span.start <= iova && iova <= r->span.last)
            return described(r);
    }
    return (vms_use){ 0 };
}

int ledger_incident(vms_ledger *ledger, ledger_space *space, vms_incident item)
{
    if (item.kind >= VMS_INCIDENTS)
        return -EINVAL;
    pthread_mutex_lock(&ledger->lock);
    if (space) /* what the driver has changed is perhaps not invalidated yet */
        look(space, item.iova, item.iova);
    item.time = clock_ns();
    item.use = met(ledger, space, item.iova);
    ledger->totals.incidents[item.kind]++;
    ledger->incident[ledger->n_incidents++ % VMS_LEDGER_INCIDENTS] = item;
    pthread_mutex_unlock(&ledger->lock);
    return 0;
}

size_t vms_ledger_incidents(vms_ledger *ledger, uint64_t *number, vms_incident *out, size_t room)
{
    size_t n = 0;

    pthread_mutex_lock(&ledger->lock);
    if (ledger->n_incidents > VMS_LEDGER_INCIDENTS && *number < ledger->n_incidents - VMS_LEDGER_INCIDENTS)
        *number = ledger->n_incidents - VMS_LEDGER_INCIDENTS;
    for (; n < room && *number < ledger->n_incidents; ++*number)
        out[n++] = ledger->incident[*number % VMS_LEDGER_INCIDENTS];
    pthread_mutex_unlock(&ledger->lock);
    return n;
}

void vms_ledger_totals_get(vms_ledger *ledger, vms_ledger_totals *out)
{
    pthread_mutex_lock(&ledger->lock);
    *out = ledger->totals;
    pthread_mutex_unlock(&ledger->lock);
}
