"""From a config to a finished run, alone, with others, or as one of a sweep."""
