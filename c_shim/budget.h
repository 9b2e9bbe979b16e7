/* SPDX-License-Identifier: MIT
 * A limit of memory in bytes, shared by several domains; see budget.c. */
#ifndef VMS_BUDGET_H
#define VMS_BUDGET_H

#include "vmshim.h"

/* NULL is a budget without a limit. */
void budget_ref(vms_budget *budget);
/* -ENOMEM: the limit.  Nothing is taken then. */
int budget_take(vms_budget *budget, uint64_t bytes);
void budget_give(vms_budget *budget, uint64_t bytes);

#endif
