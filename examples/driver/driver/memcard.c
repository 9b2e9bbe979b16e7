// SPDX-License-Identifier: GPL-2.0
/*
 * The driver of a memory card: /dev/memcard, in blocks of 4 KiB.
 *
 * It gives the card one command at a time.  A command that times out is given once more, after a restart of the card.
 */
#include <linux/atomic.h>
#include <linux/crc32.h>
#include <linux/dma-mapping.h>
#include <linux/fs.h>
#include <linux/interrupt.h>
#include <linux/io-64-nonatomic-lo-hi.h>
#include <linux/iopoll.h>
#include <linux/kref.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/wait.h>

#include "memcard_regs.h"

#define BLOCK 4096
#define ENTRIES 16
#define COMMAND_READ 1
#define COMMAND_WRITE 2
#define COMMAND_TIMEOUT HZ
#define REMOVE_TIMEOUT (HZ / 2)
#define ATTEMPTS 2

#define COMPLETION_PHASE 0x0001
#define COMPLETION_ERROR 0xfffe

/* What the card writes to its ring. */
struct memcard_completion {
	__le32 crc; /* of the block's number and data */
	__le32 block;
	u8 opcode;
	u8 tag;
	__le16 status;
	__le32 reserved;
};

struct memcard_request {
	u32 block;
	u8 opcode;
	u8 tag;
	void *data; /* where a read finds its data */
	dma_addr_t address; /* of a write's data */
	struct memcard_completion result;
};

/* The part that talks to the card: from probe to remove. */
struct memcard_queue {
	struct device *dev;
	void __iomem *regs;
	int irq;
	struct memcard_completion *ring;
	dma_addr_t ring_address;
	void *blocks; /* one for each entry of the ring, for reads */
	dma_addr_t blocks_address;
	unsigned int head; /* the entry of the next completion */
	u16 phase; /* which that entry will have */
};

/* The part that open files refer to. */
struct memcard {
	struct kref references;
	struct mutex lock; /* one command at a time */
	struct miscdevice misc;
	struct memcard_queue *queue;
	unsigned int blocks;
	bool gone;
	atomic_t active;
	wait_queue_head_t idle;
	wait_queue_head_t interrupted;
};

static irqreturn_t memcard_interrupt(int irq, void *data)
{
	struct memcard *card = data;

	wake_up(&card->interrupted);
	return IRQ_HANDLED;
}

static void memcard_start_ring(struct memcard_queue *queue)
{
	queue->head = 0;
	queue->phase = COMPLETION_PHASE;
	lo_hi_writeq(queue->ring_address, queue->regs + MEMCARD_RING);
	writel(MEMCARD_CONTROL_ENABLE, queue->regs + MEMCARD_CONTROL);
}

/* The first restart, before which the card may be in any state. */
static int memcard_enable(struct memcard_queue *queue)
{
	u32 status;
	int error;

	writel(MEMCARD_CONTROL_RESTART, queue->regs + MEMCARD_CONTROL);
	error = readl_poll_timeout(queue->regs + MEMCARD_STATUS, status, !(status & MEMCARD_STATUS_BUSY), 100, USEC_PER_SEC);
	if (error)
		return error;
	memcard_start_ring(queue);
	status = readl(queue->regs + MEMCARD_STATUS);
	return status & MEMCARD_STATUS_READY ? 0 : -EIO;
}

/* After a time-out: the card drops its commands. */
static void memcard_recover(struct memcard_queue *queue)
{
	writel(MEMCARD_CONTROL_RESTART, queue->regs + MEMCARD_CONTROL);
	while (readl(queue->regs + MEMCARD_STATUS) & MEMCARD_STATUS_BUSY)
		usleep_range(100, 200);
	memcard_start_ring(queue);
}

static bool memcard_is_new(struct memcard_queue *queue)
{
	u16 status = le16_to_cpu(READ_ONCE(queue->ring[queue->head].status));

	return (status & COMPLETION_PHASE) == queue->phase;
}

static void memcard_submit(struct memcard_queue *queue, struct memcard_request *request)
{
	dma_addr_t address = request->address;

	request->tag = queue->head;
	if (request->opcode == COMMAND_READ) {
		request->data = queue->blocks + request->tag * BLOCK;
		address = queue->blocks_address + request->tag * BLOCK;
	}
	lo_hi_writeq(address, queue->regs + MEMCARD_DATA);
	writel(request->block, queue->regs + MEMCARD_BLOCK);
	writel(request->tag, queue->regs + MEMCARD_TAG);
	writel(request->opcode, queue->regs + MEMCARD_DOORBELL);
}

static int memcard_complete(struct memcard_queue *queue, struct memcard_request *request)
{
	struct memcard_completion *result = &request->result;

	dma_rmb();
	*result = queue->ring[queue->head];
	if (++queue->head == ENTRIES) {
		queue->head = 0;
		queue->phase ^= COMPLETION_PHASE;
	}
	if (result->tag != request->tag || result->opcode != request->opcode ||
	    le32_to_cpu(result->block) != request->block) {
		dev_err(queue->dev, "a completion of another command, tag %u\n", result->tag);
		return -EIO;
	}
	if (le16_to_cpu(result->status) & COMPLETION_ERROR) {
		dev_err(queue->dev, "block %u: error %u\n", request->block, le16_to_cpu(result->status) >> 1);
		return -EIO;
	}
	return 0;
}

/* Gives up a request to which the card does not answer. */
static void memcard_abandon(struct memcard_queue *queue, struct memcard_request *request)
{
	dev_err(queue->dev, "block %u: gave up\n", request->block);
	if (request->opcode == COMMAND_WRITE)
		dma_unmap_single(queue->dev, request->address, BLOCK, DMA_TO_DEVICE);
	kfree(request);
}

static int memcard_execute(struct memcard *card, struct memcard_request *request)
{
	struct memcard_queue *queue = card->queue;
	int attempt;

	for (attempt = 0; attempt < ATTEMPTS; attempt++) {
		memcard_submit(queue, request);
		if (wait_event_timeout(card->interrupted, memcard_is_new(queue), COMMAND_TIMEOUT))
			return memcard_complete(queue, request);
		dev_warn(queue->dev, "block %u: time-out\n", request->block);
		memcard_recover(queue);
	}
	memcard_abandon(queue, request);
	return -ETIMEDOUT;
}

static bool memcard_crc_is_right(struct memcard_request *request, const void *data)
{
	__le32 block = cpu_to_le32(request->block);
	u32 crc = crc32_le(~0, (const void *)&block, sizeof(block));

	return (crc32_le(crc, data, BLOCK) ^ ~0) == le32_to_cpu(request->result.crc);
}

static int memcard_read_block(struct memcard *card, u32 block, void *to)
{
	struct memcard_request *request = kzalloc(sizeof(*request), GFP_KERNEL);
	int error;

	if (!request)
		return -ENOMEM;
	request->opcode = COMMAND_READ;
	request->block = block;
	error = memcard_execute(card, request);
	if (error)
		goto out;
	memcpy(to, request->data, BLOCK);
	if (!memcard_crc_is_right(request, to)) {
		dev_err(card->queue->dev, "block %u: wrong CRC\n", block);
		error = -EIO;
	}
out:
	kfree(request);
	return error;
}

static int memcard_write_block(struct memcard *card, u32 block, void *from)
{
	struct memcard_request *request = kzalloc(sizeof(*request), GFP_KERNEL);
	int error;

	if (!request)
		return -ENOMEM;
	request->opcode = COMMAND_WRITE;
	request->block = block;
	request->address = dma_map_single(card->queue->dev, from, BLOCK, DMA_TO_DEVICE);
	error = memcard_execute(card, request);
	if (error == -ETIMEDOUT)
		goto out; /* it has been unmapped */
	dma_unmap_single(card->queue->dev, request->address, BLOCK, DMA_TO_DEVICE);
	if (!error && !memcard_crc_is_right(request, from)) {
		dev_err(card->queue->dev, "block %u: the card has other data\n", block);
		error = -EIO;
	}
out:
	kfree(request);
	return error;
}

/* ---- /dev/memcard ---- */

static void memcard_free(struct kref *references)
{
	kfree(container_of(references, struct memcard, references));
}

static int memcard_open(struct inode *inode, struct file *file)
{
	struct memcard *card = container_of(file->private_data, struct memcard, misc);

	kref_get(&card->references);
	file->private_data = card;
	return 0;
}

static int memcard_release(struct inode *inode, struct file *file)
{
	struct memcard *card = file->private_data;

	kref_put(&card->references, memcard_free);
	return 0;
}

static loff_t memcard_llseek(struct file *file, loff_t offset, int whence)
{
	struct memcard *card = file->private_data;

	return fixed_size_llseek(file, offset, whence, (loff_t)card->blocks * BLOCK);
}

/* One command.  `data` has a block. */
static int memcard_transfer(struct memcard *card, u8 opcode, u32 block, void *data)
{
	int error = -ENODEV;

	mutex_lock(&card->lock);
	atomic_inc(&card->active);
	smp_mb__after_atomic(); /* pairs with memcard_remove: one of the two sees the other */
	if (!READ_ONCE(card->gone))
		error = opcode == COMMAND_READ ? memcard_read_block(card, block, data) :
						 memcard_write_block(card, block, data);
	if (atomic_dec_and_test(&card->active))
		wake_up(&card->idle);
	mutex_unlock(&card->lock);
	return error;
}

static ssize_t memcard_read(struct file *file, char __user *to, size_t length, loff_t *offset)
{
	struct memcard *card = file->private_data;
	u32 block = *offset / BLOCK;
	void *data;
	int error;

	if (*offset % BLOCK || length < BLOCK)
		return -EINVAL;
	if (block >= card->blocks)
		return 0;
	data = (void *)__get_free_page(GFP_KERNEL);
	if (!data)
		return -ENOMEM;
	error = memcard_transfer(card, COMMAND_READ, block, data);
	if (!error && copy_to_user(to, data, BLOCK))
		error = -EFAULT;
	free_page((unsigned long)data);
	if (error)
		return error;
	*offset += BLOCK;
	return BLOCK;
}

static ssize_t memcard_write(struct file *file, const char __user *from, size_t length, loff_t *offset)
{
	struct memcard *card = file->private_data;
	u32 block = *offset / BLOCK;
	void *data;
	int error;

	if (*offset % BLOCK || length < BLOCK)
		return -EINVAL;
	if (block >= card->blocks)
		return -ENOSPC;
	data = (void *)__get_free_page(GFP_KERNEL);
	if (!data)
		return -ENOMEM;
	error = -EFAULT;
	if (!copy_from_user(data, from, BLOCK))
		error = memcard_transfer(card, COMMAND_WRITE, block, data);
	free_page((unsigned long)data);
	if (error)
		return error;
	*offset += BLOCK;
	return BLOCK;
}

static const struct file_operations memcard_operations = {
	.owner = THIS_MODULE,
	.open = memcard_open,
	.release = memcard_release,
	.llseek = memcard_llseek,
	.read = memcard_read,
	.write = memcard_write,
};

/* ---- the card ---- */

static void memcard_free_queue(struct memcard_queue *queue)
{
	if (queue->blocks)
		dma_free_coherent(queue->dev, ENTRIES * BLOCK, queue->blocks, queue->blocks_address);
	if (queue->ring)
		dma_free_coherent(queue->dev, ENTRIES * sizeof(*queue->ring), queue->ring, queue->ring_address);
	kfree(queue);
}

static struct memcard_queue *memcard_new_queue(struct pci_dev *pdev, void __iomem *regs)
{
	struct memcard_queue *queue = kzalloc(sizeof(*queue), GFP_KERNEL);

	if (!queue)
		return NULL;
	queue->dev = &pdev->dev;
	queue->regs = regs;
	queue->ring = dma_alloc_coherent(queue->dev, ENTRIES * sizeof(*queue->ring), &queue->ring_address, GFP_KERNEL);
	queue->blocks = dma_alloc_coherent(queue->dev, ENTRIES * BLOCK, &queue->blocks_address, GFP_KERNEL);
	if (!queue->ring || !queue->blocks) {
		memcard_free_queue(queue);
		return NULL;
	}
	return queue;
}

static int memcard_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	struct device *dev = &pdev->dev;
	struct memcard *card;
	void __iomem *regs;
	u32 lines;
	char *label;
	int error;

	error = pcim_enable_device(pdev);
	if (error)
		return error;
	error = pcim_iomap_regions(pdev, BIT(MEMCARD_BAR), KBUILD_MODNAME);
	if (error)
		return error;
	regs = pcim_iomap_table(pdev)[MEMCARD_BAR];
	if (readl(regs + MEMCARD_ID) != MEMCARD_ID_RESET)
		return dev_err_probe(dev, -ENODEV, "this is another card, or another version\n");
	lines = readl(regs + MEMCARD_PAGE_LINES);
	if (lines > 52)
		return dev_err_probe(dev, -EINVAL, "%u address lines\n", lines);
	error = dma_set_mask(dev, DMA_BIT_MASK(12 + lines));
	if (!error)
		error = dma_set_coherent_mask(dev, DMA_BIT_MASK(32));
	if (error)
		return dev_err_probe(dev, error, "no DMA with %u address lines\n", lines);

	card = kzalloc(sizeof(*card), GFP_KERNEL);
	label = kzalloc(BLOCK + 1, GFP_KERNEL);
	if (!card || !label) {
		kfree(card);
		kfree(label);
		return -ENOMEM;
	}
	kref_init(&card->references);
	mutex_init(&card->lock);
	init_waitqueue_head(&card->idle);
	init_waitqueue_head(&card->interrupted);
	card->blocks = min(readl(regs + MEMCARD_BLOCKS), 1u << 16);
	card->queue = memcard_new_queue(pdev, regs);
	if (!card->queue) {
		error = -ENOMEM;
		goto free_card;
	}

	pci_set_master(pdev);
	error = pci_alloc_irq_vectors(pdev, 1, 1, PCI_IRQ_MSI);
	if (error < 0)
		goto free_queue;
	card->queue->irq = pci_irq_vector(pdev, 0);
	error = request_irq(card->queue->irq, memcard_interrupt, 0, KBUILD_MODNAME, card);
	if (error)
		goto free_vectors;
	error = memcard_enable(card->queue);
	if (error)
		goto free_irq;
	error = memcard_read_block(card, 0, label);
	if (error)
		goto free_irq;
	dev_info(dev, "%.14s\n", label);

	card->misc.name = KBUILD_MODNAME;
	card->misc.minor = MISC_DYNAMIC_MINOR;
	card->misc.fops = &memcard_operations;
	card->misc.parent = dev;
	error = misc_register(&card->misc);
	if (error)
		goto free_irq;
	pci_set_drvdata(pdev, card);
	kfree(label);
	return 0;

free_irq:
	pci_clear_master(pdev);
	free_irq(card->queue->irq, card);
free_vectors:
	pci_free_irq_vectors(pdev);
free_queue:
	pci_clear_master(pdev);
	memcard_free_queue(card->queue);
free_card:
	kfree(label);
	kfree(card);
	return error;
}

static void memcard_remove(struct pci_dev *pdev)
{
	struct memcard *card = pci_get_drvdata(pdev);
	struct memcard_queue *queue = card->queue;

	misc_deregister(&card->misc);
	WRITE_ONCE(card->gone, true);
	smp_mb(); /* pairs with memcard_transfer */
	if (!wait_event_timeout(card->idle, !atomic_read(&card->active), REMOVE_TIMEOUT))
		dev_warn(&pdev->dev, "removed while it is busy\n");
	writel(0, queue->regs + MEMCARD_CONTROL);
	pci_clear_master(pdev);
	free_irq(queue->irq, card);
	pci_free_irq_vectors(pdev);
	memcard_free_queue(queue);
	kref_put(&card->references, memcard_free);
}

static const struct pci_device_id memcard_ids[] = {
	{ PCI_DEVICE(0x1234, 0x3e3c) },
	{},
};
MODULE_DEVICE_TABLE(pci, memcard_ids);

static struct pci_driver memcard_driver = {
	.name = KBUILD_MODNAME,
	.id_table = memcard_ids,
	.probe = memcard_probe,
	.remove = memcard_remove,
};
module_pci_driver(memcard_driver);

MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("driver of a memory card");
