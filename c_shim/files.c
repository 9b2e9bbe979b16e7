/* SPDX-License-Identifier: MIT
 * Client files mapped once per inode, and what happens when the client shrinks one under us.
 *
 * Touching a page past the end of a mapped file raises SIGBUS.  No check beforehand can exclude that, as the
 * client may truncate between check and use.  So the handler puts an anonymous page of zeros there and
 * lowers file->good; the copy goes on, looks at file->good afterwards and reports -EFAULT.  Neither a copy
 * nor a zero-copy view that Python holds can crash the process.  Signal dispositions belong to the whole
 * process, hence the one piece of global state in this library: the table of mappings the handler may mend.
 */
#define _GNU_SOURCE
#include "files.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#define MAX_MAPPED 4096 /* also bounds what a peer that sends ever new files can make us hold */

struct vms_files {
    pthread_mutex_t lock;
    mapped_file *list;
    size_t count;
    unsigned refs; /* its creator's, its memories' and its mappings' */
};

static struct {
    _Atomic(mapped_file *) file;
} slots[MAX_MAPPED];
static pthread_mutex_t slots_lock = PTHREAD_MUTEX_INITIALIZER;
static struct sigaction previous;

static void on_sigbus(int signal, siginfo_t *info, void *context)
{
    uint8_t *at = info->si_addr;

    for (int i = 0; i < MAX_MAPPED; i++) {
        mapped_file *file = atomic_load_explicit(&slots[i].file, memory_order_acquire);
        if (!file || at < file->base || at >= file->base + file->size)
            continue;
        int saved = errno;
        uint64_t offset = (uint64_t)(at - file->base) & ~(file->page - 1);
        uint64_t good = atomic_load(&file->good);
        while (offset < good && !atomic_compare_exchange_weak(&file->good, &good, offset))
            ;
        int prot = PROT_READ | (file->writable ? PROT_WRITE : 0);
        void *mended = mmap(file->base + offset, file->page, prot,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        errno = saved;
        if (mended != MAP_FAILED)
            return;
        break;
    }
    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(signal, info, context);
    } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
        previous.sa_handler(signal);
    } else {
        /* Not ours: the access faults again and takes the default action. */
        struct sigaction dfl = { .sa_handler = SIG_DFL };
        sigaction(SIGBUS, &dfl, NULL);
    }
}

static int install_handler(void)
{
    struct sigaction now, ours = { .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_ONSTACK };
    int rc = 0;

    pthread_mutex_lock(&slots_lock);
    if (sigaction(SIGBUS, NULL, &now) < 0) {
        rc = -errno;
    } else if (!(now.sa_flags & SA_SIGINFO) || now.sa_sigaction != on_sigbus) {
        previous = now;
        sigemptyset(&ours.sa_mask);
        if (sigaction(SIGBUS, &ours, NULL) < 0)
            rc = -errno;
    }
    pthread_mutex_unlock(&slots_lock);
    return rc;
}

static int slot_take(mapped_file *file)
{
    int rc = -ENOSPC;

    pthread_mutex_lock(&slots_lock);
    for (int i = 0; i < MAX_MAPPED; i++) {
        if (!atomic_load_explicit(&slots[i].file, memory_order_relaxed)) {
            file->slot = i;
            atomic_store_explicit(&slots[i].file, file, memory_order_release);
            rc = 0;
            break;
        }
    }
    pthread_mutex_unlock(&slots_lock);
    return rc;
}

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

static int file_map(vms_files *files, int fd, const struct stat *st, int writable, mapped_file **out)
{
    struct statfs fs;
    mapped_file *file = calloc(1, sizeof *file);
    if (!file)
        return -ENOMEM;
    int prot = PROT_READ | (writable ? PROT_WRITE : 0);
    uint64_t size = ((uint64_t)st->st_size + 4095) & ~(uint64_t)4095;
    file->page = 4096;
    if (fstatfs(fd, &fs) == 0 && fs.f_type == 0x958458f6 /* HUGETLBFS_MAGIC */)
        file->page = (uint64_t)fs.f_bsize;
    file->base = mmap(NULL, size, prot, MAP_SHARED | MAP_NORESERVE, fd, 0);
    if (file->base == MAP_FAILED) {
        int rc = -errno;
        free(file);
        return rc;
    }
    file->owner = files;
    file->size = size;
    atomic_store(&file->good, (uint64_t)st->st_size);
    file->dev = st->st_dev;
    file->ino = st->st_ino;
    file->writable = writable;
    file->refs = 1;
    int rc = slot_take(file);
    if (rc < 0) {
        munmap(file->base, size);
        free(file);
        return rc;
    }
    file->next = files->list;
    files->list = file;
    files->count++;
    files->refs++;
    *out = file;
    return 0;
}

int file_get(vms_files *files, int fd, uint64_t offset, uint64_t size, uint32_t prot, mapped_file **out)
{
    struct stat st;
    if (fstat(fd, &st) < 0)
        return -errno;
    if (!S_ISREG(st.st_mode))
        return -EINVAL;
    if (size > (uint64_t)st.st_size || offset > (uint64_t)st.st_size - size)
        return -EINVAL;
    int mode = fcntl(fd, F_GETFL);
    if (mode < 0)
        return -errno;
    mode &= O_ACCMODE;
    if (mode == O_WRONLY || (mode == O_RDONLY && (prot & VMS_PROT_WRITE)))
        return -EACCES;
    int writable = mode == O_RDWR;
    int rc = 0;

    pthread_mutex_lock(&files->lock);
    mapped_file *file = files->list;
    while (file && !(file->dev == st.st_dev && file->ino == st.st_ino && file->writable == writable &&
                     atomic_load(&file->good) >= offset + size))
        file = file->next;
    if (file) {
        file->refs++;
        *out = file;
    } else {
        rc = file_map(files, fd, &st, writable, out);
        /* A sealed memfd cannot be mapped writable; that is fine for a window that is only read. */
        if ((rc == -EPERM || rc == -EACCES) && writable && !(prot & VMS_PROT_WRITE))
            rc = file_map(files, fd, &st, 0, out);
    }
    pthread_mutex_unlock(&files->lock);
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
    mapped_file *gone = NULL;

    pthread_mutex_lock(&files->lock);
    if (--file->refs == 0) {
        mapped_file **link = &files->list;
        while (*link != file)
            link = &(*link)->next;
        *link = file->next;
        files->count--;
        gone = file;
    }
    pthread_mutex_unlock(&files->lock);
    if (gone) {
        pthread_mutex_lock(&slots_lock);
        atomic_store_explicit(&slots[gone->slot].file, NULL, memory_order_release);
        pthread_mutex_unlock(&slots_lock);
        munmap(gone->base, gone->size);
        free(gone);
        vms_files_destroy(files);
    }
}
