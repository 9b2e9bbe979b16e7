/* SPDX-License-Identifier: MIT
 * Mappings of a domain against a plain model, a sorted array: the same operations come to the same mappings and the same
 * errors, the tree's invariants and its bound of memory hold.
 *
 * Most inputs are of many small operations: a run of mappings is one, so that the tree grows several levels. */
#include "fuzz.h"

#define SLOTS 4096u /* pages that mappings are made of */
#define MOST 3000u
#define PAGE 4096ull

/* What the model knows of each page: 0: nothing; 1: a mapping begins; 2: it goes on. */
static uint8_t page[SLOTS];
static uint16_t value[SLOTS]; /* of the mapping's target: GPA / PAGE - page number */
static size_t count;

static int is_free(unsigned first, unsigned n)
{
    for (unsigned i = first; i < first + n; i++)
        if (page[i])
            return 0;
    return 1;
}

static void map(vms_domain *domain, unsigned first, unsigned n, uint16_t to)
{
    int expected = first + n > SLOTS ? -ERANGE : !is_free(first, n) ? -EEXIST : count >= MOST ? -ENOSPC : 0;
    int rc = vms_domain_map(domain, first * PAGE, (uint64_t)(first + to) * PAGE, n * PAGE, 3);

    CHECK(rc == expected);
    if (rc)
        return;
    count++;
    memset(page + first, 2, n);
    page[first] = 1;
    for (unsigned i = first; i < first + n; i++)
        value[i] = to;
}

/* All that lies in [first, first + n), or nothing if a mapping reaches out of it. */
static void clear(vms_domain *domain, unsigned first, unsigned n)
{
    unsigned end = first + n > SLOTS ? SLOTS : first + n, gone = 0;
    int cut = page[first] == 2 || (end < SLOTS && page[end] == 2);
    int64_t rc = vms_domain_clear(domain, first * PAGE, end * PAGE - 1, 0);

    if (cut) {
        CHECK(rc == -ERANGE);
        return;
    }
    for (unsigned i = first; i < end; i++) {
        gone += page[i] != 0;
        count -= page[i] == 1;
        page[i] = 0;
    }
    CHECK(rc == gone);
}

/* Page by page from `first` on, until a hole. */
static void unmap(vms_domain *domain, unsigned first, unsigned n)
{
    unsigned end = first + n > SLOTS ? SLOTS : first + n, gone = 0;

    /* Cutting the middle out of a mapping makes two of it, for which there may be no room. */
    int splits = page[first] == 2 && end < SLOTS && page[end] == 2;
    for (unsigned i = first + 1; splits && i < end; i++)
        splits = page[i] == 2;
    int64_t rc = vms_domain_unmap(domain, first * PAGE, (end - first) * PAGE, 0);
    if (splits && count >= MOST) {
        CHECK(rc == -ENOSPC);
        return;
    }
    if (splits)
        count++;
    for (unsigned i = first; i < end && page[i]; i++) {
        if (page[i] == 1 && (i + 1 == SLOTS || page[i + 1] != 2))
            count--;
        else if (page[i] == 1 && i + 1 < SLOTS)
            page[i + 1] = 1; /* the rest is a mapping still */
        else if (i == first && !splits && i + 1 < SLOTS && page[i + 1] == 2) {
            page[i + 1] = 1;
            count++; /* its head stays, its tail is being eaten up */
        } else if (splits && i + 1 < SLOTS && page[i + 1] == 2)
            page[i + 1] = 1;
        page[i] = 0;
        gone++;
    }
    CHECK(gone ? rc == gone : rc <= 0);
}

static void check(vms_domain *domain)
{
    static vms_mapping found[MOST + 1];
    uint64_t bytes;
    size_t n = vms_domain_list(domain, 0, found, MOST + 1), i = 0;

    CHECK(vms_domain_check(domain) == 0 && n == count && vms_domain_count(domain, &bytes) == count);
    CHECK(bytes <= 57 * count + 65536);
    for (unsigned at = 0; at < SLOTS;) {
        unsigned end = at + 1;
        if (!page[at]) {
            at++;
            continue;
        }
        while (end < SLOTS && page[end] == 2)
            end++;
        CHECK(i < n && found[i].start == at * PAGE && found[i].last == end * PAGE - 1);
        CHECK(found[i].gpa == (uint64_t)(at + value[at]) * PAGE);
        i++;
        at = end;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input in = { data, size };
    vms_domain *domain;
    vms_mapping walked;
    vms_fault fault;

    memset(page, 0, sizeof page);
    count = 0;
    CHECK(vms_domain_create_paging(PAGE, 0, SLOTS * PAGE - 1, UINT64_MAX, MOST, NULL, &domain) == 0);
    for (int n = 0; n < 64 && in.left; n++) {
        uint16_t what = take16(&in), first = take16(&in) % SLOTS;
        unsigned length = 1 + (what >> 4 & 15), many = 1 + (what >> 8);
        switch (what & 15) {
        case 0 ... 2:
            map(domain, first, length, what >> 8);
            break;
        case 3 ... 5: /* many, ascending */
            for (unsigned i = 0; i < many; i++)
                map(domain, (first + i * length) % SLOTS, length, (uint16_t)n);
            break;
        case 6 ... 7: /* many, descending, with gaps */
            for (unsigned i = 0; i < many; i++)
                map(domain, (first + SLOTS - i * (length + 1) % SLOTS) % SLOTS, length, (uint16_t)n);
            break;
        case 8:
            unmap(domain, first, length);
            break;
        case 9: /* each of many, with gaps that stay */
            for (unsigned i = 0; i < many; i++)
                unmap(domain, (first + i * length) % SLOTS, 1);
            break;
        case 10:
            clear(domain, first, length);
            break;
        case 11:
            clear(domain, first, length * many);
            break;
        case 12:
            for (unsigned i = 0; i < many; i++)
                clear(domain, (first + i * length * 3) % SLOTS, length);
            break;
        case 13:
            CHECK((vms_domain_walk(domain, first * PAGE + 7, 1, &walked, &fault) == 0) == (page[first] != 0));
            if (page[first])
                CHECK(walked.gpa + (first * PAGE - walked.start) == (uint64_t)(first + value[first]) * PAGE);
            break;
        default:
            unmap(domain, first, length * many);
        }
        if (what & 0x8000)
            check(domain);
        else if (count < 256 || n % 16 == 0)
            CHECK(vms_domain_check(domain) == 0);
    }
    check(domain);
    vms_domain_destroy(domain);
    return 0;
}
