"""Tests with the ACME clients of the package registries: `python3 tests --clients`."""
