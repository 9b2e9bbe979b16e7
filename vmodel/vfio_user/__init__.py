"""The vfio-user protocol: QEMU's docs/interop/vfio-user.rst."""
