/* SPDX-License-Identifier: MIT
 * The kind of file that a client has sent, determined without a call that may block.
 *
 * A file system served by a program (FUSE) or another machine (NFS, 9p) may never answer.  fstat() and fstatfs() then
 * block forever, and so does the first access to a page, at times with the address space's lock held: one client could
 * stop every thread.  So guest memory must be on a file system whose pages come from the kernel or from a disk: memfd,
 * tmpfs and hugetlbfs, recognised by their seals, and those of local[], recognised by the mount table. */
#define _GNU_SOURCE
#include "backing.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>

#define HUGETLBFS 0x958458f6 /* HUGETLBFS_MAGIC */

static int is_local(const char *type, size_t length)
{
    static const char *const local[] = { "bcachefs", "btrfs", "ext2", "ext3",    "ext4", "f2fs",
                                         "hugetlbfs", "overlay", "ramfs", "tmpfs", "xfs", "zfs" };

    for (size_t i = 0; i < sizeof local / sizeof local[0]; i++)
        if (strlen(local[i]) == length && !memcmp(local[i], type, length))
            return 1;
    return 0;
}

/* Whether our mount table lists the file's mount with a local file system; for a file of another mount namespace, its
 * disk. */
static int mounted_locally(const struct statx *at)
{
    FILE *mounts = fopen("/proc/self/mountinfo", "re");
    char *line = NULL;
    size_t room = 0;
    int found = 0;

    /* 36 35 98:0 /root /point options [fields] - type source options, see proc_pid_mountinfo(5) */
    while (mounts && !found && getline(&line, &room, mounts) >= 0) {
        unsigned long long id;
        unsigned major, minor;
        const char *type = strstr(line, " - ");
        if (!type || sscanf(line, "%llu %*u %u:%u", &id, &major, &minor) != 3)
            continue;
        type += 3;
        if ((at->stx_mask & STATX_MNT_ID && id == at->stx_mnt_id) ||
            (major && major == at->stx_dev_major && minor == at->stx_dev_minor))
            found = is_local(type, strcspn(type, " "));
    }
    free(line);
    if (mounts)
        fclose(mounts);
    return found;
}

int backing_of(int fd, backing *out)
{
    struct statx at;
    struct stat st;
    struct statfs fs;

    /* DONT_SYNC: cached attributes will do, and a remote file system is not asked. */
    if (statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_TYPE | STATX_MNT_ID, &at) < 0)
        return -errno;
    if (!S_ISREG(at.stx_mode))
        return -EINVAL;
    int in_memory = fcntl(fd, F_GET_SEALS) >= 0;
    if (!in_memory && !mounted_locally(&at))
        return -EOPNOTSUPP;
    if (fstat(fd, &st) < 0)
        return -errno;
    *out = (backing){ .dev = st.st_dev, .ino = st.st_ino, .size = (uint64_t)st.st_size, .page = 4096 };
    if (in_memory && fstatfs(fd, &fs) == 0 && fs.f_type == HUGETLBFS)
        out->page = (uint64_t)fs.f_bsize;
    return 0;
}
