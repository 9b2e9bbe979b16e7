/* SPDX-License-Identifier: MIT
 * Blocks: in memory, or in a file.
 *
 * A file is reached by preadv and pwritev and never mapped, so that truncating it raises no SIGBUS.  Several threads
 * may work on one at a time.  No file system promises that reads and writes are atomic, so ranges are locked: each
 * MiB hashes to one of 64 locks.  A store in memory is used by one thread only. */
#define _GNU_SOURCE
#include "store.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#define PAGE ((uint64_t)4096)
#define RANGE_SHIFT 20
#define SLOW ((uint64_t)1000000) /* ns: a write that took longer and slept has blocked */
#define PAUSE ((uint64_t)10 * 1000000000)
#define PIECE ((uint64_t)256 * 1024) /* bytes that are looked at, or cleared, at once */

static int store_create(uint64_t size, vms_store **out)
{
    pthread_rwlockattr_t writers_first;

    vms_store *store = calloc(1, sizeof *store);
    if (!store)
        return -ENOMEM;
    store->refs = 1;
    store->size = size;
    store->fd = -1;
    pthread_rwlockattr_init(&writers_first);
    pthread_rwlockattr_setkind_np(&writers_first, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    for (int i = 0; i < STORE_RANGES; i++)
        pthread_rwlock_init(&store->range[i], &writers_first);
    pthread_rwlockattr_destroy(&writers_first);
    *out = store;
    return 0;
}

int vms_store_create_memory(uint64_t size, vms_store **out)
{
    vms_store *store;

    if (!size || size > SIZE_MAX / 2)
        return -EINVAL;
    int rc = store_create(size, &store);
    if (rc < 0)
        return rc;
    store->memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (store->memory == MAP_FAILED) {
        rc = -errno;
        store->memory = NULL;
        vms_store_destroy(store);
        return rc;
    }
    *out = store;
    return 0;
}

int vms_store_create_file(int fd, uint64_t size, vms_store **out)
{
    vms_store *store;

    if (!size || size > INT64_MAX)
        return -EINVAL;
    int rc = store_create(size, &store);
    if (rc < 0)
        return rc;
    store->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (store->fd < 0) {
        rc = -errno;
        vms_store_destroy(store);
        return rc;
    }
    struct statfs fs;
    store->in_memory = fstatfs(store->fd, &fs) == 0 && fs.f_type == 0x01021994 /* TMPFS_MAGIC */;
    *out = store;
    return 0;
}

void store_ref(vms_store *store)
{
    store->refs++;
}

void vms_store_destroy(vms_store *store)
{
    if (!store || --store->refs)
        return;
    if (store->memory)
        munmap(store->memory, store->size);
    if (store->fd >= 0)
        close(store->fd);
    for (int i = 0; i < STORE_RANGES; i++)
        pthread_rwlock_destroy(&store->range[i]);
    free(store);
}

uint8_t *vms_store_memory(vms_store *store)
{
    return store->memory;
}

/* ---- ranges ------------------------------------------------------------------------------------ */

/* The locks of [offset, offset+length), a bit for each. */
static uint64_t locks_of(uint64_t offset, uint64_t length)
{
    uint64_t first = offset >> RANGE_SHIFT, last = (offset + length - 1) >> RANGE_SHIFT, bits = 0;

    if (!length)
        return 0;
    if (last - first >= STORE_RANGES)
        return UINT64_MAX;
    for (uint64_t i = first; i <= last; i++)
        bits |= (uint64_t)1 << i % STORE_RANGES;
    return bits;
}

static void unlock(vms_store *store, uint64_t locks)
{
    for (int i = 0; locks; i++, locks >>= 1)
        if (locks & 1)
            pthread_rwlock_unlock(&store->range[i]);
}

/* In ascending order, so that there is no deadlock. */
static void lock(vms_store *store, uint64_t locks, int write)
{
    for (int i = 0; locks; i++, locks >>= 1)
        if (locks & 1)
            write ? pthread_rwlock_wrlock(&store->range[i]) : pthread_rwlock_rdlock(&store->range[i]);
}

static int try_lock(vms_store *store, uint64_t locks, int write)
{
    uint64_t taken = 0;

    for (int i = 0; i < STORE_RANGES; i++) {
        if (!(locks >> i & 1))
            continue;
        if (write ? pthread_rwlock_trywrlock(&store->range[i]) : pthread_rwlock_tryrdlock(&store->range[i])) {
            unlock(store, taken);
            return 0;
        }
        taken |= (uint64_t)1 << i;
    }
    return 1;
}

static uint64_t clock_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

/* How often this thread has slept; being preempted does not count. */
static long sleeps(void)
{
    struct rusage usage;

    getrusage(RUSAGE_THREAD, &usage);
    return usage.ru_nvcsw;
}

/* A write on a file system that cannot report whether it would block (ext4).  Writes of whole pages rarely block: they
 * need no read first, and reach the disk later.  After one that did block, all go to workers for PAUSE. */
static ssize_t try_write(vms_store *store, uint64_t offset, uint64_t length, const struct iovec *iov, int n)
{
    uint64_t start = clock_ns();

    if ((offset | length) % PAGE || start < store->slow_until) {
        errno = EAGAIN;
        return -1;
    }
    long before = sleeps();
    ssize_t done = pwritev(store->fd, iov, n, (off_t)offset);
    int saved = errno;
    uint64_t end = clock_ns();
    if (end - start > SLOW && sleeps() != before)
        store->slow_until = end + PAUSE;
    errno = saved;
    return done;
}

int store_try(vms_store *store, int write, uint64_t offset, uint64_t length, const struct iovec *iov, int n)
{
    int flags = store->in_memory ? 0 : RWF_NOWAIT, mute = atomic_load_explicit(&store->mute[write], memory_order_relaxed);
    uint64_t locks = locks_of(offset, length);
    ssize_t done;

    if ((mute && !write) || !try_lock(store, locks, write))
        return 0;
    if (mute)
        done = try_write(store, offset, length, iov, n);
    else if (write)
        done = pwritev2(store->fd, iov, n, (off_t)offset, flags);
    else
        done = preadv2(store->fd, iov, n, (off_t)offset, flags);
    int rc = done < 0 ? -errno : (uint64_t)done == length;
    unlock(store, locks);
    if (rc == -EOPNOTSUPP)
        atomic_store_explicit(&store->mute[write], 1, memory_order_relaxed);
    /* Other errors: the job is repeated by a worker, which reports them. */
    return rc == -EFAULT ? rc : rc == 1;
}

/* ---- jobs -------------------------------------------------------------------------------------- */

static int read_all(vms_store *store, uint64_t offset, uint8_t *data, uint64_t length)
{
    if (store->memory) {
        memcpy(data, store->memory + offset, length);
        return 0;
    }
    while (length) {
        ssize_t n = pread(store->fd, data, length, (off_t)offset);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -EIO; /* 0: somebody has truncated the file */
        data += n;
        offset += (uint64_t)n;
        length -= (uint64_t)n;
    }
    return 0;
}

static int write_all(vms_store *store, uint64_t offset, const uint8_t *data, uint64_t length)
{
    if (store->memory) {
        memcpy(store->memory + offset, data, length);
        return 0;
    }
    while (length) {
        ssize_t n = pwrite(store->fd, data, length, (off_t)offset);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -EIO;
        data += n;
        offset += (uint64_t)n;
        length -= (uint64_t)n;
    }
    return 0;
}

/* Reads [offset, offset+length), and compares it with `expected` unless that is NULL. */
static int look_at(vms_store *store, uint64_t offset, uint64_t length, const uint8_t *expected)
{
    int rc = 0;

    if (store->memory)
        return expected && memcmp(store->memory + offset, expected, length) ? -EBADMSG : 0;
    uint8_t *found = malloc(length < PIECE ? length : PIECE);
    if (!found)
        return -ENOMEM;
    while (length && rc == 0) {
        uint64_t n = length < PIECE ? length : PIECE;
        rc = read_all(store, offset, found, n);
        if (rc == 0 && expected) {
            rc = memcmp(found, expected, n) ? -EBADMSG : 0;
            expected += n;
        }
        offset += n;
        length -= n;
    }
    free(found);
    return rc;
}

static int clear_memory(vms_store *store, uint64_t offset, uint64_t length)
{
    uint64_t end = offset + length, first = (offset + PAGE - 1) & -PAGE, last = end & -PAGE;

    if (first >= last) {
        memset(store->memory + offset, 0, length);
        return 0;
    }
    memset(store->memory + offset, 0, first - offset);
    memset(store->memory + last, 0, end - last);
    return madvise(store->memory + first, last - first, MADV_DONTNEED) < 0 ? -errno : 0;
}

static int clear(vms_store *store, uint64_t offset, uint64_t length, int discard)
{
    static const uint8_t zeros[65536];

    if (store->memory)
        return clear_memory(store, offset, length);
    int mode = FALLOC_FL_KEEP_SIZE | (discard ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE);
    while (fallocate(store->fd, mode, (off_t)offset, (off_t)length) < 0) {
        if (errno == EINTR)
            continue;
        if (errno != EOPNOTSUPP && errno != ENOSYS)
            return -errno;
        int rc = 0;
        for (uint64_t n; length && rc == 0; offset += n, length -= n) {
            n = length < sizeof zeros ? length : sizeof zeros;
            rc = write_all(store, offset, zeros, n);
        }
        return rc;
    }
    return 0;
}

static int sync_file(vms_store *store)
{
    return store->fd >= 0 && fdatasync(store->fd) < 0 ? -errno : 0;
}

int vms_store_run(vms_store *store, const vms_job *job)
{
    if (job->op > VMS_STORE_SYNC || job->length > store->size || job->offset > store->size - job->length)
        return -EINVAL;
    int has_data = job->op == VMS_STORE_READ || job->op == VMS_STORE_WRITE || job->op == VMS_STORE_COMPARE_WRITE;
    int compares = job->op == VMS_STORE_COMPARE || job->op == VMS_STORE_COMPARE_WRITE;
    if ((has_data && !job->data) || (compares && !job->expected))
        return -EINVAL;
    if (job->op == VMS_STORE_SYNC)
        return sync_file(store);
    if (!job->length)
        return 0;
    int writes = job->op != VMS_STORE_READ && job->op != VMS_STORE_COMPARE && job->op != VMS_STORE_VERIFY;
    int rc = !writes && job->sync ? sync_file(store) : 0;
    uint64_t locks = store->memory ? 0 : locks_of(job->offset, job->length);
    lock(store, locks, writes);
    if (rc == 0) {
        switch (job->op) {
        case VMS_STORE_READ:
            rc = read_all(store, job->offset, job->data, job->length);
            break;
        case VMS_STORE_COMPARE_WRITE:
            rc = look_at(store, job->offset, job->length, job->expected);
            if (rc < 0)
                break;
            /* fall through */
        case VMS_STORE_WRITE:
            rc = write_all(store, job->offset, job->data, job->length);
            break;
        case VMS_STORE_COMPARE:
            rc = look_at(store, job->offset, job->length, job->expected);
            break;
        case VMS_STORE_VERIFY:
            rc = look_at(store, job->offset, job->length, NULL);
            break;
        default:
            rc = clear(store, job->offset, job->length, job->op == VMS_STORE_DISCARD);
        }
    }
    unlock(store, locks);
    return rc == 0 && writes && job->sync ? sync_file(store) : rc;
}
