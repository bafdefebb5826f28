"""How well a cache of rows would serve real text: hit rate against size, and the laws behind it."""
