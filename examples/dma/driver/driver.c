// SPDX-License-Identifier: GPL-2.0
/*
 * A driver of the edu device (PCI 1234:11e8) that moves pages to the device and back when it is loaded, and checks them.
 * Its DMA is right, unless the parameter `bug` is the name of a bug of bugs.c: that one happens afterwards.
 */
#include <linux/io.h>
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/string.h>

#include "edudma.h"

static char *bug = "";
module_param(bug, charp, 0444);
MODULE_PARM_DESC(bug, "which bug happens (see README.md); empty: none");

/* A page to the device, and back into another one. */
static int edu_round_trip(struct edu *edu, u8 seed)
{
	struct edu_buffer out = {}, back = {};
	int error = buffer_make(&out, PAGE_SIZE, DMA_TO_DEVICE) ?: buffer_make(&back, PAGE_SIZE, DMA_FROM_DEVICE);

	if (error)
		goto end;
	memset(out.data, seed, PAGE_SIZE);
	error = buffer_map(edu, &out) ?: edu_read(edu, out.at, PAGE_SIZE);
	buffer_unmap(edu, &out);
	if (error)
		goto end;
	error = buffer_map(edu, &back) ?: edu_write(edu, back.at, PAGE_SIZE);
	buffer_unmap(edu, &back);
	if (!error && memcmp(out.data, back.data, PAGE_SIZE)) {
		dev_err(edu->dev, "the device has returned other data\n");
		error = -EIO;
	}
end:
	buffer_end(edu, &back);
	buffer_end(edu, &out);
	return error;
}

static int edu_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	struct device *dev = &pdev->dev;
	struct edu *edu = devm_kzalloc(dev, sizeof(*edu), GFP_KERNEL);
	int error;

	if (!edu)
		return -ENOMEM;
	edu->dev = dev;
	edu->bug = edu_find_bug(bug);
	if (!edu->bug)
		return dev_err_probe(dev, -EINVAL, "there is no bug \"%s\"\n", bug);
	pci_set_drvdata(pdev, edu);
	error = pcim_enable_device(pdev);
	if (error)
		return error;
	edu->regs = pcim_iomap_region(pdev, 0, KBUILD_MODNAME);
	if (IS_ERR(edu->regs))
		return PTR_ERR(edu->regs);
	if (readl(edu->regs + EDU_ID) != EDU_ID_VALUE)
		return dev_err_probe(dev, -ENODEV, "this is not version 1.0 of edu\n");
	error = dma_set_mask_and_coherent(dev, DMA_BIT_MASK(EDU_DMA_BITS));
	if (error)
		return error;
	error = edu_wait(edu); /* for what an earlier driver has left in flight */
	if (error)
		return error;
	pci_set_master(pdev);
	error = edu_round_trip(edu, 0x11) ?: edu_round_trip(edu, 0x22) ?: edu_bug_happens(edu);
	if (error)
		pci_clear_master(pdev);
	return error;
}

static void edu_remove(struct pci_dev *pdev)
{
	struct edu *edu = pci_get_drvdata(pdev);

	if (edu->bug->remove)
		edu->bug->remove(edu);
	pci_clear_master(pdev);
}

static const struct pci_device_id edu_ids[] = {
	{ PCI_DEVICE(0x1234, 0x11e8) },
	{},
};
MODULE_DEVICE_TABLE(pci, edu_ids);

static struct pci_driver edu_driver = {
	.name = KBUILD_MODNAME,
	.id_table = edu_ids,
	.probe = edu_probe,
	.remove = edu_remove,
};
module_pci_driver(edu_driver);

MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("driver of edu, with a bug of each kind that DMA can have");
