"""The built-in models by their name in a machine file, as "module:Class"; a module is imported when a file uses it."""

#: The models of IOMMUs that a guest drives, by the IOMMU's kind.
IOMMUS: dict[str, str] = {
    "virtio-iommu": "vmodel.devices.virtio_iommu:VirtioIommuDevice",
    "vt-d": "vmodel.devices.vtd.unit:VtdDevice",
}

BUILTIN: dict[str, str] = {
    "edu": "vmodel.devices.edu:Edu",
    "idio16": "vmodel.devices.idio16:Idio16",
    "nvme": "vmodel.devices.nvme:Nvme",
}
