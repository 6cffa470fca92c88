"""For operators: health, metrics and log formats. Nothing here stands in a packet's way."""
