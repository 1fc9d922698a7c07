"""The doors: what other programs reach over HTTP. Each has a thread and an event loop of its own."""
