"""Other engines, in an environment of their own; nothing of them is imported in our process."""
