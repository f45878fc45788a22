"""The tests share these: data, models, servers, comparisons and their tolerances."""
