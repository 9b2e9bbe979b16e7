/* SPDX-License-Identifier: MIT
 * Walks of I/O page tables in guest memory.  A walk ends whatever an entry holds: each step goes to a lower level.
 *
 * Sources: Intel VT-d specification, chapters 3.6, 3.7 and 9; AMD I/O Virtualization Technology specification, 2.2.3;
 * Arm ARM, chapter D8 (VMSAv8-64); RISC-V privileged specification, Sv39 to Sv57, Sv39x4 to Sv57x4, Svnapot, Svpbmt.
 * tests/iommu/walker.py is the same, slow and plain: tests compare them. */
#include "domain.h"

#include <errno.h>

#define BIT(n) (UINT64_C(1) << (n))
#define MASK(hi, lo) ((UINT64_MAX >> (63 - (hi))) & (UINT64_MAX << (lo)))
#define TOP_LEVEL 6
/* How often a walk restarts when an entry has changed under it. */
#define TRIES 64

enum entry_kind { ABSENT, TABLE, LEAF, BAD_BITS, BAD_WIDTH };

/* A decoded entry. */
typedef struct entry {
    enum entry_kind kind;
    uint64_t address;
    unsigned bits;       /* LEAF: log2 of the page's size */
    unsigned level;      /* TABLE: of the next table */
    uint32_t prot;       /* what this entry allows */
    uint64_t accessed;   /* the entry with its accessed flag set; unchanged: nothing to do */
    uint64_t written;    /* LEAF: with its dirty flag set as well */
    int no_access_flag;  /* Arm: AF is clear and stays so */
} entry;

static uint64_t page_bits(unsigned level)
{
    return 12 + 9 * (level - 1);
}

static entry bad(enum entry_kind kind)
{
    return (entry){ .kind = kind };
}

/* VT-d 9.8 and 9.9: second-stage entries. */
static entry decode_vtd(const vms_table *t, unsigned level, uint64_t e)
{
    if (!(e & 3))
        return bad(ABSENT);
    int leaf = level == 1 || (e & BIT(7));
    if ((e & BIT(62)) || (t->output_bits < 52 && (e & MASK(51, t->output_bits))))
        return bad(BAD_BITS);
    if (leaf && level > 1) {
        uint32_t allowed = level == 2 ? VMS_TABLE_2M : level == 3 ? VMS_TABLE_1G : 0;
        if (!(t->flags & allowed) || (e & MASK(page_bits(level) - 1, 12)))
            return bad(BAD_BITS);
    }
    if ((e & BIT(11)) && !(leaf && (t->flags & VMS_TABLE_SNOOP)))
        return bad(BAD_BITS);
    entry out = { leaf ? LEAF : TABLE, e & MASK(51, 12), page_bits(level), level - 1, (uint32_t)(e & 3), e, e, 0 };
    if (t->flags & VMS_TABLE_SET_ACCESSED)
        out.accessed = e | BIT(8);
    out.written = out.accessed;
    if (leaf && (t->flags & VMS_TABLE_SET_DIRTY))
        out.written |= BIT(9);
    return out;
}

/* Intel SDM volume 3, 4.5; VT-d 9.7: first-stage entries. */
static entry decode_x86(const vms_table *t, unsigned level, uint64_t e)
{
    if (!(e & 1))
        return bad(ABSENT);
    int leaf = level == 1 || (e & BIT(7));
    if (t->output_bits < 52 && (e & MASK(51, t->output_bits)))
        return bad(BAD_BITS);
    uint64_t address = e & MASK(51, 12);
    if (leaf && level > 1) {
        if (level > 3 || (e & MASK(page_bits(level) - 1, 13)))
            return bad(BAD_BITS);
        address &= ~BIT(12); /* PAT */
    }
    uint32_t prot = e & BIT(1) ? VMS_PROT_READ | VMS_PROT_WRITE : VMS_PROT_READ;
    if (!(e & BIT(2)) && !(t->flags & VMS_TABLE_SUPERVISOR))
        prot = 0;
    entry out = { leaf ? LEAF : TABLE, address, page_bits(level), level - 1, prot, e | BIT(5), e | BIT(5), 0 };
    if (leaf)
        out.written |= BIT(6);
    return out;
}

/* AMD 2.2.3: entries say the next level themselves. */
static entry decode_amd(const vms_table *t, unsigned level, uint64_t e)
{
    if (!(e & 1))
        return bad(ABSENT);
    unsigned next = (e >> 9) & 7, bits = page_bits(level);
    uint64_t address = e & MASK(51, 12);
    int leaf = next == 0 || next == 7;
    if ((e & MASK(58, 52)) || (!leaf && (e & MASK(60, 59))))
        return bad(BAD_BITS);
    if (next == 7) { /* the lowest zero bit of the address gives the size */
        bits = (unsigned)__builtin_ctzll(~(e | 0xFFF)) + 1;
        if (bits <= page_bits(level) || bits >= page_bits(level + 1))
            return bad(BAD_BITS);
        address &= ~(BIT(bits) - 1);
    } else if (next == 0 ? (address & (BIT(bits) - 1)) != 0 : next >= level) {
        return bad(BAD_BITS);
    }
    if (t->output_bits < 52 && (address >> t->output_bits))
        return bad(BAD_BITS);
    uint32_t prot = (e & BIT(61) ? VMS_PROT_READ : 0) | (e & BIT(62) ? VMS_PROT_WRITE : 0);
    entry out = { leaf ? LEAF : TABLE, address, bits, next, prot, e, e, 0 };
    if (t->flags & VMS_TABLE_SET_ACCESSED)
        out.accessed = e | BIT(5);
    out.written = out.accessed;
    if (leaf && (t->flags & VMS_TABLE_SET_DIRTY))
        out.written |= BIT(6);
    return out;
}

/* Arm ARM D8.3: descriptors of the 4 KiB granule. */
static entry decode_arm(const vms_table *t, unsigned level, uint64_t e)
{
    int stage1 = t->format == VMS_TABLE_ARM_S1;
    int table = level > 1 && (e & 2);

    if (!(e & 1) || (level == 1 && !(e & 2)) || (level > 3 && !table))
        return bad(ABSENT);
    uint64_t address = e & MASK(47, table ? 12 : page_bits(level));
    if (t->output_bits < 48 && (address >> t->output_bits))
        return bad(BAD_WIDTH);
    entry out = { table ? TABLE : LEAF, address, page_bits(level), level - 1, VMS_PROT_READ | VMS_PROT_WRITE, e, e, 0 };
    if (table) {
        if (stage1 && (e & BIT(62))) /* APTable */
            out.prot = VMS_PROT_READ;
        if (stage1 && (e & BIT(61)) && !(t->flags & VMS_TABLE_SUPERVISOR))
            out.prot = 0;
        return out;
    }
    if (!(e & BIT(10))) {
        if (t->flags & VMS_TABLE_SET_ACCESSED)
            out.accessed = e | BIT(10);
        else
            out.no_access_flag = 1;
    }
    out.written = out.accessed;
    /* With hardware-managed dirty state an entry that has DBM is writable; its write permission says "dirty". */
    int managed = (t->flags & VMS_TABLE_SET_DIRTY) && (e & BIT(51));
    if (stage1) {
        if (managed)
            out.written &= ~BIT(7);
        else if (e & BIT(7))
            out.prot = VMS_PROT_READ;
        if (!(e & BIT(6)) && !(t->flags & VMS_TABLE_SUPERVISOR))
            out.prot = 0;
    } else {
        out.prot = (e & BIT(6) ? VMS_PROT_READ : 0) | (managed || (e & BIT(7)) ? VMS_PROT_WRITE : 0);
        if (managed)
            out.written |= BIT(7);
    }
    return out;
}

/* RISC-V privileged specification: the translation process of Sv32, as it is for wider entries; Svnapot, Svpbmt. */
static entry decode_riscv(const vms_table *t, unsigned level, uint64_t e)
{
    uint64_t address = (e & MASK(53, 10)) << 2;
    unsigned bits = page_bits(level);
    int leaf = (e & MASK(3, 1)) != 0;

    if (!(e & 1))
        return bad(ABSENT);
    if ((e & MASK(60, 54)) || (e & MASK(2, 1)) == BIT(2)) /* reserved; writable but not readable */
        return bad(BAD_BITS);
    if (!leaf && (level == 1 || (e & (MASK(63, 61) | MASK(7, 6) | BIT(4)))))
        return bad(BAD_BITS);
    if ((e & MASK(62, 61)) == MASK(62, 61) || ((e & MASK(62, 61)) && !(t->flags & VMS_TABLE_PBMT)))
        return bad(BAD_BITS);
    if (e & BIT(63)) { /* 16 entries of 4 KiB are one page; the low bits of the address say so */
        if (level > 1 || (address & MASK(15, 12)) != BIT(15))
            return bad(BAD_BITS);
        bits = 16;
        address &= ~MASK(15, 12);
    } else if (leaf && (address & (BIT(bits) - 1))) {
        return bad(BAD_BITS);
    }
    if (t->output_bits < 56 && (address >> t->output_bits))
        return bad(BAD_WIDTH);
    entry out = { leaf ? LEAF : TABLE, address, bits, level - 1, VMS_PROT_READ | VMS_PROT_WRITE, e, e, 0 };
    if (!leaf)
        return out;
    out.prot = (e & BIT(1) ? VMS_PROT_READ : 0) | (e & BIT(2) ? VMS_PROT_WRITE : 0);
    /* At stage 2 (G-stage) all accesses are a user's. */
    if (!(e & BIT(4)) && (t->format == VMS_TABLE_RISCV_S2 || !(t->flags & VMS_TABLE_SUPERVISOR)))
        out.prot = 0;
    if (!(e & BIT(6))) {
        if (t->flags & VMS_TABLE_SET_ACCESSED)
            out.accessed = e | BIT(6);
        else
            out.no_access_flag = 1;
    }
    out.written = out.accessed;
    if (t->flags & VMS_TABLE_SET_DIRTY)
        out.written |= BIT(7);
    else if (!(e & BIT(7)))
        out.prot &= ~(uint32_t)VMS_PROT_WRITE;
    return out;
}

static entry decode(const vms_table *t, unsigned level, uint64_t e)
{
    switch (t->format) {
    case VMS_TABLE_VTD_SECOND:
        return decode_vtd(t, level, e);
    case VMS_TABLE_X86:
        return decode_x86(t, level, e);
    case VMS_TABLE_AMD_V1:
        return decode_amd(t, level, e);
    case VMS_TABLE_RISCV_S1:
    case VMS_TABLE_RISCV_S2:
        return decode_riscv(t, level, e);
    default:
        return decode_arm(t, level, e);
    }
}

static int check(const vms_table *t)
{
    static const struct {
        uint8_t levels_min, levels_max, output_max, input_max, extra; /* extra: bits of the top table beyond 9 */
    } limits[] = {
        [VMS_TABLE_VTD_SECOND] = { 3, 5, 52, 57, 0 }, [VMS_TABLE_X86] = { 4, 5, 52, 57, 0 },
        [VMS_TABLE_AMD_V1] = { 1, 6, 52, 64, 0 },     [VMS_TABLE_ARM_S1] = { 1, 4, 48, 48, 0 },
        [VMS_TABLE_ARM_S2] = { 1, 4, 48, 48, 4 },     [VMS_TABLE_RISCV_S1] = { 3, 5, 56, 57, 0 },
        [VMS_TABLE_RISCV_S2] = { 3, 5, 56, 59, 2 },
    };
    if (t->format > VMS_TABLE_RISCV_S2)
        return -EINVAL;
    unsigned most = 12 + 9 * t->levels + limits[t->format].extra;
    if (most > limits[t->format].input_max)
        most = limits[t->format].input_max;
    if (t->levels < limits[t->format].levels_min || t->levels > limits[t->format].levels_max || (t->root & 0xFFF) ||
        t->input_bits <= page_bits(t->levels) || t->input_bits > most || t->output_bits < 32 ||
        t->output_bits > limits[t->format].output_max)
        return -EINVAL;
    /* x86, RISC-V: the width follows from the levels; the sign bit is translated as well. */
    if ((t->format == VMS_TABLE_X86 || t->format >= VMS_TABLE_RISCV_S1) && t->input_bits != most)
        return -EINVAL;
    /* RISC-V, Sv39x4: the top table has 16 KiB, and is aligned to that. */
    if (t->format == VMS_TABLE_RISCV_S2 && (t->root & 0x3FFF))
        return -EINVAL;
    return 0;
}

static int fits(const vms_table *t, uint64_t iova)
{
    if (t->format == VMS_TABLE_X86 || t->format == VMS_TABLE_RISCV_S1) { /* canonical */
        int64_t high = (int64_t)iova >> (t->input_bits - 1);
        return high == 0 || high == -1;
    }
    return t->input_bits >= 64 || !(iova >> t->input_bits);
}

static int refuse(const vms_domain *domain, vms_fault *fault, enum vms_reason reason, unsigned level)
{
    fault->reason = reason;
    fault->level = level;
    fault->stage = domain->parent ? 1 : 0;
    return -EFAULT;
}

/* Stage 2 refuses the access to `address`, by its entry of that level. */
static int refuse_second(vms_fault *fault, uint64_t address, unsigned level)
{
    fault->reason = VMS_REASON_PERMISSION;
    fault->level = level;
    fault->stage = 2;
    fault->gpa = address;
    return -EFAULT;
}

/* Translates an address of a nested domain by its parent. */
static int through_parent(vms_domain *domain, uint64_t address, uint32_t access, translation *out, vms_fault *fault)
{
    int rc = domain_translate(domain->parent, address, access, out, fault);
    if (rc < 0) {
        fault->stage = 2;
        fault->gpa = address;
    }
    return rc;
}

/* The GPA of the entry at `address`.  quiet: stage 2 sets no flags either. */
static int entry_at(vms_domain *domain, uint64_t address, uint32_t access, int quiet, uint64_t *gpa, vms_fault *fault)
{
    translation t;

    *gpa = address;
    if (!domain->parent)
        return 0;
    int rc = through_parent(domain, address, quiet ? 0 : access, &t, fault);
    if (rc < 0)
        return rc;
    if ((t.prot & access) != access)
        return refuse_second(fault, address, t.level);
    *gpa = t.gpa + (address - t.start);
    return 0;
}

/* Sets the flags of an entry that was used; -EAGAIN when it has changed since it was read. */
static int set_flags(vms_domain *domain, uint64_t address, uint64_t was, uint64_t becomes, unsigned level,
                     vms_fault *fault)
{
    uint64_t gpa;

    if (was == becomes)
        return 0;
    int rc = entry_at(domain, address, VMS_PROT_READ | VMS_PROT_WRITE, 0, &gpa, fault);
    if (rc < 0)
        return rc;
    rc = memory_cas64(domain->memory, gpa, was, becomes);
    if (rc == 0 && domain->parent && domain->parent->kind == VMS_DOMAIN_PAGING)
        dirty_mark(&domain->parent->dirty, address, address + 7);
    return rc == -EFAULT ? refuse(domain, fault, VMS_REASON_TABLE_ACCESS, level) : rc;
}

static int walk_once(vms_domain *domain, uint64_t iova, uint32_t access, translation *out, vms_fault *fault)
{
    const vms_table *t = &domain->table;
    struct {
        uint64_t address, was, becomes;
        unsigned level;
    } used[TOP_LEVEL];
    unsigned n = 0, level = t->levels;
    uint64_t table = t->root;
    uint32_t prot = VMS_PROT_READ | VMS_PROT_WRITE;
    entry e;

    for (;;) {
        uint64_t index = iova >> page_bits(level);
        /* Above the top table's bits there is only the sign extension (x86, RISC-V). */
        index &= level == t->levels ? MASK(t->input_bits - page_bits(level) - 1, 0) : 511;
        uint64_t address = table + 8 * index, gpa, raw;
        int rc = entry_at(domain, address, VMS_PROT_READ, !access, &gpa, fault);
        if (rc < 0)
            return rc;
        if (memory_load64(domain->memory, gpa, &raw) < 0)
            return refuse(domain, fault, VMS_REASON_TABLE_ACCESS, level);
        e = decode(t, level, raw);
        if (e.kind == ABSENT)
            return refuse(domain, fault, VMS_REASON_NOT_MAPPED, level);
        if (e.kind == BAD_BITS)
            return refuse(domain, fault, VMS_REASON_RESERVED_BITS, level);
        if (e.kind == BAD_WIDTH)
            return refuse(domain, fault, VMS_REASON_OUTPUT_WIDTH, level);
        used[n].address = address;
        used[n].was = raw;
        used[n].becomes = e.kind == LEAF && (access & VMS_PROT_WRITE) ? e.written : e.accessed;
        used[n++].level = level;
        prot &= e.prot;
        if (e.kind == LEAF)
            break;
        /* AMD: levels that an entry skips must have no index. */
        if (e.level < level - 1 && (iova & MASK(page_bits(level) - 1, page_bits(e.level + 1))))
            return refuse(domain, fault, VMS_REASON_NOT_MAPPED, level);
        level = e.level;
        table = e.address;
    }
    if (e.no_access_flag)
        return refuse(domain, fault, VMS_REASON_ACCESS_FLAG, level);
    if ((prot & access) != access || !prot)
        return refuse(domain, fault, VMS_REASON_PERMISSION, level);

    uint64_t start = iova & -BIT(e.bits);
    /* Without the dirty flag the first write must walk again, to set it. */
    uint64_t now = used[n - 1].becomes;
    uint32_t cached = !access || now == decode(t, level, now).written ? prot : prot & ~VMS_PROT_WRITE;
    *out = (translation){ .start = start, .last = start + (BIT(e.bits) - 1), .gpa = e.address, .prot = cached,
                          .level = level };
    if (domain->parent) {
        translation second;
        uint64_t address = e.address + (iova - start);
        int rc = through_parent(domain, address, access, &second, fault);
        if (rc < 0)
            return rc;
        /* The range that is contiguous in both stages. */
        uint64_t below = address - second.start, above = second.last - address;
        uint64_t low = iova - start < below ? iova - start : below;
        uint64_t high = out->last - iova < above ? out->last - iova : above;
        out->start = iova - low;
        out->last = iova + high;
        out->gpa = second.gpa + (address - low - second.start);
        out->prot &= second.prot;
        if (!out->prot) /* only if access is 0 */
            return refuse_second(fault, address, second.level);
        out->log = second.log;
        out->log_start = second.log_start + (address - low - second.start);
    }
    for (unsigned i = 0; access && i < n; i++) {
        int rc = set_flags(domain, used[i].address, used[i].was, used[i].becomes, used[i].level, fault);
        if (rc < 0)
            return rc;
    }
    return 0;
}

static int translate_by_tables(vms_domain *domain, uint64_t iova, uint32_t access, translation *out, vms_fault *fault)
{
    if (!fits(&domain->table, iova))
        return refuse(domain, fault, VMS_REASON_INPUT_WIDTH, 0);
    for (int i = 0; i < TRIES; i++) {
        int rc = walk_once(domain, iova, access, out, fault);
        if (rc != -EAGAIN)
            return rc;
    }
    return refuse(domain, fault, VMS_REASON_TABLE_CHANGING, 0);
}

int vms_domain_create_table(vms_memory *memory, const vms_table *table, vms_domain *parent, vms_domain **out)
{
    int rc = check(table);
    if (rc < 0)
        return rc;
    if (parent && parent->kind != VMS_DOMAIN_PAGING && (parent->kind != VMS_DOMAIN_TABLE || parent->parent))
        return -EINVAL;
    rc = domain_create(VMS_DOMAIN_TABLE, out);
    if (rc < 0)
        return rc;
    vms_domain *domain = *out;
    domain->translate = translate_by_tables;
    domain->memory = memory;
    memory_ref(memory);
    domain->table = *table;
    if (parent)
        domain_nest(domain, parent);
    return 0;
}
