"""What tests of models and drivers import: the pytest plugin, fakes of a driver and of memory, an NVMe client."""
