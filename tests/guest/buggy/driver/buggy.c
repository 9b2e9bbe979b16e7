// SPDX-License-Identifier: GPL-2.0
/* A driver of edu with one bug of each kind that the debug kernel finds: the parameter `how` says which one happens. */
#include <linux/dma-mapping.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/timer.h>

struct table {
	u32 entries[4];
	u32 beside[4];
};

struct timed {
	struct timer_list timer;
};

static struct pci_dev *card;
static DEFINE_MUTEX(first);
static DEFINE_MUTEX(second);
static DEFINE_SPINLOCK(spin);

static noinline u32 use_after_free(void)
{
	u32 *data = kzalloc(64, GFP_KERNEL);

	kfree(data);
	return READ_ONCE(data[2]); /* use-after-free */
}

static noinline u32 out_of_bounds(unsigned int size)
{
	u8 *data = kzalloc(size, GFP_KERNEL);
	u32 value = READ_ONCE(data[size]); /* out-of-bounds */

	kfree(data);
	return value;
}

static noinline u32 index_of(struct table *table, unsigned int at)
{
	return READ_ONCE(table->entries[at]); /* index */
}

static noinline u32 shifted(unsigned int by)
{
	return 1u << by; /* shift */
}

static noinline void lock_order(void)
{
	mutex_lock(&first);
	mutex_lock(&second);
	mutex_unlock(&second);
	mutex_unlock(&first);
	mutex_lock(&second);
	mutex_lock(&first); /* lock-order */
	mutex_unlock(&first);
	mutex_unlock(&second);
}

static noinline void sleeps(void)
{
	spin_lock(&spin);
	kfree(kzalloc(16, GFP_KERNEL)); /* sleep */
	spin_unlock(&spin);
}

static void expire(struct timer_list *timer)
{
}

static noinline void freed_timer(void)
{
	struct timed *timed = kzalloc(sizeof(*timed), GFP_KERNEL);

	timer_setup(&timed->timer, expire, 0);
	mod_timer(&timed->timer, jiffies + 100 * HZ);
	kfree(timed); /* timer */
	barrier(); /* no tail call, so that this function is in the stack */
}

static noinline void mapped(bool unmap)
{
	void *buffer = devm_kzalloc(&card->dev, 64, GFP_KERNEL);
	dma_addr_t at;

	if (!buffer)
		return;
	at = dma_map_single(&card->dev, buffer, 64, DMA_TO_DEVICE); /* mapping */
	if (!dma_mapping_error(&card->dev, at) && unmap)
		dma_unmap_single(&card->dev, at, 32, DMA_TO_DEVICE); /* dma-size */
}

static noinline int buggy_set(const char *how, const struct kernel_param *param)
{
	struct table table = { .beside = { 1, 2, 3, 4 } };

	if (!card)
		return -ENODEV;
	if (sysfs_streq(how, "use-after-free"))
		return use_after_free() == 1 ? -EIO : 0;
	if (sysfs_streq(how, "out-of-bounds"))
		return out_of_bounds(60) == 1 ? -EIO : 0;
	if (sysfs_streq(how, "index"))
		return index_of(&table, 5) == 1 ? -EIO : 0;
	if (sysfs_streq(how, "shift"))
		return shifted(40) == 1 ? -EIO : 0;
	if (sysfs_streq(how, "lock-order"))
		lock_order();
	else if (sysfs_streq(how, "sleep"))
		sleeps();
	else if (sysfs_streq(how, "timer"))
		freed_timer();
	else if (sysfs_streq(how, "dma-size") || sysfs_streq(how, "dma-leak"))
		mapped(sysfs_streq(how, "dma-size"));
	else if (sysfs_streq(how, "leak"))
		return kzalloc(100, GFP_KERNEL) ? 0 : -ENOMEM; /* leak */
	else
		return -EINVAL;
	return 0;
}

static const struct kernel_param_ops buggy_ops = { .set = buggy_set };
module_param_cb(how, &buggy_ops, NULL, 0200);

static int buggy_probe(struct pci_dev *dev, const struct pci_device_id *id)
{
	int error = pcim_enable_device(dev);

	if (error)
		return error;
	card = dev;
	return dma_set_mask_and_coherent(&dev->dev, DMA_BIT_MASK(64));
}

static void buggy_remove(struct pci_dev *dev)
{
	card = NULL;
}

static const struct pci_device_id buggy_ids[] = { { PCI_DEVICE(0x1234, 0x11e8) }, {} };
MODULE_DEVICE_TABLE(pci, buggy_ids);
static struct pci_driver buggy_driver = {
	.name = "buggy",
	.id_table = buggy_ids,
	.probe = buggy_probe,
	.remove = buggy_remove,
};
module_pci_driver(buggy_driver);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("test of the debug kernel");
