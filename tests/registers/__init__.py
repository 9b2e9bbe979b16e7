"""Registers: access modes, arrays, specifications."""
