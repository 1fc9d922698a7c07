"""What a run leaves behind: its folder, its metrics and where they go, where it comes from, its export."""
