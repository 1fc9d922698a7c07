"""Engines in actors of a Ray cluster: the learner's side is a policy, and players have its completions alone."""
