"""Programs that measurements run in processes of their own; each prints one JSON document."""
