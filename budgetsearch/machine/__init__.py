"""Cards: profiles, detection and memory."""
