"""Heat maps, plots and the report of results. Needs the ``train`` extra."""
