"""The servers and the memory group of tests.support; a benchmark does not find that package by itself."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.cgroup import MemoryGroup, NoCgroup, drop_pages, memory_group
from tests.support.http_server import HttpFaultServer
from tests.support.s3_server import S3Server

__all__ = ["HttpFaultServer", "MemoryGroup", "NoCgroup", "S3Server", "drop_pages", "memory_group"]
