"""Where the kernel notes a module's name and the addresses of its code: offsets in its `struct module`."""

from __future__ import annotations

from dataclasses import dataclass

from vmodel.coverage.btf import Btf


@dataclass(frozen=True)
class ModuleLayout:
    """Offsets in bytes in `struct module` (include/linux/module.h), and its `size` in bytes.

    `name`: of char[56]; `text_base`, `init_base`: of the addresses (8 bytes each) at which the module's code, and its
    code for initialization only, are; `text_size`, `init_size`: of their sizes in bytes (4 bytes each).
    """

    size: int
    name: int
    text_base: int
    text_size: int
    init_base: int
    init_size: int

    @classmethod
    def of_btf(cls, btf: Btf) -> ModuleLayout:
        """That of the kernel which has these types.  ValueError: they have no such structure."""
        if module := btf.structure("module", "name", "mem"):
            return cls._of_memories(btf, module.size, module.members["name"], module.members["mem"])
        if module := btf.structure("module", "name", "core_layout", "init_layout"):  # before Linux 6.4
            layout = btf.structure("module_layout", "base", "text_size")
            if not layout:
                raise ValueError("its BTF has no struct module_layout")
            base, size = layout.members["base"], layout.members["text_size"]
            core, init = module.members["core_layout"], module.members["init_layout"]
            found = cls(module.size, module.members["name"], core + base, core + size, init + base, init + size)
            return found._checked()
        raise ValueError("its BTF has no struct module")

    @classmethod
    def _of_memories(cls, btf: Btf, size: int, name: int, mem: int) -> ModuleLayout:
        """Of `struct module_memory mem[]`, one of each `enum mod_mem_type`."""
        memory = btf.structure("module_memory", "base", "size")
        kinds = btf.enumeration("mod_mem_type", "MOD_TEXT", "MOD_INIT_TEXT")
        if not memory or not kinds:
            raise ValueError("its BTF has no struct module_memory")
        text, init = (mem + kinds[kind] * memory.size for kind in ("MOD_TEXT", "MOD_INIT_TEXT"))
        at, length = memory.members["base"], memory.members["size"]
        return cls(size, name, text + at, text + length, init + at, init + length)._checked()

    def _checked(self) -> ModuleLayout:
        ends = (self.name + 56, self.text_base + 8, self.text_size + 4, self.init_base + 8, self.init_size + 4)
        offsets = (self.name, self.text_base, self.text_size, self.init_base, self.init_size)
        if min(offsets) < 0 or max(ends) > self.size or self.size > 1 << 16:
            raise ValueError("its struct module has members outside of it")
        return self
