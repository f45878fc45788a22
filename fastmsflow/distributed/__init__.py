"""Several processes that share one piece of work, and how they are started."""
