/* The file that plugin.c and vmodel/coverage/recorder.py share: a header, then cells, then the log. */
#ifndef COVERAGE_LOG_H
#define COVERAGE_LOG_H

#include <stdatomic.h>
#include <stdint.h>

#define COVERAGE_MAGIC 0x31474f4c56434d56ULL /* "VMCVLOG1" */
#define COVERAGE_RANGES 4
#define COVERAGE_WATCHES 4
/* The most bytes of a struct module that are copied. */
#define COVERAGE_LARGEST_MODULE 65536

/* Kinds of records, and of functions that are watched. */
enum {
    COVERAGE_BLOCK = 1, /* a block of `value` bytes was translated; its cell is the number of blocks before it */
    COVERAGE_BOOT,      /* the kernel begins */
    COVERAGE_LOAD,      /* the module with this struct module is loaded; `value` bytes of it are behind the record */
    COVERAGE_READY,     /* its init function has returned, so the memory of its init code is freed */
    COVERAGE_FREE,      /* it is freed */
};

struct coverage_range {
    uint64_t start, end;
};

struct coverage_watch {
    uint64_t address;
    uint32_t kind;
    uint32_t reserved;
};

struct coverage_header {
    /* Written before QEMU starts. */
    uint64_t magic;
    uint64_t cells;    /* how many cells there are, a multiple of 16 */
    uint64_t log_size; /* bytes of the log */
    uint32_t module_size; /* bytes of a struct module */
    uint32_t ranges;
    uint32_t watches;
    uint32_t reserved;
    struct coverage_range range[COVERAGE_RANGES]; /* where blocks are recorded */
    struct coverage_watch watch[COVERAGE_WATCHES];
    char argument[16]; /* the name of the register with a function's first argument */
    /* Written by the plugin. */
    _Atomic uint64_t used; /* bytes of the log */
    uint64_t cells_used;
    uint64_t lost;    /* records for which there was no place */
    uint32_t loaded;  /* 1: QEMU has loaded the plugin */
    uint8_t pad[3884];
};

/* In the log; a record begins at a multiple of 16 bytes. */
struct coverage_record {
    uint64_t address;
    uint32_t value;
    uint32_t kind;
};

_Static_assert(sizeof(struct coverage_header) == 4096, "the cells begin at the second page");
_Static_assert(sizeof(struct coverage_record) == 16, "records are read by their size");

#endif
