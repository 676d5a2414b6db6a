"""Files as such: how they are written whole, and what is checked before one is believed."""
