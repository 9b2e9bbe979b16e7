"""ACPI tables that describe the machine's IOMMUs to a guest; QEMU adds them with -acpitable."""
