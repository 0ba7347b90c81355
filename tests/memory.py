"""Peak memory, for programs that tests run in a process of their own."""

from __future__ import annotations

PRINT_PEAK = """
status = open("/proc/self/status").read()
print(int(status.partition("VmHWM:")[2].split()[0]) * 1024)
"""
"""Prints the peak resident memory in bytes. (`ru_maxrss` begins with the peak of the parent.)"""
