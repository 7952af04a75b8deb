"""What several test files use: small networks, random weights, and programs to run beside the tests."""
