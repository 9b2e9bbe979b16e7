/* SPDX-License-Identifier: MIT
 *
 * vmshim: the hot part of vmodel, in C11.  This header is its whole public API: read it first.
 *
 * C owns bytes and addresses, Python owns meaning:
 *
 *   files     pieces of client files (guest RAM), mapped once each, shared by all functions of a server
 *   memory    one function's DMA windows: GPA -> pointer into such a file (or "ask the client")
 *   domain    IOVA -> GPA: mappings, or tables that a guest keeps in its memory
 *   requester a source of DMA: an IOTLB, a domain (one for each PASID), copies, dirty marks, faults
 *   ledger    what is mapped for requesters, and what they do with it
 *   function  regions (BARs, ROM, config space): backing store and who answers each byte
 *   channel   one vfio-user connection: framing, fds, replies, exits
 *   store     blocks in memory or in a file
 *   workers   threads for I/O that may block
 *   nvme      the hot loop of an NVMe controller: plain reads and writes between guest memory and stores
 *   viommu    the hot loop of virtio-iommu: plain MAP and UNMAP requests
 *
 * Rules.  Every function returns 0 or -errno (those that say so return a count); results leave
 * through trailing pointers.  Objects come in create/destroy pairs.  The library does its own locking, has
 * no global state but the process's SIGBUS disposition (see files.c) and its AIO context (see eventfd.c), and no
 * callbacks: what it cannot decide leaves vms_enter() as an exit, as with KVM_RUN.  All lengths and offsets from
 * outside are checked here before use.
 *
 * An object lives until it is destroyed and nothing made from it is left: a requester, a channel or a pin keeps
 * its memory, memory keeps its files, a channel its function.  So the order of destruction does not matter.
 *
 * Section names in comments (for example "DMA_MAP") are those of QEMU's docs/interop/vfio-user.rst.
 * The part between the CDEF markers is read by cffi as well: plain declarations only.
 */
#ifndef VMSHIM_H
#define VMSHIM_H

#include <stddef.h>
#include <stdint.h>

/* CDEF-BEGIN */

/* ---- files ------------------------------------------------------------------------------- */

typedef struct vms_files vms_files;
int vms_files_create(vms_files **out);
void vms_files_destroy(vms_files *files);
/* How many mappings of client files are alive; for tests that look for leaks. */
size_t vms_files_mapped(vms_files *files);

/* ---- memory: DMA windows ----------------------------------------------------------------- */

#define VMS_PROT_READ 1u
#define VMS_PROT_WRITE 2u
#define VMS_PROT_NONE 4u /* of a mapping, alone: it exists, and allows no access */
/* Of a mapping, beside READ and WRITE: kept with it and listed, and of no effect on accesses here.  Caches of a CPU are
 * Python's matter. */
#define VMS_MAP_NO_CACHE 8u /* made without IOMMU_CACHE */
#define VMS_MAP_SNOOP 16u   /* the entry forces requests to snoop */

typedef struct vms_memory vms_memory;
typedef struct vms_window {
    uint64_t start, last; /* GPA, inclusive */
    uint64_t offset;      /* in the file; 0 without one */
    uint32_t prot;        /* VMS_PROT_* */
    int32_t has_file;     /* 0: reached by DMA_READ/DMA_WRITE messages only */
} vms_window;

int vms_memory_create(vms_files *files, uint32_t max_windows, vms_memory **out);
void vms_memory_destroy(vms_memory *memory);
/* Limits of its windows: mappings of files, and bytes of the process's address space.  The defaults: */
#define VMS_MAX_MAPPINGS 512u
#define VMS_MAX_BYTES 0x10000000000u /* 1 TiB */
int vms_memory_limit(vms_memory *memory, uint32_t max_mappings, uint64_t max_bytes);
/* DMA_MAP.  fd -1: no file.  The fd stays the caller's.  EINVAL: zero size, wrap, not 4 KiB aligned,
 * no prot, past the end of the file, not a regular file; EEXIST: overlap; ENOSPC: too many windows, mappings or bytes;
 * EACCES: the fd does not allow what prot asks; EOPNOTSUPP: the file is not on a file system of the kernel's memory or
 * of a disk, see backing.c. */
int vms_memory_map(vms_memory *memory, uint64_t gpa, uint64_t size, uint32_t prot, int fd,
                   uint64_t offset);
/* DMA_UNMAP.  Removes all windows inside [gpa, gpa+size); EINVAL when the range cuts one (nothing is
 * removed then).  No window at all is success.  Returns only when no copy uses them any more. */
int vms_memory_unmap(vms_memory *memory, uint64_t gpa, uint64_t size, uint64_t *removed);
int vms_memory_unmap_all(vms_memory *memory, uint64_t *removed);
size_t vms_memory_count(vms_memory *memory);
/* Copies up to `room` windows in ascending order, beginning at the first whose last >= gpa; returns
 * how many. */
size_t vms_memory_list(vms_memory *memory, uint64_t gpa, vms_window *out, size_t room);

typedef struct vms_range {
    uint64_t start, last;
} vms_range;
/* DMA logging at 4 KiB granularity (DMA_LOGGING_*).  n == 0: everything.  EBUSY: already on;
 * EINVAL: ranges that overlap or run backwards. */
int vms_dirty_start(vms_memory *memory, const vms_range *ranges, size_t n);
int vms_dirty_stop(vms_memory *memory);
/* Read and clear.  One bit per page_size (a power of two >= 4096) from gpa on, `words` uint64_t long.
 * When the log has overflowed (no memory, or writes to more than 2 TiB since the last report) all bits are set in this
 * report and in the following ones, until the log is stopped.
 * EINVAL: logging is off, bad page size, alignment, wrap, or too few words. */
int vms_dirty_report(vms_memory *memory, uint64_t gpa, uint64_t size, uint64_t page_size,
                     uint64_t *bitmap, size_t words);

/* ---- faults ------------------------------------------------------------------------------- */

#define VMS_NO_PASID 0xFFFFFFFFu
#define VMS_DMA_WRITE 1u /* from buf to memory; else from memory to buf */

enum vms_reason {
    VMS_REASON_NONE = 0,
    VMS_REASON_BUS_MASTER_OFF, /* unsupported request: Command.BusMaster is clear */
    VMS_REASON_NO_WINDOW,      /* no memory at this GPA */
    VMS_REASON_PERMISSION,     /* window or mapping forbids it */
    VMS_REASON_TRUNCATED,      /* the file behind the window has shrunk */
    VMS_REASON_WRAP,           /* iova + len passes 2**64 */
    VMS_REASON_UNALIGNED,      /* atomics only */
    VMS_REASON_NO_FILE,        /* not a fault: [gpa, gpa+len) needs DMA_READ/DMA_WRITE messages */
    /* from here on: the IOMMU's */
    VMS_REASON_BLOCKED,        /* the domain blocks all accesses */
    VMS_REASON_PASID,          /* no domain for this PASID */
    VMS_REASON_NOT_MAPPED,     /* no mapping, or an entry that is not present */
    VMS_REASON_INPUT_WIDTH,    /* the IOVA is beyond what the domain can translate */
    VMS_REASON_OUTPUT_WIDTH,   /* an entry points beyond the width of physical addresses */
    VMS_REASON_RESERVED_BITS,  /* an entry has bits set that must be 0, or a level that cannot be */
    VMS_REASON_TABLE_ACCESS,   /* a table is in no readable memory, or its flags cannot be set */
    VMS_REASON_TABLE_CHANGING, /* an entry changed each time its flags were to be set */
    VMS_REASON_ACCESS_FLAG,    /* Arm: AF is clear, and hardware does not set it */
};

typedef struct vms_fault {
    uint32_t reason; /* enum vms_reason */
    uint32_t pasid;
    uint64_t iova; /* where it stopped */
    uint64_t gpa;  /* the IOVA's translation, if known; nested: the address that stage 2 refused */
    uint64_t len;  /* NO_FILE: how many bytes from there the window still covers (capped to the rest) */
    uint64_t done; /* bytes moved before that */
    uint32_t access; /* VMS_PROT_* that was asked for */
    uint32_t level;  /* of the table with the offending entry: 1 has entries of 4 KiB; 0: not a table's fault */
    uint32_t stage;  /* 1 or 2 where tables are nested, else 0 */
} vms_fault;

/* ---- domain: IOVA -> GPA -------------------------------------------------------------------- */

enum vms_domain_kind { VMS_DOMAIN_IDENTITY, VMS_DOMAIN_BLOCKED, VMS_DOMAIN_PAGING, VMS_DOMAIN_TABLE };

enum vms_table_format {
    VMS_TABLE_VTD_SECOND, /* VT-d second-stage, 3-5 levels */
    VMS_TABLE_X86,        /* x86-64, 4-5 levels: VT-d first-stage, AMD v2, SVA */
    VMS_TABLE_AMD_V1,     /* AMD-Vi host tables, 1-6 levels */
    VMS_TABLE_ARM_S1,     /* VMSAv8-64 stage 1, 4 KiB granule, 1-4 levels, TTBR0 */
    VMS_TABLE_ARM_S2,     /* the same, stage 2; the top table may be 16 in a row */
    VMS_TABLE_RISCV_S1,   /* Sv39, Sv48, Sv57 by 3-5 levels */
    VMS_TABLE_RISCV_S2,   /* Sv39x4, Sv48x4, Sv57x4; the top table is 4 in a row */
};
#define VMS_TABLE_SET_ACCESSED 1u /* the walk sets the accessed flag (x86 does in any case); Arm: HA */
#define VMS_TABLE_SET_DIRTY 2u    /* and the dirty flag on writes; Arm: HD */
#define VMS_TABLE_SUPERVISOR 4u   /* accesses are privileged: x86 U/S, RISC-V U, Arm AP[1] and APTable[0] do not matter */
#define VMS_TABLE_2M 8u           /* pages of that size are allowed (VT-d); else their bit is reserved */
#define VMS_TABLE_1G 16u
#define VMS_TABLE_SNOOP 32u       /* VT-d SNP (bit 11) is allowed; else reserved */
#define VMS_TABLE_PBMT 64u        /* RISC-V memory types (bits 62:61) are allowed; else reserved */

typedef struct vms_table {
    uint32_t format; /* enum vms_table_format */
    uint32_t levels;
    uint64_t root;        /* of the top table; 4 KiB aligned.  With a parent domain it is an address of that domain */
    uint32_t input_bits;  /* IOVAs of more bits fault; x86, RISC-V S1: canonical addresses of that width */
    uint32_t output_bits; /* width of addresses in entries */
    uint32_t flags;       /* VMS_TABLE_* */
} vms_table;

typedef struct vms_mapping {
    uint64_t start, last; /* IOVA, inclusive */
    uint64_t gpa;         /* of start */
    uint32_t prot;        /* VMS_PROT_*; in a list VMS_MAP_*, too */
    uint32_t level;       /* a walk: of the entry; else 0 */
} vms_mapping;

/* Bytes of memory that the mappings of several domains may take together. */
typedef struct vms_budget vms_budget;
int vms_budget_create(uint64_t limit, vms_budget **out);
/* Its memory is freed with the last domain that uses it. */
void vms_budget_destroy(vms_budget *budget);
uint64_t vms_budget_taken(vms_budget *budget);

typedef struct vms_domain vms_domain;
/* VMS_DOMAIN_IDENTITY or VMS_DOMAIN_BLOCKED. */
int vms_domain_create(uint32_t kind, vms_domain **out);
/* Keeps its mappings here.  page_sizes: a bit for each, all >= 4096; IOVAs in [first, last]; GPAs up to
 * last_gpa; at most max_mappings, in memory that is taken from `budget` (NULL: without a limit). */
int vms_domain_create_paging(uint64_t page_sizes, uint64_t first, uint64_t last, uint64_t last_gpa,
                             uint64_t max_mappings, vms_budget *budget, vms_domain **out);
/* Walks tables in `memory`, with `parent` (paging, or tables without a parent; NULL: none) as stage 2. */
int vms_domain_create_table(vms_memory *memory, const vms_table *table, vms_domain *parent, vms_domain **out);
void vms_domain_destroy(vms_domain *domain);
/* EINVAL: not paging, zero size, no prot, not aligned to the smallest page; ERANGE: outside [first, last], beyond
 * last_gpa, wraps; EEXIST: overlap; ENOSPC: too many; ENOMEM: the budget or the system has no memory.  Nothing has
 * changed then. */
int vms_domain_map(vms_domain *domain, uint64_t iova, uint64_t gpa, uint64_t size, uint32_t prot);
/* Removes mappings from iova on, in whole pages (each the largest that alignment and the page sizes allow), until at
 * least `size` bytes are gone or there is no mapping: nothing if iova is inside of a page.  Returns how many times 4 KiB are gone, or,
 * when nothing is, -errno.  EINVAL: alignment; ENOMEM, ENOSPC: no room for what is left of a mapping on both sides.
 * Without VMS_UNMAP_DEFER it returns when no IOTLB has the range any more and no access through it is in flight. */
#define VMS_UNMAP_DEFER 1u
int64_t vms_domain_unmap(vms_domain *domain, uint64_t iova, uint64_t size, uint32_t flags);
/* Removes all mappings in [first, last], holes or not, at once; flags and result as of vms_domain_unmap(), but for the
 * alignment: the ends may be anywhere outside of mappings.  ERANGE, and nothing is gone: one reaches out of it. */
int64_t vms_domain_clear(vms_domain *domain, uint64_t first, uint64_t last, uint32_t flags);
/* Invalidates [start, last] in all IOTLBs that cache this domain (or one nested in it); with VMS_FLUSH_KEEP_OWN not in
 * those that are a device's own TLB, see vms_requester_own_tlb(). */
#define VMS_FLUSH_KEEP_OWN 1u
int vms_domain_flush(vms_domain *domain, uint64_t start, uint64_t last, uint32_t flags);
/* Translates iova by mapping or tables, without IOTLBs.  access 0: any permission will do, and no flag is set.
 * EFAULT with *fault filled. */
int vms_domain_walk(vms_domain *domain, uint64_t iova, uint32_t access, vms_mapping *out, vms_fault *fault);
/* Paging: copies up to `room` mappings in ascending order, beginning at the first whose last >= iova. */
size_t vms_domain_list(vms_domain *domain, uint64_t iova, vms_mapping *out, size_t room);
/* Paging: how many mappings there are, and the bytes of memory that they take: at most 57 for each and 64 KiB for all,
 * whatever was mapped and unmapped in whatever order. */
size_t vms_domain_count(vms_domain *domain, uint64_t *bytes);
/* For tests: EIO if an invariant of the tree of mappings does not hold.  Visits every mapping. */
int vms_domain_check(vms_domain *domain);
/* As vms_dirty_*, by IOVA; keep: the log is not cleared. */
int vms_domain_dirty_start(vms_domain *domain);
int vms_domain_dirty_stop(vms_domain *domain);
int vms_domain_dirty_report(vms_domain *domain, uint64_t iova, uint64_t size, uint64_t page_size, int keep,
                            uint64_t *bitmap, size_t words);

/* ---- requester: DMA ---------------------------------------------------------------------- */

typedef struct vms_sg {
    uint64_t iova, len;
} vms_sg;

enum vms_atomic_op { VMS_ATOMIC_FETCH_ADD, VMS_ATOMIC_SWAP, VMS_ATOMIC_CAS };

typedef struct vms_requester vms_requester;
typedef struct vms_pin vms_pin;

int vms_requester_create(vms_memory *memory, vms_requester **out);
void vms_requester_destroy(vms_requester *requester);
/* Command.BusMaster; off at creation. */
int vms_requester_enable(vms_requester *requester, int on);
/* Accesses with this PASID (or VMS_NO_PASID) go through `domain` from now on; NULL: no translation without a PASID, a
 * fault with one.  Returns when no access goes through the old domain any more. */
int vms_requester_attach(vms_requester *requester, uint32_t pasid, vms_domain *domain);
/* Takes all domains away, those of PASIDs, too: each access is a fault until the next vms_requester_attach without a
 * PASID.  Needs no memory.  Returns when no access goes through a domain any more. */
int vms_requester_block(vms_requester *requester);
/* The IOTLB is a TLB of the device's own (PCIe ATS; off at creation): see VMS_FLUSH_KEEP_OWN. */
int vms_requester_own_tlb(vms_requester *requester, int on);
/* Invalidates [start, last] of the domain attached to this PASID (or VMS_NO_PASID), if any, in this IOTLB. */
int vms_requester_flush(vms_requester *requester, uint32_t pasid, uint64_t start, uint64_t last);
/* Moves len bytes.  0, or -EFAULT with *fault filled (reason, where, how much was done). */
int vms_dma_rw(vms_requester *requester, uint32_t pasid, uint64_t iova, void *buf, size_t len,
               uint32_t flags, vms_fault *fault);
/* The same over n pieces, one after the other in buf. fault->done counts over all pieces. */
int vms_dma_sg(vms_requester *requester, uint32_t pasid, const vms_sg *sg, size_t n, void *buf,
               size_t len, uint32_t flags, vms_fault *fault);
/* PCIe AtomicOp of size 4 or 8 (8 or 16 are not needed by any model); *old is the value before. */
int vms_dma_atomic(vms_requester *requester, uint32_t pasid, uint64_t iova, uint32_t op, uint32_t size,
                   uint64_t operand, uint64_t compare, uint64_t *old, vms_fault *fault);
/* A pointer to [iova, iova+len), which must be contiguous in one file.  The mapping stays valid until
 * unpin, even when the client unmaps the window or truncates the file (it then reads as zeros). */
int vms_dma_pin(vms_requester *requester, uint32_t pasid, uint64_t iova, size_t len, uint32_t flags,
                void **ptr, vms_pin **pin, vms_fault *fault);
void vms_dma_unpin(vms_pin *pin);

/* n translations, no bytes moved: gpa[i] for iova[i]. */
int vms_dma_translate(vms_requester *requester, uint32_t pasid, const uint64_t *iova, size_t n, uint32_t access,
                      uint64_t *gpa, vms_fault *fault);

typedef struct vms_dma_stats {
    uint64_t read_ops, read_bytes, write_ops, write_bytes, faults;
    uint64_t iotlb_hits, iotlb_misses;
    uint64_t stale; /* see vms_requester_check_stale() */
} vms_dma_stats;
void vms_dma_stats_get(vms_requester *requester, vms_dma_stats *out);

/* Uses of stale translations.  While this is on (off at creation), each access that an IOTLB entry serves is compared
 * with a walk that sets no flags, page by page, and the words that its domain was chosen by with memory.  Each
 * difference is counted (vms_dma_stats) and noted, as long as there is room for it; vms_dma_* that succeed return 1
 * instead of 0 as long as something is noted. */
int vms_requester_check_stale(vms_requester *requester, int on);

enum vms_stale_kind {
    VMS_STALE_ENTRY, /* an IOTLB entry led to GPA was, the domain leads to now */
    VMS_STALE_ROUTE, /* the domain was chosen by the word at GPA word, which was `was` then */
};

typedef struct vms_stale {
    uint64_t iova, word, was, now;
    uint32_t pasid, access, was_prot, now_prot;
    uint32_t kind;
    uint32_t reason; /* why the walk fails now, or the word cannot be read; VMS_REASON_NONE: neither */
} vms_stale;
/* Takes up to `room` notes, the oldest first. */
size_t vms_requester_stale(vms_requester *requester, vms_stale *out, size_t room);

#define VMS_WORDS 24u
typedef struct vms_word {
    uint64_t gpa, value;
} vms_word;
/* Records the words of `memory` by which this PASID's (or VMS_NO_PASID's) domain was chosen.  ENOENT: it has none. */
int vms_requester_chosen_by(vms_requester *requester, uint32_t pasid, vms_memory *memory, const vms_word *words,
                            size_t n);

/* ---- ledger: what is mapped for devices, and what they do with it ------------------------------- */

/* Of each mapping of the domains that the requesters which follow it are attached to: when it was mapped and unmapped,
 * and which of its bytes the device has read and written.  Each mapping is known when it is made where the domain keeps its
 * mappings itself, or where the requester is `notified`: its guest invalidates the IOTLB after it maps, too.  Else it is
 * known when it is used first.  Identity and blocked domains have none.  Times are CLOCK_MONOTONIC in ns.  Any thread.
 *
 * Bounds: VMS_LEDGER_LIVE mappings at a time, VMS_LEDGER_ENDED ended ones, the last; VMS_SET_SPANS spans of bytes for each
 * and direction; VMS_LEDGER_WALKS steps of a walk for one change.  What is beyond them is counted in the totals. */
#define VMS_LEDGER_LIVE 65536u
#define VMS_LEDGER_ENDED 4096u
#define VMS_LEDGER_INCIDENTS 256u
#define VMS_LEDGER_WALKS 65536u
#define VMS_SET_SPANS 32u

typedef struct vms_ledger vms_ledger;
int vms_ledger_create(vms_ledger **out);
/* Its memory is freed when no requester follows it any more. */
void vms_ledger_destroy(vms_ledger *ledger);
/* What the requester maps and does is recorded from now on; NULL: no longer.  `who` is a number of the caller's. */
int vms_requester_follow(vms_requester *requester, vms_ledger *ledger, uint32_t who, int notified);

#define VMS_USE_LEARNT 1u   /* known since its first use only */
#define VMS_USE_DETACHED 2u /* ended as its domain was detached, not unmapped */
#define VMS_USE_TWIN 4u     /* a page of it was in another live mapping, one of both writable */
#define VMS_USE_INEXACT 8u  /* more spans than there is room for: some bytes count as used that were not */
/* It lived for VMS_LONG_NS: so it is, most likely, a ring or the like, and no buffer of one transfer. */
#define VMS_USE_LONG 16u
#define VMS_USE_TOO_LARGE 32u /* used, but whole pages of it were not */
#define VMS_LONG_NS 1000000000u

typedef struct vms_use {
    uint64_t id;          /* of the mapping, ascending from 1 */
    uint64_t start, last; /* IOVA */
    uint64_t gpa;
    uint32_t prot, pasid; /* of the first attachment that has it */
    uint32_t who;         /* of the first requester that has it */
    uint32_t flags;       /* VMS_USE_* */
    uint64_t mapped, ended;        /* when; ended 0: live */
    uint64_t first_use, last_use;  /* when; 0: never */
    uint64_t released;               /* when vms_ledger_released() was called, unless it was used after that; 0: never */
    uint64_t read, written;        /* bytes, each counted as often as it was moved */
    uint64_t touched;              /* bytes, each counted once */
    uint64_t pointers;             /* kernel pointers in it when it was mapped */
    uint64_t exposed_pointers;     /* in bytes that the device never touched, when it ended (live: now) */
    uint64_t twin;                 /* TWIN: IOVA of the other one */
} vms_use;
/* Live mappings, ascending by id, beginning after `id`. */
size_t vms_ledger_live(vms_ledger *ledger, uint64_t id, vms_use *out, size_t room);
/* Mappings that have ended, the first n of those still known whose number is >= *number, which is advanced past them. */
size_t vms_ledger_ended(vms_ledger *ledger, uint64_t *number, vms_use *out, size_t room);
/* The spans of bytes that were read (written: 0) or written (1) in mapping `id`. */
size_t vms_ledger_spans(vms_ledger *ledger, uint64_t id, int written, vms_range *out, size_t room);
/* The driver released the device: what stays mapped, and unused, is marked. */
int vms_ledger_released(vms_ledger *ledger);

enum vms_incident_kind {
    VMS_INCIDENT_OFF,       /* the device is not to do DMA: bus mastering is off */
    VMS_INCIDENT_UNMAPPED,  /* no mapping; `use` has the last one that was there, id 0: none is known */
    VMS_INCIDENT_DIRECTION, /* a mapping that forbids it */
    VMS_INCIDENT_STALE,     /* served by a cached translation of what was unmapped or mapped otherwise */
    VMS_INCIDENT_OTHER,
};
#define VMS_INCIDENTS 5u
typedef struct vms_incident {
    uint64_t time, iova;
    uint32_t kind, access, pasid, who;
    vms_use use; /* the mapping that it met, live or ended */
} vms_incident;
/* Notes an access that was refused, or should have been.  ENOENT: nobody follows the requester. */
int vms_requester_incident(vms_requester *requester, uint32_t pasid, uint32_t kind, uint64_t iova, uint32_t access);
/* The first n of those still known whose number is >= *number, which is advanced past them. */
size_t vms_ledger_incidents(vms_ledger *ledger, uint64_t *number, vms_incident *out, size_t room);

#define VMS_ORDERS 21u /* size classes: up to 1 page, 2, 4, ... 2^20 and more */
typedef struct vms_ledger_totals {
    uint64_t mapped, mapped_bytes, ended, live, live_bytes, most_live;
    uint64_t learnt, detached;
    uint64_t unrecorded; /* mappings beyond VMS_LEDGER_LIVE, or without memory */
    uint64_t unwalked;   /* changes that took more than VMS_LEDGER_WALKS steps */
    uint64_t flushes;    /* invalidations of an IOTLB, or unmaps, in one domain */
    uint64_t reused;     /* mapped where another mapping had ended less than VMS_REUSE_NS before */
    uint64_t twins;
    uint64_t released;     /* calls */
    uint64_t incidents[5];      /* by kind */
    /* Of what has ended, but was not detached; the first index is 1 for those of VMS_USE_LONG: */
    uint64_t uses[2][3][4][21]; /* how many, by prot - 1, used (1: read, 2: written), size class */
    uint64_t bytes[2][3][21];   /* of those that were used, by prot - 1 and size class */
    uint64_t touched[2][3][21]; /* and what was touched of it */
    uint64_t too_large[2], too_large_bytes[2]; /* of VMS_USE_TOO_LARGE, and the bytes of those pages */
    uint64_t exposed_pointers[2]; /* in bytes never touched, of those that were used */
    uint64_t pointers;          /* of all, when they were mapped */
} vms_ledger_totals;
#define VMS_REUSE_NS 10000000u
void vms_ledger_totals_get(vms_ledger *ledger, vms_ledger_totals *out);

/* ---- function: regions -------------------------------------------------------------------- */

#define VMS_CONFIG 7u
#define VMS_REGIONS 9u /* BAR0-5, ROM, config space, VGA: VFIO_PCI_*_REGION_INDEX */

/* Who serves an access to a byte of a bank. */
#define VMS_EXIT_ON_READ 1u  /* Python answers reads */
#define VMS_EXIT_ON_WRITE 2u /* Python takes writes; the shim stores nothing */
#define VMS_EXIT_REFUSED 4u  /* of a tap: accesses that vms_region_refuses() exit as well, with the key 0 */

typedef struct vms_func vms_func;
int vms_func_create(vms_func **out);
void vms_func_destroy(vms_func *func);
/* Bytes that no area covers read as `fill` and ignore writes. writable 0: writes are EPERM. */
int vms_region_define(vms_func *func, uint32_t region, uint64_t size, uint8_t fill, int writable);
/* Off (initially on): the region claims no accesses, as with Command.MemorySpace or .IOSpace clear and in D3hot; reads
 * return all ones, writes are dropped. */
int vms_region_enable(vms_func *func, uint32_t region, int on);
/* Any thread: all reads (VMS_EXIT_ON_READ) or writes (VMS_EXIT_ON_WRITE) of the region exit, whatever the policy of
 * their bytes, those that are refused (VMS_EXIT_REFUSED); 0: none. */
int vms_region_tap(vms_func *func, uint32_t region, uint32_t exits);
#define VMS_REFUSED_OFF 1u  /* the region is off */
#define VMS_REFUSED_SIZE 2u /* a size or alignment that is not allowed there, see VMS_SIZE_* */
/* Whether and why (VMS_REFUSED_*, else 0) an access has no effect; each byte of a read is *fill then. */
int vms_region_refuses(vms_func *func, uint32_t region, uint64_t offset, size_t n, uint32_t *why, uint8_t *fill);
/* A bank of registers: `size` bytes of backing store at *backing with a policy for each byte (all bytes
 * read-only and plain at first).  The memory lives as long as the function.  EEXIST: overlap. */
int vms_area_bank(vms_func *func, uint32_t region, uint64_t start, uint64_t size, uint8_t **backing);
/* Plain RAM.  With mappable (start and size page-aligned) it lives in the region's memfd, at offset
 * `start`, see vms_region_fd(). */
int vms_area_ram(vms_func *func, uint32_t region, uint64_t start, uint64_t size, int mappable,
                 uint8_t **backing);
/* No backing store: each access exits. */
int vms_area_hook(vms_func *func, uint32_t region, uint64_t start, uint64_t size);
/* Which accesses that begin at a byte are allowed; others read as fill and write nothing.  Accesses of more
 * than 8 bytes (a client that copies a whole region) are always allowed. */
#define VMS_SIZE_1 1u
#define VMS_SIZE_2 2u
#define VMS_SIZE_4 4u
#define VMS_SIZE_8 8u
#define VMS_SIZE_ODD 16u   /* 3, 5, 6 or 7 bytes */
#define VMS_MISALIGNED 32u /* a power of two at an address that is no multiple of it */

/* Sets the policy of [start, start+n) in a bank; arrays of n.  Per byte: which bits a write stores, clears by
 * 1, sets by 1, which bits a read clears; exits (VMS_EXIT_ON_*); sizes (VMS_SIZE_*, VMS_MISALIGNED). */
typedef struct vms_policy {
    const uint8_t *store, *w1c, *w1s, *rc, *exits, *sizes;
} vms_policy;
int vms_bank_policy(vms_func *func, uint32_t region, uint64_t start, size_t n, const vms_policy *policy);
/* The region's memfd with its mappable areas; ENOENT without one.  Stays the function's. */
int vms_region_fd(vms_func *func, uint32_t region, int *fd);
/* Applies the plain policy to an access, as the shim does for those it serves itself; Python uses it for
 * accesses that cover hooked and plain bytes. Ignores exits. */
int vms_region_read(vms_func *func, uint32_t region, uint64_t offset, uint8_t *buf, size_t n);
int vms_region_write(vms_func *func, uint32_t region, uint64_t offset, const uint8_t *buf, size_t n);

typedef struct vms_func_stats {
    uint64_t messages;              /* whole messages received */
    uint64_t reads, writes;         /* region accesses, MULTI entries counted singly */
    uint64_t served;                /* of these: answered without Python */
    uint64_t exits;                 /* returns of vms_run() */
    uint64_t rejected;              /* error replies, and posted commands dropped as wrong */
} vms_func_stats;
void vms_func_stats_get(vms_func *func, vms_func_stats *out);

/* ---- channel ------------------------------------------------------------------------------ */

enum vms_exit_reason {
    VMS_EXIT_READ = 1,  /* a read; put the value in run->value (count <= 8) or the data in run->data */
    VMS_EXIT_WRITE,     /* a write that the client waits for */
    VMS_EXIT_POSTED,    /* run->n_accesses posted writes in run->accesses, in order, each <= 8 bytes */
    VMS_EXIT_COMMAND,   /* any other command: run->data, run->len, run->fds; answer with vms_reply() */
    VMS_EXIT_REPLY,     /* a reply to a command of ours (DMA_READ, DMA_WRITE); run->id, run->error */
    VMS_EXIT_TIMEOUT,   /* the deadline has passed */
    VMS_EXIT_WAKE,      /* vms_wake() was called */
    VMS_EXIT_EVENT,     /* a watched eventfd fired: run->id is its cookie */
    VMS_EXIT_CLOSED,    /* the peer is gone, or broke the protocol beyond recovery (run->error) */
};

typedef struct vms_access {
    uint64_t offset, value; /* value: little-endian, zero-extended */
    uint64_t key;           /* vms_key() of the access; 0: it is perhaps refused */
    uint32_t region, count;
} vms_access;

#define VMS_BATCH 256u

/* An access as one number, for one look-up; offsets of 2**56 and more have none (0), nor do counts over 15. */
uint64_t vms_key(uint32_t region, uint64_t offset, uint32_t count);

typedef struct vms_run {
    uint32_t reason;  /* enum vms_exit_reason */
    uint32_t posted;  /* COMMAND, WRITE: the client set No_reply */
    uint16_t id, command;
    int32_t error;    /* in: errno for the pending access; out: errno of a REPLY or of CLOSED; of a COMMAND: EMFILE, this
                         process had no room for its fds, of which none are in fds: refuse it */
    uint32_t region, count;
    uint64_t offset;
    uint64_t key;     /* READ, WRITE: vms_key() of the access, for one look-up; 0: it is perhaps refused */
    uint64_t value;   /* READ: to be filled; WRITE: what was written */
    uint8_t *data;    /* payload, valid until the next vms_run(); READ over 8 bytes: room for count */
    size_t len;
    const int *fds;   /* COMMAND: the callee's to close */
    size_t n_fds;
    size_t n_accesses;
    vms_access accesses[VMS_BATCH];
} vms_run;

typedef struct vms_chan vms_chan;
/* Takes ownership of the socket.  Before vms_chan_open() every message is a COMMAND exit (the handshake).  send_ms: a
 * client that does not receive a message within that time is closed with ETIMEDOUT. */
int vms_chan_create(vms_func *func, vms_memory *memory, int socket, uint32_t max_xfer,
                    uint32_t max_fds, uint32_t send_ms, vms_chan **out);
void vms_chan_destroy(vms_chan *chan);
/* The struct that vms_enter() fills; lives as long as the channel. */
vms_run *vms_chan_run(vms_chan *chan);
/* Handshake done.  peer_xfer: the client's max_data_xfer_size.  twin: our end of the twin socket, taken
 * over, or -1. */
int vms_chan_open(vms_chan *chan, uint32_t peer_xfer, int twin);
/* Completes the access that the last exit left pending (READ, WRITE), then serves the client until
 * Python is needed or CLOCK_MONOTONIC reaches deadline_ns (0: poll once; UINT64_MAX: never).  The reason, which
 * is positive, with the run struct filled. */
int vms_enter(vms_chan *chan, uint64_t deadline_ns);
/* Completes a pending READ or WRITE now, as vms_enter() would, and sends all replies that wait. */
int vms_complete(vms_chan *chan);
/* Sends a reply; error != 0: header only.  A client that is gone is no error here: vms_enter() will return CLOSED. */
int vms_reply(vms_chan *chan, uint16_t id, uint16_t command, uint32_t error, const void *payload,
              size_t len, const int *fds, size_t n_fds);
/* Sends a command of ours (on the twin socket where there is one). */
int vms_command(vms_chan *chan, uint16_t id, uint16_t command, const void *head, size_t head_len,
                const void *data, size_t len);
/* Any thread: makes the function's vms_enter() return with WAKE. */
int vms_wake(vms_func *func);
/* Any thread: ends the connection and every send in progress; vms_enter() returns CLOSED. */
int vms_chan_shutdown(vms_chan *chan);
/* vms_enter() also waits for this eventfd (borrowed).  ENOSPC: more than 64. */
int vms_watch(vms_func *func, int eventfd, uint16_t cookie);
int vms_unwatch(vms_func *func, int eventfd);
/* Any thread: adds 1 to a client's eventfd; never blocks, even if its counter is full.  EINVAL: it is no eventfd. */
int vms_signal(int eventfd);
/* Sleeps without a connection: until `listener` (or -1) is readable, a wake, a watch, or the deadline.
 * Returns an enum vms_exit_reason, COMMAND standing for the listener, or -errno. *cookie for EVENT. */
int vms_idle(vms_func *func, int listener, uint64_t deadline_ns, uint16_t *cookie);

/* ---- store: blocks ------------------------------------------------------------------------- */

typedef struct vms_store vms_store;
/* Zero-filled, allocated on first write.  One thread may use it at a time. */
int vms_store_create_memory(uint64_t size, vms_store **out);
/* `size` bytes of a file; the fd stays the caller's.  Any thread. */
int vms_store_create_file(int fd, uint64_t size, vms_store **out);
void vms_store_destroy(vms_store *store);
/* The bytes, NULL for a file; they live as long as the store. */
uint8_t *vms_store_memory(vms_store *store);

enum vms_store_op {
    VMS_STORE_READ,
    VMS_STORE_WRITE,
    VMS_STORE_COMPARE,       /* EBADMSG: the data differs from `expected` */
    VMS_STORE_COMPARE_WRITE, /* a write if the data equals `expected`, as one atomic step */
    VMS_STORE_ZERO,
    VMS_STORE_DISCARD,       /* zeros as well, and frees the space */
    VMS_STORE_VERIFY,        /* reads only to find errors */
    VMS_STORE_SYNC,          /* flushes all earlier writes to disk */
};

typedef struct vms_job {
    uint32_t op;   /* enum vms_store_op */
    uint32_t sync; /* its data, read or written, is on disk when the job is done */
    uint64_t offset, length;
    void *data;
    const void *expected;
    uint64_t cookie; /* the caller's */
    int32_t error;   /* out: errno of a job that workers have done */
} vms_job;
/* Runs a job now; may block.  EINVAL: outside the store, no data. */
int vms_store_run(vms_store *store, const vms_job *job);

typedef struct vms_workers vms_workers;
/* Up to `threads` threads, started as they are needed.  They wake `func` when something is done. */
int vms_workers_create(vms_func *func, uint32_t threads, vms_workers **out);
/* Waits for jobs that have begun. */
void vms_workers_destroy(vms_workers *workers);
/* The caller keeps the buffers, and must not free them before the job is collected. */
int vms_workers_submit(vms_workers *workers, vms_store *store, const vms_job *job);
/* Copies up to `room` jobs that are done; returns how many.  Call it after each wake-up: the next one comes only then. */
size_t vms_workers_collect(vms_workers *workers, vms_job *out, size_t room);
/* Revokes a job.  ENOENT: it has begun, or is done. */
int vms_workers_revoke(vms_workers *workers, uint64_t cookie);
/* Returns when no job is running any more. */
void vms_workers_settle(vms_workers *workers);

/* ---- nvme: the hot loop ----------------------------------------------------------------------- */

#define VMS_NVME_QUEUES 65u
#define VMS_NVME_NAMESPACES 256u

/* Rings, shared with Python; all of it belongs to the device's thread. */
typedef struct vms_nvme_sq {
    uint64_t iova;
    uint64_t shadow, event; /* shadow doorbell and EventIdx; shadow 0: none */
    uint32_t shadow_first;  /* the shadow's initial value; while unchanged, doorbells count */
    uint32_t shadow_used;   /* 1: the driver has changed it */
    uint32_t entries, head, tail;
    uint32_t cq;
} vms_nvme_sq;

typedef struct vms_nvme_cq {
    uint64_t iova;
    uint32_t entries, head, tail, phase;
    uint32_t reserved; /* entries reserved for commands at workers */
    uint32_t posted;   /* since Python last set it to 0 */
} vms_nvme_cq;

#define VMS_NVME_READ 1u  /* reads are plain */
#define VMS_NVME_WRITE 2u /* writes are plain */
#define VMS_NVME_SYNC 4u  /* each write is to be on disk when it is complete */

enum vms_nvme_stop {
    VMS_NVME_EMPTY, /* nothing is left */
    VMS_NVME_TURN,  /* `count` commands are done, or the limit of data per call is reached */
    VMS_NVME_FULL,  /* the completion queue has no room */
    VMS_NVME_BUSY,  /* the limit of data queued at workers is reached */
    VMS_NVME_OTHER, /* the next command is Python's: it is not plain, or failed and counts as not begun */
};

typedef struct vms_nvme_run {
    uint32_t stop;  /* enum vms_nvme_stop */
    uint32_t taken; /* entries of the submission queue; collect: commands */
    uint32_t deferred; /* of these: queued at workers */
    uint32_t sq;    /* collect, OTHER: the queue of `command` */
    uint64_t reads, writes, read_bytes, write_bytes; /* that are complete */
    uint64_t posted[2]; /* collect: completion queues that have new entries, a bit for each */
    uint8_t command[64];
} vms_nvme_run;

typedef struct vms_nvme vms_nvme;
/* workers NULL: commands that may block are left to Python. */
int vms_nvme_create(vms_requester *requester, vms_workers *workers, vms_nvme **out);
void vms_nvme_destroy(vms_nvme *nvme);
/* Rings of a queue; NULL: the number is too large.  They live as long as the controller. */
vms_nvme_sq *vms_nvme_sq_at(vms_nvme *nvme, uint32_t qid);
vms_nvme_cq *vms_nvme_cq_at(vms_nvme *nvme, uint32_t qid);
/* Page size (a power of two >= 4096) and largest transfer. */
int vms_nvme_set(vms_nvme *nvme, uint32_t page_size, uint64_t max_transfer);
/* Namespace nsid: `blocks` of 1 << shift bytes; flags VMS_NVME_*.  store NULL: nothing of it is plain. */
int vms_nvme_namespace(vms_nvme *nvme, uint32_t nsid, vms_store *store, uint32_t shift, uint64_t blocks,
                       uint32_t flags);
/* Carries out up to `count` plain commands of a queue and posts their completions, except those deferred to
 * workers.  Returns 1 instead of 0 as vms_dma_* do. */
int vms_nvme_run_queue(vms_nvme *nvme, uint32_t qid, uint32_t count, vms_nvme_run *run);
/* Completes commands that workers have done, until one has failed (OTHER). */
int vms_nvme_collect(vms_nvme *nvme, vms_nvme_run *run);
/* Revokes a command at the workers.  ENOENT: it is not there, or has begun. */
int vms_nvme_abort(vms_nvme *nvme, uint32_t qid, uint16_t cid);
/* Bytes of the commands at workers. */
uint64_t vms_nvme_held(const vms_nvme *nvme);
/* A reset: revokes commands at workers, waits for those that have begun and drops them.  All rings are empty. */
void vms_nvme_reset(vms_nvme *nvme);

/* ---- viommu: the hot loop --------------------------------------------------------------------- */

/* A split virtqueue; `descriptors`, `driver` and `device` are IOVAs. */
typedef struct vms_virtqueue {
    uint64_t descriptors, driver, device;
    uint32_t size, indirect;
    uint16_t next_avail, next_used;
} vms_virtqueue;

typedef struct vms_viommu_domain {
    uint32_t id, n_reserved;
    vms_domain *domain;
    const vms_range *reserved; /* not to be mapped */
} vms_viommu_domain;

/* Executes MAP and UNMAP requests of these domains (paging): those available at the start, at most one queue, up to one
 * that is not plain, which stays in the queue.  Returns how many, and advances *queue.  EFAULT: the used ring was
 * unmapped meanwhile. */
int vms_viommu_run(vms_requester *requester, vms_virtqueue *queue, const vms_viommu_domain *domains, size_t n);

/* CDEF-END */

#endif
