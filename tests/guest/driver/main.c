// SPDX-License-Identifier: GPL-2.0
/* Lets the model edu compute the factorial of a parameter when it is bound; the result is in the log. */
#include <linux/module.h>
#include <linux/pci.h>

#include "registers.h"

static uint number = 4;
module_param(number, uint, 0444);
MODULE_PARM_DESC(number, "whose factorial");

static int factorial_probe(struct pci_dev *dev, const struct pci_device_id *id)
{
	int error = pcim_enable_device(dev);
	void __iomem *registers;

	if (error)
		return error;
	registers = pcim_iomap(dev, 0, 0);
	if (!registers)
		return -ENOMEM;
	dev_notice(&dev->dev, "%u! = %u\n", number, factorial(registers, number));
	return 0;
}

static const struct pci_device_id factorial_ids[] = {
	{ PCI_DEVICE(0x1234, 0x11e8) },
	{},
};
MODULE_DEVICE_TABLE(pci, factorial_ids);

static struct pci_driver factorial_driver = {
	.name = "factorial",
	.id_table = factorial_ids,
	.probe = factorial_probe,
};
module_pci_driver(factorial_driver);

MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("test of modules that are built from source");
