"""What the tests share: data, models, servers, comparisons and their tolerances."""
