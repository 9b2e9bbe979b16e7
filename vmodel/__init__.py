"""vmodel: emulated PCI devices and IOMMUs in Python for stock QEMU, over vfio-user."""
