"""Caches of keys and values that count their bytes and can be rewound, and rewinding those of `transformers`."""
