/* SPDX-License-Identifier: MIT */
#include "budget.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>

struct vms_budget {
    uint64_t limit;
    _Atomic uint64_t taken; /* never more than limit */
    _Atomic unsigned refs;  /* its creator's, and those of the domains that take from it */
};

int vms_budget_create(uint64_t limit, vms_budget **out)
{
    vms_budget *budget = calloc(1, sizeof *budget);
    if (!budget)
        return -ENOMEM;
    budget->limit = limit;
    atomic_store(&budget->refs, 1);
    *out = budget;
    return 0;
}

void vms_budget_destroy(vms_budget *budget)
{
    if (budget && atomic_fetch_sub(&budget->refs, 1) == 1)
        free(budget);
}

uint64_t vms_budget_taken(vms_budget *budget)
{
    return atomic_load(&budget->taken);
}

void budget_ref(vms_budget *budget)
{
    if (budget)
        atomic_fetch_add(&budget->refs, 1);
}

int budget_take(vms_budget *budget, uint64_t bytes)
{
    if (!budget)
        return 0;
    uint64_t taken = atomic_load(&budget->taken);
    do {
        if (bytes > budget->limit - taken)
            return -ENOMEM;
    } while (!atomic_compare_exchange_weak(&budget->taken, &taken, taken + bytes));
    return 0;
}

void budget_give(vms_budget *budget, uint64_t bytes)
{
    if (budget)
        atomic_fetch_sub(&budget->taken, bytes);
}
