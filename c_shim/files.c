/* SPDX-License-Identifier: MIT
 * Pieces of client files, mapped once each; and the SIGBUS handler for files that a client shrinks.
 *
 * A window maps the whole GiBs that it touches, as far as the file goes: windows side by side share a mapping, and so
 * do functions with one client, while a huge file costs no more address space than its windows.
 *
 * Touching a page past the end of a mapped file raises SIGBUS.  No check beforehand can exclude that, as the client
 * may truncate between check and use.  So the handler maps zero pages from that page to the mapping's end, and lowers
 * file->good; the copy continues, checks file->good afterwards and reports -EFAULT.  Neither a copy nor a zero-copy
 * view that Python holds can crash the process.  A mapping takes at most two of the kernel's areas (VMAs), however
 * often it is repaired: the kernel limits their number for the whole process.
 *
 * Signal dispositions belong to the whole process, hence the one piece of global state in this library: the table of
 * mappings that the handler may repair.  The handler takes no lock.  The thread that faults holds a reference, so its
 * entry does not change; an entry that changes while the handler reads it belongs to another mapping, as its version
 * shows.
 */
#define _GNU_SOURCE
#include "files.h"

#include "backing.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>

/* In all: two VMAs each leave a quarter of the kernel's 65,530 to the rest of the process. */
#define MAX_MAPPED 24576
#define GRANULE ((uint64_t)1 << 30)
#define BUCKETS 1024
#define PAGE ((size_t)4096)

struct vms_files {
    pthread_mutex_t lock;
    mapped_file *bucket[BUCKETS];
    size_t count;
    unsigned refs; /* its creator's, its memories' and its mappings' */
};

static mapped_file table[MAX_MAPPED];
static _Atomic int used; /* entries that have ever been taken */
static mapped_file *unused;
static pthread_mutex_t table_lock = PTHREAD_MUTEX_INITIALIZER;

/* ---- SIGBUS ---------------------------------------------------------------------------------- */

static struct sigaction previous;
static int installed;

static void lower(_Atomic uint64_t *limit, uint64_t to)
{
    uint64_t now = atomic_load(limit);

    while (to < now && !atomic_compare_exchange_weak(limit, &now, to))
        ;
}

/* VMAs in reserve: at the kernel's limit even an mmap() that needs no further VMA fails, so the handler unmaps a
 * spare. */
#define SPARE 64
static uint8_t *spare;
static _Atomic unsigned spent;

static int make_spare(void)
{
    spare = mmap(NULL, SPARE * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (spare == MAP_FAILED)
        return -errno;
    for (unsigned i = 0; i < SPARE; i += 2) /* pages with other protection than their neighbours are VMAs of their own */
        if (mprotect(spare + i * PAGE, PAGE, PROT_READ) < 0)
            return -errno;
    return 0;
}

static int give_up_spare(void)
{
    unsigned i = atomic_fetch_add(&spent, 1);
    return i < SPARE && munmap(spare + i * PAGE, PAGE) == 0;
}

static int put_zeros(mapped_file *file, uint8_t *base, uint64_t from, uint64_t size)
{
    int prot = PROT_READ | (atomic_load(&file->writable) ? PROT_WRITE : 0);

    return mmap(base + from, size, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) !=
           MAP_FAILED;
}

/* Repairs the mapping that faulted at `at`.  0: it is none of ours, or cannot be repaired. */
static int repair(const uint8_t *at, int poisoned)
{
    int n = atomic_load(&used);

    for (int i = 0; i < n; i++) {
        mapped_file *file = &table[i];
        unsigned version = atomic_load(&file->version);
        uint8_t *base = atomic_load(&file->base);
        uint64_t size = atomic_load(&file->size);
        if (version & 1 || at < base || (uint64_t)(at - base) >= size || atomic_load(&file->version) != version)
            continue;
        uint64_t from = (uint64_t)(at - base) & ~(atomic_load(&file->page) - 1);
        if (from >= atomic_load(&file->zeros))
            return !poisoned; /* another thread has repaired it; a fault in our own zeros is a memory error */
        lower(&file->good, atomic_load(&file->first) + from);
        if (put_zeros(file, base, from, size - from)) {
            lower(&file->zeros, from);
            return 1;
        }
        /* vm.overcommit_memory 2 refuses so much: try one page.  No VMA is left: replacing the whole mapping takes
         * none. */
        if (put_zeros(file, base, from, atomic_load(&file->page)))
            return 1;
        lower(&file->good, atomic_load(&file->first));
        while (!put_zeros(file, base, 0, size))
            if (!give_up_spare())
                return 0;
        lower(&file->zeros, 0);
        return 1;
    }
    return 0;
}

static void on_sigbus(int signal, siginfo_t *info, void *context)
{
    int saved = errno;
    /* Only a fault has an address; a signal from kill() has none. */
    int ours = (info->si_code == BUS_ADRERR || info->si_code == BUS_MCEERR_AR) &&
               repair(info->si_addr, info->si_code == BUS_MCEERR_AR);
    errno = saved;
    if (ours)
        return;
    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(signal, info, context);
    } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
        previous.sa_handler(signal);
    } else if (info->si_code > 0 || previous.sa_handler == SIG_DFL) {
        /* The access faults again and gets the default action; a signal that was sent is raised again. */
        struct sigaction dfl = { .sa_handler = SIG_DFL };
        sigaction(SIGBUS, &dfl, NULL);
        if (info->si_code <= 0)
            raise(SIGBUS);
    }
}

/* A handler installed after ours is replaced and not called: it may call ours. */
static int install_handler(void)
{
    struct sigaction now, ours = { .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_ONSTACK };
    int rc = 0;

    pthread_mutex_lock(&table_lock);
    if (sigaction(SIGBUS, NULL, &now) < 0) {
        rc = -errno;
    } else if (!(now.sa_flags & SA_SIGINFO) || now.sa_sigaction != on_sigbus) {
        if (!installed)
            previous = now;
        if (!spare)
            rc = make_spare();
        sigfillset(&ours.sa_mask); /* no other handler may run, and fault, in the middle of it */
        if (rc == 0 && sigaction(SIGBUS, &ours, NULL) < 0)
            rc = -errno;
        else if (rc == 0)
            installed = 1;
    }
    pthread_mutex_unlock(&table_lock);
    return rc;
}

/* ---- the table of mappings -------------------------------------------------------------------- */

static mapped_file *entry_take(void)
{
    pthread_mutex_lock(&table_lock);
    mapped_file *file = unused;
    int n = atomic_load(&used);
    if (file) {
        unused = file->next;
    } else if (n < MAX_MAPPED) {
        file = &table[n];
        atomic_store(&file->version, 1);
        atomic_store(&used, n + 1);
    }
    pthread_mutex_unlock(&table_lock);
    return file;
}

static void entry_give(mapped_file *file)
{
    pthread_mutex_lock(&table_lock);
    file->next = unused;
    unused = file;
    pthread_mutex_unlock(&table_lock);
}

static void unmap(mapped_file *file)
{
    atomic_fetch_add(&file->version, 1);
    munmap(atomic_load(&file->base), file_size(file));
    entry_give(file);
}

/* ---- files -------------------------------------------------------------------------------------- */

int vms_files_create(vms_files **out)
{
    int rc = install_handler();
    if (rc < 0)
        return rc;
    vms_files *files = calloc(1, sizeof *files);
    if (!files)
        return -ENOMEM;
    pthread_mutex_init(&files->lock, NULL);
    files->refs = 1;
    *out = files;
    return 0;
}

void vms_files_destroy(vms_files *files)
{
    if (!files)
        return;
    pthread_mutex_lock(&files->lock);
    unsigned left = --files->refs;
    pthread_mutex_unlock(&files->lock);
    if (left)
        return;
    pthread_mutex_destroy(&files->lock);
    free(files);
}

void files_ref(vms_files *files)
{
    pthread_mutex_lock(&files->lock);
    files->refs++;
    pthread_mutex_unlock(&files->lock);
}

size_t vms_files_mapped(vms_files *files)
{
    pthread_mutex_lock(&files->lock);
    size_t count = files->count;
    pthread_mutex_unlock(&files->lock);
    return count;
}

/* The piece of a file to map. */
typedef struct piece {
    const backing *in;
    uint64_t first, size; /* what is mapped */
    uint64_t end;         /* the file must reach up to here */
    int writable;
} piece;

static mapped_file **bucket_of(vms_files *files, dev_t dev, ino_t ino, uint64_t first)
{
    uint64_t key = (uint64_t)ino * 31 + (uint64_t)dev + first / GRANULE * 0x9E3779B97F4A7C15;

    return &files->bucket[(key ^ key >> 32) % BUCKETS];
}

/* Takes a reference to a suitable mapping; NULL: there is none.  Under files->lock. */
static mapped_file *find(vms_files *files, const piece *want)
{
    mapped_file *file = *bucket_of(files, want->in->dev, want->in->ino, want->first);

    while (file && !(file->dev == want->in->dev && file->ino == want->in->ino &&
                     atomic_load(&file->first) == want->first && atomic_load(&file->writable) == want->writable &&
                     want->first + file_size(file) >= want->end && atomic_load(&file->good) >= want->end))
        file = file->next;
    if (file)
        file->refs++;
    return file;
}

/* The lock is not held while the kernel maps. */
static int file_map(vms_files *files, int fd, const piece *want, mapped_file **out)
{
    mapped_file *file = entry_take();
    if (!file)
        return -ENOSPC;
    int prot = PROT_READ | (want->writable ? PROT_WRITE : 0);
    uint8_t *base = mmap(NULL, want->size, prot, MAP_SHARED | MAP_NORESERVE, fd, (off_t)want->first);
    if (base == MAP_FAILED) {
        int rc = -errno;
        entry_give(file);
        return rc;
    }
    uint64_t end = want->first + want->size;
    atomic_store(&file->base, base);
    atomic_store(&file->size, want->size);
    atomic_store(&file->first, want->first);
    atomic_store(&file->good, end < want->in->size ? end : want->in->size);
    atomic_store(&file->zeros, want->size);
    atomic_store(&file->page, want->in->page);
    atomic_store(&file->writable, want->writable);
    file->owner = files;
    file->dev = want->in->dev;
    file->ino = want->in->ino;
    file->refs = 1;
    atomic_fetch_add(&file->version, 1);

    pthread_mutex_lock(&files->lock);
    mapped_file *other = find(files, want); /* another thread was faster */
    if (!other) {
        mapped_file **bucket = bucket_of(files, file->dev, file->ino, want->first);
        file->next = *bucket;
        *bucket = file;
        files->count++;
        files->refs++;
    }
    pthread_mutex_unlock(&files->lock);
    if (other) {
        unmap(file);
        file = other;
    }
    *out = file;
    return 0;
}

static int piece_get(vms_files *files, int fd, const piece *want, uint64_t room, mapped_file **out)
{
    pthread_mutex_lock(&files->lock);
    *out = find(files, want);
    pthread_mutex_unlock(&files->lock);
    if (*out)
        return 0;
    return want->size > room ? -ENOSPC : file_map(files, fd, want, out);
}

int file_get(vms_files *files, int fd, uint64_t offset, uint64_t size, uint32_t prot, uint64_t room,
             mapped_file **out)
{
    backing in;
    int mode = fcntl(fd, F_GETFL);
    if (mode < 0)
        return -errno;
    int rc = install_handler(); /* others may have installed their handler since, as Python's faulthandler does */
    if (rc == 0)
        rc = backing_of(fd, &in);
    if (rc < 0)
        return rc;
    if (size > in.size || offset > in.size - size)
        return -EINVAL;
    mode &= O_ACCMODE;
    if (mode == O_WRONLY || (mode == O_RDONLY && (prot & VMS_PROT_WRITE)))
        return -EACCES;
    uint64_t granule = in.page > GRANULE ? in.page : GRANULE;
    piece want = { .in = &in, .first = offset & -granule, .end = offset + size, .writable = mode == O_RDWR };
    uint64_t last = (want.end - 1) | (granule - 1);
    uint64_t last_of_file = (in.size - 1) | (in.page - 1);
    want.size = (last < last_of_file ? last : last_of_file) + 1 - want.first;
    rc = piece_get(files, fd, &want, room, out);
    /* A sealed memfd cannot be mapped writable; that is fine for a window that is only read. */
    if ((rc == -EPERM || rc == -EACCES) && want.writable && !(prot & VMS_PROT_WRITE)) {
        want.writable = 0;
        rc = piece_get(files, fd, &want, room, out);
    }
    return rc;
}

void file_ref(mapped_file *file)
{
    pthread_mutex_lock(&file->owner->lock);
    file->refs++;
    pthread_mutex_unlock(&file->owner->lock);
}

void file_put(mapped_file *file)
{
    vms_files *files = file->owner;

    pthread_mutex_lock(&files->lock);
    unsigned left = --file->refs;
    if (!left) {
        mapped_file **link = bucket_of(files, file->dev, file->ino, atomic_load(&file->first));
        while (*link != file)
            link = &(*link)->next;
        *link = file->next;
        files->count--;
    }
    pthread_mutex_unlock(&files->lock);
    if (!left) {
        unmap(file);
        vms_files_destroy(files);
    }
}
