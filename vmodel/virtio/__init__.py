"""virtio: split virtqueues and the modern PCI transport (VIRTIO 1.3), a base for any virtio device."""
