"""The built-in models, by the name that a machine file uses; imported only when asked for."""

#: The models of IOMMUs that a guest drives, by kind.
IOMMUS: dict[str, str] = {
    "virtio-iommu": "vmodel.devices.virtio_iommu:VirtioIommuDevice",
    "vt-d": "vmodel.devices.vtd.unit:VtdDevice",
}

BUILTIN: dict[str, str] = {
    "edu": "vmodel.devices.edu:Edu",
    "idio16": "vmodel.devices.idio16:Idio16",
    "nvme": "vmodel.devices.nvme:Nvme",
}
