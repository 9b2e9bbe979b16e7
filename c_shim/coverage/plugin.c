/*
 * A TCG plugin for QEMU (docs/devel/tcg-plugins.rst of QEMU, API version 7): which code of a guest's kernel runs.
 *
 * For each block that QEMU translates in the ranges of addresses of the file's header it appends a record to the
 * file, and gives the block a cell, a byte that becomes 1 when the block runs.  It also notes when the kernel boots,
 * and when it loads and frees a module, with a copy of struct module: an address belongs to the module that was there
 * when its block was translated.  vmodel/coverage/recorder.py writes the header, and reads the rest while QEMU runs.
 *
 * QEMU calls a plugin on each vCPU's thread, so the log has a lock; a cell is only ever set to 1.
 */
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "log.h"

/* ---- what QEMU offers ----------------------------------------------------------------------------------------- */

#define EXPORT __attribute__((visibility("default")))

typedef uint64_t plugin_id;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
struct qemu_plugin_register;

/* The begin of qemu_info_t, which is only passed on. */
struct plugin_info;

struct register_descriptor {
    struct qemu_plugin_register *handle;
    const char *name;
    const char *feature;
    bool is_readonly;
};

/* GLib's GArray and GByteArray: both begin so. */
struct array {
    uint8_t *data;
    unsigned int length;
};

enum { NO_REGISTERS, READS_REGISTERS };

typedef void vcpu_callback(unsigned int vcpu, void *user);

void qemu_plugin_register_vcpu_init_cb(plugin_id id, vcpu_callback *callback, void *user);
void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id id, void (*callback)(struct qemu_plugin_tb *, void *), void *user);
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *tb, vcpu_callback *callback, int flags, void *user);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *, vcpu_callback *callback, int flags, void *user);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *tb, size_t index);
uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *insn);
size_t qemu_plugin_insn_size(const struct qemu_plugin_insn *insn);
struct array *qemu_plugin_get_registers(void);
bool qemu_plugin_read_register(struct qemu_plugin_register *handle, struct array *into);
bool qemu_plugin_read_memory_vaddr(uint64_t address, struct array *into, size_t length);
struct array *g_byte_array_new(void);
struct array *g_byte_array_set_size(struct array *array, unsigned int length);
uint8_t *g_byte_array_free(struct array *array, int free_segment);
char *g_array_free(struct array *array, int free_segment);

EXPORT int qemu_plugin_version = 7;
EXPORT int qemu_plugin_install(plugin_id id, const struct plugin_info *info, int argc, char **argv);

/* ---- the log -------------------------------------------------------------------------------------------------- */

static struct coverage_header *header;
static uint8_t *cells;
static uint8_t *log_area;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
/* The register with a function's first argument.  Handles are those of a kind of CPU, the same for all vCPUs. */
static struct qemu_plugin_register *first_argument;

/* Appends a record with `length` bytes behind it.  False: the log is full, which the header says. */
static bool append(uint32_t kind, uint64_t address, uint32_t value, const void *data, size_t length)
{
    size_t size = sizeof(struct coverage_record) + (length + 15) / 16 * 16;
    uint64_t used = atomic_load_explicit(&header->used, memory_order_relaxed);
    if (size > header->log_size - used) {
        header->lost++;
        return false;
    }
    struct coverage_record record = {.address = address, .value = value, .kind = kind};
    memcpy(log_area + used, &record, sizeof record);
    if (length)
        memcpy(log_area + used + sizeof record, data, length);
    atomic_store_explicit(&header->used, used + size, memory_order_release);
    return true;
}

/* The cell of a new block; NULL: the file is full. */
static uint8_t *new_cell(uint64_t address, uint64_t size)
{
    uint8_t *cell = NULL;
    pthread_mutex_lock(&lock);
    if (header->cells_used >= header->cells)
        header->lost++;
    else if (append(COVERAGE_BLOCK, address, (uint32_t)size, NULL, 0))
        cell = &cells[header->cells_used++];
    pthread_mutex_unlock(&lock);
    return cell;
}

/* ---- callbacks ------------------------------------------------------------------------------------------------ */

static void ran(unsigned int vcpu, void *cell)
{
    (void)vcpu;
    /* A store costs more than a load in a cache line that other vCPUs use. */
    if (!__atomic_load_n((uint8_t *)cell, __ATOMIC_RELAXED))
        __atomic_store_n((uint8_t *)cell, 1, __ATOMIC_RELAXED);
}

static uint64_t argument(struct array *scratch)
{
    uint64_t value = 0;
    if (first_argument && qemu_plugin_read_register(first_argument, scratch) && scratch->length >= sizeof value)
        memcpy(&value, scratch->data, sizeof value);
    return value;
}

/* The kernel is at the begin of a function that the header names. */
static void watched(unsigned int vcpu, void *user)
{
    (void)vcpu;
    const struct coverage_watch *watch = user;
    struct array *scratch = g_byte_array_new();
    uint64_t module = watch->kind == COVERAGE_BOOT ? 0 : argument(scratch);
    const void *data = NULL;
    size_t length = 0;
    if (watch->kind == COVERAGE_LOAD) {
        g_byte_array_set_size(scratch, 0);
        if (qemu_plugin_read_memory_vaddr(module, scratch, header->module_size)) {
            data = scratch->data;
            length = header->module_size;
        }
    }
    pthread_mutex_lock(&lock);
    append(watch->kind, module, (uint32_t)length, data, length);
    pthread_mutex_unlock(&lock);
    g_byte_array_free(scratch, 1);
}

static bool wanted(uint64_t address)
{
    for (uint32_t i = 0; i < header->ranges; i++)
        if (address >= header->range[i].start && address < header->range[i].end)
            return true;
    return false;
}

static void translated(struct qemu_plugin_tb *tb, void *user)
{
    (void)user;
    size_t count = qemu_plugin_tb_n_insns(tb);
    uint64_t start = 0, end = 0;
    for (size_t i = 0; i < count; i++) {
        struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);
        uint64_t address = qemu_plugin_insn_vaddr(insn);
        for (uint32_t w = 0; w < header->watches; w++)
            if (address == header->watch[w].address)
                qemu_plugin_register_vcpu_insn_exec_cb(insn, watched, READS_REGISTERS, &header->watch[w]);
        if (i == 0)
            start = end = address;
        end += qemu_plugin_insn_size(insn);
    }
    if (count && wanted(start)) {
        uint8_t *cell = new_cell(start, end - start);
        if (cell)
            qemu_plugin_register_vcpu_tb_exec_cb(tb, ran, NO_REGISTERS, cell);
    }
}

static void vcpu_begins(unsigned int vcpu, void *user)
{
    (void)vcpu;
    (void)user;
    struct array *found = qemu_plugin_get_registers();
    const struct register_descriptor *registers = (const void *)found->data;
    for (unsigned int i = 0; i < found->length; i++)
        if (strcmp(registers[i].name, header->argument) == 0)
            __atomic_store_n(&first_argument, registers[i].handle, __ATOMIC_RELAXED);
    g_array_free(found, 1);
}

/* ---- the begin ------------------------------------------------------------------------------------------------ */

static int refuse(const char *path, const char *why)
{
    fprintf(stderr, "vmodel's coverage plugin: %s: %s\n", path, why);
    return 1;
}

/* Whether the sizes and counts of the header fit the file. */
static bool sound(const struct coverage_header *found, uint64_t size)
{
    return found->magic == COVERAGE_MAGIC && found->ranges <= COVERAGE_RANGES && found->watches <= COVERAGE_WATCHES &&
           found->cells <= size - sizeof *found && found->log_size == size - sizeof *found - found->cells &&
           found->cells % 16 == 0 && found->module_size > 0 && found->module_size <= COVERAGE_LARGEST_MODULE &&
           memchr(found->argument, 0, sizeof found->argument);
}

int qemu_plugin_install(plugin_id id, const struct plugin_info *info, int argc, char **argv)
{
    (void)info;
    const char *path = argc == 1 && strncmp(argv[0], "log=", 4) == 0 ? argv[0] + 4 : NULL;
    if (!path)
        return refuse("arguments", "must be log=FILE");
    int fd = open(path, O_RDWR | O_CLOEXEC);
    struct stat status;
    if (fd < 0 || fstat(fd, &status) < 0)
        return refuse(path, "cannot be opened");
    if ((size_t)status.st_size <= sizeof *header) {
        close(fd);
        return refuse(path, "is no log of coverage");
    }
    void *map = mmap(NULL, (size_t)status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (map == MAP_FAILED)
        return refuse(path, "cannot be mapped");
    header = map;
    if (!sound(header, (uint64_t)status.st_size))
        return refuse(path, "is no log of coverage");
    cells = (uint8_t *)map + sizeof *header;
    log_area = cells + header->cells;
    qemu_plugin_register_vcpu_init_cb(id, vcpu_begins, NULL);
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated, NULL);
    __atomic_store_n(&header->loaded, 1, __ATOMIC_RELEASE);
    return 0;
}
