"""NVMe (base specification 1.4) with the NVM command set."""
