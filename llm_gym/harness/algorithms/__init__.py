"""Rewards, advantages, losses, KL, importance sampling: pure functions from episodes to what a token costs."""
