"""Keeping freed memory: a process's own malloc, and the way back."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from gvsl_zoo.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(2**23)  # 32 MiB, taken and freed
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if keep_freed_memory():
    kept = min(faults() for _ in range(8))  # the first ones take it
    keep_freed_memory(False)
    print(kept, faults())
"""


def test_what_is_freed_is_taken_again_without_page_faults_until_it_is_given_back():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    if not done.stdout:
        pytest.skip("this system's malloc is not glibc's")
    kept, given_back = map(int, done.stdout.split())
    assert kept < 100 < given_back
