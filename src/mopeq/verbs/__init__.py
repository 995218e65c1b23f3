"""The verbs beside the line itself: each looks at a finished checkpoint or a run directory and leaves it as it is."""
