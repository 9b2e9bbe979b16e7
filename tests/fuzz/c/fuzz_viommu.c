/* SPDX-License-Identifier: MIT
 * virtio-iommu's hot loop on a queue that is the input's: descriptors, rings, requests and indexes.
 *
 * What has been taken is accounted for in the used ring, and the domains keep their rules whatever was asked. */
#include "fuzz.h"

#define RAM 0x4000u
#define DRIVER 0x400u
#define DEVICE 0x800u
#define REQUESTS 0x1000u
#define MOST 32u /* mappings of a domain */

static guest g;

static void put(uint64_t at, const void *bytes, size_t n)
{
    if (at < RAM)
        memcpy(g.ram + at, bytes, n < RAM - at ? n : RAM - at);
}

/* A request as drivers write it, with fields that are likely to meet. */
static size_t take_request(input *in, uint8_t *request)
{
    uint8_t kind = take8(in);
    uint32_t domain = kind >> 4 & 3, flags = kind >> 6 ? 3 : take8(in);
    uint64_t first = take_address(in), last = first + ((uint64_t)(take8(in) % 9) << 12) + 4095, gpa = take_address(in);

    if ((kind & 15) == 15)
        last = take_address(in);
    memset(request, 0, 40);
    request[0] = kind & 1 ? 3 : kind & 2 ? 4 : kind >> 2;
    memcpy(request + 4, &domain, 4);
    memcpy(request + 8, &first, 8);
    memcpy(request + 16, &last, 8);
    memcpy(request + 24, &gpa, 8);
    memcpy(request + 32, &flags, 4);
    return request[0] == 4 ? 28 : 36;
}

static void describe(uint64_t table, unsigned index, uint64_t address, uint32_t size, uint16_t flags, uint16_t next)
{
    uint8_t d[16];

    memcpy(d, &address, 8);
    memcpy(d + 8, &size, 4);
    memcpy(d + 12, &flags, 2);
    memcpy(d + 14, &next, 2);
    put(table + 16 * index, d, sizeof d);
}

static void check_domain(vms_domain *domain, uint64_t first, uint64_t last)
{
    vms_mapping found[MOST + 1];
    uint64_t bytes;
    size_t n = vms_domain_list(domain, 0, found, MOST + 1);

    CHECK(n <= MOST && n == vms_domain_count(domain, &bytes));
    for (size_t i = 0; i < n; i++) {
        CHECK(first <= found[i].start && found[i].start <= found[i].last && found[i].last <= last);
        CHECK(!(found[i].start & 4095) && !(~found[i].last & 4095) && !(found[i].gpa & 4095));
        CHECK(found[i].prot && found[i].prot <= 3);
        CHECK(i == 0 || found[i - 1].last < found[i].start);
    }
    CHECK(vms_domain_check(domain) == 0 && bytes <= 57 * n + 65536);
}

/* Descriptors and available ring, as they were before a run. */
static uint8_t rings[DEVICE];

/* What was taken were chains of two descriptors that the table has (2.7.5), unless answers were written over them. */
static void check_taken(const vms_virtqueue *queue, int done)
{
    if (queue->descriptors || queue->driver != DRIVER || queue->size > 64 || memcmp(rings, g.ram, sizeof rings))
        return;
    for (int n = 0; n < done; n++) {
        uint16_t head, flags, next;
        memcpy(&head, rings + DRIVER + 4 + 2 * ((uint16_t)(queue->next_avail + n) % queue->size), 2);
        CHECK(head < queue->size);
        memcpy(&flags, rings + 16 * head + 12, 2);
        memcpy(&next, rings + 16 * head + 14, 2);
        CHECK(flags & 4 ? queue->indirect && flags == 4 : flags == 1 && next < queue->size);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input in = { data, size };
    vms_viommu_domain domains[2] = { { .id = 1 }, { .id = 2 } };
    static const uint16_t sizes[8] = { 8, 8, 1, 2, 16, 64, 0, 32768 };

    if (!g.memory)
        guest_create(&g, RAM);
    memset(g.ram, 0, RAM);
    CHECK(vms_domain_create_paging(0x1000, 0, UINT64_MAX, UINT64_MAX, MOST, NULL, &domains[0].domain) == 0);
    CHECK(vms_domain_create_paging(0x201000, 0x1000, 0xFFFFFFFF, 0xFFFFFFFFFF, MOST, NULL, &domains[1].domain) == 0);

    uint8_t choice = take8(&in);
    vms_virtqueue queue = { 0, DRIVER, DEVICE, sizes[choice & 7], choice >> 3 & 1, 0, 0 };
    if (choice & 0x10)
        queue.next_avail = queue.next_used = take16(&in);
    if (choice & 0x20)
        queue.next_used = take16(&in);
    if (choice & 0x40) {
        queue.descriptors = take_address(&in);
        queue.driver = take_address(&in);
        queue.device = take_address(&in);
    }
    uint16_t available = queue.next_avail;
    unsigned slots = queue.size ? queue.size : 1;
    for (unsigned n = 0; n < 16 && in.left; n++) {
        uint8_t shape = take8(&in), request[40];
        uint64_t at = REQUESTS + 64 * n;
        uint16_t head = (uint16_t)(2 * n), next = (uint16_t)(head + 1);
        size_t length = take_request(&in, request);
        if (shape & 1)
            head = take8(&in);
        if (shape & 2)
            next = take8(&in);
        if (shape & 4)
            length = take8(&in);
        put(at, request, sizeof request);
        uint64_t table = queue.descriptors;
        if (shape & 8) { /* indirect */
            describe(table, head % slots, at + 0x800, shape & 16 ? 32 : take8(&in), 4, 0);
            table = at + 0x800;
            describe(table, 0, at, (uint32_t)length, 1, shape & 2 ? next : 1);
            describe(table, 1, at + 48, 4, 2, 0);
        } else {
            describe(table, head % slots, shape & 16 ? take_address(&in) : at, (uint32_t)length,
                     shape & 32 ? take8(&in) : 1, next & 63);
            describe(table, next & 63, shape & 64 ? take_address(&in) : at + 48, shape & 32 ? take8(&in) : 4,
                     shape & 128 ? take8(&in) : 2, take8(&in));
        }
        put(queue.driver + 4 + 2 * (available++ % slots), &head, 2);
    }
    if (choice & 0x80)
        available = take16(&in);
    put(queue.driver + 2, &available, 2);

    for (int again = 0; again < 2; again++) {
        vms_virtqueue before = queue;
        memcpy(rings, g.ram, sizeof rings);
        int done = vms_viommu_run(g.requester, &queue, domains, 2);
        CHECK(done == -EFAULT || (done >= 0 && (uint32_t)done <= queue.size));
        if (done > 0) {
            CHECK(queue.next_avail == (uint16_t)(before.next_avail + done));
            CHECK(queue.next_used == (uint16_t)(before.next_used + done));
        }
        check_taken(&before, done);
        check_domain(domains[0].domain, 0, UINT64_MAX);
        check_domain(domains[1].domain, 0x1000, 0xFFFFFFFF);
    }
    vms_domain_destroy(domains[0].domain);
    vms_domain_destroy(domains[1].domain);
    return 0;
}
