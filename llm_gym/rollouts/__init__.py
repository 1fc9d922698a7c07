"""Episodes played against a policy, none waiting for another's turn."""
