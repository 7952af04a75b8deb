"""The memory that a process may use."""

import os
import resource


def limit() -> int:
    """Bytes of address space that this process may use: the memory of the machine, or the limit of `ulimit -v`.

    Example:
      >>> from tf_repvgg import memory
      >>> memory.limit() > 2**20
      True
    """
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [number for number in resource.getrlimit(resource.RLIMIT_AS) if number != resource.RLIM_INFINITY]
    return min([machine, *limits])
