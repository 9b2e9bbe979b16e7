/* SPDX-License-Identifier: MIT
 * Regions and the policy of their bytes. */
#define _GNU_SOURCE
#include "func.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "eventfd.h"

#define ALL_SIZES                                                                                             \
    (VMS_SIZE_1 | VMS_SIZE_2 | VMS_SIZE_4 | VMS_SIZE_8 | VMS_SIZE_ODD | VMS_MISALIGNED)

int vms_func_create(vms_func **out)
{
    vms_func *func = calloc(1, sizeof *func);
    if (!func)
        return -ENOMEM;
    func->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (func->wake_fd < 0) {
        int rc = -errno;
        free(func);
        return rc;
    }
    pthread_mutex_init(&func->watch_lock, NULL);
    atomic_store(&func->refs, 1);
    for (unsigned i = 0; i < VMS_REGIONS; i++)
        func->regions[i].fd = -1;
    *out = func;
    return 0;
}

void vms_func_destroy(vms_func *func)
{
    if (!func || atomic_fetch_sub(&func->refs, 1) != 1)
        return;
    for (unsigned i = 0; i < VMS_REGIONS; i++) {
        region *r = &func->regions[i];
        for (size_t j = 0; j < r->n_areas; j++) {
            if (r->areas[j].backing)
                munmap(r->areas[j].backing, r->areas[j].size);
            free(r->areas[j].policy);
        }
        free(r->areas);
        if (r->fd >= 0)
            close(r->fd);
    }
    close(func->wake_fd);
    pthread_mutex_destroy(&func->watch_lock);
    free(func);
}

void func_ref(vms_func *func)
{
    atomic_fetch_add(&func->refs, 1);
}

void vms_func_stats_get(vms_func *func, vms_func_stats *out)
{
    *out = func->stats;
}

int vms_region_define(vms_func *func, uint32_t index, uint64_t size, uint8_t fill, int writable)
{
    if (index >= VMS_REGIONS || !size || size > (uint64_t)INT64_MAX)
        return -EINVAL;
    region *r = &func->regions[index];
    if (r->size)
        return -EEXIST;
    r->size = size;
    r->fill = fill;
    r->writable = writable;
    return 0;
}

static region *defined(vms_func *func, uint32_t index)
{
    return index < VMS_REGIONS && func->regions[index].size ? &func->regions[index] : NULL;
}

int vms_region_enable(vms_func *func, uint32_t index, int on)
{
    region *r = defined(func, index);
    if (!r)
        return -EINVAL;
    r->disabled = !on;
    return 0;
}

int vms_region_tap(vms_func *func, uint32_t index, uint32_t exits)
{
    region *r = defined(func, index);
    if (!r || exits & ~(VMS_EXIT_ON_READ | VMS_EXIT_ON_WRITE | VMS_EXIT_REFUSED))
        return -EINVAL;
    atomic_store_explicit(&r->tapped, exits, memory_order_relaxed);
    return 0;
}

/* Makes room for an area; NULL and *rc when it does not fit. */
static area *insert_area(vms_func *func, uint32_t index, uint64_t start, uint64_t size, int *rc)
{
    region *r = defined(func, index);
    if (!r || !size || !region_has(r, start, size)) {
        *rc = -EINVAL;
        return NULL;
    }
    size_t at = 0;
    while (at < r->n_areas && r->areas[at].start < start)
        at++;
    if ((at > 0 && r->areas[at - 1].start + r->areas[at - 1].size > start) ||
        (at < r->n_areas && start + size > r->areas[at].start)) {
        *rc = -EEXIST;
        return NULL;
    }
    area *grown = realloc(r->areas, (r->n_areas + 1) * sizeof *grown);
    if (!grown) {
        *rc = -ENOMEM;
        return NULL;
    }
    r->areas = grown;
    memmove(grown + at + 1, grown + at, (r->n_areas - at) * sizeof *grown);
    r->n_areas++;
    grown[at] = (area){ .start = start, .size = size };
    *rc = 0;
    return &grown[at];
}

static void drop_area(vms_func *func, uint32_t index, area *a)
{
    region *r = &func->regions[index];
    size_t at = (size_t)(a - r->areas);
    memmove(a, a + 1, (r->n_areas - at - 1) * sizeof *a);
    r->n_areas--;
}

static int map_backing(area *a, int fd, uint64_t offset)
{
    int flags = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE : MAP_SHARED | MAP_NORESERVE;
    void *p = mmap(NULL, a->size, PROT_READ | PROT_WRITE, flags, fd, (off_t)offset);
    if (p == MAP_FAILED)
        return -errno;
    a->backing = p;
    return 0;
}

int vms_area_bank(vms_func *func, uint32_t index, uint64_t start, uint64_t size, uint8_t **backing)
{
    int rc;
    area *a = insert_area(func, index, start, size, &rc);
    if (!a)
        return rc;
    a->policy = calloc(size, sizeof *a->policy);
    rc = a->policy ? map_backing(a, -1, 0) : -ENOMEM;
    for (uint64_t i = 0; a->policy && i < size; i++)
        a->policy[i].sizes = ALL_SIZES;
    if (rc < 0) {
        free(a->policy);
        drop_area(func, index, a);
        return rc;
    }
    *backing = a->backing;
    return 0;
}

int vms_area_ram(vms_func *func, uint32_t index, uint64_t start, uint64_t size, int mappable, uint8_t **backing)
{
    int rc;

    if (mappable && ((start | size) & 4095))
        return -EINVAL;
    area *a = insert_area(func, index, start, size, &rc);
    if (!a)
        return rc;
    region *r = &func->regions[index];
    if (mappable && r->fd < 0) {
        int fd = memfd_create("vmodel-region", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        if (fd < 0) {
            rc = -errno;
        } else if (ftruncate(fd, (off_t)r->size) < 0 ||
                   /* the client gets this fd: it must not be able to shrink it under us */
                   fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0) {
            rc = -errno;
            close(fd);
        } else {
            r->fd = fd;
        }
    }
    if (rc == 0)
        rc = map_backing(a, mappable ? r->fd : -1, start);
    if (rc < 0) {
        drop_area(func, index, a);
        return rc;
    }
    a->in_memfd = mappable;
    *backing = a->backing;
    return 0;
}

int vms_area_hook(vms_func *func, uint32_t index, uint64_t start, uint64_t size)
{
    int rc;
    insert_area(func, index, start, size, &rc);
    return rc;
}

static area *find_area(const region *r, uint64_t offset)
{
    size_t low = 0, high = r->n_areas; /* the first area that ends after offset */
    while (low < high) {
        size_t mid = (low + high) / 2;
        if (r->areas[mid].start + r->areas[mid].size <= offset)
            low = mid + 1;
        else
            high = mid;
    }
    return low < r->n_areas ? &r->areas[low] : NULL;
}

int vms_bank_policy(vms_func *func, uint32_t index, uint64_t start, size_t n, const vms_policy *q)
{
    region *r = defined(func, index);
    area *a = r ? find_area(r, start) : NULL;
    if (!a || !a->policy || start < a->start || n > a->size || start - a->start > a->size - n)
        return -EINVAL;
    byte_policy *p = a->policy + (start - a->start);
    for (size_t i = 0; i < n; i++)
        p[i] = (byte_policy){ q->store[i], q->w1c[i], q->w1s[i], q->rc[i], q->exits[i], q->sizes[i] };
    return 0;
}

int vms_region_fd(vms_func *func, uint32_t index, int *fd)
{
    region *r = defined(func, index);
    if (!r)
        return -EINVAL;
    if (r->fd < 0)
        return -ENOENT;
    *fd = r->fd;
    return 0;
}

/* Walks the pieces of an access: areas, and the holes between them. */
typedef struct piece {
    area *a; /* NULL: hole */
    uint64_t at; /* in the area */
    size_t n;
} piece;

static piece next_piece(const region *r, uint64_t offset, size_t n)
{
    area *a = find_area(r, offset);
    if (!a || a->start >= offset + n)
        return (piece){ NULL, 0, n };
    if (a->start > offset)
        return (piece){ NULL, 0, (size_t)(a->start - offset) };
    uint64_t left = a->start + a->size - offset;
    return (piece){ a, offset - a->start, left < n ? (size_t)left : n };
}

uint32_t region_refuses(const region *r, uint64_t offset, size_t n)
{
    if (r->disabled)
        return VMS_REFUSED_OFF;
    piece p = next_piece(r, offset, n);
    if (n > 8 || !p.a || !p.a->policy)
        return 0;
    int power = (n & (n - 1)) == 0;
    uint8_t need = power ? (uint8_t)n : VMS_SIZE_ODD;
    if (power && (offset & (n - 1)))
        need |= VMS_MISALIGNED;
    return need & ~p.a->policy[p.at].sizes ? VMS_REFUSED_SIZE : 0;
}

static uint8_t refused_fill(const region *r, uint32_t why)
{
    return why == VMS_REFUSED_OFF ? 0xFF : r->fill;
}

int vms_region_refuses(vms_func *func, uint32_t index, uint64_t offset, size_t n, uint32_t *why, uint8_t *fill)
{
    region *r = defined(func, index);
    if (!r || !n || !region_has(r, offset, n))
        return -EINVAL;
    *why = region_refuses(r, offset, n);
    *fill = refused_fill(r, *why);
    return 0;
}

static int tapped(const region *r, unsigned exits)
{
    return (atomic_load_explicit(&r->tapped, memory_order_relaxed) & exits) != 0;
}

static int exits(const region *r, uint64_t offset, size_t n, uint8_t which)
{
    if (tapped(r, which))
        return 1;
    while (n) {
        piece p = next_piece(r, offset, n);
        if (p.a && !p.a->backing)
            return 1;
        if (p.a && p.a->policy)
            for (size_t i = 0; i < p.n; i++)
                if (p.a->policy[p.at + i].exits & which)
                    return 1;
        offset += p.n;
        n -= p.n;
    }
    return 0;
}

static void read_plain(const region *r, uint64_t offset, uint8_t *buf, size_t n)
{
    while (n) {
        piece p = next_piece(r, offset, n);
        if (p.a && p.a->backing) {
            uint8_t *from = p.a->backing + p.at;
            memcpy(buf, from, p.n);
            if (p.a->policy)
                for (size_t i = 0; i < p.n; i++)
                    if (p.a->policy[p.at + i].rc)
                        from[i] &= (uint8_t)~p.a->policy[p.at + i].rc;
        } else {
            memset(buf, r->fill, p.n);
        }
        offset += p.n;
        buf += p.n;
        n -= p.n;
    }
}

static void write_plain(const region *r, uint64_t offset, const uint8_t *buf, size_t n)
{
    while (n) {
        piece p = next_piece(r, offset, n);
        if (p.a && p.a->policy) {
            uint8_t *to = p.a->backing + p.at;
            for (size_t i = 0; i < p.n; i++) {
                const byte_policy *b = &p.a->policy[p.at + i];
                uint8_t v = buf[i], now = to[i];
                now = (uint8_t)((now & ~b->store) | (v & b->store));
                now &= (uint8_t)~(v & b->w1c);
                now |= v & b->w1s;
                to[i] = now;
            }
        } else if (p.a && p.a->backing) {
            memcpy(p.a->backing + p.at, buf, p.n);
        }
        offset += p.n;
        buf += p.n;
        n -= p.n;
    }
}

int region_try_read(const region *r, uint64_t offset, uint8_t *buf, size_t n)
{
    uint32_t why = region_refuses(r, offset, n);
    if (why) {
        memset(buf, refused_fill(r, why), n);
        return !tapped(r, VMS_EXIT_REFUSED);
    }
    if (exits(r, offset, n, VMS_EXIT_ON_READ))
        return 0;
    read_plain(r, offset, buf, n);
    return 1;
}

int region_try_write(const region *r, uint64_t offset, const uint8_t *buf, size_t n, int behind)
{
    if (region_refuses(r, offset, n))
        return !tapped(r, VMS_EXIT_REFUSED);
    if (behind || exits(r, offset, n, VMS_EXIT_ON_WRITE))
        return 0;
    write_plain(r, offset, buf, n);
    return 1;
}

int vms_region_read(vms_func *func, uint32_t index, uint64_t offset, uint8_t *buf, size_t n)
{
    region *r = defined(func, index);
    if (!r || !n || !region_has(r, offset, n))
        return -EINVAL;
    read_plain(r, offset, buf, n);
    return 0;
}

int vms_region_write(vms_func *func, uint32_t index, uint64_t offset, const uint8_t *buf, size_t n)
{
    region *r = defined(func, index);
    if (!r || !n || !region_has(r, offset, n))
        return -EINVAL;
    write_plain(r, offset, buf, n);
    return 0;
}

int vms_signal(int eventfd)
{
    return eventfd_signal(eventfd);
}

int vms_wake(vms_func *func)
{
    uint64_t one = 1;
    if (write(func->wake_fd, &one, sizeof one) < 0 && errno != EAGAIN) /* full: it is awake already */
        return -errno;
    return 0;
}

int vms_watch(vms_func *func, int eventfd, uint16_t cookie)
{
    int rc = 0;
    pthread_mutex_lock(&func->watch_lock);
    if (func->n_watches == MAX_WATCHES) {
        rc = -ENOSPC;
    } else {
        func->watches[func->n_watches].fd = eventfd;
        func->watches[func->n_watches++].cookie = cookie;
    }
    pthread_mutex_unlock(&func->watch_lock);
    return rc < 0 ? rc : vms_wake(func);
}

int vms_unwatch(vms_func *func, int eventfd)
{
    int rc = -ENOENT;
    pthread_mutex_lock(&func->watch_lock);
    for (unsigned i = 0; i < func->n_watches; i++) {
        if (func->watches[i].fd == eventfd) {
            func->watches[i] = func->watches[--func->n_watches];
            rc = 0;
            break;
        }
    }
    pthread_mutex_unlock(&func->watch_lock);
    return rc;
}
