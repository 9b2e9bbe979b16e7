"""ACPI tables that tell a guest of the machine's IOMMUs; QEMU adds them with -acpitable."""
