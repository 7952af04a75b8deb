"""Helpers of several test files: small networks, random weights, and programs that run beside the tests."""
