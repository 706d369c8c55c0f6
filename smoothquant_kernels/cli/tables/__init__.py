"""Tables that several commands show."""
