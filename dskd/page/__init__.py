"""The page for the inspector: one web application over any source of detectors, and its guard."""
