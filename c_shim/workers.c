/* SPDX-License-Identifier: MIT
 * Threads for I/O that may block.
 *
 * They touch a store and a buffer of the job's own, never guest memory: that is left to the device's thread, which they
 * wake.  A thread is started when there is work and none is idle. */
#define _GNU_SOURCE
#include "workers.h"
#include "func.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>

#define MAX_THREADS 32

struct vms_workers {
    vms_func *func;
    _Atomic unsigned refs;
    pthread_mutex_t lock;
    pthread_cond_t wanted, settled;
    work *first, *last; /* not begun */
    unsigned limit, started, idle, running, queued;
    int stopping;
    int woken; /* the device's thread was woken, and has not collected yet */
    inbox done; /* Python's */
    pthread_t thread[MAX_THREADS];
};

int vms_workers_create(vms_func *func, uint32_t threads, vms_workers **out)
{
    if (!threads || threads > MAX_THREADS)
        return -EINVAL;
    vms_workers *workers = calloc(1, sizeof *workers);
    if (!workers)
        return -ENOMEM;
    func_ref(func);
    workers->func = func;
    workers->refs = 1;
    workers->limit = threads;
    pthread_mutex_init(&workers->lock, NULL);
    pthread_cond_init(&workers->wanted, NULL);
    pthread_cond_init(&workers->settled, NULL);
    *out = workers;
    return 0;
}

void workers_ref(vms_workers *workers)
{
    workers->refs++;
}

void work_release(work *item)
{
    vms_store_destroy(item->store);
    item->store = NULL;
}

void vms_workers_destroy(vms_workers *workers)
{
    work *item;

    if (!workers || --workers->refs)
        return;
    pthread_mutex_lock(&workers->lock);
    workers->stopping = 1;
    pthread_cond_broadcast(&workers->wanted);
    pthread_mutex_unlock(&workers->lock);
    for (unsigned i = 0; i < workers->started; i++)
        pthread_join(workers->thread[i], NULL);
    /* Only Python's inbox is left: other owners of an inbox hold a reference. */
    while ((item = workers->first)) {
        workers->first = item->next;
        work_release(item);
        free(item);
    }
    while ((item = workers_take(workers, &workers->done)))
        free(item);
    vms_func_destroy(workers->func);
    pthread_cond_destroy(&workers->wanted);
    pthread_cond_destroy(&workers->settled);
    pthread_mutex_destroy(&workers->lock);
    free(workers);
}

/* Under the lock; whether the device's thread has to be woken. */
static int deliver(vms_workers *workers, work *item)
{
    int first = !workers->woken;

    item->next = NULL;
    if (item->to->last)
        item->to->last->next = item;
    else
        item->to->first = item;
    item->to->last = item;
    workers->woken = 1;
    return first;
}

static void *work_main(void *argument)
{
    vms_workers *workers = argument;

    pthread_mutex_lock(&workers->lock);
    while (!workers->stopping) {
        work *item = workers->first;
        if (!item) {
            workers->idle++;
            pthread_cond_wait(&workers->wanted, &workers->lock);
            workers->idle--;
            continue;
        }
        workers->first = item->next;
        if (!workers->first)
            workers->last = NULL;
        workers->queued--;
        workers->running++;
        pthread_mutex_unlock(&workers->lock);
        item->job.error = -vms_store_run(item->store, &item->job);
        pthread_mutex_lock(&workers->lock);
        workers->running--;
        int wake = deliver(workers, item);
        if (!workers->running)
            pthread_cond_broadcast(&workers->settled);
        if (wake) {
            pthread_mutex_unlock(&workers->lock);
            vms_wake(workers->func);
            pthread_mutex_lock(&workers->lock);
        }
    }
    pthread_mutex_unlock(&workers->lock);
    return NULL;
}

/* Under the lock: ensures that a thread will do one more piece of work. */
static int staff(vms_workers *workers)
{
    sigset_t all, before;

    if (workers->idle > workers->queued || workers->started == workers->limit) {
        pthread_cond_signal(&workers->wanted);
        return 0;
    }
    sigfillset(&all); /* signals are Python's */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int rc = pthread_create(&workers->thread[workers->started], NULL, work_main, workers);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (rc == 0)
        workers->started++;
    return workers->started ? 0 : -rc;
}

int workers_submit(vms_workers *workers, work *item)
{
    pthread_mutex_lock(&workers->lock);
    int rc = staff(workers);
    if (rc == 0) {
        item->next = NULL;
        if (workers->last)
            workers->last->next = item;
        else
            workers->first = item;
        workers->last = item;
        workers->queued++;
    }
    pthread_mutex_unlock(&workers->lock);
    return rc;
}

work *workers_take(vms_workers *workers, inbox *from)
{
    pthread_mutex_lock(&workers->lock);
    work *item = from->first;
    if (item) {
        from->first = item->next;
        if (!from->first)
            from->last = NULL;
    }
    pthread_mutex_unlock(&workers->lock);
    if (item)
        work_release(item);
    return item;
}

work *workers_revoke(vms_workers *workers, const inbox *to, int (*wanted)(const work *, uint64_t), uint64_t key)
{
    work *item, *before = NULL;

    pthread_mutex_lock(&workers->lock);
    for (item = workers->first; item; before = item, item = item->next) {
        if (item->to != to || !wanted(item, key))
            continue;
        if (before)
            before->next = item->next;
        else
            workers->first = item->next;
        if (workers->last == item)
            workers->last = before;
        workers->queued--;
        break;
    }
    pthread_mutex_unlock(&workers->lock);
    if (item)
        work_release(item);
    return item;
}

int vms_workers_submit(vms_workers *workers, vms_store *store, const vms_job *job)
{
    work *item = calloc(1, sizeof *item);
    if (!item)
        return -ENOMEM;
    item->store = store;
    item->to = &workers->done;
    item->job = *job;
    store_ref(store);
    int rc = workers_submit(workers, item);
    if (rc < 0) {
        work_release(item);
        free(item);
    }
    return rc;
}

size_t vms_workers_collect(vms_workers *workers, vms_job *out, size_t room)
{
    size_t n = 0;
    work *item;

    /* Whatever is delivered from now on wakes it again, whether or not this takes it. */
    pthread_mutex_lock(&workers->lock);
    workers->woken = 0;
    pthread_mutex_unlock(&workers->lock);
    while (n < room && (item = workers_take(workers, &workers->done))) {
        out[n++] = item->job;
        free(item);
    }
    return n;
}

static int has_cookie(const work *item, uint64_t cookie)
{
    return item->job.cookie == cookie;
}

int vms_workers_revoke(vms_workers *workers, uint64_t cookie)
{
    work *item = workers_revoke(workers, &workers->done, has_cookie, cookie);
    free(item);
    return item ? 0 : -ENOENT;
}

void vms_workers_settle(vms_workers *workers)
{
    pthread_mutex_lock(&workers->lock);
    while (workers->first || workers->running)
        pthread_cond_wait(&workers->settled, &workers->lock);
    pthread_mutex_unlock(&workers->lock);
}
