// SPDX-License-Identifier: GPL-2.0
/* The driver of a card that computes the CRC-32 of memory: /dev/crccard.  Each write is a command, and a read returns its
 * result, as eight hexadecimal digits: exec 3<>/dev/crccard; printf abc >&3; read crc <&3 */
#include <linux/completion.h>
#include <linux/dma-mapping.h>
#include <linux/fs.h>
#include <linux/interrupt.h>
#include <linux/io-64-nonatomic-lo-hi.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/uaccess.h>

#include "crc_regs.h"

#define LARGEST (64 * 1024)

struct crccard {
	struct device *dev;
	void __iomem *regs;
	void *buffer; /* of LARGEST bytes, which the card reads */
	dma_addr_t address;
	struct completion done;
	struct mutex lock; /* one command at a time */
	struct miscdevice misc;
	u32 result;
};

static irqreturn_t crccard_interrupt(int irq, void *data)
{
	struct crccard *card = data;

	complete(&card->done);
	return IRQ_HANDLED;
}

static int crccard_command(struct crccard *card, size_t length)
{
	u32 status;

	reinit_completion(&card->done);
	writel(CRC_STATUS_DONE | CRC_STATUS_ERROR, card->regs + CRC_STATUS);
	lo_hi_writeq(card->address, card->regs + CRC_SOURCE);
	writel(length, card->regs + CRC_LENGTH);
	if (!wait_for_completion_timeout(&card->done, HZ))
		dev_warn(card->dev, "no interrupt in a second: polling\n");
	status = readl(card->regs + CRC_STATUS);
	if (!(status & CRC_STATUS_DONE))
		return -ETIMEDOUT;
	if (status & CRC_STATUS_ERROR)
		return -EIO;
	card->result = readl(card->regs + CRC_RESULT);
	return 0;
}

static ssize_t crccard_write(struct file *file, const char __user *data, size_t length, loff_t *offset)
{
	struct crccard *card = container_of(file->private_data, struct crccard, misc);
	int error = 0;

	if (!length || length > LARGEST)
		return -EINVAL;
	mutex_lock(&card->lock);
	if (copy_from_user(card->buffer, data, length))
		error = -EFAULT;
	else
		error = crccard_command(card, length);
	mutex_unlock(&card->lock);
	*offset = 0; /* reads begin at the start of the result */
	return error ? error : length;
}

static ssize_t crccard_read(struct file *file, char __user *data, size_t length, loff_t *offset)
{
	struct crccard *card = container_of(file->private_data, struct crccard, misc);
	char text[10];

	mutex_lock(&card->lock);
	snprintf(text, sizeof(text), "%08x\n", card->result);
	mutex_unlock(&card->lock);
	return simple_read_from_buffer(data, length, offset, text, sizeof(text) - 1);
}

static const struct file_operations crccard_operations = {
	.owner = THIS_MODULE,
	.read = crccard_read,
	.write = crccard_write,
};

static int crccard_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	struct device *dev = &pdev->dev;
	struct crccard *card = devm_kzalloc(dev, sizeof(*card), GFP_KERNEL);
	int error;

	if (!card)
		return -ENOMEM;
	card->dev = dev;
	init_completion(&card->done);
	mutex_init(&card->lock);
	pci_set_drvdata(pdev, card);

	error = pcim_enable_device(pdev);
	if (error)
		return error;
	card->regs = pcim_iomap_region(pdev, 0, KBUILD_MODNAME);
	if (IS_ERR(card->regs))
		return PTR_ERR(card->regs);
	if (readl(card->regs + CRC_ID) != CRC_ID_RESET)
		return dev_err_probe(dev, -ENODEV, "this is another card, or another version\n");

	error = dma_set_mask_and_coherent(dev, DMA_BIT_MASK(64));
	if (error)
		return error;
	card->buffer = dmam_alloc_coherent(dev, LARGEST, &card->address, GFP_KERNEL);
	if (!card->buffer)
		return -ENOMEM;
	pci_set_master(pdev);

	error = pci_alloc_irq_vectors(pdev, 1, 1, PCI_IRQ_MSI);
	if (error < 0)
		return error;
	error = devm_request_irq(dev, pci_irq_vector(pdev, 0), crccard_interrupt, 0, KBUILD_MODNAME, card);
	if (error)
		return error;

	card->misc.name = KBUILD_MODNAME;
	card->misc.minor = MISC_DYNAMIC_MINOR;
	card->misc.fops = &crccard_operations;
	card->misc.parent = dev;
	return misc_register(&card->misc);
}

static void crccard_remove(struct pci_dev *pdev)
{
	struct crccard *card = pci_get_drvdata(pdev);

	misc_deregister(&card->misc);
	/* No more DMA: the buffer is freed next. */
	pci_clear_master(pdev);
}

static const struct pci_device_id crccard_ids[] = {
	{ PCI_DEVICE(0x1234, 0xc3c3) },
	{},
};
MODULE_DEVICE_TABLE(pci, crccard_ids);

static struct pci_driver crccard_driver = {
	.name = KBUILD_MODNAME,
	.id_table = crccard_ids,
	.probe = crccard_probe,
	.remove = crccard_remove,
	/* A file that is open would outlive the card's memory. */
	.driver = { .suppress_bind_attrs = true },
};
module_pci_driver(crccard_driver);

MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("driver of a card that computes the CRC-32 of memory");
