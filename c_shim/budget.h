/* SPDX-License-Identifier: MIT
 * Bytes that several may take together, and no more; see budget.c. */
#ifndef VMS_BUDGET_H
#define VMS_BUDGET_H

#include "vmshim.h"

/* NULL is a budget without a limit. */
void budget_ref(vms_budget *budget);
/* -ENOMEM: the limit.  Nothing is taken then. */
int budget_take(vms_budget *budget, uint64_t bytes);
void budget_give(vms_budget *budget, uint64_t bytes);

#endif
