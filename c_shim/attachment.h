/* SPDX-License-Identifier: MIT
 * A requester's accesses with one PASID, or with none, go through a domain. */
#ifndef VMS_ATTACHMENT_H
#define VMS_ATTACHMENT_H

#include "domain.h"

typedef struct attachment {
    span_node pasid;          /* first: a span_node * is an attachment *; in the requester's tree unless VMS_NO_PASID */
    domain_listener listener; /* domain's */
    vms_requester *requester;
    vms_domain *domain;
    struct ledger_space *space; /* under requester->lock; NULL: it is not followed; see ledger.h */
    struct witness *witness; /* under requester->lock; NULL: unknown; see stale.h */
} attachment;

#endif
