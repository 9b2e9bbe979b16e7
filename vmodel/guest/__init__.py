"""Stock guests: QEMU, kernels and packages from the cache, the initramfs, and guests while they run."""
