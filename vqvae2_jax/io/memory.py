"""Memory that a program may still use, on the machine and in its container."""

import pathlib

import psutil

_CGROUP = pathlib.Path('/proc/self/cgroup')
_MOUNT = pathlib.Path('/sys/fs/cgroup')
# Version of the control groups -> files of the limit and of the use, and the cached files in memory.stat.
_FILES = {
    2: ('memory.max', 'memory.current', 'inactive_file'),
    1: ('memory.limit_in_bytes', 'memory.usage_in_bytes', 'total_inactive_file'),
}


def free() -> int:
    """Returns the free bytes: those of the machine, or those that the container's limit leaves if they are fewer."""
    return min([psutil.virtual_memory().available, *_free_in_groups()])


def _free_in_groups() -> list[int]:
    """Returns what the limits of this process's control groups, and of those above them, leave."""
    try:
        lines = _CGROUP.read_text().splitlines()
    except OSError:  # not on Linux
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(':', 2)
        if controllers and 'memory' not in controllers.split(','):
            continue
        root, version = (_MOUNT / 'memory', 1) if controllers else (_MOUNT, 2)
        # In a container the path may be that of the host, and the container's own group is the root.
        group = root / path.lstrip('/')
        for each in (group, *group.parents):
            if each.is_relative_to(root):
                found += _free_in_group(each, *_FILES[version])
    return found


def _free_in_group(group, limit, used, cached) -> list[int]:
    try:
        left = int((group / limit).read_text()) - int((group / used).read_text())
        numbers = dict(line.split() for line in (group / 'memory.stat').read_text().splitlines())
        return [max(left + int(numbers[cached]), 0)]  # cached files make room
    except (OSError, ValueError, KeyError):  # no limit ('max'), or no such file
        return []
