// SPDX-License-Identifier: GPL-2.0
/*
 * The bugs, one of each kind.  Each prints one line, with the address and the size of its mapping:
 *
 *	dma: bug=leak iova=0x000000000fffd000 bytes=12288
 *
 * All else is right: a mapping is whole pages, which the device accesses to the last byte, in the mapping's direction.
 */
#define pr_fmt(fmt) "dma: " fmt

#include <linux/delay.h>
#include <linux/gfp.h>
#include <linux/io.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/pci.h>
#include <linux/printk.h>
#include <linux/slab.h>
#include <linux/string.h>

#include "edudma.h"

/* More than the 10 ms after which Linux's deferred flush has happened. */
#define AFTER_FLUSH_MS 100
#define STALE_TRANSFERS 4
#define STALE_BYTES 16

static void planted(struct edu *edu, dma_addr_t at, size_t bytes)
{
	pr_info("bug=%s iova=%pad bytes=%zu\n", edu->bug->name, &at, bytes);
}

/* The driver omits the unmap: a buffer is mapped when the driver has gone.  Its pages stay allocated, too, so that this
 * is the only bug: nobody maps them again. */
static int bug_leak(struct edu *edu, struct edu_buffer *buffer)
{
	size_t offset;
	int error = 0;

	for (offset = 0; !error && offset < buffer->bytes; offset += EDU_BUFFER_SIZE)
		error = edu_write(edu, buffer->at + offset, EDU_BUFFER_SIZE);
	buffer->data = NULL;
	return error;
}

/* The device writes when the mapping has gone: from the IOMMU, too. */
static int bug_after_unmap(struct edu *edu, struct edu_buffer *buffer)
{
	int error = edu_write(edu, buffer->at, buffer->bytes);

	buffer_unmap(edu, buffer);
	msleep(AFTER_FLUSH_MS);
	return error ?: edu_write(edu, buffer->at, buffer->bytes);
}

/* The device writes right after the unmap.  With a deferred flush the IOMMU may let it. */
static int bug_stale(struct edu *edu, struct edu_buffer *buffer)
{
	int error = edu_write(edu, buffer->at, buffer->bytes);
	int n;

	buffer_unmap(edu, buffer);
	for (n = 0; !error && n < STALE_TRANSFERS; n++)
		error = edu_write(edu, buffer->at, STALE_BYTES);
	return error;
}

/* The device gets a physical address.  IOVAs are given out from the end of the device's 28 bits down, so that none is
 * equal to it: ZONE_DMA has 24 bits. */
static int bug_unmapped(struct edu *edu, struct edu_buffer *unused)
{
	void *data = (void *)get_zeroed_page(GFP_KERNEL | GFP_DMA);
	int error;

	if (!data)
		return -ENOMEM;
	planted(edu, virt_to_phys(data), PAGE_SIZE);
	error = edu_read(edu, virt_to_phys(data), PAGE_SIZE);
	free_page((unsigned long)data);
	return error;
}

/* The device reads a buffer, and writes its answer to the same one, which is mapped to be read. */
static int bug_direction(struct edu *edu, struct edu_buffer *buffer)
{
	return edu_read(edu, buffer->at, buffer->bytes) ?: edu_write(edu, buffer->at, buffer->bytes);
}

/* All is well until the driver is removed. */
static int bug_in_flight(struct edu *edu, struct edu_buffer *buffer)
{
	int error = edu_write(edu, buffer->at, buffer->bytes);

	if (!error) {
		edu->late = *buffer;
		buffer->data = NULL;
	}
	return error;
}

/* The last transfer has been started, and nobody waits for its end. */
static void bug_in_flight_remove(struct edu *edu)
{
	edu_start(edu, edu->late.at, edu->late.bytes, EDU_DMA_TO_RAM);
	pci_clear_master(to_pci_dev(edu->dev));
	buffer_end(edu, &edu->late);
}

/* The device may read and write, and only reads. */
static int bug_both_directions(struct edu *edu, struct edu_buffer *buffer)
{
	return edu_read(edu, buffer->at, buffer->bytes);
}

/* 16 pages, of which the device needs an eighth of one. */
static int bug_too_large(struct edu *edu, struct edu_buffer *buffer)
{
	return edu_write(edu, buffer->at, 512);
}

/* The device never gets the address. */
static int bug_unused(struct edu *edu, struct edu_buffer *buffer)
{
	return 0;
}

/* A page at two addresses at once, at the second for writes: that the first is only for reads protects nothing. */
static int bug_mapped_twice(struct edu *edu, struct edu_buffer *buffer)
{
	struct edu_buffer again = *buffer;
	int error;

	again.direction = DMA_FROM_DEVICE;
	again.mapped = false;
	error = buffer_map(edu, &again);
	if (error)
		return error;
	planted(edu, again.at, again.bytes);
	error = edu_read(edu, buffer->at, buffer->bytes) ?: edu_write(edu, again.at, again.bytes);
	buffer_unmap(edu, &again);
	return error;
}

struct edu_request {
	struct list_head list;
	void (*done)(struct edu_request *request);
	struct edu *edu;
	u8 answer[64] ____cacheline_aligned;
};

static void edu_request_done(struct edu_request *request)
{
	list_del(&request->list);
	kfree(request);
}

/* 64 bytes with the kernel's pointers beside them: what is mapped is their page. */
static int bug_exposed(struct edu *edu, struct edu_buffer *unused)
{
	struct edu_request *request = kzalloc(sizeof(*request), GFP_KERNEL);
	size_t bytes = sizeof(request->answer);
	LIST_HEAD(requests);
	dma_addr_t at;
	int error;

	if (!request)
		return -ENOMEM;
	request->done = edu_request_done;
	request->edu = edu;
	list_add(&request->list, &requests);
	at = dma_map_single(edu->dev, request->answer, bytes, DMA_FROM_DEVICE);
	error = dma_mapping_error(edu->dev, at);
	if (!error) {
		planted(edu, at, bytes);
		error = edu_write(edu, at, bytes);
		dma_unmap_single(edu->dev, at, bytes, DMA_FROM_DEVICE);
	}
	request->done(request);
	return error;
}

static const struct edu_bug bugs[] = {
	{ "" },
	{ "leak", 3 * PAGE_SIZE, DMA_FROM_DEVICE, bug_leak },
	{ "after_unmap", PAGE_SIZE, DMA_FROM_DEVICE, bug_after_unmap },
	{ "unmapped", 0, DMA_NONE, bug_unmapped },
	{ "direction", PAGE_SIZE, DMA_TO_DEVICE, bug_direction },
	{ "in_flight", PAGE_SIZE, DMA_FROM_DEVICE, bug_in_flight, bug_in_flight_remove },
	{ "both_directions", PAGE_SIZE, DMA_BIDIRECTIONAL, bug_both_directions },
	{ "too_large", SZ_64K, DMA_FROM_DEVICE, bug_too_large },
	{ "unused", PAGE_SIZE, DMA_FROM_DEVICE, bug_unused },
	{ "mapped_twice", PAGE_SIZE, DMA_TO_DEVICE, bug_mapped_twice },
	{ "exposed", 0, DMA_NONE, bug_exposed },
	{ "stale", PAGE_SIZE, DMA_FROM_DEVICE, bug_stale },
};

int edu_bug_happens(struct edu *edu)
{
	const struct edu_bug *chosen = edu->bug;
	struct edu_buffer buffer = {};
	int error = 0;

	if (chosen->bytes) {
		error = buffer_make(&buffer, chosen->bytes, chosen->direction) ?: buffer_map(edu, &buffer);
		if (!error && chosen->use != bug_mapped_twice)
			planted(edu, buffer.at, buffer.bytes);
	}
	if (!error && chosen->use)
		error = chosen->use(edu, &buffer);
	buffer_end(edu, &buffer);
	return error;
}

const struct edu_bug *edu_find_bug(const char *name)
{
	size_t n;

	for (n = 0; n < ARRAY_SIZE(bugs); n++)
		if (!strcmp(name, bugs[n].name))
			return &bugs[n];
	return NULL;
}
