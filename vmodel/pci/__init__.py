"""PCI: config space, BARs, capabilities, interrupts."""
