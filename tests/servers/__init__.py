"""Tests with other makers' CMP servers: `python3 tests --servers`."""
