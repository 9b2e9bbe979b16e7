/* SPDX-License-Identifier: MIT
 * Walks of page tables whose entries are the input's, in all formats, nested or not.
 *
 * A walk ends, its answer covers the address that was asked for, a second walk says the same, and what a DMA meets is
 * what the walk has said. */
#include "fuzz.h"

#define PAGES 8u
#define RAM (PAGES * 4096u)

static const vms_table formats[] = {
    { VMS_TABLE_VTD_SECOND, 3, 0, 39, 36, 0 },
    { VMS_TABLE_VTD_SECOND, 4, 0, 48, 46, VMS_TABLE_2M | VMS_TABLE_1G | VMS_TABLE_SNOOP | VMS_TABLE_SET_ACCESSED |
                                              VMS_TABLE_SET_DIRTY },
    { VMS_TABLE_VTD_SECOND, 5, 0, 57, 52, VMS_TABLE_2M },
    { VMS_TABLE_X86, 4, 0, 48, 46, 0 },
    { VMS_TABLE_X86, 5, 0, 57, 52, VMS_TABLE_SUPERVISOR },
    { VMS_TABLE_AMD_V1, 1, 0, 21, 52, 0 },
    { VMS_TABLE_AMD_V1, 3, 0, 39, 40, VMS_TABLE_SET_ACCESSED | VMS_TABLE_SET_DIRTY },
    { VMS_TABLE_AMD_V1, 6, 0, 64, 52, 0 },
    { VMS_TABLE_ARM_S1, 3, 0, 39, 40, VMS_TABLE_SET_ACCESSED | VMS_TABLE_SET_DIRTY },
    { VMS_TABLE_ARM_S1, 4, 0, 48, 48, VMS_TABLE_SUPERVISOR },
    { VMS_TABLE_ARM_S2, 3, 0, 43, 40, VMS_TABLE_SET_ACCESSED | VMS_TABLE_SET_DIRTY },
    { VMS_TABLE_ARM_S2, 4, 0, 48, 48, 0 },
    { VMS_TABLE_RISCV_S1, 3, 0, 39, 40, VMS_TABLE_SET_ACCESSED | VMS_TABLE_SET_DIRTY },
    { VMS_TABLE_RISCV_S1, 5, 0, 57, 56, VMS_TABLE_SUPERVISOR | VMS_TABLE_PBMT },
    { VMS_TABLE_RISCV_S2, 3, 0, 41, 56, VMS_TABLE_SET_ACCESSED | VMS_TABLE_SET_DIRTY },
    { VMS_TABLE_RISCV_S2, 4, 0, 50, 40, 0 },
};
#define FORMATS (sizeof formats / sizeof formats[0])

static guest g;

/* An index that is likely to be used: the first, the last, or that of one of the addresses below. */
static uint16_t take_index(input *in)
{
    uint16_t value = take16(in);
    return value & 0x8000 ? value & 511 : value & 0x4000 ? 511 - (value & 3) : value & 3;
}

static uint64_t take_iova(input *in)
{
    uint8_t kind = take8(in);
    uint64_t iova = kind & 0x80 ? take64(in) : 0;

    for (unsigned level = 0; level < 6; level++)
        if (kind >> level & 1)
            iova |= (uint64_t)take_index(in) << (12 + 9 * level);
    return iova | (kind & 0x40 ? 0xFF8 : 0);
}

/* What the entries of a VT-d second-stage table on the way to an address allow together (9.8), when all is well. */
static uint32_t vtd_prot(const vms_table *table, uint64_t iova)
{
    uint64_t at = table->root, entry;
    uint32_t prot = 3;

    for (unsigned level = table->levels; level; level--) {
        at += (iova >> (12 + 9 * (level - 1)) & 511) * 8;
        CHECK(at + 8 <= RAM);
        memcpy(&entry, g.ram + at, sizeof entry);
        prot &= entry & 3;
        if (level > 1 && entry & 1 << 7)
            break;
        at = entry & 0xFFFFFFFFFF000;
    }
    return prot;
}

/* Whatever the address is, it ends, and its answer is about that address.  Walks for nothing change nothing; others set
 * flags, which may be bits of another entry where a nested table and its parent's share memory. */
static void walk(vms_domain *domain, const vms_table *table, int nested, uint64_t iova, uint32_t access)
{
    vms_mapping quiet, again, used;
    vms_fault fault;
    uint64_t gpa;

    /* A DMA may have changed the tables. */
    CHECK(vms_requester_flush(g.requester, VMS_NO_PASID, 0, UINT64_MAX) == 0);
    memset(&quiet, 0, sizeof quiet);
    memset(&again, 0, sizeof again);
    int looked = vms_domain_walk(domain, iova, 0, &quiet, &fault);
    CHECK(vms_domain_walk(domain, iova, 0, &again, &fault) == looked && memcmp(&quiet, &again, sizeof quiet) == 0);
    if (looked == 0)
        CHECK(quiet.start <= iova && iova <= quiet.last && quiet.prot);
    int rc = vms_domain_walk(domain, iova, access, &used, &fault);
    if (rc == 0)
        CHECK(used.start <= iova && iova <= used.last && (used.prot & access) == access && used.prot);
    else
        CHECK(rc == -EFAULT && fault.reason != VMS_REASON_NONE && fault.stage <= 2 && fault.level <= 6);
    int dma = vms_dma_translate(g.requester, VMS_NO_PASID, &iova, 1, access, &gpa, &fault);
    if (nested)
        return;
    if (looked == 0 && table->format == VMS_TABLE_VTD_SECOND)
        CHECK(quiet.prot == vtd_prot(table, iova));
    CHECK((looked == 0 && (quiet.prot & access) == access) == (rc == 0) && rc == dma);
    if (rc == 0)
        CHECK(quiet.gpa + (iova - quiet.start) == gpa && used.gpa + (iova - used.start) == gpa);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input in = { data, size };
    vms_domain *domain, *parent = NULL;
    vms_fault fault;
    uint8_t bytes[64] = { 0 };

    if (!g.memory)
        guest_create(&g, RAM);
    memset(g.ram, 0, RAM);

    uint8_t choice = take8(&in), flags = take8(&in);
    vms_table table = formats[choice % FORMATS];
    table.flags ^= flags & 0x3F;
    table.root = table.format == VMS_TABLE_RISCV_S2 ? 0 : (uint64_t)(flags >> 6) * 4096;
    if (choice & 0x40) { /* whatever the caller thinks of */
        take_bytes(&in, &table, sizeof table);
    }
    if (choice & 0x80) {
        vms_table second = formats[take8(&in) % FORMATS];
        second.root = 4 * 4096;
        CHECK(vms_domain_create_table(g.memory, &second, NULL, &parent) == 0);
    }
    int rc = vms_domain_create_table(g.memory, &table, parent, &domain);
    if (rc < 0) {
        CHECK(rc == -EINVAL && (choice & 0x40));
        vms_domain_destroy(parent);
        return 0;
    }
    CHECK(vms_requester_attach(g.requester, VMS_NO_PASID, domain) == 0);

    /* Entries: where, how they point to another page, which bits they have besides. */
    for (unsigned n = take8(&in) & 63; n && in.left; n--) {
        uint8_t page = take8(&in), to = take8(&in);
        uint64_t low = take16(&in), entry = (uint64_t)(to % 12) << 12 | low;
        if (table.format >= VMS_TABLE_RISCV_S1) /* addresses begin at bit 10 */
            entry = (uint64_t)(to % 12) << 10 | (low & 0x3FF) | low >> 10 << 58;
        if (page & 0x80)
            entry = take64(&in);
        if (page & 0x40)
            entry |= (uint64_t)take8(&in) << 56 | (uint64_t)(to >> 6) << 61;
        memcpy(g.ram + page % PAGES * 4096 + take_index(&in) * 8u, &entry, sizeof entry);
    }
    for (int i = 0; i < 8 && in.left; i++) {
        uint64_t iova = take_iova(&in);
        uint8_t what = take8(&in);
        walk(domain, &table, parent != NULL, iova, what & 3);
        if (what & 4)
            vms_dma_rw(g.requester, VMS_NO_PASID, iova, bytes, 1 + (what >> 4) * 4u, what & 8 ? VMS_DMA_WRITE : 0, &fault);
    }
    CHECK(vms_requester_attach(g.requester, VMS_NO_PASID, NULL) == 0);
    vms_domain_destroy(domain);
    vms_domain_destroy(parent);
    return 0;
}
