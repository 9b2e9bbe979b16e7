/* SPDX-License-Identifier: MIT
 * Guest memory and DMA: windows of files that shrink, domains, IOTLBs, pins and dirty logs, in any order.
 *
 * An access moves what it says it has moved, an IOTLB that gets every invalidation has no stale translation, a ledger's
 * totals are those of its mappings, and at the end no mapping of a file is left. */
#include "fuzz.h"

#define FILES 3u
#define FILE_SIZE 0x8000u
#define PINS 4u

static vms_files *files;
static int fds[FILES];

static void create(void)
{
    CHECK(vms_files_create(&files) == 0);
    for (unsigned i = 0; i < FILES; i++) {
        fds[i] = memfd_create("ram", 0);
        CHECK(fds[i] >= 0);
    }
}

typedef struct world {
    vms_memory *memory;
    vms_requester *requester;
    vms_ledger *ledger;
    vms_domain *domain[5]; /* two paging, one of tables, identity, blocked */
    struct {
        vms_pin *pin;
        uint8_t *ptr;
        size_t len;
    } pin[PINS];
    int by_tables; /* the domain with tables was attached: they are in memory that anyone writes, and nobody flushes */
} world;

static uint64_t take_page(input *in)
{
    uint8_t page = take8(in);
    return page == 0xFF ? take64(in) : page == 0xFE ? UINT64_MAX - 4095 : (uint64_t)(page & 63) << 12;
}

static size_t take_size(input *in)
{
    uint8_t size = take8(in);
    return size & 0x80 ? (size_t)(size & 0x7F) << 8 : size;
}

static void check_fault(const vms_fault *fault, size_t len)
{
    CHECK(fault->reason != VMS_REASON_NONE && fault->done <= len);
}

static void access_memory(world *w, input *in, uint8_t what)
{
    uint8_t buf[0x8000];
    uint32_t pasid = what & 8 ? 5 : VMS_NO_PASID, flags = what & 16 ? VMS_DMA_WRITE : 0;
    uint64_t iova = take_page(in) + (what & 32 ? take16(in) & 0xFFF : 0), gpa, old;
    vms_fault fault = { 0 };

    memset(buf, 0x5A, sizeof buf);
    switch (what & 7) {
    case 0:
    case 1: {
        size_t len = take_size(in);
        int rc = vms_dma_rw(w->requester, pasid, iova, buf, len, flags, &fault);
        CHECK(rc == 0 || rc == 1 || rc == -EFAULT);
        if (rc < 0)
            check_fault(&fault, len);
        break;
    }
    case 2: {
        vms_sg sg[4];
        size_t len = 0, n = 1 + (take8(in) & 3);
        for (size_t i = 0; i < n; i++) {
            sg[i] = (vms_sg){ i ? take_page(in) : iova, take_size(in) & 0x1FFF };
            len += sg[i].len;
        }
        size_t given = what & 64 ? take_size(in) : len;
        int rc = vms_dma_sg(w->requester, pasid, sg, n, buf, given, flags, &fault);
        CHECK(rc == 0 || rc == 1 || rc == -EFAULT || rc == -EINVAL);
        if (rc == -EFAULT)
            check_fault(&fault, len);
        break;
    }
    case 3: {
        int rc = vms_dma_atomic(w->requester, pasid, iova, take8(in) % 4, what & 64 ? 4 : 8, 1, 2, &old, &fault);
        CHECK(rc == 0 || rc == 1 || rc == -EFAULT || rc == -EINVAL);
        break;
    }
    case 4: {
        uint32_t access = what & 64 ? VMS_PROT_WRITE : VMS_PROT_READ;
        int rc = vms_dma_translate(w->requester, VMS_NO_PASID, &iova, 1, access, &gpa, &fault);
        CHECK(rc == 0 || rc == 1 || rc == -EFAULT);
        break;
    }
    default: {
        unsigned n = take8(in) % PINS;
        if (w->pin[n].pin) {
            for (size_t i = 0; i < w->pin[n].len; i += 512)
                w->pin[n].ptr[i] = (uint8_t)(w->pin[n].ptr[i] + 1);
            vms_dma_unpin(w->pin[n].pin);
            w->pin[n].pin = NULL;
            break;
        }
        w->pin[n].len = take_size(in);
        void *ptr;
        int rc = vms_dma_pin(w->requester, pasid, iova, w->pin[n].len, VMS_DMA_WRITE, &ptr, &w->pin[n].pin, &fault);
        CHECK(rc == 0 || rc == 1 || rc == -EFAULT || rc == -EINVAL);
        if (rc < 0)
            w->pin[n].pin = NULL;
        w->pin[n].ptr = ptr;
    }
    }
}

static void change_memory(world *w, input *in, uint8_t what)
{
    static uint64_t bits[64];
    uint64_t gpa = take_page(in), size = (uint64_t)(take8(in) & 15) << 12, removed;
    uint32_t file = take8(in);

    switch (what & 7) {
    case 0 ... 2: {
        int rc = vms_memory_map(w->memory, gpa, size, what & 8 ? 3 : 1 + (what >> 4 & 3), file & 8 ? -1 : fds[file % FILES],
                                what & 64 ? take_page(in) : (uint64_t)(file >> 4 & 7) << 12);
        CHECK(rc == 0 || rc == -EINVAL || rc == -EEXIST || rc == -ENOSPC || rc == -EACCES || rc == -ENOMEM);
        break;
    }
    case 3:
        vms_memory_unmap(w->memory, gpa, size, &removed);
        break;
    case 4: /* a client that takes its memory away, or gives it back */
        CHECK(ftruncate(fds[file % FILES], what & 8 ? FILE_SIZE : (off_t)(size / 2)) == 0);
        break;
    case 5: {
        vms_range range = { gpa, gpa + size - 1 };
        if (what & 8)
            vms_dirty_stop(w->memory);
        else
            vms_dirty_start(w->memory, &range, what & 16 ? 1 : 0);
        break;
    }
    case 6:
        vms_dirty_report(w->memory, gpa, size, what & 8 ? 8192 : 4096, bits, what & 16 ? 1 : 64);
        break;
    default:
        if (what & 8)
            vms_memory_unmap_all(w->memory, &removed);
        else
            vms_requester_enable(w->requester, what >> 4 & 3);
    }
}

/* Live mappings do not touch bytes that they do not have, and add up to the totals; so does what has ended. */
static void check_ledger(vms_ledger *ledger)
{
    static vms_use uses[256];
    vms_ledger_totals totals;
    uint64_t id = 0, number = 0, live = 0, bytes = 0, ended = 0, counted = 0;
    size_t n;

    vms_ledger_totals_get(ledger, &totals);
    while ((n = vms_ledger_live(ledger, id, uses, 256))) {
        for (size_t i = 0; i < n; i++) {
            CHECK(uses[i].id > id && uses[i].last >= uses[i].start && uses[i].prot && uses[i].prot < 4 && !uses[i].ended);
            CHECK(uses[i].touched <= uses[i].last - uses[i].start + 1);
            CHECK((uses[i].touched == 0) == (uses[i].read + uses[i].written == 0) || uses[i].flags & VMS_USE_INEXACT);
            id = uses[i].id;
            live++;
            bytes += uses[i].last - uses[i].start + 1;
        }
    }
    while ((n = vms_ledger_ended(ledger, &number, uses, 256))) {
        for (size_t i = 0; i < n; i++)
            CHECK(uses[i].ended >= uses[i].mapped && uses[i].touched <= uses[i].last - uses[i].start + 1);
        ended += n;
    }
    for (int is_long = 0; is_long < 2; is_long++)
        for (int prot = 0; prot < 3; prot++)
            for (int used = 0; used < 4; used++)
                for (unsigned order = 0; order < VMS_ORDERS; order++)
                    counted += totals.uses[is_long][prot][used][order];
    CHECK(totals.live == live && totals.live_bytes == bytes && totals.mapped == live + totals.ended);
    CHECK(totals.ended == counted + totals.detached && (ended == totals.ended || ended == VMS_LEDGER_ENDED));
}

static void change_domain(world *w, input *in, uint8_t what)
{
    static uint64_t bits[64];
    vms_domain *domain = w->domain[what >> 3 & 1];
    uint64_t iova = take_page(in), size = (uint64_t)(take8(in) & 15) << 12;

    switch (what & 7) {
    case 0:
    case 1: {
        int rc = vms_domain_map(domain, iova, take_page(in), size, what & 32 ? 1 + (what >> 6) : 3);
        CHECK(rc == 0 || rc == -EINVAL || rc == -ERANGE || rc == -EEXIST || rc == -ENOSPC || rc == -ENOMEM);
        break;
    }
    case 2:
        vms_domain_unmap(domain, iova, size, 0);
        break;
    case 3:
        vms_domain_clear(domain, iova, iova + size - 1, 0);
        break;
    case 4: {
        unsigned which = take8(in) % 7;
        w->by_tables |= which == 2;
        if (which == 6) {
            vms_requester_block(w->requester);
            break;
        }
        vms_requester_attach(w->requester, what & 16 ? 5 : VMS_NO_PASID, which == 5 ? NULL : w->domain[which]);
        break;
    }
    case 5:
        if (what & 16)
            vms_domain_dirty_start(domain);
        else
            vms_domain_dirty_stop(domain);
        break;
    case 6:
        vms_domain_dirty_report(domain, iova, size, 4096, what & 16, bits, what & 32 ? 1 : 64);
        break;
    default:
        vms_domain_flush(domain, iova, iova + size, 0);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input in = { data, size };
    world w = { 0 };
    vms_dma_stats stats;
    uint64_t removed;

    uint8_t how = take8(&in);
    if (!files)
        create();
    for (unsigned i = 0; i < FILES; i++)
        CHECK(ftruncate(fds[i], FILE_SIZE) == 0);
    CHECK(vms_memory_create(files, 8, &w.memory) == 0 && vms_requester_create(w.memory, &w.requester) == 0);
    CHECK(vms_requester_enable(w.requester, 1) == 0 && vms_requester_check_stale(w.requester, 1) == 0);
    CHECK(vms_domain_create_paging(0x1000, 0, UINT64_MAX, UINT64_MAX, 16, NULL, &w.domain[0]) == 0);
    CHECK(vms_domain_create_paging(0x201000, 0, 0xFFFFFFF, 0xFFFFFFF, 64, NULL, &w.domain[1]) == 0);
    vms_table table = { VMS_TABLE_AMD_V1, 1, 0x1000, 21, 52, 0 };
    CHECK(vms_domain_create_table(w.memory, &table, how & 1 ? w.domain[1] : NULL, &w.domain[2]) == 0);
    CHECK(vms_domain_create(VMS_DOMAIN_IDENTITY, &w.domain[3]) == 0);
    CHECK(vms_domain_create(VMS_DOMAIN_BLOCKED, &w.domain[4]) == 0);
    CHECK(vms_memory_map(w.memory, 0, FILE_SIZE, 3, fds[0], 0) == 0);

    CHECK(vms_ledger_create(&w.ledger) == 0);
    if (how & 2)
        CHECK(vms_requester_follow(w.requester, w.ledger, 1, how & 4) == 0);
    for (int n = 0; n < 48 && in.left; n++) {
        uint8_t kind = take8(&in), what = take8(&in);
        if ((kind & 3) == 2)
            change_domain(&w, &in, what);
        else if ((kind & 3) == 3)
            change_memory(&w, &in, what);
        else
            access_memory(&w, &in, what);
    }
    check_ledger(w.ledger);
    if (how & 8)
        CHECK(vms_requester_follow(w.requester, NULL, 0, 0) == 0);
    if (how & 16) /* the requester's domains are still recorded */
        vms_ledger_destroy(w.ledger);
    vms_dma_stats_get(w.requester, &stats);
    CHECK(w.by_tables || stats.stale == 0);
    for (unsigned i = 0; i < PINS; i++)
        if (w.pin[i].pin)
            vms_dma_unpin(w.pin[i].pin);
    if (take8(&in) & 1)
        vms_memory_unmap_all(w.memory, &removed);
    vms_requester_destroy(w.requester);
    for (unsigned i = 0; i < 5; i++)
        vms_domain_destroy(w.domain[i]);
    vms_memory_destroy(w.memory);
    if (!(how & 16)) {
        check_ledger(w.ledger);
        vms_ledger_destroy(w.ledger);
    }
    CHECK(vms_files_mapped(files) == 0);
    return 0;
}
