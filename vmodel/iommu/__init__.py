"""IOMMUs, groups, domains, address spaces and faults, as Linux's iommu core, VFIO type1 and iommufd have them."""
